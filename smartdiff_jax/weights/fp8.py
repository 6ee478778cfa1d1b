"""A denoiser's weights for products in 8 bits: `precision: fp8`.

What multiplies many tokens is rounded, the linear layers of the blocks. What is sensitive keeps its dtype: embeddings, the
timestep's layers and modulations, norms, and the layers before and behind the blocks; together a few percent of the time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.fp8 import MULTIPLE, quantize_kernel
from smartdiff_jax.models.linear import Linear
from smartdiff_jax.sharding.weights import is_stacked
from smartdiff_jax.weights.residency import DEVICE
from smartdiff_jax.weights.stream import dotted

COMPUTE_CAPABILITY = 8.9
"""Ada and Hopper, and what comes after, multiply fp8."""


def require_fp8(dtype: Any) -> None:
    """Raises InvalidConfig unless `dtype` and the devices go with products in fp8. A CPU computes them slowly, for tests."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise InvalidConfig("precision", "fp8", f"rounds bfloat16 models, and dtype is {jnp.dtype(dtype)}; set dtype: bfloat16")
    device = jax.devices()[0]
    if device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) < COMPUTE_CAPABILITY:
        remedy = f"needs a GPU of compute capability {COMPUTE_CAPABILITY}, not {device.device_kind}; leave it at full"
        raise InvalidConfig("precision", "fp8", remedy)


def to_fp8(graphdef: Any, weights: nnx.State, *, fused: bool) -> tuple[Any, nnx.State]:
    """The same denoiser with 8-bit blocks. weights: arrays, which are freed one by one, or jax.ShapeDtypeStruct."""
    model = nnx.merge(graphdef, weights)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and _is_rounded(dotted(path), layer):
            layer.round_to_8_bits(_quantize, fused=fused)
    return nnx.split(model)


def are_fused(mesh: Mesh) -> bool:
    """Whether rows of 8 bits are made by kernels (kernels/fused_rows.py), which know one device's rows and run on GPUs."""
    return mesh.size == 1 and jax.default_backend() == "gpu"


def _is_rounded(path: str, layer: Linear) -> bool:
    shape = layer.kernel.get_value().shape
    whole = all(size % MULTIPLE == 0 for size in shape[-2:])
    return is_stacked(f"{path}.kernel") and "modulation" not in path and whole


def _quantize(kernel: Any) -> tuple[Any, Any]:
    """kernel [n, in, out], placed, to values [n, out, in] and scales [n, out], placed alike."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(quantize_kernel, kernel)
    *stack, along_in, along_out = (*kernel.sharding.spec, *[None] * kernel.ndim)[: kernel.ndim]
    place = functools.partial(NamedSharding, kernel.sharding.mesh)
    specs = PartitionSpec(*stack, along_out, along_in), PartitionSpec(*stack, along_out)
    there = jax.device_put(kernel, kernel.sharding.with_memory_kind(DEVICE) if _is_elsewhere(kernel) else kernel.sharding)
    rounded = jax.block_until_ready(_rounding(tuple(place(spec) for spec in specs))(there))
    kernel.delete()
    if _is_elsewhere(kernel):
        kind = kernel.sharding.memory_kind
        return tuple(jax.device_put(x, place(spec, memory_kind=kind)) for x, spec in zip(rounded, specs, strict=True))
    return rounded


def _is_elsewhere(kernel: jax.Array) -> bool:
    return jax.default_backend() == "gpu" and kernel.sharding.memory_kind not in (None, DEVICE)


@functools.lru_cache
def _rounding(places: tuple[NamedSharding, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Block by block, so that one block alone is in float32 at a time."""
    return jax.jit(lambda kernel: lax.map(quantize_kernel, kernel), out_shardings=places)
