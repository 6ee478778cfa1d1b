"""Blocks whose weights lie apart, as a GPU has a picture model's, give what stacked ones give, whatever caches hold of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from loops import Tiny

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.sharding.mesh import make_mesh, replicated
from smartdiff_jax.sharding.weights import weight_sharding
from smartdiff_jax.weights.apart import apart
from smartdiff_jax.weights.stream import dotted

MESH = MeshConfig(ring=2, ulysses=2)


def placed(weights, mesh):
    return jax.device_put(weights, replicated(make_mesh(mesh)))


@pytest.mark.parametrize("mesh, caches", [(MeshConfig(), {"fbcache": {"threshold": 0.1}, "pab": {}}), (MESH, {"none": {}})])
def test_blocks_apart_are_the_stacked_blocks(mesh, caches):
    tiny = Tiny.load("cache_flux1", mesh=mesh)
    split = apart(placed(jax.tree.map(jnp.copy, tiny.weights), mesh))
    for name, numbers in caches.items():
        policy = POLICIES[name].create(int(tiny.schedule().num_steps), {}, **numbers)
        expected, computed = tiny(policy)
        out, computed_apart = tiny(policy, weights=split)
        np.testing.assert_array_equal(out, expected)
        assert computed_apart == computed


def test_a_stack_leaves_when_its_blocks_are_there():
    mesh = make_mesh(MeshConfig(ring=2, tensor=2))
    place = weight_sharding(mesh)
    tiny = Tiny.load("cache_flux1")
    flat = nnx.to_flat_state(tiny.weights)
    weights = nnx.from_flat_state(
        [(path, v.replace(jax.device_put(v[...], place(dotted(path), v[...].shape)))) for path, v in flat]
    )
    before = dict(nnx.to_flat_state(weights))
    numbers = {path: np.asarray(variable[...]) for path, variable in before.items()}
    after = dict(nnx.to_flat_state(apart(weights)))
    kernel = ("single_blocks", "feed_forward", "kernel")
    assert before[kernel].get_value().is_deleted() and not before["head_projection", "bias"].get_value().is_deleted()
    assert all(block.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), 2) for block in after[kernel].get_value())
    split = {path: variable.get_value() for path, variable in after.items()}
    assert all(np.array_equal(np.stack(v) if isinstance(v, tuple) else v, numbers[path]) for path, v in split.items())
    into = after["double_blocks", "image", "qkv", "q", "kernel"].get_value()
    assert all(tuple(block.sharding.spec) == (None, "tensor") for block in into)
