"""Queries and keys normed and turned by their positions, in one pass over each, in Pallas for Triton; a program a token.

XLA takes two passes or three: a norm, what it gives rounded, the turn; and one more where streams are joined into one sequence.
A program fetches all that it needs of a token before it writes the first of it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.triton as triton
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from smartdiff_jax.kernels.fp8 import Columns
from smartdiff_jax.kernels.fused_rows import CHUNK, chunks_of, over

plt: Any = triton
"""Its types say less than it takes."""

NUM_WARPS = 4

Take = Callable[[Sequence[Any]], Any]
"""References of the kernel's operands to what one of them is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """What one stream's arrays are made of.

    columns: of each array, [b, n, h * d]. norms: of each the learned scale of its RMS norm, [d] or over all heads at once
    [h * d], and what is added to the mean square; None for an array that is taken as it is (values).
    rope: cosines and sines [b or 1, n, d / 2] of pairs that are interleaved, or None: nothing turns.
    """

    columns: tuple[Columns, ...]
    norms: tuple[tuple[Float[Array, " _"], float] | None, ...]
    rope: tuple[Float[Array, "c n r"], Float[Array, "c n r"]] | None


def serves(num_heads: int, columns: Columns) -> bool:
    """Triton has powers of two: a head's width is one, and heads lie side by side in chunks that are. It counts in int32."""
    head_dim = columns.size // num_heads
    return 16 <= head_dim <= CHUNK and head_dim & (head_dim - 1) == 0 and columns.product.values.size < 2**31


