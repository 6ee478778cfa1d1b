"""A request with its cache and without: how much faster, and how like."""

import dataclasses
from collections.abc import Callable

import numpy as np

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine.output import GenerateOutput
from smartdiff_jax.engine.pipeline import Inputs, Pipeline
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.evaluation.metrics import psnr, ssim
from smartdiff_jax.stages.base import Progress


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
