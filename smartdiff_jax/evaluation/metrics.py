"""Likeness of two clips and steadiness of one, on the device: PSNR, SSIM, MS-SSIM, flicker. float32, pixels from 0 to 1.

Windows stay inside the picture: a border whose neighbours would be made up is not counted, as scikit-image and piqa
have it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from smartdiff_jax.errors import InvalidRequest

Clip = UInt8[np.ndarray, "_ _ _ 3"]
"""Frames, height, width and colours; two of one shape, or they are refused."""

SIGMA, WINDOW = 1.5, 11
"""Of the Gaussian window of SSIM, in pixels."""

C1, C2 = 0.01**2, 0.03**2
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of MS-SSIM's scales, the finest first (Wang, Simoncelli and Bovik 2003)."""

LEAST_SIDE = WINDOW << (len(SCALES) - 1)
"""Pixels of the shorter side under which MS-SSIM's coarsest scale is smaller than the window."""


def psnr(a: Clip, b: Clip) -> float:
    """Peak signal to noise ratio in dB over all frames; infinite for equal ones."""
    check_shapes(a, b)
    # Whole numbers: exact in integers, where float32 sums of millions would not be.
    error = np.mean(np.square(a.astype(np.int32) - b.astype(np.int32)), dtype=np.float64)
    return float(10 * np.log10(255.0**2 / error)) if error > 0 else float("inf")


def ssim(a: Clip, b: Clip) -> float:
    """Structural similarity (Wang et al. 2004), mean over pixels, channels and frames. Needs 11 pixels a side."""
    check_shapes(a, b)
    check_side("ssim", a, WINDOW)
    return _over_frames(_of_one_scale, a, b)


def ms_ssim(a: Clip, b: Clip) -> float:
    """SSIM over five scales, contrast at all of them and brightness at the coarsest (Wang et al. 2003), mean over frames.

    Raises InvalidRequest for pictures under 176 pixels a side.
    """
    check_shapes(a, b)
    check_side("ms_ssim", a, LEAST_SIDE)
    return _over_frames(_of_scales, a, b)


def flicker(a: Clip) -> float:
    """Mean absolute difference of neighbouring frames, 0 to 1: motion and flicker together. 0 for a picture."""
    if len(a) < 2:
        return 0.0
    return float(np.mean([np.abs(y.astype(np.int32) - x).mean() for x, y in zip(a[:-1], a[1:], strict=True)]) / 255)


METRICS: dict[str, Callable[[Clip, Clip], float]] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


def _of_one_scale(x: Float[Array, "h w 3"], y: Float[Array, "h w 3"]) -> Float[Array, ""]:
    return jnp.mean(_average(_similarity(x, y)[0]))


def _of_scales(x: Float[Array, "h w 3"], y: Float[Array, "h w 3"]) -> Float[Array, ""]:
    found = jnp.ones(3)
    for scale, weight in enumerate(SCALES):
        if scale:
            x, y = _halved(x), _halved(y)
        whole, contrast = _similarity(x, y)
        last = scale == len(SCALES) - 1
        found *= jnp.maximum(_average(whole if last else contrast), 0.0) ** weight
    return jnp.mean(found)


def _average(x: Float[Array, "h w 3"]) -> Float[Array, "3"]:
    """Row by row: one sum over all pixels would lose the fifth digit in float32."""
    return jnp.mean(jnp.mean(x, axis=1), axis=0)


def _similarity(x: Float[Array, "h w 3"], y: Float[Array, "h w 3"]) -> tuple[Array, Array]:
    """SSIM at every place of the window, and its part that knows contrast and structure alone."""
    # What both have in common is taken off first: squares of it would drown variances in float32.
    level = jnp.mean(_average(x) + _average(y)) / 2
    x, y = x - level, y - level
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    contrast = (2 * (_blurred(x * y) - mean_x * mean_y) + C2) / (var_x + var_y + C2)
    mean_x, mean_y = mean_x + level, mean_y + level
    return (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1) * contrast, contrast


def _blurred(x: Float[Array, "h w 3"]) -> Float[Array, "h1 w1 3"]:
    offsets = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    window = jnp.asarray(window / window.sum(), jnp.float32)
    for kernel in (window[:, None], window[None, :]):
        planes = lax.conv_general_dilated(
            jnp.moveaxis(x, 2, 0)[:, None], kernel[None, None], (1, 1), "VALID", precision=lax.Precision.HIGHEST
        )
        x = jnp.moveaxis(planes[:, 0], 0, 2)
    return x


def _halved(x: Float[Array, "h w 3"]) -> Float[Array, "h2 w2 3"]:
    """Means of 2x2 pixels; an odd last row or column is left out."""
    return lax.reduce_window(x, 0.0, lax.add, (2, 2, 1), (2, 2, 1), "VALID") / 4


def _over_frames(metric: Callable[[Array, Array], Array], a: Clip, b: Clip) -> float:
    """Frame by frame, so that a clip takes the memory of a frame."""
    return float(np.mean([_of_frame(metric, x, y) for x, y in zip(a, b, strict=True)]))


@partial(jax.jit, static_argnums=0)
def _of_frame(metric: Callable[[Array, Array], Array], x: UInt8[Array, "h w 3"], y: UInt8[Array, "h w 3"]) -> Array:
    return metric(x.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255)


def check_shapes(a: Clip, b: Clip) -> None:
    if a.shape != b.shape:
        raise InvalidRequest("shape", a.shape, f"the other has {b.shape}; frames, height and width must be the same")


def check_side(metric: str, a: Clip, least: int) -> None:
    if min(a.shape[1:3]) < least:
        raise InvalidRequest(metric, f"{a.shape[2]}x{a.shape[1]}", f"needs at least {least} pixels a side")
