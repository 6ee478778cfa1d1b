"""Whose chunk runs next: decisions only, without threads, clocks or devices.

A flow is a user at one priority. Between flows, the one that has had the least device time for its weight goes on (weighted
fair queueing, of measured seconds): whoever sends little is served at once, however much others have sent. Inside a flow, the
job that is due first goes on, where a job is due

    created_at + STRETCH * cost

so that a picture overtakes a video that came long before it, and no stream of pictures holds up a video for ever: those that
come after it is due are due after it.
"""

import dataclasses
import functools
import heapq
from collections.abc import Collection, Iterable

from smartdiff_jax.engine.job import Priority

WEIGHTS: dict[Priority, float] = {"low": 1.0, "normal": 4.0, "high": 16.0}
STRETCH = 10.0
"""How many times its own device time a job may wait before those that came later wait for it."""

Flow = tuple[str, Priority]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A job as the scheduler sees it.

    cost, spent: device seconds in all, as estimated when it came, and so far. share: its owner's weight.
    left: device seconds still to go, where that is known better by now.
    """

    id: str
    owner: str
    priority: Priority
    created_at: float
    cost: float
    spent: float = 0.0
    share: float = 1.0
    left: float | None = None

    @functools.cached_property  # asked of every entry at every choice
    def flow(self) -> Flow:
        return self.owner, self.priority

    @property
    def weight(self) -> float:
        return self.share * WEIGHTS[self.priority]

    @functools.cached_property
    def due(self) -> tuple[float, str]:
        return self.created_at + STRETCH * self.cost, self.id

    @property
    def remaining(self) -> float:
        return max(self.cost - self.spent, 0.0) if self.left is None else self.left


@dataclasses.dataclass(frozen=True)
class Forecast:
    """position: how many jobs will be finished before it. seconds: until it is finished."""

    position: int
    seconds: float


class Scheduler:
    """The jobs that are not finished, and how much device time each flow has had."""

    def __init__(self):
        self._entries: dict[str, Entry] = {}
        self._had: dict[Flow, float] = {}
        self._floor = 0.0

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: Entry) -> None:
        """Add a job, or change what is known of it."""
        # A flow that was away has saved nothing up, and what it owed it owes.
        self._had[entry.flow] = max(self._had.get(entry.flow, 0.0), self._lowest())
        self._entries[entry.id] = entry

    def remove(self, job_id: str) -> None:
        self._floor = self._lowest()
        self._entries.pop(job_id, None)
        active = {entry.flow for entry in self._entries.values()}
        self._had = {flow: had for flow, had in self._had.items() if flow in active or had > self._floor}

    def charge(self, job_id: str, seconds: float) -> None:
        """A job has had so much device time."""
        entry = self._entries[job_id]
        left = None if entry.left is None else max(entry.left - seconds, 0.0)
        self._entries[job_id] = dataclasses.replace(entry, spent=entry.spent + seconds, left=left)
        self._had[entry.flow] += seconds / entry.weight
        self._floor = self._lowest()

    def expect(self, job_id: str, left: float) -> None:
        """A job will take so much more device time. When it is due stays as it was."""
        self._entries[job_id] = dataclasses.replace(self._entries[job_id], left=left)

    def pick(self, among: Collection[str] | None = None) -> str | None:
        """The job to go on with, of all or of these."""
        entries = self._entries.values() if among is None else [self._entries[job] for job in among]
        best = min(entries, key=lambda entry: (self._had[entry.flow], *entry.due), default=None)
        return None if best is None else best.id

    def forecast(self, rate: float = 1.0) -> dict[str, Forecast]:
        """What will become of every job if no more come and each runs to its end. rate: device seconds a second."""
        queues: dict[Flow, list[Entry]] = {}
        for entry in sorted(self._entries.values(), key=lambda entry: entry.due, reverse=True):
            queues.setdefault(entry.flow, []).append(entry)
        flows = [(self._had[flow], *queue[-1].due, flow) for flow, queue in queues.items()]
        heapq.heapify(flows)
        found: dict[str, Forecast] = {}
        seconds = 0.0
        while flows:
            had, *_, flow = heapq.heappop(flows)
            entry = queues[flow].pop()
            seconds += entry.remaining / rate
            found[entry.id] = Forecast(len(found), seconds)
            if queues[flow]:
                heapq.heappush(flows, (had + entry.remaining / entry.weight, *queues[flow][-1].due, flow))
        return found

    def backlog(self, ids: Iterable[str] | None = None) -> float:
        """Device seconds of work left, in all or of these."""
        entries = list(self._entries.values()) if ids is None else [self._entries[job] for job in ids]
        return sum((entry.remaining for entry in entries), 0.0)

    def _lowest(self) -> float:
        return min((self._had[entry.flow] for entry in self._entries.values()), default=self._floor)
