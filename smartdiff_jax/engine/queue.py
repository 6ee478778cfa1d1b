"""The jobs of one engine: those that wait, those it has begun, and whose turn it is.

Everything here may be called on any thread. Nothing here knows the store, a stage or the device.
"""

import dataclasses
import threading
from collections.abc import Collection, Iterable, Mapping

from smartdiff_jax.config.service import EVERYONE, ApiKey
from smartdiff_jax.engine.job import Job, Priority
from smartdiff_jax.engine.run import Run
from smartdiff_jax.engine.scheduler import Entry, Forecast, Scheduler

MAX_BEGUN = 8
"""Jobs whose carry may lie on the device at once."""
AHEAD = 2
"""Jobs with their text done, so that the device never waits for one."""


class Queue:
    """turn: the lock of all that is here, told whenever it may be another's turn. waiting, runs: by the job's id."""

    def __init__(self):
        self.turn = threading.Condition()
        self.waiting: dict[str, Job] = {}
        self.runs: dict[str, Run] = {}
        self._scheduler = Scheduler()
        self._keys: dict[str, ApiKey] = {}
        self._forecast: dict[str, Forecast] = {}

    # What waits.

    def offer(self, job: Job) -> None:
        """A job waits."""
        with self.turn:
            self._put(job)
            self.turn.notify_all()

    def withdraw(self, job_id: str) -> None:
        """A job waits no more, and was not begun here."""
        with self.turn:
            if self.waiting.pop(job_id, None) is not None:
                self._scheduler.remove(job_id)

    def renew(self, known: Collection[str], found: Iterable[Job]) -> None:
        """All that waits, as it was found. known: what waited before it was looked for; what came meanwhile is not gone."""
        jobs = {job.id: job for job in found}
        with self.turn:
            for gone in set(known) & self.waiting.keys() - jobs.keys():
                self.withdraw(gone)
            for job in jobs.values():
                self._put(job)
            self.turn.notify_all()

    def waiting_owners(self) -> list[str]:
        """Of every job that waits. Takes no lock: who asks is the thread that answers everybody."""
        return [job.owner for job in list(self.waiting.values()) if job.state == "queued"]

    def next_to_begin(self) -> Job | None:
        """The waiting job to claim now: one that should run at once, or one to have ready."""
        with self.turn:
            runs = [run for run in self.runs.values() if run.job.id in self._scheduler]
            begun = [run for run in runs if not run.compiling]  # the device does not wait for the others
            if len(runs) >= MAX_BEGUN:
                return None
            running: dict[str, int] = {}
            for run in self.runs.values():
                running[run.job.owner] = running.get(run.job.owner, 0) + 1
            allowed = [job.id for job in self.waiting.values() if running.get(job.owner, 0) < self._key(job).max_running]
            best = self._scheduler.pick(allowed)
            if best is None or (len(begun) >= AHEAD and self._scheduler.pick([best, *(run.job.id for run in begun)]) != best):
                return None
            return self.waiting[best]

    # What is begun.

    def begin(self, run: Run) -> None:
        """A job waits no more: it is begun here."""
        with self.turn:
            self.waiting.pop(run.job.id, None)
            self.runs[run.job.id] = run
            self._scheduler.put(self._entry(run.job))

    def next_to_advance(self) -> Run | None:
        """The run that is ready and whose turn it is."""
        with self.turn:
            ready = [run.job.id for run in self.runs.values() if run.ready and run.job.id in self._scheduler]
            best = self._scheduler.pick(ready)
            return None if best is None else self.runs[best]

    def charge(self, run: Run, seconds: float) -> None:
        """A run has had so much device time."""
        with self.turn:
            self._scheduler.charge(run.job.id, seconds)

    def expect(self, run: Run, left: float) -> None:
        """A run will take so much more device time."""
        with self.turn:
            self._scheduler.expect(run.job.id, left)

    def retire(self, run: Run) -> None:
        """A run needs the device no more; it is one of `runs` until it is dropped."""
        with self.turn:
            run.ready = False
            self._scheduler.remove(run.job.id)

    def drop(self, run: Run) -> None:
        """A run has ended, or is another engine's."""
        with self.turn:
            self.runs.pop(run.job.id, None)
            self.turn.notify_all()

    def heed(self, known: Collection[str], mine: Mapping[str, tuple[bool, Priority]]) -> None:
        """What the store says of the runs that were `known` when it was asked: (to be cancelled, priority) of each that is
        this engine's still."""
        with self.turn:
            for job_id in known:
                if (run := self.runs.get(job_id)) is None or run.progress.stage == "media":
                    continue
                if job_id not in mine:
                    run.lost = True
                    continue
                cancelled, priority = mine[job_id]
                run.cancelled |= cancelled
                if priority != run.job.priority:
                    self._put_anew(run, priority)
            self.turn.notify_all()

    # All of them.

    def adopt(self, keys: Mapping[str, ApiKey]) -> None:
        """From now on these keys hold, by name."""
        with self.turn:
            self._keys = dict(keys)
            for job in self.waiting.values():
                self._scheduler.put(self._entry(job))
            for run in self.runs.values():
                self._put_anew(run, run.job.priority)

    def foresee(self) -> tuple[float, list[Job], list[Job]]:
        """Renews what is foreseen; returns the backlog, the jobs that wait, and those that are begun."""
        with self.turn:
            self._forecast = self._scheduler.forecast()
            return self.backlog(), list(self.waiting.values()), [run.job for run in self.runs.values()]

    def forecast(self, job_id: str) -> Forecast | None:
        return self._forecast.get(job_id)

    def backlog(self) -> float:
        """Estimated device seconds until all is done. Takes no lock, as `waiting_owners`."""
        return self._scheduler.backlog()

    def backlogs(self) -> tuple[float, float]:
        """Estimated device seconds of what waits, and of what is begun here."""
        with self.turn:
            waiting, begun = ([job for job in jobs if job in self._scheduler] for jobs in (self.waiting, self.runs))
            return self._scheduler.backlog(waiting), self._scheduler.backlog(begun)

    def _put(self, job: Job) -> None:
        if job.id not in self.runs and self.waiting.get(job.id) != job:
            self.waiting[job.id] = job
            self._scheduler.put(self._entry(job))

    def _put_anew(self, run: Run, priority: Priority) -> None:
        if run.job.id in self._scheduler:
            run.job = dataclasses.replace(run.job, priority=priority, device_seconds=run.device_seconds)
            self._scheduler.put(self._entry(run.job))

    def _entry(self, job: Job) -> Entry:
        spent, share = min(job.device_seconds, job.cost), self._key(job).share
        return Entry(job.id, job.owner, job.priority, job.created_at, job.cost, spent, share)

    def _key(self, job: Job) -> ApiKey:
        return self._keys.get(job.owner, EVERYONE)
