"""Attention in plain XLA: any device, any dtype, any length; the reference every other kernel is held against.

Softmax in float32. Long queries go block by block, so that the logits never take more than MAX_LOGITS_BYTES.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smartdiff_jax.kernels.sparse import Blocks

MAX_LOGITS_BYTES = 2**29


def xla_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    kv_length: Int[Array, " b"] | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """Serves every call of `AttentionFn`, and lists of blocks of any size, as a mask that saves no time."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    mask = None if kv_length is None else (jnp.arange(keys) < kv_length[:, None])[:, None, None, :]
    lists = None if blocks is None else (jnp.repeat(blocks.mask(), blocks.size.keys, axis=-1)[..., :keys], blocks.size.queries)

    def attend(block: Array, first: int | Array) -> tuple[Array, Array | None]:
        logits = jnp.einsum("bshd,bthd->bhst", block, k, preferred_element_type=jnp.float32) * factor
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        if lists is not None:
            listed, size = lists
            of_query = jnp.take(listed, (first + jnp.arange(block.shape[1])) // size, axis=2, mode="clip")
            logits = jnp.where(of_query, logits, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("bhst,bthd->bshd", (weights / total).astype(v.dtype), v)
        lse = (top + jnp.log(total))[..., 0] if with_lse else None
        return out.astype(q.dtype), lse

    block_size = max(1, MAX_LOGITS_BYTES // (4 * batch * heads * keys))
    if block_size >= queries:
        return attend(q, 0)
    num_blocks = math.ceil(queries / block_size)
    block_size = math.ceil(queries / num_blocks)
    padded = jnp.pad(q, ((0, 0), (0, num_blocks * block_size - queries), (0, 0), (0, 0)))
    cut = jnp.moveaxis(padded.reshape(batch, num_blocks, block_size, heads, -1), 1, 0)
    out, lse = jax.lax.map(lambda of: attend(*of), (cut, jnp.arange(num_blocks) * block_size))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, num_blocks * block_size, heads, -1)[:, :queries]
    if lse is not None:
        lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, -1)[:, :, :queries]
    return out, lse
