"""What a model learns, moving clips or still pictures: what is shown, how it is told and drawn, whether an output shows it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smartdiff_jax.training import checkers, picture_checkers
from smartdiff_jax.training.data import scenes
from smartdiff_jax.training.data.atlas import Atlas
from smartdiff_jax.training.data.captions import Captioner
from smartdiff_jax.training.data.pictures import PictureCaptioner
from smartdiff_jax.training.data.scenes import Scene

Score = Callable[[Any, Any, checkers.Gallery], Mapping[str, Any]]


@dataclass(frozen=True)
class World:
    """captioner: draws what is shown and says it. stage: a choice and a generator to scenes. score: one output
    uint8 [f, h, w, 3] and what was asked to a row of results, among them `subject_rank` and `<share>_ok` for each of `shares`.
    """

    captioner: Captioner | PictureCaptioner
    stage: Callable[[Any, np.random.Generator], Scene]
    score: Score
    shares: tuple[str, ...]

    @classmethod
    def of(cls, task: str, captioner: Any, num_frames: int) -> "World":
        """Of "t2v" or "t2i", with the captioner that `captioner_of` makes for it."""
        if task == "t2i":
            return cls(captioner, captioner.stage, picture_checkers.score, PICTURE_SHARES)
        stage = functools.partial(scenes.stage, captioner.atlas, frames=num_frames)
        return cls(captioner, stage, checkers.score, CLIP_SHARES)


CLIP_SHARES = ("background", "gradient_order", "motion", "style", "colour")
PICTURE_SHARES = ("background", "gradient_order", "position", "style", "colour")


def captioner_of(task: str, atlas: Atlas) -> Captioner | PictureCaptioner:
    """Of "t2v" or "t2i"."""
    return PictureCaptioner(atlas) if task == "t2i" else Captioner(atlas)
