"""One job while an engine runs it: the pipeline's stream, where it stands, and what was saved of it.

The stream is advanced by one thread at a time: its text by the text thread, all else by the device thread.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterator

import jax

from smartdiff_jax.config.request import GenerateParams, ResolvedParams
from smartdiff_jax.engine.announced import Announced
from smartdiff_jax.engine.artifacts import Artifacts, StorageFailed
from smartdiff_jax.engine.costs import Work
from smartdiff_jax.engine.job import Job
from smartdiff_jax.engine.output import GenerateOutput
from smartdiff_jax.engine.pipeline import Pause, Pipeline
from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.stages.base import Progress
from smartdiff_jax.stages.checkpoint import Checkpoint

CHECKPOINT = "checkpoint.safetensors"


@dataclasses.dataclass(frozen=True)
class Lap:
    """What one advance of the device did. units: steps of the denoiser, or outputs decoded; counts: fit to be measured."""

    event: Progress | GenerateOutput
    units: int
    counts: bool


class Run:
    """A job that this engine holds the lease of. params, work: what it asks for, once it is open."""

    params: GenerateParams
    resolved: ResolvedParams
    work: Work

    def __init__(self, job: Job, pipe: Pipeline):
        self.job, self.pipe = job, pipe
        self.progress = Progress("text", 0, 1)
        self.device_seconds = job.device_seconds
        self.saved_at = job.device_seconds
        self.previews_made = job.previews_made
        self.cancelled = self.lost = self.ready = self.saving = self.resumed = self.compiling = False
        self._stream: Iterator[Progress | GenerateOutput] = iter(())
        self._pause: Pause | None = None
        self._laps = 0

    def open(self, artifacts: Artifacts | None) -> str | None:
        """Up to where the device is needed. artifacts: where a checkpoint may lie; None begins anew.

        Returns why a checkpoint that is there was not taken. Raises InvalidRequest where the model that serves by now refuses
        what another took when the job came.
        """
        self.params = GenerateParams.create(**self.job.params)
        self.resolved = self.pipe.check(self.params)
        self.work = work_of(self.pipe, self.resolved)
        resume, refused = None, None
        if artifacts is not None:
            try:
                with artifacts.fetched(self.job.id, CHECKPOINT) as path:
                    resume = None if path is None else Checkpoint.from_file(str(path), self.fingerprint)
            except (CheckpointError, StorageFailed) as error:
                refused = str(error)
        self.resumed = resume is not None
        steps = self.work.steps
        stops = {round(steps * number / (self.job.previews + 1)) for number in range(1, self.job.previews + 1)} - {0}
        self._stream = self.pipe.stream(self.params, resume=resume, stops=stops)
        self.progress = Progress("text", 0, 1)
        while self.progress.done < 1:
            event = next(self._stream)
            assert isinstance(event, Progress)
            self.progress = event
        return refused

    def compile(self) -> None:
        """Up to the first step, which compiles all that the request needs; on no thread that others wait for. A job that was
        saved after its last step has come to its decoding by then."""
        self.pipe.compile_decoder(self.resolved)
        event = self._next()
        assert isinstance(event, Progress)
        self.progress, self._pause = event, event if isinstance(event, Pause) else None

    def _next(self) -> Progress | GenerateOutput:
        try:
            return next(self._stream)
        except CheckpointError:
            self.open(None)  # made by this model for another request: a file that was tampered with
            return next(self._stream)

    def advance(self) -> Lap:
        """One chunk of the device's work."""
        before, self._pause = self.progress, None
        event = self._next()
        self._laps += 1
        if isinstance(event, GenerateOutput):
            return Lap(event, 0, False)
        self.progress = event
        self._pause = event if isinstance(event, Pause) else None
        same = event.stage == before.stage
        # The first event starts the loop, and may compile it.
        return Lap(event, event.done - before.done if same else 0, same and self._laps > 1 and event.done > before.done)

    @property
    def can_checkpoint(self) -> bool:
        return self._pause is not None

    def checkpoint(self) -> Checkpoint:
        """Copied from the device; on the device thread, between two chunks."""
        assert self._pause is not None
        return self._pause.checkpoint()

    def close(self) -> None:
        """Free what it holds on the device."""
        self._stream, self._pause = iter(()), None

    @property
    def fingerprint(self) -> str:
        """All that decides the bits of the picture besides the request."""
        place = f"{place_of(self.pipe)}, weights {self.pipe.weights_id}"
        return f"{place}, jax {jax.__version__}, smartdiff_jax {importlib.metadata.version('smartdiff_jax')}"


def place_of(pipe: Announced) -> str:
    """The model, and the devices it runs on."""
    return f"{pipe.spec.name}, {pipe.describe()}, {pipe.system.attention} attention, {pipe.system.guidance} guidance"


def work_of(pipe: Announced, resolved: ResolvedParams) -> Work:
    """What a request is made of, by what `pipe.check` made of it: that takes a millisecond, and whoever asks has done it."""
    tokens = pipe.count_tokens(resolved)
    sampling = pipe.spec.sampling
    guided = sampling.guidance == "cfg" and resolved.guidance_scale != sampling.guidance_off
    return Work.of(place_of(pipe), resolved, tokens, guided)
