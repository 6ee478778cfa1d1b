"""Weights of stacked blocks, each block's in arrays of its own.

A scan over stacked blocks copies a block's weights out of the stack before it reads them. With the many tokens
of a video that does not show; of FLUX.1's picture it is a tenth of the time (docs/measured.md).
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from smartdiff_jax.sharding.weights import is_stacked
from smartdiff_jax.weights.stream import dotted


def apart(weights: nnx.State) -> nnx.State:
    """The same weights with a tuple of arrays, one a block, for every stack. The stacks are freed one by one, so that there
    is never more than one of them twice."""

    def split(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(_split(variable.get_value())) if is_stacked(dotted(path)) else variable

    return nnx.from_flat_state([(path, split(path, variable)) for path, variable in nnx.to_flat_state(weights)])


def _split(stack: jax.Array) -> tuple[jax.Array, ...]:
    sharding = stack.sharding
    assert isinstance(sharding, NamedSharding)
    pick = _pick_into(NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind))
    blocks = jax.block_until_ready(tuple(pick(stack, np.int32(index)) for index in range(stack.shape[0])))
    stack.delete()
    return blocks


@functools.lru_cache
def _pick_into(place: NamedSharding) -> Callable[[jax.Array, np.int32], jax.Array]:
    """One function a placement, so that stacks of one shape share what is compiled."""
    return jax.jit(lambda stack, index: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), out_shardings=place)
