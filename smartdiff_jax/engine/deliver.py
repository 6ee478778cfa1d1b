"""The ends of a job: its files, its report, its error; each told so that a user can act on it."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from smartdiff_jax.engine.artifacts import Artifacts, StorageFailed
from smartdiff_jax.engine.job import Job
from smartdiff_jax.engine.output import GenerateOutput
from smartdiff_jax.engine.store import AWAY
from smartdiff_jax.errors import InvalidField, SmartdiffError
from smartdiff_jax.stages.media import write_media

PATIENCE = 30.0
"""Seconds for which a change that must not be lost is tried again."""
THUMBNAIL = "thumbnail.webp"
T = TypeVar("T")

log = logging.getLogger("smartdiff")


def write_results(artifacts: Artifacts, job: Job, output: GenerateOutput) -> list[str]:
    """Encode and store every output, and a thumbnail; returns the names of the outputs' files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = output.save(Path(folder) / f"output.{job.output_format}")
        artifacts.put(job.id, Path(folder))
        frames = output.frames
        assert frames is not None, "a service asks for frames"
        write_picture(artifacts, job.id, THUMBNAIL, frames[0, 0])
        return [path.name for path in paths]


def write_picture(artifacts: Artifacts, job_id: str, name: str, picture: np.ndarray) -> None:
    """picture: uint8 [height, width, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_media(Path(folder) / name, picture[None], 1)
        artifacts.write(job_id, name, path.read_bytes())


def report_of(output: GenerateOutput) -> dict[str, Any]:
    """What a user may know of how it was made."""
    report = dataclasses.asdict(output.report)
    return {name: report[name] for name in ("params", "seconds", "steps", "cache", "shapes", "notes")}


def told(error: Exception) -> dict[str, str]:
    """Code and message. What is no error of the user's, nor of the machine's resources, is told in the log alone."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return {"code": "out_of_memory", "message": "the device has not enough memory for this size; make it smaller"}
    if isinstance(error, InvalidField):
        return {"code": "invalid_request", "message": text}
    if isinstance(error, StorageFailed):
        return {"code": "storage_failed", "message": text}
    if isinstance(error, SmartdiffError):
        return {"code": "failed", "message": text}
    return {"code": "internal_error", "message": f"{type(error).__name__}; the server's log tells more"}


def persist(change: Callable[[], T]) -> T | None:
    """Make a change in the store, also if it is away for a while; None if it stays away, and then the lease will lapse.

    Raises at once what no waiting will mend, such as values that cannot be kept.
    """
    began, pause, told_of = time.monotonic(), 0.05, False
    while True:
        try:
            return change()
        except AWAY as error:
            if time.monotonic() - began > PATIENCE:
                log.exception("the store stays away")
                return None
            if not told_of:
                log.warning("the store is away, and asked again for %.0f s: %s", PATIENCE, str(error).partition("\n")[0])
                told_of = True
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
