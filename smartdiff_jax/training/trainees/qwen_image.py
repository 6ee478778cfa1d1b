"""Qwen-Image, as it is trained: gates that are open from the first step, and a text encoder that is given the order of words.

Upstream's blocks start as the identity (adaLN-Zero), so that no text reaches the picture before the gates have opened: small
models trained for minutes stay deaf to their text that way. Here the modulation starts at full scale with gates near 1.
Qwen2.5's attention has biases on queries and keys, which rotary embedding turns by their positions; two heads start with
biases that make them look at the word before, and at the one before that (the encoder is causal: no word sees the next).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from smartdiff_jax.models.text import prompts
from smartdiff_jax.training.state import Component, Params
from smartdiff_jax.training.tokenizer import CHAT
from smartdiff_jax.training.trainees.base import TEXT_ENCODER, TRANSFORMER, Trainee, causal_vae_layout, transposed

NEIGHBOUR_LOGIT = 12.0  # of the word looked at; the next to it gets 4 less. Those of content start at about 1
FASTEST = 4  # rotary frequencies that take part: the fastest tell neighbours apart
OPEN = 1.0


def start(params: Params, transformer: Component, text_encoder: Component, seed: int) -> Params:
    params = dict(params)
    dim = transformer.config.dim
    for number, stream in enumerate(("image", "text")):
        name = f"{TRANSFORMER}blocks.{stream}.modulation"
        kernel, bias = params[f"{name}.kernel"], params[f"{name}.bias"]
        key = jax.random.fold_in(jax.random.key(seed + 2), number)
        init = initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=0)
        params[f"{name}.kernel"] = init(key, kernel.shape, jnp.float32)
        # Shift, scale and gate of attention, then of the feed-forward.
        gates = jnp.repeat(jnp.array([0, 0, OPEN, 0, 0, OPEN], jnp.float32), dim)
        params[f"{name}.bias"] = bias + gates
    for number, linear in enumerate(("linear_1", "linear_2")):
        name = f"{TRANSFORMER}time_embedder.{linear}.kernel"
        key = jax.random.fold_in(jax.random.key(seed + 3), number)
        params[name] = initializers.xavier_uniform()(key, params[name].shape, jnp.float32)
    return params | neighbour_biases(params, text_encoder.config)


def neighbour_biases(params: Params, config: Any) -> Params:
    """Biases of queries and keys under which head 0 looks one word back, and head 1 two.

    Rotary embedding makes of constant q and k a logit that depends on the distance alone: with k = (a, 0) and q = a turned
    by n words, for every frequency, sum a^2 cos(w (distance - n)) / sqrt(head_dim), which is largest at distance n.
    """
    head_dim, heads = config.head_dim, config.num_attention_heads
    half, groups = head_dim // 2, heads // config.num_key_value_heads
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    fast = (np.arange(half) < FASTEST).astype(float)
    amplitude = math.sqrt(NEIGHBOUR_LOGIT * math.sqrt(head_dim) / fast.sum())
    q_name, k_name = (f"{TEXT_ENCODER}blocks.attention.{name}.bias" for name in ("q", "k"))
    layers = params[q_name].shape[0]
    # In JAX and not NumPy: a resumed run only asks for the shapes.
    q = jnp.reshape(params[q_name], (layers, heads, head_dim))
    k = jnp.reshape(params[k_name], (layers, config.num_key_value_heads, head_dim))
    for back in (1, 2)[: config.num_key_value_heads]:
        # Turned back by the distance, so that a query meets a key that far behind it in phase.
        k = k.at[:, back - 1].add(amplitude * np.concatenate([fast, 0 * fast]))
        turned = np.concatenate([fast * np.cos(back * frequencies), -fast * np.sin(back * frequencies)])
        q = q.at[:, (back - 1) * groups].add(amplitude * turned)
    return {name: jnp.asarray(value.reshape(layers, -1), jnp.float32) for name, value in ((q_name, q), (k_name, k))}


def forward_flops(config: Any, tokens: int, text_length: int) -> float:
    dim, layers = config.dim, config.num_layers
    both = tokens + text_length
    per_block = both * (12 * dim**2 + 2 * dim * both) + 2 * 6 * dim**2
    return 2.0 * (layers * per_block + 2 * tokens * dim * config.in_channels)


def config_fields(name: str, config: Any) -> dict[str, Any]:
    fields = config.model_dump(mode="json")
    if name == "text_encoder":
        # As transformers nests it; the sections of rotary positions are of no effect where there is only text.
        half = config.head_dim // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        rotary = {"type": "mrope", "mrope_section": sections}
        kept = {name: fields[name] for name in fields if name not in ("rope_type", "layer_types", "model_type", "head_dim")}
        text = kept | {"model_type": "qwen2_5_vl_text", "rope_scaling": rotary, "tie_word_embeddings": False, "pad_token_id": 0}
        return {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "text_config": text}
    if name == "vae":
        served = (
            "base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout",
            "input_channels", "latents_mean", "latents_std",
        )  # fmt: skip
        return {name: fields[name] for name in served}
    served = ("pooled_projection_dim", "use_additional_t_cond", "use_layer3d_rope", "zero_cond_t")
    return {name: value for name, value in fields.items() if name not in served}


def scheduler(shift: float) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
    }


QWEN_IMAGE = Trainee(
    text_width=("joint_attention_dim", "hidden_size"),
    tokenizer=CHAT,
    text=prompts.qwen_image,
    start=start,
    forward_flops=forward_flops,
    classes={
        "transformer": ("diffusers", "QwenImageTransformer2DModel", "diffusion_pytorch_model"),
        "vae": ("diffusers", "AutoencoderKLQwenImage", "diffusion_pytorch_model"),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", "model"),
    },
    layouts={"transformer": transposed, "vae": causal_vae_layout, "text_encoder": transposed},
    config_fields=config_fields,
    scheduler=scheduler,
)
