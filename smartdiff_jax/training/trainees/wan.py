"""Wan, as it is trained: the text path at full scale, and a text encoder that is given the order of words.

Upstream's start (0.02 for the text and time embedders, cross-attention behind it) is for large pre-trained encoders: a small
model that starts so stays deaf to its text. Two heads of the text encoder start by looking at the word before and the word
behind; without, a model of this size reads a bag of words, and swaps the colours of an object and its background. The
first two checkpoints became that all the same: T5 does not scale its logits, its queries are small instead, and steps as
large as those of any other matrix had brought the logits to about 30, beside which positions do not count. So queries learn as
much more slowly as they are smaller.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from smartdiff_jax.models.text.umt5 import relative_position_buckets
from smartdiff_jax.training.state import Component, Params
from smartdiff_jax.training.tokenizer import SENTENCE
from smartdiff_jax.training.trainees.base import TEXT_ENCODER, TRANSFORMER, Layout, Trainee, causal_vae_layout, transposed

FULL_SCALE = tuple(f"{TRANSFORMER}{name}.linear_{i}.kernel" for name in ("text_embedder", "time_embedder") for i in (1, 2))
POSITIONS = f"{TEXT_ENCODER}blocks.attention.relative_bias"
NEIGHBOUR_BIAS = 4.0  # logits; those of content start with a deviation of 1


def start(params: Params, transformer: Component, text_encoder: Component, seed: int) -> Params:
    params = dict(params)
    for number, name in enumerate(FULL_SCALE):
        key = jax.random.fold_in(jax.random.key(seed + 2), number)
        params[name] = initializers.xavier_uniform()(key, params[name].shape, jnp.float32)
    config = text_encoder.config
    buckets = config.relative_attention_num_buckets, config.relative_attention_max_distance
    before, _, behind = relative_position_buckets(2, *buckets)
    for head, bucket in enumerate((before, behind)[: config.num_heads]):
        params[POSITIONS] = params[POSITIONS].at[:, bucket, head].add(NEIGHBOUR_BIAS)
    return params


def rates(text_encoder: Any) -> dict[str, float]:
    return {f"{TEXT_ENCODER}blocks.attention.q.kernel": text_encoder.d_kv**-0.5}


def forward_flops(config: Any, tokens: int, text_length: int) -> float:
    dim, ffn, layers = config.dim, config.ffn_dim, config.num_layers
    per_token = 6 * dim**2 + 2 * dim * ffn + 2 * dim * (tokens + text_length)
    per_text_token = 2 * dim**2
    patch = math.prod(config.patch_size) * config.in_channels
    return 2.0 * (layers * (tokens * per_token + text_length * per_text_token) + 2 * tokens * dim * patch)


def _transformer_layout(config: Any) -> Layout:
    def layout(path: str, x: np.ndarray) -> np.ndarray:
        if path == "patch_embedding.kernel":
            return x.reshape(*config.patch_size, config.in_channels, -1).transpose(4, 3, 0, 1, 2)
        if path.endswith("scale_shift_table"):
            return x[None]
        return x.T if path.endswith(".kernel") else x

    return layout


def config_fields(name: str, config: Any) -> dict[str, Any]:
    fields = config.model_dump(mode="json")
    if name == "text_encoder":
        return fields | {"pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0, "tie_word_embeddings": True}
    if name == "vae":
        del fields["clip_output"]  # ours alone; the default is the exported model's
        fields |= {"scale_factor_temporal": config.temporal_stride, "scale_factor_spatial": config.spatial_stride}
    return fields


def scheduler(shift: float) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 2,
        "solver_type": "bh2",
    }


WAN = Trainee(
    text_width=("text_dim", "d_model"),
    tokenizer=SENTENCE,
    text=lambda caption: " ".join(caption.split()),
    start=start,
    forward_flops=forward_flops,
    classes={
        "transformer": ("diffusers", "WanTransformer3DModel", "diffusion_pytorch_model"),
        "vae": ("diffusers", "AutoencoderKLWan", "diffusion_pytorch_model"),
        "text_encoder": ("transformers", "UMT5EncoderModel", "model"),
    },
    layouts={"transformer": _transformer_layout, "vae": causal_vae_layout, "text_encoder": transposed},
    config_fields=config_fields,
    scheduler=scheduler,
    rates=rates,
)
