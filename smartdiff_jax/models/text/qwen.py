"""The Qwen language models as text encoders: token ids to hidden states of chosen layers.

Qwen3 (arXiv 2505.09388) is the encoder of FLUX.2-klein and Z-Image, the language tower of Qwen2.5-VL (arXiv 2502.13923) that
of Qwen-Image. Follows transformers' `modeling_qwen3.py` and `modeling_qwen2_5_vl.py`. Both are decoders: attention is causal
with grouped key and value heads, feed-forwards are gated, and rotary embedding turns the two halves of a head against each
other (not neighbours). Qwen3 norms queries and keys per head; Qwen2.5 gives q, k and v a bias instead. Qwen2.5-VL's
positions have three axes, but text stands at the same place on all of them, so of text alone they are one.

The residual stream is float32: a few of its features grow to where bfloat16 loses the small updates, and it costs nothing at
these lengths.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.family import Architecture, KeyRule, linear
from smartdiff_jax.models.layers import RMSNorm, scan_blocks, stack_blocks
from smartdiff_jax.models.linear import Linear
from smartdiff_jax.models.rope import axial_rope_table

RotaryTable = tuple[Float[Array, "l r"], Float[Array, "l r"]]


class QwenConfig(BaseModel):
    """The numbers of a language model in transformers' `config.json`, under its names; everything else in it is ignored.

    Read from the top of the file or from its `text_config`; the rotary numbers also from `rope_parameters` (new files) or
    `rope_scaling` (old ones). Sliding windows, stretched rotary embeddings and other activations are refused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_types: ClassVar[tuple[str, ...]]
    qk_norm: ClassVar[bool]
    qkv_bias: ClassVar[bool]

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_type: str = "default"
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool | None = False
    layer_types: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = data | (data.get("text_config") or {})
        rotary = (fields.get("rope_parameters") or {}) | (fields.get("rope_scaling") or {})
        if "type" in rotary:
            rotary = {"rope_type": rotary["type"]} | rotary
        return fields | {name: rotary[name] for name in ("rope_theta", "rope_type") if name in rotary}

    @field_validator("model_type", "rope_type", "hidden_act", "attention_bias", "use_sliding_window", "layer_types")
    @classmethod
    def _served(cls, value: Any, info: Any) -> Any:
        """What decides the computation has one value in every encoder of the kind: another one is another model."""
        served = {
            "model_type": cls.model_types,
            # Positions of several axes ("mrope") are those of one where there is only text.
            "rope_type": ("default", "mrope"),
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "use_sliding_window": (False, None),
            "layer_types": ("full_attention",),
        }[info.field_name]
        found = (value or ()) if info.field_name == "layer_types" else (value,)
        if any(item not in served for item in found):
            kind = cls.model_types[0]
            raise InvalidConfig(info.field_name, value, f"only the {kind} encoder of an image model is served: {served[0]!r}")
        return value

    @model_validator(mode="after")
    def _heads_fit(self) -> "QwenConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            remedy = f"must divide num_attention_heads={self.num_attention_heads}"
            raise InvalidConfig("num_key_value_heads", self.num_key_value_heads, remedy)
        if self.head_dim % 2:
            raise InvalidConfig("head_dim", self.head_dim, "must be even: rotary embedding turns pairs")
        return self


class Qwen3Config(QwenConfig):
    """`text_encoder/config.json` of FLUX.2-klein and Z-Image."""

    model_types = ("qwen3",)
    qk_norm = True
    qkv_bias = False

    model_type: str = "qwen3"
    head_dim: PositiveInt = 128


