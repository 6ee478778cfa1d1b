"""The picture autoencoders of the FLUX line: 8x8 pixels to one latent, convolutions and one attention in the middle.

`AutoencoderKL` is `diffusers.AutoencoderKL` (https://arxiv.org/abs/2112.10752, section 3.1) as FLUX.1 and Z-Image use it,
`AutoencoderKLFlux2` is `diffusers.AutoencoderKLFlux2`: the same network, but its latents are normalised per channel of their
2x2 patches, by the running statistics of a batch norm. Parameter names are upstream's. Activations are [b h w c], of a window
of the picture where it is decoded by several devices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float
from pydantic import BaseModel, ConfigDict, model_validator

from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.models.family import Architecture, KeyRule
from smartdiff_jax.models.layers import wide_attention
from smartdiff_jax.models.linear import Linear
from smartdiff_jax.models.vae.causal_conv import conv2d
from smartdiff_jax.sharding.windows import WHOLE, Windows, halos

EPS = 1e-6  # of every group norm
REACH = 2  # rows of its input, on either side, that a residual block sees
RESIDUAL_GAIN = 0.1  # of what a fresh residual branch adds: a deep stack starts close to the identity


class _Numbers(BaseModel):
    """What both config.json files share.

    `sample_size`, the size of upstream's tiles, and `force_upcast`, which other pipelines heed, are read and not used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    act_fn: str = "silu"
    latent_channels: int
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, fields: Any) -> Any:
        """Keys such as `_class_name` say who wrote the file."""
        return {k: v for k, v in fields.items() if not k.startswith("_")} if isinstance(fields, dict) else fields

    @model_validator(mode="after")
    def _check_network(self) -> "_Numbers":
        levels = len(self.block_out_channels)
        for field, served in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(self, field) != (served,) * levels:
                raise InvalidConfig(field, getattr(self, field), f"give {levels} times {served}, as in block_out_channels")
        if self.act_fn != "silu":
            raise InvalidConfig("act_fn", self.act_fn, "give silu, the only activation served")
        for field, widths in (
            ("block_out_channels", self.block_out_channels),
            ("decoder_block_out_channels", self.decoder_widths),
        ):
            if len(widths) != levels or any(width % self.norm_num_groups for width in widths):
                remedy = f"give {levels} multiples of norm_num_groups={self.norm_num_groups}"
                raise InvalidConfig(field, widths, remedy)
        return self

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder at each scale, the finest first."""
        return self.block_out_channels

    @property
    def z_dim(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    @property
    def spatial_stride(self) -> int:
        """Pixels along a side to one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_stride(self) -> int:
        """0: there is one frame, however many latent frames were asked for."""
        return 0


class AutoencoderKLConfig(_Numbers):
    """config.json of diffusers' AutoencoderKL, its fields and its defaults."""

    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _check_normalisation(self) -> "AutoencoderKLConfig":
        if self.scaling_factor <= 0:
            raise InvalidConfig("scaling_factor", self.scaling_factor, "give a positive number")
        for field in ("latents_mean", "latents_std"):
            if getattr(self, field) is not None:
                raise InvalidConfig(
                    field, getattr(self, field), "leave it out: only scaling_factor and shift_factor are served"
                )
        return self


class AutoencoderKLFlux2Config(_Numbers):
    """config.json of diffusers' AutoencoderKLFlux2, its fields and its defaults; `batch_norm_momentum` is for training."""

    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[int, int] = (2, 2)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels


