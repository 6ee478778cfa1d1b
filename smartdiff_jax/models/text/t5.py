"""The T5 v1.1 text encoder (arXiv 1910.10683), as FLUX.1 uses it: token ids to one state per token.

Follows transformers' `modeling_t5.py`. Unusual: one table of relative position biases serves all layers (a checkpoint keeps
it in layer 0), attention logits are not scaled, norms have no bias and subtract no mean, and no Linear has a bias. The
residual stream is float32: it grows to where bfloat16 loses the small updates, and costs nothing at 512 tokens.
(transformers keeps `wo` in float32 for float16 runs only, so a bfloat16 run holds all kernels in bfloat16 here too.)
"""

import math
from collections.abc import Callable
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
from smartdiff_jax.models.layers import RMSNorm, gelu, scan_blocks, stack_blocks
from smartdiff_jax.models.linear import Linear


class T5Config(BaseModel):
    """The numbers of the encoder in transformers' `config.json`, under its names; generation settings are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str = "t5"
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

    @field_validator("model_type", "feed_forward_proj", "dense_act_fn", "is_gated_act", "is_decoder")
    @classmethod
    def _served(cls, value: Any, info: Any) -> Any:
        """What decides the computation has one value in every encoder of the kind: another one is another model."""
        served = cls.model_fields[info.field_name].default
        if value != served:
            kind = cls.model_fields["model_type"].default
            raise InvalidConfig(info.field_name, value, f"only the {kind} encoder (v1.1) is served: {served!r}")
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


def bias_table(config: T5Config, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Param:
    """Relative position biases [buckets, heads]."""
    shape = (config.relative_attention_num_buckets, config.num_heads)
    return nnx.Param(initializers.normal(config.d_model**-0.5)(rngs.params(), shape, dtype))


def position_bias(table: Float[Array, "buckets h"], length: int, max_distance: int) -> Float[Array, "h l l"]:
    """What a table adds to the attention logits [h, query, key] of `length` tokens, float32."""
    buckets = relative_position_buckets(length, table.shape[0], max_distance)
    by_offset = table.astype(jnp.float32)[buckets]
    positions = jnp.arange(length)
    return by_offset[positions[None, :] - positions[:, None] + length - 1].transpose(2, 0, 1)


class T5Attention(nnx.Module):
    def __init__(self, config: T5Config, rngs: nnx.Rngs, dtype: DTypeLike):
        d_model, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        # The queries' initial scale stands for the missing 1 / sqrt(d_kv) of the logits.
        self.q = _linear(d_model, inner, rngs, dtype, stddev=(d_model * config.d_kv) ** -0.5)
        self.k = _linear(d_model, inner, rngs, dtype)
        self.v = _linear(d_model, inner, rngs, dtype)
        self.out = _linear(inner, d_model, rngs, dtype)

    def __call__(self, x: Float[Array, "b l d"], mask: Int[Array, "b l"], bias: Float[Array, "h l l"]) -> Float[Array, "b l d"]:
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        logits = jnp.where(mask[:, None, None, :] != 0, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(out.reshape(*x.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class T5Block(nnx.Module):
    def __init__(self, config: T5Config, attention: T5Attention, rngs: nnx.Rngs, dtype: DTypeLike):
        eps = config.layer_norm_epsilon
        self.attention_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype)
        self.gate = _linear(config.d_model, config.d_ff, rngs, dtype)
        self.up = _linear(config.d_model, config.d_ff, rngs, dtype)
        self.down = _linear(config.d_ff, config.d_model, rngs, dtype)

    def __call__(
        self, hidden: Float[Array, "b l d"], mask: Int[Array, "b l"], bias: Float[Array, "h l l"]
    ) -> Float[Array, "b l d"]:
        with jax.named_scope("self_attention"):
            hidden = hidden + self.attention(self.attention_norm(hidden), mask, bias)
        with jax.named_scope("feed_forward"):
            x = self.feed_forward_norm(hidden)
            return hidden + self.down(gelu(self.gate(x).astype(jnp.float32)) * self.up(x))


class T5Stack(nnx.Module):
    """What T5 and UMT5 share: embedding, blocks, final norm; where the position biases come from is the subclass's."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, dtype: DTypeLike, attention: type[T5Attention]):
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(initializers.normal(1.0)(rngs.params(), shape, dtype))
        self.blocks = stack_blocks(
            lambda rngs: T5Block(config, attention(config, rngs, dtype), rngs, dtype), config.num_layers, rngs
        )
        self.num_blocks = config.num_layers
        self.max_distance = config.relative_attention_max_distance
        self.norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def _encode(
        self, input_ids: Int[Array, "b l"], mask: Int[Array, "b l"], bias_of: Callable[[Any], Array]
    ) -> Float[Array, "b l d"]:
        embedding = self.embedding[...]
        hidden = embedding[input_ids].astype(jnp.float32)
        hidden = scan_blocks(self.blocks, 0, self.num_blocks, lambda block, x: block(x, mask, bias_of(block)), hidden)
        return self.norm(hidden).astype(embedding.dtype)


