"""The Z-Image transformer against diffusers (golden/make_z_image.py), and the seams that the loop and the caches use."""

import dataclasses
import json
import re
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
from smartdiff_jax.models.z_image import ARCHITECTURE, KEY_RULES, ZImageConfig, ZImageTransformer, patches, rope
from smartdiff_jax.sharding.context_parallel import LocalAttend

NARROW, WIDE = NAMES = ("z_image_narrow", "z_image_wide")
CASES = [(NARROW, "filled"), (NARROW, "whole"), (WIDE, "filled"), (WIDE, "frames")]
GRID, LENGTHS = (1, 3, 5), (40, 5)  # of the narrow golden's "filled"
ALL = 5  # its blocks: two refiners, three single-stream
attend = LocalAttend(xla_attention)
# Compiling takes most of the time here, and this halves it.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def condition(config, grid, text, lengths):
    """Each row's own tables, as each branch of guidance has its own."""
    tables = [rope(config, grid, text.shape[1], length) for length in lengths]
    tokens_rope, text_rope = (
        tuple(jnp.stack([jnp.asarray(pair[which]) for pair in pairs]) for which in (0, 1))
        for pairs in zip(*tables, strict=True)
    )
    return Conditioning(text, tokens_rope, text_rope, jnp.array(lengths, jnp.int32))


def inputs(golden, name, case):
    """Tokens, timestep and conditioning of a golden case."""
    arrays, config, _ = golden[name]
    latents, text = jnp.asarray(arrays[f"{case}/latents"]), jnp.asarray(arrays[f"{case}/text"])
    cut = patches(config)
    conditioning = condition(config, cut.grid(latents.shape), text, arrays[f"{case}/text_length"].tolist())
    return cut.pack(latents), jnp.asarray(arrays[f"{case}/timestep"]), conditioning


embed = jit(lambda model, *args: model.embed(*args))


@partial(jit, static_argnames=("lo", "hi"))
def run_blocks(model, hidden, context, lo, hi):
    return model.run_blocks(hidden, context, attend, lo, hi)


@jit
def velocity(model, tokens, timestep, conditioning):
    hidden, context = model.embed(tokens, timestep, conditioning)
    return model.head(model.run_blocks(hidden, context, attend, 0, model.num_blocks), context)


@pytest.fixture(scope="module")
def golden():
    return {name: load_golden(name, ARCHITECTURE) for name in NAMES}


# The seams are tested at the shapes of a golden case, so that few executables serve all tests.
@pytest.fixture(scope="module")
def model(golden):
    return golden[NARROW][2]


@pytest.fixture(scope="module")
def filled(golden):
    return inputs(golden, NARROW, "filled")


