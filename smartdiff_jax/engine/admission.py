"""From a request to a job in the store: all that can be refused is refused here, before anything is kept."""

import dataclasses
import hashlib
import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from smartdiff_jax.config.request import MAX_SEED, GenerateParams, ResolvedParams
from smartdiff_jax.config.service import ApiKey
from smartdiff_jax.engine.job import PRIORITIES, Job, Priority, new_id
from smartdiff_jax.engine.store import check_room
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.registry import Registry
from smartdiff_jax.stages.media import FASTEST, STILLS, WRITERS

if TYPE_CHECKING:
    from smartdiff_jax.engine.engine import Engine  # which imports JAX; who admits need not wait for that

MAX_PREVIEWS = 8
FIXED = ("seed", "num_frames", "fps", "num_inference_steps")
FORMATS = tuple(suffix.removeprefix(".") for suffix in WRITERS)


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a user asks of the service: a request, and how it is to be served. None is the default."""

    params: GenerateParams
    model: str | None = None
    output_format: str | None = None
    priority: Priority = "normal"
    previews: int = 0
    api: str = "jobs"
    idempotency_key: str | None = None

    @property
    def hash(self) -> str:
        """Of all that makes it another request."""
        fields = dataclasses.asdict(self) | {"params": self.params.model_dump(mode="json")}
        fields.pop("idempotency_key")
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def refuse_if_full(engine: "Engine", key: ApiKey) -> None:
    """Raises QueueFull where this engine knows that `admit` would, without resolving anything and without the store.

    What it knows may be half a second old where several engines share a store; the store has the last word on what is taken.
    """
    owners = engine.queue.waiting_owners()
    check_room(len(owners), owners.count(key.name), engine.limits.max_queued, key.max_queued)


def admit(engine: "Engine", key: ApiKey, submission: Submission) -> tuple[Job, bool]:
    """The job, queued, and whether it is new. Raises InvalidRequest, QueueFull, IdempotencyConflict."""
    asked = submission.params
    models = Registry("model", engine.models, error=InvalidRequest)
    model = submission.model if submission.model is not None else next(iter(models))
    models[model]
    seed = asked.seed if asked.seed is not None else secrets.randbelow(MAX_SEED)
    resolved = models[model].check(asked.model_copy(update={"seed": seed}))
    # What limits and price go by is written down: the defaults of weights that take over while it waits change none of it.
    fixed = {"size": (resolved.width, resolved.height)} | {name: getattr(resolved, name) for name in FIXED}
    params = asked.model_copy(update=fixed)
    _check_size(megapixels(resolved), engine.limits.max_megapixels, resolved.num_inference_steps, key)
    engine.check_memory(model, resolved)
    output_format = _check_format(submission.output_format, resolved.num_frames, resolved.fps)
    if not 0 <= submission.previews <= MAX_PREVIEWS:
        raise InvalidRequest("previews", submission.previews, f"must be from 0 to {MAX_PREVIEWS}")
    if submission.priority not in PRIORITIES:
        raise InvalidRequest("priority", submission.priority, f"choose one of {', '.join(PRIORITIES)}")
    job = Job(
        id=new_id(),
        owner=key.name,
        api=submission.api,
        model=model,
        params=_plain(params),
        output_format=output_format,
        previews=submission.previews,
        priority=submission.priority,
        created_at=time.time(),
        cost=engine.costs.estimate(engine.work_of(model, resolved)).total,
        total=resolved.num_inference_steps,
        idempotency_key=submission.idempotency_key,
    )
    job, new = engine.store.submit(job, submission.hash, engine.limits.max_queued, key.max_queued)
    if new:
        engine.offer(job)
    return job, new


def megapixels(params: ResolvedParams) -> float:
    """Of all frames of all outputs."""
    return params.width * params.height * params.num_frames * params.num_outputs / 1e6


def _plain(params: GenerateParams) -> dict[str, Any]:
    return params.model_dump(mode="json", exclude_defaults=True) | {"prompt": params.prompt}


def _check_size(size: float, most: float, steps: int, key: ApiKey) -> None:
    if size > most:
        raise InvalidRequest(
            "size", f"{size:.1f} megapixels in all", f"this service makes {most:g} at most; ask for less or fewer"
        )
    if key.max_work is not None and size * steps > key.max_work:
        raise InvalidRequest(
            "num_inference_steps", steps, f"{size * steps:.1f} megapixel-steps; your key allows {key.max_work:g} a job"
        )


def _check_format(name: str | None, num_frames: int, fps: int) -> str:
    if name is None:
        return "mp4" if num_frames > 1 else "png"
    name = name.lower().removeprefix(".")
    if name not in FORMATS:
        raise InvalidRequest("output_format", name, f"choose one of {', '.join(FORMATS)}")
    if f".{name}" in STILLS and num_frames > 1:
        raise InvalidRequest("output_format", name, f"holds one picture, not {num_frames} frames; use mp4")
    fastest = FASTEST.get(f".{name}")
    if fastest is not None and fps > fastest:
        raise InvalidRequest("fps", fps, f"give at most {fastest} for {name}")
    return name
