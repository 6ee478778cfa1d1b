"""SageAttention2's forward pass (arXiv 2411.10958) for Hopper: scores in int8, weights times values in fp8, any length.

Blocks of keys go from the last to the first, so that only the first one taken needs a mask. A turn at the tensor cores is the
scores of one block and the values of the block before it; then the other warpgroup has its turn, while this one does softmax.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from smartdiff_jax.kernels.fp8 import FP8_MAX
from smartdiff_jax.kernels.hopper import LOG2E
from smartdiff_jax.kernels.mosaic.warpgroups import (
    COMPUTING,
    LAYOUT,
    MASKED,
    REGISTERS,
    ROWS,
    TILE,
    Turns,
    everywhere,
    fetch,
    first_query,
    fold,
    launch,
    plgpu,
    rows,
    swizzled,
    to_fp8,
    walk,
)
from smartdiff_jax.kernels.quantize import Quantized
from smartdiff_jax.kernels.sparse import Blocks, BlockSize

BLOCK = 192
"""Keys at a time, and keys with one scale; 128 is 5 to 9 % slower on an H100, 256 does not fit its registers."""

STAGES = 3
WEIGHT_BITS = math.log2(FP8_MAX)
"""Weights are at most 1; in fp8 they are at most FP8_MAX, so that the smallest are not lost."""

BIAS_BITS, BIAS = 0x4B400000, 12582912.0
"""The float 1.5 * 2**23, whose lowest mantissa bit is 1: an int32 accumulator that starts at its bits is, read as a float, the
score plus BIAS. Scores are below 2**22 in size: 127 * 127 * 128."""


def sage(
    x: Quantized,
    lengths: Int[Array, " b"],
    *,
    dtype: jnp.dtype,
    with_lse: bool,
    cluster: int,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """Attention of what `quantize` made with this BLOCK and `PERMUTATION`; lse is without what the keys shared. Of every
    batch the first `lengths` keys count; where none does, out is 0 and lse -inf. dtype: of out, half precision.
    blocks: as of `flash`."""
    _, s, _, d = x.q8.shape
    lists = () if blocks is None else blocks.arrays(s, x.k8.shape[1], BlockSize(TILE, BLOCK))

    def body(q_in, q_scale_in, k_in, k_scale_in, v_in, v_scale_in, lengths_in, *rest):
        lists_in, (out, *rest) = rest[: len(lists)], rest[len(lists) :]
        lse, rest = (rest[0], rest[1:]) if with_lse else (None, rest)
        q_tile, out_tile, k_tile, v_tile, lse_tile, q_here, k_here, v_here, k_free, v_free = rest
        batch, head, warpgroup = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("warpgroup")
        length = lengths_in[batch]
        num_blocks, block_at = walk(length, BLOCK, lists_in)

        @pl.when(warpgroup == COMPUTING)
        def fetches():
            def keys(i):
                return k_in.at[batch, pl.ds(block_at(i) * BLOCK, BLOCK), head]

            def values(i):
                return v_in.at[batch, head, :, pl.ds(block_at(i) * BLOCK, BLOCK)]

            fetch(num_blocks, STAGES, cluster, [(keys, k_tile, k_here, k_free), (values, v_tile, v_here, v_free)])

        @pl.when(warpgroup < COMPUTING)
        def computes():
            plgpu.set_max_registers(REGISTERS["compute"], action="increase")
            mine = pl.ds(first_query(cluster) + warpgroup * ROWS, ROWS)
            queries = q_tile.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_in.at[batch, mine, head], queries, q_here.at[warpgroup])
            q_scale = plgpu.load(q_scale_in.at[batch, head, mine], layout=LAYOUT.reduce(1), optimized=False)
            plgpu.barrier_wait(q_here.at[warpgroup])
            turns = Turns(warpgroup, interpret=False)

            def scales(i):
                return q_scale * everywhere(k_scale_in[batch, head, block_at(i)], q_scale.shape)

            def start():
                return plgpu.ACC.init(plgpu.layout_cast(jnp.full((ROWS, BLOCK), BIAS_BITS, jnp.int32), LAYOUT))

            def biased(scores):
                return lax.bitcast_convert_type(scores, jnp.float32)

            def scores_of_first(scores):
                plgpu.wgmma(scores, queries, k_tile.at[0].T)

            factor = scales(0)
            plgpu.barrier_wait(k_here.at[0])
            turns.begin()
            scores = biased(pl.run_state(scores_of_first)(start())) - BIAS
            turns.end()
            plgpu.barrier_arrive(k_free.at[0])
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=LAYOUT)
            counts = keys < length - block_at(0) * BLOCK
            logits = jnp.where(counts, scores * rows(factor, scores.shape), MASKED)
            top = jnp.maximum(jnp.max(logits, axis=1), MASKED / 1e10)
            weights = jnp.exp2(logits - rows(top - WEIGHT_BITS, logits.shape))
            total, weights = fold(weights), to_fp8(weights)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), LAYOUT)

            def softmax(scores, factor, top, total):
                new_top = jnp.maximum(top, (jnp.max(scores, axis=1) - BIAS) * factor)
                shrink = jnp.exp2(top - new_top)
                zero = new_top - WEIGHT_BITS + BIAS * factor
                weights = jnp.exp2(scores * rows(factor, scores.shape) - rows(zero, scores.shape))
                return weights, new_top, total * rows(shrink, total.shape) + fold(weights), shrink

            def step(i, carry):
                acc, weights, top, total = carry
                stage, before = (lax.rem(n, jnp.int32(STAGES)) for n in (i, i - 1))
                factor = scales(i)
                plgpu.barrier_wait(k_here.at[stage])
                turns.begin()

                def products(refs):
                    scores_ref, acc_ref = refs
                    plgpu.wgmma(scores_ref, queries, k_tile.at[stage].T)
                    plgpu.barrier_wait(v_here.at[before])
                    plgpu.wgmma(acc_ref, weights, v_tile.at[before].T)

                scores, acc = pl.run_state(products)((start(), plgpu.ACC.init(acc)))
                turns.end()
                plgpu.barrier_arrive(k_free.at[stage])
                plgpu.barrier_arrive(v_free.at[before])
                weights, top, total, shrink = softmax(biased(scores), factor, top, total)
                return acc * rows(shrink, acc.shape), to_fp8(weights), top, total

            acc, weights, top, total = lax.fori_loop(1, num_blocks, step, (acc, weights, top, total))
            last = lax.rem(num_blocks - 1, jnp.int32(STAGES))
            plgpu.barrier_wait(v_here.at[last])
            acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_tile.at[last].T))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[last])

            total = jnp.maximum(jnp.sum(total, axis=1), 1e-30)
            some = everywhere(jnp.where(length > 0, jnp.float32(1), jnp.float32(0)), total.shape)
            v_scale = plgpu.load(v_scale_in.at[batch, head], layout=LAYOUT.reduce(0), optimized=False)
            acc = acc * rows(some / total, acc.shape) * lax.broadcast_in_dim(v_scale, acc.shape, [1])
            out_tile.at[warpgroup][...] = acc.astype(dtype)
            if lse is not None:
                none = everywhere(jnp.where(length > 0, jnp.float32(0), jnp.float32(-jnp.inf)), total.shape)
                lse_tile.at[warpgroup][...] = top * (1 / LOG2E) + jnp.log(total * (1 / FP8_MAX)) + none
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[warpgroup], out.at[batch, mine, head])
            if lse is not None:
                plgpu.copy_smem_to_gmem(lse_tile.at[warpgroup], lse.at[batch, head, mine])
            plgpu.wait_smem_to_gmem(0)

    # Read by rows of whole tiles, which no copy engine clips.
    rows_of_tiles = pl.cdiv(s, TILE * cluster) * TILE * cluster
    q_scale = jnp.pad(x.q_scale, ((0, 0), (0, 0), (0, rows_of_tiles - s)))
    tiles = [
        swizzled((COMPUTING, ROWS, d), jnp.int8),
        swizzled((COMPUTING, ROWS, d), dtype),
        swizzled((STAGES, BLOCK, d), jnp.int8),
        swizzled((STAGES, d, BLOCK), jnp.float8_e4m3fn),
    ]
    operands = (x.q8, q_scale, x.k8, x.k_scale, x.v8, x.v_scale, lengths, *lists)
    return launch(body, operands, tiles, dtype=dtype, stages=STAGES, with_lse=with_lse, cluster=cluster)