def turn(
    streams: Sequence[Stream], num_heads: int, *, multiple: int = 1, groups: int = 1, interpret: bool = False
) -> tuple[Float[Array, "b n h d"], ...]:
    """Of each of the streams' arrays one, with the streams behind each other; in the dtype of what goes in.

    Zeros follow up to a multiple of `multiple` tokens. groups: the heads lie in so many groups, a group after the other, as
    Ulysses sends them; what is given has the heads in their order, and to take them by groups is no pass.

    What a norm gives is rounded to that dtype before it is turned, as upstream does it; all else is float32.
    """
    operands: list[Array] = []

    def operand(x: Array) -> Take:
        operands.append(x)
        return lambda refs, at=len(operands) - 1: refs[at]

    first = streams[0].columns[0]
    batch, width, dtype = first.product.lead[0], first.size // groups, first.product.values.dtype
    writers, total = [], 0
    for stream in streams:
        writers.append(_Writer(stream, total, num_heads, groups, operand))
        total += writers[-1].tokens
    taken, padded = len(operands), -(-total // multiple) * multiple

    def body(*refs: Any) -> None:
        token, sample = pl.program_id(0), pl.program_id(1)
        for writer in writers:
            here = (token >= writer.first) & (token < writer.first + writer.tokens)

            def write(writer: _Writer = writer) -> None:
                writer.write(refs[:taken], refs[taken:], token, sample)

            pl.when(here)(write) if len(writers) > 1 or padded > total else write()

        if padded > total:

            @pl.when(token >= total)
            def _() -> None:
                for out in refs[taken:]:
                    for group in range(groups):
                        for at, size in chunks_of(width):
                            plt.store(out.at[group * batch + sample, token, pl.ds(at, size)], jnp.zeros(size, dtype))

    made = pl.pallas_call(
        body,
        grid=(padded, batch),
        out_shape=[jax.ShapeDtypeStruct((groups * batch, padded, width), dtype) for _ in streams[0].columns],
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(*operands)
    by_group = (x.reshape(groups, batch, padded, num_heads // groups, -1) for x in made)
    return tuple(jnp.moveaxis(x, 0, 2).reshape(batch, padded, num_heads, -1) for x in by_group)


class _Writer:
    """What writes a token of one stream, all of its arrays. first: where the stream's tokens begin."""

    def __init__(self, stream: Stream, first: int, num_heads: int, groups: int, operand: Callable[[Array], Take]):
        self.first, (self.batch, self.tokens) = first, stream.columns[0].product.lead
        self.width, self.group = stream.columns[0].size, stream.columns[0].size // groups
        self.chunks = [(group * self.group + at, size) for group in range(groups) for at, size in chunks_of(self.group)]
        self.head_dim = self.width // num_heads
        self.columns = [_Loader(columns, operand) for columns in stream.columns]
        self.norms = [None if norm is None else (operand(norm[0]), *norm) for norm in stream.norms]
        self.rope = None if stream.rope is None else [(operand(table), int(table.shape[0] > 1)) for table in stream.rope]

    def write(self, refs: Sequence[Any], outs: Sequence[Any], token: Any, sample: Any) -> None:
        own = token - self.first
        raw = [columns.load(refs, sample * self.tokens + own, self.chunks) for columns in self.columns]
        rope = None
        if self.rope is not None:
            rope = [_load(take(refs), (sample * many, own), 0, self.head_dim // 2) for take, many in self.rope]
        for columns, numbers, norm, out in zip(self.columns, raw, self.norms, outs, strict=True):
            chunks = columns.scaled(refs, numbers, self.chunks)
            if norm is not None:
                chunks = self._turned(chunks, norm, refs, rope, out.dtype)
            for (at, size), chunk in zip(self.chunks, chunks, strict=True):
                group, within = divmod(at, self.group)
                plt.store(out.at[group * self.batch + sample, token, pl.ds(within, size)], chunk.astype(out.dtype))

    def _turned(self, chunks: list[Array], norm: Any, refs: Sequence[Any], rope: Any, dtype: Any) -> Iterator[Array]:
        take, scale, eps = norm
        by: Any = None
        if over_all := scale.shape[0] == self.width:
            by = jax.lax.rsqrt(over([x * x for x in chunks], jnp.add, jnp.sum) / self.width + eps)
        of_head = None if over_all else self._pairs(_load(take(refs), (), 0, self.head_dim))
        for (at, size), chunk in zip(self.chunks, chunks, strict=True):
            pair, weights = self._pairs(chunk), of_head or self._pairs(_load(take(refs), (), at, size))
            if not over_all:
                by = jax.lax.rsqrt(jnp.sum(pair[0] * pair[0] + pair[1] * pair[1], axis=1) / self.head_dim + eps)[:, None]
            even, odd = ((x * by * weight).astype(dtype) for x, weight in zip(pair, weights, strict=True))
            if rope is not None:
                even, odd = even.astype(jnp.float32), odd.astype(jnp.float32)
                cos, sin = (table[None] for table in rope)
                even, odd = even * cos - odd * sin, odd * cos + even * sin
            yield jnp.stack([even.astype(dtype), odd.astype(dtype)], axis=-1).reshape(size)

    def _pairs(self, x: Float[Array, " size"]) -> tuple[Float[Array, "heads r"], ...]:
        return tuple(jnp.unstack(x.reshape(-1, self.head_dim // 2, 2), axis=-1))


class _Loader:
    """What loads a row of a product, and scales it."""

    def __init__(self, columns: Columns, operand: Callable[[Array], Take]):
        product = columns.product
        self.first = columns.first
        self.values = operand(product.values.reshape(-1, product.values.shape[-1]))
        self.of_row = None if product.row_scale is None else operand(product.row_scale.reshape(-1))
        self.of_column = None if product.column_scale is None else operand(product.column_scale)
        self.bias = None if product.row_scale is None or product.bias is None else operand(product.bias)

    def load(self, refs: Sequence[Any], row: Any, chunks: Sequence[tuple[int, int]]) -> tuple[list[Array], Any]:
        scale = None if self.of_row is None else self.of_row(refs)[row]
        values = self.values(refs)
        return [plt.load(values.at[row, pl.ds(self.first + at, size)]) for at, size in chunks], scale

    def scaled(self, refs: Sequence[Any], numbers: tuple[list[Array], Any], chunks: Sequence[tuple[int, int]]) -> list[Array]:
        loaded, scale = numbers
        made = [x.astype(jnp.float32) for x in loaded]
        if self.of_column is None:
            return made
        for i, (at, size) in enumerate(chunks):
            made[i] = made[i] * scale * _load(self.of_column(refs), (), self.first + at, size)
            if self.bias is not None:
                made[i] = made[i] + _load(self.bias(refs), (), self.first + at, size)
        return made


def _load(ref: Any, at: tuple[Any, ...], first: int, size: int) -> Array:
    return plt.load(ref.at[*at, pl.ds(first, size)]).astype(jnp.float32)
