"""A request with its cache and without: how much faster, and how like."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine.output import GenerateOutput
from smartdiff_jax.engine.pipeline import Inputs, Pipeline
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.stages.base import Progress

SIGMA, RADIUS = 1.5, 5
"""Of the Gaussian window of SSIM, 11 pixels wide."""
C1, C2 = 0.01**2, 0.03**2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """cached, full: what came out. speed_up: of the denoising, compilation left out. psnr, ssim: of each output."""

    cached: GenerateOutput
    full: GenerateOutput
    speed_up: float
    psnr: list[float]
    ssim: list[float]

    def side_by_side(self) -> GenerateOutput:
        """The full run's frames on the left, the cached run's on the right."""
        assert self.full.frames is not None and self.cached.frames is not None
        return dataclasses.replace(self.cached, frames=np.concatenate([self.full.frames, self.cached.frames], axis=3))


def compare(
    pipe: Pipeline, request: GenerateParams, on_progress: Callable[[Progress], object] = lambda event: None
) -> Comparison:
    """Runs the request twice. Raises InvalidRequest for one without a cache."""
    if request.cache == "none":
        raise InvalidRequest("cache", "none", 'there is nothing to compare with; choose one, such as "auto"')
    params = pipe.check(request)
    # One seed for both, where the user left it open.
    request = request.model_copy(update={"seed": params.seed})
    without = request.model_copy(update={"cache": "none", "cache_ratio": None, "cache_params": {}})
    full, cached = (_timed(pipe, one, on_progress) for one in (without, request))
    assert full.frames is not None and cached.frames is not None
    pairs = list(zip(full.frames, cached.frames, strict=True))
    return Comparison(
        cached,
        full,
        full.report.seconds["denoise"] / cached.report.seconds["denoise"],
        [psnr(a, b) for a, b in pairs],
        [ssim(a, b) for a, b in pairs],
    )


def _timed(pipe: Pipeline, request: GenerateParams, on_progress: Callable[[Progress], object]) -> GenerateOutput:
    # The first chunk of a first run compiles: it is done once beforehand, and thrown away.
    for event in pipe.stream(request, output_type="latent"):
        if isinstance(event, Progress) and event.stage == "denoise":
            break
    for event in pipe.stream(request, Inputs()):
        if isinstance(event, GenerateOutput):
            return event
        on_progress(event)
    raise AssertionError("a stream ends with its output")


def psnr(a: UInt8[np.ndarray, "f h w 3"], b: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Peak signal to noise ratio in dB over all frames; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255.0**2 / error)) if error > 0 else float("inf")


def ssim(a: UInt8[np.ndarray, "f h w 3"], b: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Structural similarity (Wang et al. 2004) with the paper's window, mean over pixels, channels and frames."""

    def blurred(x: Float[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "f h w 3"]:
        return gaussian_filter(x, (0, SIGMA, SIGMA, 0), radius=(0, RADIUS, RADIUS, 0))

    x, y = a.astype(np.float64) / 255.0, b.astype(np.float64) / 255.0
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * both + C2) / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return float(likeness.mean())
