"""What 8-bit kernels multiply and how they round it, in NumPy: what they lose, wherever they run."""

import jax.numpy as jnp
import numpy as np

from smartdiff_jax.kernels.fp8 import FP8_MAX
from smartdiff_jax.kernels.quantize import quantize

FA3_WEIGHT = 256.0
"""What its largest weight is in fp8."""


def exact(q, k, v, lengths, mask=True):
    """out [b, s, h, d] and lse [b, h, s] in float64. mask: of keys that count for a query, [b, h, s, t]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1])
    logits = np.where((np.arange(k.shape[1]) < np.asarray(lengths)[:, None])[:, None, None] & mask, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights / total, v), (top + np.log(total))[..., 0]


def sage(q, k, v, lengths=None):
    """out and lse of `pallas_sage`: int8 scores by block, weights and values in fp8."""
    order = np.random.default_rng(0).permutation(16)
    counted = None if lengths is None else jnp.array(lengths, jnp.int32)
    (b, t, h, d), scale = k.shape, k.shape[-1] ** -0.5
    x = quantize(*map(jnp.asarray, (q, k, v)), counted, scale=scale, block=192, order=order)
    assert x.k8.dtype == jnp.int8 and x.v8.dtype == jnp.float8_e4m3fn
    scores = np.einsum("bshd,bthd->bhst", np.asarray(x.q8, np.float64), np.asarray(x.k8, np.float64))
    assert np.abs(scores).max() < 2**22  # which the kernel relies on
    logits = scores * np.asarray(x.q_scale)[..., None] * np.repeat(x.k_scale, 192, axis=-1)[:, :, None, :t]
    counts = np.arange(t) < np.asarray([t] * b if lengths is None else lengths)[:, None]
    logits = np.where(counts[:, None, None], logits, -np.inf)
    values = np.asarray(x.v8, np.float64).reshape(b, h, d, -1, 16)[..., np.argsort(order)].reshape(b, h, d, -1)[..., :t]
    out, lse = _weigh(logits, values * np.asarray(x.v_scale)[..., None], FP8_MAX)
    return out, lse + scale * np.einsum("bshd,bhd->bhs", np.asarray(q, np.float64), np.asarray(x.shared, np.float64))


def fa3(q, k, v):
    """out of FlashAttention-3 in fp8 with one scale an array."""

    def rounded(x):
        x = np.asarray(x, np.float64)
        scale = np.abs(x).max() / FP8_MAX
        return _fp8(x / scale) * scale

    q, k, v = map(rounded, (q, k, v))
    logits = np.einsum("bshd,bthd->bhst", q, k) * (k.shape[-1] ** -0.5 / np.log(2))
    return _weigh(logits, np.moveaxis(v, 1, 3), FA3_WEIGHT)[0]


def _weigh(logits, values, largest):
    """logits [b, h, s, t] in base 2, values [b, h, d, t]."""
    top = logits.max(-1, keepdims=True)
    weights = np.exp2(logits - top) * largest
    total = weights.sum(-1)
    out = np.einsum("bhst,bhdt->bshd", _fp8(weights), values) / np.moveaxis(total, 1, 2)[..., None]
    return out, np.log(total / largest) + top[..., 0] * np.log(2)


def _fp8(x):
    return np.asarray(jnp.asarray(x, jnp.float8_e4m3fn), np.float64)
