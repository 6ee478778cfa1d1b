"""The Python API: one model, loaded once, called many times.

    pipe = Pipeline.from_pretrained("pocket-video")
    out = pipe("a dog moving left", num_inference_steps=20, seed=1)
    out.save("dog.mp4")

A call is the life of one request: resolve -> text -> noise -> denoise in chunks -> decode (docs/architecture.md).
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.model import ModelSpec
from smartdiff_jax.config.request import MAX_SEED, GenerateParams, ResolvedParams, resolve
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine.loading import LoadedModel, load_model
from smartdiff_jax.engine.output import GenerateOutput, Report
from smartdiff_jax.errors import Cancelled, InvalidRequest
from smartdiff_jax.kernels import ATTENTION
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.samplers import SAMPLERS
from smartdiff_jax.samplers.base import MAX_STEPS, Schedule
from smartdiff_jax.sharding.context_parallel import wrap
from smartdiff_jax.sharding.mesh import describe, replicated
from smartdiff_jax.stages.base import Progress
from smartdiff_jax.stages.decode import Decode
from smartdiff_jax.stages.denoise import DenoiseCarry, DenoiseLoop, denoise, split_experts
from smartdiff_jax.stages.guidance import GUIDANCE
from smartdiff_jax.stages.latents import check_latents, draw_noise
from smartdiff_jax.stages.text_encode import TextEncode, check_embeds

OUTPUT_TYPES = ("uint8", "np", "latent")
OnProgress = Callable[[Progress], object]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a caller may bring instead of having it made, shaped as the model's diffusers pipeline takes it."""

    latents: Any = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None


