"""Makes flux1_*.npz with diffusers' FluxTransformer2DModel at tiny random size (run where torch and diffusers are).

Latents are packed and positions numbered by the pipeline's own functions. Weights are tiny.tensor's, so none are stored.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Widths divide by nothing convenient, rotary axes are uneven, and the two kinds of blocks differ in number.
CONFIGS = {
    "flux1_guided": dict(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=2,
        joint_attention_dim=11, pooled_projection_dim=7, guidance_embeds=True, axes_dims_rope=(4, 6, 8),
    ),
    "flux1_plain": dict(
        in_channels=12, num_layers=3, num_single_layers=2, attention_head_dim=10, num_attention_heads=3,
        joint_attention_dim=9, pooled_projection_dim=13, guidance_embeds=False, axes_dims_rope=(2, 2, 6),
    ),
}  # fmt: skip
# Latent shape [b c h w], sigmas [b], guidance scales [b] or None; grids of one model have equally many tokens.
TEXT_LENGTHS = {"flux1_guided": 7, "flux1_plain": 6}
CASES = {
    "flux1_guided": {
        "wide": ((2, 4, 6, 10), (0.999, 0.0125), (3.5, 7.25)),
        "column": ((2, 4, 30, 2), (0.437, 0.75), (0.5, 1.0)),
    },
    "flux1_plain": {
        "tall": ((3, 3, 14, 6), (1.0, 0.25, 0.6), None),
        "wide": ((3, 3, 6, 14), (0.7, 0.7, 0.7), None),
    },
}


def main() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**config).eval()
        arrays = {"config": np.array(json.dumps(dict(model.config))), "keys": np.array(json.dumps(tiny.fill(model, name)))}
        for case, (shape, sigmas, scales) in CASES[name].items():
            batch, channels, height, width = shape
            text_length = TEXT_LENGTHS[name]
            latents, sigma = torch.randn(shape), torch.tensor(sigmas)
            text = torch.randn(batch, text_length, config["joint_attention_dim"])
            pooled = torch.randn(batch, config["pooled_projection_dim"])
            guidance = None if scales is None else torch.tensor(scales)
            with torch.no_grad():
                velocity = model(
                    hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
                    encoder_hidden_states=text,
                    pooled_projections=pooled,
                    timestep=sigma,
                    img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
                    txt_ids=torch.zeros(text_length, 3),
                    guidance=guidance,
                    return_dict=False,
                )[0]
            velocity = FluxPipeline._unpack_latents(velocity, 8 * height, 8 * width, vae_scale_factor=8)
            arrays |= {f"{case}/latents": latents.numpy(), f"{case}/text": text.numpy(), f"{case}/pooled": pooled.numpy()}
            arrays |= {f"{case}/timestep": (sigma * 1000).numpy(), f"{case}/velocity": velocity.numpy()}
            if guidance is not None:
                arrays[f"{case}/guidance"] = guidance.numpy()
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
