"""FlashAttention-3's forward pass (arXiv 2407.08608) in half precision, exact, for any number of queries and keys.

Blocks of keys go from the last to the first, so that only the first one taken needs a mask. The product of a block's weights
with its values is issued behind the scores of the next block, and both run while the other warpgroup does its softmax.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

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
    walk,
)
from smartdiff_jax.kernels.sparse import Blocks, BlockSize

BLOCK = 192
"""Keys at a time; 128 is 1 to 6 % slower on an H100, 256 does not fit its shared memory."""

STAGES = 2


def flash(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    lengths: Int[Array, " b"],
    *,
    scale: float,
    with_lse: bool,
    cluster: int,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """s and t must divide by 8, d by 64. Of every batch the first `lengths` keys count; where none does, out is 0 and lse -inf.
    cluster: blocks of queries that fetch keys and values together. blocks: lists for TILE queries and BLOCK keys,
    where a cluster is one block. interpret: `plgpu.InterpretGPUParams`, to run on a CPU."""
    lists = () if blocks is None else blocks.arrays(q.shape[1], k.shape[1], BlockSize(TILE, BLOCK))
    d = q.shape[-1]
    factor = scale * LOG2E

    def body(q_in, k_in, v_in, lengths_in, *rest):
        lists_in, (out, *rest) = rest[: len(lists)], rest[len(lists) :]
        lse, rest = (rest[0], rest[1:]) if with_lse else (None, rest)
        q_tile, k_tile, v_tile, lse_tile, q_here, k_here, v_here, k_free, v_free = rest
        batch, head, warpgroup = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("warpgroup")
        length = lengths_in[batch]
        num_blocks, block_at = walk(length, BLOCK, lists_in)

        @pl.when(warpgroup == COMPUTING)
        def fetches():
            def block_of(x):
                return lambda i: x.at[batch, pl.ds(block_at(i) * BLOCK, BLOCK), head]

            copies = [(block_of(k_in), k_tile, k_here, k_free), (block_of(v_in), v_tile, v_here, v_free)]
            fetch(num_blocks, STAGES, cluster, copies)

        @pl.when(warpgroup < COMPUTING)
        def computes():
            plgpu.set_max_registers(REGISTERS["compute"], action="increase")
            mine = pl.ds(first_query(cluster) + warpgroup * ROWS, ROWS)
            queries = q_tile.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_in.at[batch, mine, head], queries, q_here.at[warpgroup])
            plgpu.barrier_wait(q_here.at[warpgroup])
            turns = Turns(warpgroup, bool(interpret))

            def weigh(logits, top):
                return jnp.exp2(logits * factor - rows(top, logits.shape))

            def softmax(logits, top, total):
                new_top = jnp.maximum(top, jnp.max(logits, axis=1) * factor)
                shrink = jnp.exp2(top - new_top)
                weights = weigh(logits, new_top)
                total = total * rows(shrink, total.shape) + fold(weights)
                return weights.astype(q.dtype), new_top, total, shrink

            def scores_of(stage):
                def run(scores):
                    plgpu.wgmma(scores, queries, k_tile.at[stage].T)
                    return scores[...]

                return run

            plgpu.barrier_wait(k_here.at[0])
            turns.begin()
            logits = pl.run_scoped(scores_of(0), plgpu.ACC((ROWS, BLOCK), jnp.float32))
            turns.end()
            plgpu.barrier_arrive(k_free.at[0])
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=LAYOUT)
            logits = jnp.where(keys < length - block_at(0) * BLOCK, logits, MASKED)
            top = jnp.maximum(jnp.max(logits, axis=1) * factor, MASKED / 1e10)
            weights = weigh(logits, top)
            total = fold(weights)
            weights = weights.astype(q.dtype)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), LAYOUT)

            def step(i, carry):
                acc, weights, top, total = carry
                stage, before = (lax.rem(n, jnp.int32(STAGES)) for n in (i, i - 1))
                plgpu.barrier_wait(k_here.at[stage])
                turns.begin()

                def products(refs):
                    acc_ref, weights_ref, top_ref, total_ref, shrink_ref = refs

                    def scores_and_values(scores):
                        plgpu.wgmma(scores, queries, k_tile.at[stage].T)
                        plgpu.barrier_wait(v_here.at[before])
                        plgpu.wgmma(acc_ref, weights, v_tile.at[before])
                        turns.end()
                        logits = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                        plgpu.barrier_arrive(k_free.at[stage])
                        weights_ref[...], top_ref[...], total_ref[...], shrink_ref[...] = softmax(logits, top, total)

                    pl.run_scoped(scores_and_values, plgpu.ACC((ROWS, BLOCK), jnp.float32))

                if interpret:
                    plgpu.barrier_wait(v_here.at[before])
                    acc += _product(weights, v_tile.at[before])
                    logits = pl.run_scoped(scores_of(stage), plgpu.ACC((ROWS, BLOCK), jnp.float32))
                    weights, top, total, shrink = softmax(logits, top, total)
                    plgpu.barrier_arrive(k_free.at[stage])
                else:
                    state = (plgpu.ACC.init(acc), weights, top, total, top)
                    acc, weights, top, total, shrink = pl.run_state(products)(state)
                plgpu.barrier_arrive(v_free.at[before])
                return acc * rows(shrink, acc.shape), weights, top, total

            acc, weights, top, total = lax.fori_loop(1, num_blocks, step, (acc, weights, top, total))
            last = lax.rem(num_blocks - 1, jnp.int32(STAGES))
            plgpu.barrier_wait(v_here.at[last])
            if interpret:
                acc += _product(weights, v_tile.at[last])
            else:
                acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_tile.at[last]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[last])

            total = jnp.maximum(jnp.sum(total, axis=1), 1e-30)
            some = everywhere(jnp.where(length > 0, jnp.float32(1), jnp.float32(0)), total.shape)
            queries[...] = (acc * rows(some / total, acc.shape)).astype(q.dtype)
            if lse is not None:
                none = everywhere(jnp.where(length > 0, jnp.float32(0), jnp.float32(-jnp.inf)), total.shape)
                lse_tile.at[warpgroup][...] = top * (1 / LOG2E) + jnp.log(total) + none
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, out.at[batch, mine, head])
            if lse is not None:
                plgpu.copy_smem_to_gmem(lse_tile.at[warpgroup], lse.at[batch, head, mine])
            plgpu.wait_smem_to_gmem(0)

    tiles = [
        swizzled((COMPUTING, ROWS, d), q.dtype),
        swizzled((STAGES, BLOCK, d), q.dtype),
        swizzled((STAGES, BLOCK, d), q.dtype),
    ]
    return launch(
        body,
        (q, k, v, lengths, *lists),
        tiles,
        dtype=q.dtype,
        stages=STAGES,
        with_lse=with_lse,
        cluster=cluster,
        interpret=interpret,
    )


def _product(weights: Array, values: Any) -> Array:
    """For the interpreter, whose wgmma takes no operand from registers."""
    return jnp.dot(weights.astype(jnp.float32), values[...].astype(jnp.float32))
