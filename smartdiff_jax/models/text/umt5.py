"""The UMT5 text encoder (arXiv 2304.09151), as Wan uses it: token ids to one state per token.

Follows transformers' `modeling_umt5.py`. Unusual: every layer has its own table of relative position biases, attention
logits are not scaled, norms have no bias and subtract no mean, and no Linear has a bias. The residual stream is float32:
it grows to where bfloat16 loses the small updates, and costs nothing at 512 tokens. (transformers keeps `wo` in float32
for float16 runs only, so a bfloat16 run holds all kernels in bfloat16 here too.)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.family import Architecture, KeyRule, linear
from smartdiff_jax.models.layers import Linear, RMSNorm, gelu, scan_blocks, stack_blocks

# What decides the computation but has one value in every UMT5: another one is another model.
_FIXED = {
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "is_decoder": False,
}


class UMT5Config(BaseModel):
    """The numbers of the encoder in transformers' `config.json`, under its names; generation settings are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str = "umt5"
    vocab_size: PositiveInt
    d_model: PositiveInt
    d_kv: PositiveInt
    d_ff: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    relative_attention_num_buckets: PositiveInt = 32
    relative_attention_max_distance: PositiveInt = 128
    layer_norm_epsilon: PositiveFloat = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str = "gelu_new"
    is_gated_act: bool = True
    is_decoder: bool = False

    @field_validator(*_FIXED)
    @classmethod
    def _encoder_of_umt5(cls, value: Any, info: Any) -> Any:
        if value != _FIXED[info.field_name]:
            raise InvalidConfig(info.field_name, value, f"only the UMT5 encoder is served: {_FIXED[info.field_name]!r}")
        return value


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, " offsets"]:
    """The bucket of every offset key - query from 1 - length to length - 1, int32 [2 * length - 1].

    Half of the buckets are for keys behind the query; in each half the first half counts single positions, the rest
    grows logarithmically up to max_distance. float32 as upstream: edges fall on exact powers.
    """
    offsets = np.arange(1 - length, length)
    num_buckets //= 2
    exact = num_buckets // 2
    distance = np.abs(offsets)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    large = np.minimum(exact + ratio.astype(np.int32), num_buckets - 1)
    return ((offsets > 0) * num_buckets + np.where(distance < exact, distance, large)).astype(np.int32)


class UMT5Attention(nnx.Module):
    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, dtype: DTypeLike):
        d_model, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        # The queries' initial scale stands for the missing 1 / sqrt(d_kv) of the logits.
        self.q = _linear(d_model, inner, rngs, dtype, stddev=(d_model * config.d_kv) ** -0.5)
        self.k = _linear(d_model, inner, rngs, dtype)
        self.v = _linear(d_model, inner, rngs, dtype)
        self.out = _linear(inner, d_model, rngs, dtype)
        table = initializers.normal(d_model**-0.5)(rngs.params(), (self.num_buckets, self.num_heads), dtype)
        self.relative_bias = nnx.Param(table)

    def __call__(self, x: Float[Array, "b l d"], mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits + self._position_bias(x.shape[1])
        logits = jnp.where(mask[:, None, None, :] != 0, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(out.reshape(*x.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def _position_bias(self, length: int) -> Float[Array, "h l l"]:
        buckets = relative_position_buckets(length, self.num_buckets, self.max_distance)
        by_offset = self.relative_bias[...].astype(jnp.float32)[buckets]
        positions = jnp.arange(length)
        return by_offset[positions[None, :] - positions[:, None] + length - 1].transpose(2, 0, 1)


class UMT5Block(nnx.Module):
    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, dtype: DTypeLike):
        eps = config.layer_norm_epsilon
        self.attention_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype)
        self.attention = UMT5Attention(config, rngs, dtype)
        self.feed_forward_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype)
        self.gate = _linear(config.d_model, config.d_ff, rngs, dtype)
        self.up = _linear(config.d_model, config.d_ff, rngs, dtype)
        self.down = _linear(config.d_ff, config.d_model, rngs, dtype)

    def __call__(self, hidden: Float[Array, "b l d"], mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        with jax.named_scope("self_attention"):
            hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        with jax.named_scope("feed_forward"):
            x = self.feed_forward_norm(hidden)
            return hidden + self.down(gelu(self.gate(x).astype(jnp.float32)) * self.up(x))


class UMT5Encoder(nnx.Module):
    """Token ids [b, l] and their mask (1 counts, 0 is padding) to states [b, l, d_model], in the parameters' dtype.

    Padding is never attended to; the states at padded positions are finite and mean nothing.
    """

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(initializers.normal(1.0)(rngs.params(), shape, dtype))
        self.blocks = stack_blocks(lambda rngs: UMT5Block(config, rngs, dtype), config.num_layers, rngs)
        self.num_blocks = config.num_layers
        self.norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, input_ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        embedding = self.embedding[...]
        hidden = embedding[input_ids].astype(jnp.float32)
        hidden = scan_blocks(self.blocks, 0, self.num_blocks, lambda block, x: block(x, attention_mask), hidden)
        return self.norm(hidden).astype(embedding.dtype)


def _linear(in_features: int, out_features: int, rngs: nnx.Rngs, dtype: DTypeLike, *, stddev: float | None = None) -> Linear:
    init = initializers.normal(in_features**-0.5 if stddev is None else stddev)
    return Linear(in_features, out_features, rngs, dtype=dtype, use_bias=False, kernel_init=init)


_BLOCK = r"encoder\.block\.(?P<layer>\d+)\.layer"

KEY_RULES = (
    # One tensor under two names; a checkpoint holds either or both.
    KeyRule(r"(shared|encoder\.embed_tokens)\.weight", "embedding"),
    KeyRule(rf"{_BLOCK}\.0\.layer_norm\.weight", "blocks.attention_norm.scale"),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.q\.weight", "blocks.attention.q.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.k\.weight", "blocks.attention.k.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.v\.weight", "blocks.attention.v.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.o\.weight", "blocks.attention.out.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.relative_attention_bias\.weight", "blocks.attention.relative_bias"),
    KeyRule(rf"{_BLOCK}\.1\.layer_norm\.weight", "blocks.feed_forward_norm.scale"),
    KeyRule(rf"{_BLOCK}\.1\.DenseReluDense\.wi_0\.weight", "blocks.gate.kernel", linear),
    KeyRule(rf"{_BLOCK}\.1\.DenseReluDense\.wi_1\.weight", "blocks.up.kernel", linear),
    KeyRule(rf"{_BLOCK}\.1\.DenseReluDense\.wo\.weight", "blocks.down.kernel", linear),
    KeyRule(r"encoder\.final_layer_norm\.weight", "norm.scale"),
)

ARCHITECTURE = Architecture(
    config=UMT5Config,
    build=UMT5Encoder,
    key_rules=KEY_RULES,
    # A whole UMT5 checkpoint holds the decoder and the language-model head too.
    ignored_keys=r"decoder\..*|lm_head\.weight",
)
