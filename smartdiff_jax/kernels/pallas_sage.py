"""Attention in 8 bits for Hopper GPUs: scores in int8, weights times values in fp8 (fused_quantize.py, mosaic/sage.py)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smartdiff_jax.kernels.hopper import cluster_size, require_hopper
from smartdiff_jax.kernels.sparse import Blocks


def pallas_sage_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    kv_length: Int[Array, " b"] | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """Serves half precision and head dims 64 and 128, on Hopper GPUs with JAX 0.11 or newer. Not exact: see docs/kernels.md."""
    require_hopper("pallas_sage", q)
    from smartdiff_jax.kernels.fused_quantize import quantize
    from smartdiff_jax.kernels.mosaic.sage import BLOCK, sage
    from smartdiff_jax.kernels.mosaic.warpgroups import PERMUTATION

    queries, keys = q.shape[1], k.shape[1]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    x = quantize(q, k, v, kv_length, scale=factor, block=BLOCK, order=PERMUTATION)
    lengths = jnp.full(q.shape[0], keys, jnp.int32) if kv_length is None else kv_length
    cluster = cluster_size(queries) if blocks is None else 1  # as in pallas_flash
    out, lse = sage(x, lengths, dtype=q.dtype, with_lse=with_lse, cluster=cluster, blocks=blocks)
    if lse is not None:
        lse = lse[..., :queries] + factor * jnp.einsum("bshd,bhd->bhs", q.astype(jnp.float32), x.shared)
    return out[:, :queries], lse