class Qwen25VLConfig(QwenConfig):
    """`text_encoder/config.json` of Qwen-Image; its vision tower is not read."""

    model_types = ("qwen2_5_vl", "qwen2_5_vl_text")
    qk_norm = False
    qkv_bias = True

    model_type: str = "qwen2_5_vl"
    head_dim: PositiveInt = Field(default_factory=lambda data: data["hidden_size"] // data["num_attention_heads"])


class QwenAttention(nnx.Module):
    def __init__(self, config: QwenConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        d, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        inner, kv_inner = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.q = Linear(d, inner, rngs, dtype=dtype, use_bias=config.qkv_bias)
        self.k = Linear(d, kv_inner, rngs, dtype=dtype, use_bias=config.qkv_bias)
        self.v = Linear(d, kv_inner, rngs, dtype=dtype, use_bias=config.qkv_bias)
        self.q_norm = RMSNorm(head_dim, eps=eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=eps, dtype=dtype) if config.qk_norm else None
        self.out = Linear(inner, d, rngs, dtype=dtype, use_bias=False)

    def __call__(self, x: Float[Array, "b l d"], rope: RotaryTable, mask: Bool[Array, "b 1 l l"]) -> Float[Array, "b l d"]:
        v = self._heads(self.v(x))
        q = _turn_halves(self._heads(self.q(x), self.q_norm), rope).astype(v.dtype)
        k = _turn_halves(self._heads(self.k(x), self.k_norm), rope).astype(v.dtype)
        # Serves grouped heads without repeating keys and values; softmax in float32, scaled by 1 / sqrt(head_dim).
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
        return self.out(out.reshape(*x.shape[:2], -1))

    def _heads(self, x: Float[Array, "b l i"], norm: RMSNorm | None = None) -> Float[Array, "b l h r"]:
        x = x.reshape(*x.shape[:-1], -1, self.head_dim)
        return x if norm is None else norm(x)


class QwenBlock(nnx.Module):
    def __init__(self, config: QwenConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        d, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(d, eps=eps, dtype=dtype)
        self.attention = QwenAttention(config, rngs, dtype)
        self.feed_forward_norm = RMSNorm(d, eps=eps, dtype=dtype)
        self.gate = Linear(d, inner, rngs, dtype=dtype, use_bias=False)
        self.up = Linear(d, inner, rngs, dtype=dtype, use_bias=False)
        self.down = Linear(inner, d, rngs, dtype=dtype, use_bias=False)

    def __call__(self, hidden: Float[Array, "b l d"], rope: RotaryTable, mask: Bool[Array, "b 1 l l"]) -> Float[Array, "b l d"]:
        with jax.named_scope("self_attention"):
            hidden = hidden + self.attention(self.attention_norm(hidden), rope, mask)
        with jax.named_scope("feed_forward"):
            x = self.feed_forward_norm(hidden)
            return hidden + self.down(jax.nn.silu(self.gate(x).astype(jnp.float32)) * self.up(x))


class QwenEncoder(nnx.Module):
    """Token ids [b, l], padded on the right, and their mask (1 counts, 0 is padding) to hidden states.

    layers: which hidden states (static), as transformers counts them: 0 is the embeddings, i the residual stream behind i
        blocks, num_blocks (or -1) that of the last block and the final norm, which no other state has been through; negative
        ones count from there. States [b, l, len(layers) * d], side by side in the order of `layers`, in the parameters'
        dtype. Blocks behind the last layer asked for are not run.

    Padding is attended to by nothing but later padding; the states at padded positions are what transformers' are (FLUX.2
    reads them). Raises InvalidConfig for a layer that the model does not have.
    """

    def __init__(self, config: QwenConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(initializers.normal(1.0)(rngs.params(), shape, dtype))
        self.blocks = stack_blocks(lambda rngs: QwenBlock(config, rngs, dtype), config.num_hidden_layers, rngs)
        self.num_blocks = config.num_hidden_layers
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta

    def __call__(
        self, input_ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"], layers: tuple[int, ...]
    ) -> Float[Array, "b l e"]:
        indices = [self._blocks_before(layer) for layer in layers]
        length = input_ids.shape[1]
        cos, sin = axial_rope_table((length,), (self.head_dim,), self.rope_theta)
        rope = jnp.asarray(cos), jnp.asarray(sin)
        mask = jnp.tril(jnp.ones((length, length), bool)) & (attention_mask != 0)[:, None, None, :]

        embedding = self.embedding[...]
        hidden = embedding[input_ids].astype(jnp.float32)
        states, done = {}, 0
        for index in sorted(set(indices)):
            hidden = scan_blocks(self.blocks, done, index, lambda block, x: block(x, rope, mask), hidden)
            states[index], done = hidden, index
        if self.num_blocks in states:
            states[self.num_blocks] = self.norm(hidden)
        return jnp.concatenate([states[index].astype(embedding.dtype) for index in indices], axis=-1)

    def _blocks_before(self, layer: int) -> int:
        index = layer + self.num_blocks + 1 if layer < 0 else layer
        if not 0 <= index <= self.num_blocks:
            remedy = f"the encoder has num_hidden_layers={self.num_blocks}; its hidden states go from 0 to {self.num_blocks}"
            raise InvalidConfig("layers", layer, remedy)
        return index


def _turn_halves(x: Float[Array, "b l h d"], rope: RotaryTable) -> Float[Array, "b l h d"]:
    """Rotary embedding of feature i with feature i + d / 2 of every head; float32 out."""
    cos, sin = (table[:, None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# A language model on its own, under a head, or beside a vision tower, as transformers has named it over time.
_MODEL = r"(model\.)?(language_model\.)?"
_BLOCK = rf"{_MODEL}layers\.(?P<layer>\d+)"

_SHARED_RULES = (
    KeyRule(rf"{_MODEL}embed_tokens\.weight", "embedding"),
    KeyRule(rf"{_BLOCK}\.input_layernorm\.weight", "blocks.attention_norm.scale"),
    KeyRule(rf"{_BLOCK}\.self_attn\.q_proj\.weight", "blocks.attention.q.kernel", linear),
    KeyRule(rf"{_BLOCK}\.self_attn\.k_proj\.weight", "blocks.attention.k.kernel", linear),
    KeyRule(rf"{_BLOCK}\.self_attn\.v_proj\.weight", "blocks.attention.v.kernel", linear),
    KeyRule(rf"{_BLOCK}\.self_attn\.o_proj\.weight", "blocks.attention.out.kernel", linear),
    KeyRule(rf"{_BLOCK}\.post_attention_layernorm\.weight", "blocks.feed_forward_norm.scale"),
    KeyRule(rf"{_BLOCK}\.mlp\.gate_proj\.weight", "blocks.gate.kernel", linear),
    KeyRule(rf"{_BLOCK}\.mlp\.up_proj\.weight", "blocks.up.kernel", linear),
    KeyRule(rf"{_BLOCK}\.mlp\.down_proj\.weight", "blocks.down.kernel", linear),
    KeyRule(rf"{_MODEL}norm\.weight", "norm.scale"),
)

QWEN3 = Architecture(
    config=Qwen3Config,
    build=QwenEncoder,
    key_rules=(
        *_SHARED_RULES,
        KeyRule(rf"{_BLOCK}\.self_attn\.q_norm\.weight", "blocks.attention.q_norm.scale"),
        KeyRule(rf"{_BLOCK}\.self_attn\.k_norm\.weight", "blocks.attention.k_norm.scale"),
    ),
    ignored_keys=r"lm_head\.weight",
)

QWEN25_VL = Architecture(
    config=Qwen25VLConfig,
    build=QwenEncoder,
    key_rules=(
        *_SHARED_RULES,
        KeyRule(rf"{_BLOCK}\.self_attn\.q_proj\.bias", "blocks.attention.q.bias"),
        KeyRule(rf"{_BLOCK}\.self_attn\.k_proj\.bias", "blocks.attention.k.bias"),
        KeyRule(rf"{_BLOCK}\.self_attn\.v_proj\.bias", "blocks.attention.v.bias"),
    ),
    ignored_keys=r"(model\.)?visual\..*|lm_head\.weight",
)
