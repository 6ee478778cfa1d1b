"""Makes autoencoder_kl_*.npz with diffusers' AutoencoderKL and AutoencoderKLFlux2 at tiny random size (run where they are).

A file holds the configuration, the checkpoint's keys and shapes, the inputs, and what upstream makes of them: of normalised
latents a picture, of a picture the posterior and its normalised mean, as the pipelines of FLUX.1 and FLUX.2 do it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Pipeline

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Class, configuration, latents [b c h w]. Widths and group counts differ; sides are odd where the model allows it.
CASES = {
    "autoencoder_kl_flux": (
        AutoencoderKL,
        dict(block_out_channels=(4, 8, 12, 12), layers_per_block=1, latent_channels=5, norm_num_groups=4, scaling_factor=0.3611)
        | dict(shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        (2, 5, 3, 5),
    ),
    "autoencoder_kl_quant": (
        AutoencoderKL,
        dict(block_out_channels=(6, 9), layers_per_block=2, latent_channels=4, norm_num_groups=3, scaling_factor=1.5)
        | dict(mid_block_add_attention=False),
        (2, 4, 7, 5),
    ),
    "autoencoder_kl_flux2": (
        AutoencoderKLFlux2,
        dict(block_out_channels=(4, 8, 12), layers_per_block=1, latent_channels=6, norm_num_groups=4, batch_norm_eps=0.01),
        (2, 6, 2, 6),
    ),
    "autoencoder_kl_flux2_small": (
        AutoencoderKLFlux2,
        dict(block_out_channels=(6, 8), decoder_block_out_channels=(4, 6), layers_per_block=1, latent_channels=3)
        | dict(norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False),
        (2, 3, 10, 6),
    ),
}


def normalisation(vae):
    """The functions (normalise, undo) on latents [b c h w]."""
    config = vae.config
    if isinstance(vae, AutoencoderKL):
        shift = config.shift_factor or 0.0
        return lambda z: (z - shift) * config.scaling_factor, lambda z: z / config.scaling_factor + shift
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
    pack, unpack = Flux2Pipeline._patchify_latents, Flux2Pipeline._unpatchify_latents
    return lambda z: unpack((pack(z) - mean) / std), lambda z: unpack(pack(z) * std + mean)


@torch.no_grad()
def main() -> None:
    for name, (model, config, shape) in CASES.items():
        levels = len(config["block_out_channels"])
        types = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
        vae = model(**config, **types).eval()
        keys = tiny.fill(vae, name)
        normalise, undo = normalisation(vae)
        random = np.random.RandomState(0)
        stride = 2 ** (levels - 1)
        latents = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        pixels = torch.from_numpy(random.uniform(-1, 1, (shape[0], 3, shape[2] * stride, shape[3] * stride)).astype(np.float32))
        posterior = vae.encode(pixels).latent_dist
        outputs = {
            "decoded": vae.decode(undo(latents)).sample,
            "encoded": torch.stack([posterior.mean, posterior.logvar]),
            "normalised": normalise(posterior.mean),
        }
        arrays = {"latents": latents, "pixels": pixels, **outputs}
        file = HERE / f"{name}.npz"
        np.savez_compressed(
            file,
            config=np.array(vae.to_json_string()),
            keys=np.array(json.dumps(keys)),
            **{key: tensor.numpy() for key, tensor in arrays.items()},
        )
        print(file.name, file.stat().st_size, {key: float(tensor.std()) for key, tensor in arrays.items()})


if __name__ == "__main__":
    main()
