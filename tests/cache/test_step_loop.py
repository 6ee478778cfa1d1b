"""Policies on steps in the real denoise loop, on a tiny Wan: exactness, Euler's identity, parity, XLA, meshes."""

import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import relative_error
from loops import Tiny

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.samplers.flow_euler import FlowEuler

STEPS = 14
GOLDEN = Path(__file__).parents[1] / "golden" / "cache_cfg.npz"
# Two settings of each policy: one that computes every step, one that skips some.
SETTINGS = {
    "easycache": (dict(threshold=0.0), dict(threshold=1.0, retention=0.1)),
    "schedule": (dict(interval=1), dict(interval=3, predictor="newton")),
    "meancache": (dict(budget=STEPS), dict(budget=6)),
    "cfgcache": (dict(interval=1), dict(interval=4, below=900.0)),
}


@pytest.fixture(scope="module")
def tiny():
    return Tiny.load("cache_wan")


@pytest.fixture(scope="module")
def full(tiny):
    return tiny(POLICIES["none"]())


def create(name, **params):
    return POLICIES[name].create(STEPS, {}, **params)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_cache_that_never_skips_is_the_exact_run_to_the_bit(name, tiny, full):
    never, sometimes = SETTINGS[name]
    exact, strings = full
    tokens, found = tiny(create(name, **never))
    assert found == strings == ["F" * STEPS] * 2
    assert np.array_equal(tokens, exact)

    before = len(tiny.loop._compiled)
    skipping, (positive, negative) = tiny(create(name, **sometimes))
    assert 2 <= negative.count(".") <= STEPS - 2
    assert positive == ("F" * STEPS if name == "cfgcache" else negative)
    assert not np.array_equal(skipping, exact) and np.isfinite(skipping).all()
    # Nothing of a request reaches the next.
    assert np.array_equal(tiny(create(name, **never))[0], tokens)
    sometimes_all = {key: value for key, value in sometimes.items() if key != "budget"} | {"mask": [1] * STEPS}
    assert np.array_equal(tiny(create(name, **sometimes_all))[0], tokens)
    assert np.array_equal(tiny(create(name, **sometimes))[0], skipping)
    assert len(tiny.loop._compiled) == before


@pytest.mark.parametrize("string", ["F.F..F...FFF.F", "FFFFF.......F.", "F............."])
def test_a_held_velocity_is_euler_on_the_computed_steps(string, tiny):
    """One step over the whole gap: an oracle for loop, sampler and masks at once."""
    sigmas = np.asarray(tiny.arrays["sigmas"])
    computed = np.array(list(string)) == "F"
    tokens, found = tiny(create("schedule", mask=np.where(computed, 1, -1).tolist()))
    assert found == [string] * 2
    fewer, _ = tiny(POLICIES["none"](), sigmas=np.append(sigmas[:-1][computed], 0.0))
    assert relative_error(tokens, fewer) < 1e-5
    assert np.array_equal(tiny(create("meancache", mask=np.where(computed, 1, -1).tolist(), orders=[1] * STEPS))[0], tokens)


def test_cfgcache_equals_diffusers_hook(tiny):
    """Which steps compute the negative branch, and what comes out (golden/make_cfg_cache.py)."""
    golden = np.load(GOLDEN)
    cases, strings = (json.loads(str(golden[name])) for name in ("cases", "strings"))
    for case, numbers in cases.items():
        tokens, found = tiny(create("cfgcache", **numbers))
        assert found == ["F" * STEPS, strings[case]], case
        assert relative_error(tokens, tiny.patches.pack(jnp.asarray(golden[f"{case}/out"]))) < 2e-5, case
    assert len(cases) == 6 and "".join(strings.values()).count(".") > 30


def test_at_scale_one_nothing_stands_in_for_the_negative_branch(tiny):
    policy = create("cfgcache", interval=3, below=2000.0)
    tokens, (positive, negative) = tiny(policy, scale=1.0)
    assert positive == "F" * STEPS and negative == "." * STEPS
    assert np.array_equal(tokens, tiny(POLICIES["none"](), scale=1.0)[0])


def test_branches_as_one_batch(full):
    """Both are predicted at once; one alone cannot be."""
    batched = Tiny.load("cache_wan", "batched")
    _, (positive, negative) = batched(create("easycache", **SETTINGS["easycache"][1]))
    assert positive == negative and "." in positive
    with pytest.raises(InvalidRequest, match="cache='cfgcache'.*guidance=batched"):
        batched(create("cfgcache"))


@pytest.mark.parametrize(
    "name, letters", [("easycache", "FF...FF......."), ("schedule", "F....F........"), ("cfgcache", "F....F........")]
)
def test_an_expert_switch_is_computed_and_forgets(name, letters, tiny):
    params = {"easycache": dict(threshold=1e9, retention=0.0, cooldown=0), "schedule": dict(interval=99)}
    policy = create(name, **params.get(name, dict(interval=99, below=2000.0)))
    _, (positive, negative) = tiny(policy, switch=5)
    assert negative == letters and positive == ("F" * STEPS if name == "cfgcache" else letters)


@pytest.mark.parametrize("name", ["easycache", "cfgcache"])
def test_xla_keeps_one_conditional_and_selects_no_hidden_states(name, tiny):
    """And one copy of the model, whatever stands in for a branch."""
    steps = jnp.int32(0), jnp.int32(9), jnp.int32(0)

    def lowered(policy):
        carry = tiny.loop._start(tiny.weights, tiny.tokens, tiny.branches, policy, FlowEuler())
        arguments = tiny.branches, tiny.schedule(), jnp.ones(200), policy, FlowEuler(), *steps
        leaves, structure = jax.tree.flatten((tiny.weights, carry, *arguments))
        return jax.jit(lambda leaves: tiny.loop._run(*jax.tree.unflatten(structure, leaves))).lower(leaves)

    ours, plain = lowered(create(name)), lowered(POLICIES["none"]())
    operations, expected = (Counter(re.findall(r"= \"?stablehlo\.(\w+)", which.as_text())) for which in (ours, plain))
    sites = 0 if name == "cfgcache" else 1
    assert operations["case"] + operations["if"] == sites
    assert operations["while"] == expected["while"] and operations["dot_general"] == expected["dot_general"]
    compiled = ours.compile().as_text()
    assert len(re.findall(r"\) conditional\(", compiled)) == sites
    model_width = 24
    assert re.search(rf"f32\[[\d,]*,{model_width}\]", compiled)
    selects = re.findall(r"\[([\d,]*)\]\S* select\(", compiled)
    assert not [shape for shape in selects if shape.endswith(f"18,{model_width}")]


def test_a_mesh_decides_as_one_device_does(tiny):
    """All of the signal in one shard: means of shards' ratios, or a shard's own view, would decide otherwise."""
    mesh = Tiny.load("cache_wan", mesh=MeshConfig(ring=4))
    assert mesh.num_tokens is not None  # 18 tokens on 4 devices are padded
    louder = jnp.ones(mesh.tokens.shape[1]).at[:4].set(30.0)
    mesh.tokens = jax.device_put(mesh.tokens * louder[None, :, None], mesh.tokens.sharding)
    alone = Tiny(**vars(tiny) | {"tokens": tiny.tokens * louder[None, :18, None]})
    strings = set()
    for threshold in (0.02, 0.05, 0.1, 0.3, 1.0):
        policy = create("easycache", threshold=threshold, retention=0.1)
        (here, expected), (there, found) = (each(policy) for each in (alone, mesh))
        assert found == expected
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-3)
        strings.add(tuple(found))
    assert len(strings) > 2
