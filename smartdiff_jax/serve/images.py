"""OpenAI's /v1/images/generations. The call waits; whoever hangs up cancels the job."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine.admission import Submission
from smartdiff_jax.engine.job import Job
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.serve.errors import ServiceError, envelope
from smartdiff_jax.serve.jobs import Caller, IdempotencyKey, ServiceOf, event_stream, submit
from smartdiff_jax.serve.schemas import ImageData, ImageRequest, Images
from smartdiff_jax.serve.service import Service

router = APIRouter(tags=["images"])
STATUS = {"out_of_memory": 400, "invalid_request": 400}
LOOK_SECONDS = 0.5


@router.post(
    "/v1/images/generations",
    response_model=Images,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Pictures; with `stream`, events."}},
)
async def generate_images(
    body: ImageRequest, request: Request, service: ServiceOf, caller: Caller, idempotency_key: IdempotencyKey = None
):
    """Make pictures (of a video model: single frames) and wait for them."""
    if body.stream and (body.n or 1) > 1:
        raise InvalidRequest("n", body.n, "a stream holds one picture; leave it out")
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images", body.partial_images, "comes with stream=true")
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "shift", "seed", "sampler", "cache_ratio")
    fields: dict[str, Any] = {name: getattr(body, name) for name in names}
    size = None if body.size == "auto" else body.size
    cache = {} if body.cache is None else {"cache": body.cache}
    params = GenerateParams.create(**fields, **cache, size=size, num_frames=1, num_outputs=body.n or 1)
    output_format = {"jpeg": "jpg"}.get(body.output_format or "png", body.output_format or "png")
    previews = body.partial_images or 0
    submission = Submission(params, body.model, output_format, "normal", previews, "images", idempotency_key)
    job, _ = await submit(service, caller, submission)
    if body.stream:
        return event_stream(_events(service, job))
    try:
        done = await _wait(service, job, request)
    except asyncio.CancelledError:
        await service.hung_up(job.id)
        raise
    return await _answer(service, done, body.response_format or "b64_json", str(request.base_url).rstrip("/"))


async def _wait(service: Service, job: Job, request: Request) -> Job:
    """Until it has ended well. Cancels it when the caller hangs up; 499 is for the log alone."""
    looked = time.monotonic()
    async for now in service.follow(job):
        if now.is_final:
            return _succeeded(now)
        if time.monotonic() - looked >= LOOK_SECONDS:
            looked = time.monotonic()
            if await request.is_disconnected():
                await service.cancel(job.id)
                raise ServiceError(499, "the caller hung up", code="cancelled")
    raise ServiceError(404, f"{job.id} was deleted", code="job_not_found")


def _succeeded(job: Job) -> Job:
    if job.state == "cancelled":
        raise ServiceError(409, f"{job.id} was cancelled", code="cancelled")
    if job.state == "failed":
        error = job.error or {"code": "failed", "message": "failed"}
        raise ServiceError(STATUS.get(error["code"], 500), error["message"], code=error["code"])
    return job


async def _answer(service: Service, job: Job, response_format: str, base_url: str) -> Images:
    data = []
    for name in job.files:
        if response_format == "url":
            data.append(ImageData(url=f"{base_url}/v1/jobs/{job.id}/files/{name}"))
        else:
            data.append(ImageData(b64_json=await _b64(service, job, name)))
    params = (job.report or {})["params"]
    return Images(
        created=int(job.created_at),
        data=data,
        output_format={"jpg": "jpeg"}.get(job.output_format, job.output_format),
        size=f"{params['width']}x{params['height']}",
        job=job.id,
        seed=params["seed"],
    )


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    """OpenAI's image_generation.partial_image for each preview, and .completed; whoever hangs up cancels the job."""
    told, done = 0, False
    try:
        async for now in service.follow(job):
            live, _ = service.engine.live(now)
            while told < live.previews_made:
                try:
                    picture = await _b64(service, job, f"preview-{told + 1}.webp")
                except FileNotFoundError:
                    if not live.is_final:
                        break  # it is being written, and will be told with the next change
                    told += 1
                    continue
                event = {"partial_image_index": told, "b64_json": picture, "output_format": "webp"}
                yield _event("image_generation.partial_image", now, event)
                told += 1
            if now.is_final:
                done = True
                try:
                    images = await _answer(service, _succeeded(now), "b64_json", "")
                except ServiceError as error:
                    body = envelope(error.status, error.message, None, error.code)
                    yield f"event: error\ndata: {json.dumps({'type': 'error'} | body)}\n\n"
                    return
                event = {"b64_json": images.data[0].b64_json, "output_format": images.output_format, "job": job.id}
                usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                usage |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
                yield _event("image_generation.completed", now, event | {"usage": usage})
    finally:
        if not done:
            await service.hung_up(job.id)


def _event(kind: str, job: Job, fields: dict[str, Any]) -> str:
    size = "x".join(map(str, job.params["size"]))
    common = {"type": kind, "created_at": int(time.time()), "size": size, "quality": "auto", "background": "opaque"}
    return f"event: {kind}\ndata: {json.dumps(common | fields)}\n\n"


async def _b64(service: Service, job: Job, name: str) -> str:
    data = await run_in_threadpool(service.engine.artifacts.read, job.id, name)
    return base64.b64encode(data).decode()