@pytest.mark.parametrize("name, case", CASES)
def test_velocity_equals_diffusers(golden, name, case):
    arrays, config, model = golden[name]
    cut = patches(config)
    out = cut.unpack(velocity(model, *inputs(golden, name, case)), cut.grid(arrays[f"{case}/latents"].shape))
    assert relative_error(out, arrays[f"{case}/velocity"]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(golden, name):
    model, args = golden[name][2], inputs(golden, name, "filled")
    out = velocity(cast(model, ARCHITECTURE, jnp.bfloat16), *args)
    assert out.dtype == jnp.float32
    assert relative_error(out, velocity(model, *args)) <= 3e-2


def test_every_key_has_one_rule_and_every_rule_one_parameter(golden):
    for name, unused in ((NARROW, set()), (WIDE, {"4-1"})):
        arrays, _, model = golden[name]
        keys = json.loads(str(arrays["keys"]))
        ignored = {key for key in keys if re.fullmatch(ARCHITECTURE.ignored_keys, key)}
        assert all(len(matches) == (key not in ignored) for key, matches in match_keys(ARCHITECTURE, keys).items())
        assert {key.split(".")[1] for key in ignored} == unused
        paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
        assert sorted(rule.path for rule in KEY_RULES) == sorted(paths)


def test_constructor_and_rules_keep_the_same_parameters_in_float32(golden):
    model = nnx.eval_shape(lambda: ZImageTransformer(golden[NARROW][1], nnx.Rngs(0), dtype=jnp.bfloat16))
    kept = {rule.path for rule in KEY_RULES if rule.keep_float32}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        assert (parameter.dtype == jnp.float32) == (".".join(map(str, path)) in kept), path


def test_it_is_a_denoiser(model):
    assert isinstance(model, Denoiser) and model.num_blocks == ALL


def test_split_blocks_equal_all_blocks(model, filled):
    hidden, context = embed(model, *filled)
    for lo, hi in ((0, 1), (1, 4), (4, 5)):
        before, hidden = hidden, run_blocks(model, hidden, context, lo, hi)
        assert min(map(relative_error, hidden, before)) > 0.1
    np.testing.assert_allclose(model.head(hidden, context), velocity(model, *filled), rtol=1e-5, atol=1e-5)


def test_no_blocks_change_nothing(model, filled):
    hidden, context = embed(model, *filled)
    for at in (0, 1, 2, 4, 5):
        assert model.run_blocks(hidden, context, attend, at, at) is hidden


@pytest.mark.parametrize("case, tokens", [("filled", 15), ("whole", 96)])
def test_blocks_are_traced_once_per_kind(golden, model, case, tokens):
    calls = []

    def counting(q, k, v, **kwargs):
        calls.append((q.shape[1], k.shape[1]))
        return xla_attention(q, k, v, **kwargs)

    args = inputs(golden, NARROW, case)
    hidden, context = embed(model, *args)
    jax.make_jaxpr(lambda *args: model.run_blocks(*args, LocalAttend(counting), 0, ALL))(hidden, context)
    picture, caption = tokens + -tokens % 32, args[2].text.shape[1]
    assert hidden[0].shape[1] == tokens
    assert calls == [(picture, picture), (caption, caption), (picture + caption, picture + caption)]


def test_a_part_of_the_blocks_does_not_copy_the_weights(model, filled):
    hidden, context = embed(model, *filled)
    run = jax.make_jaxpr(lambda model, *args: model.run_blocks(*args, attend, 1, 4))(model, hidden, context)
    stacked = {leaf.shape for part in (model.refiners, model.blocks) for leaf in jax.tree.leaves(nnx.state(part))}
    assert [eqn.primitive.name for eqn in run.eqns].count("scan") == 2
    others = [eqn for eqn in run.eqns if eqn.primitive.name != "scan"]
    assert not any(var.aval.shape in stacked for eqn in others for var in eqn.invars)


def test_scalar_timestep_serves_the_whole_batch(model, filled):
    tokens, _, conditioning = filled
    scalar, both = (embed(model, tokens, time, conditioning)[1].time for time in (jnp.float32(600), jnp.full(2, 600.0)))
    np.testing.assert_array_equal(scalar, both)
    assert relative_error(embed(model, tokens, jnp.float32(599), conditioning)[1].time, scalar) > 1e-5


def test_conditioning_of_one_serves_the_whole_batch(model, filled):
    tokens, timestep, both = filled
    one = jax.tree.map(lambda leaf: leaf[:1], both)
    both = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), one)
    expected = velocity(model, tokens, timestep, both)
    np.testing.assert_allclose(velocity(model, tokens, timestep, one), expected, rtol=1e-5, atol=1e-5)


def test_text_behind_its_length_does_not_count(model, filled):
    tokens, timestep, conditioning = filled
    reference = velocity(model, tokens, timestep, conditioning)
    text = conditioning.text
    behind = dataclasses.replace(conditioning, text=text.at[0, 40:].add(10.0).at[1, 5:].add(10.0))
    np.testing.assert_array_equal(velocity(model, tokens, timestep, behind), reference)
    before = dataclasses.replace(conditioning, text=text.at[0, 39].add(10.0).at[1, 4].add(10.0))
    changed = velocity(model, tokens, timestep, before)
    assert min(relative_error(changed[row], reference[row]) for row in (0, 1)) > 1e-3


