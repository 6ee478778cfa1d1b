"""Makes flux2_*.npz with diffusers' Flux2Transformer2DModel at tiny random size (run where torch and diffusers are).

Latents are packed and positions numbered by the pipeline's own functions. Weights are tiny.tensor's, so none are stored.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Widths divide by nothing convenient, rotary axes are uneven, and the two kinds of blocks differ in number.
CONFIGS = {
    "flux2_klein": dict(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=2,
        joint_attention_dim=11, timestep_guidance_channels=14, mlp_ratio=2.3, axes_dims_rope=(2, 4, 6, 6), rope_theta=2000,
        guidance_embeds=False,
    ),
    "flux2_guided": dict(
        in_channels=12, num_layers=3, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=9, timestep_guidance_channels=16, mlp_ratio=3.0, axes_dims_rope=(4, 4, 2, 6), rope_theta=500,
        eps=1e-5, guidance_embeds=True,
    ),
}  # fmt: skip
# Latent shape [b c h w], sigmas [b], guidance scales [b] or None; grids of one model have equally many tokens.
TEXT_LENGTHS = {"flux2_klein": 7, "flux2_guided": 6}
CASES = {
    "flux2_klein": {
        "wide": ((2, 4, 6, 10), (0.999, 0.0125), None),
        "column": ((2, 4, 30, 2), (0.437, 0.75), None),
    },
    "flux2_guided": {
        "tall": ((3, 3, 14, 6), (1.0, 0.25, 0.6), (0.5, 1.0, 0.25)),
        "wide": ((3, 3, 6, 14), (0.7, 0.7, 0.7), (3.5, 7.25, 4.0)),
    },
}


def main() -> None:
    pipeline = Flux2KleinPipeline
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = Flux2Transformer2DModel(**config).eval()
        arrays = {"config": np.array(json.dumps(dict(model.config))), "keys": np.array(json.dumps(tiny.fill(model, name)))}
        for case, (shape, sigmas, scales) in CASES[name].items():
            latents, sigma = torch.randn(shape), torch.tensor(sigmas)
            text = torch.randn(shape[0], TEXT_LENGTHS[name], config["joint_attention_dim"])
            guidance = None if scales is None else torch.tensor(scales)
            folded = pipeline._patchify_latents(latents)
            ids = pipeline._prepare_latent_ids(folded)
            with torch.no_grad():
                velocity = model(
                    hidden_states=pipeline._pack_latents(folded),
                    encoder_hidden_states=text,
                    timestep=sigma,
                    img_ids=ids,
                    txt_ids=pipeline._prepare_text_ids(text),
                    guidance=guidance,
                    return_dict=False,
                )[0]
            velocity = pipeline._unpatchify_latents(pipeline._unpack_latents_with_ids(velocity, ids))
            arrays |= {f"{case}/latents": latents.numpy(), f"{case}/text": text.numpy()}
            arrays |= {f"{case}/timestep": (sigma * 1000).numpy(), f"{case}/velocity": velocity.numpy()}
            if guidance is not None:
                arrays[f"{case}/guidance"] = guidance.numpy()
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
