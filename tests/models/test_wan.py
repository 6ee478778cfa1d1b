"""The Wan transformer against diffusers (golden/make_wan.py), and the seams that the loop and the caches use."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import cast, load_golden, match_keys, relative_error
from pydantic import ValidationError

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.wan import ARCHITECTURE, KEY_RULES, WanConfig, WanTransformer, rope
from smartdiff_jax.sharding.context_parallel import LocalAttend

GOLDENS = ("wan_norm", "wan_no_norm")
CASES = [("wan_norm", "video"), ("wan_norm", "image"), ("wan_no_norm", "video")]
TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=6, freq_dim=8, ffn_dim=24,
    num_layers=3,
)  # fmt: skip


attend = LocalAttend(xla_attention)


def rope_of(grid, config):
    return tuple(jnp.asarray(table)[None] for table in rope(config, grid)[0])


def inputs(arrays, case, config):
    """Tokens, timestep, conditioning and grid of a golden case."""
    latents = jnp.asarray(arrays[f"{case}/latents"])
    patches = Patches(config.patch_size)
    grid = patches.grid(latents.shape)
    conditioning = Conditioning(jnp.asarray(arrays[f"{case}/text"]), rope_of(grid, config))
    return patches.pack(latents), jnp.asarray(arrays[f"{case}/timestep"]), conditioning, grid


embed = jax.jit(lambda model, *args: model.embed(*args))


@partial(jax.jit, static_argnames=("lo", "hi"))
def run_blocks(model, hidden, context, lo=0, hi=3):
    return model.run_blocks(hidden, context, attend, lo, hi)


@jax.jit
def velocity(model, tokens, timestep, conditioning):
    hidden, context = model.embed(tokens, timestep, conditioning)
    return model.head(model.run_blocks(hidden, context, attend, 0, model.num_blocks), context)


def random_inputs(config, batch=2, tokens=6, text_length=None):
    keys = jax.random.split(jax.random.key(7), 2)
    text = jax.random.normal(keys[0], (batch, 5, config.text_dim))
    conditioning = Conditioning(text, rope_of((1, 2, tokens // 2), config), text_length=text_length)
    return jax.random.normal(keys[1], (batch, tokens, 4 * config.in_channels)), jnp.float32(600.0), conditioning


@pytest.fixture(scope="module")
def model():
    """Random numbers in every parameter, the head's too."""
    noise = np.random.default_rng(1)
    abstract = nnx.eval_shape(lambda: WanTransformer(TINY, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * noise.standard_normal(leaf.shape), leaf.dtype), abstract)


@pytest.mark.parametrize("name, case", CASES)
def test_velocity_equals_diffusers(name, case):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    tokens, timestep, conditioning, grid = inputs(arrays, case, config)
    out = Patches(config.patch_size).unpack(velocity(model, tokens, timestep, conditioning), grid)
    assert relative_error(out, arrays[f"{case}/velocity"]) <= 1e-5


@pytest.mark.parametrize("name", GOLDENS)
def test_bfloat16_stays_near_float32(name):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    tokens, timestep, conditioning, _ = inputs(arrays, "video", config)
    reference = velocity(model, tokens, timestep, conditioning)
    out = velocity(cast(model, ARCHITECTURE, jnp.bfloat16), tokens, timestep, conditioning)
    assert out.dtype == jnp.float32
    assert relative_error(out, reference) <= 2e-2


