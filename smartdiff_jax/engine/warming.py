"""Models made warm: what a request needs is compiled, and tried, before a user waits for it.

At the start of a service this is each model's default request; before an upgrade takes over, the newest one. It is made as a
job is, with a preview, but in two steps: their number is traced.
"""

import logging
from collections.abc import Iterator, Mapping

import numpy as np

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.service import Limits
from smartdiff_jax.engine import deliver
from smartdiff_jax.engine.admission import megapixels
from smartdiff_jax.engine.output import GenerateOutput
from smartdiff_jax.engine.pipeline import OnProgress, Pause, Pipeline
from smartdiff_jax.engine.shapes import Shapes
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.stages.base import Progress

STEPS = 2
DEFAULT = GenerateParams.create(prompt="")

log = logging.getLogger("smartdiff")


def warm(pipe: Pipeline, request: GenerateParams, on_progress: OnProgress) -> GenerateParams:
    """Returns what was made of it. Raises InvalidConfig where pictures come out that hold no numbers, and what
    `on_progress` raises to give up."""
    # Policies and their plans may not fit so few steps, and are not tried.
    fields = request.model_dump(exclude={"num_outputs", "cache", "cache_ratio", "cache_params"})
    fields |= {"num_inference_steps": min(STEPS, request.num_inference_steps or STEPS)}
    made = GenerateParams.create(**fields)
    for event in pipe.stream(made, stops={1}):
        numbers = event.latents if isinstance(event, GenerateOutput) else np.zeros(1)
        if isinstance(event, Pause) and event.preview is not None and not event.preview().any():
            numbers = event.preview(to_uint8=False)  # where a decoder gives no numbers its picture is black, as few others are
        if not np.isfinite(numbers).all():
            raise InvalidConfig("weights", pipe.spec.name, "these give pictures that hold no numbers; look at the files")
        if isinstance(event, Progress):
            on_progress(event)
    return made


def warm_defaults(pipelines: Mapping[str, Pipeline], limits: Limits, shapes: Shapes, on_progress: OnProgress) -> Iterator[str]:
    """Warm all; yields each one's name when it is."""
    for model, pipe in pipelines.items():
        if megapixels(pipe.check(DEFAULT)) > limits.max_megapixels:
            log.info("%s is not warmed: its default request is larger than max_megapixels allows", model)
        else:
            try:
                shapes.remember(pipe, pipe.check(warm(pipe, DEFAULT, on_progress)))
            except Exception as error:
                if deliver.told(error)["code"] != "out_of_memory":
                    raise
                log.warning("%s is not warmed: the device has not enough memory for its default request", model)
        yield model
