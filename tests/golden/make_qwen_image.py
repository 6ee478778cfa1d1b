"""Makes qwen_image_*.npz with diffusers' QwenImageTransformer2DModel at tiny size (run where torch and diffusers are).

Weights are not stored: tests/tiny.py makes the same numbers on both sides.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Widths divide by nothing convenient; the rotary axes are all different.
CONFIGS = {
    "qwen_image_wide": dict(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=14, num_attention_heads=2, joint_attention_dim=11,
        axes_dims_rope=(2, 8, 4),
    ),
    "qwen_image_narrow": dict(
        in_channels=12, out_channels=3, num_layers=2, attention_head_dim=12, num_attention_heads=3, joint_attention_dim=17,
        axes_dims_rope=(4, 2, 6),
    ),
}  # fmt: skip
# Latent shape [b c f h w], timesteps [b], padded text length, how many text states count (None: no mask is given).
CASES = {
    "qwen_image_wide": {
        "padded": ((2, 4, 1, 6, 10), (999.0, 12.5), 7, (7, 3)),
        "unpadded": ((1, 4, 1, 14, 6), (437.0,), 5, None),
    },
    "qwen_image_narrow": {
        "padded": ((2, 3, 1, 10, 18), (731.25, 250.0), 9, (2, 6)),
        "frames": ((2, 3, 3, 2, 6), (88.0, 940.0), 4, None),
    },
}


def pack(latents: torch.Tensor) -> torch.Tensor:
    """The pipeline's packing, frame by frame."""
    b, c, _, h, w = latents.shape
    return torch.cat([QwenImagePipeline._pack_latents(frame, b, c, h, w) for frame in latents.unbind(2)], dim=1)


def unpack(tokens: torch.Tensor, frames: int, h: int, w: int) -> torch.Tensor:
    return torch.cat([QwenImagePipeline._unpack_latents(part, h, w, 1) for part in tokens.chunk(frames, dim=1)], dim=2)


def main() -> None:
    for name, config in CONFIGS.items():
        model = QwenImageTransformer2DModel(**config).eval()
        shapes = tiny.fill(model, name)
        arrays = {"config": np.array(json.dumps(dict(model.config))), "keys": np.array(json.dumps(shapes))}
        torch.manual_seed(0)
        for case, (shape, timesteps, num_text, lengths) in CASES[name].items():
            b, _, f, h, w = shape
            latents, text = torch.randn(shape), torch.randn(b, num_text, config["joint_attention_dim"])
            timestep = torch.tensor(timesteps)
            mask = None if lengths is None else torch.arange(num_text) < torch.tensor(lengths)[:, None]
            with torch.no_grad():
                velocity = model(
                    hidden_states=pack(latents),
                    encoder_hidden_states=text,
                    encoder_hidden_states_mask=mask,
                    timestep=timestep / 1000,  # as the pipeline passes it
                    img_shapes=[[(f, h // 2, w // 2)]] * b,
                    return_dict=False,
                )[0]
            arrays |= {f"{case}/latents": latents.numpy(), f"{case}/text": text.numpy(), f"{case}/timestep": timestep.numpy()}
            arrays[f"{case}/velocity"] = unpack(velocity, f, h, w).numpy()
            if lengths is not None:
                arrays[f"{case}/text_length"] = np.array(lengths, np.int32)
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
