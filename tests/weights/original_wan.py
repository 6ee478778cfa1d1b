"""A tiny model in the original Wan layout. The names are written out as wan/modules/{model,t5,vae}.py of
https://github.com/Wan-Video/Wan2.1 gives them: these lists share nothing with the code under test."""

import numpy as np
from fake_model import put

from smartdiff_jax.weights.tensor_file import write

DIM, HEADS, FFN, TEXT, FREQ = 24, 2, 40, 16, 32
CONFIG = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": DIM,
    "eps": 1e-06,
    "ffn_dim": FFN,
    "freq_dim": FREQ,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": HEADS,
    "num_layers": 2,
    "out_dim": 16,
    "text_len": 512,
}

TRANSFORMER = {
    "patch_embedding.weight": (DIM, 16, 1, 2, 2),
    "patch_embedding.bias": (DIM,),
    "text_embedding.0.weight": (DIM, TEXT),
    "text_embedding.0.bias": (DIM,),
    "text_embedding.2.weight": (DIM, DIM),
    "text_embedding.2.bias": (DIM,),
    "time_embedding.0.weight": (DIM, FREQ),
    "time_embedding.0.bias": (DIM,),
    "time_embedding.2.weight": (DIM, DIM),
    "time_embedding.2.bias": (DIM,),
    "time_projection.1.weight": (6 * DIM, DIM),
    "time_projection.1.bias": (6 * DIM,),
    "head.modulation": (1, 2, DIM),
    "head.head.weight": (64, DIM),
    "head.head.bias": (64,),
}
TRANSFORMER_BLOCK = {
    "modulation": (1, 6, DIM),
    "self_attn.q.weight": (DIM, DIM),
    "self_attn.q.bias": (DIM,),
    "self_attn.k.weight": (DIM, DIM),
    "self_attn.k.bias": (DIM,),
    "self_attn.v.weight": (DIM, DIM),
    "self_attn.v.bias": (DIM,),
    "self_attn.o.weight": (DIM, DIM),
    "self_attn.o.bias": (DIM,),
    "self_attn.norm_q.weight": (DIM,),
    "self_attn.norm_k.weight": (DIM,),
    "norm3.weight": (DIM,),
    "norm3.bias": (DIM,),
    "cross_attn.q.weight": (DIM, DIM),
    "cross_attn.q.bias": (DIM,),
    "cross_attn.k.weight": (DIM, DIM),
    "cross_attn.k.bias": (DIM,),
    "cross_attn.v.weight": (DIM, DIM),
    "cross_attn.v.bias": (DIM,),
    "cross_attn.o.weight": (DIM, DIM),
    "cross_attn.o.bias": (DIM,),
    "cross_attn.norm_q.weight": (DIM,),
    "cross_attn.norm_k.weight": (DIM,),
    "ffn.0.weight": (FFN, DIM),
    "ffn.0.bias": (FFN,),
    "ffn.2.weight": (DIM, FFN),
    "ffn.2.bias": (DIM,),
}
TEXT_ENCODER = {
    "token_embedding.weight": (50, TEXT),
    "blocks.0.norm1.weight": (TEXT,),
    "blocks.0.attn.q.weight": (12, TEXT),
    "blocks.0.attn.k.weight": (12, TEXT),
    "blocks.0.attn.v.weight": (12, TEXT),
    "blocks.0.attn.o.weight": (TEXT, 12),
    "blocks.0.norm2.weight": (TEXT,),
    "blocks.0.ffn.gate.0.weight": (20, TEXT),
    "blocks.0.ffn.fc1.weight": (20, TEXT),
    "blocks.0.ffn.fc2.weight": (TEXT, 20),
    "blocks.0.pos_embedding.embedding.weight": (32, 3),
    "norm.weight": (TEXT,),
}


def _residual(name, inputs, outputs):
    keys = {
        f"{name}.residual.0.gamma": (inputs, 1, 1, 1),
        f"{name}.residual.2.weight": (outputs, inputs, 3, 3, 3),
        f"{name}.residual.2.bias": (outputs,),
        f"{name}.residual.3.gamma": (outputs, 1, 1, 1),
        f"{name}.residual.6.weight": (outputs, outputs, 3, 3, 3),
        f"{name}.residual.6.bias": (outputs,),
    }
    if inputs != outputs:
        keys |= {f"{name}.shortcut.weight": (outputs, inputs, 1, 1, 1), f"{name}.shortcut.bias": (outputs,)}
    return keys


def _resample(name, inputs, outputs, time=None):
    keys = {f"{name}.resample.1.weight": (outputs, inputs, 3, 3), f"{name}.resample.1.bias": (outputs,)}
    return keys | ({f"{name}.time_conv.weight": (time, inputs, 3, 1, 1), f"{name}.time_conv.bias": (time,)} if time else {})


