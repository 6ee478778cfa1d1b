"""Layers that the transformers share, besides linear ones.

Norms, modulation and activations are float32 whatever goes in, and the caller casts back. Blocks are stacked along a leading
axis and run by one scan.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from smartdiff_jax.models.linear import Features, Linear

T = TypeVar("T")
Block = TypeVar("Block", bound=nnx.Module)


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis with a learned scale; float32 out."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, dtype))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with learned float32 scale and bias; float32 out."""

    def __init__(self, features: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return layer_norm(x, self.eps) * self.scale[...] + self.bias[...]

    def into(self, layer: Linear, x: Float[Array, "b s d"]) -> Features:
        """The same as `layer`, or others like it, takes it."""
        if layer.fused:
            return layer.normed(x, self.bias[None, None], self.scale[None, None] - 1, self.eps)
        return layer.take(self(x))


def layer_norm(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """Layer norm over the last axis without parameters; float32 out."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


@dataclasses.dataclass(frozen=True)
class Modulation:
    """What the timestep does to one sublayer (adaLN, arXiv 2212.09748): float32, each [b, 1, d]."""

    shift: Array
    scale: Array
    gate: Array

    @classmethod
    def of(cls, layer: Linear, time: Float[Array, "b d"], count: int) -> "tuple[Modulation, ...]":
        """`count` of them, as `layer` projects them from the embedded timestep."""
        pieces = jnp.split(layer.project(time)[:, None], 3 * count, axis=-1)
        return tuple(cls(*pieces[i : i + 3]) for i in range(0, 3 * count, 3))


def modulated_norm(
    x: Float[Array, "b s d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], eps: float
) -> Float[Array, "b s d"]:
    """Layer norm, scaled and shifted in float32, in x's dtype."""
    return (layer_norm(x, eps) * (1 + scale) + shift).astype(x.dtype)


def modulated_norm_into(
    layer: Linear, x: Float[Array, "b s d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], eps: float
) -> Features:
    """The same as `layer`, or others like it, takes it."""
    if layer.fused:
        return layer.normed(x, shift, scale, eps)
    return layer.take(modulated_norm(x, shift, scale, eps))


def gated_add(x: Float[Array, "b s d"], y: Float[Array, "b s d"], gate: Float[Array, "b 1 d"]) -> Float[Array, "b s d"]:
    """x + gate * y in float32, in x's dtype."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


def timestep_embedding(timestep: Float[Array, " b"], dim: int, max_period: float = 10_000.0) -> Float[Array, "b e"]:
    """Sinusoids of the timestep, cosines first: float32 [b, dim], dim even."""
    frequencies = max_period ** (-np.arange(dim // 2) / (dim // 2))
    angles = timestep.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def gelu(x: Array) -> Array:
    """GELU in its tanh form: x (1 + tanh(u)) / 2 = x sigmoid(2 u).

    In bfloat16 it is written as XLA knows it behind a product, where cuBLAS computes it in float32 while it writes.
    """
    if x.dtype == jnp.bfloat16:
        return jax.nn.gelu(x, approximate=True)
    return x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def swiglu(gate: Array, up: Array) -> Array:
    """SiLU of the gate times the other half (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


ATTENTION_ROWS = 1024
"""Queries that `wide_attention` takes at once."""


def wide_attention(q: Float[Array, "b s d"], k: Float[Array, "b t d"], v: Float[Array, "b t d"]) -> Float[Array, "b s d"]:
    """Softmax attention of one head that is too wide for a fused kernel, as autoencoders have it; scaled by 1/sqrt(d).

    Of the float32 scores [b, s, t] only the rows of ATTENTION_ROWS queries exist at a time, also in the backward pass.
    """

    def attend(q: Float[Array, "b r d"]) -> Float[Array, "b r d"]:
        scores = jnp.einsum("brd,btd->brt", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / q.shape[-1] ** 0.5, axis=-1).astype(v.dtype)
        return jnp.einsum("brt,btd->brd", weights, v)

    b, s, d = q.shape
    if s <= ATTENTION_ROWS:
        return attend(q)
    padded = jnp.pad(q, ((0, 0), (0, -s % ATTENTION_ROWS), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, -1, ATTENTION_ROWS, d), 1, 0)
    out = jax.lax.map(jax.checkpoint(attend), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :s]


def stack_blocks(make_block: Callable[[nnx.Rngs], Block], num_blocks: int, rngs: nnx.Rngs) -> Block:
    """One module whose every parameter has a leading [num_blocks] axis, each block drawn on its own."""
    return nnx.split_rngs(splits=num_blocks)(nnx.vmap(make_block))(rngs)


def pick_block(blocks: Block, index: int) -> Block:
    """One of `blocks`, stacked or apart (or the same part of each of them) by itself."""
    graphdef, stack = nnx.split(blocks)
    return nnx.merge(graphdef, _pick(stack, index))


def scan_blocks(blocks: Block, lo: int, hi: int, call: Callable[[Block, T], T], hidden: T) -> T:
    """Run blocks lo to hi - 1 over `hidden`: `call(block, hidden)` is traced once.

    Stacked blocks are one scan. Blocks whose weights lie apart (weights/apart.py) are compiled one behind the other: as
    many times the code, but a scan copies every block's weights out of the stack before it reads them.
    """
    graphdef, stack = nnx.split(blocks)

    def run(layer: nnx.State, hidden: T) -> T:
        return call(nnx.merge(graphdef, layer), hidden)

    if any(map(_is_apart, jax.tree.leaves(stack, is_leaf=_is_apart))):
        traced_once = jax.jit(run)
        for index in range(lo, hi):
            with jax.named_scope(f"block_{index}"):
                hidden = traced_once(_pick(stack, index), hidden)
        return hidden

    def body(hidden: T, index: Array) -> tuple[T, None]:
        # Indexed here and not sliced [lo:hi] outside: that would be a second copy of the weights on the device.
        layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)
        with jax.named_scope("block"):
            return run(layer, hidden), None

    return jax.lax.scan(body, hidden, jnp.arange(lo, hi))[0]


def _is_apart(leaf: object) -> bool:
    return isinstance(leaf, tuple)


def _pick(stack: nnx.State, index: int) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[index], stack, is_leaf=_is_apart)
