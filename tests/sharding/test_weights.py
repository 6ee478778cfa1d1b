"""Weights cut over the sequence axes: what is cut, and that a block gathers its own and nothing else is ever whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.sharding.weights import gather_weight, weight_sharding

LAYERS, WIDTH, INNER = 12, 256, 1024
SHAPES = {
    "feed_forward.linear_1.kernel": (LAYERS, WIDTH, INNER),
    "feed_forward.linear_1.bias": (LAYERS, INNER),
    "feed_forward.linear_2.kernel": (LAYERS, INNER, WIDTH),
}
AXES = [dict(ulysses=2), dict(ring=2, ulysses=4), dict(ring=2, ulysses=2, tensor=2)]


def test_only_large_parameters_of_blocks_are_cut():
    place = weight_sharding(make_mesh(MeshConfig(ring=2, ulysses=2, tensor=2)), fsdp=True)
    sequence = ("ring", "ulysses")
    assert place("blocks.feed_forward.linear_1.kernel", (LAYERS, WIDTH, INNER)).spec == P(None, sequence, ("tensor",))
    assert place("blocks.feed_forward.linear_2.kernel", (LAYERS, INNER, WIDTH)).spec == P(None, ("tensor",), sequence)
    assert place("blocks.modulation.kernel", (LAYERS, WIDTH, INNER)).spec == P(None, sequence, None)
    # A bias of every layer is a small message, and what is outside of blocks is whole for all of a loop once it is gathered.
    assert place("blocks.modulation.bias", (4096, WIDTH)).spec == P(None, None)
    assert place("time_projection.kernel", (WIDTH, INNER)).spec == P(None, None)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_block_gathers_its_own(axes):
    """Equal results; a gather for each kernel, along its first axis where tensor has not taken that; no copy of a stack."""
    mesh = make_mesh(MeshConfig(**axes))
    place = weight_sharding(mesh, fsdp=True)
    draw = np.random.default_rng(0)
    weights = {path: draw.normal(size=shape).astype(np.float32) / 64 for path, shape in SHAPES.items()}
    tokens = draw.normal(size=(1, 64, WIDTH)).astype(np.float32)

    def run(gather, weights, x):
        def block(x, index):
            up, bias, down = (
                gather(path, jax.lax.dynamic_index_in_dim(weights[path], index, keepdims=False)) for path in SHAPES
            )
            return x + jnp.tanh(x @ up + bias) @ down, None

        return jax.lax.scan(block, x, jnp.arange(LAYERS))[0]

    theirs = jax.jit(lambda weights, x: run(lambda path, leaf: leaf, weights, x))(weights, tokens)
    cut = {path: jax.device_put(leaf, place(f"blocks.{path}", leaf.shape)) for path, leaf in weights.items()}
    x = jax.device_put(tokens, jax.NamedSharding(mesh, P(None, ("ring", "ulysses"))))
    ours = jax.jit(lambda weights, x: run(lambda *leaf: gather_weight(mesh, *leaf), weights, x)).lower(cut, x).compile()
    np.testing.assert_allclose(np.asarray(ours(cut, x)), np.asarray(theirs), rtol=0, atol=1e-5)

    text = ours.as_text()
    whole = 4 * WIDTH * INNER // axes.get("tensor", 1)
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 2
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == (1 if "tensor" in axes else 0)
    # Two kernels of one layer, gathered, and the pieces that they are gathered from; of all layers it would be six times that.
    assert ours.memory_analysis().temp_size_in_bytes < 2 * 2 * whole + 2**20
