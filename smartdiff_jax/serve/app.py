"""The app: routes, health, metrics, and the page."""

import asyncio
import contextlib
import mimetypes
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response

from smartdiff_jax.config.service import ServiceConfig
from smartdiff_jax.serve import admin, images, jobs, videos
from smartdiff_jax.serve.errors import ErrorEnvelope, ServiceError, install, not_found
from smartdiff_jax.serve.jobs import Caller, ServiceOf
from smartdiff_jax.serve.middleware import BodyLimit, RequestId
from smartdiff_jax.serve.refusal import EarlyRefusal
from smartdiff_jax.serve.schemas import Health, ModelList, ModelView, VideoRequest
from smartdiff_jax.serve.service import Service
from smartdiff_jax.serve.settings import Settings

PAGE = {"": "index.html", "app.js": "app.js", "compare.js": "compare.js", "style.css": "style.css"}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "The request cannot be served."},
    "5XX": {"model": ErrorEnvelope, "description": "The service cannot serve."},
}
# Only what the page itself brings runs in it, and it talks to nobody else.
POLICY = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'"

root = APIRouter()


def create_app(config: ServiceConfig, load: Callable[[], Any], config_file: Path | None = None, alone: bool = True) -> FastAPI:
    """load: makes the engine; called on a thread when the app starts. config_file: where the limits are read from anew.
    alone: not one of several replicas behind a proxy, which names requests itself."""
    service = Service(Settings(config, config_file), load, alone)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        service.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="smartdiff_jax", version="1", lifespan=lifespan, responses=ERRORS, docs_url=None, redoc_url=None)
    app.state.service = service
    install(app)
    for router in (admin.router, root, jobs.router, images.router, videos.router):
        app.include_router(router)
    app.add_middleware(BodyLimit)
    app.add_middleware(EarlyRefusal, service=service)
    if alone:
        app.add_middleware(RequestId)
    _publish(app)
    return app


def _publish(app: FastAPI) -> None:
    """The published schema names the body that /v1/videos reads by hand."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        body = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"]["VideoRequest"] = body
        return schema

    app.openapi = openapi


@root.get("/healthz", response_model=Health, tags=["health"])
async def healthz(service: ServiceOf):
    """200 while the process can serve or will: 503 once loading has failed or the engine has died."""
    if service.failure is not None:
        raise ServiceError(503, service.failure, code="engine_failed")
    return Health(status="alive")


@root.get("/readyz", response_model=Health, tags=["health"])
async def readyz(service: ServiceOf):
    """200 when jobs are run: the models are loaded, and compiled for their default requests."""
    if (why := service.unready) is not None:
        raise ServiceError(503, why, code="not_ready", retry_after=2.0)
    return Health(status="ready")


@root.get("/metrics", response_class=Response, tags=["health"],
          responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}})  # fmt: skip
async def metrics(service: ServiceOf, caller: Caller):
    return Response(service.engine.metrics.exposition(), media_type="text/plain; version=0.0.4")


@root.get("/v1/models", response_model=ModelList, tags=["models"])
async def list_models(service: ServiceOf, caller: Caller):
    return ModelList(data=[_model(pipe.spec) for pipe in service.engine.models.values()])


@root.get("/v1/models/{model:path}", response_model=ModelView, tags=["models"])
async def get_model(model: str, service: ServiceOf, caller: Caller):
    if model not in service.engine.models:
        not_found("model", model)
    return _model(service.engine.models[model].spec)


def _model(spec: Any) -> ModelView:
    names = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance", "sampler")
    defaults = {name: getattr(spec.sampling, name) for name in names}
    if spec.task == "t2i":
        defaults["num_frames"] = 1
    sizes = {name: f"{width}x{height}" for name, (width, height) in spec.sampling.sizes.items()}
    return ModelView(id=spec.name, created=0, task=spec.task, description=spec.description, defaults=defaults, sizes=sizes)


@root.get("/{page}", include_in_schema=False)
@root.get("/", include_in_schema=False)
async def page(page: str = ""):
    if page not in PAGE:
        not_found("page", page)
    data = resources.files("smartdiff_jax.serve").joinpath("ui", PAGE[page]).read_bytes()
    kind = mimetypes.guess_type(PAGE[page])[0]
    return Response(data, media_type=kind, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
