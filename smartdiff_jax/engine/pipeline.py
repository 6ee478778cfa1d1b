"""The Python API: one model, loaded once, called many times.

    pipe = Pipeline.from_pretrained("pocket-video")
    out = pipe("a dog moving left", num_inference_steps=20, seed=1)
    out.save("dog.mp4")

A call is the life of one request: resolve -> text -> noise -> denoise in chunks -> decode (docs/architecture.md).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smartdiff_jax.cache.recorder import Recorder
from smartdiff_jax.config.request import MAX_SEED, GenerateParams, ResolvedParams
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine.announced import Announced, Course
from smartdiff_jax.engine.caching import describe_policy, executed_letters, memory_bytes, skipped_share
from smartdiff_jax.engine.calibration import MIN_STEPS, PROMPTS, Recording, numbers_from, signal_of, write_calibration
from smartdiff_jax.engine.hosts import Lead
from smartdiff_jax.engine.loading import LoadedModel, load_model
from smartdiff_jax.engine.meter import Clock, peak_memory
from smartdiff_jax.engine.output import GenerateOutput, Report
from smartdiff_jax.errors import Cancelled, InvalidConfig, InvalidRequest
from smartdiff_jax.kernels import ATTENTION
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.sharding.context_parallel import check_heads, wrap
from smartdiff_jax.sharding.layout import Layout, describe_pieces
from smartdiff_jax.sharding.mesh import describe
from smartdiff_jax.sharding.multihost import fetch
from smartdiff_jax.stages.base import Progress
from smartdiff_jax.stages.checkpoint import Checkpoint, to_host
from smartdiff_jax.stages.decode import Decode
from smartdiff_jax.stages.denoise import ChunkDone, DenoiseCarry, DenoiseLoop, denoise
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


@dataclasses.dataclass(frozen=True)
class Pause(Progress):
    """Progress at a place where a request can be left, and taken up by another process.

    checkpoint: copies it to the host; to be called before the stream goes on.
    preview: what the first output would be if it were finished now, [height, width, 3], of a video its first frame, in uint8
        (or with to_uint8=False in float32); None but at the steps asked for.
    """

    checkpoint: Callable[[], Checkpoint]
    preview: Callable[..., np.ndarray] | None = None


class Pipeline(Announced):
    """A loaded model and its compiled stages."""

    def __init__(self, model: LoadedModel, system: SystemConfig):
        super().__init__(model, system)
        self._lead: Lead | None = None
        layout = Layout(model.mesh)
        check_heads(model.mesh, model.num_heads)
        if system.mesh.cfg > 1 and model.spec.sampling.guidance != "cfg":
            remedy = f"{model.spec.name} has no negative branch to split off; use 1, and more ring, ulysses or data"
            raise InvalidConfig("mesh.cfg", system.mesh.cfg, remedy)
        hold = holder(system.residency)
        attend = wrap(ATTENTION[system.attention], model.mesh, batch=layout.batch_axes, sparse=self._sparse)
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

    def forget_prompts(self) -> None:
        """Encode prompts anew that came before, which is to be measured."""
        self._text.forget()

    def compile_decoder(self, params: ResolvedParams) -> None:
        """So that a picture of this size is not waited for when it is decoded. Not on several hosts, which compile together."""
        if self._lead is None:
            self._decode.compile(self._model.latent_shape(params.width, params.height, params.num_frames))

    @property
    def weights_id(self) -> str:
        """Tells the weights from others of the same model, wherever they lie."""
        return self._model.weights_id

    def stream(
        self,
        request: GenerateParams,
        inputs: Inputs = Inputs(),
        output_type: str = "uint8",
        resume: Checkpoint | None = None,
        stops: Collection[int] = (),
    ) -> Iterator[Progress | GenerateOutput]:
        """The request as a generator: Progress between chunks, the GenerateOutput last.

        What it yields in its stage "denoise" is a Pause. resume: go on from there, with the same request (seed included)
        and inputs. stops: steps of the first output after which it pauses with a preview. On several hosts it raises HostLost
        as soon as one is lost.
        """
        if self._lead is None:
            return self.events(request, inputs, output_type, resume, stops)
        request = request.model_copy(update={"seed": self.check(request).seed})
        told = inputs, output_type, resume, stops
        return self._lead.stream(self.events(request, *told), request, *told)

    def events(
        self,
        request: GenerateParams,
        inputs: Inputs = Inputs(),
        output_type: str = "uint8",
        resume: Checkpoint | None = None,
        stops: Collection[int] = (),
    ) -> Iterator[Progress | GenerateOutput]:
        """`stream` of this host alone: on several hosts all must take each step of it."""
        if output_type not in OUTPUT_TYPES:
            raise InvalidRequest("output_type", output_type, f"choose one of {', '.join(OUTPUT_TYPES)}")
        params, course = self._prepare(request)
        clock = Clock()
        shape = self._model.latent_shape(params.width, params.height, params.num_frames)
        is_picture = self._model.family.task == "t2i"
        noise = None if inputs.latents is None else check_latents(inputs.latents, shape, is_picture)
        num_outputs = params.num_outputs if noise is None else len(noise)

        yield Progress("text", 0, 1)
        encoded = self._encode(params, inputs)
        branches = self._branches(params, encoded, self._model.patches.grid(shape))
        clock.lap("text", branches)
        yield Progress("text", 1, 1)

        results, frames, steps = ([], [], []) if resume is None else (list(resume.results), [], list(resume.steps))
        remembered, num_tokens = 0, self.count_tokens(params)
        batches = split_outputs(num_outputs, num_tokens, self.system.mesh.data)
        total = params.num_inference_steps * len(batches)
        for number, batch in enumerate(batches):
            # Every device of the data axis gets as many outputs: the last is made again where they do not divide.
            indices = [min(index, num_outputs - 1) for index in batch]
            tokens = self._pack(self._noise(params.seed, shape, indices) if noise is None else noise[indices])
            wanted = range(batch.start, min(batch.stop, num_outputs))
            if number == len(results):
                here, kept = resume if resume and resume.batch == number else None, (number, tuple(results), tuple(steps))
                for event in self._denoise(params, course, tokens, branches, here, stops if number == 0 else ()):
                    if isinstance(event, ChunkDone):
                        done = number * params.num_inference_steps + event.done
                        yield self._pause(Progress("denoise", done, total), event, kept, self._model.patches.grid(shape))
                    else:
                        result = self._unpack(event.tokens, grid=self._model.patches.grid(shape))
                        executed = executed_letters(np.asarray(event.executed), params.num_inference_steps, course.scales)
                        steps += [executed] * len(wanted)
                        remembered = max(remembered, memory_bytes(event.cache_state))
                clock.lap("denoise", result)
                results.append(fetch(result)[: len(wanted)])
            for index in wanted if output_type != "latent" else ():
                yield Progress("decode", index, num_outputs)
                one = results[number][index - batch.start : index - batch.start + 1]
                frames.append(fetch(self._decode(one, to_uint8=output_type == "uint8")))
                clock.lap("decode")
                yield Progress("decode", index + 1, num_outputs)

        latents = np.concatenate(results)
        pictures = np.concatenate(frames) if frames else None
        report = Report(
            params=params.model_dump(),
            seconds=clock.seconds,
            steps=steps,
            cache=describe_policy(course.policy) | {"ratio": skipped_share(steps), "bytes": remembered},
            shapes={
                "latents": latents.shape,
                "tokens": tuple(tokens.shape),
                **({"frames": pictures.shape} if pictures is not None else {}),
            },
            mesh=describe(self._model.mesh),
            decoder=describe_pieces(shape[3], shape[4], self._model.mesh.size) if self._model.mesh.size > 1 else "",
            dtype=self._model.dtype.name,
            peak_memory=peak_memory(self._model.mesh.local_devices[0]),
            notes=encoded.notes + course.notes,
        )
        yield GenerateOutput(frames=pictures, latents=latents[:, :, 0] if is_picture else latents, report=report)

    def _pause(
        self,
        progress: Progress,
        event: ChunkDone,
        kept: tuple[int, tuple[np.ndarray, ...], tuple[str, ...]],
        grid: tuple[int, int, int],
    ) -> Pause:
        batch, results, steps = kept
        estimate = event.estimate

        def preview(to_uint8: bool = True) -> np.ndarray:
            latents = self._unpack(estimate, grid=grid)[:1, :, :1]
            return fetch(self._decode(latents, to_uint8))[0, 0]

        return Pause(
            *dataclasses.astuple(progress),
            checkpoint=lambda: Checkpoint(batch, event.done, to_host(event.carry), results, steps),
            preview=None if estimate is None else preview,
        )

    def calibrate(
        self,
        prompts: Sequence[str] = PROMPTS,
        num_inference_steps: Sequence[int] = (50,),
        on_progress: OnProgress | None = None,
        **params: Any,
    ) -> Path:
        """Measure what this model's caches go by, write it to a file (see `engine.calibration`), and use it from now on.

        One full run a prompt and number of steps. params: other fields of GenerateParams; the first seed is 0.
        Raises InvalidRequest, InvalidConfig on several hosts, and OSError where the file cannot be written.
        """
        if self._lead is not None:
            raise InvalidConfig("hosts", self.system.hosts, "calibrate on one host; the file serves any mesh")
        for steps in num_inference_steps:
            if steps < MIN_STEPS:
                raise InvalidRequest("num_inference_steps", steps, f"give at least {MIN_STEPS} to calibrate by")
        known = self._model.cache_numbers
        signal = signal_of(self.spec.family, known)
        seed, total = params.pop("seed", 0), len(prompts) * len(num_inference_steps)
        recordings: dict[int, list[Recording]] = {}
        for steps in num_inference_steps:
            for index, prompt in enumerate(prompts):
                request = GenerateParams.create(prompt=prompt, num_inference_steps=steps, seed=seed + index, **params)
                recordings.setdefault(steps, []).append(self._record(request, Recorder(steps, **signal)))
                if on_progress is not None:
                    on_progress(Progress("calibrate", sum(map(len, recordings.values())), total))
        source = f"calibrated with {len(prompts)} prompts, {', '.join(map(str, num_inference_steps))} steps"
        numbers = numbers_from(recordings, source, signal, known)
        write_calibration(self._model.calibration_file, numbers)
        self._model = dataclasses.replace(self._model, cache_numbers=known | numbers)
        return self._model.calibration_file

    def _record(self, request: GenerateParams, recorder: Recorder) -> Recording:
        """A full run of one output, and what the recorder wrote down."""
        resolved, course = self._prepare(request)
        shape = self._model.latent_shape(resolved.width, resolved.height, resolved.num_frames)
        branches = self._branches(resolved, self._encode(resolved, Inputs()), self._model.patches.grid(shape))
        tokens = self._pack(self._noise(resolved.seed, shape, [0]))
        *_, carry = self._denoise(resolved, dataclasses.replace(course, policy=recorder), tokens, branches)
        assert isinstance(carry, DenoiseCarry), "a loop ends with its carry"
        (signals, _), (latents, velocities) = carry.cache_state
        count = self.count_tokens(resolved)
        return Recording(
            signals=jax.tree.map(np.asarray, signals),
            latents=np.asarray(latents)[:, :, :count],
            velocities=np.asarray(velocities)[:, :, :count],
            sigmas=np.asarray(course.schedule.sigmas, np.float64)[: recorder.num_steps],
        )

    def _denoise(
        self,
        params: ResolvedParams,
        course: Course,
        tokens: Any,
        branches: Conditioning,
        resume: Checkpoint | None = None,
        stops: Collection[int] = (),
    ) -> Iterator[ChunkDone | DenoiseCarry]:
        num_tokens = self.count_tokens(params)
        padded = num_tokens if self._layout.padding(num_tokens) else None
        return denoise(
            self._loop,
            course.experts,
            tokens,
            branches,
            course.schedule,
            course.scales,
            course.policy,
            course.sampler,
            padded,
            # A clock would choose otherwise on each host.
            chunk=1 if jax.process_count() > 1 else None,
            resume=resume,
            stops=stops,
            sparsity=params.attention_sparsity if self.system.sparse_attention else None,
        )

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
        rope, text_rope = (_stacked(pairs) for pairs in zip(*tables, strict=True))
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


def _stacked(pairs: tuple[Any, ...]) -> Any:
    """A rotary table (cos, sin) for each branch, to one of all branches [n, 1, s, r]; None where the model has none."""
    return None if pairs[0] is None else tuple(np.stack(table)[:, None] for table in zip(*pairs, strict=True))
