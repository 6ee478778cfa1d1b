"""Tiny folders for tests on meshes, of every family: four heads, for meshes that split heads further, and a VAE of two scales
instead of four, because every mesh compiles it anew and two scales hold each of its layers already.
"""

import json
import re
from pathlib import Path

import numpy as np
import tiny
import tiny_images
from safetensors.numpy import load_file, save_file

# The same widths as in the folders of two heads.
FOUR_HEADS = {
    "wan": dict(num_attention_heads=4, attention_head_dim=6),
    "flux1": dict(num_attention_heads=4, attention_head_dim=6, axes_dims_rope=[2, 2, 2]),
    "flux2-klein": dict(num_attention_heads=4, attention_head_dim=8, axes_dims_rope=[2, 2, 2, 2]),
    "qwen-image": dict(num_attention_heads=4, attention_head_dim=6, axes_dims_rope=[2, 2, 2]),
    "z-image": dict(n_heads=4, n_kv_heads=4, axes_dims=[2, 2, 2]),
}

# Of the layers of four scales, those of two, by their new names; the others are dropped.
KL_OF_TWO_SCALES = {
    "encoder.down_blocks.0": "encoder.down_blocks.0",
    "encoder.down_blocks.2.resnets": "encoder.down_blocks.1.resnets",
    "decoder.up_blocks.0": "decoder.up_blocks.0",
    "decoder.up_blocks.2.resnets": "decoder.up_blocks.1.resnets",
}
CAUSAL_OF_TWO_SCALES = {
    "encoder.down_blocks.0": "encoder.down_blocks.0",
    "encoder.down_blocks.1": "encoder.down_blocks.1",
    "encoder.down_blocks.2": "encoder.down_blocks.2",
    "decoder.up_blocks.0": "decoder.up_blocks.0",
    "decoder.up_blocks.3": "decoder.up_blocks.1",
}


def write(path: Path, family: str) -> Path:
    """Write the folder of a family and return it."""
    if family == "wan":
        tiny.write_folder(path)
    else:
        keys = json.loads(tiny_images.KEYS.read_text())
        shapes = keys[f"{family}/transformer"]
        for key, shape in shapes.items():
            if re.search(r"norm(_added)?_[qk]\.weight$", key):
                shapes[key] = [shape[0] // 2]
        tiny_images.write_folder(path, family, keys)
    _change(path / "transformer" / "config.json", FOUR_HEADS[family])
    _leave_two_scales(path / "vae")
    return path


def _leave_two_scales(vae: Path) -> None:
    file = vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if "dim_mult" in json.loads((vae / "config.json").read_text()):
        kept = CAUSAL_OF_TWO_SCALES
        _change(vae / "config.json", dict(dim_mult=[1, 2], temperal_downsample=[True]))
        # Of four scales, the first is the one that leaves time as it is.
        for name, shape in (("weight", (8, 8, 3, 1, 1)), ("bias", (8,))):
            key = f"encoder.down_blocks.1.time_conv.{name}"
            tensors[key] = tiny.tensor("vae", key, shape)
    else:
        kept = KL_OF_TWO_SCALES
        types = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
        _change(vae / "config.json", dict(block_out_channels=[8, 16]) | types)
    named = {key: tensor for key, tensor in tensors.items() if not re.match(r"(en|de)coder\.(down|up)_blocks", key)}
    for before, after in kept.items():
        of_it = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{before}.")}
        named |= {key.replace(before, after, 1): np.ascontiguousarray(tensor) for key, tensor in of_it.items()}
    save_file(named, file, metadata={"format": "pt"})


def _change(file: Path, fields: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
