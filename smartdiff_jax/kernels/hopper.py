"""What the kernels for Hopper GPUs need of a call, and how its arrays are brought into shape for them."""

import contextlib
import importlib
import math
import threading

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from smartdiff_jax.errors import Unsupported

HEAD_DIMS = (64, 128)
LOG2E = math.log2(math.e)
ROWS = 8
"""Tokens come in multiples of these: the copy engine's tiles are so high."""


def require_hopper(kernel: str, q: Shaped[Array, "b s h d"]) -> None:
    """Raises `Unsupported` unless q is half precision with a head dim of HEAD_DIMS, the device a Hopper GPU and JAX 0.11."""
    if jax.__version_info__ < (0, 11):
        raise Unsupported(f"{kernel} needs JAX 0.11 or newer, this is {jax.__version__}")
    if not _is_hopper():
        raise Unsupported(f"{kernel} needs a Hopper GPU (compute capability 9.0), not {jax.devices()[0].device_kind}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"{kernel} needs bfloat16 or float16, not {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise Unsupported(f"{kernel} needs a head dim of {' or '.join(map(str, HEAD_DIMS))}, not {q.shape[-1]}")


def pad_tokens(x: Shaped[Array, "b n h d"], multiple: int = ROWS) -> Shaped[Array, "b m h d"]:
    """Tokens up to a multiple. What is padding is never counted."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def cluster_size(queries: int) -> int:
    """Blocks of 128 queries that fetch keys and values together: two wherever there are two."""
    return 2 if queries > 128 else 1


def import_ahead() -> threading.Thread | None:
    """Where Mosaic's kernels can run, begins their import, which takes a second or two, beside the loading of weights."""
    if jax.__version_info__ < (0, 11) or not _is_hopper():
        return None

    def run() -> None:
        with contextlib.suppress(Exception):  # the kernel that is called imports again, and says what is wrong
            importlib.import_module("smartdiff_jax.kernels.mosaic.flash")

    thread = threading.Thread(target=run, name="import of kernels", daemon=True)
    thread.start()
    return thread


def _is_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
