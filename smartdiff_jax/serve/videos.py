"""OpenAI's /v1/videos: a job by the names that client knows."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine.admission import Submission
from smartdiff_jax.engine.job import Job
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.registry import Registry
from smartdiff_jax.serve.errors import ServiceError
from smartdiff_jax.serve.jobs import Caller, IdempotencyKey, Limit, ServiceOf, file_of, page_of, submit
from smartdiff_jax.serve.schemas import Deleted, Video, VideoError, VideoPage, VideoRequest
from smartdiff_jax.serve.service import Service

router = APIRouter(tags=["videos"])
STATUS = {"queued": "queued", "running": "in_progress", "succeeded": "completed"}
POLL_MS = (200, 5000)
SCHEMA = {"schema": {"$ref": "#/components/schemas/VideoRequest"}}


@router.post(
    "/v1/videos",
    response_model=Video,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": SCHEMA, "multipart/form-data": SCHEMA}}},
)
async def create_video(
    request: Request, response: Response, service: ServiceOf, caller: Caller, idempotency_key: IdempotencyKey = None
):
    """Queue a video; the body may be JSON or a form."""
    body = await _body(request)
    engine = service.engine
    models = Registry("model", engine.models, error=InvalidRequest)
    pipe = models[body.model if body.model is not None else next(iter(models))]
    if pipe.spec.task != "t2v":
        raise InvalidRequest("model", pipe.spec.name, "makes pictures; use /v1/images/generations")
    fields = body.model_dump(exclude={"model", "seconds", "priority"}, exclude_none=True)
    if body.seconds is not None and body.num_frames is None:
        stride = pipe.frame_multiple
        fps = body.fps or pipe.spec.sampling.fps
        fields["num_frames"] = max(round(body.seconds * fps / stride), 1) * stride + 1
    params = GenerateParams.create(**fields)
    submission = Submission(params, body.model, "mp4", body.priority, 0, "videos", idempotency_key)
    job, _ = await submit(service, caller, submission)
    return _view(service, job, response)


async def _body(request: Request) -> VideoRequest:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            fields = await request.json()
        except ValueError:
            raise ServiceError(400, "the body is not valid JSON", code="invalid_json") from None
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        form = await request.form()
        fields = dict(form)
        if files := [name for name, value in fields.items() if not isinstance(value, str)]:
            raise InvalidRequest(files[0], "a file", "this model takes no reference; leave it out")
    else:
        raise ServiceError(415, "send application/json or multipart/form-data", code="unsupported_media_type")
    if not isinstance(fields, dict):
        raise ServiceError(400, "the body must be an object", code="invalid_json")
    try:
        return VideoRequest.model_validate(fields)
    except ValidationError as error:
        raise_invalid(error, InvalidRequest, VideoRequest)


@router.get("/v1/videos", response_model=VideoPage)
async def list_videos(
    service: ServiceOf,
    caller: Caller,
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
    order: Literal["asc", "desc"] = "desc",
):
    page, more = await page_of(service, caller, limit, after, order, api="videos")
    data = [_view(service, job) for job in page]
    return VideoPage(data=data, has_more=more, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@router.get("/v1/videos/{video_id}", response_model=Video)
async def get_video(video_id: str, response: Response, service: ServiceOf, caller: Caller):
    return _view(service, await service.find(caller, video_id, "videos"), response)


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={200: {"content": {"video/mp4": {}, "image/webp": {}}, "description": "The file."}},
)
async def get_content(video_id: str, service: ServiceOf, caller: Caller, variant: Literal["video", "thumbnail"] = "video"):
    """The video, or its first frame; 404 until it is completed."""
    job = await service.find(caller, video_id, "videos")
    if job.state != "succeeded":
        raise ServiceError(404, f"{job.id} is {STATUS.get(job.state, job.state)}; there is no content", code="no_content")
    return await file_of(service, job, job.files[0] if variant == "video" else "thumbnail.webp")


@router.delete("/v1/videos/{video_id}", response_model=Deleted)
async def delete_video(video_id: str, service: ServiceOf, caller: Caller):
    """Cancel it if it has not ended, and forget it and its file."""
    from smartdiff_jax.serve.jobs import delete_job

    job = await service.find(caller, video_id, "videos")
    await delete_job(job.id, service, caller)
    return Deleted(id=job.id, object="video.deleted")


def _view(service: Service, job: Job, response: Response | None = None) -> Video:
    params = job.params  # and not the model, which may be another by now, or gone
    width, height = params["size"]
    live, forecast = service.engine.live(job)
    if response is not None and not job.is_final:
        soonest, latest = POLL_MS
        eta = latest if forecast is None else forecast.seconds * 1000 / 2
        response.headers["openai-poll-after-ms"] = str(round(min(max(eta, soonest), latest)))
    return Video(
        id=job.id,
        created_at=int(job.created_at),
        completed_at=None if job.finished_at is None else int(job.finished_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        status=STATUS.get(job.state, job.state),  # pyright: ignore[reportArgumentType]
        model=job.model,
        progress=100 if job.state == "succeeded" else min(round(100 * live.fraction), 99),
        prompt=params["prompt"],
        seconds=f"{params['num_frames'] / params['fps']:g}",
        size=f"{width}x{height}",
        error=None if job.error is None else VideoError(**job.error),
    )
