"""A job: the durable record of one request.

    queued ──claim──> running ──> succeeded | failed | cancelled
       │                 │
       └──> cancelled    └── lease lost, or given back ──> queued

A running job belongs to the engine that holds its lease. An engine that dies renews none, and another takes the job up from
its last checkpoint.
"""

import dataclasses
import secrets
from typing import Any, Literal, get_args

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UpgradeState = Literal["idle", "loading", "warming", "draining", "done", "failed"]
STATES: tuple[State, ...] = get_args(State)
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")
TRANSITIONS: dict[State, tuple[State, ...]] = {
    "queued": ("running", "cancelled", "failed"),
    "running": ("queued", *FINAL),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}

Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of the store. Times are seconds since the epoch.

    owner: the API key's name. api: the route it came by ("jobs", "images", "videos").
    params: GenerateParams; its seed is drawn, and its size, frames, fps and steps are filled in.
    output_format: the suffix of its files. previews: how many pictures on the way.
    units: denoise steps times tokens, whose seconds are measured; cost: device seconds it is expected to take in all.
    stage, done, total: its progress. device_seconds: spent on it so far.
    engine, lease_until: who runs it, until when. attempts: how often it was begun since it last got further.
    files: names of its results. error: code and message of a failure. report: what was done.
    """

    id: str
    owner: str
    api: str
    model: str
    params: dict[str, Any]
    output_format: str
    previews: int
    priority: Priority
    created_at: float
    cost: float
    state: State = "queued"
    stage: str = "queued"
    done: int = 0
    total: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    device_seconds: float = 0.0
    engine: str | None = None
    lease_until: float | None = None
    attempts: int = 0
    cancel_requested: bool = False
    idempotency_key: str | None = None
    previews_made: int = 0
    files: tuple[str, ...] = ()
    error: dict[str, str] | None = None
    report: dict[str, Any] | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def fraction(self) -> float:
        """Of its denoising, 0 to 1: of what takes the time."""
        if self.state == "succeeded" or self.stage in ("decode", "media"):
            return 1.0
        return self.done / self.total if self.stage == "denoise" and self.total else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job as its owner sees it: what the service answers, and what the client reads. Times are seconds since the epoch.

    position: how many jobs will be finished before it. eta_seconds: until it is finished, if that can be told.
    files: URLs of its results. preview: URL of the newest picture on the way.
    """

    id: str
    object: Literal["job"] = "job"
    model: str
    state: State
    stage: str
    done: int
    total: int
    progress: float
    position: int | None
    eta_seconds: float | None
    priority: Priority
    params: dict[str, Any]
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    device_seconds: float
    attempts: int
    preview: str | None
    thumbnail: str | None
    files: list[str]
    error: dict[str, str] | None
    report: dict[str, Any] | None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "JobStatus":
        """A newer service may tell more than this client knows."""
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


def new_id() -> str:
    return f"job_{secrets.token_hex(12)}"
