"""Shapes of requests: which are compiled, and the thread that compiles the others while the device works.

A shape is all that decides an executable but the length of the text, of which few models know more than one: what is compiled
for that alone, the device waits for.
"""

import concurrent.futures
import logging
import weakref
from collections.abc import Callable, Hashable

from smartdiff_jax.config.request import ResolvedParams
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.run import Run
from smartdiff_jax.stages.base import Progress

log = logging.getLogger("smartdiff")


class Shapes:
    """Of all pipelines of an engine; they are forgotten with the pipeline."""

    def __init__(self):
        self._known: weakref.WeakKeyDictionary[Pipeline, set[Hashable]] = weakref.WeakKeyDictionary()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "compile")

    def remember(self, pipe: Pipeline, params: ResolvedParams) -> None:
        """A request like this one has been made by the pipeline."""
        self._known.setdefault(pipe, set()).add(_shape(pipe, params))

    def is_known(self, pipe: Pipeline, params: ResolvedParams) -> bool:
        return _shape(pipe, params) in self._known.get(pipe, ())

    def compile(self, run: Run, then: Callable[[Run, Exception | None], None]) -> None:
        """One run at a time; `then` is called on the thread that compiles, with what went wrong."""
        run.compiling, run.progress = True, Progress("compile", 0, 1)
        self._pool.submit(self._compile, run, then)

    def _compile(self, run: Run, then: Callable[[Run, Exception | None], None]) -> None:
        failed = None
        try:
            if not (run.cancelled or run.lost):
                run.compile()
                self.remember(run.pipe, run.resolved)
        except Exception as error:
            failed = error
        run.compiling = False
        try:
            then(run, failed)
        except Exception:  # nobody asks what the thread has to say
            log.exception("%s was compiled and cannot go on", run.job.id)

    def stop(self) -> None:
        """What waits is given up; what is being compiled cannot be."""
        self._pool.shutdown(cancel_futures=True)


def _shape(pipe: Pipeline, params: ResolvedParams) -> Hashable:
    guided = params.guidance_scale != pipe.spec.sampling.guidance_off
    size = params.width, params.height, params.num_frames, params.num_outputs
    return *size, guided, params.sampler, params.cache, params.cache_ratio is None, tuple(sorted(params.cache_params))
