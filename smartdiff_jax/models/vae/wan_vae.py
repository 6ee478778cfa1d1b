"""The causal 3-D autoencoder of Wan2.1 (also of Wan2.2-A14B): 1 + 4(f - 1) frames to f latent frames, 8x8 pixels to one.

Follows `diffusers.AutoencoderKLWan`, whose parameter names it keeps (https://arxiv.org/abs/2503.20314, section 4.1).
Upstream walks over the latent frames in Python and remembers the last frames of every convolution in a list; here the walk is
one `lax.scan` with that list as its carry, and a short clip can be run whole. Both are the same function.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import BaseModel, ConfigDict, model_validator

from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.models.family import Architecture, KeyRule
from smartdiff_jax.models.layers import wide_attention
from smartdiff_jax.models.vae.causal_conv import CausalConv3d, Conv2d, Memory, RMSNorm, WholeClip, run_chunks
from smartdiff_jax.sharding.windows import WHOLE, Windows, halos

REACH = 2  # rows of its input, on either side, that a residual block sees
RESIDUAL_GAIN = 0.1  # of what a fresh residual branch adds: a deep stack starts close to the identity

_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class WanVAEConfig(BaseModel):
    """config.json of diffusers' AutoencoderKLWan, its fields and its defaults.

    The strides follow from `dim_mult` and `temperal_downsample` (upstream's spelling); `scale_factor_temporal` and
    `scale_factor_spatial`, which repeat them, and `dropout`, which is for training upstream, are read and not used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _WAN_MEAN
    latents_std: tuple[float, ...] = _WAN_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = None
    scale_factor_spatial: int | None = None
    clip_output: bool = True

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, fields: Any) -> Any:
        """Keys such as `_class_name` say who wrote the file."""
        return {k: v for k, v in fields.items() if not k.startswith("_")} if isinstance(fields, dict) else fields

    @model_validator(mode="after")
    def _check(self) -> "WanVAEConfig":
        if self.is_residual:
            raise InvalidConfig("is_residual", True, "the VAE of Wan2.2-5B is not served; use the one of Wan2.1")
        if self.patch_size not in (None, 1):
            raise InvalidConfig("patch_size", self.patch_size, "the VAE of Wan2.2-5B is not served; use Wan2.1's")
        if self.attn_scales:
            raise InvalidConfig("attn_scales", self.attn_scales, "leave it empty: no Wan VAE has attention per scale")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            remedy = f"give one entry less than dim_mult={self.dim_mult}"
            raise InvalidConfig("temperal_downsample", self.temperal_downsample, remedy)
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise InvalidConfig(name, getattr(self, name), f"give z_dim={self.z_dim} numbers")
        if min(self.latents_std) <= 0:
            raise InvalidConfig("latents_std", self.latents_std, "give positive numbers")
        return self

    @property
    def temporal_stride(self) -> int:
        """Pixel frames to a latent frame (the first latent frame stands for one)."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels along a side to one latent."""
        return 2 ** (len(self.dim_mult) - 1)


class Still(WholeClip):
    """The memory of a clip of one frame: before it are only zeros, so kernels are cut to fit it, and nothing is added."""

    def extend(self, x: Float[Array, "b t h w c"], frames: int) -> Float[Array, "b t h w c"]:
        return x


