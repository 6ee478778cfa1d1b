"""What a request gives back: frames, latents, and a report of what was done."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.stages.media import write_media


@dataclasses.dataclass(frozen=True)
class Report:
    """What was run and what it took.

    params: the resolved request, seed included.
    seconds: wall time by stage, compilation included where it happened.
    steps: one letter a step and output: F the model was evaluated, . it was not, h one of two branches was,
        1, 2, 3 it was for so many quarters of the tokens.
    cache: the policy that ran and its numbers, "ratio" the share of evaluations that was skipped, "bytes" what it remembered.
    shapes: latents, tokens and frames.
    mesh: the devices used. decoder: into which pieces it cut the picture, "" on one device.
    peak_memory: the most bytes in use, on the device where it tells, else of the process.
    notes: what the user should know, such as a truncated prompt.
    """

    params: dict[str, Any]
    seconds: dict[str, float]
    steps: list[str]
    cache: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    mesh: str
    decoder: str
    dtype: str
    peak_memory: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """frames: uint8 [n, frames, height, width, 3] (float32 in [0, 1] for output_type="np"; None for "latent").

    latents: float32 [n, c, f, h, w], of a picture model [n, c, h, w]: normalised, not packed into tokens.
    """

    frames: np.ndarray | None
    latents: np.ndarray
    report: Report

    def save(self, path: str | Path, fps: int | None = None) -> list[Path]:
        """Write .mp4, .webp, .gif or .png (.jpg for one frame); several outputs get -0, -1, … before the suffix."""
        if self.frames is None:
            raise InvalidRequest("output_type", "latent", 'there are no frames to save; use output_type="uint8"')
        path = Path(path)
        rate: int = fps or self.report.params["fps"]
        frames = self.frames
        if frames.dtype != np.uint8:
            frames = np.round(frames * 255.0).astype(np.uint8)
        if len(frames) == 1:
            return [write_media(path, frames[0], rate)]
        return [write_media(path.with_stem(f"{path.stem}-{i}"), clip, rate) for i, clip in enumerate(frames)]
