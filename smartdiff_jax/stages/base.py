"""What a stage is: a generator that yields progress between its chunks, and its result last.

Between two yields the caller may show progress, cancel, or give another job its turn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage are finished."""

    stage: str
    done: int
    total: int


COMPILER_OPTIONS = {
    # XLA would make one product of those that read the same input, and for that put their weights side by side at every step.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # cuBLAS adds biases and computes GELU while it writes a product; behind Triton's, which XLA may take, both are a pass.
    "xla_gpu_enable_triton_gemm": False,
    # XLA would pad products to 8 rows and cut what they give, a pass each, where cuBLAS takes any number of rows as fast.
    "xla_disable_hlo_passes": "cublas-pad-for-gemms",
    # XLA would keep in float32, at twice the bytes, what a model rounds between its layers.
    "xla_allow_excess_precision": False,
    # A message leaves when what it sends is there, others under way or not. XLA counts any kernel as enough to hide one.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
}


def jit_in(dtype: Any, function: Callable, **options: Any) -> Any:
    """jax.jit of a stage that computes in `dtype`: float32 means float32, where a GPU would multiply in TF32."""
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else None

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return jax.jit(traced, compiler_options=COMPILER_OPTIONS, **options)
