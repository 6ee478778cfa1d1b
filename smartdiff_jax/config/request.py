"""User parameters: one request. Nothing here ever selects an executable but the size and the number of frames."""

import secrets
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.model import ModelSpec, SamplingDefaults
from smartdiff_jax.errors import InvalidRequest

MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
MAX_FRAMES = 1001


class GenerateParams(BaseModel):
    """One request; None means the model's default.

    size: (width, height) in pixels, "832x480", or a name the model gives a size, such as "16:9".
    guidance_scale: how strictly to follow the prompt; 1.0 does without the negative prompt and runs twice as fast (0 for
        Z-Image). A model that is told its scale as an input runs as fast at any; a model distilled to one scale takes none.
    guidance_scale_2: of the low-noise expert, for models with two experts.
    shift: how far the schedule leans to high noise.
    seed: None draws one, which the report tells; output i of several is the picture of seed + i alone.
    cache: how evaluations of the model are skipped; "auto" is the best that is known for the model.
    cache_ratio: the share of the steps that is skipped, of all of them; None leaves it to the policy ("auto" skips half).
    cache_params: numbers of the policy, by name.
    attention_sparsity: the share of the blocks of keys that attention leaves out (docs/kernels.md); it needs a server with
        `sparse_attention`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    prompt: str = Field(max_length=20_000)
    negative_prompt: str | None = Field(None, max_length=20_000)
    size: tuple[int, int] | str | None = None
    num_frames: int | None = Field(None, ge=1, le=MAX_FRAMES)
    fps: int | None = Field(None, ge=1, le=120)
    num_inference_steps: int | None = Field(None, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0.0, le=100.0, allow_inf_nan=False)
    guidance_scale_2: float | None = Field(None, ge=0.0, le=100.0, allow_inf_nan=False)
    shift: float | None = Field(None, ge=0.01, le=100.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    num_outputs: int = Field(1, ge=1, le=64)
    sampler: str | None = None
    cache: str = "none"
    cache_ratio: float | None = Field(None, ge=0.0, lt=1.0, allow_inf_nan=False)
    cache_params: dict[str, Any] = Field(default_factory=dict)
    attention_sparsity: float = Field(0.0, ge=0.0, lt=1.0, allow_inf_nan=False)

    @field_validator("size", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        if isinstance(value, str):
            width, cross, height = value.lower().partition("x")
            if cross and width.strip().isdigit() and height.strip().isdigit():
                return int(width), int(height)
        return value

    @classmethod
    def create(cls, **fields: Any) -> "GenerateParams":
        """Checked parameters, or one InvalidRequest that names every wrong field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise_invalid(error, InvalidRequest, cls)


class ResolvedParams(BaseModel):
    """A request with every default filled in and checked against the model: nothing is None but what does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    shift: float
    seed: int
    num_outputs: int
    sampler: str
    cache: str
    cache_ratio: float | None
    cache_params: dict[str, Any]
    attention_sparsity: float


def resolve(
    params: GenerateParams,
    spec: ModelSpec,
    *,
    size_multiple: int,
    frame_multiple: int,
    count_tokens: Callable[[int, int, int], int],
) -> ResolvedParams:
    """Fill in the model's defaults and check what only the model can know.

    size_multiple: width and height must divide by it (VAE stride x patch size).
    frame_multiple: frames are 1 more than a multiple of it (the VAE's temporal stride); 0 for a picture model.
    count_tokens: of (width, height, num_frames).
    """
    defaults = spec.sampling
    width, height = _find_size(params.size, defaults)
    _check_size(width, height, size_multiple)
    num_frames = params.num_frames if params.num_frames is not None else defaults.num_frames
    _check_frames(num_frames, frame_multiple, spec)
    if params.guidance_scale_2 is not None and defaults.boundary is None:
        raise InvalidRequest("guidance_scale_2", params.guidance_scale_2, f"{spec.name} has one expert; use guidance_scale")
    _check_guidance(params, spec)
    guidance_scale = _first(params.guidance_scale, defaults.guidance_scale)
    num_inference_steps = _first(params.num_inference_steps, defaults.num_inference_steps)
    tokens = count_tokens(width, height, num_frames)
    second = None
    if defaults.boundary is not None:
        second = _first(params.guidance_scale_2, params.guidance_scale, defaults.guidance_scale_2, guidance_scale)
    return ResolvedParams(
        prompt=params.prompt,
        negative_prompt=_first(params.negative_prompt, defaults.negative_prompt),
        width=width,
        height=height,
        num_frames=num_frames,
        fps=_first(params.fps, defaults.fps),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_scale_2=second,
        shift=_first(params.shift, defaults.shift_for(height, tokens, num_inference_steps)),
        seed=_first(params.seed, secrets.randbelow(MAX_SEED)),
        num_outputs=params.num_outputs,
        sampler=_first(params.sampler, defaults.sampler),
        cache=params.cache,
        cache_ratio=params.cache_ratio,
        cache_params=params.cache_params,
        attention_sparsity=params.attention_sparsity,
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _find_size(size: tuple[int, int] | str | None, defaults: SamplingDefaults) -> tuple[int, int]:
    if size is None:
        return defaults.width, defaults.height
    if not isinstance(size, str):
        return size
    if size not in defaults.sizes:
        names = f", or one of {', '.join(defaults.sizes)}" if defaults.sizes else ""
        raise InvalidRequest("size", size, f"write it as WIDTHxHEIGHT, for example {defaults.width}x{defaults.height}{names}")
    return defaults.sizes[size]


def _check_guidance(params: GenerateParams, spec: ModelSpec) -> None:
    defaults = spec.sampling
    if defaults.guidance != "cfg" and params.negative_prompt:
        raise InvalidRequest("negative_prompt", params.negative_prompt, f"{spec.name} has no negative branch; leave it out")
    for field in ("guidance_scale", "guidance_scale_2"):
        scale = getattr(params, field)
        if scale is None:
            continue
        if defaults.guidance == "none" and scale != defaults.guidance_scale:
            raise InvalidRequest(field, scale, f"{spec.name} is distilled to run without guidance; leave it out")
        if defaults.guidance == "cfg" and scale < defaults.guidance_off:
            raise InvalidRequest(field, scale, f"must be at least {defaults.guidance_off}, which is no guidance")


def _check_size(width: int, height: int, multiple: int) -> None:
    if width % multiple or height % multiple or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        near = [
            min(max(multiple, round(side / multiple) * multiple), MAX_SIDE // multiple * multiple) for side in (width, height)
        ]
        raise InvalidRequest(
            "size",
            f"{width}x{height}",
            f"width and height must divide by {multiple}; the nearest is {near[0]}x{near[1]}",
        )


def _check_frames(num_frames: int, multiple: int, spec: ModelSpec) -> None:
    if multiple == 0:
        if num_frames != 1:
            raise InvalidRequest("num_frames", num_frames, f"{spec.name} makes pictures; leave it out or use 1")
    elif (num_frames - 1) % multiple:
        below = (num_frames - 1) // multiple * multiple + 1
        raise InvalidRequest(
            "num_frames", num_frames, f"must be 1 more than a multiple of {multiple}; use {below} or {below + multiple}"
        )
