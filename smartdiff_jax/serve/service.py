"""What the routes share: the engine once it is loaded, who is calling, jobs as views, and waiting for them."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, ParamSpec, TypeVar

import anyio
from fastapi import Request

from smartdiff_jax.config.service import EVERYONE, ApiKey, hash_key
from smartdiff_jax.engine.garbage import settle
from smartdiff_jax.engine.job import Job, JobStatus
from smartdiff_jax.engine.store import QueueFull
from smartdiff_jax.errors import Cancelled, SmartdiffError
from smartdiff_jax.serve.errors import ServiceError, not_found
from smartdiff_jax.serve.settings import LOOK_SECONDS, Settings

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("smartdiff")

STATUS = [field.name for field in dataclasses.fields(JobStatus)]
NICE = 10
READERS, WRITERS = 4, 2
"""Threads that ask the store at once. A status call waits for no submission, and only few threads compete with the event loop
for the interpreter; SQLite has one writer anyway, beside which one more request can be resolved."""
STARTING = "the service is starting"
ARRIVAL_SECONDS = 30.0
"""How long a job that comes first of all waits for somebody to take it: for JAX to be imported and the devices to be found."""
POLL_SECONDS = 1.0
"""How often a job is looked up in the store besides when the engine here says that it changed: others may run it."""


def _give_way() -> None:
    """This thread and those that it starts, XLA's among them, compute while no request wants the processor.

    Where a CPU is the device, requests waited for seconds under load without it (docs/serving.md).
    """
    if sys.platform == "linux":  # elsewhere only whole processes have a priority
        this = threading.get_native_id()
        # Below the others of its process, however low they are: a worker of Ray is at 15, from where only root may go up to 10.
        os.setpriority(os.PRIO_PROCESS, this, min(os.getpriority(os.PRIO_PROCESS, this) + NICE, 19))


class Service:
    """One per process. `load` makes the engine, on a thread of its own, so that the service answers while it loads.

    on_start: called once, on that thread, when jobs are run, or with what it failed by. alone: see `create_app`.
    """

    def __init__(self, settings: Settings, load: Callable[[], Any], alone: bool = True):
        self.settings, self.alone = settings, alone
        self._load = load
        self._engine: Any = None
        self._failure: str | None = None
        self._is_running = False
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.started, self._leaving = threading.Event(), threading.Event()
        self._adopting = threading.Lock()
        self._unloaded: list[str] = []
        self._cold: list[str] = []
        self.is_leaving: Callable[[], bool] = lambda: False
        self.on_start: Callable[[Exception | None], object] = lambda failure: None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._arrived = loop, asyncio.Event()
        self._readers, self._writers = anyio.CapacityLimiter(READERS), anyio.CapacityLimiter(WRITERS)
        for body, name in ((self._start, "load"), (self._watch, "settings")):
            threading.Thread(target=body, name=name, daemon=True).start()

    def _start(self) -> None:
        _give_way()
        try:
            engine = self._load()
            engine.listeners.append(self._changed)
            self._unloaded = [model for model in engine.models if model not in engine.pipelines]
            self._cold = list(engine.models)
            self._engine = engine  # which takes jobs from now on
            self._adopt()
            self._arrive()
            for model in engine.load():
                log.info("%s is loaded", model)
                self._unloaded.remove(model)
                self._unless_leaving(None)
            for model in engine.warm(self._unless_leaving):
                self._cold.remove(model)
            settle()
            engine.start()
            self._is_running = True
            self.on_start(None)
        except Exception as error:
            if self._leaving.is_set():
                return
            self._failure = str(error)
            if not isinstance(error, SmartdiffError):
                log.exception("the models could not be loaded")
            self.on_start(error)
        finally:
            self._arrive()
            self.started.set()

    def _arrive(self) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def arrival(self) -> None:
        """Until jobs are taken, or it has failed or is asked to stop, or has taken longer than anybody should wait."""
        until = time.monotonic() + ARRIVAL_SECONDS
        while not (self._arrived.is_set() or self.is_leaving() or time.monotonic() > until):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), LOOK_SECONDS)

    def _unless_leaving(self, progress: Any) -> None:
        if self._leaving.is_set():
            raise Cancelled("the service is stopping")

    def _watch(self) -> None:
        while not self._leaving.wait(LOOK_SECONDS):
            try:
                if self.settings.look() and self._engine is not None:
                    self._adopt()
            except Exception:  # what is wrong with this look may not be with the next
                log.exception("the settings could not be looked at")

    def _adopt(self) -> None:
        with self._adopting:  # the last to come has read what is newest
            self._engine.adopt(self.settings.limits, self.settings.keys.values())
            for name, refused in self.settings.refused.items():
                self._engine.metrics.refused.labels(name).set(refused is not None)

    def stop(self) -> None:
        self._leaving.set()
        self.started.wait()
        if self._engine is not None:
            self._engine.stop()
            self._engine.store.close()

    @property
    def failure(self) -> str | None:
        """Why there is no engine, or it has died."""
        if self._engine is not None and not self._engine.is_alive:
            return "the engine has died; its log tells why"
        return self._failure

    @property
    def unready(self) -> str | None:
        """Why a job would not be run at once, if so."""
        if self.failure is not None or self._is_running:
            return self.failure
        if self._engine is None:
            return STARTING
        if self._unloaded:
            return f"{', '.join(self._unloaded)}: being loaded; jobs wait"
        return f"{', '.join(self._cold)}: being warmed; jobs wait"

    @property
    def engine(self) -> Any:
        """Raises 503 until it takes jobs, and where it will never run them."""
        if self._engine is None or self._failure is not None:
            raise ServiceError(503, self._failure or STARTING, code="not_ready", retry_after=2.0)
        return self._engine

    def caller(self, request: Request) -> ApiKey:
        """Whose key the request bears. Raises 401."""
        if not (keys := self.settings.keys):
            return EVERYONE
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hash_key(key.strip()) if scheme.lower() == "bearer" else ""
        for known, entry in keys.items():
            if hmac.compare_digest(known, given):
                return entry
        raise ServiceError(401, "give a valid API key as `Authorization: Bearer KEY`", code="invalid_api_key")

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the store, on a thread that no writer keeps."""
        return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs), limiter=self._readers)

    async def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Change the store, on one of a few threads, in the order of the calls."""
        return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs), limiter=self._writers)

    def full(self, error: QueueFull) -> ServiceError:
        """429, with the seconds until there is room; counted."""
        self.engine.metrics.rejections.labels("queue_full").inc()
        backlog = self.engine.queue.backlog()
        message = f"{error}; they are done in about {backlog:.0f} s"
        return ServiceError(429, message, code="queue_full", retry_after=backlog / max(error.limit, 1))

    async def find(self, caller: ApiKey, job_id: str, api: str | None = None) -> Job:
        """Raises 404 also for a job of another's."""
        job = await self.read(self.engine.store.get, job_id)
        if job is None or not (caller.admin or job.owner == caller.name) or (api is not None and job.api != api):
            not_found("job" if api is None else api.removesuffix("s"), job_id)
        return job

    def view(self, job: Job) -> JobStatus:
        job, forecast = self.engine.live(job)
        base = f"/v1/jobs/{job.id}"
        preview = f"{base}/files/preview-{job.previews_made}.webp" if job.previews_made else None
        fields = {name: getattr(job, name) for name in STATUS if hasattr(job, name)} | {
            "progress": round(job.fraction, 4),
            "position": None if forecast is None else forecast.position,
            "eta_seconds": None if forecast is None else round(forecast.seconds, 3),
            "preview": preview,
            "thumbnail": f"{base}/files/thumbnail.webp" if job.state == "succeeded" else None,
            "files": [f"{base}/files/{name}" for name in job.files],
        }
        return JobStatus(**fields)

    def _changed(self, job_id: str) -> None:
        """The engine says so, on one of its threads."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._watchers.get(job_id, ()):
            event.set()

    async def follow(self, job: Job) -> AsyncIterator[Job]:
        """The job whenever it has changed, and at last when it has ended or is gone."""
        event = asyncio.Event()
        self._watchers.setdefault(job.id, set()).add(event)
        try:
            while True:
                event.clear()
                now = await self.read(self.engine.store.get, job.id)
                if now is None:
                    return
                yield now
                if now.is_final:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), POLL_SECONDS)
        finally:
            watchers = self._watchers[job.id]
            watchers.discard(event)
            if not watchers:
                del self._watchers[job.id]

    async def hung_up(self, job_id: str) -> None:
        """Cancel the job of a caller who has gone; not where the process is going, for then the job goes on elsewhere."""
        if not self.is_leaving():
            await asyncio.shield(self.cancel(job_id))

    async def cancel(self, job_id: str) -> None:
        job = await self.write(self.engine.store.cancel, job_id)
        if job is None or job.is_final:
            self.engine.queue.withdraw(job_id)
        self.engine.notice()
