"""Attention in 8 bits for GPUs from Ampere on, in Triton: scores in int8, values in fp8 or, on Ampere, float16."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smartdiff_jax.errors import Unsupported
from smartdiff_jax.kernels.hopper import HEAD_DIMS
from smartdiff_jax.kernels.quantize import TINY, quantize

FP8_SINCE = (8, 9)
AMPERE = (8, 0)


def triton_sage_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    kv_length: Int[Array, " b"] | None = None,
    scale: float | None = None,
    with_lse: bool = False,
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]:
    """Serves half precision and head dims 64 and 128, on NVIDIA GPUs from Ampere on, with jax-triton. Not exact: see
    docs/kernels.md."""
    capability = _require(q)
    import jax_triton  # pyright: ignore[reportMissingImports]  # it imports on GPUs only

    from smartdiff_jax.kernels.tritonlang.sage import KEYS, QUERIES, forward

    b, s, h, d = q.shape
    t = k.shape[1]
    factor = d**-0.5 if scale is None else scale
    fp8 = capability >= FP8_SINCE
    x = quantize(q, k, v, kv_length, scale=factor, block=KEYS, order=np.arange(16))
    values, v_scale = (x.v8, x.v_scale) if fp8 else in_float16(v)
    lengths = jnp.full(b, t, jnp.int32) if kv_length is None else kv_length
    out, lse = jax_triton.triton_call(
        x.q8, x.q_scale, x.k8, x.k_scale, values, v_scale, lengths,
        kernel=forward,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, s), jnp.float32)],
        grid=(-(-s // QUERIES), h, b),
        num_warps=d // 16,
        num_stages=3,
        **constants(s, t, h, d, fp8),
    )  # fmt: skip
    if not with_lse:
        return out, None
    return out, lse + factor * jnp.einsum("bshd,bhd->bhs", q.astype(jnp.float32), x.shared)


def constants(s: int, t: int, h: int, d: int, fp8: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    from smartdiff_jax.kernels.tritonlang.sage import KEYS, QUERIES

    sizes = {"S": s, "T": t, "H": h, "D": d, "PADDED": t + -t % 64, "BLOCKS": -(-t // KEYS)}
    return sizes | {"FP8": fp8, "M": QUERIES, "N": KEYS}


def in_float16(v: Float[Array, "b t h d"]) -> tuple[Float[Array, "b t h d"], Float[Array, "b h d"]]:
    """Values and their scales: bfloat16 reaches further than float16, so each channel is at most 1."""
    v = v.astype(jnp.float32)
    scale = jnp.max(jnp.abs(v), axis=1) + TINY
    return (v / scale[:, None]).astype(jnp.float16), scale


def _require(q: Float[Array, "b s h d"]) -> tuple[int, int]:
    """The GPU's compute capability; raises `Unsupported` where the kernel does not serve q."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "0.0") if device.platform == "gpu" else "0.0"
    found = tuple(map(int, capability.split(".")))
    if found < AMPERE:
        raise Unsupported(f"triton_sage needs an NVIDIA GPU of compute capability 8.0 or more, not {device.device_kind}")
    if importlib.util.find_spec("jax_triton") is None:
        raise Unsupported("triton_sage needs the package jax-triton; install smartdiff_jax[cuda]")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"triton_sage needs bfloat16 or float16, not {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise Unsupported(f"triton_sage needs a head dim of {' or '.join(map(str, HEAD_DIMS))}, not {q.shape[-1]}")
    return found[0], found[1]