def _middle(name, width):
    attention = {
        f"{name}.1.norm.gamma": (width, 1, 1),
        f"{name}.1.to_qkv.weight": (3 * width, width, 1, 1),
        f"{name}.1.to_qkv.bias": (3 * width,),
        f"{name}.1.proj.weight": (width, width, 1, 1),
        f"{name}.1.proj.bias": (width,),
    }
    return _residual(f"{name}.0", width, width) | attention | _residual(f"{name}.2", width, width)


def _ends(name, first, middle_in, last_in, last):
    return {
        f"{name}.conv1.weight": (middle_in, first, 3, 3, 3),
        f"{name}.conv1.bias": (middle_in,),
        f"{name}.head.0.gamma": (last_in, 1, 1, 1),
        f"{name}.head.2.weight": (last, last_in, 3, 3, 3),
        f"{name}.head.2.bias": (last,),
    }


# dim 4, dim_mult 1 2 4 4: the flat lists `downsamples` (2 residual blocks and a downsampler a stage) and `upsamples` (3 and 1).
VAE = (
    {"conv1.weight": (32, 32, 1, 1, 1), "conv1.bias": (32,), "conv2.weight": (16, 16, 1, 1, 1), "conv2.bias": (16,)}
    | _ends("encoder", 3, 4, 16, 32)
    | _residual("encoder.downsamples.0", 4, 4)
    | _residual("encoder.downsamples.1", 4, 4)
    | _resample("encoder.downsamples.2", 4, 4)
    | _residual("encoder.downsamples.3", 4, 8)
    | _residual("encoder.downsamples.4", 8, 8)
    | _resample("encoder.downsamples.5", 8, 8, time=8)
    | _residual("encoder.downsamples.6", 8, 16)
    | _residual("encoder.downsamples.7", 16, 16)
    | _resample("encoder.downsamples.8", 16, 16, time=16)
    | _residual("encoder.downsamples.9", 16, 16)
    | _residual("encoder.downsamples.10", 16, 16)
    | _middle("encoder.middle", 16)
    | _ends("decoder", 16, 16, 4, 3)
    | _middle("decoder.middle", 16)
    | _residual("decoder.upsamples.0", 16, 16)
    | _residual("decoder.upsamples.1", 16, 16)
    | _residual("decoder.upsamples.2", 16, 16)
    | _resample("decoder.upsamples.3", 16, 8, time=32)
    | _residual("decoder.upsamples.4", 8, 16)
    | _residual("decoder.upsamples.5", 16, 16)
    | _residual("decoder.upsamples.6", 16, 16)
    | _resample("decoder.upsamples.7", 16, 8, time=32)
    | _residual("decoder.upsamples.8", 8, 8)
    | _residual("decoder.upsamples.9", 8, 8)
    | _residual("decoder.upsamples.10", 8, 8)
    | _resample("decoder.upsamples.11", 8, 4)
    | _residual("decoder.upsamples.12", 4, 4)
    | _residual("decoder.upsamples.13", 4, 4)
    | _residual("decoder.upsamples.14", 4, 4)
)


def random(shapes, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed).standard_normal
    return {key: draw(shape).astype(dtype) for key, shape in shapes.items()}


def transformer(seed=0):
    blocks = {f"blocks.{i}.{key}": shape for i in range(2) for key, shape in TRANSFORMER_BLOCK.items()}
    return random(TRANSFORMER | blocks, seed)


def write_transformer(folder, tensors, num_shards):
    put(folder / "config.json", CONFIG)
    keys = sorted(tensors)
    if num_shards == 1:
        write(folder / "diffusion_pytorch_model.safetensors", tensors)
    for shard in range(num_shards if num_shards > 1 else 0):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        write(folder / name, {key: tensors[key] for key in keys[shard::num_shards]})


def write_release(folder, num_shards=1, experts=False, text_encoder=None, vae=None):
    """The release with .safetensors in place of the two .pth files."""
    if experts:
        write_transformer(folder / "high_noise_model", transformer(seed=1), num_shards)
        write_transformer(folder / "low_noise_model", transformer(seed=2), num_shards)
    else:
        write_transformer(folder, transformer(), num_shards)
    write(folder / "models_t5_umt5-xxl-enc-bf16.safetensors", text_encoder or random(TEXT_ENCODER))
    write(folder / "Wan2.1_VAE.safetensors", vae or random(VAE))
    put(folder / "google" / "umt5-xxl" / "tokenizer.json", {"version": "1.0"})
    put(folder / "google" / "umt5-xxl" / "tokenizer_config.json", {"model_max_length": 512})
    return folder