class T5Encoder(T5Stack):
    """Token ids [b, l] and their mask (1 counts, 0 is padding) to states [b, l, d_model], in the parameters' dtype.

    What the mask leaves out is never attended to; the states there are finite and mean nothing. FLUX.1 leaves nothing out:
    its pipeline passes no mask, so the padding is text like any other.
    """

    def __init__(self, config: T5Config, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        super().__init__(config, rngs, dtype, T5Attention)
        self.relative_bias = bias_table(config, rngs, dtype)

    def __call__(self, input_ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        bias = position_bias(self.relative_bias[...], input_ids.shape[1], self.max_distance)
        return self._encode(input_ids, attention_mask, lambda block: bias)


def _linear(in_features: int, out_features: int, rngs: nnx.Rngs, dtype: DTypeLike, *, stddev: float | None = None) -> Linear:
    init = initializers.normal(in_features**-0.5 if stddev is None else stddev)
    return Linear(in_features, out_features, rngs, dtype=dtype, use_bias=False, kernel_init=init)


_BLOCK = r"encoder\.block\.(?P<layer>\d+)\.layer"
BIAS_KEY = r"\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"

STACK_RULES = (
    # One tensor under two names; a checkpoint holds either or both.
    KeyRule(r"(shared|encoder\.embed_tokens)\.weight", "embedding"),
    KeyRule(rf"{_BLOCK}\.0\.layer_norm\.weight", "blocks.attention_norm.scale"),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.q\.weight", "blocks.attention.q.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.k\.weight", "blocks.attention.k.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.v\.weight", "blocks.attention.v.kernel", linear),
    KeyRule(rf"{_BLOCK}\.0\.SelfAttention\.o\.weight", "blocks.attention.out.kernel", linear),
    KeyRule(rf"{_BLOCK}\.1\.layer_norm\.weight", "blocks.feed_forward_norm.scale"),
    KeyRule(rf"{_BLOCK}\.1\.DenseReluDense\.wi_0\.weight", "blocks.gate.kernel", linear),
    KeyRule(rf"{_BLOCK}\.1\.DenseReluDense\.wi_1\.weight", "blocks.up.kernel", linear),
    KeyRule(rf"{_BLOCK}\.1\.DenseReluDense\.wo\.weight", "blocks.down.kernel", linear),
    KeyRule(r"encoder\.final_layer_norm\.weight", "norm.scale"),
)
# A whole checkpoint holds the decoder and the language-model head too.
DECODER_KEYS = r"decoder\..*|lm_head\.weight"

KEY_RULES = (*STACK_RULES, KeyRule(rf"encoder\.block\.0{BIAS_KEY}", "relative_bias"))

ARCHITECTURE = Architecture(config=T5Config, build=T5Encoder, key_rules=KEY_RULES, ignored_keys=DECODER_KEYS)
