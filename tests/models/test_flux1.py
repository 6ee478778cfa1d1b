"""The FLUX.1 transformer against diffusers (golden/make_flux1.py), and the seams that the loop and the caches use."""

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
from smartdiff_jax.models.flux1 import ARCHITECTURE, KEY_RULES, Flux1Config, Flux1Transformer, patches, rope
from smartdiff_jax.sharding.context_parallel import LocalAttend

# Guidance scales of 3.5 and 7.25 are sinusoids of 3500 and 7250 radians: both sides compute the angles in float32, and both
# are 5e-5 off the exact ones. With the reference's sinusoids the error is 5e-7.
CASES = [
    ("flux1_guided", "wide", 6e-5),
    ("flux1_guided", "column", 1e-5),
    ("flux1_plain", "tall", 1e-5),
    ("flux1_plain", "wide", 1e-5),
]
GUIDED = load_golden("flux1_guided", ARCHITECTURE)[1]

attend = LocalAttend(xla_attention)
# Compiling is nearly all the time these tests take.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rope_of(grid, config):
    table, text_table = rope(config, grid, 5, 3)
    assert text_table is None
    return tuple(jnp.asarray(part)[None] for part in table)


def inputs(arrays, case, config):
    """Tokens, timestep, conditioning and grid of a golden case."""
    latents = jnp.asarray(arrays[f"{case}/latents"])[:, :, None]
    grid = patches(config).grid(latents.shape)
    conditioning = Conditioning(
        text=jnp.asarray(arrays[f"{case}/text"]),
        rope=rope_of(grid, config),
        pooled=jnp.asarray(arrays[f"{case}/pooled"]),
        guidance=jnp.asarray(arrays[f"{case}/guidance"]) if config.guidance_embeds else None,
    )
    return patches(config).pack(latents), jnp.asarray(arrays[f"{case}/timestep"]), conditioning, grid


embed = jit(lambda model, *args: model.embed(*args))


@partial(jit, static_argnames=("lo", "hi"))
def run_blocks(model, hidden, context, lo=0, hi=5):
    return model.run_blocks(hidden, context, attend, lo, hi)


@jit
def velocity(model, tokens, timestep, conditioning):
    hidden, context = model.embed(tokens, timestep, conditioning)
    return model.head(model.run_blocks(hidden, context, attend, 0, model.num_blocks), context)


def random_inputs(text_length=None):
    """Two pictures of 15 tokens and their texts of 7, the shapes of the golden cases."""
    config, batch, numbers = GUIDED, 2, np.random.default_rng(7)

    def draw(*shape):
        return jnp.asarray(numbers.standard_normal(shape), jnp.float32)

    conditioning = Conditioning(
        text=draw(batch, 7, config.joint_attention_dim),
        rope=rope_of((1, 3, 5), config),
        text_length=text_length,
        pooled=draw(batch, config.pooled_projection_dim),
        guidance=jnp.asarray(np.full(batch, 3.5, np.float32)),
    )
    return draw(batch, 15, config.in_channels), jnp.float32(600.0), conditioning


@pytest.fixture(scope="module")
def model():
    return load_golden("flux1_guided", ARCHITECTURE)[2]


@pytest.fixture(scope="module")
def embedded(model):
    return embed(model, *random_inputs())


@pytest.mark.parametrize("name, case, tolerance", CASES)
def test_velocity_equals_diffusers(name, case, tolerance):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    tokens, timestep, conditioning, grid = inputs(arrays, case, config)
    out = patches(config).unpack(velocity(model, tokens, timestep, conditioning), grid)[:, :, 0]
    assert relative_error(out, arrays[f"{case}/velocity"]) <= tolerance


def test_bfloat16_stays_near_float32():
    arrays, config, model = load_golden("flux1_guided", ARCHITECTURE)
    tokens, timestep, conditioning, _ = inputs(arrays, "wide", config)
    reference = velocity(model, tokens, timestep, conditioning)
    out = velocity(cast(model, ARCHITECTURE, jnp.bfloat16), tokens, timestep, conditioning)
    assert out.dtype == jnp.float32
    assert relative_error(out, reference) <= 2e-2


@pytest.mark.parametrize("name", ["flux1_guided", "flux1_plain"])
def test_every_key_has_one_rule_and_every_parameter_one(name):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    matches = match_keys(ARCHITECTURE, json.loads(str(arrays["keys"])))
    assert all(len(match) == 1 for match in matches.values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    rules = [rule.path for rule in KEY_RULES if config.guidance_embeds or not rule.path.startswith("guidance")]
    assert sorted(rules) == sorted(paths)


def test_constructor_and_rules_keep_the_same_parameters_in_float32():
    model = nnx.eval_shape(lambda: Flux1Transformer(GUIDED, nnx.Rngs(0), dtype=jnp.bfloat16))
    kept = {rule.path for rule in KEY_RULES if rule.keep_float32}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        assert (parameter.dtype == jnp.float32) == (".".join(map(str, path)) in kept), path


@pytest.mark.parametrize("guidance_embeds, count", [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_size_of_the_real_models(guidance_embeds, count):
    config = Flux1Config(guidance_embeds=guidance_embeds)
    model = nnx.eval_shape(lambda: Flux1Transformer(config, nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model))) == count
    assert model.num_blocks == 57


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
    by_item = embed(model, tokens, jnp.full(2, timestep), conditioning)
    for leaf, expected in zip(jax.tree.leaves(by_item), jax.tree.leaves(embedded), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    _, other = embed(model, tokens, jnp.float32(599.0), conditioning)
    assert relative_error(model.time_embedding(other), model.time_embedding(embedded[1])) > 1e-5


def test_conditioning_of_batch_1_serves_the_whole_batch(model):
    tokens, timestep, conditioning = random_inputs(text_length=jnp.array([4, 4], jnp.int32))
    one = jax.tree.map(lambda leaf: leaf[:1], conditioning)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), one)
    hidden, context = embed(model, tokens, timestep, one)
    hidden_of_both, context_of_both = embed(model, tokens, timestep, repeated)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, hidden, hidden_of_both)
    close(context.temb, context_of_both.temb)
    np.testing.assert_array_equal(context.text_length, context_of_both.text_length)


