"""Ring attention (arXiv 2310.01889): queries stay, keys and values go round, and the parts are merged by log-sum-exp.

Runs inside shard_map, on what one device holds.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import AttentionFn
from smartdiff_jax.sharding.chunks import Chunks

KV = tuple[Array, Array]
"""Keys and values, each [b, t, h, d]."""

Part = tuple[Array, Array]
"""Attention to some of the keys: out float32 [b, s, h, d] and its log-sum-exp [b, h, s]."""


def ring_attention(
    kernel: AttentionFn,
    q: Float[Array, "b s h d"],
    kv: KV,
    axis: str,
    chunks: Chunks,
) -> Float[Array, "b s h d"]:
    """Attention of `q` to the chunks of all devices along `axis`; `kv` is this device's keys and values.

    chunks: how many keys count in each, which are its first. At least one key in all chunks must count.

    A Python loop and not a scan, which would permute once more than needed and copy K and V every turn. Keys and values
    travel in a permute each, issued before the attention they can hide behind: packed into one they would be copied.
    """
    return _merged(_parts(kernel, q, kv, axis, chunks))[0].astype(q.dtype)


def own_and_remote(kernel: AttentionFn, q: Array, kv: KV, axis: str, chunks: Chunks) -> tuple[Part, Part]:
    """`ring_attention` before its last merge: attention to this device's own chunk, and to those of all others."""
    own, *others = _parts(kernel, q, kv, axis, chunks)
    return own, _merged(others)


def own_chunk(kernel: AttentionFn, q: Array, kv: KV, axis: str, chunks: Chunks) -> Part:
    """Attention to this device's own chunk, without any communication."""
    length = None if chunks.all_count else chunks.lengths(lax.axis_index(axis), q.shape[0])
    return _attend(kernel, q, kv, length)


def _parts(kernel: AttentionFn, q: Array, kv: KV, axis: str, chunks: Chunks) -> list[Part]:
    """Attention to each chunk, this device's own first."""
    size, own = lax.axis_size(axis), lax.axis_index(axis)
    onward = [(device, (device + 1) % size) for device in range(size)]
    parts = []
    for turn in range(size):
        following = (lax.ppermute(kv[0], axis, onward), lax.ppermute(kv[1], axis, onward)) if turn + 1 < size else kv
        length = None if chunks.all_count else chunks.lengths((own - turn) % size, q.shape[0])
        parts.append(_attend(kernel, q, kv, length))
        kv = following
    return parts


def _merged(parts: list[Part]) -> Part:
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(*merged, *part)
    return merged


def _attend(kernel: AttentionFn, q: Array, kv: KV, length: Array | None) -> tuple[Array, Array]:
    """Attention to one chunk, in float32, with its log-sum-exp: -inf where the chunk has no key that counts."""
    # No kernel is asked about zero keys: the first one, padding there, is attended to and weighs nothing in the merge.
    out, lse = kernel(q, kv[0], kv[1], kv_length=None if length is None else jnp.maximum(length, 1), with_lse=True)
    assert lse is not None, "a kernel that has no log-sum-exp raises Unsupported"
    if length is not None:
        lse = jnp.where(length[:, None, None] > 0, lse, -jnp.inf)
    return out.astype(jnp.float32), lse


def merge(
    out: Float[Array, "b s h d"],
    lse: Float[Array, "b h s"],
    other_out: Float[Array, "b s h d"],
    other_lse: Float[Array, "b h s"],
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
    """Attention to two sets of keys as attention to both, with its log-sum-exp; float32. -inf is the empty set."""
    weight = jnp.where(jnp.isneginf(other_lse), 0.0, jax.nn.sigmoid(other_lse - lse))
    out = out + jnp.swapaxes(weight, 1, 2)[..., None] * (other_out - out)
    return out, jnp.logaddexp(lse, other_lse)
