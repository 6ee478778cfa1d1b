"""Which keys a block of queries may leave out: SpargeAttention's first stage (arXiv 2502.18137) with a budget.

Queries and keys are pooled in blocks; how well two means agree stands for how much their blocks weigh. There, a row of blocks
takes the heaviest until a share of the weight is reached, so that nobody knows beforehand how long it takes. Here every row
takes as many: what is given is the share of the keys that is left out, a traced number.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smartdiff_jax.kernels.quantize import mean_of_some

SIMILAR = 0.1
"""Least mean cosine between two keys of a block whose mean speaks for them. White noise has 0."""

SPAN = 60.0
"""Logits further below the best of their row are all the same: exp(-60) of its weight."""


class BlockSize(NamedTuple):
    """How many queries have one list, and how many keys an entry of it stands for."""

    queries: int
    keys: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Of each block of queries the blocks of keys it attends to: the first `count` of `index`, from the last to the first.

    count: int32 [b, h, nq], at least 1. index: int32 [b, h, nq, nk]; what is behind `count` is some block.
    """

    count: Int[Array, "b h nq"]
    index: Int[Array, "b h nq nk"]
    size: BlockSize = dataclasses.field(metadata={"static": True})

    def arrays(self, queries: int, keys: int, size: BlockSize) -> tuple[Array, Array]:
        """count and index. Raises ValueError unless they are for so many tokens in blocks of `size`."""
        expected = -(-queries // size.queries), -(-keys // size.keys)
        if self.size != size or self.index.shape[2:] != expected:
            found = f"{self.index.shape[2:]} blocks of {tuple(self.size)}"
            raise ValueError(f"lists of {found} for {expected} blocks of {tuple(size)} queries and keys")
        return self.count, self.index

    def mask(self) -> Bool[Array, "b h nq nk"]:
        """The same as a mask."""
        number = self.index.shape[-1]
        listed = jnp.arange(number) < self.count[..., None]
        return jnp.any((self.index[..., None] == jnp.arange(number)) & listed[..., None], axis=-2)


class SparseKernel(NamedTuple):
    """A kernel and the blocks it takes lists of.

    attend: an `AttentionFn` with `blocks: Blocks | None` besides: keys of blocks that are not in the lists do not count.
    """

    attend: Callable[..., tuple[Array, Array | None]]
    size: BlockSize


def choose_blocks(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    sparsity: Float[Array, ""],
    size: BlockSize,
    *,
    kv_length: Int[Array, " b"] | None = None,
    text_keys: int | Int[Array, ""] | Int[Array, " b"] | None = None,
    text_queries: int | None = None,
) -> Blocks:
    """The blocks of keys that count most for each block of queries: n - floor(sparsity * n) of the n with keys that count.

    sparsity: in [0, 1); 0 gives all blocks. text_keys, text_queries: keys and queries from there on are text: blocks with such
    keys are never left out, and to blocks with such queries all keys count. Text keys and, where queries and keys are of
    the same tokens, a block's own place are in its list even if the share would be less. Then go blocks of keys that are not
    alike, of which a mean says little; then those of the highest logit of means.
    """
    queries, keys = q.shape[1], k.shape[1]
    lengths = jnp.full(q.shape[0], keys, jnp.int32) if kv_length is None else kv_length
    q_starts, k_starts = jnp.arange(0, queries, size.queries), jnp.arange(0, keys, size.keys)
    k_counts = jnp.clip(lengths[:, None] - k_starts, 0, size.keys)
    number = jnp.maximum(-(-lengths // size.keys), 1)
    inside = k_starts < number[:, None] * size.keys

    # What all keys share moves all logits of a row alike, and would make all keys alike.
    k = k.astype(jnp.float32) - mean_of_some(k, kv_length)[:, None]
    if kv_length is not None:
        k = jnp.where((jnp.arange(keys) < lengths[:, None])[..., None, None], k, 0.0)
    q_mean = _sums(q, size.queries) / jnp.minimum(queries - q_starts, size.queries)[:, None, None]
    per_key = 1.0 / jnp.maximum(k_counts, 1)[..., None, None]
    # Behind a barrier, or XLA writes all directions down to read them again.
    inverse = jax.lax.optimization_barrier(jax.lax.rsqrt(jnp.sum(k * k, axis=-1, keepdims=True) + 1e-30))
    directions = k * inverse
    # Of all pairs the mean is that of directions, squared; a key with itself is no pair.
    pairs = jnp.sum(_sums(directions, size.keys) ** 2, axis=-1) - k_counts[..., None]
    unlike = (pairs < SIMILAR * (k_counts * (k_counts - 1))[..., None]) & (k_counts > 1)[..., None]
    logits = jnp.einsum("bqhd,bkhd->bhqk", q_mean, _sums(k, size.keys) * per_key) * q.shape[-1] ** -0.5

    must = jnp.zeros((1, len(q_starts), len(k_starts)), bool)
    if text_keys is not None:
        must |= (k_starts + size.keys > jnp.reshape(jnp.asarray(text_keys), (-1, 1)))[:, None]
    if queries == keys:
        must |= (k_starts < q_starts[:, None] + size.queries) & (k_starts + size.keys > q_starts[:, None])
    must &= inside[:, None]

    below = jnp.where(inside[:, None, None], logits, -jnp.inf)
    below = jnp.maximum(below - jnp.max(below, axis=-1, keepdims=True), -SPAN)
    unlike = jnp.moveaxis(unlike, 2, 1)[:, :, None]
    priority = below + 2 * SPAN * jnp.where(must[:, None], 2, jnp.where(unlike, 1, 0))
    priority = jnp.where(inside[:, None, None], priority, -jnp.inf)
    _, order = jax.lax.top_k(priority, len(k_starts))

    left_out = jnp.floor(sparsity * number).astype(jnp.int32)
    count = jnp.maximum(jnp.maximum(number - left_out, 1)[:, None], jnp.sum(must, axis=-1))
    if text_queries is not None:
        count = jnp.where(q_starts + size.queries > text_queries, number[:, None], count)
    count = jnp.broadcast_to(count[:, None], priority.shape[:3]).astype(jnp.int32)
    listed = jnp.where(jnp.arange(len(k_starts)) < count[..., None], order, -1)
    index = jnp.maximum(-jnp.sort(-listed, axis=-1), 0).astype(jnp.int32)
    return Blocks(count, index, size)


def _sums(x: Float[Array, "b n h d"], size: int) -> Float[Array, "b blocks h d"]:
    """Of every `size` tokens, in float32."""
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return jnp.sum(x.reshape(x.shape[0], -1, size, *x.shape[2:]), axis=2)
