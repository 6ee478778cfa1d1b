"""What `quantize` makes (quantize.py), each array in one pass: Pallas for Triton, a program a head of some tokens.

XLA takes five passes over keys, four over values and two over queries. Lengths need not divide by anything: what is made is
padded for the copy engine, what goes in is not.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.triton as triton
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from smartdiff_jax.kernels.fp8 import FP8_MAX
from smartdiff_jax.kernels.fused_rows import chunks_of
from smartdiff_jax.kernels.hopper import LOG2E
from smartdiff_jax.kernels.quantize import TINY, Quantized, mean_of_some

plt: Any = triton
"""Its types say less than it takes."""

ROWS = 32
"""Queries of a program."""

VALUES = 64
"""Tokens of a program that turns values; stretches of memory as long in bytes."""

PEAK_ROWS, PEAK_STEPS = 64, 8
"""Tokens that a program looks at for the largest values: so many at once, so many times."""


def quantize(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    kv_length: Int[Array, " b"] | None,
    *,
    scale: float,
    block: int,
    order: np.ndarray,
    interpret: bool = False,
) -> Quantized:
    """As quantize.quantize, for any s and t; 8-bit queries and keys are padded to a multiple of 8."""
    b, t = k.shape[:2]
    shared = mean_of_some(k, kv_length)
    lengths = jnp.full(b, t, jnp.int32) if kv_length is None else kv_length
    q8, q_scale = _queries(q, scale * LOG2E, interpret)
    k8, k_scale = _keys(k, shared, lengths, block, interpret)
    v_scale = jnp.max(_peaks(v, lengths, interpret), axis=1) / FP8_MAX + TINY
    v8 = _values(v, v_scale, lengths, order, interpret)
    return Quantized(q8, q_scale, k8, k_scale, v8, v_scale, shared)


def _queries(q: Float[Array, "b s h d"], factor: float, interpret: bool) -> tuple[Array, Array]:
    b, s, h, d = q.shape
    padded = _up(s, 8)

    def body(q_in: Any, q8: Any, q_scale: Any) -> None:
        head, tile, batch = (pl.program_id(i) for i in range(3))
        rows = tile * ROWS + jnp.arange(ROWS)
        here = pl.ds(tile * ROWS, ROWS)
        x = _load(q_in, (batch, here, head), rows < s, d)
        largest = jnp.max(jnp.abs(x), axis=1) / 127 + TINY
        _store(q8, (batch, here, head), rows < padded, _int8(x / largest[:, None]))
        plt.store(q_scale.at[batch, head, here], largest * factor, mask=rows < padded)

    return _call(body, (h, pl.cdiv(s, ROWS), b), [((b, padded, h, d), jnp.int8), ((b, h, padded), jnp.float32)], interpret)(q)


def _keys(
    k: Float[Array, "b t h d"], shared: Float[Array, "b h d"], lengths: Int[Array, " b"], block: int, interpret: bool
) -> tuple[Array, Array]:
    b, t, h, d = k.shape
    padded = _up(t, 8)
    blocks = pl.cdiv(padded, block)

    def body(k_in: Any, shared_in: Any, lengths_in: Any, k8: Any, k_scale: Any) -> None:
        head, tile, batch = (pl.program_id(i) for i in range(3))
        length, mean = lengths_in[batch], shared_in[batch, head]
        parts = []
        for at, size in chunks_of(block):
            rows, here = tile * block + at + jnp.arange(size), pl.ds(tile * block + at, size)
            x = _load(k_in, (batch, here, head), rows < t, d) - mean[None]
            parts.append((rows, here, jnp.where((rows < length)[:, None], x, 0.0)))
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.max(jnp.abs(x), axis=1)) for *_, x in parts])
        scale = largest / 127 + TINY
        k_scale[batch, head, tile] = scale
        for rows, here, x in parts:
            _store(k8, (batch, here, head), rows < padded, _int8(x / scale))

    made = [((b, padded, h, d), jnp.int8), ((b, h, blocks), jnp.float32)]
    return _call(body, (h, blocks, b), made, interpret)(k, shared, lengths)


def _peaks(v: Float[Array, "b t h d"], lengths: Int[Array, " b"], interpret: bool) -> Float[Array, "b parts h d"]:
    """Of each channel the largest number in size, of some tokens each."""
    b, t, h, d = v.shape
    some = PEAK_ROWS * PEAK_STEPS
    parts = pl.cdiv(t, some)

    def body(v_in: Any, lengths_in: Any, peaks: Any) -> None:
        head, tile, batch = (pl.program_id(i) for i in range(3))
        length = lengths_in[batch]

        def step(i: Array, largest: Array) -> Array:
            first = tile * some + i * PEAK_ROWS
            x = _load(v_in, (batch, pl.ds(first, PEAK_ROWS), head), first + jnp.arange(PEAK_ROWS) < jnp.minimum(length, t), d)
            return jnp.maximum(largest, jnp.abs(x))

        largest = jax.lax.fori_loop(0, PEAK_STEPS, step, jnp.zeros((PEAK_ROWS, d), jnp.float32))
        peaks[batch, tile, head] = jnp.max(largest, axis=0)

    return _call(body, (h, parts, b), [((b, parts, h, d), jnp.float32)], interpret)(v, lengths)[0]


def _values(
    v: Float[Array, "b t h d"], scale: Float[Array, "b h d"], lengths: Int[Array, " b"], order: np.ndarray, interpret: bool
) -> Array:
    b, t, h, d = v.shape
    padded = _up(t, VALUES)
    taken = np.arange(0, VALUES, 16)[:, None] + order

    def body(v_in: Any, scale_in: Any, lengths_in: Any, taken_in: Any, v8: Any) -> None:
        head, tile, batch = (pl.program_id(i) for i in range(3))
        tokens = tile * VALUES + taken_in[...]
        x = v_in[batch, jnp.minimum(tokens, t - 1), head].astype(jnp.float32)
        x = jnp.where((tokens < lengths_in[batch])[:, None], x / scale_in[batch, head][None], 0.0)
        v8[batch, head, :, pl.ds(tile * VALUES, VALUES)] = x.astype(jnp.float8_e4m3fn).T

    made = [((b, h, d, padded), jnp.float8_e4m3fn)]
    return _call(body, (h, padded // VALUES, b), made, interpret)(v, scale, lengths, jnp.asarray(taken.reshape(-1), jnp.int32))[
        0
    ]


def _call(body: Any, grid: tuple[int, ...], made: Sequence[tuple[tuple[int, ...], Any]], interpret: bool) -> Any:
    """Programs see whole arrays."""
    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in made],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )


def _load(ref: Any, at: tuple[Any, ...], counts: Array, d: int) -> Float[Array, "n d"]:
    """Some tokens of a head; 0 for those that do not count."""
    mask = jnp.broadcast_to(counts[:, None], (counts.shape[0], d))
    return plt.load(ref.at[*at, pl.ds(0, d)], mask=mask, other=0.0).astype(jnp.float32)


def _store(ref: Any, at: tuple[Any, ...], exists: Array, x: Array) -> None:
    plt.store(ref.at[*at, pl.ds(0, x.shape[1])], x, mask=jnp.broadcast_to(exists[:, None], x.shape))


def _int8(x: Array) -> Array:
    return jnp.floor(x + 0.5).astype(jnp.int8)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple
