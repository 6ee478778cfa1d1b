"""cuDNN's fused attention through `jax.nn.dot_product_attention`: bf16 and f16 on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smartdiff_jax.errors import Unsupported


def cudnn_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    kv_length: Int[Array, " b"] | None = None,
    scale: float | None = None,
    with_lse: bool = False,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """Serves half precision, head dims up to 128 that divide by 8, without a log-sum-exp."""
    if jax.default_backend() != "gpu":
        raise Unsupported("cudnn attention needs an NVIDIA GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"cudnn attention needs bfloat16 or float16, not {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise Unsupported(f"cudnn attention needs a head dim up to 128 that divides by 8, not {q.shape[-1]}")
    if with_lse:
        raise Unsupported("jax hands cudnn's log-sum-exp back in bfloat16, too coarse to merge partial attention with")
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, key_value_seq_lengths=kv_length, implementation="cudnn")
    return out, None