def test_every_key_has_one_rule_and_every_rule_one_parameter():
    arrays, _, model = load_golden("wan_norm", ARCHITECTURE)
    keys = [key.removeprefix("weight/") for key in arrays if key.startswith("weight/")]
    assert all(len(matches) == 1 for matches in match_keys(ARCHITECTURE, keys).values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert sorted(rule.path for rule in KEY_RULES) == sorted(paths)


def test_constructor_and_rules_keep_the_same_parameters_in_float32():
    model = nnx.eval_shape(lambda: WanTransformer(TINY, nnx.Rngs(0), dtype=jnp.bfloat16))
    kept = {rule.path for rule in KEY_RULES if rule.keep_float32}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        assert (parameter.dtype == jnp.float32) == (".".join(map(str, path)) in kept), path


def test_split_blocks_equal_all_blocks(model):
    hidden, context = embed(model, *random_inputs(TINY))
    whole = run_blocks(model, hidden, context)
    parts = run_blocks(model, run_blocks(model, hidden, context, 0, 1), context, 1, 3)
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    assert relative_error(whole, hidden) > 0.1
    np.testing.assert_array_equal(run_blocks(model, hidden, context, 2, 2), hidden)


def test_blocks_are_traced_once(model):
    calls = []

    def counting(q, k, v, **kwargs):
        calls.append(k.shape[1])
        return xla_attention(q, k, v, **kwargs)

    hidden, context = embed(model, *random_inputs(TINY))
    jax.make_jaxpr(lambda hidden: model.run_blocks(hidden, context, LocalAttend(counting), 0, 3))(hidden)
    assert calls == [6, 5]  # self-attention, cross-attention


def test_a_part_of_the_blocks_does_not_copy_the_weights(model):
    hidden, context = embed(model, *random_inputs(TINY))
    jaxpr = jax.make_jaxpr(lambda model, hidden: model.run_blocks(hidden, context, attend, 1, 3))(model, hidden)
    assert "scan" in {eqn.primitive.name for eqn in jaxpr.eqns}
    assert not any("slice" in eqn.primitive.name or eqn.primitive.name == "gather" for eqn in jaxpr.eqns)


def test_scalar_timestep_serves_the_whole_batch(model):
    tokens, timestep, conditioning = random_inputs(TINY)
    scalar = velocity(model, tokens, timestep, conditioning)
    np.testing.assert_array_equal(scalar, velocity(model, tokens, jnp.full(2, timestep), conditioning))
    assert relative_error(velocity(model, tokens, jnp.float32(599.0), conditioning), scalar) > 1e-5


def test_text_behind_its_length_does_not_count(model):
    tokens, timestep, conditioning = random_inputs(TINY, text_length=jnp.array([3, 5], jnp.int32))
    noise = conditioning.text.at[0, 3:].add(10.0)
    changed = dataclasses.replace(conditioning, text=noise)
    unmasked = dataclasses.replace(changed, text_length=None)
    reference = velocity(model, tokens, timestep, conditioning)
    np.testing.assert_array_equal(velocity(model, tokens, timestep, changed), reference)
    assert relative_error(velocity(model, tokens, timestep, unmasked), reference) > 1e-3


def test_probe_is_the_input_of_the_first_self_attention(model):
    def first_values(model, *args):
        hidden, context = model.embed(*args)
        block = nnx.merge(nnx.graphdef(model.blocks), jax.tree.map(lambda leaf: leaf[0], nnx.state(model.blocks)))
        seen = []

        def keep_v(q, k, v, **kwargs):
            seen.append(v)
            return q, None

        block(hidden, context, LocalAttend(keep_v))
        return seen[0], block.self_attention.v(model.probe(hidden, context))

    values, from_probe = jax.jit(first_values)(model, *random_inputs(TINY))
    np.testing.assert_allclose(values.reshape(from_probe.shape), from_probe, rtol=1e-6, atol=1e-6)


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_time_modulation_and_norms_are_float32_in_a_bfloat16_run(model):
    model = cast(model, ARCHITECTURE, jnp.bfloat16)
    tokens, timestep, conditioning = random_inputs(TINY)
    hidden, context = embed(model, tokens, timestep, conditioning)
    assert hidden.dtype == context.text.dtype == jnp.bfloat16
    assert context.temb.dtype == context.modulation.dtype == jnp.float32

    embedding = jax.make_jaxpr(model.embed)(tokens, timestep, conditioning)
    matmuls = [eqn for eqn in equations(embedding.jaxpr) if eqn.primitive.name == "dot_general"]
    of_time = [eqn for eqn in matmuls if eqn.outvars[0].aval.ndim == 2]
    assert len(of_time) == 2
    sums = [eqn for eqn in equations(embedding.jaxpr) if eqn.primitive.name == "reduce_sum"]
    assert [eqn.params["axes"] for eqn in sums] == [(1,)]  # the projection
    assert all(var.aval.dtype == jnp.float32 for eqn in of_time for var in (*eqn.invars, *eqn.outvars))

    def run(hidden, context):
        return model.run_blocks(hidden, context, attend, 0, 3)

    blocks = list(equations(jax.make_jaxpr(run)(hidden, context).jaxpr))
    norms = [eqn for eqn in blocks if eqn.primitive.name == "rsqrt"]
    assert len(norms) == 7  # three layer norms, four of queries and keys
    sums = [eqn for eqn in blocks if eqn.primitive.name == "reduce_sum"]
    assert all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in norms + sums)
    linears = [eqn for eqn in blocks if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.ndim == 2]
    assert len(linears) == 10
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in linears for var in eqn.invars)


def test_rope_table_of_the_real_head_splits_44_42_42():
    cos, sin = rope(WanConfig(), (2, 3, 4))[0]
    assert cos.shape == sin.shape == (24, 64) and cos.dtype == np.float32
    angle = np.float64(2 * 10_000 ** (-2 / 42))  # token (1, 2, 3): second pair of the row axis
    np.testing.assert_allclose(cos[12 + 2 * 4 + 3, 22 + 1], np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(sin[12 + 2 * 4 + 3, 43], np.sin(3.0), rtol=1e-6)


def test_fresh_model_says_zero_and_hears_the_text():
    fresh = jax.jit(lambda: WanTransformer(TINY, nnx.Rngs(0)))()
    tokens, timestep, conditioning = random_inputs(TINY)
    assert not np.any(velocity(fresh, tokens, timestep, conditioning))
    hidden, context = embed(fresh, tokens, timestep, conditioning)
    _, other = embed(fresh, tokens, timestep, dataclasses.replace(conditioning, text=-conditioning.text))
    assert relative_error(run_blocks(fresh, hidden, other), run_blocks(fresh, hidden, context)) > 1e-4
    kernels = fresh.blocks.self_attention.q.kernel
    assert relative_error(kernels[0], kernels[1]) > 0.1


@pytest.mark.parametrize(
    "field, value",
    [
        ("image_dim", 1280),
        ("added_kv_proj_dim", 5120),
        ("pos_embed_seq_len", 514),
        ("qk_norm", None),
        ("attention_head_dim", 7),
    ],
)
def test_other_architectures_are_refused(field, value):
    with pytest.raises(InvalidConfig, match=field):
        WanConfig.model_validate({"_class_name": "WanTransformer3DModel", field: value})


def test_unknown_fields_are_refused_and_private_ones_dropped():
    assert WanConfig.model_validate({"_diffusers_version": "0.40", "patch_size": [1, 2, 2]}) == WanConfig()
    with pytest.raises(ValidationError, match="vace_layers"):
        WanConfig.model_validate({"vace_layers": [0]})
