"""The Qwen-Image text-to-image transformer (arXiv 2508.02324).

An MM-DiT: picture and text are two streams with weights of their own, modulated by the timestep, that meet in the joint
attention of every block. Follows diffusers' `transformer_qwenimage.py`. Unusual: positions are centred on the picture (rows
and columns from about -n/2 to n/2), and the text continues the diagonal behind the picture's longer half; queries and keys
are normed per head; every block projects its modulation itself, a third of all parameters; nothing pools the text.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveInt, field_validator, model_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.base import Attend
from smartdiff_jax.models.family import Architecture, Conditioning, KeyRule, Rope, linear
from smartdiff_jax.models.layers import (
    Modulation,
    RMSNorm,
    gated_add,
    gelu,
    modulated_norm,
    modulated_norm_into,
    pick_block,
    stack_blocks,
    timestep_embedding,
)
from smartdiff_jax.models.linear import MLP, Linear, products
from smartdiff_jax.models.modules import joint_attention, scan_attending
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.turn import Unturned

# Constants of the architecture, which upstream's configuration does not hold.
EPS = 1e-6
FREQUENCIES = 256
THETA = 10_000.0

Streams = tuple[Float[Array, "b s d"], Float[Array, "b l d"]]
Table = tuple[Float[np.ndarray, "s r"], Float[np.ndarray, "s r"]]
TextTable = tuple[Float[np.ndarray, "l r"], Float[np.ndarray, "l r"]]


class QwenImageConfig(BaseModel):
    """The numbers in diffusers' `transformer/config.json`, under diffusers' names.

    in_channels counts a token's features, out_channels those of a latent pixel. pooled_projection_dim stands in the first
    release's file and decides nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_size: PositiveInt = 2
    in_channels: PositiveInt = 64
    out_channels: PositiveInt | None = 16
    num_layers: PositiveInt = 60
    attention_head_dim: PositiveInt = 128
    num_attention_heads: PositiveInt = 24
    joint_attention_dim: PositiveInt = 3584
    pooled_projection_dim: int | None = None
    axes_dims_rope: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 56, 56)
    guidance_embeds: bool = False
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, data: Any) -> Any:
        """diffusers adds `_class_name` and the like."""
        return {key: value for key, value in data.items() if not key.startswith("_")} if isinstance(data, dict) else data

    @field_validator("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    @classmethod
    def _text_to_image_only(cls, value: bool, info: Any) -> bool:
        if value:
            raise InvalidConfig(info.field_name, value, "only text-to-image Qwen-Image is served, where it is False")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> "QwenImageConfig":
        if any(dim % 2 for dim in self.axes_dims_rope) or sum(self.axes_dims_rope) != self.attention_head_dim:
            remedy = f"must be even numbers that add up to attention_head_dim={self.attention_head_dim}"
            raise InvalidConfig("axes_dims_rope", self.axes_dims_rope, remedy)
        if self.in_channels != self.patch_size**2 * (self.out_channels or self.in_channels):
            remedy = f"must be out_channels={self.out_channels} times patch_size={self.patch_size} squared"
            raise InvalidConfig("in_channels", self.in_channels, remedy)
        return self


def patches(config: QwenImageConfig) -> Patches:
    """Square patches of one frame, folded into the channels."""
    return Patches((1, config.patch_size, config.patch_size), channels_first=True)


def rope(config: QwenImageConfig, grid: tuple[int, int, int], num_text: int, text_length: int) -> tuple[Table, TextTable]:
    """Rotary tables of a grid of (frames, rows, columns) tokens and of num_text text states: float32 [n, head_dim / 2] each.

    Rows and columns count from the centre, the odd one out on the negative side; text has one position for all three axes,
    from half the longer side on. Padding has positions too, so text_length decides nothing.
    """
    frames, rows, columns = grid
    axes = np.arange(frames), np.arange(rows) - (rows - rows // 2), np.arange(columns) - (columns - columns // 2)
    tokens = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    text = max(rows, columns) // 2 + np.arange(num_text)
    return _table(tokens, config.axes_dims_rope), _table(np.stack([text] * 3, axis=-1), config.axes_dims_rope)


def _table(positions: Int[np.ndarray, "s axes"], axes_dim: tuple[int, ...]) -> Table:
    angles = [
        np.outer(along_axis, THETA ** (-np.arange(0, dim, 2) / dim))
        for along_axis, dim in zip(positions.T, axes_dim, strict=True)
    ]
    table = np.concatenate(angles, axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwenImageContext:
    """What all blocks share. time: the embedded timestep behind its activation, float32."""

    time: Float[Array, "b d"]
    rope: Rope
    text_rope: tuple[Float[Array, "e l r"], Float[Array, "e l r"]]
    text_length: Int[Array, " b"] | None


class QwenImageStream(nnx.Module):
    """What a block does to one of its streams; attention lies between `qkv` and `update`."""

    def __init__(self, config: QwenImageConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.dim
        self.num_heads = config.num_attention_heads
        # Gates that start at zero make a fresh block the identity (adaLN-Zero, arXiv 2212.09748).
        self.modulation = Linear(dim, 6 * dim, rngs, dtype=dtype, kernel_init=initializers.zeros)
        self.q = Linear(dim, dim, rngs, dtype=dtype)
        self.k = Linear(dim, dim, rngs, dtype=dtype)
        self.v = Linear(dim, dim, rngs, dtype=dtype)
        self.out = Linear(dim, dim, rngs, dtype=dtype)
        self.q_norm = RMSNorm(config.attention_head_dim, eps=EPS, dtype=dtype)
        self.k_norm = RMSNorm(config.attention_head_dim, eps=EPS, dtype=dtype)
        self.feed_forward = MLP(dim, 4 * dim, dim, gelu, rngs, dtype=dtype)

    def modulations(self, time: Float[Array, "b d"]) -> tuple[Modulation, ...]:
        """Of attention and of the feed-forward."""
        return Modulation.of(self.modulation, time, 2)

    def qkv(self, hidden: Float[Array, "b n d"], modulation: Modulation, rope: Rope) -> Unturned:
        x = modulated_norm_into(self.q, hidden, modulation.shift, modulation.scale, EPS)
        q, k, v = products(x, self.q, self.k, self.v)
        return Unturned.of(self.num_heads, rope, (q, self.q_norm), (k, self.k_norm), (v, None))

    def update(
        self,
        hidden: Float[Array, "b n d"],
        attended: Float[Array, "b n d"],
        attention: Modulation,
        feed_forward: Modulation,
    ) -> Float[Array, "b n d"]:
        hidden = gated_add(hidden, self.out(attended), attention.gate)
        x = modulated_norm_into(self.feed_forward.linear_1, hidden, feed_forward.shift, feed_forward.scale, EPS)
        return gated_add(hidden, self.feed_forward(x), feed_forward.gate)


class QwenImageBlock(nnx.Module):
    def __init__(self, config: QwenImageConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        self.image = QwenImageStream(config, rngs, dtype)
        self.text = QwenImageStream(config, rngs, dtype)

    def __call__(self, hidden: Streams, context: QwenImageContext, attend: Attend) -> Streams:
        tokens, text = hidden
        with jax.named_scope("modulation"):
            of_image, of_text = self.image.modulations(context.time), self.text.modulations(context.time)
        with jax.named_scope("joint_attention"):

            def streams() -> tuple[Unturned, Unturned]:
                return (
                    self.image.qkv(tokens, of_image[0], context.rope),
                    self.text.qkv(text, of_text[0], context.text_rope),
                )

            tokens_out, text_out = joint_attention(attend, streams, context.text_length)
        with jax.named_scope("feed_forward"):
            return self.image.update(tokens, tokens_out, *of_image), self.text.update(text, text_out, *of_text)


class QwenImageTransformer(nnx.Module):
    """A `Denoiser`: packed latents, timestep (0 to 1000) and text states to the velocity of the packed latents.

    Text behind its length is never attended to; its own states are finite and mean nothing.
    """

    def __init__(self, config: QwenImageConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim, zeros = config.dim, initializers.zeros
        self.num_blocks = config.num_layers
        self.token_embedding = Linear(config.in_channels, dim, rngs, dtype=dtype)
        self.text_norm = RMSNorm(config.joint_attention_dim, eps=EPS, dtype=dtype)
        self.text_embedding = Linear(config.joint_attention_dim, dim, rngs, dtype=dtype)
        # The timestep is float32 from end to end: bfloat16 cannot tell 999 from 997.
        self.time_embedder = MLP(FREQUENCIES, dim, dim, jax.nn.silu, rngs, kernel_init=initializers.normal(0.02))
        self.blocks = stack_blocks(lambda rngs: QwenImageBlock(config, rngs, dtype), config.num_layers, rngs)
        self.head_modulation = Linear(dim, 2 * dim, rngs, dtype=dtype, kernel_init=zeros)
        self.head_projection = Linear(dim, config.in_channels, rngs, dtype=dtype, kernel_init=zeros)

    def embed(
        self,
        tokens: Float[Array, "b s p"],
        timestep: Float[Array, ""] | Float[Array, " b"],
        conditioning: Conditioning,
    ) -> tuple[Streams, QwenImageContext]:
        """Tokens and text to their residual streams, in the kernels' dtype, and the context of all blocks."""
        assert conditioning.text_rope is not None, "the text of Qwen-Image has positions: see rope()"
        batch = tokens.shape[0]
        with jax.named_scope("time_embedding"), jax.default_matmul_precision("highest"):
            frequencies = timestep_embedding(jnp.broadcast_to(timestep, (batch,)), FREQUENCIES)
            time = jax.nn.silu(self.time_embedder(frequencies))
        text = self.text_embedding(self.text_norm(conditioning.text))
        length = conditioning.text_length
        context = QwenImageContext(
            time=time,
            rope=conditioning.rope,
            text_rope=conditioning.text_rope,
            text_length=None if length is None else jnp.broadcast_to(length, (batch,)),
        )
        return (self.token_embedding(tokens), jnp.broadcast_to(text, (batch, *text.shape[1:]))), context

    def run_blocks(self, hidden: Streams, context: QwenImageContext, attend: Attend, lo: int, hi: int) -> Streams:
        """Blocks lo to hi - 1."""
        return scan_attending(self.blocks, lo, hi, lambda block, x, attend: block(x, context, attend), hidden, attend)

    def head(self, hidden: Streams, context: QwenImageContext) -> Float[Array, "b s p"]:
        """The picture's residual stream to the float32 velocity of the packed latents."""
        # Scale comes first here, and shift first in the blocks.
        scale, shift = jnp.split(self.head_modulation.project(context.time)[:, None], 2, axis=-1)
        return self.head_projection(modulated_norm(hidden[0], shift, scale, EPS)).astype(jnp.float32)

    def probe(self, hidden: Streams, context: QwenImageContext) -> Float[Array, "b s d"]:
        """The picture's modulated input of block 0."""
        attention, _ = pick_block(self.blocks.image, 0).modulations(context.time)
        return modulated_norm(hidden[0], attention.shift, attention.scale, EPS)

    def time_embedding(self, context: QwenImageContext) -> Float[Array, "b 1 d"]:
        """What every modulation is projected from."""
        return context.time[:, None]


def _linear_rules(key: str, path: str, *, keep_float32: bool = False) -> tuple[KeyRule, KeyRule]:
    return (
        KeyRule(rf"{key}\.weight", f"{path}.kernel", linear, keep_float32),
        KeyRule(rf"{key}\.bias", f"{path}.bias", keep_float32=keep_float32),
    )


def _stream_rules(path: str, prefix: str, q: str, k: str, v: str, out: str, norm: str) -> tuple[KeyRule, ...]:
    """The rules of one stream of the blocks, for its names in the checkpoint."""
    block = r"transformer_blocks\.(?P<layer>\d+)"
    return (
        *_linear_rules(rf"{block}\.{prefix}_mod\.1", f"{path}.modulation"),
        *_linear_rules(rf"{block}\.attn\.{q}", f"{path}.q"),
        *_linear_rules(rf"{block}\.attn\.{k}", f"{path}.k"),
        *_linear_rules(rf"{block}\.attn\.{v}", f"{path}.v"),
        *_linear_rules(rf"{block}\.attn\.{out}", f"{path}.out"),
        KeyRule(rf"{block}\.attn\.{norm}_q\.weight", f"{path}.q_norm.scale"),
        KeyRule(rf"{block}\.attn\.{norm}_k\.weight", f"{path}.k_norm.scale"),
        *_linear_rules(rf"{block}\.{prefix}_mlp\.net\.0\.proj", f"{path}.feed_forward.linear_1"),
        *_linear_rules(rf"{block}\.{prefix}_mlp\.net\.2", f"{path}.feed_forward.linear_2"),
    )


KEY_RULES = (
    *_linear_rules("img_in", "token_embedding"),
    KeyRule(r"txt_norm\.weight", "text_norm.scale"),
    *_linear_rules("txt_in", "text_embedding"),
    *_linear_rules(r"time_text_embed\.timestep_embedder\.linear_1", "time_embedder.linear_1", keep_float32=True),
    *_linear_rules(r"time_text_embed\.timestep_embedder\.linear_2", "time_embedder.linear_2", keep_float32=True),
    *_stream_rules("blocks.image", "img", "to_q", "to_k", "to_v", r"to_out\.0", "norm"),
    *_stream_rules("blocks.text", "txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added"),
    *_linear_rules(r"norm_out\.linear", "head_modulation"),
    *_linear_rules("proj_out", "head_projection"),
)

ARCHITECTURE = Architecture(config=QwenImageConfig, build=QwenImageTransformer, key_rules=KEY_RULES)