class ResidualBlock(nnx.Module):
    """Two causal convolutions, each behind norm and SiLU, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3, 3, rngs)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3, 3, rngs, gain=RESIDUAL_GAIN)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1, 1, rngs) if in_dim != out_dim else None

    def __call__(self, x: Float[Array, "b t h w i"], memory: Memory) -> Float[Array, "b t h w o"]:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        real = memory.real(x)
        x = self.conv1(memory.extend(self.norm1(x, silu=True, real=real), 2))
        x = self.conv2(memory.extend(self.norm2(x, silu=True, real=real), 2))
        return x + shortcut


class Linear(nnx.Module):
    """A 1x1 convolution."""

    def __init__(self, in_dim: int, out_dim: int, rngs: nnx.Rngs, gain: float = 1.0):
        init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros(out_dim))

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        return x @ self.kernel[...] + self.bias[...]


class AttentionBlock(nnx.Module):
    """Self-attention within each frame, one head as wide as the channels."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim)
        self.to_qkv = Linear(dim, 3 * dim, rngs)
        self.proj = Linear(dim, dim, rngs, gain=RESIDUAL_GAIN)

    def __call__(self, x: Float[Array, "b t h w c"], windows: Windows = WHOLE) -> Float[Array, "b t h w c"]:
        """Of windows without a halo."""
        b, t, _, _, c = x.shape
        # Gathered before it is projected: keys and values are two of it.
        whole = windows.gathered(self.norm(x, silu=False))
        q, k, v = jnp.split(self.to_qkv(whole), 3, axis=-1)
        q, k, v = (pixels.reshape(b * t, -1, c) for pixels in (windows.cut(q), k, v))
        return x + self.proj(wide_attention(q, k, v)).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual, attention, residual, at the size of the latents."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(dim, dim, rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(dim, rngs)])

    def __call__(
        self, x: Float[Array, "b t h w c"], memory: Memory, windows: Windows = WHOLE, halo: int = 0
    ) -> tuple[Float[Array, "b t h2 w2 c"], Windows]:
        """halo: of the windows that come out."""
        x, windows = windows.crop(self.resnets[0](x, memory), 0)
        x, windows = windows.refreshed(self.attentions[0](x, windows), halo + REACH)
        return windows.crop(self.resnets[1](x, memory), halo)


class Downsample(nnx.Module):
    """Half the height and width, and half the frames if `temporal`."""

    def __init__(self, dim: int, temporal: bool, rngs: nnx.Rngs):
        self.resample = Conv2d(dim, dim, rngs)
        self.time_conv = CausalConv3d(dim, dim, 3, 1, rngs) if temporal else None

    def __call__(self, x: Float[Array, "b t h w c"], memory: Memory) -> Float[Array, "b t2 h2 w2 c"]:
        x = self.resample(x, stride=2, padding=((0, 1), (0, 1)))
        return x if self.time_conv is None else memory.downsample_time(x, self.time_conv)


