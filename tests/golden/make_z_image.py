"""Makes z_image_*.npz with diffusers' ZImageTransformer2DModel at tiny size (run where torch and diffusers are).

Weights are not stored: tests/tiny.py makes the same numbers on both sides. Text is stored padded with noise; upstream is
handed each caption at its own length.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Widths divide by nothing convenient, the rotary axes are all different; "wide" has a timestep narrower than its blocks,
# and embeddings of another patch size that go unused.
CONFIGS = {
    "z_image_narrow": dict(
        in_channels=4, dim=28, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=11, axes_dims=[2, 8, 4],
        axes_lens=[128, 64, 64],
    ),
    "z_image_wide": dict(
        all_patch_size=(4, 2), all_f_patch_size=(1, 1), in_channels=3, dim=264, n_layers=1, n_refiner_layers=1, n_heads=6,
        n_kv_heads=6, norm_eps=1e-4, cap_feat_dim=17, rope_theta=100.0, t_scale=700.0, axes_dims=[20, 8, 16],
        axes_lens=[256, 64, 64],
    ),
}  # fmt: skip
# Latent shape [b c f h w], timesteps [b], padded text length, how many text states are a caption.
CASES = {
    "z_image_narrow": {
        "filled": ((2, 4, 1, 6, 10), (999.0, 12.5), 96, (40, 5)),  # 15 tokens
        "whole": ((2, 4, 1, 6, 64), (437.0, 875.0), 64, (64, 33)),  # 96 tokens
    },
    "z_image_wide": {
        "filled": ((2, 3, 1, 14, 10), (731.25, 250.0), 128, (1, 90)),  # 35 tokens
        "frames": ((2, 3, 3, 2, 22), (88.0, 940.0), 64, (7, 32)),  # 33 tokens
    },
}


def main() -> None:
    for name, config in CONFIGS.items():
        model = ZImageTransformer2DModel(**config).eval()
        shapes = tiny.fill(model, name)
        arrays = {"config": np.array(json.dumps(dict(model.config))), "keys": np.array(json.dumps(shapes))}
        torch.manual_seed(0)
        for case, (shape, timesteps, num_text, lengths) in CASES[name].items():
            latents, text = torch.randn(shape), torch.randn(shape[0], num_text, config["cap_feat_dim"])
            timestep = torch.tensor(timesteps)
            captions = [states[:length] for states, length in zip(text, lengths, strict=True)]
            with torch.no_grad():
                # As the pipeline passes the time, and negates the prediction.
                out = model(list(latents), (1000 - timestep) / 1000, captions, return_dict=False)[0]
            arrays |= {f"{case}/latents": latents.numpy(), f"{case}/text": text.numpy(), f"{case}/timestep": timestep.numpy()}
            arrays[f"{case}/velocity"] = -torch.stack(out).numpy()
            arrays[f"{case}/text_length"] = np.array(lengths, np.int32)
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
