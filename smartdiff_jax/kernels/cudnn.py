"""cuDNN's fused attention as JAX wraps it: bf16 and f16 on NVIDIA GPUs."""

from typing import Any

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
    """Serves half precision and head dims up to 128 that divide by 8."""
    if jax.default_backend() != "gpu":
        raise Unsupported("cudnn attention needs an NVIDIA GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"cudnn attention needs bfloat16 or float16, not {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise Unsupported(f"cudnn attention needs a head dim up to 128 that divides by 8, not {q.shape[-1]}")
    if with_lse:
        return _with_lse(q, k, v, kv_length, q.shape[-1] ** -0.5 if scale is None else scale)
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, key_value_seq_lengths=kv_length, implementation="cudnn")
    return out, None


def _with_lse(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    kv_length: Int[Array, " b"] | None,
    scale: float,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
    """JAX's public function rounds the log-sum-exp to q's dtype, too coarse to merge parts of attention with; the private one
    below it hands it back in float32."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths: dict[str, Any] = {}
    if kv_length is not None:
        lengths = dict(q_seqlen=jnp.full(q.shape[0], q.shape[1], jnp.int32), kv_seqlen=kv_length, mask_type=MaskType.PADDING)
    found: Any = dot_product_attention(q, k, v, scale=scale, return_residual=True, **lengths)
    return found
