"""The UMT5 text encoder (arXiv 2304.09151), as Wan uses it: token ids to one state per token.

T5 (see t5.py), but every layer has its own table of relative position biases. Follows transformers' `modeling_umt5.py`.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from smartdiff_jax.models.family import Architecture, KeyRule
from smartdiff_jax.models.text.t5 import (
    BIAS_KEY,
    DECODER_KEYS,
    STACK_RULES,
    T5Attention,
    T5Config,
    T5Stack,
    bias_table,
    position_bias,
)
from smartdiff_jax.models.text.t5 import relative_position_buckets as relative_position_buckets


class UMT5Config(T5Config):
    """The numbers of the encoder in transformers' `config.json`, under its names; generation settings are ignored."""

    model_type: str = "umt5"


class UMT5Attention(T5Attention):
    def __init__(self, config: T5Config, rngs: nnx.Rngs, dtype: DTypeLike):
        super().__init__(config, rngs, dtype)
        self.relative_bias = bias_table(config, rngs, dtype)


class UMT5Encoder(T5Stack):
    """Token ids [b, l] and their mask (1 counts, 0 is padding) to states [b, l, d_model], in the parameters' dtype.

    Padding is never attended to; the states at padded positions are finite and mean nothing.
    """

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        super().__init__(config, rngs, dtype, UMT5Attention)

    def __call__(self, input_ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        length = input_ids.shape[1]
        return self._encode(
            input_ids,
            attention_mask,
            lambda block: position_bias(block.attention.relative_bias[...], length, self.max_distance),
        )


KEY_RULES = (*STACK_RULES, KeyRule(rf"encoder\.block\.(?P<layer>\d+){BIAS_KEY}", "blocks.attention.relative_bias"))

ARCHITECTURE = Architecture(config=UMT5Config, build=UMT5Encoder, key_rules=KEY_RULES, ignored_keys=DECODER_KEYS)
