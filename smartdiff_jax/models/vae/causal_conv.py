"""Layers of a causal video autoencoder, and what they remember between the chunks of a clip.

A causal 3-D convolution sees the frame it is at and the two before it, so a clip can be run in chunks if every
convolution is handed the last two frames of its input in the chunk before. Activations are [b t h w c] everywhere, kernels
[kh kw kt i o]: the taps in time beside the channels, so that a 2-D convolution reads them without a copy.

The first latent frame of a clip stands for one pixel frame, every other for `rate`. `Chunk` makes all chunks alike (so every
convolution has one shape, and is tuned once): the first frame gets `rate` frames too, of which all but the last are void and
set to zero where a convolution reads them, which is the zero padding a causal convolution starts with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float


class WholeClip:
    """How layers reach the frames before their input where the input is all there is: zeros lie before its first frame."""

    def extend(self, x: Float[Array, "b t h w c"], frames: int) -> Float[Array, "b t2 h w c"]:
        """x behind the `frames` frames that came before it."""
        return jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))

    def real(self, x: Float[Array, "b t h w c"]) -> Bool[Array, "t 1 1 1"] | None:
        """Which frames of x belong to the clip (None: all of them)."""
        return None

    def upsample_time(self, x: Float[Array, "b t h w c"], conv: "CausalConv3d") -> Float[Array, "b t2 h w c"]:
        """Two frames for each of x, the channels of `conv` split over them, but only one for the clip's first, which
        passes as it is and which `conv` never sees: before the second frame there are zeros."""
        if x.shape[1] == 1:
            return x
        rest = x[:, 1:]
        return jnp.concatenate([x[:, :1], _split_pairs(conv(self.extend(rest, 2)))], axis=1)

    def downsample_time(self, x: Float[Array, "b t h w c"], conv: "CausalConv3d") -> Float[Array, "b t2 h w c"]:
        """Every second frame, from it and the two before; the clip's first passes as it is."""
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], conv(x, time_stride=2)], axis=1)


class Chunk:
    """The same for a few latent frames of a clip.

    `caches`, in the order the layers run, hold what came before (None: zeros, to learn
    their shapes); afterwards `written` holds the same for the chunk that follows.

    first: bool scalar, may be traced: this chunk begins the clip.
    latent_frames: how many latent frames a chunk has; a layer at rate r sees r times as many.
    """

    def __init__(self, caches: tuple[Array, ...] | None, first: Array | bool, latent_frames: int):
        self.caches, self.first, self.latent_frames = caches, first, latent_frames
        self.written: tuple[Array, ...] = ()

    def extend(self, x: Float[Array, "b t h w c"], frames: int) -> Float[Array, "b t2 h w c"]:
        if self.caches is None:
            before = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        else:
            before = self.caches[len(self.written)]
        extended = jnp.concatenate([before, x], axis=1)
        self.written += (extended[:, -frames:],)
        return extended

    def real(self, x: Float[Array, "b t h w c"]) -> Bool[Array, "t 1 1 1"] | None:
        rate = x.shape[1] // self.latent_frames
        return None if rate == 1 else self._from(x, rate - 1)

    def upsample_time(self, x: Float[Array, "b t h w c"], conv: "CausalConv3d") -> Float[Array, "b t2 h w c"]:
        rate = x.shape[1] // self.latent_frames
        behind_first = self._from(x, rate)
        pairs = _split_pairs(conv(self.extend(jnp.where(behind_first, x, 0), 2)))
        return jnp.where(jnp.repeat(behind_first, 2, axis=0), pairs, jnp.repeat(x, 2, axis=1))

    def downsample_time(self, x: Float[Array, "b t h w c"], conv: "CausalConv3d") -> Float[Array, "b t2 h w c"]:
        rate = x.shape[1] // self.latent_frames
        behind_first = self._from(x, rate)[1::2]
        return jnp.where(behind_first, conv(self.extend(x, 1), time_stride=2), x[:, 1::2])

    def _from(self, x: Array, frame: int) -> Bool[Array, "t 1 1 1"]:
        """False for the frames of a first chunk before `frame`."""
        return (jnp.arange(x.shape[1]) >= jnp.where(self.first, frame, 0))[:, None, None, None]


Memory = WholeClip | Chunk


