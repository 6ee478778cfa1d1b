"""Attention where all keys of a head are on one device: to all of them at once, or to all but a share."""

import dataclasses

from jax import Array, lax

from smartdiff_jax.kernels.base import AttentionFn
from smartdiff_jax.kernels.sparse import SparseKernel, choose_blocks
from smartdiff_jax.sharding.chunks import Chunks


def attend_to_whole(
    kernel: AttentionFn,
    q: Array,
    k: Array,
    v: Array,
    chunks: Chunks,
    sparse: SparseKernel | None,
    sparsity: Array | None,
) -> Array:
    """The first chunk is the whole. sparsity: traced, and at 0 `kernel` itself attends; None is without the choice."""

    def length() -> Array | None:
        return None if chunks.all_count else chunks.lengths(0, q.shape[0])

    def dense() -> Array:
        return kernel(q, chunks.arrange(k, 0), chunks.arrange(v, 0), kv_length=length())[0]

    if sparse is None or sparsity is None:
        return dense()
    return lax.cond(sparsity > 0, lambda: _attend_to_some(sparse, q, k, v, chunks, length(), sparsity), dense)


def _attend_to_some(
    sparse: SparseKernel, q: Array, k: Array, v: Array, chunks: Chunks, length: Array | None, sparsity: Array
) -> Array:
    """Keys of one block are to be neighbours in the picture, and text is to lie in as few blocks as can be."""
    own = dataclasses.replace(chunks, tokens=q.shape[1] // chunks.blocks - chunks.text)
    text = {}
    if chunks.text:
        first_text = chunks.blocks * chunks.tokens if chunks.num_tokens is None else chunks.num_tokens
        text = {"text_keys": first_text, "text_queries": own.blocks * own.tokens}
    q = own.apart(q)
    k, v = (chunks.apart(x) if chunks.all_count else chunks.arrange(x, 0) for x in (k, v))
    blocks = choose_blocks(q, k, sparsity, sparse.size, kv_length=length, **text)
    return own.in_blocks(sparse.attend(q, k, v, kv_length=length, blocks=blocks)[0])
