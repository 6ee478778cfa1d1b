"""The FLUX.1 text-to-image transformer (dev, and schnell, which is not told a guidance scale; Black Forest Labs, 2024).

An MM-DiT (arXiv 2403.03206): double blocks, where picture and text have parameters of their own and meet in attention, then
single blocks, which share theirs and run attention and feed-forward side by side. Follows diffusers' `transformer_flux.py`.
Unusual: every block projects its own modulation (a quarter of all parameters), the head's modulation says scale before
shift, the text sits at position zero of every rotary axis and so does not turn, and its padding is attended to.
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
from smartdiff_jax.kernels.fp8 import Columns, Part
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
from smartdiff_jax.models.linear import MLP, Features, Linear, products
from smartdiff_jax.models.modules import Attention, Ropes, joint_attention, scan_attending, scan_shared
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.rope import axial_rope_table
from smartdiff_jax.models.turn import Unturned

Triple = tuple[PositiveInt, PositiveInt, PositiveInt]
Streams = tuple[Float[Array, "b s d"], Float[Array, "b l d"]]
HostRope = tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "n r"]]

# What upstream's code fixes and no config says.
EPS = 1e-6
MLP_RATIO = 4
TIME_FEATURES = 256
PATCH_SIZE = (1, 2, 2)


class Flux1Config(BaseModel):
    """The numbers in diffusers' `transformer/config.json`, under diffusers' names.

    patch_size is 1 there because the pipeline has folded 2 x 2 latent pixels into in_channels before the model sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_size: PositiveInt = 1
    in_channels: PositiveInt = 64
    out_channels: int | None = None
    num_layers: PositiveInt = 19
    num_single_layers: PositiveInt = 38
    attention_head_dim: PositiveInt = 128
    num_attention_heads: PositiveInt = 24
    joint_attention_dim: PositiveInt = 4096
    pooled_projection_dim: PositiveInt = 768
    guidance_embeds: bool = False
    axes_dims_rope: Triple = (16, 56, 56)

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, data: Any) -> Any:
        """diffusers adds `_class_name` and the like."""
        return {key: value for key, value in data.items() if not key.startswith("_")} if isinstance(data, dict) else data

    @field_validator("patch_size")
    @classmethod
    def _folded_by_the_pipeline(cls, value: int) -> int:
        if value != 1:
            raise InvalidConfig("patch_size", value, "must be 1: patches of 2 x 2 are in the channels already")
        return value

    @field_validator("in_channels")
    @classmethod
    def _holds_whole_patches(cls, value: int) -> int:
        if value % 4:
            raise InvalidConfig("in_channels", value, "must be a multiple of 4: each channel of the latents gives 2 x 2")
        return value

    @model_validator(mode="after")
    def _text_to_image_only(self) -> "Flux1Config":
        if self.out_channels not in (None, self.in_channels):
            remedy = f"only text-to-image FLUX.1 is served, where it is null or in_channels={self.in_channels}"
            raise InvalidConfig("out_channels", self.out_channels, remedy)
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            remedy = f"must be three even numbers that add up to attention_head_dim={self.attention_head_dim}"
            raise InvalidConfig("axes_dims_rope", self.axes_dims_rope, remedy)
        return self


def patches(config: Flux1Config) -> Patches:
    """Patches of 2 x 2 latent pixels, features ordered (c, ph, pw)."""
    return Patches(PATCH_SIZE, channels_first=True)


def rope(config: Flux1Config, grid: tuple[int, int, int], num_text: int, text_length: int) -> tuple[HostRope, None]:
    """Rotary table of a grid of (frames, rows, columns) tokens, float32 [prod(grid), head_dim / 2]; none for the text.

    All of the text is at position (0, 0, 0), where nothing turns.
    """
    return axial_rope_table(grid, config.axes_dims_rope), None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flux1Context:
    """What all blocks share.

    temb: embedded timestep, guidance scale and pooled prompt together, float32, behind the SiLU that every modulation
        begins with.
    """

    temb: Float[Array, "b d"]
    text_length: Int[Array, " b"] | None
    rope: Rope