def _split_pairs(x: Float[Array, "b t h w c2"]) -> Float[Array, "b t2 h w c"]:
    """The two halves of the channels become two frames."""
    b, t, h, w, c = x.shape
    return jnp.moveaxis(x.reshape(b, t, h, w, 2, c // 2), 4, 2).reshape(b, 2 * t, h, w, c // 2)


def run_chunks(
    run: Callable[[Array, Memory], Array], x: Float[Array, "b t h w c"], frames: int, latent_frames: int
) -> Float[Array, "b t2 h2 w2 c2"]:
    """`run` over x, `frames` frames (`latent_frames` latent frames) at a time, in one compiled scan."""
    b, t = x.shape[:2]
    chunks = jnp.moveaxis(x.reshape(b, t // frames, frames, *x.shape[2:]), 1, 0)

    def step(caches, chunk_and_first):
        chunk, first = chunk_and_first
        memory = Chunk(caches, first, latent_frames)
        out = run(chunk, memory)
        return memory.written, out

    shapes, _ = jax.eval_shape(step, None, (chunks[0], True))
    caches = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    _, out = lax.scan(step, caches, (chunks, jnp.arange(t // frames) == 0))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(b, -1, *out.shape[3:])


def convolve(x: Float[Array, "b t h w i"], kernel: Float[Array, "kh kw kt i o"]) -> Float[Array, "b t2 h w o"]:
    """A 3-D convolution as a 2-D one: taps in time laid beside the channels, frames as the batch. Returns t - kt + 1 frames.

    On a CPU 35 times as fast as XLA's own 3-D convolutions; on an H100 Wan's decoder takes 783 ms for 81 frames of 832x480.
    `benchmarks/vae.py` has the alternatives.
    """
    kh, kw, kt, i, o = kernel.shape
    b, t = x.shape[0], x.shape[1] - kt + 1
    x = jnp.concatenate([x[:, n : n + t] for n in range(kt)], axis=-1)
    x = conv2d(x.reshape(b * t, *x.shape[2:]), kernel.reshape(kh, kw, kt * i, o))
    return x.reshape(b, t, *x.shape[1:])


def conv2d(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "kh kw i o"],
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Float[Array, "n h2 w2 o"]:
    """2-D convolution, by default with the padding that keeps the size."""
    if padding is None:
        ph, pw = kernel.shape[0] // 2, kernel.shape[1] // 2
        padding = ((ph, ph), (pw, pw))
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class CausalConv3d(nnx.Module):
    """Convolution [kt, k, k] over frames that were extended by the kt - 1 before them. Returns t - kt + 1 frames.

    gain: standard deviation of a fresh layer's output, for an input of 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kt: int, k: int, rngs: nnx.Rngs, gain: float = 1.0):
        init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (k, k, kt, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, x: Float[Array, "b t h w i"], time_stride: int = 1) -> Float[Array, "b t2 h w o"]:
        kernel, bias = self.kernel[...], self.bias[...]
        k, _, kt, i, o = kernel.shape
        if k == 1:  # a matrix product, whatever the layout
            taps = [x[:, n : x.shape[1] - kt + 1 + n : time_stride] for n in range(kt)]
            return jnp.concatenate(taps, axis=-1) @ kernel.reshape(kt * i, o) + bias
        return convolve(x, kernel) + bias


class Conv2d(nnx.Module):
    """3x3 convolution of every frame for itself."""

    def __init__(self, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(
        self,
        x: Float[Array, "b t h w i"],
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
    ) -> Float[Array, "b t h2 w2 o"]:
        b, t = x.shape[:2]
        x = conv2d(x.reshape(b * t, *x.shape[2:]), self.kernel[...], stride, padding) + self.bias[...]
        return x.reshape(b, t, *x.shape[1:])


class RMSNorm(nnx.Module):
    """x / ||x||_2 * sqrt(c) * gamma over the channels, in float32, with what follows in the same pass."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones(channels))

    def __call__(
        self, x: Float[Array, "b t h w c"], *, silu: bool, real: Bool[Array, "t 1 1 1"] | None = None
    ) -> Float[Array, "b t h w c"]:
        """silu: apply it. real: frames to keep; the others become zero."""
        x32 = x.astype(jnp.float32)
        square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        # A pixel of zeros stays zero, with a gradient of zero: the division by 1e-12 there would make it 1e12.
        inverse = jnp.where(square > 1e-24, lax.rsqrt(jnp.maximum(square, 1e-24)), 0)
        y = x32 * inverse * (self.gamma[...].astype(jnp.float32) * x.shape[-1] ** 0.5)
        y = jax.nn.silu(y) if silu else y
        return (y if real is None else jnp.where(real, y, 0)).astype(x.dtype)
