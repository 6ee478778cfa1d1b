"""The Z-Image text-to-image transformer (Z-Image and Z-Image-Turbo, arXiv 2511.22699).

Refiners run on picture and caption apart, then single-stream blocks on both as one sequence. Follows diffusers'
`transformer_z_image.py`. Unusual: attention and feed-forward are normed before and behind (a sandwich), modulation scales
and gates (by a tanh) but never shifts, time runs from noise to data, and picture and caption are each filled up to a
multiple of 32 with a learned token that counts in attention. The caption's filling continues its positions, and the picture
begins behind them; the picture's filling sits at position (0, 0, 0).

That filling of the picture travels at the front of the text stream here, because a mesh splits the tokens and not the text,
and a softmax does not mind the order of its keys. So the text that counts is one prefix:

    text stream  [picture filling | caption | caption filling to a multiple of 32 || not attended to]
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator, model_validator

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.base import QKV, Attend, Place
from smartdiff_jax.kernels.fp8 import Columns, Part
from smartdiff_jax.models.family import Architecture, Conditioning, KeyRule, Rope, linear
from smartdiff_jax.models.layers import RMSNorm, layer_norm, pick_block, stack_blocks, swiglu, timestep_embedding
from smartdiff_jax.models.linear import MLP, Linear, products
from smartdiff_jax.models.modules import (
    Attention,
    Ropes,
    joint_attention,
    module,
    scan_attending,
    scan_shared,
    side_by_side,
)
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.turn import Unturned, turned

# Constants of the architecture, which upstream's configuration does not hold.
MULTIPLE = 32
FREQUENCIES = 256
TIME_HIDDEN = 1024
MAX_TIME_DIM = 256
QK_EPS = 1e-5
HEAD_EPS = 1e-6
NUM_TRAIN_TIMESTEPS = 1000

Triple = tuple[PositiveInt, PositiveInt, PositiveInt]
Streams = tuple[Float[Array, "b s d"], Float[Array, "b l d"]]
StreamRope = tuple[Float[Array, "_ _ r"], Float[Array, "_ _ r"]]
Table = tuple[Float[np.ndarray, "s r"], Float[np.ndarray, "s r"]]
TextTable = tuple[Float[np.ndarray, "l r"], Float[np.ndarray, "l r"]]


class ZImageConfig(BaseModel):
    """The numbers in diffusers' `transformer/config.json`, under diffusers' names.

    A checkpoint may hold embeddings of several patch sizes, in pairs of all_patch_size and all_f_patch_size; (2, 1) is used.
    n_kv_heads and axes_lens decide nothing: upstream never reads the first, and the second only sizes a table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    all_patch_size: tuple[PositiveInt, ...] = (2,)
    all_f_patch_size: tuple[PositiveInt, ...] = (1,)
    in_channels: PositiveInt = 16
    dim: PositiveInt = 3840
    n_layers: PositiveInt = 30
    n_refiner_layers: PositiveInt = 2
    n_heads: PositiveInt = 30
    n_kv_heads: PositiveInt = 30
    norm_eps: PositiveFloat = 1e-5
    qk_norm: bool = True
    cap_feat_dim: PositiveInt = 2560
    siglip_feat_dim: PositiveInt | None = None
    rope_theta: PositiveFloat = 256.0
    t_scale: PositiveFloat = 1000.0
    axes_dims: Triple = (32, 48, 48)
    axes_lens: Triple = (1024, 512, 512)

    @property
    def time_dim(self) -> int:
        return min(self.dim, MAX_TIME_DIM)

    @property
    def feed_forward_dim(self) -> int:
        """Upstream's own rounding."""
        return int(self.dim / 3 * 8)

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, data: Any) -> Any:
        """diffusers adds `_class_name` and the like."""
        return {key: value for key, value in data.items() if not key.startswith("_")} if isinstance(data, dict) else data

    @field_validator("qk_norm", "siglip_feat_dim")
    @classmethod
    def _text_to_image_only(cls, value: Any, info: Any) -> Any:
        served = True if info.field_name == "qk_norm" else None
        if value != served:
            raise InvalidConfig(info.field_name, value, f"only text-to-image Z-Image is served, where it is {served}")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ZImageConfig":
        if (2, 1) not in zip(self.all_patch_size, self.all_f_patch_size, strict=False):
            remedy = f"must hold 2 where all_f_patch_size={self.all_f_patch_size} holds 1: no other patch is served"
            raise InvalidConfig("all_patch_size", self.all_patch_size, remedy)
        if self.dim % self.n_heads:
            raise InvalidConfig("dim", self.dim, f"must be a multiple of n_heads={self.n_heads}")
        if any(dim % 2 for dim in self.axes_dims) or sum(self.axes_dims) != self.dim // self.n_heads:
            remedy = f"must be even numbers that add up to dim / n_heads = {self.dim // self.n_heads}"
            raise InvalidConfig("axes_dims", self.axes_dims, remedy)
        return self


