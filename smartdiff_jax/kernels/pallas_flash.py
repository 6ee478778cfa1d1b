"""Exact attention for Hopper GPUs in Pallas (mosaic/flash.py): bfloat16 and float16, any length, float32 log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smartdiff_jax.kernels.hopper import cluster_size, pad_tokens, require_hopper
from smartdiff_jax.kernels.sparse import Blocks


def pallas_flash_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    kv_length: Int[Array, " b"] | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """Serves half precision and head dims 64 and 128, on Hopper GPUs with JAX 0.11 or newer."""
    require_hopper("pallas_flash", q)
    from smartdiff_jax.kernels.mosaic.flash import flash

    queries, keys = q.shape[1], k.shape[1]
    lengths = jnp.full(q.shape[0], keys, jnp.int32) if kv_length is None else kv_length
    q, k, v = (pad_tokens(x) for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    # Neighbours fetch together only what both attend to: with lists of their own each fetches for itself.
    cluster = cluster_size(queries) if blocks is None else 1
    out, lse = flash(q, k, v, lengths, scale=factor, with_lse=with_lse, cluster=cluster, blocks=blocks)
    return out[:, :queries], None if lse is None else lse[..., :queries]
