"""What a model may be asked for, and what that takes: known from its numbers, before its weights are there."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from smartdiff_jax.cache.base import CachePolicy
from smartdiff_jax.cache.published import published_numbers
from smartdiff_jax.config.model import ModelSpec, known_models
from smartdiff_jax.config.request import GenerateParams, ResolvedParams, resolve
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.caching import policy_for
from smartdiff_jax.engine.calibration import read_calibration
from smartdiff_jax.engine.loading import LoadedModel, find_calibration, locate, resolve_dtype
from smartdiff_jax.engine.planning import outline_of, weight_bytes, workload
from smartdiff_jax.errors import CheckpointError, InvalidConfig, InvalidRequest, Unsupported
from smartdiff_jax.kernels import SPARSE
from smartdiff_jax.kernels.sparse import SparseKernel
from smartdiff_jax.samplers import SAMPLERS
from smartdiff_jax.samplers.base import Sampler, Schedule, Spacing
from smartdiff_jax.sharding.mesh import describe, make_mesh
from smartdiff_jax.sharding.plan import Plan, plan_mesh
from smartdiff_jax.stages.denoise import Expert, split_experts
from smartdiff_jax.stages.guidance import guidance_table
from smartdiff_jax.weights.folder import CheckpointFolder, open_folder
from smartdiff_jax.weights.hub import find_fetched
from smartdiff_jax.weights.residency import Held, Resident

MAX_PLANS = 256
"""Sizes whose plans are remembered."""


@dataclasses.dataclass(frozen=True)
class Course:
    """How the loop will go for one request. scales: guidance, by step."""

    sampler: Sampler
    schedule: Schedule
    experts: list[Expert]
    scales: Float[np.ndarray, " max_steps"]
    policy: CachePolicy
    notes: tuple[str, ...]


class Announced:
    """A model that requests can be checked for. Its weights may be shapes only: a Pipeline has them.

    spec: the model's. system: how it will run.
    """

    def __init__(self, model: LoadedModel, system: SystemConfig):
        self.spec: ModelSpec = model.spec
        self.system = system
        self._sparse = sparse_kernel(system, model.dtype)
        self._model = model
        self._plans: dict[str, Plan] = {}
        self._denoisers: list[Held] = [Resident(weights) for weights in model.denoisers]
        self._num_blocks = nnx.merge(model.denoiser_graph, model.denoisers[0]).num_blocks

    def check(self, request: GenerateParams) -> ResolvedParams:
        """The request with all defaults filled in, or InvalidRequest."""
        return self._prepare(request)[0]

    def _prepare(self, request: GenerateParams) -> tuple[ResolvedParams, Course]:
        """All that can be wrong with a request is found here, before anything runs."""
        params = resolve(
            request,
            self.spec,
            size_multiple=self._model.size_multiple,
            frame_multiple=self._model.temporal_stride,
            count_tokens=self._model.count_tokens,
        )
        sampler, defaults, steps = SAMPLERS[params.sampler], self.spec.sampling, params.num_inference_steps
        schedule = sampler.schedule(steps, params.shift, Spacing(defaults.from_one, defaults.terminal))
        timesteps = np.asarray(schedule.timesteps)
        if params.attention_sparsity > 0 and not self.system.sparse_attention:
            remedy = "attention leaves nothing out here; give 0, or start with sparse_attention: true"
            raise InvalidRequest("attention_sparsity", params.attention_sparsity, remedy)
        experts = split_experts(self._denoisers, timesteps, steps, defaults.boundary)
        scales = guidance_table(params, defaults, timesteps, [expert.last for expert in experts])
        restarts = tuple(expert.first for expert in experts if 0 < expert.first < steps)
        policy, notes = policy_for(params, self._model.cache_numbers, schedule, restarts)
        policy.check_model(self._num_blocks, 2 if defaults.guidance == "cfg" else 1)
        return params, Course(sampler, schedule, experts, scales, policy, notes)

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Of all components on one device."""
        return weight_bytes(self._model, self.system.mesh)

    def plan(self, params: ResolvedParams) -> Plan:
        """What one output of a request will cost a device. Half a second for a size that is new."""
        size = f"{params.width}x{params.height}x{params.num_frames}"
        if (plan := self._plans.get(size)) is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            system, work = self.system, workload(self._model, size)
            batched = system.guidance == "batched"
            plan = plan_mesh(work, system.mesh, batched=batched, residency=system.residency)
            self._plans[size] = plan
        return plan

    def count_tokens(self, params: ResolvedParams) -> int:
        """Of one output."""
        return self._model.count_tokens(params.width, params.height, params.num_frames)

    @property
    def frame_multiple(self) -> int:
        """Frames are 1 more than a multiple of it; 0 for a picture model."""
        return self._model.temporal_stride

    def describe(self) -> str:
        """The devices and the dtype it computes in."""
        return f"{describe(self._model.mesh)} {self._model.dtype.name}"


def sparse_kernel(system: SystemConfig, dtype: Any) -> SparseKernel | None:
    """What leaves keys out, if requests may. Raises InvalidConfig where it cannot."""
    if not system.sparse_attention:
        return None
    if system.mesh.ring > 1:
        remedy = "sparse_attention chooses among keys that are on one device; use ulysses instead, or start without it"
        raise InvalidConfig("mesh.ring", system.mesh.ring, remedy)
    if system.attention not in SPARSE:
        remedy = f"cannot leave keys out, as sparse_attention asks; choose one of {', '.join(sorted(SPARSE))}"
        raise InvalidConfig("attention", system.attention, remedy)
    kernel, x = SPARSE[system.attention], jax.ShapeDtypeStruct((1, 8, 1, 128), dtype)
    try:
        jax.eval_shape(kernel.attend, x, x, x)
    except Unsupported as error:
        remedy = f"{error}; start without it (attention: xla leaves keys out anywhere, and is no faster for it)"
        raise InvalidConfig("sparse_attention", True, remedy) from None
    return kernel


def announce(model: str | Path, system: SystemConfig) -> Announced:
    """A model by what `Pipeline.from_pretrained` takes, without its weights: of a known name's nothing need be on this machine.

    A hub id is downloaded here. Raises InvalidConfig for an unknown model or setting, CheckpointError for a damaged folder.
    """
    dtype, known = resolve_dtype(system.dtype), known_models()
    if str(model) in known and not known[str(model)].bundled:
        spec = known[str(model)]
        folder = None if spec.repo is None else _if_whole(find_fetched(spec.repo, system.cache_dir / "hub"))
        found = outline_of(spec, None, dtype, system.precision)
    else:
        folder, spec = locate(model, None, system.cache_dir)
        found = outline_of(spec, folder, dtype, system.precision)
    numbers = published_numbers(spec.name)
    if folder is not None:
        numbers |= read_calibration(find_calibration(folder, spec, found.configs["transformer"], dtype, system.cache_dir))
    return Announced(dataclasses.replace(found, mesh=make_mesh(system.mesh), cache_numbers=numbers), system)


def _if_whole(path: Path | None) -> CheckpointFolder | None:
    try:
        return None if path is None else open_folder(path)
    except CheckpointError:  # it is being downloaded
        return None
