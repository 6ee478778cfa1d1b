"""Queries, keys and values in 8 bits, as SageAttention2 makes them (arXiv 2411.10958), for kernels that multiply in 8 bits.

Keys lose a vector that all of them share first: outliers of keys are mostly the same in every token, and what is the same for
every key of a row of softmax changes nothing but its log-sum-exp. Any such vector is exact; here it is the mean of some tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Int, Int8

from smartdiff_jax.kernels.fp8 import FP8_MAX
from smartdiff_jax.kernels.hopper import LOG2E

SAMPLE = 16
"""Of so many tokens one is looked at for what keys share."""

TINY = 1e-9
"""Smallest scale, for rows of zeros."""


class Quantized(NamedTuple):
    """q = q8 * q_scale / (scale log2 e), k = k8 * k_scale + shared and v = v8 * v_scale, as far as 8 bits hold them.

    Scales of queries are one a token, with the factor of softmax in base 2 in them; those of keys one a block of tokens; those
    of values one a channel. Values lie with their tokens in the innermost dimension, every 16 of them in the kernel's order.
    """

    q8: Int8[Array, "b s h d"]
    q_scale: Float[Array, "b h s"]
    k8: Int8[Array, "b t h d"]
    k_scale: Float[Array, "b h blocks"]
    v8: Float8e4m3fn[Array, "b h d padded"]
    v_scale: Float[Array, "b h d"]
    shared: Float[Array, "b h d"]


def quantize(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    kv_length: Int[Array, " b"] | None,
    *,
    scale: float,
    block: int,
    order: np.ndarray,
) -> Quantized:
    """block: keys that have one scale. order: of every 16 tokens of values, `order[i]` comes to i."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if kv_length is not None:
        counts = (jnp.arange(k.shape[1]) < kv_length[:, None])[:, :, None, None]
        k, v = jnp.where(counts, k, 0.0), jnp.where(counts, v, 0.0)
    shared = mean_of_some(k, kv_length)
    k = k - shared[:, None]
    if kv_length is not None:
        k = jnp.where(counts, k, 0.0)

    q_scale = jnp.max(jnp.abs(q), axis=-1) / 127 + TINY
    k_scale = jnp.max(jnp.abs(_blocks(k, block)), axis=(2, 4)) / 127 + TINY
    k_scales = jnp.repeat(k_scale, block, axis=1)[:, : k.shape[1]]
    v_scale = jnp.max(jnp.abs(v), axis=1) / FP8_MAX + TINY
    v8 = _blocks((v / v_scale[:, None]).astype(jnp.float8_e4m3fn), 16)[:, :, order]
    v8 = v8.reshape(v.shape[0], -1, *v.shape[2:]).transpose(0, 2, 3, 1)
    return Quantized(
        q8=_int8(q / q_scale[..., None]),
        q_scale=jnp.moveaxis(q_scale * (scale * LOG2E), 1, 2),
        k8=_int8(k / k_scales[..., None]),
        k_scale=jnp.moveaxis(k_scale, 1, 2),
        v8=jnp.pad(v8, ((0, 0), (0, 0), (0, 0), (0, -v8.shape[-1] % 64))),
        v_scale=v_scale,
        shared=shared,
    )


def mean_of_some(k: Float[Array, "b t h d"], kv_length: Int[Array, " b"] | None) -> Float[Array, "b h d"]:
    """Of every SAMPLE-th key that counts."""
    some = k[:, ::SAMPLE].astype(jnp.float32)
    if kv_length is None:
        return jnp.mean(some, axis=1)
    counts = (SAMPLE * jnp.arange(some.shape[1]) < kv_length[:, None])[:, :, None, None]
    number = jnp.maximum((kv_length + SAMPLE - 1) // SAMPLE, 1)[:, None, None]
    return jnp.sum(jnp.where(counts, some, 0.0), axis=1) / number


def _int8(x: Array) -> Array:
    return jnp.round(x).astype(jnp.int8)


def _blocks(x: Array, size: int) -> Array:
    """[b, t, h, d] as [b, blocks, size, h, d], with zeros behind the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])
