"""What the attention kernels share: how a block of threads is divided, and what Pallas has no word for.

A block is two warpgroups that compute, each on ROWS queries, and one that fetches keys and values ahead of them. While one
of the two does softmax the other has the tensor cores: they take turns (FlashAttention-3, arXiv 2407.08608, section 3.1).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as mosaic_gpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

plgpu: Any = mosaic_gpu
"""Its types say less than it takes."""

ROWS = 64
"""Queries of a warpgroup: the rows of a wgmma instruction."""

COMPUTING = 2
"""Warpgroups that compute; the one behind them fetches."""

TILE = ROWS * COMPUTING
CLUSTER = "cluster"
LAYOUT = plgpu.Layout.WGMMA
REGISTERS = {"compute": 240, "fetch": 24}
FIRST_TURN = 4
"""Named barriers below it are Mosaic's own."""

MASKED = -1e30
"""The logit of a key that does not count; finite, since rows where none counts must not make NaN."""


class Turns:
    """The two computing warpgroups take turns at the tensor cores: named barriers, one that each of them waits at."""

    def __init__(self, warpgroup: jax.Array, interpret: bool):
        self.mine, self.other = FIRST_TURN + warpgroup, FIRST_TURN + 1 - warpgroup
        self.interpret = interpret
        pl.when(warpgroup == 1)(self.end)

    def begin(self) -> None:
        if not self.interpret:  # turns make no difference but to speed, and the interpreter knows no inlined code
            _named_barrier("sync", self.mine)

    def end(self) -> None:
        if not self.interpret:
            _named_barrier("arrive", self.other)


def _named_barrier(operation: str, barrier: jax.Array) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def run(_, barrier):
        number = barrier.registers[()] if isinstance(barrier, mgpu.FragmentedArray) else barrier
        void, threads = ir.Type.parse("!llvm.void"), 128 * COMPUTING
        llvm.inline_asm(void, [number], f"bar.{operation} $0, {threads};", "r", has_side_effects=True)

    run(barrier)


def to_fp8(x: jax.Array) -> jax.Array:
    """float32 [ROWS, n] as float8_e4m3fn, as left operand of a wgmma that contracts the n.

    No thread hands a number to another, so the columns come out in another order: see PERMUTATION.
    """

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def convert(_, x):
        word, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        registers = np.empty(layout.registers_shape(tuple(x.shape)), dtype=object)
        for index in np.ndindex(*registers.shape):
            row, column, *rest = index
            floats = [
                vector.extract(x.registers[(row, 2 * column + half, *rest)], dynamic_position=[], static_position=[i])
                for half in (0, 1)
                for i in (0, 1)
            ]
            packed = llvm.inline_asm(word, floats, _PACK, "=r,f,f,f,f")
            registers[index] = mgpu.utils.bitcast(packed, four)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return convert(x)


_PACK = (
    "{ .reg .b16 low, high;"
    " cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
    " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;"
    " mov.b32 $0, {low, high}; }"
)

