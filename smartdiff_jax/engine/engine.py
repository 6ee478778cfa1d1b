"""The engine: one scheduler over the stages of all jobs, on threads that do not wait for each other.

    text thread     claims a job from the store, encodes its prompt, reads its checkpoint
    device thread   denoises chunk by chunk and decodes; between two chunks the scheduler says whose turn it is
    media threads   write pictures and videos, end the job
    keeper thread   leases, cancelled jobs, progress, what is new in the store, what has expired

Only the device thread advances a job past its text. A job that fails, fails alone.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from smartdiff_jax.config.request import GenerateParams, ResolvedParams
from smartdiff_jax.config.service import ApiKey, Limits
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine import deliver
from smartdiff_jax.engine.announced import Announced, announce
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.costs import Costs, Work
from smartdiff_jax.engine.job import Job
from smartdiff_jax.engine.memory import check_memory, device_memory
from smartdiff_jax.engine.metrics import Metrics
from smartdiff_jax.engine.output import GenerateOutput
from smartdiff_jax.engine.pipeline import OnProgress, Pause, Pipeline
from smartdiff_jax.engine.queue import Queue
from smartdiff_jax.engine.run import CHECKPOINT, Lap, Run, work_of
from smartdiff_jax.engine.scheduler import Forecast
from smartdiff_jax.engine.shapes import Shapes
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.engine.upgrade import Upgrades
from smartdiff_jax.engine.warming import warm_defaults
from smartdiff_jax.errors import HostLost, InvalidRequest
from smartdiff_jax.stages.base import Progress

MAX_MEDIA = 8
"""Finished jobs whose pictures are being written; the device waits when there are more."""
TICK = 0.25
HEARTBEAT = 0.5
SWEEP = 5.0

log = logging.getLogger("smartdiff")


class Engine:
    """Pulls jobs from a store and runs them. `listeners` are called with a job's id when it changes, on any thread."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        store: JobStore,
        artifacts: Artifacts,
        limits: Limits,
        metrics: Metrics | None = None,
        loaders: Mapping[str, Callable[[], Pipeline]] | None = None,
        announced: Mapping[str, Announced] | None = None,
    ):
        """loaders: what makes a model's pipeline anew, for upgrades. announced: models that `load` loads by theirs; jobs for
        them are taken before."""
        self.pipelines, self.store, self.artifacts, self.limits = dict(pipelines), store, artifacts, limits
        self._announced = dict(announced or {})
        self.models: dict[str, Announced] = self._announced | self.pipelines
        self.queue = Queue()
        self._turn = self.queue.turn
        self.metrics = metrics or Metrics()
        self.costs = Costs(store.load_rates())
        self.name = f"engine_{secrets.token_hex(6)}"
        self.newest: dict[str, GenerateParams] = {}
        self._loaders = dict(loaders or {})
        self.upgrades = Upgrades(self, self._loaders)
        self.listeners: list[Callable[[str], None]] = []
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._started = self._taking = self._are_hosts_lost = False
        self._media = 0
        self._dirty: set[str] = set()
        self.shapes = Shapes()
        self._text = concurrent.futures.ThreadPoolExecutor(1, "text")
        self._writers = concurrent.futures.ThreadPoolExecutor(2, "media")
        self._threads = [threading.Thread(target=body, name=name) for name, body in
                         (("device", self._device), ("keeper", self._keeper))]  # fmt: skip

    @classmethod
    def of(cls, models: Iterable[str], system: SystemConfig, store: JobStore, artifacts: Artifacts, limits: Limits) -> "Engine":
        """For models by what `Pipeline.from_pretrained` takes: announced here, and loaded by `load`."""
        announced, loaders = {}, {}
        for name in models:
            known = announce(name, system)
            announced[known.spec.name] = known
            loaders[known.spec.name] = functools.partial(Pipeline.from_pretrained, name, system=system)
        return cls({}, store, artifacts, limits, loaders=loaders, announced=announced)

    # What others ask of it, on any thread.

    def load(self) -> Iterator[str]:
        """Load what is announced alone; yields each model when it is there. Jobs that come wait."""
        for model in [model for model in self.models if model not in self.pipelines]:
            self.replace(model, self._loaders[model]())
            yield model

    def warm(self, on_progress: OnProgress) -> Iterator[str]:
        """Compile what each model's default request needs; yields the models as they are warm. Jobs that come wait."""
        return warm_defaults(self.pipelines, self.limits, self.shapes, on_progress)

    def start(self) -> None:
        self._refresh()
        self._started = True
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop between two chunks; what is begun is saved and given back to the queue."""
        self.upgrades.leave()
        self._stopping.set()
        self._news.set()
        with self._turn:
            self._turn.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._text.shutdown()
        self.shapes.stop()
        self._writers.shutdown()
        for run in list(self.queue.runs.values()):
            if run.can_checkpoint and not (run.cancelled or self._are_hosts_lost):
                self._in_background(self._write, run, run.checkpoint())
            self._in_background(deliver.persist, lambda run=run: self.store.release(run.job.id, self.name))
        self.store.save_rates(self.costs.changes())
        self.upgrades.join()  # last: what is loading takes its time, and the jobs are saved by now

    @property
    def is_alive(self) -> bool:
        return not any(thread.ident is not None and not thread.is_alive() for thread in self._threads)

    def work_of(self, model: str, resolved: ResolvedParams) -> Work:
        return work_of(self.models[model], resolved)

    def check_memory(self, model: str, resolved: ResolvedParams) -> None:
        """Raises InvalidRequest for what can never fit the devices; what was made on such devices before does."""
        if self.costs.estimate(self.work_of(model, resolved)).measured:
            return
        try:
            check_memory(self.models | self._announced, model, resolved)
        except InvalidRequest:
            self.metrics.rejections.labels("memory").inc()
            raise
        except Exception:  # then it is taken, as where devices do not tell what they have
            log.exception("what %s needs for %dx%d cannot be planned", model, resolved.width, resolved.height)

    def adopt(self, limits: Limits, keys: Iterable[ApiKey]) -> None:
        """From now on these hold, for what is asked and for what waits; what runs is not stopped by them."""
        with self._turn:
            self.limits = limits
            self.store.ttl = limits.keep_hours * 3600
            self.queue.adopt({key.name: key for key in keys})
        self._prefetch()

    def replace(self, model: str, pipe: Pipeline) -> Pipeline | None:
        """From now on jobs of `model` begin with `pipe`. Returns the one that served before."""
        with self._turn:
            old = self.pipelines.get(model)
            self.models[model] = self.pipelines[model] = pipe
        return old

    def uses(self, pipe: Pipeline) -> bool:
        """Whether a job that was begun with it goes on."""
        with self._turn:
            return any(run.pipe is pipe for run in self.queue.runs.values())

    def offer(self, job: Job) -> None:
        """A new job is in the store."""
        self.queue.offer(job)
        self._prefetch()

    def notice(self) -> None:
        """Something in the store has changed: a job was cancelled, or has another priority."""
        self._news.set()

    def live(self, job: Job) -> tuple[Job, Forecast | None]:
        """The job with its newest progress, and when it will be finished, if that can be told."""
        run = self.queue.runs.get(job.id)
        if run is not None and job.state == "running":
            progress = run.progress
            values = {"stage": progress.stage, "done": progress.done, "total": progress.total}
            job = dataclasses.replace(job, previews_made=run.previews_made, device_seconds=run.device_seconds, **values)
        return job, None if job.is_final else self.queue.forecast(job.id)

    # The text thread.

    def _prefetch(self) -> None:
        with self._turn:
            if self._taking or self._next_to_begin() is None:
                return
            self._taking = True
        self._text.submit(self._take)

    def _next_to_begin(self) -> Job | None:
        return self.queue.next_to_begin() if self._started and not self._stopping.is_set() else None

    def _take(self) -> None:
        with self._turn:
            wanted = self._next_to_begin()
        try:
            if wanted is not None:
                self._begin(wanted)
        except Exception:  # the store is away; the keeper will ask again
            log.exception("no job could be claimed")
        finally:
            with self._turn:
                self._taking = False
                self._turn.notify_all()
        if wanted is not None:
            self._prefetch()

    def _begin(self, wanted: Job) -> None:
        job = self.store.claim(wanted.id, self.name)
        if job is None:
            self.queue.withdraw(wanted.id)
            self._tell(wanted.id)
            return
        with self._turn:
            run = Run(job, self.pipelines[job.model])
            self.queue.begin(run)
        self.metrics.wait.labels(job.model).observe(max(time.time() - job.created_at, 0.0))
        began = time.perf_counter()
        try:
            refused = run.open(self.artifacts)
        except Exception as error:
            return self._fail(run, error)
        self.newest[job.model] = run.params
        if refused is not None:
            log.warning("%s begins anew: %s", job.id, refused)
        elif run.resumed:
            self.metrics.resumed.labels(job.model).inc()
        self.metrics.stage.labels(job.model, "text").observe(time.perf_counter() - began)
        if self.shapes.is_known(run.pipe, run.resolved):
            self._make_ready(run, None)
        else:
            self.shapes.compile(run, self._make_ready)
            self._tell(job.id)

    # The compiling thread too.

    def _make_ready(self, run: Run, error: Exception | None) -> None:
        if error is not None:
            return self._fail(run, error)
        with self._turn:
            run.ready = True
            self._turn.notify_all()
        self._tell(run.job.id)
        self._prefetch()

    # The device thread.

    def _device(self) -> None:
        while (run := self._choose()) is not None:
            self._prefetch()
            self._advance(run)
            del run  # the last that holds weights which were replaced, maybe, and the next may be long in coming

    def _advance(self, run: Run) -> None:
        began = time.perf_counter()
        try:
            lap = run.advance()
            self._after(run, lap, time.perf_counter() - began)
        except Exception as error:
            self._fail(run, error)

    def _choose(self) -> Run | None:
        """The run to go on with; waits for one. None when the engine stops."""
        with self._turn:
            while not self._stopping.is_set():
                self._drop_ended()
                if self._media < MAX_MEDIA and (run := self.queue.next_to_advance()) is not None:
                    return run
                self._turn.wait(1.0)
        return None

    def _after(self, run: Run, lap: Lap, seconds: float) -> None:
        job, model = run.job, run.job.model
        run.device_seconds += seconds
        self.metrics.busy.labels(model).inc(seconds)
        self.queue.charge(run, seconds)
        if lap.counts:
            stage, each = run.progress.stage, seconds / lap.units
            if stage == "denoise":
                self.metrics.step.labels(model).observe(each)
            if stage == "decode" or run.work.outputs == 1:  # several outputs share a step
                self.costs.observe(run.work, stage, each)
            self.queue.expect(run, self.costs.left(run.work, stage, run.progress.done / run.progress.total))
        if isinstance(lap.event, GenerateOutput):
            self.shapes.remember(run.pipe, run.resolved)
            with self._turn:
                self.queue.retire(run)
                self._media += 1
            run.progress = Progress("media", 0, 1)
            run.close()
            self._writers.submit(self._deliver, run, lap.event)
        elif isinstance(lap.event, Pause):
            if lap.event.preview is not None:
                began = time.perf_counter()
                picture = lap.event.preview()
                self.queue.charge(run, time.perf_counter() - began)
                run.previews_made += 1
                name = f"preview-{run.previews_made}.webp"
                self._writers.submit(self._in_background, deliver.write_picture, self.artifacts, job.id, name, picture)
            if run.device_seconds - run.saved_at >= self.limits.checkpoint_seconds and not run.saving:
                run.saving, run.saved_at = True, run.device_seconds
                checkpoint = run.checkpoint()
                self._writers.submit(self._in_background, self._write, run, checkpoint)
        self._dirty.add(job.id)
        self._tell(job.id)

    # The media threads.

    def _write(self, run: Run, checkpoint) -> None:
        try:
            self.artifacts.write(run.job.id, CHECKPOINT, checkpoint.to_bytes(run.fingerprint))
            self.store.progress(run.job.id, self.name, got_further=True, device_seconds=run.device_seconds)
            self.metrics.checkpoints.labels(run.job.model, "written").inc()
        except Exception:
            self.metrics.checkpoints.labels(run.job.model, "failed").inc()
            raise
        finally:
            run.saving = False

    def _in_background(self, function: Callable, *arguments) -> None:
        """What a job can do without: a checkpoint, a preview."""
        try:
            function(*arguments)
        except Exception:
            log.exception("%s failed", getattr(function, "__name__", function))

    def _deliver(self, run: Run, output: GenerateOutput) -> None:
        began = time.perf_counter()
        try:
            files = deliver.write_results(self.artifacts, run.job, output)
        except Exception as error:
            self._fail(run, error, counted=True)
            return
        job = run.job
        self.metrics.stage.labels(job.model, "media").observe(time.perf_counter() - began)
        self.metrics.tell_result(job.model, output.report)
        report = deliver.report_of(output)
        steps = len(output.report.steps[0]) * len(output.report.steps)
        values = {"done": steps, "total": steps, "previews_made": run.previews_made, "device_seconds": run.device_seconds}
        self._end(run, "succeeded", counted=True, files=files, report=report, **values)

    # How jobs end, on any thread.

    def _fail(self, run: Run, error: Exception, counted: bool = False) -> None:
        if isinstance(error, HostLost):
            return self._end_with_hosts(error)
        told = deliver.told(error)
        log.error("%s failed: %s", run.job.id, told["message"], exc_info=error if told["code"] == "internal_error" else None)
        run.close()
        if counted:
            self._end(run, "failed", counted=True, error=told)
            return
        self.queue.retire(run)
        self._writers.submit(self._end, run, "failed", error=told)  # the store may be slow, the device must not wait

    def _end_with_hosts(self, error: HostLost) -> None:
        """Nothing can be made here any more, and no job is to blame: whoever starts the hosts again, or another engine, makes
        them, when their leases are over or `stop` has given them back."""
        log.error("the engine ends: %s", error)
        self._are_hosts_lost = True
        self._stopping.set()
        self._news.set()
        with self._turn:
            self._turn.notify_all()

    def _drop_ended(self) -> None:
        """Runs that are cancelled, or another's by now."""
        for run in [run for run in self.queue.runs.values() if run.ready and (run.cancelled or run.lost)]:
            self.queue.retire(run)
            run.close()
            if run.lost:
                self.queue.drop(run)
            else:
                self._writers.submit(self._end, run, "cancelled")

    def _end(self, run: Run, state, counted: bool = False, **values) -> None:
        job = run.job
        self.queue.retire(run)
        try:
            if not run.lost and deliver.persist(lambda: self.store.finish(job.id, self.name, state, **values)):
                self.metrics.jobs.labels(job.model, state).inc()
                self._in_background(self.artifacts.remove, job.id, CHECKPOINT)
        except Exception as error:  # what is to be kept of it cannot be, now or later
            log.exception("%s cannot end as %s", job.id, state)
            if state != "failed":
                return self._end(run, "failed", counted, error=deliver.told(error))
        with self._turn:
            self._media -= counted
            self.queue.drop(run)
        self._tell(job.id)
        self._prefetch()

    # The keeper thread.

    def _keeper(self) -> None:
        beat = sweep = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            changed = self._news.wait(TICK)
            self._news.clear()
            try:
                if changed or now - beat >= HEARTBEAT:
                    beat = now
                    self._beat()
                    self._refresh()
                for job_id in list(self._dirty):
                    self._flush(job_id)
                if now - sweep >= SWEEP:
                    sweep = now
                    self._sweep()
            except Exception:  # the store is away: jobs go on, and their leases with them if it comes back in time
                log.exception("the store cannot be reached")
            self._foresee()
            self._prefetch()

    def _beat(self) -> None:
        if known := list(self.queue.runs):
            self.queue.heed(known, self.store.heartbeat(self.name, known))

    def _refresh(self) -> None:
        """What the store has waiting."""
        known = list(self.queue.waiting)
        self.queue.renew(known, [job for job in self.store.waiting() if job.model in self.models])

    def _flush(self, job_id: str) -> None:
        self._dirty.discard(job_id)
        if (run := self.queue.runs.get(job_id)) is not None and run.progress.stage != "media":
            at = run.progress
            values = {"stage": at.stage, "done": at.done, "total": at.total, "previews_made": run.previews_made}
            self.store.progress(job_id, self.name, device_seconds=run.device_seconds, **values)

    def _sweep(self) -> None:
        for job_id in self.store.expired():
            self.artifacts.remove(job_id)
            self.store.remove(job_id)
        self.store.save_rates(self.costs.changes())

    def _foresee(self) -> None:
        backlog, waiting, running = self.queue.foresee()
        self.metrics.tell_queue(self.models, waiting, running, backlog)
        for kind, size in device_memory().items():
            self.metrics.memory.labels(kind).set(size)

    def _tell(self, job_id: str) -> None:
        for listener in list(self.listeners):
            listener(job_id)