def patches(config: ZImageConfig) -> Patches:
    """Patches of 2 x 2 latent pixels, features ordered (ph, pw, c)."""
    return Patches((1, 2, 2))


def rope(config: ZImageConfig, grid: tuple[int, int, int], num_text: int, text_length: int) -> tuple[Table, TextTable]:
    """Rotary tables of a grid of (frames, rows, columns) tokens and of num_text text states: float32 [n, head_dim / 2] each.

    Text goes along the first axis from 1 on; the frames go on behind the text_length states that are a caption, rounded up
    to a multiple of 32, so that a picture's table depends on how long its caption is. In front of the text's table are the
    rows, at position zero, of what fills the picture up to a multiple of 32 tokens.
    """
    start = _round_up(text_length) + 1
    axes = (start + np.arange(grid[0]), np.arange(grid[1]), np.arange(grid[2]))
    tokens = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    text = np.zeros((-len(tokens) % MULTIPLE + num_text, 3), np.int64)
    text[-num_text:, 0] = 1 + np.arange(num_text)
    return _table(config, tokens), _table(config, text)


def _table(config: ZImageConfig, positions: Int[np.ndarray, "s 3"]) -> Table:
    angles = [
        np.outer(along_axis, config.rope_theta ** (-np.arange(0, dim, 2) / dim))
        for along_axis, dim in zip(positions.T, config.axes_dims, strict=True)
    ]
    table = np.concatenate(angles, axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def _round_up(length: Any) -> Any:
    """A length, or an array of them, to the next multiple of 32."""
    return (length + MULTIPLE - 1) // MULTIPLE * MULTIPLE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZImageContext:
    """What all blocks share.

    time: the embedded timestep, float32. text_rope: of the whole text stream, the picture's filling included.
    filling: rows at the front of the text stream that fill the picture up.
    caption_length: how many states behind the picture's filling count, a multiple of 32; None if all do.
    """

    time: Float[Array, "b t"]
    rope: Rope
    text_rope: StreamRope
    caption_length: Int[Array, " b"] | None
    filling: int = dataclasses.field(metadata={"static": True})


class ZImageModulation(NamedTuple):
    """What multiplies one sublayer's input and its output, float32; 1 where the timestep has no say."""

    scale: Float[Array, "b 1 d"] | float = 1.0
    gate: Float[Array, "b 1 d"] | float = 1.0


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) without biases (arXiv 2002.05202), the activation in float32."""

    def __init__(self, dim: int, hidden: int, rngs: nnx.Rngs, dtype: DTypeLike):
        self.gate = Linear(dim, hidden, rngs, dtype=dtype, use_bias=False)
        self.up = Linear(dim, hidden, rngs, dtype=dtype, use_bias=False)
        self.down = Linear(hidden, dim, rngs, dtype=dtype, use_bias=False)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        taken = self.gate.take(x)
        return self.down.join(Part((Columns(self.gate.product(taken)), Columns(self.up.product(taken))), swiglu))


class ZImageBlock(nnx.Module):
    """One set of parameters for every stream; which streams there are, and who attends to whom, says the caller."""

    def __init__(self, config: ZImageConfig, rngs: nnx.Rngs, dtype: DTypeLike, *, modulated: bool):
        dim, eps, head_dim = config.dim, config.norm_eps, config.dim // config.n_heads
        self.num_heads = config.n_heads
        # Gates that start at zero make a fresh block the identity (adaLN-Zero, arXiv 2212.09748).
        self.modulation = (
            Linear(config.time_dim, 4 * dim, rngs, dtype=dtype, kernel_init=initializers.zeros) if modulated else None
        )
        self.q = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.k = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.v = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.out = Linear(dim, dim, rngs, dtype=dtype, use_bias=False)
        self.q_norm = RMSNorm(head_dim, eps=QK_EPS, dtype=dtype)
        self.k_norm = RMSNorm(head_dim, eps=QK_EPS, dtype=dtype)
        self.attention_norm_in = RMSNorm(dim, eps=eps, dtype=dtype)
        self.attention_norm_out = RMSNorm(dim, eps=eps, dtype=dtype)
        self.feed_forward = SwiGLU(dim, config.feed_forward_dim, rngs, dtype)
        self.feed_forward_norm_in = RMSNorm(dim, eps=eps, dtype=dtype)
        self.feed_forward_norm_out = RMSNorm(dim, eps=eps, dtype=dtype)

    def modulations(self, time: Float[Array, "b t"]) -> tuple[ZImageModulation, ZImageModulation]:
        """Of attention and of the feed-forward."""
        if self.modulation is None:
            return ZImageModulation(), ZImageModulation()
        pieces = jnp.split(self.modulation.project(time)[:, None], 4, axis=-1)
        scales, gates = [1 + piece for piece in pieces[::2]], [jnp.tanh(piece) for piece in pieces[1::2]]
        return ZImageModulation(scales[0], gates[0]), ZImageModulation(scales[1], gates[1])

    def attention_input(self, x: Float[Array, "b n d"], modulation: ZImageModulation) -> Float[Array, "b n d"]:
        return (self.attention_norm_in(x) * modulation.scale).astype(x.dtype)

    def __call__(
        self,
        streams: tuple[Float[Array, "b _ d"], ...],
        ropes: Ropes,
        time: Float[Array, "b t"],
        attention: Attention,
    ) -> tuple[Float[Array, "b _ d"], ...]:
        """streams, each with its rotary table."""
        with jax.named_scope("modulation"):
            of_attention, of_feed_forward = self.modulations(time)
        with jax.named_scope("attention"):

            def qkv() -> list[Unturned]:
                inputs = [self.attention_input(x, of_attention) for x in streams]
                return [self._qkv(x, rope) for x, rope in zip(inputs, ropes, strict=True)]

            outputs = [self.attention_norm_out(self.out(x)) for x in attention(qkv)]
            streams = tuple(_add(x, of_attention.gate * y) for x, y in zip(streams, outputs, strict=True))
        with jax.named_scope("feed_forward"):
            inputs = [self.feed_forward_norm_in(x) * of_feed_forward.scale for x in streams]
            outputs = [self.feed_forward_norm_out(self.feed_forward(x)) for x in inputs]
            return tuple(_add(x, of_feed_forward.gate * y) for x, y in zip(streams, outputs, strict=True))

    def _qkv(self, x: Float[Array, "b n d"], rope: Rope | None) -> Unturned:
        taken = self.q.take(x)
        q, k, v = products(taken, self.q, self.k, self.v)
        return Unturned.of(self.num_heads, rope, (q, self.q_norm), (k, self.k_norm), (v, None))


def _add(x: Float[Array, "b n d"], y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """x + y in float32, in x's dtype."""
    return (x.astype(jnp.float32) + y).astype(x.dtype)