def test_padding_behind_a_multiple_of_32_does_not_matter(golden, model, filled):
    tokens, timestep, conditioning = filled
    config, text = golden[NARROW][1], conditioning.text
    expected = velocity(model, tokens, timestep, condition(config, GRID, text, (32, 32)))
    full = dataclasses.replace(condition(config, GRID, text[:, :32], (32, 32)), text_length=None)
    np.testing.assert_allclose(velocity(model, tokens, timestep, full), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["image_filling", "text_filling"])
def test_filling_counts_where_there_is_any(golden, model, filled, name):
    graphdef, state = nnx.split(model)
    parameters = dict(nnx.to_flat_state(state))
    parameters[(name,)] = parameters[(name,)].replace(parameters[(name,)][...][::-1] + 0.5)
    other = nnx.merge(graphdef, nnx.from_flat_state(parameters))
    assert relative_error(velocity(other, *filled), velocity(model, *filled)) > 1e-3
    tokens, timestep, conditioning = inputs(golden, NARROW, "whole")  # 96 tokens
    full = dataclasses.replace(conditioning, text_length=jnp.array([64, 64], jnp.int32))
    np.testing.assert_array_equal(velocity(other, tokens, timestep, full), velocity(model, tokens, timestep, full))


def test_text_of_another_length_is_refused(golden, model, filled):
    tokens, timestep, conditioning = filled
    short = condition(golden[NARROW][1], GRID, conditioning.text[:, :40], LENGTHS)
    with pytest.raises(AssertionError, match="multiple of 32, not to 40"):
        jax.eval_shape(model.embed, tokens, timestep, short)


def test_probe_is_the_picture_side_input_of_the_first_attention(model, filled):
    def first_values(model, *args):
        hidden, context = model.embed(*args)
        refiner = nnx.merge(nnx.graphdef(model.refiners), jax.tree.map(lambda leaf: leaf[0], nnx.state(model.refiners)))
        seen = []

        def keep_v(q, k, v, **kwargs):
            seen.append(v)
            return q, None

        refiner(hidden, context, LocalAttend(keep_v))
        return seen[0][:, :15], refiner.image.v(model.probe(hidden, context))

    values, from_probe = jit(first_values)(model, *filled)
    np.testing.assert_allclose(values.reshape(from_probe.shape), from_probe, rtol=1e-5, atol=1e-6)


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_time_modulation_and_norms_are_float32_in_a_bfloat16_run(model, filled):
    model = cast(model, ARCHITECTURE, jnp.bfloat16)
    hidden, context = embed(model, *filled)
    assert hidden[0].dtype == hidden[1].dtype == jnp.bfloat16
    assert context.time.dtype == jnp.float32 and model.time_embedding(context).shape == (2, 1, 28)

    def run(tokens, timestep, conditioning):
        hidden, context = model.embed(tokens, timestep, conditioning)
        return model.head(model.run_blocks(hidden, context, attend, 0, ALL), context)

    everything = list(equations(jax.make_jaxpr(run)(*filled).jaxpr))
    norms = [eqn for eqn in everything if eqn.primitive.name == "rsqrt"]
    # Of the text, of the head, and in each block four of every stream and one of queries and keys of every stream: picture
    # and its filling, caption, and behind the refiners all of it as one.
    assert len(norms) == 2 + 2 * 6 + 6 + 6
    sums = [eqn for eqn in everything if eqn.primitive.name == "reduce_sum"]
    assert all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in norms + sums)
    linears = [eqn for eqn in everything if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.ndim == 2]
    of_time = [eqn for eqn in linears if eqn.outvars[0].aval.ndim == 2]
    assert len(of_time) == 2  # the embedder
    assert [eqn.params["axes"] for eqn in sums].count((1,)) == 3  # modulations: the picture's refiner, the block, the head
    assert all(var.aval.dtype == jnp.float32 for eqn in of_time for var in (*eqn.invars, *eqn.outvars))
    of_streams = [eqn for eqn in linears if eqn.outvars[0].aval.ndim == 3]
    assert len(of_streams) == 3 + 7 * 4
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in of_streams for var in eqn.invars)