class Upsample(nnx.Module):
    """Twice the height and width in half the channels, and twice the frames if `temporal`."""

    def __init__(self, dim: int, temporal: bool, rngs: nnx.Rngs):
        self.resample = Conv2d(dim, dim // 2, rngs)
        self.time_conv = CausalConv3d(dim, 2 * dim, 3, 1, rngs) if temporal else None

    def __call__(self, x: Float[Array, "b t h w c"], memory: Memory) -> Float[Array, "b t2 h2 w2 c2"]:
        if self.time_conv is not None:
            x = memory.upsample_time(x, self.time_conv)
        return self.resample(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


class Encoder(nnx.Module):
    """Pixels to the two halves (mean, log-variance) of the posterior, before `quant_conv`."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs):
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, dims[0], 3, 3, rngs)
        blocks = []
        for level, (dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            for n in range(config.num_res_blocks):
                blocks.append(ResidualBlock(dim if n == 0 else out_dim, out_dim, rngs))
            if level < len(config.temperal_downsample):
                blocks.append(Downsample(out_dim, config.temperal_downsample[level], rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(dims[-1], rngs)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, 3, 3, rngs)

    def __call__(self, x: Float[Array, "b t h w i"], memory: Memory) -> Float[Array, "b t2 h2 w2 o"]:
        x = self.conv_in(memory.extend(x, 2))
        for block in self.down_blocks:
            x = block(x, memory)
        x, _ = self.mid_block(x, memory)
        return self.conv_out(memory.extend(self.norm_out(x, silu=True, real=memory.real(x)), 2))


class UpBlock(nnx.Module):
    """One scale of the decoder: residual blocks, then the step to the next scale (`temporal` None: the last one)."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, temporal: bool | None, rngs: nnx.Rngs):
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nnx.List([ResidualBlock(i, o, rngs) for i, o in zip(dims[:-1], dims[1:], strict=True)])
        self.upsamplers = nnx.List([] if temporal is None else [Upsample(out_dim, temporal, rngs)])

    def __call__(
        self, x: Float[Array, "b t h w i"], memory: Memory, windows: Windows = WHOLE, halo: int = 0
    ) -> tuple[Float[Array, "b t2 h2 w2 o"], Windows]:
        """halo: of the windows behind the residual blocks, which the step doubles."""
        for block in self.resnets:
            x = block(x, memory)
        x, windows = windows.crop(x, halo)
        for step in self.upsamplers:
            x, windows = step(x, memory), windows.doubled()
        return x, windows


class Decoder(nnx.Module):
    """Latents behind `post_quant_conv` to pixels."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs):
        base_dim = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        dims = [base_dim * m for m in reversed(config.dim_mult)]
        in_dims = [dims[0]] + [dim // 2 for dim in dims[:-1]]
        steps: list[bool | None] = [*reversed(config.temperal_downsample), None]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3, 3, rngs)
        self.mid_block = MidBlock(dims[0], rngs)
        self.up_blocks = nnx.List(
            [UpBlock(i, o, config.num_res_blocks, temporal, rngs) for i, o, temporal in zip(in_dims, dims, steps, strict=True)]
        )
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, 3, 3, rngs)

    def __call__(self, x: Float[Array, "b t h w i"], memory: Memory, windows: Windows = WHOLE) -> Float[Array, "b t2 h2 w2 o"]:
        """x is whole; what comes out is the device's own piece."""
        behind, ahead = halos([REACH * len(block.resnets) for block in self.up_blocks])
        windows = windows.with_halo(1 + REACH)
        x, windows = self.mid_block(self.conv_in(memory.extend(windows.cut(x), 2)), memory, windows, ahead)
        for block, halo in zip(self.up_blocks, behind, strict=True):
            x, windows = block(x, memory, windows, halo)
        x = self.conv_out(memory.extend(self.norm_out(x, silu=True, real=memory.real(x)), 2))
        return windows.own(x)


class WanVAE(nnx.Module):
    """Latents are [b c f h w], pixels [b frames height width 3] in [-1, 1]. Computes in the dtype of its weights.

    `chunk` (static) is how many latent frames a step of the scan takes, None for the whole clip at once: the fastest for a
    clip that fits, and what to train with. The memory of a pass follows the chunk, not the clip.
    """

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1, 1, rngs)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1, 1, rngs)
        self.decoder = Decoder(config, rngs)

    def normalize(self, latents: Float[Array, "b c f h w"]) -> Float[Array, "b c f h w"]:
        """Latents of the posterior to those the denoiser knows, of mean 0 and variance 1; float32."""
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalize(self, latents: Float[Array, "b c f h w"]) -> Float[Array, "b c f h w"]:
        """Undoes `normalize`."""
        mean, std = self._statistics()
        return latents * std + mean

    def decode(
        self, latents: Float[Array, "b c f h w"], *, chunk: int | None = 1, windows: Windows = WHOLE
    ) -> Float[Array, "b frames height width rgb"]:
        """Normalised latents, whole, to 1 + (f - 1) * temporal_stride frames, or to the device's piece of them."""
        x = jnp.moveaxis(self.denormalize(latents), 1, -1)
        x = self.post_quant_conv(x.astype(self.post_quant_conv.kernel.dtype))
        frames, stride = x.shape[1], self.config.temporal_stride
        if frames == 1:
            pixels = self._for_still()._decode(x, Still(), windows)
        elif stride == 0:
            raise InvalidRequest("frames", frames, "give 1: this autoencoder is one for pictures")
        elif chunk is None or frames <= chunk:
            pixels = self._decode(x, WholeClip(), windows)
        else:
            pixels = run_chunks(partial(self._decode, windows=windows), _pad_frames(x, 0, -frames % chunk), chunk, chunk)
            pixels = pixels[:, stride - 1 : frames * stride]
        return pixels

    def encode(
        self, pixels: Float[Array, "b frames height width rgb"], *, chunk: int | None = 1
    ) -> tuple[Float[Array, "b c f h w"], Float[Array, "b c f h w"]]:
        """1 + k * temporal_stride frames, sides divisible by spatial_stride, to the mean and the logarithm of the variance
        of the posterior, not normalised. Raises InvalidRequest if the sizes do not fit."""
        _, count, height, width, _ = pixels.shape
        stride, side = self.config.temporal_stride, self.config.spatial_stride
        if count != 1 and (stride == 0 or count == 0 or (count - 1) % stride):
            remedy = f"give 1 + k * {stride} frames" if stride else "give 1: this autoencoder is one for pictures"
            raise InvalidRequest("frames", count, remedy)
        if height % side or width % side:
            raise InvalidRequest("size", f"{width}x{height}", f"give sides divisible by {side}")
        x, frames = pixels.astype(self.quant_conv.kernel.dtype), 1 if count == 1 else 1 + (count - 1) // stride
        if frames == 1:
            x = self._for_still().encoder(x, Still())
        elif chunk is None or frames <= chunk:
            x = self.encoder(x, WholeClip())
        else:
            x = _pad_frames(x, stride - 1, (-frames % chunk) * stride)
            x = run_chunks(self.encoder, x, chunk * stride, chunk)[:, :frames]
        mean, logvar = jnp.split(jnp.moveaxis(self.quant_conv(x), -1, 1), 2, axis=1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def _decode(self, x: Float[Array, "b t h w c"], memory: Memory, windows: Windows) -> Float[Array, "b t2 h2 w2 rgb"]:
        pixels = self.decoder(x, memory, windows)
        return jnp.clip(pixels, -1.0, 1.0) if self.config.clip_output else pixels

    def _for_still(self) -> "WanVAE":
        """This model with the kernels that a `Still` needs: of their taps in time the last, a third of the arithmetic."""
        graphdef, state = nnx.split(self)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[:, :, -1:] if leaf.ndim == 5 else leaf, state))

    def _statistics(self) -> tuple[Float[Array, "c 1 1 1"], Float[Array, "c 1 1 1"]]:
        mean, std = (jnp.asarray(n, jnp.float32) for n in (self.config.latents_mean, self.config.latents_std))
        return mean[:, None, None, None], std[:, None, None, None]


