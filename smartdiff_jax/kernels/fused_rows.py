"""Rows of 8 bits in one pass over what they are made of, in Pallas for Triton: each program makes one row.

XLA reads the products twice, once for the largest number of a row and once for the row, and an activation is computed twice.
What a first version of it gave on an H100 is in docs/kernels.md.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.triton as triton
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from smartdiff_jax.kernels.fp8 import FP8, FP8_MAX, MULTIPLE, SMALLEST, Columns, Part, Rows

plt: Any = triton
"""Its types say less than it takes."""

CHUNK = 1024
"""Numbers of a row that are loaded at once: eight for each of a program's threads."""

NUM_WARPS, WIDE = 4, 8192
"""Of a program; twice as many for rows from WIDE on."""


def join_rows(parts: Sequence[Part], interpret: bool = False) -> Rows:
    """As fp8.join_rows; rows are padded to MULTIPLE, and what is behind them is not written."""
    operands = _Operands()
    loads = [[_loader(columns, operands) for columns in part.columns] for part in parts]

    def row(refs: Sequence[Any]) -> Iterator[Array]:
        for part, of_part in zip(parts, loads, strict=True):
            for at, size in chunks_of(part.columns[0].size):
                numbers = [load(refs, at, size) for load in of_part]
                yield numbers[0] if part.activation is None else part.activation(*numbers)

    return _make(row, operands, parts[0].lead, sum(part.columns[0].size for part in parts), interpret)


def norm_rows(
    x: Float[Array, "b s d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], eps: float, interpret: bool = False
) -> Rows:
    """Layer norm * (1 + scale) + shift."""
    lead, width = x.shape[:-1], x.shape[-1]
    tokens = lead[-1]
    operands = _Operands()
    of_x = operands.add(x, lambda i: i)
    of_shift, of_scale = (operands.add(jnp.broadcast_to(m, (lead[0], 1, width)), lambda i: i // tokens) for m in (shift, scale))

    def row(refs: Sequence[Any]) -> Iterator[Array]:
        chunks = list(chunks_of(width))
        numbers = [_load(refs[of_x], at, size) for at, size in chunks]
        mean = over(numbers, jnp.add, jnp.sum) / width
        centred = [c - mean for c in numbers]
        by = jax.lax.rsqrt(over([c * c for c in centred], jnp.add, jnp.sum) / width + eps)
        for (at, size), c in zip(chunks, centred, strict=True):
            yield c * by * (1 + _load(refs[of_scale], at, size)) + _load(refs[of_shift], at, size)

    return _make(row, operands, lead, width, interpret)


def _make(
    row: Callable[[Sequence[Any]], Iterator[Array]],
    operands: "_Operands",
    lead: tuple[int, ...],
    width: int,
    interpret: bool,
) -> Rows:
    """row: references of the operands to a row's numbers, chunk by chunk."""
    number = math.prod(lead)
    padded = pl.cdiv(number, MULTIPLE) * MULTIPLE

    def body(*refs: Any) -> None:
        *sources, values, scale = refs
        chunks = list(row(sources))
        largest = jnp.maximum(over([jnp.abs(numbers) for numbers in chunks], jnp.maximum, jnp.max), SMALLEST)
        scale[...] = jnp.broadcast_to(largest * (1 / FP8_MAX), (1,))
        by, at = FP8_MAX / largest, 0
        for numbers in chunks:
            plt.store(values.at[pl.ds(at, numbers.shape[0])], (numbers * by).astype(FP8))
            at += numbers.shape[0]

    values, scale = pl.pallas_call(
        body,
        grid=(number,),
        in_specs=operands.specs,
        out_specs=[pl.BlockSpec((None, width), lambda i: (i, 0)), pl.BlockSpec((None, 1), lambda i: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((padded, width), FP8), jax.ShapeDtypeStruct((padded, 1), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS * (1 + (width >= WIDE)), num_stages=1),
        interpret=interpret,
    )(*operands.arrays)
    return Rows(values, scale, lead)


def chunks_of(width: int) -> Iterator[tuple[int, int]]:
    """(first, size) of each: powers of two, as Triton has them, that fill the width."""
    at = 0
    while at < width:
        size = min(CHUNK, 1 << ((width - at).bit_length() - 1))
        yield at, size
        at += size


def over(chunks: Sequence[Array], both: Callable[[Array, Array], Array], all_of: Callable[[Array], Array]) -> Array:
    """A row's sum, or largest: within threads first, across them once for each size of chunks."""
    of_size: dict[int, Array] = {}
    for chunk in chunks:
        size = chunk.shape[0]
        of_size[size] = both(of_size[size], chunk) if size in of_size else chunk
    return functools.reduce(both, map(all_of, of_size.values()))


def _load(ref: Any, first: int, size: int) -> Array:
    return plt.load(ref.at[pl.ds(first, size)]).astype(jnp.float32)


class _Operands:
    """Arrays that a kernel is handed, as rows, each once."""

    def __init__(self):
        self.arrays: list[Array] = []
        self.specs: list[pl.BlockSpec] = []
        self._places: dict[int, int] = {}
        self._given: list[Array] = []

    def add(self, x: Array, of_row: Callable[[Any], Any]) -> int:
        """Its place. of_row: which of its rows a row is made of."""
        if id(x) not in self._places:
            self._places[id(x)] = len(self.arrays)
            self._given.append(x)  # so that no other array gets its id
            self.arrays.append(x.reshape(-1, x.shape[-1]))
            self.specs.append(pl.BlockSpec((None, x.shape[-1]), lambda i: (of_row(i), 0)))
        return self._places[id(x)]


def _loader(columns: Columns, operands: _Operands) -> Callable[[Sequence[Any], int, int], Array]:
    """What loads numbers of a row, scaled."""
    product = columns.product
    of_values = operands.add(product.values, lambda i: i)
    if product.row_scale is None:
        return lambda refs, at, size: _load(refs[of_values], columns.first + at, size)
    assert product.column_scale is not None
    of_row, of_column = operands.add(product.row_scale, lambda i: i), operands.add(product.column_scale, lambda i: 0)
    of_bias = None if product.bias is None else operands.add(product.bias, lambda i: 0)

    def load(refs: Sequence[Any], at: int, size: int) -> Array:
        first = columns.first + at
        x = _load(refs[of_values], first, size) * refs[of_row][...] * _load(refs[of_column], first, size)
        return x if of_bias is None else x + _load(refs[of_bias], first, size)

    return load
