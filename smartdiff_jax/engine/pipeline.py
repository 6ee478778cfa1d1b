"""The Python API: one model, loaded once, called many times.

    pipe = Pipeline.from_pretrained("pocket-video")
    out = pipe("a dog moving left", num_inference_steps=20, seed=1)
    out.save("dog.mp4")

A call is the life of one request: resolve -> text -> noise -> denoise in chunks -> decode (docs/architecture.md).
"""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.model import ModelSpec, SamplingDefaults
from smartdiff_jax.config.request import MAX_SEED, GenerateParams, ResolvedParams, resolve
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine.hosts import Lead
from smartdiff_jax.engine.loading import LoadedModel, load_model
from smartdiff_jax.engine.output import GenerateOutput, Report
from smartdiff_jax.errors import Cancelled, InvalidConfig, InvalidRequest
from smartdiff_jax.kernels import ATTENTION
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.samplers import SAMPLERS
from smartdiff_jax.samplers.base import MAX_STEPS, NUM_TRAIN_TIMESTEPS, Schedule, Spacing
from smartdiff_jax.sharding.context_parallel import check_heads, wrap
from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.sharding.mesh import describe
from smartdiff_jax.sharding.multihost import fetch
from smartdiff_jax.stages.base import Progress
from smartdiff_jax.stages.decode import Decode
from smartdiff_jax.stages.denoise import DenoiseCarry, DenoiseLoop, denoise, split_experts
from smartdiff_jax.stages.guidance import GUIDANCE, combine_for
from smartdiff_jax.stages.latents import check_latents, draw_noise
from smartdiff_jax.stages.text import Branch, EncodedText, PromptEncoder, TextEncode
from smartdiff_jax.weights.residency import holder

OUTPUT_TYPES = ("uint8", "np", "latent")
MAX_BATCH_TOKENS = 32_768
"""Of one trip through the loop: one Wan clip at 480p, or eight pictures at 1024x1024. More fills the device no better."""
OnProgress = Callable[[Progress], object]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a caller may bring instead of having it made, shaped as the model's diffusers pipeline takes it."""

    latents: Any = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    pooled_prompt_embeds: Any = None