def _pad_frames(x: Float[Array, "b t h w c"], before: int, after: int) -> Float[Array, "b t2 h w c"]:
    return jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))


def _kernel3d(tensor: np.ndarray) -> np.ndarray:
    """[o i t h w] to [h w t i o]."""
    return tensor.transpose(3, 4, 2, 1, 0)


def _kernel2d(tensor: np.ndarray) -> np.ndarray:
    """[o i h w] to [h w i o]."""
    return tensor.transpose(2, 3, 1, 0)


def _kernel1x1(tensor: np.ndarray) -> np.ndarray:
    """[o i 1 1] to [i o]."""
    return tensor.reshape(tensor.shape[:2]).T


def _vector(tensor: np.ndarray) -> np.ndarray:
    """[c 1 1 1] or [c 1 1] to [c]."""
    return tensor.reshape(-1)


_CONV3D = r"(?P<module>(?:.+\.)?(?:conv_in|conv_out|conv1|conv2|conv_shortcut|time_conv|quant_conv|post_quant_conv))"
_CONV2D = r"(?P<module>.+\.resample)\.1"
_CONV1X1 = r"(?P<module>.+\.(?:to_qkv|proj))"

KEY_RULES = (
    KeyRule(r"(?P<module>.+)\.gamma", r"\g<module>.gamma", _vector),
    KeyRule(rf"{_CONV3D}\.weight", r"\g<module>.kernel", _kernel3d),
    KeyRule(rf"{_CONV3D}\.bias", r"\g<module>.bias"),
    KeyRule(rf"{_CONV2D}\.weight", r"\g<module>.kernel", _kernel2d),
    KeyRule(rf"{_CONV2D}\.bias", r"\g<module>.bias"),
    KeyRule(rf"{_CONV1X1}\.weight", r"\g<module>.kernel", _kernel1x1),
    KeyRule(rf"{_CONV1X1}\.bias", r"\g<module>.bias"),
)

ARCHITECTURE = Architecture(config=WanVAEConfig, build=WanVAE, key_rules=KEY_RULES)
