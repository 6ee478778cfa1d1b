"""Makes wan_vae_*.npz with diffusers' AutoencoderKLWan. It needs torch and diffusers; the tests do not.

    python tests/golden/make_wan_vae.py

A file holds the configuration, the checkpoint's keys and shapes, and upstream's outputs. Weights and inputs are drawn from
`numpy.random.RandomState`, whose streams never change, so both sides make them anew.
"""

import json
import pathlib
import zlib

import numpy as np

CASES = {
    # latents [b c f h w], pixels [b c F H W]
    "wan": (
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]),
        (1, 4, 3, 2, 3),
        (1, 3, 17, 24, 40),
    ),
    "odd": (
        dict(base_dim=6, decoder_base_dim=10, z_dim=3, dim_mult=[1, 3], num_res_blocks=2, temperal_downsample=[True]),
        (2, 3, 5, 5, 3),
        (1, 3, 17, 10, 6),
    ),
}


def random(name, shape):
    """Standard normal numbers that depend on the name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weight(key, shape):
    """A random weight that keeps activations near 1."""
    if key.endswith("gamma"):
        return 1 + 0.2 * random(key, shape)
    if key.endswith("bias"):
        return 0.2 * random(key, shape)
    gain = 0.3 if key == "decoder.conv_out.weight" else 1.0
    return random(key, shape) * np.float32(gain / np.sqrt(np.prod(shape[1:])))


def statistics(z_dim):
    """latents_mean and latents_std of a small model."""
    return {
        "latents_mean": [0.1 * n - 0.2 for n in range(z_dim)],
        "latents_std": [1.0 + 0.25 * n for n in range(z_dim)],
    }


def main():
    import torch
    from diffusers import AutoencoderKLWan

    for name, (config, latents_shape, pixels_shape) in CASES.items():
        config |= statistics(config["z_dim"])
        vae = AutoencoderKLWan(**config).eval()
        shapes = {key: list(tensor.shape) for key, tensor in vae.state_dict().items()}
        vae.load_state_dict({key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()})
        mean, std = (torch.tensor(config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        latents, pixels = torch.from_numpy(random("latents", latents_shape)), torch.from_numpy(random("pixels", pixels_shape))

        def decode(latents, vae=vae, mean=mean, std=std):
            return vae.decode(latents * std + mean).sample

        def encode(pixels, vae=vae):
            posterior = vae.encode(pixels).latent_dist
            return torch.stack([posterior.mean, posterior.logvar])

        with torch.no_grad():
            decoded, encoded = decode(latents), encode(pixels)
            # Causal: a shorter clip is the beginning of a longer one, so the longest is all a test needs.
            for frames in (1, 2):
                short = decode(latents[:, :, :frames])
                torch.testing.assert_close(short, decoded[:, :, : short.shape[2]])
            for frames in (1, 5, 9):
                short = encode(pixels[:, :, :frames])
                torch.testing.assert_close(short, encoded[:, :, :, : short.shape[3]])
        assert decoded.abs().lt(1).float().mean() > 0.9, "most pixels must not be clipped"

        path = pathlib.Path(__file__).with_name(f"wan_vae_{name}.npz")
        meta = {"config": dict(vae.config), "shapes": shapes, "latents": latents_shape, "pixels": pixels_shape}
        np.savez_compressed(path, meta=json.dumps(meta), decoded=decoded.numpy(), encoded=encoded.numpy())
        print(path.name, path.stat().st_size, tuple(decoded.shape), tuple(encoded.shape))


if __name__ == "__main__":
    main()
