"""The Qwen-Image transformer against diffusers (golden/make_qwen_image.py), the loop's seams, and training from scratch."""

import dataclasses
import json
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
from smartdiff_jax.models.family import Conditioning, Denoiser
from smartdiff_jax.models.qwen_image import ARCHITECTURE, KEY_RULES, QwenImageConfig, QwenImageTransformer, patches, rope
from smartdiff_jax.sharding.context_parallel import LocalAttend

CASES = [
    ("qwen_image_wide", "padded"),
    ("qwen_image_wide", "unpadded"),
    ("qwen_image_narrow", "padded"),
    ("qwen_image_narrow", "frames"),
]
TINY = QwenImageConfig(
    num_attention_heads=2, attention_head_dim=8, in_channels=16, out_channels=4, joint_attention_dim=6, num_layers=3,
    axes_dims_rope=(2, 2, 4),
)  # fmt: skip
GRID = (1, 2, 3)
attend = LocalAttend(xla_attention)


def condition(config, grid, text, text_length=None):
    tables = rope(config, grid, text.shape[1], text.shape[1])
    tokens_rope, text_rope = (tuple(jnp.asarray(table)[None] for table in pair) for pair in tables)
    return Conditioning(text, tokens_rope, text_rope, text_length)


def inputs(arrays, case, config):
    """Tokens, timestep and conditioning of a golden case."""
    latents, length = jnp.asarray(arrays[f"{case}/latents"]), arrays.get(f"{case}/text_length")
    cut = patches(config)
    text = jnp.asarray(arrays[f"{case}/text"])
    conditioning = condition(config, cut.grid(latents.shape), text, None if length is None else jnp.asarray(length))
    return cut.pack(latents), jnp.asarray(arrays[f"{case}/timestep"]), conditioning


def random_inputs(text_length=(3, 5)):
    keys = jax.random.split(jax.random.key(7), 2)
    text = jax.random.normal(keys[0], (len(text_length), 5, TINY.joint_attention_dim))
    tokens = jax.random.normal(keys[1], (2, 6, TINY.in_channels))
    return tokens, jnp.float32(600.0), condition(TINY, GRID, text, jnp.array(text_length, jnp.int32))


# Compiling is nearly all the time these tests take; without LLVM's optimisations it takes half.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

embed = jit(lambda model, *args: model.embed(*args))


@partial(jit, static_argnames=("lo", "hi"))
def run_blocks(model, hidden, context, lo=0, hi=3):
    return model.run_blocks(hidden, context, attend, lo, hi)


def forward(model, tokens, timestep, conditioning):
    hidden, context = model.embed(tokens, timestep, conditioning)
    return model.head(model.run_blocks(hidden, context, attend, 0, model.num_blocks), context)


velocity = jit(forward)
in_bfloat16 = jit(lambda model: cast(model, ARCHITECTURE, jnp.bfloat16))


@pytest.fixture(scope="module")
def model():
    """Random numbers in every parameter, the head's and the gates' too."""
    noise = np.random.default_rng(1)
    abstract = nnx.eval_shape(lambda: QwenImageTransformer(TINY, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * noise.standard_normal(leaf.shape), leaf.dtype), abstract)


@pytest.mark.parametrize("name, case", CASES)
def test_velocity_equals_diffusers(name, case):
    arrays, config, model = load_golden(name, ARCHITECTURE)
    tokens, timestep, conditioning = inputs(arrays, case, config)
    cut = patches(config)
    out = cut.unpack(velocity(model, tokens, timestep, conditioning), cut.grid(arrays[f"{case}/latents"].shape))
    assert relative_error(out, arrays[f"{case}/velocity"]) <= 1e-5


def test_bfloat16_stays_near_float32():
    arrays, config, model = load_golden("qwen_image_wide", ARCHITECTURE)
    tokens, timestep, conditioning = inputs(arrays, "padded", config)
    out = velocity(in_bfloat16(model), tokens, timestep, conditioning)
    assert out.dtype == jnp.float32
    assert relative_error(out, velocity(model, tokens, timestep, conditioning)) <= 3e-2


