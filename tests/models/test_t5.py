"""The T5 encoder against transformers (golden/make_t5.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import cast, load_golden, match_keys, relative_error

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.text.t5 import ARCHITECTURE, KEY_RULES, T5Config, T5Encoder

# text_encoder_2/config.json of FLUX.1, abridged to what decides anything.
T5_XXL = dict(
    architectures=["T5EncoderModel"], d_ff=10240, d_kv=64, d_model=4096, dense_act_fn="gelu_new", dropout_rate=0.1,
    feed_forward_proj="gated-gelu", is_encoder_decoder=True, is_gated_act=True, layer_norm_epsilon=1e-6, model_type="t5",
    num_decoder_layers=24, num_heads=64, num_layers=24, relative_attention_max_distance=128,
    relative_attention_num_buckets=32, tie_word_embeddings=False, vocab_size=32128,
)  # fmt: skip


@pytest.fixture(scope="module", params=["t5_narrow", "t5_wide"])
def golden(request):
    return load_golden(request.param, ARCHITECTURE)


@jax.jit
def encode(model, input_ids, attention_mask):
    return model(input_ids, attention_mask)


def test_states_equal_transformers(golden):
    arrays, _, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    assert relative_error(encode(model, ids, mask), arrays["masked"]) <= 1e-5
    assert relative_error(encode(model, ids, jnp.ones_like(mask)), arrays["unmasked"]) <= 1e-5


def test_bfloat16_stays_near_float32(golden):
    arrays, _, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    states = encode(cast(model, ARCHITECTURE, jnp.bfloat16), ids, mask)
    assert states.dtype == jnp.bfloat16
    assert relative_error(states, encode(model, ids, mask)) <= 3e-2


def test_every_key_has_one_rule_and_every_rule_one_parameter(golden):
    arrays, _, model = golden
    keys = [*json.loads(str(arrays["keys"])), "encoder.embed_tokens.weight"]
    assert all(len(matches) == 1 for matches in match_keys(ARCHITECTURE, keys).values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert sorted(rule.path for rule in KEY_RULES) == sorted(paths)


def test_only_layer_0_may_hold_a_table_of_biases():
    key = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    found = match_keys(ARCHITECTURE, [key.format(0), key.format(1)])
    assert [len(matches) for matches in found.values()] == [1, 0]


def test_fresh_model_is_sensible():
    config = T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    model = jax.jit(lambda: T5Encoder(config, nnx.Rngs(0)))()
    ids = jnp.arange(1, 17, dtype=jnp.int32).reshape(2, 8)
    states = encode(model, ids, jnp.ones_like(ids))
    assert 0.8 < float(jnp.std(states)) < 1.2
    assert model.relative_bias.shape == (32, 4)
    assert not np.allclose(model.blocks.gate.kernel[0], model.blocks.gate.kernel[1])


def test_the_real_config_describes_4_8_billion_parameters():
    config = T5Config.model_validate(T5_XXL)
    state = nnx.state(nnx.eval_shape(lambda: T5Encoder(config, nnx.Rngs(0), jnp.bfloat16)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 4_762_310_656


@pytest.mark.parametrize(
    "field, value",
    [
        ("feed_forward_proj", "relu"), ("model_type", "umt5"), ("is_decoder", True), ("dense_act_fn", "relu"),
        ("is_gated_act", False),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(field, value):
    with pytest.raises(InvalidConfig, match=field):
        T5Config.model_validate(T5_XXL | {field: value})
