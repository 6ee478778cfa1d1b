"""The FLUX.2 transformer against diffusers (golden/make_flux2.py), and the seams that the loop and the caches use."""

import dataclasses
import json
import math
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
from smartdiff_jax.models.flux2 import ARCHITECTURE, KEY_RULES, Flux2Config, Flux2Transformer, patches, rope
from smartdiff_jax.sharding.context_parallel import LocalAttend

CASES = [("flux2_klein", "wide"), ("flux2_klein", "column"), ("flux2_guided", "tall"), ("flux2_guided", "wide")]
NAMES = ["flux2_klein", "flux2_guided"]
KLEIN = load_golden("flux2_klein", ARCHITECTURE)[1]
REAL_KLEIN = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False)

attend = LocalAttend(xla_attention)
# Compiling is nearly all the time these tests take.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ropes_of(grid, num_text, config):
    """The tokens' table and the text's, each with a batch of 1."""
    return tuple(tuple(jnp.asarray(part)[None] for part in table) for table in rope(config, grid, num_text, 3))


def inputs(arrays, case, config):
    """Tokens, timestep, conditioning and grid of a golden case."""
    latents, text = jnp.asarray(arrays[f"{case}/latents"])[:, :, None], jnp.asarray(arrays[f"{case}/text"])
    grid = patches(config).grid(latents.shape)
    tokens_rope, text_rope = ropes_of(grid, text.shape[1], config)
    guidance = jnp.asarray(arrays[f"{case}/guidance"]) if config.guidance_embeds else None
    conditioning = Conditioning(text=text, rope=tokens_rope, text_rope=text_rope, guidance=guidance)
    return patches(config).pack(latents), jnp.asarray(arrays[f"{case}/timestep"]), conditioning, grid


embed = jit(lambda model, *args: model.embed(*args))


@partial(jit, static_argnames=("lo", "hi"))
def run_blocks(model, hidden, context, lo=0, hi=5):
    return model.run_blocks(hidden, context, attend, lo, hi)


@jit
def velocity(model, tokens, timestep, conditioning):
    hidden, context = model.embed(tokens, timestep, conditioning)
    return model.head(model.run_blocks(hidden, context, attend, 0, model.num_blocks), context)


def random_inputs(config=KLEIN, text_length=None):
    """Two pictures of 15 tokens and their texts of 7, the shapes of the golden cases."""
    batch, numbers = 2, np.random.default_rng(7)

    def draw(*shape):
        return jnp.asarray(numbers.standard_normal(shape), jnp.float32)

    tokens_rope, text_rope = ropes_of((1, 3, 5), 7, config)
    conditioning = Conditioning(
        text=draw(batch, 7, config.joint_attention_dim),
        rope=tokens_rope,
        text_rope=text_rope,
        text_length=text_length,
        guidance=jnp.asarray(np.full(batch, 3.5, np.float32)) if config.guidance_embeds else None,
    )
    return draw(batch, 15, config.in_channels), jnp.full(batch, 600.0, jnp.float32), conditioning


@pytest.fixture(scope="module")
def model():
    return load_golden("flux2_klein", ARCHITECTURE)[2]


@pytest.fixture(scope="module")
def embedded(model):
    return embed(model, *random_inputs())


@pytest.mark.parametrize("name, case", CASES)
def test_velocity_equals_diffusers(name, case):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    tokens, timestep, conditioning, grid = inputs(arrays, case, config)
    out = patches(config).unpack(velocity(model, tokens, timestep, conditioning), grid)[:, :, 0]
    assert relative_error(out, arrays[f"{case}/velocity"]) <= 1e-5