def test_every_key_has_one_rule_and_every_rule_one_parameter():
    arrays, _, model = load_golden("qwen_image_wide", ARCHITECTURE)
    assert all(len(matches) == 1 for matches in match_keys(ARCHITECTURE, json.loads(str(arrays["keys"]))).values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert sorted(rule.path for rule in KEY_RULES) == sorted(paths)


def test_constructor_and_rules_keep_the_same_parameters_in_float32():
    model = nnx.eval_shape(lambda: QwenImageTransformer(TINY, nnx.Rngs(0), dtype=jnp.bfloat16))
    kept = {rule.path for rule in KEY_RULES if rule.keep_float32}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        assert (parameter.dtype == jnp.float32) == (".".join(map(str, path)) in kept), path


def test_it_is_a_denoiser(model):
    assert isinstance(model, Denoiser) and model.num_blocks == 3
    _, context = embed(model, *random_inputs())
    assert model.time_embedding(context).shape == (2, 1, TINY.dim)


def test_split_blocks_equal_all_blocks(model):
    hidden, context = embed(model, *random_inputs())
    whole = run_blocks(model, hidden, context)
    parts = run_blocks(model, run_blocks(model, hidden, context, 0, 1), context, 1, 3)
    nothing = run_blocks(model, hidden, context, 2, 2)
    for stream in (0, 1):
        np.testing.assert_allclose(parts[stream], whole[stream], rtol=1e-6, atol=1e-6)
        assert relative_error(whole[stream], hidden[stream]) > 0.1
        np.testing.assert_array_equal(nothing[stream], hidden[stream])


def test_blocks_are_traced_once(model):
    calls = []

    def counting(q, k, v, **kwargs):
        calls.append((q.shape[1], k.shape[1]))
        return xla_attention(q, k, v, **kwargs)

    hidden, context = embed(model, *random_inputs())
    jax.make_jaxpr(lambda hidden: model.run_blocks(hidden, context, LocalAttend(counting), 0, 3))(hidden)
    assert calls == [(11, 11)]  # six tokens and five text states as one sequence


def test_scalar_timestep_serves_the_whole_batch(model):
    tokens, timestep, conditioning = random_inputs()
    scalar = velocity(model, tokens, timestep, conditioning)
    np.testing.assert_array_equal(scalar, velocity(model, tokens, jnp.full(2, timestep), conditioning))
    assert relative_error(velocity(model, tokens, jnp.float32(599.0), conditioning), scalar) > 1e-5


def test_conditioning_of_one_serves_the_whole_batch(model):
    tokens, timestep, one = random_inputs(text_length=(3,))
    both = dataclasses.replace(one, text=jnp.repeat(one.text, 2, 0), text_length=jnp.repeat(one.text_length, 2, 0))
    expected = velocity(model, tokens, timestep, both)
    np.testing.assert_allclose(velocity(model, tokens, timestep, one), expected, rtol=1e-5, atol=1e-6)


def test_text_behind_its_length_does_not_count(model):
    tokens, timestep, conditioning = random_inputs()
    changed = dataclasses.replace(conditioning, text=conditioning.text.at[0, 3:].add(10.0))
    unmasked = dataclasses.replace(changed, text_length=None)
    reference = velocity(model, tokens, timestep, conditioning)
    np.testing.assert_array_equal(velocity(model, tokens, timestep, changed), reference)
    assert relative_error(velocity(model, tokens, timestep, unmasked), reference) > 1e-3


def test_probe_is_the_picture_side_input_of_the_first_attention(model):
    def first_values(model, *args):
        hidden, context = model.embed(*args)
        block = nnx.merge(nnx.graphdef(model.blocks), jax.tree.map(lambda leaf: leaf[0], nnx.state(model.blocks)))
        seen = []

        def keep_v(q, k, v, **kwargs):
            seen.append(v)
            return q, None

        block(hidden, context, LocalAttend(keep_v))
        return seen[0][:, :6], block.image.v(model.probe(hidden, context))

    values, from_probe = jit(first_values)(model, *random_inputs())
    np.testing.assert_allclose(values.reshape(from_probe.shape), from_probe, rtol=1e-6, atol=1e-6)


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_time_and_norms_are_float32_in_a_bfloat16_run(model):
    model = in_bfloat16(model)
    tokens, timestep, conditioning = random_inputs()
    hidden, context = embed(model, tokens, timestep, conditioning)
    assert hidden[0].dtype == hidden[1].dtype == jnp.bfloat16 and context.time.dtype == jnp.float32

    embedding = jax.make_jaxpr(model.embed)(tokens, timestep, conditioning)
    matmuls = [eqn for eqn in equations(embedding.jaxpr) if eqn.primitive.name == "dot_general"]
    of_time = [eqn for eqn in matmuls if eqn.outvars[0].aval.ndim == 2]
    assert len(of_time) == 2
    assert all(var.aval.dtype == jnp.float32 for eqn in of_time for var in (*eqn.invars, *eqn.outvars))

    def run(hidden, context):
        return model.run_blocks(hidden, context, attend, 0, 3)

    blocks = list(equations(jax.make_jaxpr(run)(hidden, context).jaxpr))
    norms = [eqn for eqn in blocks if eqn.primitive.name == "rsqrt"]
    assert len(norms) == 8  # in each stream: two layer norms, queries and keys
    sums = [eqn for eqn in blocks if eqn.primitive.name == "reduce_sum"]
    assert all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in norms + sums)
    linears = [eqn for eqn in blocks if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.ndim == 2]
    assert len(linears) == 12 and [eqn.params["axes"] for eqn in sums].count((1,)) == 2  # modulations
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in linears for var in eqn.invars)