@pytest.mark.parametrize("field", ["text", "pooled", "guidance", "rope"])
def test_all_conditioning_is_heard(model, field):
    tokens, timestep, conditioning = random_inputs()
    value = jax.tree.map(lambda leaf: 0.9 * leaf, getattr(conditioning, field))
    changed = dataclasses.replace(conditioning, **{field: value})
    reference = velocity(model, tokens, timestep, conditioning)
    assert relative_error(velocity(model, tokens, timestep, changed), reference) > 1e-3


@pytest.mark.parametrize("field", ["pooled", "guidance"])
def test_missing_conditioning_is_an_error(model, field):
    tokens, timestep, conditioning = random_inputs()
    with pytest.raises(AssertionError, match=field):
        model.embed(tokens, timestep, dataclasses.replace(conditioning, **{field: None}))


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
        return seen[0][:, :15], block.image.qkv.v(model.probe(hidden, context))

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
    assert context.temb.dtype == jnp.float32

    embedding = jax.make_jaxpr(model.embed)(tokens, timestep, conditioning)
    matmuls = [eqn for eqn in equations(embedding.jaxpr) if eqn.primitive.name == "dot_general"]
    of_vectors = [{var.aval.dtype for var in (*eqn.invars, *eqn.outvars)} for eqn in matmuls if eqn.outvars[0].aval.ndim == 2]
    # Two for the timestep, two for the guidance; the pooled prompt's two are like any other.
    assert of_vectors == [{jnp.dtype(jnp.float32)}] * 4 + [{jnp.dtype(jnp.bfloat16)}] * 2

    def run(hidden, context):
        return model.run_blocks(hidden, context, attend, 0, 5)

    blocks = list(equations(jax.make_jaxpr(run)(hidden, context).jaxpr))
    norms = [eqn for eqn in blocks if eqn.primitive.name == "rsqrt"]
    assert len(norms) == 8 + 3  # four layer norms, four of queries and keys; one and two, of both streams as one
    sums = [eqn for eqn in blocks if eqn.primitive.name == "reduce_sum"]
    assert all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in norms + sums)
    linears = [eqn for eqn in blocks if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.ndim == 2]
    assert len(linears) == 12 + 6  # of each stream: q, k, v, out, two; six of both as one, two of them of the output's
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in linears for var in eqn.invars)
    assert [eqn.params["axes"] for eqn in sums].count((1,)) == 3  # modulations


def test_rope_table_of_the_real_head_splits_16_56_56():
    (cos, sin), text = rope(Flux1Config(), (1, 3, 4), 512, 20)
    assert cos.shape == sin.shape == (12, 64) and cos.dtype == np.float32 and text is None
    assert np.all(cos[:, :8] == 1) and not np.any(sin[:, :8])  # one frame
    token = 2 * 4 + 3
    np.testing.assert_allclose(cos[token, 8 + 1], np.cos(2 * 10_000 ** (-2 / 56)), rtol=1e-6)
    np.testing.assert_allclose(sin[token, 36], np.sin(3.0), rtol=1e-6)


def test_fresh_model_says_zero_and_hears_the_text():
    fresh = jit(lambda: Flux1Transformer(GUIDED, nnx.Rngs(jax.random.key(0, impl="rbg"))))()
    tokens, timestep, conditioning = random_inputs()
    assert not np.any(velocity(fresh, tokens, timestep, conditioning))
    hidden, context = embed(fresh, tokens, timestep, conditioning)
    other, _ = embed(fresh, tokens, timestep, dataclasses.replace(conditioning, text=-conditioning.text))
    assert relative_error(run_blocks(fresh, other, context)[0], run_blocks(fresh, hidden, context)[0]) > 1e-4
    kernels = fresh.double_blocks.image.qkv.q.kernel
    assert relative_error(kernels[0], kernels[1]) > 0.1


@pytest.mark.parametrize(
    "field, value",
    [
        ("patch_size", 2),
        ("in_channels", 66),
        ("out_channels", 16),
        ("axes_dims_rope", (16, 56, 48)),
        ("axes_dims_rope", (17, 55, 56)),
        ("attention_head_dim", 64),
    ],
)
def test_other_architectures_are_refused(field, value):
    with pytest.raises(InvalidConfig, match=field):
        Flux1Config.model_validate({"_class_name": "FluxTransformer2DModel", field: value})


def test_unknown_fields_are_refused_and_private_ones_dropped():
    config = {"_diffusers_version": "0.30.0", "axes_dims_rope": [16, 56, 56], "out_channels": 64}
    assert Flux1Config.model_validate(config) == Flux1Config(out_channels=64)
    with pytest.raises(ValidationError, match="pos_embed_max_size"):
        Flux1Config.model_validate({"pos_embed_max_size": 192})
