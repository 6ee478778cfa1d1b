"""The Wan text-to-video transformer (Wan 2.1 and both experts of 2.2 A14B, arXiv 2503.20314).

A block: self-attention with 3-D rotary positions, cross-attention to the text, feed-forward; the timestep modulates
the first and the last. Follows diffusers' `transformer_wan.py`. Unusual: queries and keys are normed over all heads at
once, cross-attention is neither modulated nor gated, one time projection serves all blocks (each adds its own table),
and the zero padding of the text is attended to.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator, model_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.base import QKV, Attend
from smartdiff_jax.models.family import Architecture, Conditioning, KeyRule, Rope, linear
from smartdiff_jax.models.layers import (
    LayerNorm,
    Modulation,
    RMSNorm,
    gated_add,
    gelu,
    modulated_norm,
    modulated_norm_into,
    stack_blocks,
    timestep_embedding,
)
from smartdiff_jax.models.linear import MLP, Features, Linear, products
from smartdiff_jax.models.modules import module, scan_attending
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.rope import axial_rope_table
from smartdiff_jax.models.turn import Unturned, turned

Triple = tuple[PositiveInt, PositiveInt, PositiveInt]
Table = tuple[Float[np.ndarray, "s r"], Float[np.ndarray, "s r"]]


class WanConfig(BaseModel):
    """The numbers in diffusers' `transformer/config.json`, under diffusers' names. Patches are (frames, height, width)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_size: Triple = (1, 2, 2)
    num_attention_heads: PositiveInt = 40
    attention_head_dim: PositiveInt = 128
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    text_dim: PositiveInt = 4096
    freq_dim: PositiveInt = 256
    ffn_dim: PositiveInt = 13824
    num_layers: PositiveInt = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: PositiveFloat = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: PositiveInt = 1024
    pos_embed_seq_len: int | None = None

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, data: Any) -> Any:
        """diffusers adds `_class_name` and the like."""
        return {key: value for key, value in data.items() if not key.startswith("_")} if isinstance(data, dict) else data

    @field_validator("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "qk_norm")
    @classmethod
    def _text_to_video_only(cls, value: Any, info: Any) -> Any:
        served = "rms_norm_across_heads" if info.field_name == "qk_norm" else None
        if value != served:
            raise InvalidConfig(info.field_name, value, f"only text-to-video Wan is served, where it is {served!r}")
        return value

    @field_validator("attention_head_dim", "freq_dim")
    @classmethod
    def _even(cls, value: int, info: Any) -> int:
        if value % 2:
            raise InvalidConfig(info.field_name, value, "must be even: its features are taken in pairs")
        return value


def patches(config: WanConfig) -> Patches:
    """How latents become tokens."""
    return Patches(config.patch_size)


def rope(config: WanConfig, grid: tuple[int, int, int], num_text: int = 0, text_length: int = 0) -> tuple[Table, None]:
    """Rotary table of a grid of (frames, rows, columns) tokens: float32 [s, head_dim / 2] each; frames get the remainder.

    Text has no positions.
    """
    spatial = 2 * (config.attention_head_dim // 6)
    return axial_rope_table(grid, (config.attention_head_dim - 2 * spatial, spatial, spatial)), None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WanContext:
    """What all blocks share.

    temb: embedded timestep, which the head uses. modulation: its six projections, which each block adds to its table.
    """

    temb: Float[Array, "b d"]
    modulation: Float[Array, "b 6 d"]
    text: Float[Array, "b l d"]
    text_length: Int[Array, " b"] | None
    rope: Rope


class WanAttention(nnx.Module):
    """Attention with queries and keys normed over the full width; rotary positions for self-attention only."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.q = Linear(dim, dim, rngs, dtype=dtype)
        self.k = Linear(dim, dim, rngs, dtype=dtype)
        self.v = Linear(dim, dim, rngs, dtype=dtype)
        self.out = Linear(dim, dim, rngs, dtype=dtype)
        self.q_norm = RMSNorm(dim, eps=config.eps, dtype=dtype)
        self.k_norm = RMSNorm(dim, eps=config.eps, dtype=dtype)

    def self_attention(self, x: Features, attend: Attend, rope: Rope) -> Float[Array, "b s d"]:
        q, k, v = products(x, self.q, self.k, self.v)
        with jax.named_scope("attention"):
            stream = Unturned.of(self.num_heads, rope, (q, self.q_norm), (k, self.k_norm), (v, None))
            out = attend.self_attention(QKV(*turned(attend, stream)))
        return self.out(out.reshape(*out.shape[:2], -1))

    def cross_attention(
        self, x: Features, text: Float[Array, "b l d"], attend: Attend, text_length: Int[Array, " b"] | None
    ) -> Float[Array, "b s d"]:
        taken = self.k.take(text)
        q, k, v = self.q.product(x), self.k.product(taken), self.v.product(taken)
        with jax.named_scope("attention"):
            (q,) = turned(attend, Unturned.of(self.num_heads, None, (q, self.q_norm)), "split")
            k, v = turned(attend, Unturned.of(self.num_heads, None, (k, self.k_norm), (v, None)), "whole")
            out = attend.cross_attention(q, k, v, text_length=text_length)
        return self.out(out.reshape(*out.shape[:2], -1))


class WanBlock(nnx.Module):
    def __init__(self, config: WanConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.dim
        self.eps = config.eps
        self.scale_shift_table = nnx.Param(_table(rngs, 6, dim))
        self.self_attention = WanAttention(config, rngs, dtype)
        self.cross_attention_norm = LayerNorm(dim, eps=config.eps) if config.cross_attn_norm else None
        self.cross_attention = WanAttention(config, rngs, dtype)
        self.feed_forward = MLP(dim, config.ffn_dim, dim, gelu, rngs, dtype=dtype)

    def __call__(self, hidden: Float[Array, "b s d"], context: WanContext, attend: Attend) -> Float[Array, "b s d"]:
        pieces = jnp.split(self.scale_shift_table[...] + context.modulation, 6, axis=1)
        attention, feed_forward = Modulation(*pieces[:3]), Modulation(*pieces[3:])

        with jax.named_scope("self_attention"):
            x = module(attend, "self_attention", lambda: self._self_attention(hidden, attention, context, attend))
            hidden = gated_add(hidden, x, attention.gate)

        with jax.named_scope("cross_attention"):
            hidden = hidden + module(attend, "cross_attention", lambda: self._cross_attention(hidden, context, attend))

        with jax.named_scope("feed_forward"):
            x = modulated_norm_into(self.feed_forward.linear_1, hidden, feed_forward.shift, feed_forward.scale, self.eps)
            return gated_add(hidden, self.feed_forward(x), feed_forward.gate)

    def _self_attention(self, hidden: Array, modulation: Modulation, context: WanContext, attend: Attend) -> Array:
        x = modulated_norm_into(self.self_attention.q, hidden, modulation.shift, modulation.scale, self.eps)
        return self.self_attention.self_attention(x, attend, context.rope)

    def _cross_attention(self, hidden: Array, context: WanContext, attend: Attend) -> Array:
        norm = self.cross_attention_norm
        x = hidden if norm is None else norm.into(self.cross_attention.q, hidden)
        return self.cross_attention.cross_attention(x, context.text, attend, context.text_length)


class WanTransformer(nnx.Module):
    """A `Denoiser`: packed latents, timestep (0 to 1000) and text states to the velocity of the packed latents."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim, patch = config.dim, math.prod(config.patch_size)
        normal = initializers.normal(0.02)
        self.num_blocks = config.num_layers
        self.freq_dim = config.freq_dim
        self.eps = config.eps
        self.patch_embedding = Linear(patch * config.in_channels, dim, rngs, dtype=dtype)
        # The timestep is float32 from end to end: bfloat16 cannot tell 999 from 997.
        self.time_embedder = MLP(config.freq_dim, dim, dim, jax.nn.silu, rngs, kernel_init=normal)
        self.time_projection = Linear(dim, 6 * dim, rngs, dtype=dtype)
        self.text_embedder = MLP(config.text_dim, dim, dim, gelu, rngs, dtype=dtype, kernel_init=normal)
        self.blocks = stack_blocks(lambda rngs: WanBlock(config, rngs, dtype), config.num_layers, rngs)
        self.scale_shift_table = nnx.Param(_table(rngs, 2, dim))
        self.head_projection = Linear(dim, patch * config.out_channels, rngs, dtype=dtype, kernel_init=initializers.zeros)

    def embed(
        self,
        tokens: Float[Array, "b s p"],
        timestep: Float[Array, ""] | Float[Array, " b"],
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "b s d"], WanContext]:
        """Tokens to the residual stream, in the kernels' dtype, and the context of all blocks."""
        batch = tokens.shape[0]
        with jax.named_scope("time_embedding"), jax.default_matmul_precision("highest"):
            frequencies = timestep_embedding(jnp.broadcast_to(timestep, (batch,)), self.freq_dim)
            temb = self.time_embedder(frequencies)
            modulation = self.time_projection.project(jax.nn.silu(temb)).reshape(batch, 6, -1)
        text, text_length = self.text_embedder(conditioning.text), conditioning.text_length
        context = WanContext(
            temb=temb,
            modulation=modulation,
            text=jnp.broadcast_to(text, (batch, *text.shape[1:])),
            text_length=None if text_length is None else jnp.broadcast_to(text_length, (batch,)),
            rope=conditioning.rope,
        )
        return self.patch_embedding(tokens), context

    def run_blocks(
        self, hidden: Float[Array, "b s d"], context: WanContext, attend: Attend, lo: int, hi: int
    ) -> Float[Array, "b s d"]:
        """Blocks lo to hi - 1."""
        return scan_attending(self.blocks, lo, hi, lambda block, x, attend: block(x, context, attend), hidden, attend)

    def head(self, hidden: Float[Array, "b s d"], context: WanContext) -> Float[Array, "b s p"]:
        """The residual stream to the float32 velocity of the packed latents."""
        shift, scale = jnp.split(self.scale_shift_table[...] + context.temb[:, None], 2, axis=1)
        return self.head_projection(modulated_norm(hidden, shift, scale, self.eps)).astype(jnp.float32)

    def probe(self, hidden: Float[Array, "b s d"], context: WanContext) -> Float[Array, "b s d"]:
        """The modulated input of block 0's self-attention."""
        pieces = self.blocks.scale_shift_table[0] + context.modulation
        return modulated_norm(hidden, pieces[:, 0:1], pieces[:, 1:2], self.eps)

    def time_embedding(self, context: WanContext) -> Float[Array, "b 6 d"]:
        """The projected timestep, before each block adds its own table."""
        return context.modulation


def _table(rngs: nnx.Rngs, rows: int, dim: int) -> Array:
    return jax.random.normal(rngs.params(), (rows, dim)) / math.sqrt(dim)


def _patch_kernel(tensor: np.ndarray) -> np.ndarray:
    """Conv3d weight [d, c, pt, ph, pw] to a kernel [(pt ph pw c), d]."""
    return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, tensor.shape[0])