class Pipeline:
    """A loaded model and its compiled stages."""

    def __init__(self, model: LoadedModel, system: SystemConfig):
        self.spec: ModelSpec = model.spec
        self.system = system
        self._model = model
        self._lead: Lead | None = None
        layout = Layout(model.mesh)
        check_heads(model.mesh, model.num_heads)
        if system.mesh.cfg > 1 and model.spec.sampling.guidance != "cfg":
            remedy = f"{model.spec.name} has no negative branch to split off; use 1, and more ring, ulysses or data"
            raise InvalidConfig("mesh.cfg", system.mesh.cfg, remedy)
        hold = holder(system.residency)
        attend = wrap(ATTENTION[system.attention], model.mesh, batch=layout.batch_axes)
        self._text = TextEncode(
            [
                PromptEncoder(
                    dataclasses.replace(source, max_length=model.max_text_lengths[source.tokenizer]),
                    *model.tokenizers[source.tokenizer],
                    graphdef,
                    hold(weights),
                    dtype=model.dtype,
                )
                for source in model.family.text
                for graphdef, weights in [model.text_encoders[source.encoder]]
            ],
            model.dtype,
        )
        self._layout = layout
        guidance = GUIDANCE["batched" if system.mesh.cfg > 1 else system.guidance](layout.as_branches)
        combine = combine_for(model.spec.sampling)
        self._loop = DenoiseLoop(model.denoiser_graph, attend, guidance, combine, model.dtype, layout)
        self._denoisers = [hold(weights) for weights in model.denoisers]
        graphdef, weights = model.vae
        self._decode = Decode(graphdef, hold(weights), dtype=model.dtype, layout=layout)
        self._pack = jax.jit(lambda noise: layout.pad_tokens(model.patches.pack(noise)), out_shardings=layout.tokens)
        self._unpack = jax.jit(
            lambda tokens, grid: model.patches.unpack(tokens[:, : math.prod(grid)], grid), static_argnames="grid"
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        weights: str | Path | None = None,
        system: SystemConfig | str | Path | None = None,
        mesh: MeshConfig | str | Path | None = None,
        dtype: str | None = None,
    ) -> "Pipeline":
        """Load a model.

        model: a known name (`smartdiff models`), a folder in diffusers layout, or a hub id "organisation/name".
        weights: the folder of a known name's weights; None takes the bundled ones or fetches them from the hub.
        system: how this process runs, or the path of a YAML file; `mesh` and `dtype` replace those fields of it.
            `mesh` may be such a path too, in the place of `system`. Where the file has `hosts`, this process is host 0 and
            waits for the others.

        Raises InvalidConfig for an unknown model or setting, CheckpointError for weights that do not fit.
        """
        if isinstance(mesh, str | Path):
            if system is not None:
                raise InvalidConfig("mesh", str(mesh), "is a file of system parameters, and `system` is given too; give one")
            system, mesh = mesh, None
        if system is None:
            system = SystemConfig.create()
        elif not isinstance(system, SystemConfig):
            system = SystemConfig.from_file(system)
        changes = {name: value for name, value in (("mesh", mesh), ("dtype", dtype)) if value is not None}
        system = SystemConfig.create(**(system.model_dump() | changes))
        if system.hosts is None:
            return cls(load_model(model, weights, system), system)
        lead = Lead(system.hosts)
        pipe = cls(lead.load(model, weights, system), system)
        pipe._lead = lead
        return pipe

    def __call__(
        self,
        prompt: str = "",
        *,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        output_type: str = "uint8",
        on_progress: OnProgress | None = None,
        **params: Any,
    ) -> GenerateOutput:
        """Generate. `params` are the fields of GenerateParams (size, num_frames, num_inference_steps, seed, …).

        latents: noise [n, c, f, h, w], of a picture model [n, c, h, w], instead of what the seed draws, one output each.
        prompt_embeds, negative_prompt_embeds: text states [1, length, d] instead of the prompts;
        pooled_prompt_embeds: [1, e] beside them, for models with a pooled text encoder (FLUX.1).
        output_type: "uint8", "np" (float32 in [0, 1]) or "latent".
        on_progress: called between chunks, on this thread; raising from it cancels, and nothing is left behind.

        Raises InvalidRequest naming the field, the value and the remedy.
        """
        request = GenerateParams.create(prompt=prompt, **params)
        inputs = Inputs(latents, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds)
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
            count_tokens=self._model.count_tokens,
        )
        for table, name in ((SAMPLERS, resolved.sampler), (POLICIES, resolved.cache)):
            table[name]  # an unknown name is an error here, and not half-way
        return resolved

    def stream(
        self, request: GenerateParams, inputs: Inputs = Inputs(), output_type: str = "uint8"
    ) -> Iterator[Progress | GenerateOutput]:
        """The request as a generator: Progress between chunks, the GenerateOutput last.

        On several hosts HostLost, as soon as one is lost.
        """
        if self._lead is None:
            return self.events(request, inputs, output_type)
        request = request.model_copy(update={"seed": self.check(request).seed})
        return self._lead.stream(self.events(request, inputs, output_type), request, inputs, output_type)

    def events(
        self, request: GenerateParams, inputs: Inputs = Inputs(), output_type: str = "uint8"
    ) -> Iterator[Progress | GenerateOutput]:
        """`stream` of this host alone: on several hosts all must take each step of it."""
        if output_type not in OUTPUT_TYPES:
            raise InvalidRequest("output_type", output_type, f"choose one of {', '.join(OUTPUT_TYPES)}")
        params = self.check(request)
        clock = _Clock()
        shape = self._model.latent_shape(params.width, params.height, params.num_frames)
        is_picture = self._model.family.task == "t2i"
        noise = None if inputs.latents is None else check_latents(inputs.latents, shape, is_picture)
        num_outputs = params.num_outputs if noise is None else len(noise)

        yield Progress("text", 0, 1)
        encoded = self._encode(params, inputs)
        branches = self._branches(params, encoded, self._model.patches.grid(shape))
        clock.lap("text", branches)
        yield Progress("text", 1, 1)

        sampler = SAMPLERS[params.sampler]
        defaults = self.spec.sampling
        schedule = sampler.schedule(params.num_inference_steps, params.shift, Spacing(defaults.from_one, defaults.terminal))
        timesteps = np.asarray(schedule.timesteps)
        experts = split_experts(self._denoisers, timesteps, params.num_inference_steps, defaults.boundary)
        scales = guidance_table(params, defaults, timesteps, [expert.last for expert in experts])

        results, frames, steps = [], [], []
        num_tokens = self._model.count_tokens(params.width, params.height, params.num_frames)
        batches = split_outputs(num_outputs, num_tokens, self.system.mesh.data)
        padded = num_tokens if self._layout.padding(num_tokens) else None
        total = params.num_inference_steps * len(batches)
        chunk = 1 if jax.process_count() > 1 else None  # a clock would choose otherwise on each host
        for number, batch in enumerate(batches):
            # Every device of the data axis gets as many outputs: the last is made again where they do not divide.
            indices = [min(index, num_outputs - 1) for index in batch]
            tokens = self._pack(self._noise(params.seed, shape, indices) if noise is None else noise[indices])
            policy = POLICIES[params.cache]()
            for event in denoise(self._loop, experts, tokens, branches, schedule, scales, policy, sampler, padded, chunk):
                if isinstance(event, Progress):
                    yield Progress("denoise", number * params.num_inference_steps + event.done, total)
                else:
                    result = self._unpack(event.tokens, grid=self._model.patches.grid(shape))
                    wanted = range(batch.start, min(batch.stop, num_outputs))
                    steps += [_executed(event, schedule)] * len(wanted)
            clock.lap("denoise", result)
            results.append(fetch(result)[: len(wanted)])
            for index in wanted if output_type != "latent" else ():
                yield Progress("decode", index, num_outputs)
                one = results[-1][index - batch.start : index - batch.start + 1]
                frames.append(fetch(self._decode(one, to_uint8=output_type == "uint8")))
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
            peak_memory=_peak_memory(self._model.mesh.local_devices[0]),
            notes=encoded.notes,
        )
        yield GenerateOutput(frames=pictures, latents=latents[:, :, 0] if is_picture else latents, report=report)

    def _encode(self, params: ResolvedParams, inputs: Inputs) -> EncodedText:
        """What each branch of guidance is told."""
        branches = [Branch("prompt", params.prompt, inputs.prompt_embeds, inputs.pooled_prompt_embeds)]
        if self.spec.sampling.guidance == "cfg":
            branches.append(Branch("negative_prompt", params.negative_prompt, inputs.negative_prompt_embeds))
        elif inputs.negative_prompt_embeds is not None:
            raise InvalidRequest("negative_prompt_embeds", "given", f"{self.spec.name} has no negative branch; leave it out")
        return self._text(branches)

    def _branches(self, params: ResolvedParams, encoded: EncodedText, grid: tuple[int, int, int]) -> Conditioning:
        """All branches as the loop takes them, on the mesh."""
        count, _, num_text, _ = encoded.text.shape
        lengths = np.full(count, num_text) if encoded.text_length is None else encoded.text_length[:, 0]
        tables = [self._model.rope(grid, num_text, int(length)) for length in lengths]
        rope, text_rope = (
            None if pairs[0] is None else tuple(np.stack(table)[:, None] for table in zip(*pairs, strict=True))
            for pairs in zip(*tables, strict=True)
        )
        embedded = self.spec.sampling.guidance == "embedded"
        told = {
            "text": encoded.text,
            "text_rope": text_rope,
            "text_length": encoded.text_length,
            "pooled": encoded.pooled,
            "guidance": np.full((count, 1), params.guidance_scale, np.float32) if embedded else None,
        }
        return Conditioning(rope=self._layout.place_rope(rope), **jax.device_put(told, self._layout.replicated))

    def _noise(self, seed: int, shape: tuple[int, ...], indices: list[int]) -> jax.Array:
        """Output i of several is the picture of seed + i alone."""
        return jnp.concatenate([draw_noise((seed + index) % (MAX_SEED + 1), shape) for index in indices])


