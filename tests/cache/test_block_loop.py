"""Policies on blocks in the real denoise loop, on a tiny Wan: exactness, one executable, what XLA makes of it, meshes."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import relative_error
from loops import Tiny

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.samplers.flow_euler import FlowEuler

STEPS = 14
NUMBERS = {
    "teacache": {"coefficients": [1.0, 0.0]},
    "magcache": {"ratios": [[1.0, 1.02, 0.97, 1.01, 0.95], [1.0, 1.01, 0.98, 0.99, 0.9]]},
}
# Two settings of each policy: one that computes every step, one that skips some.
SETTINGS = {
    "teacache": (dict(threshold=0.0), dict(threshold=0.4)),
    "magcache": (dict(threshold=0.0), dict(threshold=0.3)),
    "fbcache": (dict(threshold=0.0), dict(threshold=0.35)),
    "dbcache": tuple(dict(threshold=t, warmup=2, first_blocks=1, last_blocks=1, order=1) for t in (0.0, 0.35)),
    "blockdance": (dict(group=1, block=1), dict(group=3, block=1)),
    "taylorseer": (dict(interval=1), dict(interval=4)),
    "pab": (dict(self_interval=1, cross_interval=1), dict(self_interval=3, cross_interval=4)),
    "tokencache": (dict(quarters=4), dict(interval=4, quarters=2)),
}


@pytest.fixture(scope="module")
def sequential():
    return Tiny.load("cache_wan")


@pytest.fixture(scope="module")
def batched():
    return Tiny.load("cache_wan", "batched")


@pytest.fixture(scope="module")
def full(sequential, batched):
    return {id(tiny): tiny(POLICIES["none"]()) for tiny in (sequential, batched)}


def create(name, **params):
    return POLICIES[name].create(STEPS, NUMBERS, **params)


def assert_exact(name, tokens, exact):
    """To the bit, but for stacks in three pieces, around which XLA on a CPU fuses otherwise than within one loop."""
    if name == "dbcache":
        assert relative_error(tokens, exact) < 1e-6
    else:
        assert np.array_equal(tokens, exact)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_cache_that_never_skips_is_the_exact_run_to_the_bit(name, sequential, full):
    never, sometimes = SETTINGS[name]
    exact, strings = full[id(sequential)]
    tokens, found = sequential(create(name, **never))
    assert found == strings == ["F" * STEPS] * 2
    assert_exact(name, tokens, exact)

    before = len(sequential.loop._compiled)
    skipping, found = sequential(create(name, **sometimes))
    assert 2 <= STEPS - found[0].count("F") <= STEPS - 2
    assert not np.array_equal(skipping, exact) and np.isfinite(skipping).all()
    # Nothing of a request reaches the next.
    assert np.array_equal(sequential(create(name, **never))[0], tokens)
    assert np.array_equal(sequential(create(name, **sometimes | {"mask": [1] * STEPS}))[0], tokens)
    assert np.array_equal(sequential(create(name, **sometimes))[0], skipping)
    assert len(sequential.loop._compiled) == before


def test_branches_as_one_batch(batched, full):
    never, sometimes = SETTINGS["fbcache"]
    assert np.array_equal(batched(create("fbcache", **never))[0], full[id(batched)][0])
    _, (positive, negative) = batched(create("fbcache", **sometimes))
    assert positive == negative and "." in positive


def test_at_scale_one_the_negative_branch_is_neither_run_nor_remembered(sequential):
    _, (positive, negative) = sequential(create("taylorseer", interval=4), scale=1.0)
    assert positive == "FFF.F...F...F." and negative == "." * STEPS


def test_an_expert_switch_is_computed_and_forgets(sequential):
    policy = create("fbcache", threshold=1e9)
    assert sequential(policy, switch=5)[1] == ["F....F........"] * 2
    # What the first expert's blocks left behind changes nothing of the steps after.
    like = sequential.weights, sequential.tokens, sequential.branches, policy, FlowEuler()
    start, run = sequential.loop.functions(*like)
    ends = []
    for litter in (0, 7):
        carry = start(*like)
        memory, outer = carry.cache_state
        anchors = jax.tree.map(lambda leaf: leaf + jnp.asarray(litter, leaf.dtype), memory.anchors)  # noqa: B023
        memory = dataclasses.replace(memory, anchors=anchors, reference=memory.reference + litter)
        carry = dataclasses.replace(carry, cache_state=(memory, outer))
        steps = np.int32(5), np.int32(STEPS), np.int32(5), None
        rest = sequential.branches, sequential.schedule(), np.full(200, 3.0, np.float32), policy, FlowEuler()
        ends.append(run(sequential.weights, carry, *rest, *steps).tokens)
    assert np.array_equal(*ends)


@pytest.mark.parametrize("name, conditionals", [("teacache", 1), ("dbcache", 1), ("pab", 2), ("tokencache", 1)])
def test_xla_keeps_one_conditional_a_site_and_selects_no_hidden_states(name, conditionals, batched):
    policy, loop = create(name, **SETTINGS[name][1]), batched.loop
    carry = loop._start(batched.weights, batched.tokens, batched.branches, policy, FlowEuler())
    steps = jnp.int32(0), jnp.int32(9), jnp.int32(0)
    arguments = batched.branches, batched.schedule(), jnp.ones(200), policy, FlowEuler(), *steps
    leaves, structure = jax.tree.flatten((batched.weights, carry, *arguments))
    lowered = jax.jit(lambda leaves: loop._run(*jax.tree.unflatten(structure, leaves))).lower(leaves)
    operations = Counter(re.findall(r"= \"?stablehlo\.(\w+)", lowered.as_text()))
    assert operations["case"] + operations["if"] == conditionals
    compiled = lowered.compile().as_text()
    assert len(re.findall(r"\) conditional\(", compiled)) == conditionals
    stream = next(leaf for leaf in jax.tree.leaves(carry.cache_state[0]) if leaf.ndim > 3)
    hidden = ",".join(str(size) for size in stream.shape[-2:])
    selects = re.findall(r"\[([\d,]*)\]\S* select\(", compiled)
    assert not [shape for shape in selects if shape.endswith(hidden)]
    # In the branch that reuses, the memory passes through: nothing of its size is copied. Before JAX 0.11 XLA copied what
    # passes through one of more than two branches.
    if name == "tokencache" and jax.__version_info__ < (0, 11):
        return
    reuse = re.search(r"conditional\(.*branch_computations=\{%?([\w.\-]+)", compiled) or re.search(
        r"false_computation=%?([\w.\-]+)", compiled
    )
    assert reuse is not None
    body = compiled[compiled.index(f"%{reuse[1]} (") :].split("\n}")[0]
    assert not re.findall(rf"{hidden}\]\S* copy\(", body), body


def test_a_mesh_decides_as_one_device_does(sequential):
    """All of the signal in one shard: means of shards' ratios, or a shard's own view, would decide otherwise."""
    mesh = Tiny.load("cache_wan", mesh=MeshConfig(ring=4))
    assert mesh.num_tokens is not None  # 18 tokens on 4 devices are padded
    louder = jnp.ones(mesh.tokens.shape[1]).at[:4].set(30.0)
    mesh.tokens = jax.device_put(mesh.tokens * louder[None, :, None], mesh.tokens.sharding)
    alone = Tiny(**vars(sequential) | {"tokens": sequential.tokens * louder[None, :18, None]})
    strings = set()
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.5):
        (here, expected), (there, found) = (tiny(create("fbcache", threshold=threshold)) for tiny in (alone, mesh))
        assert found == expected
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-3)
        strings.add(tuple(found))
    assert len(strings) > 2
