"""The UMT5 encoder against transformers (golden/make_umt5.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import cast, load_golden, match_keys, relative_error

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.text.umt5 import (
    ARCHITECTURE,
    KEY_RULES,
    UMT5Config,
    UMT5Encoder,
    relative_position_buckets,
)


@pytest.fixture(scope="module")
def golden():
    return load_golden("umt5", ARCHITECTURE)


@jax.jit
def encode(model, input_ids, attention_mask):
    return model(input_ids, attention_mask)


def test_states_equal_transformers(golden):
    arrays, _, model = golden
    states = encode(model, jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"]))
    assert relative_error(states, arrays["states"]) <= 1e-5


def test_buckets_equal_transformers_at_the_real_size(golden):
    np.testing.assert_array_equal(relative_position_buckets(512, 32, 128), golden[0]["buckets"])


def test_bfloat16_stays_near_float32(golden):
    arrays, _, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    states = encode(cast(model, ARCHITECTURE, jnp.bfloat16), ids, mask)
    assert states.dtype == jnp.bfloat16
    assert relative_error(states, encode(model, ids, mask)) <= 2e-2


def test_padding_changes_nothing(golden):
    arrays, _, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    length = int(mask[1].sum())
    padded = encode(model, jnp.where(mask == 1, ids, 17), mask)[1, :length]
    np.testing.assert_allclose(padded, encode(model, ids[1:, :length], mask[1:, :length])[0], rtol=1e-4, atol=1e-5)
    empty = encode(model, ids, jnp.zeros_like(mask))
    assert np.all(np.isfinite(empty))


def test_every_key_has_one_rule_and_every_rule_one_parameter(golden):
    arrays, _, model = golden
    keys = [key.removeprefix("weight/") for key in arrays if key.startswith("weight/")]
    assert all(len(matches) == 1 for matches in match_keys(ARCHITECTURE, [*keys, "encoder.embed_tokens.weight"]).values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert sorted(rule.path for rule in KEY_RULES) == sorted(paths)


def test_fresh_model_is_sensible():
    config = UMT5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    model = jax.jit(lambda: UMT5Encoder(config, nnx.Rngs(0)))()
    ids = jnp.arange(1, 17, dtype=jnp.int32).reshape(2, 8)
    states = encode(model, ids, jnp.ones_like(ids))
    assert 0.8 < float(jnp.std(states)) < 1.2
    assert model.blocks.attention.relative_bias.shape == (3, 32, 4)
    assert not np.allclose(model.blocks.gate.kernel[0], model.blocks.gate.kernel[1])


@pytest.mark.parametrize(
    "field, value",
    [("feed_forward_proj", "relu"), ("model_type", "t5"), ("is_decoder", True), ("dense_act_fn", "relu")],
)
def test_other_architectures_are_refused(golden, field, value):
    config = json.loads(str(golden[0]["config"]))
    with pytest.raises(InvalidConfig, match=field):
        UMT5Config.model_validate(config | {field: value})