class Pipeline:
    """A loaded model and its compiled stages."""

    def __init__(self, model: LoadedModel, system: SystemConfig):
        self.spec: ModelSpec = model.spec
        self.system = system
        self._model = model
        attend = wrap(ATTENTION[system.attention], model.mesh)
        self._text = TextEncode(
            model.tokenizer,
            *model.text_encoder,
            max_length=model.max_text_length,
            pad_id=model.pad_id,
            dtype=model.dtype,
        )
        self._loop = DenoiseLoop(model.denoiser_graph, attend, GUIDANCE[system.guidance], model.dtype, replicated(model.mesh))
        self._decode = Decode(*model.vae, dtype=model.dtype)
        self._pack = jax.jit(lambda latents: model.family.pack(latents, model.patch_size))
        self._unpack = jax.jit(lambda tokens, grid: model.family.unpack(tokens, grid, model.patch_size), static_argnames="grid")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        weights: str | Path | None = None,
        system: SystemConfig | str | Path | None = None,
        mesh: MeshConfig | None = None,
        dtype: str | None = None,
    ) -> "Pipeline":
        """Load a model.

        model: a known name (`smartdiff models`), a folder in diffusers layout, or a hub id "organisation/name".
        weights: the folder of a known name's weights; None takes the bundled ones or fetches them from the hub.
        system: how this process runs, or the path of a YAML file; `mesh` and `dtype` replace those fields of it.

        Raises InvalidConfig for an unknown model or setting, CheckpointError for weights that do not fit.
        """
        if system is None:
            system = SystemConfig.create()
        elif not isinstance(system, SystemConfig):
            system = SystemConfig.from_file(system)
        changes = {name: value for name, value in (("mesh", mesh), ("dtype", dtype)) if value is not None}
        system = SystemConfig.create(**(system.model_dump() | changes))
        return cls(load_model(model, weights, system), system)

    def __call__(
        self,
        prompt: str = "",
        *,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "uint8",
        on_progress: OnProgress | None = None,
        **params: Any,
    ) -> GenerateOutput:
        """Generate. `params` are the fields of GenerateParams (size, num_frames, num_inference_steps, seed, …).

        latents: noise [n, c, f, h, w] instead of what the seed draws, one output each.
        prompt_embeds, negative_prompt_embeds: text states [1, length, d] instead of the prompts.
        output_type: "uint8", "np" (float32 in [0, 1]) or "latent".
        on_progress: called between chunks, on this thread; raising from it cancels, and nothing is left behind.

        Raises InvalidRequest naming the field, the value and the remedy.
        """
        request = GenerateParams.create(prompt=prompt, **params)
        inputs = Inputs(latents, prompt_embeds, negative_prompt_embeds)
        for event in self.stream(request, inputs, output_type):
            if isinstance(event, GenerateOutput):
                return event
            if on_progress is not None:
                on_progress(event)
        raise Cancelled("the request ended without a result")

    def check(self, request: GenerateParams) -> ResolvedParams:
        """The request with all defaults filled in, or InvalidRequest."""
        resolved = resolve(
            request,
            self.spec,
            size_multiple=self._model.size_multiple,
            frame_multiple=self._model.temporal_stride,
        )
        for table, name in ((SAMPLERS, resolved.sampler), (POLICIES, resolved.cache)):
            table[name]  # an unknown name is an error here, and not half-way
        return resolved

    def stream(
        self, request: GenerateParams, inputs: Inputs = Inputs(), output_type: str = "uint8"
    ) -> Iterator[Progress | GenerateOutput]:
        """The request as a generator: Progress between chunks, the GenerateOutput last."""
        if output_type not in OUTPUT_TYPES:
            raise InvalidRequest("output_type", output_type, f"choose one of {', '.join(OUTPUT_TYPES)}")
        params = self.check(request)
        clock = _Clock()
        shape = self._model.latent_shape(params)
        noise = None if inputs.latents is None else check_latents(inputs.latents, shape)
        num_outputs = params.num_outputs if noise is None else len(noise)

        yield Progress("text", 0, 1)
        text, notes = self._encode(params, inputs)
        clock.lap("text", text)
        yield Progress("text", 1, 1)

        conditioning = self._conditioning(text, shape)
        sampler = SAMPLERS[params.sampler]
        schedule = sampler.schedule(params.num_inference_steps, params.shift)
        experts = split_experts(
            self._model.denoisers,
            np.asarray(schedule.timesteps),
            params.num_inference_steps,
            self.spec.sampling.boundary,
        )
        guidance = _guidance_table(params, [expert.last for expert in experts])

        results, frames, steps = [], [], []
        total = params.num_inference_steps * num_outputs
        for index in range(num_outputs):
            start = draw_noise((params.seed + index) % (MAX_SEED + 1), shape) if noise is None else noise[index : index + 1]
            tokens = self._pack(start)
            events = denoise(self._loop, experts, tokens, conditioning, schedule, guidance, POLICIES[params.cache](), sampler)
            for event in events:
                if isinstance(event, Progress):
                    yield Progress("denoise", index * params.num_inference_steps + event.done, total)
                else:
                    result = self._unpack(event.tokens, grid=self._model.grid(shape))
                    steps.append(_executed(event, schedule))
            clock.lap("denoise", result)
            results.append(np.asarray(result))
            if output_type != "latent":
                yield Progress("decode", index, num_outputs)
                frames.append(np.asarray(self._decode(result, to_uint8=output_type == "uint8")))
                clock.lap("decode")
                yield Progress("decode", index + 1, num_outputs)

        latents = np.concatenate(results)
        pictures = np.concatenate(frames) if frames else None
        report = Report(
            params=params.model_dump(),
            seconds=clock.seconds,
            steps=steps,
            shapes={
                "latents": latents.shape,
                "tokens": tuple(tokens.shape),
                **({"frames": pictures.shape} if pictures is not None else {}),
            },
            mesh=describe(self._model.mesh),
            dtype=self._model.dtype.name,
            peak_memory=_peak_memory(self._model.mesh.devices.flat[0]),
            notes=tuple(notes),
        )
        yield GenerateOutput(frames=pictures, latents=latents, report=report)

    def _encode(self, params: ResolvedParams, inputs: Inputs) -> tuple[Any, list[str]]:
        """Text states [2, 1, l, d], positive branch first, and what to tell the user."""
        states, notes = [], []
        for field, prompt, embeds in (
            ("prompt", params.prompt, inputs.prompt_embeds),
            ("negative_prompt", params.negative_prompt, inputs.negative_prompt_embeds),
        ):
            if embeds is not None:
                states.append(check_embeds(f"{field}_embeds", embeds, self._model.text_dim, self._text.max_length))
                continue
            encoded = self._text(prompt)
            states.append(encoded.states)
            if encoded.truncated:
                notes.append(
                    f"{field} has {encoded.num_tokens} tokens; the encoder takes {self._text.max_length}, the rest was cut off"
                )
        dtype = self._model.dtype
        return np.stack([np.asarray(state, dtype=np.float32).astype(dtype) for state in states]), notes

    def _conditioning(self, text: Any, shape: tuple[int, ...]) -> Conditioning:
        text, cos, sin = jax.device_put((text, *self._model.rope(shape)), replicated(self._model.mesh))
        return Conditioning(text=text, rope_cos=cos, rope_sin=sin)


class _Clock:
    """Wall seconds by stage; a lap waits for the device."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str, *arrays: Any) -> None:
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now


def _guidance_table(params: ResolvedParams, ends: list[int]) -> np.ndarray:
    """Guidance scale by step: the first expert's, then the second's."""
    table = np.full(MAX_STEPS, params.guidance_scale, np.float32)
    if params.guidance_scale_2 is not None:
        table[ends[0] :] = params.guidance_scale_2
    return table


def _executed(carry: DenoiseCarry, schedule: Schedule) -> str:
    done = np.asarray(carry.executed)[: int(schedule.num_steps)]
    return "".join("F" if step else "." for step in done)


def _peak_memory(device: Any) -> int:
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
