"""The FLUX.2 text-to-image transformer (klein; dev is the same, told a guidance scale; Black Forest Labs, 2025).

An MM-DiT (arXiv 2403.03206): double blocks, where picture and text have parameters of their own and meet in attention, then
single blocks, which share theirs and run attention and feed-forward side by side. Follows diffusers' `transformer_flux2.py`.
Unusual: all blocks of a kind share one modulation, so it is projected once a step; nothing has a bias; feed-forwards are
gated (SwiGLU); a single block has one projection in and one out; text has an axis of rotary positions to itself, and its
padding is attended to; the head's modulation says scale before shift.
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
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator, model_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.base import Attend
from smartdiff_jax.kernels.fp8 import Columns, Part, Product
from smartdiff_jax.models.family import Architecture, Conditioning, KeyRule, Rope, linear
from smartdiff_jax.models.layers import (
    Modulation,
    RMSNorm,
    gated_add,
    modulated_norm,
    modulated_norm_into,
    stack_blocks,
    swiglu,
    timestep_embedding,
)
from smartdiff_jax.models.linear import Linear, products
from smartdiff_jax.models.modules import Attention, Ropes, joint_attention, scan_attending, scan_shared
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.rope import axial_rope_table
from smartdiff_jax.models.turn import Unturned

Streams = tuple[Float[Array, "b s d"], Float[Array, "b l d"]]
Table = tuple[Float[np.ndarray, "s r"], Float[np.ndarray, "s r"]]
TextTable = tuple[Float[np.ndarray, "l r"], Float[np.ndarray, "l r"]]

PATCH_SIZE = (1, 2, 2)


class Flux2Config(BaseModel):
    """The numbers in diffusers' `transformer/config.json`, under diffusers' names and with its defaults, which are dev's.

    patch_size is 1 there because the pipeline has folded 2 x 2 latent pixels into in_channels before the model sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_size: PositiveInt = 1
    in_channels: PositiveInt = 128
    out_channels: int | None = None
    num_layers: PositiveInt = 8
    num_single_layers: PositiveInt = 48
    attention_head_dim: PositiveInt = 128
    num_attention_heads: PositiveInt = 48
    joint_attention_dim: PositiveInt = 15360
    timestep_guidance_channels: PositiveInt = 256
    mlp_ratio: PositiveFloat = 3.0
    axes_dims_rope: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (32, 32, 32, 32)
    rope_theta: PositiveFloat = 2000.0
    eps: PositiveFloat = 1e-6
    guidance_embeds: bool = True

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Upstream's own rounding."""
        return int(self.dim * self.mlp_ratio)

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

    @field_validator("timestep_guidance_channels")
    @classmethod
    def _even(cls, value: int, info: Any) -> int:
        if value % 2:
            raise InvalidConfig(info.field_name, value, "must be even: a cosine and a sine of each frequency")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Flux2Config":
        if self.out_channels not in (None, self.in_channels):
            remedy = f"must be null or in_channels={self.in_channels}: the velocity is shaped as the latents"
            raise InvalidConfig("out_channels", self.out_channels, remedy)
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            remedy = f"must be four even numbers that add up to attention_head_dim={self.attention_head_dim}"
            raise InvalidConfig("axes_dims_rope", self.axes_dims_rope, remedy)
        return self


def patches(config: Flux2Config) -> Patches:
    """Patches of 2 x 2 latent pixels, features ordered (c, ph, pw)."""
    return Patches(PATCH_SIZE, channels_first=True)


