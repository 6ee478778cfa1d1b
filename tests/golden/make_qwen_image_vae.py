"""Makes qwen_image_vae_*.npz with diffusers' AutoencoderKLQwenImage at tiny random size (run where it is).

A file holds the configuration, the checkpoint's keys and shapes, the inputs, and what upstream makes of them: of normalised
latents a picture, as the pipeline of Qwen-Image does it, and of a picture the posterior.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Configuration, latents [b c 1 h w].
CASES = {
    "qwen_image_vae_deep": (
        dict(base_dim=6, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]),
        (2, 4, 1, 3, 5),
    ),
    "qwen_image_vae_shallow": (
        dict(base_dim=10, z_dim=3, dim_mult=[1, 3, 2], num_res_blocks=2, temperal_downsample=[True, False]),
        (2, 3, 1, 7, 5),
    ),
}


@torch.no_grad()
def main() -> None:
    for name, (config, shape) in CASES.items():
        z_dim = config["z_dim"]
        config |= {
            "latents_mean": [0.1 * n - 0.2 for n in range(z_dim)],
            "latents_std": [1.0 + 0.25 * n for n in range(z_dim)],
        }
        vae = AutoencoderKLQwenImage(**config).eval()
        keys = tiny.fill(vae, name)
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        random = np.random.RandomState(0)
        stride = 2 ** (len(config["dim_mult"]) - 1)
        sides = (shape[3] * stride, shape[4] * stride)
        latents = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        pixels = torch.from_numpy(random.uniform(-1, 1, (shape[0], 3, 1, *sides)).astype(np.float32))
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(latents * std + mean).sample
        assert decoded.abs().lt(1).float().mean() > 0.8, "most pixels must not be clipped"
        outputs = {
            "decoded": decoded,
            "encoded": torch.stack([posterior.mean, posterior.logvar]),
            "normalised": (posterior.mean - mean) / std,
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
