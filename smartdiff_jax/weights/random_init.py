"""Random weights of the true size and sharding, for benchmarks: no checkpoint is needed to measure a model's speed.

Scales of norms are 1, everything else normal with deviation 0.02, so activations stay finite through any depth. A large leaf
is drawn on its devices by a fill that is compiled once a shape; a small one on the host, where it takes less than compiling.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from smartdiff_jax.models.family import Architecture
from smartdiff_jax.weights.stream import ShardingFor, abstract, dotted

STDDEV = 0.02
SMALL = 1 << 18
"""Numbers of a leaf that is drawn on the host."""


def random_state(architecture: Architecture, config: Any, dtype: DTypeLike, seed: int, sharding_for: ShardingFor) -> nnx.State:
    """Random parameters shaped, typed and sharded as `stream.load` would load them; the same for the same seed."""
    _, state = abstract(architecture, config, dtype, sharding_for)
    key = jax.random.key(seed)
    filled = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(state)):
        target = variable.get_value()
        kind, dtype = _kind(dotted(path), target.dtype), jnp.dtype(target.dtype)
        if target.size <= SMALL:
            drawn = _drawn(kind, target.shape, np.random.default_rng([seed, number])).astype(dtype)
            leaf = jax.device_put(drawn, target.sharding)
        else:
            leaf = _fill(kind, target.shape, dtype, target.sharding)(jax.random.fold_in(key, number))
        filled.append((path, variable.replace(leaf)))
    return nnx.from_flat_state(filled)


def _drawn(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if kind == "normal":
        return STDDEV * random.standard_normal(shape, np.float32)
    return np.full(shape, kind == "ones", np.float32)


def _kind(path: str, dtype: Any) -> str:
    *parents, name = path.split(".")
    if not jnp.issubdtype(dtype, jnp.floating):
        return "zeros"
    of_norm = "norm" in name or any("norm" in parent for parent in parents[-1:])
    return "ones" if name in ("scale", "gamma") or (of_norm and "bias" not in name) else "normal"


@functools.lru_cache(maxsize=256)
def _fill(kind: str, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    fills = {
        "zeros": lambda key: jnp.zeros(shape, dtype),
        "ones": lambda key: jnp.ones(shape, dtype),
        "normal": lambda key: (STDDEV * jax.random.normal(key, shape, dtype)).astype(dtype),
    }
    return jax.jit(fills[kind], out_shardings=sharding)
