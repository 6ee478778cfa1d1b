"""The CLIP text model against transformers (golden/make_clip.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import cast, load_golden, match_keys, relative_error

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.text.clip import ARCHITECTURE, KEY_RULES, CLIPTextConfig, CLIPTextEncoder

# text_encoder/config.json of FLUX.1.
CLIP_L = dict(
    architectures=["CLIPTextModel"], attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2,
    hidden_act="quick_gelu", hidden_size=768, initializer_factor=1.0, initializer_range=0.02, intermediate_size=3072,
    layer_norm_eps=1e-5, max_position_embeddings=77, model_type="clip_text_model", num_attention_heads=12,
    num_hidden_layers=12, pad_token_id=1, projection_dim=768, vocab_size=49408,
)  # fmt: skip


@pytest.fixture(scope="module", params=["clip_legacy", "clip_eos"])
def golden(request):
    return load_golden(request.param, ARCHITECTURE)


@jax.jit
def encode(model, input_ids, attention_mask):
    return model(input_ids, attention_mask)


def test_pooled_equals_transformers(golden):
    arrays, _, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    assert relative_error(encode(model, ids, jnp.ones_like(mask)), arrays["unmasked"]) <= 1e-5
    assert relative_error(encode(model, ids, mask), arrays["masked"]) <= 1e-5


def test_bfloat16_stays_near_float32(golden):
    arrays, _, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    pooled = encode(cast(model, ARCHITECTURE, jnp.bfloat16), ids, mask)
    assert pooled.dtype == jnp.bfloat16
    assert relative_error(pooled, encode(model, ids, mask)) <= 2e-2


def test_what_stands_behind_the_end_changes_nothing(golden):
    arrays, config, model = golden
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    # A legacy end token is the highest id, so what is not one is lower.
    other = jnp.where(mask == 1, ids, 11)
    np.testing.assert_allclose(encode(model, other, mask), encode(model, ids, mask), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encode(model, other, jnp.ones_like(mask)), encode(model, ids, mask), rtol=1e-5, atol=1e-5)


def test_a_masked_token_inside_the_prompt_is_not_seen(golden):
    arrays, _, model = golden
    ids = jnp.asarray(arrays["input_ids"][:1])
    mask = jnp.ones_like(ids).at[0, 1].set(0)
    pooled = encode(model, ids, mask)
    np.testing.assert_allclose(encode(model, ids.at[0, 1].set(12), mask), pooled, rtol=1e-5, atol=1e-5)
    assert relative_error(encode(model, ids.at[0, 2].set(12), mask), pooled) > 1e-3


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_every_key_has_one_rule_and_every_rule_one_parameter(golden, prefix):
    arrays, _, model = golden
    keys = [prefix + key.removeprefix("text_model.") for key in json.loads(str(arrays["keys"]))]
    assert all(len(matches) == 1 for matches in match_keys(ARCHITECTURE, keys).values())
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert sorted(rule.path for rule in KEY_RULES) == sorted(paths)


def test_fresh_model_is_sensible():
    config = CLIPTextConfig(vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    model = jax.jit(lambda: CLIPTextEncoder(config, nnx.Rngs(0)))()
    ids = jnp.arange(1, 17, dtype=jnp.int32).reshape(2, 8)
    pooled = encode(model, ids, jnp.ones_like(ids))
    assert pooled.shape == (2, 32) and 0.8 < float(jnp.std(pooled)) < 1.2
    assert not np.allclose(model.blocks.attention.q.kernel[0], model.blocks.attention.q.kernel[1])


def test_the_real_config_describes_123_million_parameters():
    config = CLIPTextConfig.model_validate(CLIP_L)
    state = nnx.state(nnx.eval_shape(lambda: CLIPTextEncoder(config, nnx.Rngs(0), jnp.bfloat16)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 123_060_480


@pytest.mark.parametrize(
    "field, value", [("hidden_act", "gelu"), ("model_type", "siglip_text_model"), ("num_attention_heads", 7)]
)
def test_other_architectures_are_refused(field, value):
    with pytest.raises(InvalidConfig, match=field):
        CLIPTextConfig.model_validate(CLIP_L | {field: value})
