"""/v1/jobs: every user parameter, and a job's whole life."""

import dataclasses
import json
import mimetypes
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from smartdiff_jax.config.service import ApiKey
from smartdiff_jax.engine.admission import Submission, admit
from smartdiff_jax.engine.job import Job, JobStatus, State
from smartdiff_jax.engine.store import IdempotencyConflict, QueueFull
from smartdiff_jax.serve.errors import ServiceError, not_found
from smartdiff_jax.serve.schemas import Deleted, JobChange, JobPage, JobRequest
from smartdiff_jax.serve.service import Service

router = APIRouter(tags=["jobs"])


async def the_service(request: Request) -> Service:
    return request.app.state.service


async def the_caller(request: Request) -> ApiKey:
    return request.app.state.service.caller(request)


ServiceOf = Annotated[Service, Depends(the_service)]
Caller = Annotated[ApiKey, Depends(the_caller)]
IdempotencyKey = Annotated[str | None, Header(max_length=255, description="The same key never makes a second job.")]
Limit = Annotated[int, Query(ge=1, le=100)]


async def submit(service: Service, caller: ApiKey, submission: Submission) -> tuple[Job, bool]:
    """A queued job, or 409, or 429 with the seconds until there is room."""
    engine = service.engine
    try:
        return await service.write(admit, engine, caller, submission)
    except IdempotencyConflict as error:
        raise ServiceError(409, str(error), code="idempotency_conflict", param="Idempotency-Key") from None
    except QueueFull as error:
        raise service.full(error) from None


@router.post("/v1/jobs", status_code=202, response_model=JobStatus, responses={200: {"model": JobStatus}})
async def create_job(
    body: JobRequest, response: Response, service: ServiceOf, caller: Caller, idempotency_key: IdempotencyKey = None
):
    """Queue a request; answers 202, or 200 with the job that the idempotency key already made."""
    submission = Submission(
        body.params(), body.model, body.output_format, body.priority, body.previews, "jobs", idempotency_key
    )
    job, new = await submit(service, caller, submission)
    if not new:
        response.status_code = 200
    return service.view(job)


@router.get("/v1/jobs", response_model=JobPage)
async def list_jobs(
    service: ServiceOf,
    caller: Caller,
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
    order: Literal["asc", "desc"] = "desc",
    state: State | None = None,
):
    """A page of your jobs (an admin's: of all), by the time they came."""
    page, more = await page_of(service, caller, limit, after, order, states=None if state is None else (state,))
    data = [service.view(job) for job in page]
    return JobPage(data=data, has_more=more, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


async def page_of(
    service: Service, caller: ApiKey, limit: int, after: str | None, order: str, **filters
) -> tuple[list[Job], bool]:
    owner = None if caller.admin else caller.name
    options = {"owner": owner, "limit": limit + 1, "after": after, "newest_first": order == "desc"}
    found = await service.read(lambda: service.engine.store.page(**options, **filters))
    return found[:limit], len(found) > limit


@router.get("/v1/jobs/{job_id}", response_model=JobStatus)
async def get_job(job_id: str, service: ServiceOf, caller: Caller):
    return service.view(await service.find(caller, job_id))


@router.patch("/v1/jobs/{job_id}", response_model=JobStatus)
async def change_job(job_id: str, body: JobChange, service: ServiceOf, caller: Caller):
    """Another priority, for a job that has not ended."""
    job = await service.find(caller, job_id)
    if not await service.write(service.engine.store.reprioritise, job.id, body.priority):
        raise ServiceError(409, f"{job.id} has ended", code="job_ended")
    service.engine.notice()
    return service.view(await service.find(caller, job_id))


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobStatus)
async def cancel_job(job_id: str, service: ServiceOf, caller: Caller):
    """A waiting job ends at once, a running one within a chunk; one that has ended stays as it is."""
    job = await service.find(caller, job_id)
    await service.cancel(job.id)
    return service.view(await service.find(caller, job_id))


@router.delete("/v1/jobs/{job_id}", response_model=Deleted)
async def delete_job(job_id: str, service: ServiceOf, caller: Caller):
    """Cancel it if it has not ended, and forget it and its files."""
    job = await service.find(caller, job_id)
    await service.write(service.engine.store.forget, job.id)
    service.engine.queue.withdraw(job.id)
    service.engine.notice()
    return Deleted(id=job.id, object="job.deleted")


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "One `job` event for every change."}},
)
async def job_events(job_id: str, service: ServiceOf, caller: Caller):
    """Server-sent events: the job whenever it has changed, until it has ended."""
    job = await service.find(caller, job_id)

    async def events() -> AsyncIterator[str]:
        last, silent = "", 0
        async for now in service.follow(job):
            data = json.dumps(dataclasses.asdict(service.view(now)))
            silent = silent + 1 if data == last else 0
            if data != last:
                yield f"event: job\ndata: {data}\n\n"
            elif silent % 15 == 0:
                yield ": still there\n\n"
            last = data

    return event_stream(events())


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@router.get(
    "/v1/jobs/{job_id}/files/{name}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The file."}},
)
async def get_file(job_id: str, name: str, service: ServiceOf, caller: Caller):
    """A result, the thumbnail, or a preview."""
    job = await service.find(caller, job_id)
    return await file_of(service, job, name)


async def file_of(service: Service, job: Job, name: str) -> Response:
    previews = {f"preview-{number}.webp" for number in range(1, job.previews + 1)}
    if name not in {*job.files, *previews, "thumbnail.webp"}:
        not_found("file", name)
    try:
        data = await run_in_threadpool(service.engine.artifacts.read, job.id, name)
    except FileNotFoundError:
        not_found("file", name)
    return Response(data, media_type=mimetypes.guess_type(name)[0] or "application/octet-stream")