def test_positions_are_centred_and_text_continues_the_diagonal():
    (cos, sin), (text_cos, text_sin) = rope(QwenImageConfig(), (2, 5, 4), 3, 2)
    assert cos.shape == sin.shape == (40, 64) and text_cos.shape == text_sin.shape == (3, 64)
    assert {table.dtype for table in (cos, sin, text_cos, text_sin)} == {np.dtype(np.float32)}
    first, last = sin[0], sin[-1]  # (0, -3, -2) and (1, 1, 1); the fastest pair of each axis: 0, 8, 36
    np.testing.assert_allclose(first[[0, 8, 36]], np.sin([0.0, -3.0, -2.0]), rtol=1e-6)
    np.testing.assert_allclose(last[[0, 8, 36]], np.sin([1.0, 1.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(last[9], np.sin(10_000 ** (-2 / 56)), rtol=1e-6)
    np.testing.assert_allclose(text_sin[:, [0, 8, 36]], np.sin([[2.0] * 3, [3.0] * 3, [4.0] * 3]), rtol=1e-6)


def test_fresh_model_says_zero_and_learns_with_every_parameter():
    tokens, _, conditioning = random_inputs()
    timestep, target = jnp.array([900.0, 250.0]), jnp.roll(tokens, 1, axis=0)
    graphdef, fresh = nnx.split(jit(lambda: QwenImageTransformer(TINY, nnx.Rngs(0)))())

    def loss(state):
        return jnp.mean((forward(nnx.merge(graphdef, state), tokens, timestep, conditioning) - target) ** 2)

    @jit
    def step(state):
        value, gradient = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda x, g: x - 0.01 * jnp.sign(g), state, gradient), value

    trained, losses = fresh, []
    for _ in range(10):
        trained, value = step(trained)
        losses.append(value)
    np.testing.assert_allclose(losses[0], jnp.mean(target**2), rtol=1e-6)  # a velocity of zero
    assert losses[-1] < 0.5 * losses[0]
    for (path, before), (_, after) in zip(nnx.to_flat_state(fresh), nnx.to_flat_state(trained), strict=True):
        assert not np.array_equal(np.asarray(before[...]), np.asarray(after[...])), path


@pytest.mark.parametrize(
    "field, value",
    [
        ("zero_cond_t", True),
        ("use_additional_t_cond", True),
        ("use_layer3d_rope", True),
        ("guidance_embeds", True),
        ("axes_dims_rope", [16, 55, 57]),
        ("axes_dims_rope", [16, 56, 48]),
        ("in_channels", 16),
        ("out_channels", None),
    ],
)
def test_other_architectures_are_refused(field, value):
    refused = "in_channels" if field == "out_channels" else field
    with pytest.raises(InvalidConfig, match=refused):
        QwenImageConfig.model_validate({"_class_name": "QwenImageTransformer2DModel", field: value})


def test_the_released_configuration_is_the_default():
    released = dict(
        _class_name="QwenImageTransformer2DModel", _diffusers_version="0.34.0.dev0", attention_head_dim=128,
        axes_dims_rope=[16, 56, 56], guidance_embeds=False, in_channels=64, joint_attention_dim=3584, num_attention_heads=24,
        num_layers=60, out_channels=16, patch_size=2, pooled_projection_dim=768,
    )  # fmt: skip
    config = QwenImageConfig.model_validate(released)
    assert config == QwenImageConfig(pooled_projection_dim=768)
    latents = jnp.zeros((1, 16, 1, 166, 166))
    assert patches(config).grid(latents.shape) == (1, 83, 83)
    with pytest.raises(ValidationError, match="img_mod_rank"):
        QwenImageConfig.model_validate({"img_mod_rank": 8})