def test_bfloat16_stays_near_float32():
    arrays, config, model = load_golden("flux2_klein", ARCHITECTURE)
    tokens, timestep, conditioning, _ = inputs(arrays, "wide", config)
    reference = velocity(model, tokens, timestep, conditioning)
    out = velocity(cast(model, ARCHITECTURE, jnp.bfloat16), tokens, timestep, conditioning)
    assert out.dtype == jnp.float32
    assert relative_error(out, reference) <= 2e-2


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_one_rule_and_every_parameter_one(name):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    matches = match_keys(ARCHITECTURE, json.loads(str(arrays["keys"])))
    assert all(len(match) == 1 for match in matches.values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    rules = [rule.path for rule in KEY_RULES if config.guidance_embeds or not rule.path.startswith("guidance")]
    assert sorted(rules) == sorted(paths)


def test_constructor_and_rules_keep_the_same_parameters_in_float32():
    config = KLEIN.model_copy(update={"guidance_embeds": True})
    model = nnx.eval_shape(lambda: Flux2Transformer(config, nnx.Rngs(0), dtype=jnp.bfloat16))
    kept = {rule.path for rule in KEY_RULES if rule.keep_float32}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        assert (parameter.dtype == jnp.float32) == (".".join(map(str, path)) in kept), path


@pytest.mark.parametrize("numbers, blocks, billions", [(REAL_KLEIN, 25, 3.88), ({}, 56, 32.2)])
def test_size_of_the_real_models(numbers, blocks, billions):
    model = nnx.eval_shape(lambda: Flux2Transformer(Flux2Config(**numbers), nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert model.num_blocks == blocks
    assert count / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("cuts", [(2,), (1, 4)])
def test_split_blocks_equal_all_blocks(model, embedded, cuts):
    hidden, context = embedded
    whole = run_blocks(model, hidden, context)
    for lo, hi in zip((0, *cuts), (*cuts, 5), strict=True):
        before, hidden = hidden, run_blocks(model, hidden, context, lo, hi)
        assert min(relative_error(*pair) for pair in zip(hidden, before, strict=True)) > 0.01
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), hidden, whole)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_no_blocks_change_nothing(model, embedded, at):
    jax.tree.map(np.testing.assert_array_equal, model.run_blocks(*embedded, attend, at, at), embedded[0])


@pytest.mark.parametrize("lo, hi, kinds", [(0, 5, 2), (1, 4, 2), (0, 2, 1), (2, 5, 1), (3, 4, 1)])
def test_blocks_are_traced_once_per_kind(model, embedded, lo, hi, kinds):
    calls = []

    def counting(q, k, v, **kwargs):
        calls.append((q.shape[1], k.shape[1]))
        return xla_attention(q, k, v, **kwargs)

    hidden, context = embedded
    jax.make_jaxpr(lambda hidden: model.run_blocks(hidden, context, LocalAttend(counting), lo, hi))(hidden)
    assert calls == [(22, 22)] * kinds


def test_a_part_of_the_blocks_does_not_copy_the_weights(model, embedded):
    hidden, context = embedded
    jaxpr = jax.make_jaxpr(lambda model, hidden: model.run_blocks(hidden, context, attend, 1, 4))(model, hidden)
    stacked = {leaf.shape for part in (model.double_blocks, model.single_blocks) for leaf in jax.tree.leaves(nnx.state(part))}
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == 2
    others = [eqn for eqn in jaxpr.eqns if eqn.primitive.name != "scan"]
    assert not any(var.aval.shape in stacked for eqn in others for var in eqn.invars)


def test_scalar_timestep_serves_the_whole_batch(model, embedded):
    tokens, timestep, conditioning = random_inputs()
    scalar = embed(model, tokens, timestep[0], conditioning)
    for leaf, expected in zip(jax.tree.leaves(scalar), jax.tree.leaves(embedded), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    _, other = embed(model, tokens, timestep - 1, conditioning)
    assert relative_error(model.time_embedding(other), model.time_embedding(embedded[1])) > 1e-5


def test_conditioning_of_batch_1_serves_the_whole_batch():
    _, config, model = load_golden("flux2_guided", ARCHITECTURE)
    tokens, timestep, conditioning = random_inputs(config, text_length=jnp.array([4, 4], jnp.int32))
    one = jax.tree.map(lambda leaf: leaf[:1], conditioning)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), one)
    hidden, context = embed(model, tokens, timestep, one)
    hidden_of_both, context_of_both = embed(model, tokens, timestep, repeated)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, hidden, hidden_of_both)
    for field in ("temb", "image", "text", "single", "text_length"):
        close(getattr(context, field), getattr(context_of_both, field))