class GroupNorm(nnx.Module):
    """Group norm over height, width and the channels of a group, with what follows in the same pass; statistics in float32."""

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"], windows: Windows = WHOLE, *, silu: bool) -> Float[Array, "b h w c"]:
        """silu: apply it."""
        x32 = x.astype(jnp.float32)
        own = windows.own(x32)
        # Means of channels first and of groups after: a sum down the columns of an array is one that a GPU does fast.
        mean = self._of_groups(jnp.mean(own, axis=(1, 2)))
        variance = self._of_groups(jnp.mean(jnp.square(own - mean), axis=(1, 2)))
        mean, variance = windows.pooled(mean, variance)
        scale = self.scale[...].astype(jnp.float32) * lax.rsqrt(variance + EPS)
        y = (x32 - mean) * scale + self.bias[...].astype(jnp.float32)
        return (jax.nn.silu(y) if silu else y).astype(x.dtype)

    def _of_groups(self, means: Float[Array, "b c"]) -> Float[Array, "b 1 1 c"]:
        """Means of channels to those of their groups."""
        b, c = means.shape
        grouped = jnp.mean(means.reshape(b, self.groups, -1), axis=-1)
        return jnp.repeat(grouped, c // self.groups, axis=-1)[:, None, None]


def _init(gain: float = 1.0) -> Initializer:
    """gain: standard deviation of a fresh layer's output, for an input of 1."""
    return nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")


class Conv(nnx.Module):
    """3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, rngs: nnx.Rngs, gain: float = 1.0):
        self.kernel = nnx.Param(_init(gain)(rngs.params(), (3, 3, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return conv2d(x, self.kernel[...]) + self.bias[...]


class ResnetBlock(nnx.Module):
    """Two convolutions, each behind norm and SiLU, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = Conv(in_channels, out_channels, rngs)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv(out_channels, out_channels, rngs, gain=RESIDUAL_GAIN)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else Linear(in_channels, out_channels, rngs, kernel_init=_init())

    def __call__(self, x: Float[Array, "b h w i"], windows: Windows = WHOLE) -> Float[Array, "b h w o"]:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(self.norm1(x, windows, silu=True))
        return self.conv2(self.norm2(x, windows, silu=True)) + shortcut


class AttentionBlock(nnx.Module):
    """Self-attention of all pixels, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, rngs, kernel_init=_init()) for _ in range(3))
        self.to_out = Linear(channels, channels, rngs, kernel_init=_init(RESIDUAL_GAIN))

    def __call__(self, x: Float[Array, "b h w c"], windows: Windows = WHOLE) -> Float[Array, "b h w c"]:
        """Of windows without a halo."""
        y = self.group_norm(x, windows, silu=False)
        # Gathered once, before keys and values are two of it.
        y, whole = (pixels.reshape(x.shape[0], -1, x.shape[-1]) for pixels in (y, windows.gathered(y)))
        return x + self.to_out(wide_attention(self.to_q(y), self.to_k(whole), self.to_v(whole))).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual, attention, residual, at the size of the latents."""

    def __init__(self, channels: int, config: _Numbers, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs) for _ in range(2)])
        attends = config.mid_block_add_attention
        self.attentions = nnx.List([AttentionBlock(channels, groups, rngs)] if attends else [])

    def __call__(
        self, x: Float[Array, "b h w c"], windows: Windows = WHOLE, halo: int = 0
    ) -> tuple[Float[Array, "b h2 w2 c"], Windows]:
        """halo: of the windows that come out."""
        x, windows = windows.crop(self.resnets[0](x, windows), 0)
        for attention in self.attentions:
            x = attention(x, windows)
        x, windows = windows.refreshed(x, halo + REACH)
        return windows.crop(self.resnets[1](x, windows), halo)


class Downsample(Conv):
    """Half the height and width."""

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return conv2d(x, self.kernel[...], stride=2, padding=((0, 1), (0, 1))) + self.bias[...]