PERMUTATION = np.array([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
"""Where column i of 16 comes from after `to_fp8`: a thread's accumulators are columns 2i, 2i+1, 8+2i and 9+2i, its fp8 operand
is columns 4i to 4i+3 (PTX ISA, wgmma register fragments)."""


def rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a row, for every column."""
    return lax.broadcast_in_dim(x, shape, [0])


def everywhere(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [])


def fold(x: jax.Array) -> jax.Array:
    """[ROWS, n] summed to [ROWS, 8]: additions within threads alone. What is left to add crosses threads, once in the end."""
    return functools.reduce(jnp.add, [x[:, at : at + 8] for at in range(0, x.shape[1], 8)])


def swizzled(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory as wgmma reads it without bank conflicts: rows of 128 bytes, or of 64 where they don't divide by 128."""
    size = jnp.dtype(dtype).itemsize
    width = next(width for width in (128, 64) if shape[-1] * size % width == 0)
    return plgpu.SMEM(
        tuple(shape), dtype, transforms=(plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width))
    )


def launch(
    body: Callable,
    operands: Sequence[jax.Array],
    tiles: Sequence[Any],
    *,
    dtype: Any,
    stages: int,
    with_lse: bool,
    cluster: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs a kernel on blocks of TILE queries, of which neighbours of a cluster share what they fetch: out [b, s, h, d], of the
    first operand's shape and of `dtype`, and lse [b, h, s].

    `body` is called with the operands, out, lse if asked, then shared memory: `tiles`, one for lse, and barriers: of arrival of
    queries, keys and values, of release of keys and values.
    """
    b, s, h, d = operands[0].shape
    padded = pl.cdiv(s, TILE * cluster) * TILE * cluster
    lse_type = [jax.ShapeDtypeStruct((b, h, padded), jnp.float32)] if with_lse else []
    arrived = [plgpu.Barrier(num_barriers=n) for n in (COMPUTING, stages, stages)]
    clusters = dict(cluster=(cluster,), cluster_names=(CLUSTER,)) if cluster > 1 else {}
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((b, s, h, d), dtype), *lse_type],
        scratch_types=[
            *tiles,
            plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
            *arrived,
            _released(stages, cluster),
            _released(stages, cluster),
        ],
        grid=(b, h, padded // (TILE * cluster)),
        grid_names=("batch", "heads", "tiles"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        **({"interpret": interpret} if interpret else {}),
        **clusters,
    )
    out, *lse = run(*operands)
    return out, lse[0][..., :s] if lse else None


def _released(stages: int, cluster: int) -> Any:
    """One barrier a stage that all who read it arrive at, on every block that the data is sent to."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=(CLUSTER,), num_arrivals=COMPUTING, num_barriers=stages)


def first_query(cluster: int) -> jax.Array:
    """Of this block's TILE."""
    tile = lax.axis_index("tiles")
    if cluster > 1:
        tile = tile * cluster + lax.axis_index(CLUSTER)
    return tile * TILE


def walk(length: jax.Array, size: int, lists: Sequence[Any]) -> tuple[Any, Callable]:
    """How many blocks of `size` keys this block of queries attends to, and which is the i-th, from the last to the first.

    lists: none, for all that hold one of the first `length` keys; or count [b, h, nq] and index [b, h, nq, nk].
    """
    if not lists:
        number = lax.max(lax.div(length + (size - 1), size), 1)
        return number, lambda i: number - (i + 1) if isinstance(i, int) else number - 1 - i
    count, index = lists
    here = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("tiles")
    return count[here], lambda i: index[(*here, i)]


def fetch(num_blocks: jax.Array, stages: int, cluster: int, copies: Sequence[tuple[Callable, Any, Any, Any]]) -> None:
    """What the fetching warpgroup does: blocks 0 to num_blocks of every array, each as soon as its stage is free.

    copies: of each array `source(block)`, the stages in shared memory, the barriers of arrival and those of release.
    """
    plgpu.set_max_registers(REGISTERS["fetch"], action="decrease")
    multicast = {"collective_axes": (CLUSTER,)} if cluster > 1 else {}

    def load(block, _):
        stage = lax.rem(block, jnp.int32(stages))
        for source, target, arrived, released in copies:
            pl.when(block >= stages)(lambda released=released: plgpu.barrier_wait(released.at[stage]))
            plgpu.copy_gmem_to_smem(source(block), target.at[stage], arrived.at[stage], **multicast)

    def drain(block, _):  # neighbours still send to this block's barriers: it must not end before they have
        for *_, released in copies:
            plgpu.barrier_wait(released.at[lax.rem(block, jnp.int32(stages))])

    lax.fori_loop(0, num_blocks, load, None)
    lax.fori_loop(lax.max(num_blocks - stages, 0), num_blocks, drain, None)