class Flux1QKV(nnx.Module):
    """Queries, keys and values of a stream; queries and keys normed head by head, then turned."""

    def __init__(self, config: Flux1Config, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, head_dim = config.dim, config.attention_head_dim
        self.num_heads = config.num_attention_heads
        self.q = Linear(dim, dim, rngs, dtype=dtype)
        self.k = Linear(dim, dim, rngs, dtype=dtype)
        self.v = Linear(dim, dim, rngs, dtype=dtype)
        self.q_norm = RMSNorm(head_dim, eps=EPS, dtype=dtype)
        self.k_norm = RMSNorm(head_dim, eps=EPS, dtype=dtype)

    def __call__(self, x: Features, rope: Rope | None) -> Unturned:
        q, k, v = products(x, self.q, self.k, self.v)
        return Unturned.of(self.num_heads, rope, (q, self.q_norm), (k, self.k_norm), (v, None))


class Flux1Stream(nnx.Module):
    """What a double block holds for one of its two streams, and does to it apart from the other."""

    def __init__(self, config: Flux1Config, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.dim
        self.modulation = Linear(dim, 6 * dim, rngs, dtype=dtype)
        self.qkv = Flux1QKV(config, rngs, dtype)
        self.out = Linear(dim, dim, rngs, dtype=dtype)
        self.feed_forward = MLP(dim, MLP_RATIO * dim, dim, gelu, rngs, dtype=dtype)

    def modulations(self, temb: Float[Array, "b d"]) -> tuple[Modulation, ...]:
        """Of the attention and of the feed-forward."""
        return Modulation.of(self.modulation, temb, 2)

    def before_attention(self, x: Float[Array, "b n d"], modulation: Modulation, rope: Rope | None) -> Unturned:
        return self.qkv(modulated_norm_into(self.qkv.q, x, modulation.shift, modulation.scale, EPS), rope)

    def after_attention(
        self, x: Float[Array, "b n d"], attended: Float[Array, "b n d"], attention: Modulation, feed_forward: Modulation
    ) -> Float[Array, "b n d"]:
        x = gated_add(x, self.out(attended), attention.gate)
        with jax.named_scope("feed_forward"):
            y = modulated_norm_into(self.feed_forward.linear_1, x, feed_forward.shift, feed_forward.scale, EPS)
            return gated_add(x, self.feed_forward(y), feed_forward.gate)


class Flux1DoubleBlock(nnx.Module):
    """Picture and text meet in attention and nowhere else."""

    def __init__(self, config: Flux1Config, rngs: nnx.Rngs, dtype: DTypeLike):
        self.image = Flux1Stream(config, rngs, dtype)
        self.text = Flux1Stream(config, rngs, dtype)

    def __call__(self, hidden: Streams, context: Flux1Context, attend: Attend) -> Streams:
        tokens, text = hidden
        with jax.named_scope("modulation"):
            of_tokens, of_text = self.image.modulations(context.temb), self.text.modulations(context.temb)
        with jax.named_scope("joint_attention"):

            def streams() -> tuple[Unturned, Unturned]:
                return (
                    self.image.before_attention(tokens, of_tokens[0], context.rope),
                    self.text.before_attention(text, of_text[0], None),
                )

            attended = joint_attention(attend, streams, context.text_length)
        tokens = self.image.after_attention(tokens, attended[0], *of_tokens)
        return tokens, self.text.after_attention(text, attended[1], *of_text)


class Flux1SingleBlock(nnx.Module):
    """Attention and feed-forward side by side on the same input, one output projection for both, shared by all streams."""

    def __init__(self, config: Flux1Config, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.dim
        self.modulation = Linear(dim, 3 * dim, rngs, dtype=dtype)
        self.qkv = Flux1QKV(config, rngs, dtype)
        self.feed_forward = Linear(dim, MLP_RATIO * dim, rngs, dtype=dtype)
        self.out = Linear((1 + MLP_RATIO) * dim, dim, rngs, dtype=dtype)

    def __call__(
        self, streams: tuple[Float[Array, "b _ d"], ...], ropes: Ropes, temb: Float[Array, "b d"], attention: Attention
    ) -> tuple[Float[Array, "b _ d"], ...]:
        """streams, each with its rotary table."""
        with jax.named_scope("modulation"):
            (modulation,) = Modulation.of(self.modulation, temb, 1)
        inputs = [modulated_norm_into(self.feed_forward, x, modulation.shift, modulation.scale, EPS) for x in streams]
        with jax.named_scope("joint_attention"):
            attended = attention(lambda: [self.qkv(x, rope) for x, rope in zip(inputs, ropes, strict=True)])
        outputs = [self._outputs(x, out) for x, out in zip(inputs, attended, strict=True)]
        return tuple(gated_add(x, y, modulation.gate) for x, y in zip(streams, outputs, strict=True))

    def _outputs(self, x: Features, attended: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        with jax.named_scope("feed_forward"):
            return self.out.join(Part.of(attended), Part((Columns(self.feed_forward.product(x)),), gelu))


class Flux1Transformer(nnx.Module):
    """A `Denoiser`: packed latents, timestep (0 to 1000), states of T5 and the pooled prompt of CLIP to a velocity.

    Blocks are counted through: config.num_layers double ones, then config.num_single_layers single ones.
    """

    def __init__(self, config: Flux1Config, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim = config.dim
        normal = initializers.normal(0.02)
        self.num_double_blocks = config.num_layers
        self.num_blocks = config.num_layers + config.num_single_layers
        self.patch_embedding = Linear(config.in_channels, dim, rngs, dtype=dtype)
        self.text_embedding = Linear(config.joint_attention_dim, dim, rngs, dtype=dtype)
        # float32 from end to end: bfloat16 cannot tell timestep 999 from 997.
        self.time_embedder = MLP(TIME_FEATURES, dim, dim, jax.nn.silu, rngs, kernel_init=normal)
        self.guidance_embedder = (
            MLP(TIME_FEATURES, dim, dim, jax.nn.silu, rngs, kernel_init=normal) if config.guidance_embeds else None
        )
        self.pooled_embedder = MLP(config.pooled_projection_dim, dim, dim, jax.nn.silu, rngs, dtype=dtype, kernel_init=normal)
        self.double_blocks = stack_blocks(lambda rngs: Flux1DoubleBlock(config, rngs, dtype), config.num_layers, rngs)
        self.single_blocks = stack_blocks(lambda rngs: Flux1SingleBlock(config, rngs, dtype), config.num_single_layers, rngs)
        self.head_modulation = Linear(dim, 2 * dim, rngs, dtype=dtype)
        self.head_projection = Linear(dim, config.in_channels, rngs, dtype=dtype, kernel_init=initializers.zeros)

    def embed(
        self,
        tokens: Float[Array, "b s p"],
        timestep: Float[Array, ""] | Float[Array, " b"],
        conditioning: Conditioning,
    ) -> tuple[Streams, Flux1Context]:
        """Tokens and text to the two residual streams, in the kernels' dtype, and the context of all blocks."""
        batch = tokens.shape[0]
        assert conditioning.pooled is not None, "FLUX.1 is conditioned on the pooled prompt"
        with jax.named_scope("time_embedding"), jax.default_matmul_precision("highest"):
            temb = self.time_embedder(timestep_embedding(jnp.broadcast_to(timestep, (batch,)), TIME_FEATURES))
            if self.guidance_embedder is not None:
                assert conditioning.guidance is not None, "FLUX.1 dev is told the guidance scale"
                guidance = 1000 * conditioning.guidance.astype(jnp.float32)
                temb = temb + self.guidance_embedder(timestep_embedding(guidance, TIME_FEATURES))
            temb = temb + self.pooled_embedder(conditioning.pooled)
        text, text_length = self.text_embedding(conditioning.text), conditioning.text_length
        context = Flux1Context(
            temb=jax.nn.silu(temb),
            text_length=None if text_length is None else jnp.broadcast_to(text_length, (batch,)),
            rope=conditioning.rope,
        )
        return (self.patch_embedding(tokens), jnp.broadcast_to(text, (batch, *text.shape[1:]))), context

    def run_blocks(self, hidden: Streams, context: Flux1Context, attend: Attend, lo: int, hi: int) -> Streams:
        """Blocks lo to hi - 1: a scan over the double ones among them, then one over the single ones."""
        first = self.num_double_blocks

        def double(block: Flux1DoubleBlock, hidden: Streams, attend: Attend) -> Streams:
            return block(hidden, context, attend)

        def single(block: Flux1SingleBlock, streams: Any, ropes: Ropes, attention: Attention) -> Any:
            return block(streams, ropes, context.temb, attention)

        if lo < min(hi, first):
            hidden = scan_attending(self.double_blocks, lo, min(hi, first), double, hidden, attend)
        ropes, lo, hi = (context.rope, None), max(lo - first, 0), hi - first
        return scan_shared(self.single_blocks, lo, hi, single, hidden, ropes, context.text_length, attend)

    def head(self, hidden: Streams, context: Flux1Context) -> Float[Array, "b s p"]:
        """The picture's residual stream to the float32 velocity of the packed latents."""
        scale, shift = jnp.split(self.head_modulation.project(context.temb)[:, None], 2, axis=-1)
        return self.head_projection(modulated_norm(hidden[0], shift, scale, EPS)).astype(jnp.float32)

    def probe(self, hidden: Streams, context: Flux1Context) -> Float[Array, "b s d"]:
        """The picture's modulated input of block 0's attention."""
        attention, _ = pick_block(self.double_blocks.image, 0).modulations(context.temb)
        return modulated_norm(hidden[0], attention.shift, attention.scale, EPS)

    def time_embedding(self, context: Flux1Context) -> Float[Array, "b 1 d"]:
        """What every modulation is projected from; guidance scale and prompt are in it, but only the timestep moves it."""
        return context.temb[:, None]


def _linear_rules(key: str, path: str, *, keep_float32: bool = False) -> tuple[KeyRule, KeyRule]:
    return (
        KeyRule(rf"{key}\.weight", f"{path}.kernel", linear, keep_float32),
        KeyRule(rf"{key}\.bias", f"{path}.bias", keep_float32=keep_float32),
    )


def _mlp_rules(key: str, path: str, *, keep_float32: bool = False) -> tuple[KeyRule, ...]:
    return (
        *_linear_rules(rf"{key}\.linear_1", f"{path}.linear_1", keep_float32=keep_float32),
        *_linear_rules(rf"{key}\.linear_2", f"{path}.linear_2", keep_float32=keep_float32),
    )


def _qkv_rules(key: str, names: tuple[str, ...], path: str) -> tuple[KeyRule, ...]:
    q, k, v, q_norm, k_norm = (rf"{key}\.{name}" for name in names)
    return (
        *_linear_rules(q, f"{path}.q"),
        *_linear_rules(k, f"{path}.k"),
        *_linear_rules(v, f"{path}.v"),
        KeyRule(rf"{q_norm}\.weight", f"{path}.q_norm.scale"),
        KeyRule(rf"{k_norm}\.weight", f"{path}.k_norm.scale"),
    )


_DOUBLE = r"transformer_blocks\.(?P<layer>\d+)"
_SINGLE = r"single_transformer_blocks\.(?P<layer>\d+)"
_OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")

KEY_RULES = (
    *_linear_rules(r"x_embedder", "patch_embedding"),
    *_linear_rules(r"context_embedder", "text_embedding"),
    *_mlp_rules(r"time_text_embed\.timestep_embedder", "time_embedder", keep_float32=True),
    *_mlp_rules(r"time_text_embed\.guidance_embedder", "guidance_embedder", keep_float32=True),
    *_mlp_rules(r"time_text_embed\.text_embedder", "pooled_embedder"),
    *_linear_rules(rf"{_DOUBLE}\.norm1\.linear", "double_blocks.image.modulation"),
    *_qkv_rules(rf"{_DOUBLE}\.attn", _OWN, "double_blocks.image.qkv"),
    *_linear_rules(rf"{_DOUBLE}\.attn\.to_out\.0", "double_blocks.image.out"),
    *_linear_rules(rf"{_DOUBLE}\.ff\.net\.0\.proj", "double_blocks.image.feed_forward.linear_1"),
    *_linear_rules(rf"{_DOUBLE}\.ff\.net\.2", "double_blocks.image.feed_forward.linear_2"),
    *_linear_rules(rf"{_DOUBLE}\.norm1_context\.linear", "double_blocks.text.modulation"),
    *_qkv_rules(rf"{_DOUBLE}\.attn", _ADDED, "double_blocks.text.qkv"),
    *_linear_rules(rf"{_DOUBLE}\.attn\.to_add_out", "double_blocks.text.out"),
    *_linear_rules(rf"{_DOUBLE}\.ff_context\.net\.0\.proj", "double_blocks.text.feed_forward.linear_1"),
    *_linear_rules(rf"{_DOUBLE}\.ff_context\.net\.2", "double_blocks.text.feed_forward.linear_2"),
    *_linear_rules(rf"{_SINGLE}\.norm\.linear", "single_blocks.modulation"),
    *_qkv_rules(rf"{_SINGLE}\.attn", _OWN, "single_blocks.qkv"),
    *_linear_rules(rf"{_SINGLE}\.proj_mlp", "single_blocks.feed_forward"),
    *_linear_rules(rf"{_SINGLE}\.proj_out", "single_blocks.out"),
    *_linear_rules(r"norm_out\.linear", "head_modulation"),
    *_linear_rules(r"proj_out", "head_projection"),
)

ARCHITECTURE = Architecture(config=Flux1Config, build=Flux1Transformer, key_rules=KEY_RULES)