def split_outputs(num_outputs: int, tokens: int, data: int = 1) -> list[range]:
    """Outputs that go through the loop together: as many a device of the data axis as MAX_BATCH_TOKENS hold, in powers of
    two, so that few sizes of batch are ever compiled. The last batch may reach beyond the outputs to fill the axis."""
    batches, first = [], 0
    while first < num_outputs:
        most = max(1, min((num_outputs - first) // data, MAX_BATCH_TOKENS // tokens))
        size = data * 2 ** (most.bit_length() - 1)
        batches.append(range(first, first + size))
        first += size
    return batches


def guidance_table(
    params: ResolvedParams, defaults: SamplingDefaults, timesteps: np.ndarray, ends: list[int]
) -> Float[np.ndarray, " max_steps"]:
    """Guidance scale by step, 1 where there is none: the first expert's, then the second's."""
    table = np.full(MAX_STEPS, params.guidance_scale, np.float32)
    if params.guidance_scale_2 is not None:
        table[ends[0] :] = params.guidance_scale_2
    table += np.float32(1.0 - defaults.guidance_off)
    table[1.0 - timesteps / NUM_TRAIN_TIMESTEPS > defaults.guidance_truncation] = 1.0
    return table


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


def _executed(carry: DenoiseCarry, schedule: Schedule) -> str:
    """A letter a step: F where every branch that runs computed its blocks, . where none did, h where one of two did."""
    done = np.asarray(carry.executed)[: int(schedule.num_steps)]
    return "".join("F" if step[0] else "h" if step.any() else "." for step in done)


def _peak_memory(device: Any) -> int:
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