def _linear_rules(key: str, path: str, *, keep_float32: bool = False) -> tuple[KeyRule, KeyRule]:
    return (
        KeyRule(rf"{key}\.weight", f"{path}.kernel", linear, keep_float32),
        KeyRule(rf"{key}\.bias", f"{path}.bias", keep_float32=keep_float32),
    )


def _attention_rules(key: str, path: str) -> tuple[KeyRule, ...]:
    return (
        *_linear_rules(rf"{key}\.to_q", f"{path}.q"),
        *_linear_rules(rf"{key}\.to_k", f"{path}.k"),
        *_linear_rules(rf"{key}\.to_v", f"{path}.v"),
        *_linear_rules(rf"{key}\.to_out\.0", f"{path}.out"),
        KeyRule(rf"{key}\.norm_q\.weight", f"{path}.q_norm.scale"),
        KeyRule(rf"{key}\.norm_k\.weight", f"{path}.k_norm.scale"),
    )


_BLOCK = r"blocks\.(?P<layer>\d+)"

KEY_RULES = (
    KeyRule(r"patch_embedding\.weight", "patch_embedding.kernel", _patch_kernel),
    KeyRule(r"patch_embedding\.bias", "patch_embedding.bias"),
    *_linear_rules(r"condition_embedder\.time_embedder\.linear_1", "time_embedder.linear_1", keep_float32=True),
    *_linear_rules(r"condition_embedder\.time_embedder\.linear_2", "time_embedder.linear_2", keep_float32=True),
    *_linear_rules(r"condition_embedder\.time_proj", "time_projection"),
    *_linear_rules(r"condition_embedder\.text_embedder\.linear_1", "text_embedder.linear_1"),
    *_linear_rules(r"condition_embedder\.text_embedder\.linear_2", "text_embedder.linear_2"),
    KeyRule(rf"{_BLOCK}\.scale_shift_table", "blocks.scale_shift_table", lambda tensor: tensor[0], keep_float32=True),
    *_attention_rules(rf"{_BLOCK}\.attn1", "blocks.self_attention"),
    *_attention_rules(rf"{_BLOCK}\.attn2", "blocks.cross_attention"),
    KeyRule(rf"{_BLOCK}\.norm2\.weight", "blocks.cross_attention_norm.scale", keep_float32=True),
    KeyRule(rf"{_BLOCK}\.norm2\.bias", "blocks.cross_attention_norm.bias", keep_float32=True),
    *_linear_rules(rf"{_BLOCK}\.ffn\.net\.0\.proj", "blocks.feed_forward.linear_1"),
    *_linear_rules(rf"{_BLOCK}\.ffn\.net\.2", "blocks.feed_forward.linear_2"),
    KeyRule(r"scale_shift_table", "scale_shift_table", lambda tensor: tensor[0], keep_float32=True),
    *_linear_rules(r"proj_out", "head_projection"),
)

ARCHITECTURE = Architecture(config=WanConfig, build=WanTransformer, key_rules=KEY_RULES)
