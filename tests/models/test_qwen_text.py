"""The Qwen text encoders against transformers and diffusers' pipelines (golden/make_qwen_text.py)."""

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
from smartdiff_jax.models.text.qwen import QWEN3, QWEN25_VL, Qwen3Config, Qwen25VLConfig, QwenEncoder

ARCHITECTURES = {
    "qwen3_text_wide": QWEN3,
    "qwen3_text_narrow": QWEN3,
    "qwen25_text_wide": QWEN25_VL,
    "qwen25_text_narrow": QWEN25_VL,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def golden(request):
    architecture = ARCHITECTURES[request.param]
    return request.param, architecture, *load_golden(request.param, architecture)


def golden_of(*names):
    return pytest.mark.parametrize("golden", names, indirect=True)


@partial(jax.jit, static_argnums=3)
def encode(model, input_ids, attention_mask, layers):
    return model(input_ids, attention_mask, layers)


def inputs(arrays):
    return arrays["input_ids"], arrays["attention_mask"]


@pytest.fixture(scope="module")
def states(golden):
    """Every hidden state [layers, b, l, d]."""
    _, _, arrays, _, model = golden
    layers = tuple(range(len(arrays["states"])))
    out = np.asarray(encode(model, *inputs(arrays), layers))
    return np.moveaxis(out.reshape(*out.shape[:2], len(layers), -1), 2, 0)


def test_all_hidden_states_equal_transformers(golden, states):
    """Padded positions too: FLUX.2's transformer reads them."""
    for ours, theirs in zip(states, golden[2]["states"], strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_what_the_pipelines_take(golden, states):
    """FLUX.2 sets several layers side by side and keeps the padding; the others take one layer of the prompt's own tokens."""
    name, _, arrays, _, model = golden
    for row, length in enumerate(arrays["attention_mask"].sum(axis=1)):
        if name == "qwen3_text_wide":
            ours = encode(model, *inputs(arrays), (3, 1, 4))[row]
        else:
            layer, skip = (-2, 0) if name == "qwen3_text_narrow" else (-1, 3)
            ours = states[layer, row, skip:length]
        assert relative_error(ours, arrays[f"embeds_{row}"]) <= 1e-5


@golden_of("qwen25_text_narrow")
def test_positions_of_a_long_prompt(golden):
    _, _, arrays, _, model = golden
    ids = arrays["long/input_ids"]
    assert relative_error(encode(model, ids, np.ones_like(ids), (-1,)), arrays["long/states"]) <= 1e-5


@golden_of("qwen3_text_narrow", "qwen25_text_wide")
def test_bfloat16_stays_near_float32(golden):
    _, architecture, arrays, _, model = golden
    encode = jax.jit(lambda model, ids, mask: cast(model, architecture, jnp.bfloat16)(ids, mask, (-1,)))
    states = encode(model, *inputs(arrays))
    assert states.dtype == jnp.bfloat16
    assert relative_error(states, arrays["states"][-1]) <= 2e-2


@golden_of("qwen3_text_wide", "qwen25_text_narrow")
def test_padding_changes_nothing_before_it(golden):
    _, _, arrays, _, model = golden
    ids, mask = inputs(arrays)
    states = np.asarray(encode(model, np.where(mask == 1, ids, np.int32(11)), mask, (-2,)))
    real = mask == 1
    assert relative_error(states[real], arrays["states"][-2][real]) <= 1e-5
    assert relative_error(states[~real], arrays["states"][-2][~real]) > 1e-2


@golden_of("qwen3_text_wide")
def test_blocks_behind_the_last_layer_are_not_run(golden):
    _, _, arrays, _, model = golden
    graphdef, state = nnx.split(model)
    broken = jax.tree.map(
        lambda leaf: np.concatenate([np.asarray(leaf)[:2], np.full_like(np.asarray(leaf)[2:], np.nan)]), state["blocks"]
    )
    model = nnx.merge(graphdef, nnx.merge_state(state, nnx.State({"blocks": broken})))
    states = encode(model, *inputs(arrays), (2,))
    assert relative_error(states, arrays["states"][2]) <= 1e-5


@pytest.mark.parametrize("layer", [6, -7, 27])
def test_a_layer_the_model_does_not_have_is_refused(layer):
    model = nnx.eval_shape(lambda: QwenEncoder(Qwen3Config.model_validate(SMALL), nnx.Rngs(0)))
    ids = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(InvalidConfig, match=f"layers={layer}"):
        model(ids, ids, (1, layer))


def test_every_key_has_one_rule_and_every_rule_one_parameter(golden):
    """As transformers names them in memory, in the files it writes, and as older files have them."""
    _, architecture, arrays, _, model = golden
    keys = [*json.loads(str(arrays["keys"])), *json.loads(str(arrays["saved_keys"]))]
    bare = [re.sub(r"^model\.(language_model\.)?", "", key) for key in keys]
    text = [key for key in bare if not re.match(r"visual\.|lm_head\.", key)]
    keys += [prefix + key for key in text for prefix in ("", "model.", "language_model.", "model.language_model.")]
    for key, matches in match_keys(architecture, [*keys, *bare]).items():
        assert len(matches) + bool(re.fullmatch(architecture.ignored_keys, key)) == 1, key
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert sorted(rule.path for rule in architecture.key_rules) == sorted(paths)


SMALL = dict(
    vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, rope_theta=1e6,
)  # fmt: skip


def test_configs_of_every_age_say_the_same():
    mrope = {"mrope_section": [1, 1, 2]}
    flat = Qwen25VLConfig.model_validate(SMALL | {"model_type": "qwen2_5_vl", "rope_scaling": mrope | {"type": "mrope"}})
    assert (flat.head_dim, flat.rope_theta) == (8, 1e6)
    text = {key: value for key, value in SMALL.items() if key != "rope_theta"} | {"model_type": "qwen2_5_vl_text"}
    rotary = mrope | {"rope_theta": 1e6, "rope_type": "default", "type": "mrope"}
    nested = {"model_type": "qwen2_5_vl", "text_config": text | {"rope_parameters": rotary}, "vision_config": {"depth": 1}}
    same = {"model_type": "", "rope_type": ""}
    assert Qwen25VLConfig.model_validate(nested).model_dump() | same == flat.model_dump() | same

    old = Qwen3Config.model_validate(SMALL | {"rope_scaling": None, "sliding_window": 4096, "use_sliding_window": False})
    new = {key: value for key, value in SMALL.items() if key != "rope_theta"}
    new |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert Qwen3Config.model_validate(new) == old
    assert old.head_dim == 128
    with pytest.raises(ValidationError, match="rope_theta"):
        Qwen3Config.model_validate(new | {"rope_parameters": None})


@pytest.mark.parametrize("config", [Qwen3Config, Qwen25VLConfig])
@pytest.mark.parametrize(
    "field, wrong",
    [
        ("model_type", {"model_type": "qwen2"}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("use_sliding_window", {"use_sliding_window": True}),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 7}),
    ],
)
def test_other_models_are_refused(config, field, wrong):
    with pytest.raises(InvalidConfig, match=field):
        config.model_validate(SMALL | wrong)


def test_fresh_model_is_sensible():
    config = Qwen3Config.model_validate(SMALL | {"head_dim": 6})
    ids = np.arange(1, 17, dtype=np.int32).reshape(2, 8)

    @jax.jit
    def fresh():
        model = QwenEncoder(config, nnx.Rngs(0))
        return model(jnp.asarray(ids), jnp.ones_like(ids), (-1,)), model.blocks.gate.kernel[...]

    states, kernel = map(np.asarray, fresh())
    assert 0.8 < np.std(states) < 1.2
    assert kernel.shape == (5, 32, 48)
    assert not np.allclose(kernel[0], kernel[1])
