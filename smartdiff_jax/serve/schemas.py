"""What goes over the wire: the native jobs, and OpenAI's images and videos."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.service import Limits
from smartdiff_jax.engine.job import JobStatus, Priority, UpgradeState


class JobRequest(GenerateParams):
    """All user parameters, and how they are to be served.

    output_format: mp4, webp, gif, png or jpg; mp4 for a video and png for a picture if not given.
    previews: pictures on the way, spread over the steps.
    """

    model: str | None = Field(default=None, max_length=200)
    output_format: str | None = Field(default=None, max_length=10)
    priority: Priority = "normal"
    previews: int = Field(default=0, ge=0, le=8)

    def params(self) -> GenerateParams:
        return GenerateParams.create(**{name: getattr(self, name) for name in GenerateParams.model_fields})


class UpgradeView(BaseModel):
    """The newest upgrade of a model. weights: tells those that serve now from others. error: why it failed; then the old
    weights serve on. Times are seconds since the epoch."""

    model: str
    weights: str
    state: UpgradeState
    error: str | None
    began_at: float | None
    ended_at: float | None


class LimitsView(Limits):
    """The limits in force. keys: whose are. refused: by file, "keys" or "config", why it is not taken as it lies there.
    need_restart: what has changed in the file of system parameters that is read at the start alone."""

    keys: list[str]
    refused: dict[str, str | None]
    need_restart: list[str]


class JobChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    priority: Priority


class JobPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobStatus]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    id: str
    object: str
    deleted: Literal[True] = True


class ImageRequest(BaseModel):
    """OpenAI's images/generations, and the user parameters it has no words for.

    n: pictures. quality, background: "auto" only; the steps are the quality. user, safety_identifier: not used.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=20_000)
    model: str | None = Field(default=None, max_length=200)
    n: int | None = Field(default=None, ge=1, le=10)
    size: str | None = Field(default=None, max_length=20)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    negative_prompt: str | None = Field(default=None, max_length=20_000)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    seed: int | None = None
    sampler: str | None = None
    cache: str | None = None
    cache_ratio: float | None = None


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """OpenAI's ImagesResponse. job: the id of the job that made them; seed: of the first."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: str
    size: str
    job: str
    seed: int


class VideoRequest(BaseModel):
    """OpenAI's videos, and the user parameters it has no words for. num_frames wins over seconds."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=20_000)
    model: str | None = Field(default=None, max_length=200)
    seconds: float | None = Field(default=None, gt=0, le=3600, allow_inf_nan=False)
    size: str | None = Field(default=None, max_length=20)
    negative_prompt: str | None = Field(default=None, max_length=20_000)
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    shift: float | None = None
    seed: int | None = None
    sampler: str | None = None
    cache: str | None = None
    cache_ratio: float | None = None
    priority: Priority = "normal"


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """OpenAI's video object. progress: 0 to 100."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None
    expires_at: int | None
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    model: str
    progress: int
    prompt: str
    seconds: str
    size: str
    error: VideoError | None


class VideoPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ModelView(BaseModel):
    """OpenAI's model object; task, and the defaults and named sizes that a form needs."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "smartdiff_jax"
    task: Literal["t2i", "t2v"]
    description: str
    defaults: dict[str, Any]
    sizes: dict[str, str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


class Health(BaseModel):
    status: str