def test_positions_go_on_behind_the_caption():
    config = ZImageConfig()
    (cos, sin), (text_cos, text_sin) = rope(config, (2, 5, 4), 64, 33)
    assert cos.shape == sin.shape == (40, 64) and text_cos.shape == text_sin.shape == (24 + 64, 64)
    assert {table.dtype for table in (cos, sin, text_cos, text_sin)} == {np.dtype(np.float32)}
    first = [0, 16, 40]  # the fastest pair of each axis
    np.testing.assert_allclose(sin[0, first], np.sin([65.0, 0.0, 0.0]), rtol=1e-6)
    np.testing.assert_allclose(sin[-1, first], np.sin([66.0, 4.0, 3.0]), rtol=1e-6)
    np.testing.assert_allclose(sin[-1, 17], np.sin(4 * 256 ** (-2 / 48)), rtol=1e-6)
    assert np.all(text_sin[:24] == 0) and np.all(text_cos[:24] == 1)  # fills the picture up to 64 tokens
    np.testing.assert_allclose(text_sin[24:, 0], np.sin(np.arange(1.0, 65.0)), rtol=1e-5)
    assert np.all(text_cos[:, 16:] == 1)
    np.testing.assert_allclose(rope(config, (1, 1, 1), 64, 32)[0][1][0, 0], np.sin(33.0), rtol=1e-6)


def test_fresh_model_says_zero_and_opens_no_gate(golden, filled):
    fresh = jit(lambda: ZImageTransformer(golden[NARROW][1], nnx.Rngs(0)))()
    hidden, context = embed(fresh, *filled)
    assert not np.any(fresh.head(hidden, context))
    assert not any(np.any(block.modulation.kernel) for block in (fresh.blocks, fresh.refiners.image))
    kernels = fresh.blocks.q.kernel
    assert relative_error(kernels[0], kernels[1]) > 0.1


@pytest.mark.parametrize(
    "field, value",
    [
        ("siglip_feat_dim", 1152),
        ("qk_norm", False),
        ("all_patch_size", [4]),
        ("all_patch_size", [1, 4]),
        ("axes_dims", [32, 47, 49]),
        ("axes_dims", [32, 48, 40]),
        ("dim", 3841),
    ],
)
def test_other_architectures_are_refused(field, value):
    with pytest.raises(InvalidConfig, match=field):
        ZImageConfig.model_validate({"_class_name": "ZImageTransformer2DModel", field: value})


def test_the_released_configuration_is_the_default():
    released = dict(
        _class_name="ZImageTransformer2DModel", _diffusers_version="0.36.0.dev0", all_f_patch_size=[1], all_patch_size=[2],
        axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], cap_feat_dim=2560, dim=3840, in_channels=16, n_heads=30,
        n_kv_heads=30, n_layers=30, n_refiner_layers=2, norm_eps=1e-05, qk_norm=True, rope_theta=256.0, t_scale=1000.0,
    )  # fmt: skip
    config = ZImageConfig.model_validate(released)
    assert config == ZImageConfig(axes_lens=(1536, 512, 512))
    assert (config.feed_forward_dim, config.time_dim) == (10240, 256)
    assert patches(config).grid((1, 16, 1, 160, 90)) == (1, 80, 45)
    with pytest.raises(ValidationError, match="siglip_layers"):
        ZImageConfig.model_validate({"siglip_layers": 2})
