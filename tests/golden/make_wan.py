"""Makes wan_*.npz with diffusers' WanTransformer3DModel at tiny random size (run where torch and diffusers are).

Weights are rounded to float16 before the reference runs, so that storing them as float16 is exact.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

HERE = Path(__file__).parent
BASE = dict(num_attention_heads=2, in_channels=4, text_dim=11, freq_dim=16, num_layers=2, rope_max_seq_len=64)
# Widths divide by nothing convenient; the rotary split is uneven (14 = 6 + 4 + 4, 10 = 6 + 2 + 2).
CONFIGS = {
    "wan_norm": dict(BASE, attention_head_dim=14, ffn_dim=33, out_channels=4, patch_size=(1, 2, 2)),
    "wan_no_norm": dict(
        BASE, attention_head_dim=10, ffn_dim=21, out_channels=3, patch_size=(2, 1, 3), cross_attn_norm=False, eps=1e-5
    ),
}
# Latent shape [b c f h w], timesteps [b], text length.
CASES = {
    "wan_norm": {
        "video": ((2, 4, 3, 6, 10), (999.0, 12.5), 7),
        "image": ((1, 4, 1, 2, 6), (437.0,), 5),
    },
    "wan_no_norm": {"video": ((2, 4, 4, 5, 9), (731.25, 731.25), 6)},
}


def main() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = WanTransformer3DModel(**config).eval()
        arrays = {"config": np.array(json.dumps(dict(model.config)))}
        for key, parameter in model.named_parameters():
            wide = parameter.ndim == 1 or "table" in key
            scale = 0.5 if wide else parameter[0].numel() ** -0.5
            offset = 1.0 if ".norm" in key and key.endswith("weight") else 0.0
            half = (offset + scale * torch.randn_like(parameter)).half()
            parameter.data = half.float()
            arrays[f"weight/{key}"] = half.numpy()
        for case, (shape, timesteps, text_length) in CASES[name].items():
            latents = torch.randn(shape)
            text = torch.randn(shape[0], text_length, config["text_dim"])
            timestep = torch.tensor(timesteps)
            with torch.no_grad():
                velocity = model(latents, timestep, text, return_dict=False)[0]
            arrays |= {f"{case}/latents": latents.numpy(), f"{case}/text": text.numpy()}
            arrays |= {f"{case}/timestep": timestep.numpy(), f"{case}/velocity": velocity.numpy()}
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