@pytest.mark.parametrize("field", ["text", "rope", "text_rope"])
def test_all_conditioning_is_heard(model, field):
    tokens, timestep, conditioning = random_inputs()
    value = jax.tree.map(lambda leaf: 0.9 * leaf, getattr(conditioning, field))
    changed = dataclasses.replace(conditioning, **{field: value})
    reference = velocity(model, tokens, timestep, conditioning)
    assert relative_error(velocity(model, tokens, timestep, changed), reference) > 1e-3


def test_guidance_is_heard_where_it_is_embedded():
    arrays, config, model = load_golden("flux2_guided", ARCHITECTURE)
    tokens, timestep, conditioning, _ = inputs(arrays, "tall", config)
    changed = dataclasses.replace(conditioning, guidance=conditioning.guidance + 1)
    reference = velocity(model, tokens, timestep, conditioning)
    assert relative_error(velocity(model, tokens, timestep, changed), reference) > 1e-3
    with pytest.raises(AssertionError, match="guidance"):
        model.embed(tokens, timestep, dataclasses.replace(conditioning, guidance=None))


def test_text_without_positions_is_an_error(model):
    tokens, timestep, conditioning = random_inputs()
    with pytest.raises(AssertionError, match="rope"):
        model.embed(tokens, timestep, dataclasses.replace(conditioning, text_rope=None))


def test_text_behind_its_length_does_not_count(model):
    tokens, timestep, conditioning = random_inputs(text_length=jnp.array([3, 5], jnp.int32))
    noise = conditioning.text.at[0, 3:].add(10.0)
    changed = dataclasses.replace(conditioning, text=noise)
    unmasked = dataclasses.replace(changed, text_length=None)
    reference = velocity(model, tokens, timestep, conditioning)
    np.testing.assert_array_equal(velocity(model, tokens, timestep, changed), reference)
    assert relative_error(velocity(model, tokens, timestep, unmasked), reference) > 1e-3


def test_probe_is_the_input_of_the_first_attention(model):
    def first_values(model, *args):
        hidden, context = model.embed(*args)
        block = nnx.merge(nnx.graphdef(model.double_blocks), jax.tree.map(lambda leaf: leaf[0], nnx.state(model.double_blocks)))
        seen = []

        def keep_v(q, k, v, **kwargs):
            seen.append(v)
            return q, None

        block(hidden, context, LocalAttend(keep_v))
        return seen[0][:, :15], block.image.v(model.probe(hidden, context))

    values, from_probe = jit(first_values)(model, *random_inputs())
    np.testing.assert_allclose(values.reshape(from_probe.shape), from_probe, rtol=1e-5, atol=1e-5)


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
    tokens, timestep, conditioning = random_inputs()
    hidden, context = embed(model, tokens, timestep, conditioning)
    assert hidden[0].dtype == hidden[1].dtype == jnp.bfloat16
    assert {getattr(context, field).dtype for field in ("temb", "image", "text", "single")} == {jnp.dtype(jnp.float32)}

    def matmuls(call, *args):
        found = [eqn for eqn in equations(jax.make_jaxpr(call)(*args).jaxpr) if eqn.primitive.name == "dot_general"]
        return [eqn for eqn in found if eqn.outvars[0].aval.ndim == 2]

    of_time = matmuls(model.embed, tokens, timestep, conditioning)
    assert len(of_time) == 2  # modulations are sums
    assert all(var.aval.dtype == jnp.float32 for eqn in of_time for var in (*eqn.invars, *eqn.outvars))
    assert all(eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in of_time)
    assert not matmuls(model.head, hidden, context)

    def run(hidden, context):
        return model.run_blocks(hidden, context, attend, 0, 5)

    blocks = list(equations(jax.make_jaxpr(run)(hidden, context).jaxpr))
    norms = [eqn for eqn in blocks if eqn.primitive.name == "rsqrt"]
    assert len(norms) == 8 + 3  # four layer norms, four of queries and keys; one and two, of both streams as one
    sums = [eqn for eqn in blocks if eqn.primitive.name == "reduce_sum"]
    activations = [eqn for eqn in blocks if eqn.primitive.name == "logistic"]
    assert len(activations) == 3
    assert all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in norms + sums + activations)
    linears = [eqn for eqn in blocks if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.ndim == 2]
    assert len(linears) == 2 * 6 + 3  # of each stream: q, k, v, out, two; of both as one: one in, and two out, added
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in linears for var in (*eqn.invars, *eqn.outvars))