class ZImageRefiner(nnx.Module):
    """One block on the picture and its filling, and one, which the timestep does not touch, on the caption."""

    def __init__(self, config: ZImageConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        self.image = ZImageBlock(config, rngs, dtype, modulated=True)
        self.text = ZImageBlock(config, rngs, dtype, modulated=False)

    def __call__(self, hidden: Streams, context: ZImageContext, attend: Attend) -> Streams:
        tokens, text = hidden
        size = context.filling
        filling, caption = text[:, :size], text[:, size:]
        cos, sin = context.text_rope

        def ready(qkv: Callable[[], Sequence[Unturned]], place: Place) -> QKV:
            return QKV(*turned(attend, qkv()[0], place))

        def of_tokens(qkv: Callable[[], Sequence[Unturned]]) -> tuple[Array]:
            return (module(attend, "self_attention", lambda: side_by_side(attend.self_attention(ready(qkv, "exchanged")))),)

        def of_caption(qkv: Callable[[], Sequence[Unturned]]) -> tuple[Array]:
            def attended() -> Array:
                return side_by_side(attend.text_attention(ready(qkv, "whole"), text_length=context.caption_length))

            return (module(attend, "text_attention", attended),)

        with jax.named_scope("image_refiner"):
            if size:
                ropes = (context.rope, (cos[:, :size], sin[:, :size]))
                joint = partial(joint_attention, attend, text_length=None)
                tokens, filling = self.image((tokens, filling), ropes, context.time, joint)
            else:
                (tokens,) = self.image((tokens,), (context.rope,), context.time, of_tokens)
        with jax.named_scope("text_refiner"):
            (caption,) = self.text(
                (caption,),
                ((cos[:, size:], sin[:, size:]),),
                context.time,
                of_caption,
            )
        return tokens, jnp.concatenate([filling, caption], axis=1)


class ZImageTransformer(nnx.Module):
    """A `Denoiser`: packed latents, timestep (0 to 1000) and text states to the velocity of the packed latents.

    Blocks are counted through: config.n_refiner_layers refiners, of picture and caption at once, then config.n_layers
    single-stream blocks. The padded length of the text is a multiple of 32. How much filling the picture has is told by the
    text's rotary table, which has its rows in front: the token axis may be padded for a mesh.
    """

    def __init__(self, config: ZImageConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim, features = config.dim, math.prod(patches(config).size) * config.in_channels
        normal, zeros = initializers.normal(0.02), initializers.zeros
        self.num_refiners = config.n_refiner_layers
        self.num_blocks = config.n_refiner_layers + config.n_layers
        self.t_scale = config.t_scale
        self.patch_embedding = Linear(features, dim, rngs, dtype=dtype)
        self.text_norm = RMSNorm(config.cap_feat_dim, eps=config.norm_eps, dtype=dtype)
        self.text_embedding = Linear(config.cap_feat_dim, dim, rngs, dtype=dtype)
        self.image_filling = nnx.Param(normal(rngs.params(), (dim,), dtype))
        self.text_filling = nnx.Param(normal(rngs.params(), (dim,), dtype))
        # The timestep is float32 from end to end: bfloat16 cannot tell 999 from 997.
        self.time_embedder = MLP(FREQUENCIES, TIME_HIDDEN, config.time_dim, jax.nn.silu, rngs, kernel_init=normal)
        self.refiners = stack_blocks(lambda rngs: ZImageRefiner(config, rngs, dtype), config.n_refiner_layers, rngs)
        self.blocks = stack_blocks(lambda rngs: ZImageBlock(config, rngs, dtype, modulated=True), config.n_layers, rngs)
        self.head_modulation = Linear(config.time_dim, dim, rngs, dtype=dtype, kernel_init=zeros)
        self.head_projection = Linear(dim, features, rngs, dtype=dtype, kernel_init=zeros)

    def embed(
        self,
        tokens: Float[Array, "b s p"],
        timestep: Float[Array, ""] | Float[Array, " b"],
        conditioning: Conditioning,
    ) -> tuple[Streams, ZImageContext]:
        """Tokens and text to their residual streams, in the kernels' dtype, and the context of all blocks."""
        text_rope, length = conditioning.text_rope, conditioning.text_length
        batch, num_text = tokens.shape[0], conditioning.text.shape[1]
        assert text_rope is not None, "the text of Z-Image has positions: see rope()"
        assert num_text % MULTIPLE == 0, f"the text of Z-Image is padded to a multiple of {MULTIPLE}, not to {num_text}"

        with jax.named_scope("time_embedding"), jax.default_matmul_precision("highest"):
            # From noise to data, and so the other way round than the loop's.
            time = (NUM_TRAIN_TIMESTEPS - jnp.broadcast_to(timestep, (batch,))) / NUM_TRAIN_TIMESTEPS * self.t_scale
            time = self.time_embedder(timestep_embedding(time, FREQUENCIES))

        text = self.text_embedding(self.text_norm(conditioning.text))
        if length is not None:
            counts = jnp.arange(num_text) < length[:, None]
            text = jnp.where(counts[:, :, None], text, self.text_filling[...].astype(text.dtype))
            length = jnp.broadcast_to(_round_up(length), (batch,))
        text = jnp.broadcast_to(text, (batch, num_text, text.shape[-1]))
        size = text_rope[0].shape[1] - num_text
        filling = jnp.broadcast_to(self.image_filling[...].astype(text.dtype), (batch, size, text.shape[-1]))
        context = ZImageContext(
            time=time,
            rope=conditioning.rope,
            text_rope=text_rope,
            caption_length=length,
            filling=size,
        )
        return (self.patch_embedding(tokens), jnp.concatenate([filling, text], axis=1)), context

    def run_blocks(self, hidden: Streams, context: ZImageContext, attend: Attend, lo: int, hi: int) -> Streams:
        """Blocks lo to hi - 1: a scan over the refiners among them, then one over the single-stream blocks."""
        first = self.num_refiners
        length = None if context.caption_length is None else context.caption_length + context.filling

        def refine(block: ZImageRefiner, hidden: Streams, attend: Attend) -> Streams:
            return block(hidden, context, attend)

        def single(block: ZImageBlock, streams: Any, ropes: Ropes, attention: Attention) -> Any:
            return block(streams, ropes, context.time, attention)

        if lo < min(hi, first):
            hidden = scan_attending(self.refiners, lo, min(hi, first), refine, hidden, attend)
        ropes = context.rope, context.text_rope
        lo, hi = max(lo, first) - first, hi - first
        return scan_shared(self.blocks, lo, hi, single, hidden, ropes, length, attend)

    def head(self, hidden: Streams, context: ZImageContext) -> Float[Array, "b s p"]:
        """The picture's residual stream to the float32 velocity of the packed latents."""
        scale = self.head_modulation.project(jax.nn.silu(context.time))[:, None]
        x = layer_norm(hidden[0], HEAD_EPS) * (1 + scale)
        # Upstream predicts data - noise, as its time runs.
        return -self.head_projection(x).astype(jnp.float32)

    def probe(self, hidden: Streams, context: ZImageContext) -> Float[Array, "b s d"]:
        """The picture's modulated input of block 0, a refiner."""
        block = pick_block(self.refiners.image, 0)
        return block.attention_input(hidden[0], block.modulations(context.time)[0])

    def time_embedding(self, context: ZImageContext) -> Float[Array, "b 1 t"]:
        """The embedded timestep, which every block projects itself."""
        return context.time[:, None]


def _linear_rules(key: str, path: str, *, keep_float32: bool = False) -> tuple[KeyRule, KeyRule]:
    return (
        KeyRule(rf"{key}\.weight", f"{path}.kernel", linear, keep_float32),
        KeyRule(rf"{key}\.bias", f"{path}.bias", keep_float32=keep_float32),
    )


def _block_rules(kind: str, path: str, *, modulated: bool) -> tuple[KeyRule, ...]:
    key = rf"{kind}\.(?P<layer>\d+)"
    kernels = {
        r"attention\.to_q": "q",
        r"attention\.to_k": "k",
        r"attention\.to_v": "v",
        r"attention\.to_out\.0": "out",
        r"feed_forward\.w1": "feed_forward.gate",
        r"feed_forward\.w3": "feed_forward.up",
        r"feed_forward\.w2": "feed_forward.down",
    }
    scales = {
        r"attention\.norm_q": "q_norm",
        r"attention\.norm_k": "k_norm",
        "attention_norm1": "attention_norm_in",
        "attention_norm2": "attention_norm_out",
        "ffn_norm1": "feed_forward_norm_in",
        "ffn_norm2": "feed_forward_norm_out",
    }
    return (
        *(KeyRule(rf"{key}\.{name}\.weight", f"{path}.{ours}.kernel", linear) for name, ours in kernels.items()),
        *(KeyRule(rf"{key}\.{name}\.weight", f"{path}.{ours}.scale") for name, ours in scales.items()),
        *(_linear_rules(rf"{key}\.adaLN_modulation\.0", f"{path}.modulation") if modulated else ()),
    )


KEY_RULES = (
    *_linear_rules(r"all_x_embedder\.2-1", "patch_embedding"),
    KeyRule(r"cap_embedder\.0\.weight", "text_norm.scale"),
    *_linear_rules(r"cap_embedder\.1", "text_embedding"),
    KeyRule("x_pad_token", "image_filling", lambda tensor: tensor[0]),
    KeyRule("cap_pad_token", "text_filling", lambda tensor: tensor[0]),
    *_linear_rules(r"t_embedder\.mlp\.0", "time_embedder.linear_1", keep_float32=True),
    *_linear_rules(r"t_embedder\.mlp\.2", "time_embedder.linear_2", keep_float32=True),
    *_block_rules("noise_refiner", "refiners.image", modulated=True),
    *_block_rules("context_refiner", "refiners.text", modulated=False),
    *_block_rules("layers", "blocks", modulated=True),
    *_linear_rules(r"all_final_layer\.2-1\.adaLN_modulation\.1", "head_modulation"),
    *_linear_rules(r"all_final_layer\.2-1\.linear", "head_projection"),
)

ARCHITECTURE = Architecture(
    config=ZImageConfig,
    build=ZImageTransformer,
    key_rules=KEY_RULES,
    ignored_keys=r"all_(x_embedder|final_layer)\.(?!2-1\.).*",
)