class Upsample(Conv):
    """Twice the height and width."""

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return super().__call__(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Level(nnx.Module):
    """Residual blocks at one size, then the step to the next (None: there is none)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, step: type[Conv] | None, rngs: nnx.Rngs):
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nnx.List([ResnetBlock(i, o, groups, rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)])
        self.step = None if step is None else step(out_channels, out_channels, rngs)

    def __call__(
        self, x: Float[Array, "b h w i"], windows: Windows = WHOLE, halo: int = 0
    ) -> tuple[Float[Array, "b h2 w2 o"], Windows]:
        """halo: of the windows behind the residual blocks, which the step doubles."""
        for block in self.resnets:
            x = block(x, windows)
        x, windows = windows.crop(x, halo)
        return (x, windows) if self.step is None else (self.step(x), windows.doubled())


def _levels(widths: tuple[int, ...], blocks: int, groups: int, step: type[Conv], rngs: nnx.Rngs) -> nnx.List:
    """A level for each width, all but the last with a step behind it."""
    steps = [step] * (len(widths) - 1) + [None]
    ends = zip((widths[0], *widths[:-1]), widths, steps, strict=True)
    return nnx.List([Level(i, o, blocks, groups, step, rngs) for i, o, step in ends])


class Encoder(nnx.Module):
    """Pixels to the two halves (mean, log-variance) of the posterior, before `quant_conv`."""

    def __init__(self, config: _Numbers, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], rngs)
        self.down_blocks = _levels(widths, config.layers_per_block, groups, Downsample, rngs)
        self.mid_block = MidBlock(widths[-1], config, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)[0], silu=True))


class Decoder(nnx.Module):
    """Latents behind `post_quant_conv` to pixels."""

    def __init__(self, config: _Numbers, rngs: nnx.Rngs):
        widths, groups = config.decoder_widths[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], rngs)
        self.mid_block = MidBlock(widths[0], config, rngs)
        self.up_blocks = _levels(widths, config.layers_per_block + 1, groups, Upsample, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], config.out_channels, rngs)

    def __call__(self, x: Float[Array, "b h w i"], windows: Windows = WHOLE) -> Float[Array, "b h2 w2 o"]:
        """x is whole; what comes out is the device's own piece."""
        behind, ahead = halos([REACH * len(block.resnets) for block in self.up_blocks])
        windows = windows.with_halo(1 + REACH)
        x, windows = self.mid_block(self.conv_in(windows.cut(x)), windows, ahead)
        for block, halo in zip(self.up_blocks, behind, strict=True):
            x, windows = block(x, windows, halo)
        return windows.own(self.conv_out(self.conv_norm_out(x, windows, silu=True)))


class PictureVAE(nnx.Module):
    """Latents are [b c 1 h w], pixels [b 1 height width 3], about -1 to 1, not clipped. Computes in the dtype of its weights.

    A picture is a clip of one frame, so that whatever decodes clips decodes pictures; `chunk` is there for the same reason and
    changes nothing.
    """

    def __init__(self, config: _Numbers, rngs: nnx.Rngs):
        c = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.quant_conv = Linear(2 * c, 2 * c, rngs, kernel_init=_init()) if config.use_quant_conv else None
        self.post_quant_conv = Linear(c, c, rngs, kernel_init=_init()) if config.use_post_quant_conv else None
        self.decoder = Decoder(config, rngs)

    def statistics(self, h: int, w: int) -> tuple[Float[Array, "*c"], Float[Array, "*c"]]:
        """Mean and standard deviation of latents h x w, float32, in a shape that broadcasts with them."""
        raise NotImplementedError

    def normalize(self, latents: Float[Array, "b c f h w"]) -> Float[Array, "b c f h w"]:
        """Latents of the posterior to those the denoiser knows, of mean 0 and variance 1; float32."""
        mean, std = self.statistics(*latents.shape[3:])
        return (latents - mean) / std

    def denormalize(self, latents: Float[Array, "b c f h w"]) -> Float[Array, "b c f h w"]:
        """Undoes `normalize`."""
        mean, std = self.statistics(*latents.shape[3:])
        return latents * std + mean

    def decode(
        self, latents: Float[Array, "b c f h w"], *, chunk: int | None = None, windows: Windows = WHOLE
    ) -> Float[Array, "b f height width rgb"]:
        """Normalised latents, whole, to a picture, or to the device's piece. Raises InvalidRequest for several frames."""
        _check_one_frame(latents.shape[2])
        x = jnp.moveaxis(self.denormalize(latents)[:, :, 0], 1, -1).astype(self.decoder.conv_in.kernel.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self.decoder(x, windows)[:, None]

    def encode(
        self, pixels: Float[Array, "b f height width rgb"], *, chunk: int | None = None
    ) -> tuple[Float[Array, "b c f h w"], Float[Array, "b c f h w"]]:
        """A picture, sides divisible by spatial_stride, to the mean and the logarithm of the variance of the posterior, not
        normalised. Raises InvalidRequest if the sizes do not fit."""
        _, frames, height, width, _ = pixels.shape
        _check_one_frame(frames)
        _check_sides(height, width, (self.config.spatial_stride, self.config.spatial_stride))
        x = self.encoder(pixels[:, 0].astype(self.encoder.conv_in.kernel.dtype))
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, logvar = jnp.split(jnp.moveaxis(x, -1, 1)[:, :, None], 2, axis=1)
        return mean, jnp.clip(logvar, -30.0, 20.0)


class AutoencoderKL(PictureVAE):
    """The VAE of FLUX.1 and Z-Image: one mean and one deviation for all latents."""

    def __init__(self, config: AutoencoderKLConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.mean, self.std = config.shift_factor or 0.0, 1 / config.scaling_factor

    def statistics(self, h: int, w: int) -> tuple[Float[Array, "*c"], Float[Array, "*c"]]:
        return jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)


class LatentNorm(nnx.Module):
    """Running statistics of the channels of a patch, which are in the order (c, row, column)."""

    def __init__(self, channels: int):
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.variance = nnx.BatchStat(jnp.ones(channels))


class AutoencoderKLFlux2(PictureVAE):
    """The VAE of FLUX.2: a mean and a deviation for every latent of a patch. Latents are not packed into patches here, but
    their height and width must be divisible by one's."""

    def __init__(self, config: AutoencoderKLFlux2Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.patch_size, self.eps = config.patch_size, config.batch_norm_eps
        self.latent_norm = LatentNorm(config.latent_channels * math.prod(config.patch_size))

    def statistics(self, h: int, w: int) -> tuple[Float[Array, "*c"], Float[Array, "*c"]]:
        stride, (rows, columns) = self.config.spatial_stride, self.patch_size
        _check_sides(h * stride, w * stride, (rows * stride, columns * stride))

        def everywhere(numbers: Float[Array, " p"]) -> Float[Array, "c 1 h w"]:
            patch = numbers.astype(jnp.float32).reshape(-1, 1, rows, columns)
            return jnp.tile(patch, (1, 1, h // rows, w // columns))

        return everywhere(self.latent_norm.mean[...]), everywhere(jnp.sqrt(self.latent_norm.variance[...] + self.eps))


def _check_one_frame(frames: int) -> None:
    if frames != 1:
        raise InvalidRequest("frames", frames, "give 1: this autoencoder is one for pictures")


def _check_sides(height: int, width: int, multiples: tuple[int, int]) -> None:
    if height % multiples[0] or width % multiples[1]:
        raise InvalidRequest(
            "size", f"{width}x{height}", f"give a width divisible by {multiples[1]}, a height by {multiples[0]}"
        )


def _kernel2d(tensor: np.ndarray) -> np.ndarray:
    """[o i h w] to [h w i o]."""
    return tensor.transpose(2, 3, 1, 0)


def _matrix(tensor: np.ndarray) -> np.ndarray:
    """[o i] or [o i 1 1] to [i o]."""
    return tensor.reshape(tensor.shape[:2]).T


_CONV = r"(?P<module>.+\.(?:conv_in|conv_out|conv1|conv2))"
_STEP = r"(?P<module>.+)\.(?:down|up)samplers\.0\.conv"
_LINEAR = r"(?P<module>(?:.+\.)?(?:quant_conv|post_quant_conv|conv_shortcut|to_q|to_k|to_v|to_out))(?:\.0)?"
_NORM = r"(?P<module>.+\.(?:norm1|norm2|group_norm|conv_norm_out))"

KEY_RULES = (
    KeyRule(rf"{_CONV}\.weight", r"\g<module>.kernel", _kernel2d),
    KeyRule(rf"{_CONV}\.bias", r"\g<module>.bias"),
    KeyRule(rf"{_STEP}\.weight", r"\g<module>.step.kernel", _kernel2d),
    KeyRule(rf"{_STEP}\.bias", r"\g<module>.step.bias"),
    KeyRule(rf"{_LINEAR}\.weight", r"\g<module>.kernel", _matrix),
    KeyRule(rf"{_LINEAR}\.bias", r"\g<module>.bias"),
    KeyRule(rf"{_NORM}\.weight", r"\g<module>.scale"),
    KeyRule(rf"{_NORM}\.bias", r"\g<module>.bias"),
)
FLUX2_KEY_RULES = (
    *KEY_RULES,
    KeyRule(r"bn\.running_mean", "latent_norm.mean", keep_float32=True),
    KeyRule(r"bn\.running_var", "latent_norm.variance", keep_float32=True),
)

ARCHITECTURE = Architecture(config=AutoencoderKLConfig, build=AutoencoderKL, key_rules=KEY_RULES)
FLUX2_ARCHITECTURE = Architecture(
    config=AutoencoderKLFlux2Config,
    build=AutoencoderKLFlux2,
    key_rules=FLUX2_KEY_RULES,
    ignored_keys=r"bn\.num_batches_tracked",  # how many batches the running statistics are over
)