def test_rope_tables_of_the_real_head_give_four_axes_32_each():
    (cos, sin), (text_cos, text_sin) = rope(Flux2Config(), (1, 3, 4), 512, 20)
    assert cos.shape == sin.shape == (12, 64) and text_cos.shape == text_sin.shape == (512, 64)
    assert {table.dtype for table in (cos, sin, text_cos, text_sin)} == {np.dtype(np.float32)}
    token = 2 * 4 + 3
    np.testing.assert_allclose(cos[token, 16 + 1], np.cos(2 * 2000 ** (-2 / 32)), rtol=1e-6)
    np.testing.assert_allclose(sin[token, 32], np.sin(3.0), rtol=1e-6)
    np.testing.assert_allclose(text_sin[511, 48 + 5], np.sin(511 * 2000 ** (-10 / 32)), rtol=1e-6)
    for still in (sin[:, :16], sin[:, 48:], text_sin[:, :48]):
        assert not np.any(still)


def test_fresh_model_says_zero_and_hears_the_text():
    fresh = jit(lambda: Flux2Transformer(KLEIN, nnx.Rngs(jax.random.key(0, impl="rbg"))))()
    tokens, timestep, conditioning = random_inputs()
    assert not np.any(velocity(fresh, tokens, timestep, conditioning))
    hidden, context = embed(fresh, tokens, timestep, conditioning)
    other, _ = embed(fresh, tokens, timestep, dataclasses.replace(conditioning, text=-conditioning.text))
    assert relative_error(run_blocks(fresh, other, context)[0], run_blocks(fresh, hidden, context)[0]) > 1e-4
    kernels = fresh.double_blocks.image.q.kernel
    assert relative_error(kernels[0], kernels[1]) > 0.1


@pytest.mark.parametrize(
    "field, value",
    [
        ("patch_size", 2),
        ("in_channels", 130),
        ("out_channels", 32),
        ("timestep_guidance_channels", 255),
        ("axes_dims_rope", (32, 32, 32, 16)),
        ("axes_dims_rope", (31, 33, 32, 32)),
        ("attention_head_dim", 64),
    ],
)
def test_other_architectures_are_refused(field, value):
    with pytest.raises(InvalidConfig, match="axes_dims_rope" if field == "attention_head_dim" else field):
        Flux2Config.model_validate({"_class_name": "Flux2Transformer2DModel", field: value})


def test_unknown_fields_are_refused_and_private_ones_dropped():
    config = {"_diffusers_version": "0.37.0", "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "out_channels": 128}
    assert Flux2Config.model_validate(config) == Flux2Config(out_channels=128)
    with pytest.raises(ValidationError, match="pooled_projection_dim"):
        Flux2Config.model_validate({"pooled_projection_dim": 768})