def rope(config: Flux2Config, grid: tuple[int, int, int], num_text: int, text_length: int) -> tuple[Table, TextTable]:
    """Rotary tables of a grid of (frames, rows, columns) tokens and of num_text text states: float32 [n, head_dim / 2] each.

    Of four axes the picture has the first three and the text the last; elsewhere each is at zero. Padding of the text has
    positions too, so text_length decides nothing.
    """
    axes, theta = config.axes_dims_rope, config.rope_theta
    return axial_rope_table((*grid, 1), axes, theta), axial_rope_table((1, 1, 1, num_text), axes, theta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flux2Context:
    """What all blocks share.

    temb: embedded timestep (and guidance scale), float32, behind the SiLU that every modulation begins with.
    image, text: the modulation of the double blocks' streams, that of attention and then that of the feed-forward, float32.
    single: the modulation of the single blocks, float32.
    """

    temb: Float[Array, "b d"]
    image: Float[Array, "b 6 d"]
    text: Float[Array, "b 6 d"]
    single: Float[Array, "b 3 d"]
    text_length: Int[Array, " b"] | None
    rope: Rope
    text_rope: tuple[Float[Array, "e l r"], Float[Array, "e l r"]]


class Flux2TimeEmbedder(nnx.Module):
    """A timestep, or a guidance scale in thousandths, to a vector; float32 from end to end.

    bfloat16 cannot tell timestep 999 from 997.
    """

    def __init__(self, config: Flux2Config, rngs: nnx.Rngs):
        normal = initializers.normal(0.02)
        self.num_features = config.timestep_guidance_channels
        self.linear_1 = Linear(self.num_features, config.dim, rngs, use_bias=False, kernel_init=normal)
        self.linear_2 = Linear(config.dim, config.dim, rngs, use_bias=False, kernel_init=normal)

    def __call__(self, timestep: Float[Array, " b"]) -> Float[Array, "b d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(timestep_embedding(timestep, self.num_features))))


class Flux2Modulation(nnx.Module):
    """temb to `pieces` vectors, projected in float32."""

    def __init__(self, config: Flux2Config, pieces: int, rngs: nnx.Rngs, dtype: DTypeLike):
        self.pieces = pieces
        self.linear = Linear(config.dim, pieces * config.dim, rngs, dtype=dtype, use_bias=False)

    def __call__(self, temb: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        return self.linear.project(temb).reshape(temb.shape[0], self.pieces, -1)


class Flux2HeadNorm(nnx.Module):
    """The norms of queries and keys, head by head; then they are turned."""

    def __init__(self, config: Flux2Config, dtype: DTypeLike):
        self.num_heads = config.num_attention_heads
        self.q = RMSNorm(config.attention_head_dim, eps=config.eps, dtype=dtype)
        self.k = RMSNorm(config.attention_head_dim, eps=config.eps, dtype=dtype)

    def __call__(self, q: Columns, k: Columns, v: Columns, rope: Rope | None) -> Unturned:
        return Unturned.of(self.num_heads, rope, (q, self.q), (k, self.k), (v, None))


class Flux2Stream(nnx.Module):
    """What a double block holds for one of its two streams, and does to it apart from the other."""

    def __init__(self, config: Flux2Config, rngs: nnx.Rngs, dtype: DTypeLike):
        dim = config.dim
        self.eps = config.eps
        self.q = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.k = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.v = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.norm = Flux2HeadNorm(config, dtype)
        self.out = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.feed_forward_in = Linear(dim, 2 * config.mlp_dim, rngs, dtype=dtype, use_bias=False)
        self.feed_forward_out = Linear(config.mlp_dim, dim, rngs, dtype=dtype, use_bias=False)

    def before_attention(self, x: Float[Array, "b n d"], modulation: Modulation, rope: Rope) -> Unturned:
        y = modulated_norm_into(self.q, x, modulation.shift, modulation.scale, self.eps)
        q, k, v = map(Columns, products(y, self.q, self.k, self.v))
        return self.norm(q, k, v, rope)

    def after_attention(
        self, x: Float[Array, "b n d"], attended: Float[Array, "b n d"], attention: Modulation, feed_forward: Modulation
    ) -> Float[Array, "b n d"]:
        x = gated_add(x, self.out(attended), attention.gate)
        with jax.named_scope("feed_forward"):
            y = modulated_norm_into(self.feed_forward_in, x, feed_forward.shift, feed_forward.scale, self.eps)
            inner = _swiglu(self.feed_forward_in.product(y), 0)
            return gated_add(x, self.feed_forward_out.join(inner), feed_forward.gate)


class Flux2DoubleBlock(nnx.Module):
    """Picture and text meet in attention and nowhere else."""

    def __init__(self, config: Flux2Config, rngs: nnx.Rngs, dtype: DTypeLike):
        self.image = Flux2Stream(config, rngs, dtype)
        self.text = Flux2Stream(config, rngs, dtype)

    def __call__(self, hidden: Streams, context: Flux2Context, attend: Attend) -> Streams:
        tokens, text = hidden
        of_tokens, of_text = _modulations(context.image), _modulations(context.text)
        with jax.named_scope("joint_attention"):

            def streams() -> tuple[Unturned, Unturned]:
                return (
                    self.image.before_attention(tokens, of_tokens[0], context.rope),
                    self.text.before_attention(text, of_text[0], context.text_rope),
                )

            attended = joint_attention(attend, streams, context.text_length)
        tokens = self.image.after_attention(tokens, attended[0], *of_tokens)
        return tokens, self.text.after_attention(text, attended[1], *of_text)


class Flux2SingleBlock(nnx.Module):
    """Attention and feed-forward side by side on the same input (arXiv 2302.05442), all streams through the same parameters.

    inputs: to queries, keys, values, and the feed-forward's gate and values. outputs: from attention and feed-forward.
    """

    def __init__(self, config: Flux2Config, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, mlp_dim = config.dim, config.mlp_dim
        self.eps = config.eps
        self.inputs = Linear(dim, 3 * dim + 2 * mlp_dim, rngs, dtype=dtype, use_bias=False)
        self.norm = Flux2HeadNorm(config, dtype)
        self.outputs = Linear(dim + mlp_dim, dim, rngs, dtype=dtype, use_bias=False)

    def __call__(
        self, streams: tuple[Float[Array, "b _ d"], ...], ropes: Ropes, modulation: Modulation, attention: Attention
    ) -> tuple[Float[Array, "b _ d"], ...]:
        """streams, each with its rotary table."""
        dim = streams[0].shape[-1]

        def before_attention(product: Product, rope: Rope | None) -> Unturned:
            q, k, v = (Columns(product, at * dim, dim) for at in range(3))
            return self.norm(q, k, v, rope)

        with jax.named_scope("joint_attention"):
            inputs = [modulated_norm_into(self.inputs, x, modulation.shift, modulation.scale, self.eps) for x in streams]
            products = [self.inputs.product(x) for x in inputs]
            attended = attention(lambda: list(map(before_attention, products, ropes)))
        through = zip(streams, attended, products, strict=True)
        return tuple(self._after_attention(x, out, product, modulation) for x, out, product in through)

    def _after_attention(
        self, x: Float[Array, "b n d"], attended: Float[Array, "b n d"], product: Product, modulation: Modulation
    ) -> Float[Array, "b n d"]:
        with jax.named_scope("feed_forward"):
            y = self.outputs.join(Part.of(attended), _swiglu(product, 3 * x.shape[-1]))
            return gated_add(x, y, modulation.gate)


class Flux2Transformer(nnx.Module):
    """A `Denoiser`: packed latents, timestep (0 to 1000) and text states to a velocity.

    Blocks are counted through: config.num_layers double ones, then config.num_single_layers single ones.
    """

    def __init__(self, config: Flux2Config, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim = config.dim
        self.eps = config.eps
        self.num_double_blocks = config.num_layers
        self.num_blocks = config.num_layers + config.num_single_layers
        self.patch_embedding = Linear(config.in_channels, dim, rngs, dtype=dtype, use_bias=False)
        self.text_embedding = Linear(config.joint_attention_dim, dim, rngs, dtype=dtype, use_bias=False)
        self.time_embedder = Flux2TimeEmbedder(config, rngs)
        self.guidance_embedder = Flux2TimeEmbedder(config, rngs) if config.guidance_embeds else None
        self.image_modulation = Flux2Modulation(config, 6, rngs, dtype)
        self.text_modulation = Flux2Modulation(config, 6, rngs, dtype)
        self.single_modulation = Flux2Modulation(config, 3, rngs, dtype)
        self.double_blocks = stack_blocks(lambda rngs: Flux2DoubleBlock(config, rngs, dtype), config.num_layers, rngs)
        self.single_blocks = stack_blocks(lambda rngs: Flux2SingleBlock(config, rngs, dtype), config.num_single_layers, rngs)
        self.head_modulation = Flux2Modulation(config, 2, rngs, dtype)
        self.head_projection = Linear(
            dim, config.in_channels, rngs, dtype=dtype, use_bias=False, kernel_init=initializers.zeros
        )

    def embed(
        self,
        tokens: Float[Array, "b s p"],
        timestep: Float[Array, ""] | Float[Array, " b"],
        conditioning: Conditioning,
    ) -> tuple[Streams, Flux2Context]:
        """Tokens and text to the two residual streams, in the kernels' dtype, and the context of all blocks."""
        batch = tokens.shape[0]
        assert conditioning.text_rope is not None, "the text of FLUX.2 has positions: see rope()"
        with jax.named_scope("time_embedding"), jax.default_matmul_precision("highest"):
            temb = self.time_embedder(jnp.broadcast_to(timestep, (batch,)))
            if self.guidance_embedder is not None:
                assert conditioning.guidance is not None, "FLUX.2 dev is told the guidance scale"
                temb = temb + self.guidance_embedder(1000 * conditioning.guidance.astype(jnp.float32))
            temb = jax.nn.silu(temb)
        text, text_length = self.text_embedding(conditioning.text), conditioning.text_length
        with jax.named_scope("modulation"):
            context = Flux2Context(
                temb=temb,
                image=self.image_modulation(temb),
                text=self.text_modulation(temb),
                single=self.single_modulation(temb),
                text_length=None if text_length is None else jnp.broadcast_to(text_length, (batch,)),
                rope=conditioning.rope,
                text_rope=conditioning.text_rope,
            )
        return (self.patch_embedding(tokens), jnp.broadcast_to(text, (batch, *text.shape[1:]))), context

    def run_blocks(self, hidden: Streams, context: Flux2Context, attend: Attend, lo: int, hi: int) -> Streams:
        """Blocks lo to hi - 1: a scan over the double ones among them, then one over the single ones."""
        first, [modulation] = self.num_double_blocks, _modulations(context.single)

        def double(block: Flux2DoubleBlock, hidden: Streams, attend: Attend) -> Streams:
            return block(hidden, context, attend)

        def single(block: Flux2SingleBlock, streams: Any, ropes: Ropes, attention: Attention) -> Any:
            return block(streams, ropes, modulation, attention)

        if lo < min(hi, first):
            hidden = scan_attending(self.double_blocks, lo, min(hi, first), double, hidden, attend)
        ropes, lo, hi = (context.rope, context.text_rope), max(lo - first, 0), hi - first
        return scan_shared(self.single_blocks, lo, hi, single, hidden, ropes, context.text_length, attend)

    def head(self, hidden: Streams, context: Flux2Context) -> Float[Array, "b s p"]:
        """The picture's residual stream to the float32 velocity of the packed latents."""
        scale, shift = jnp.split(self.head_modulation(context.temb), 2, axis=1)
        return self.head_projection(modulated_norm(hidden[0], shift, scale, self.eps)).astype(jnp.float32)

    def probe(self, hidden: Streams, context: Flux2Context) -> Float[Array, "b s d"]:
        """The picture's modulated input of block 0's attention."""
        attention, _ = _modulations(context.image)
        return modulated_norm(hidden[0], attention.shift, attention.scale, self.eps)

    def time_embedding(self, context: Flux2Context) -> Float[Array, "b 1 d"]:
        """What every modulation is projected from; dev's guidance scale is in it, but only the timestep moves it."""
        return context.temb[:, None]


def _modulations(pieces: Float[Array, "b n d"]) -> list[Modulation]:
    """One modulation of every three pieces."""
    vectors = jnp.split(pieces, pieces.shape[1], axis=1)
    return [Modulation(*vectors[i : i + 3]) for i in range(0, len(vectors), 3)]


def _swiglu(product: Product, first: int) -> Part:
    """Gated activation of [gate | values], which begin at column `first`."""
    width = (product.values.shape[-1] - first) // 2
    return Part((Columns(product, first, width), Columns(product, first + width, width)), swiglu)


def _kernel(key: str, path: str, *, keep_float32: bool = False) -> KeyRule:
    return KeyRule(rf"{key}\.weight", f"{path}.kernel", linear, keep_float32)


def _time_rules(key: str, path: str) -> tuple[KeyRule, KeyRule]:
    return (
        _kernel(rf"time_guidance_embed\.{key}\.linear_1", f"{path}.linear_1", keep_float32=True),
        _kernel(rf"time_guidance_embed\.{key}\.linear_2", f"{path}.linear_2", keep_float32=True),
    )


def _norm_rules(q: str, k: str, path: str) -> tuple[KeyRule, KeyRule]:
    return KeyRule(rf"{q}\.weight", f"{path}.q.scale"), KeyRule(rf"{k}\.weight", f"{path}.k.scale")


_DOUBLE = r"transformer_blocks\.(?P<layer>\d+)"
_SINGLE = r"single_transformer_blocks\.(?P<layer>\d+)"

KEY_RULES = (
    _kernel("x_embedder", "patch_embedding"),
    _kernel("context_embedder", "text_embedding"),
    *_time_rules("timestep_embedder", "time_embedder"),
    *_time_rules("guidance_embedder", "guidance_embedder"),
    _kernel(r"double_stream_modulation_img\.linear", "image_modulation.linear"),
    _kernel(r"double_stream_modulation_txt\.linear", "text_modulation.linear"),
    _kernel(r"single_stream_modulation\.linear", "single_modulation.linear"),
    _kernel(rf"{_DOUBLE}\.attn\.to_q", "double_blocks.image.q"),
    _kernel(rf"{_DOUBLE}\.attn\.to_k", "double_blocks.image.k"),
    _kernel(rf"{_DOUBLE}\.attn\.to_v", "double_blocks.image.v"),
    *_norm_rules(rf"{_DOUBLE}\.attn\.norm_q", rf"{_DOUBLE}\.attn\.norm_k", "double_blocks.image.norm"),
    _kernel(rf"{_DOUBLE}\.attn\.to_out\.0", "double_blocks.image.out"),
    _kernel(rf"{_DOUBLE}\.ff\.linear_in", "double_blocks.image.feed_forward_in"),
    _kernel(rf"{_DOUBLE}\.ff\.linear_out", "double_blocks.image.feed_forward_out"),
    _kernel(rf"{_DOUBLE}\.attn\.add_q_proj", "double_blocks.text.q"),
    _kernel(rf"{_DOUBLE}\.attn\.add_k_proj", "double_blocks.text.k"),
    _kernel(rf"{_DOUBLE}\.attn\.add_v_proj", "double_blocks.text.v"),
    *_norm_rules(rf"{_DOUBLE}\.attn\.norm_added_q", rf"{_DOUBLE}\.attn\.norm_added_k", "double_blocks.text.norm"),
    _kernel(rf"{_DOUBLE}\.attn\.to_add_out", "double_blocks.text.out"),
    _kernel(rf"{_DOUBLE}\.ff_context\.linear_in", "double_blocks.text.feed_forward_in"),
    _kernel(rf"{_DOUBLE}\.ff_context\.linear_out", "double_blocks.text.feed_forward_out"),
    _kernel(rf"{_SINGLE}\.attn\.to_qkv_mlp_proj", "single_blocks.inputs"),
    *_norm_rules(rf"{_SINGLE}\.attn\.norm_q", rf"{_SINGLE}\.attn\.norm_k", "single_blocks.norm"),
    _kernel(rf"{_SINGLE}\.attn\.to_out", "single_blocks.outputs"),
    _kernel(r"norm_out\.linear", "head_modulation.linear"),
    _kernel("proj_out", "head_projection"),
)

ARCHITECTURE = Architecture(config=Flux2Config, build=Flux2Transformer, key_rules=KEY_RULES)
