"""The CLIP text model (arXiv 2103.00020), as FLUX.1 uses it: token ids to one pooled vector for the whole prompt.

Follows transformers' `CLIPTextModel`. Unusual: attention is causal, so the end token is the one that has seen the whole
prompt, and its state is the pooled vector; what stands behind it (CLIP-L pads with end tokens) changes nothing. The
feed-forward's GELU is `x * sigmoid(1.702 x)`. The residual stream is float32, which costs nothing at 77 tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator, model_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.family import Architecture, KeyRule, linear
from smartdiff_jax.models.layers import LayerNorm, scan_blocks, stack_blocks
from smartdiff_jax.models.linear import MLP, Linear

# What CLIP-L's config.json gives for its end token, wrongly: it stands for "the highest id", which the end token has.
_LEGACY_EOS = 2


class CLIPTextConfig(BaseModel):
    """The numbers of the text model in transformers' `config.json`, under its names; training settings are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str = "clip_text_model"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt = 77
    layer_norm_eps: PositiveFloat = 1e-5
    hidden_act: str = "quick_gelu"
    eos_token_id: int = 49407

    @field_validator("model_type", "hidden_act")
    @classmethod
    def _served(cls, value: str, info: Any) -> str:
        """What decides the computation has one value in every text model of the kind: another one is another model."""
        served = cls.model_fields[info.field_name].default
        if value != served:
            raise InvalidConfig(info.field_name, value, f"only the text model of OpenAI's CLIP is served: {served!r}")
        return value

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "CLIPTextConfig":
        if self.hidden_size % self.num_attention_heads:
            raise InvalidConfig("num_attention_heads", self.num_attention_heads, f"must divide hidden_size, {self.hidden_size}")
        return self


def quick_gelu(x: Array) -> Array:
    """GELU as OpenAI's CLIP approximates it."""
    return x * jax.nn.sigmoid(1.702 * x)


class CLIPAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (dim // self.num_heads) ** -0.5
        self.q = Linear(dim, dim, rngs, dtype=dtype)
        self.k = Linear(dim, dim, rngs, dtype=dtype)
        self.v = Linear(dim, dim, rngs, dtype=dtype)
        self.out = Linear(dim, dim, rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b l d"], mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * self.scale
        seen = jnp.tri(x.shape[1], dtype=bool) & (mask[:, None, None, :] != 0)
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(out.reshape(*x.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class CLIPBlock(nnx.Module):
    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = LayerNorm(dim, eps=eps)
        self.attention = CLIPAttention(config, rngs, dtype)
        self.mlp_norm = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, config.intermediate_size, dim, quick_gelu, rngs, dtype=dtype)

    def __call__(self, hidden: Float[Array, "b l d"], mask: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        with jax.named_scope("self_attention"):
            hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        with jax.named_scope("mlp"):
            return hidden + self.mlp(self.mlp_norm(hidden))


class CLIPTextEncoder(nnx.Module):
    """Token ids [b, l] and their mask (1 counts, 0 is padding) to the pooled vector [b, hidden_size], in the parameters' dtype.

    l is at most max_position_embeddings. Pooled is the state, after the final norm, of the first end token.
    """

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        init = initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.positions = nnx.Param(init(rngs.params(), (config.max_position_embeddings, config.hidden_size), dtype))
        self.blocks = stack_blocks(lambda rngs: CLIPBlock(config, rngs, dtype), config.num_hidden_layers, rngs)
        self.num_blocks = config.num_hidden_layers
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id

    def __call__(self, input_ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"]) -> Float[Array, "b d"]:
        embedding, positions = self.embedding[...], self.positions[: input_ids.shape[1]]
        hidden = embedding[input_ids].astype(jnp.float32) + positions.astype(jnp.float32)
        hidden = scan_blocks(self.blocks, 0, self.num_blocks, lambda block, x: block(x, attention_mask), hidden)
        # argmax finds the first: of the highest id, or of the end tokens.
        ends = input_ids if self.eos_token_id == _LEGACY_EOS else input_ids == self.eos_token_id
        pooled = jnp.take_along_axis(hidden, jnp.argmax(ends, axis=-1)[:, None, None], axis=1)[:, 0]
        return self.norm(pooled).astype(embedding.dtype)


def _rules(key: str, path: str) -> tuple[KeyRule, KeyRule]:
    return KeyRule(rf"{key}\.weight", f"{path}.kernel", linear), KeyRule(rf"{key}\.bias", f"{path}.bias")


def _norm_rules(key: str, path: str) -> tuple[KeyRule, KeyRule]:
    return KeyRule(rf"{key}\.weight", f"{path}.scale"), KeyRule(rf"{key}\.bias", f"{path}.bias")


# Files of transformers 4 have the prefix; those of a model that transformers 5 made have none.
_MODEL = r"(text_model\.)?"
_LAYER = rf"{_MODEL}encoder\.layers\.(?P<layer>\d+)"

KEY_RULES = (
    KeyRule(rf"{_MODEL}embeddings\.token_embedding\.weight", "embedding"),
    KeyRule(rf"{_MODEL}embeddings\.position_embedding\.weight", "positions"),
    *_norm_rules(rf"{_LAYER}\.layer_norm1", "blocks.attention_norm"),
    *_rules(rf"{_LAYER}\.self_attn\.q_proj", "blocks.attention.q"),
    *_rules(rf"{_LAYER}\.self_attn\.k_proj", "blocks.attention.k"),
    *_rules(rf"{_LAYER}\.self_attn\.v_proj", "blocks.attention.v"),
    *_rules(rf"{_LAYER}\.self_attn\.out_proj", "blocks.attention.out"),
    *_norm_rules(rf"{_LAYER}\.layer_norm2", "blocks.mlp_norm"),
    *_rules(rf"{_LAYER}\.mlp\.fc1", "blocks.mlp.linear_1"),
    *_rules(rf"{_LAYER}\.mlp\.fc2", "blocks.mlp.linear_2"),
    *_norm_rules(rf"{_MODEL}final_layer_norm", "norm"),
)

ARCHITECTURE = Architecture(
    config=CLIPTextConfig,
    build=CLIPTextEncoder,
    key_rules=KEY_RULES,
    # Older files hold the buffer 0, 1, 2, ... too.
    ignored_keys=r"(text_model\.)?embeddings\.position_ids",
)
