"""From a name or a folder to a model in place: which weights, which architecture numbers, where they go."""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import ValidationError
from tokenizers import Tokenizer

from smartdiff_jax.cache.published import published_numbers
from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.model import ModelSpec, bundled_folder, known_models
from smartdiff_jax.config.shift import LinearShift
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine.calibration import FILE as CALIBRATION
from smartdiff_jax.engine.calibration import calibration_files, read_calibration
from smartdiff_jax.engine.compilation import keep_executables
from smartdiff_jax.errors import CheckpointError, InvalidConfig
from smartdiff_jax.kernels.hopper import import_ahead
from smartdiff_jax.models.families import FAMILIES, Family, family_of_pipeline
from smartdiff_jax.models.family import Architecture
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.sharding.weights import ShardingFor, weight_sharding
from smartdiff_jax.stages.tokenize import find_pad_id, load_tokenizer
from smartdiff_jax.weights.apart import apart
from smartdiff_jax.weights.folder import CheckpointFolder, Component, open_folder
from smartdiff_jax.weights.fp8 import are_fused, require_fp8, to_fp8
from smartdiff_jax.weights.hub import fetch
from smartdiff_jax.weights.residency import at_rest
from smartdiff_jax.weights.store import WeightStore, store_key
from smartdiff_jax.weights.stream import abstract, fill

SAMPLER_OF_SCHEDULER = {
    "UniPCMultistepScheduler": "flow_unipc",
    "DPMSolverMultistepScheduler": "flow_dpmpp",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Weights on the mesh, or beside it (weights/residency.py), and what is needed to run them. Pairs are (graphdef, weights).

    tokenizers, text_encoders: by component, as the family's text sources name them; a tokenizer comes with its padding id.
    cache_numbers: what is known of the model for feature caches, by policy. calibration_file: where more would go.
    weights_id: tells these weights from others of the same model.
    """

    spec: ModelSpec
    family: Family
    mesh: Mesh
    dtype: Any
    tokenizers: dict[str, tuple[Tokenizer, int]]
    max_text_lengths: dict[str, int]
    text_encoders: dict[str, tuple[Any, Any]]
    vae: tuple[Any, Any]
    denoiser_graph: Any
    denoisers: list[Any]
    configs: dict[str, Any]
    cache_numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration_file: Path = Path(CALIBRATION)
    weights_id: str = ""

    @cached_property
    def patches(self) -> Patches:
        return self.family.patches(self.configs["transformer"])

    @property
    def num_heads(self) -> int:
        config = self.configs["transformer"]
        return config.n_heads if hasattr(config, "n_heads") else config.num_attention_heads

    @property
    def spatial_stride(self) -> int:
        return self.configs["vae"].spatial_stride

    @property
    def temporal_stride(self) -> int:
        """0 for a picture model."""
        return self.configs["vae"].temporal_stride if self.family.task == "t2v" else 0

    @property
    def size_multiple(self) -> int:
        return self.spatial_stride * self.patches.size[1]

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, ...]:
        """(1, c, f, h, w) for a size in pixels."""
        frames = (num_frames - 1) // self.temporal_stride + 1 if self.temporal_stride else 1
        return 1, self.configs["vae"].z_dim, frames, height // self.spatial_stride, width // self.spatial_stride

    def count_tokens(self, width: int, height: int, num_frames: int) -> int:
        """Of one output."""
        return math.prod(self.patches.grid(self.latent_shape(width, height, num_frames)))

    def rope(self, grid: tuple[int, int, int], num_text: int, text_length: int) -> tuple[Any, Any]:
        """Rotary tables (cos, sin) of the tokens and of the text (or None)."""
        return _rope(self.family.rope, self.configs["transformer"], grid, num_text, text_length)


@lru_cache(maxsize=8)
def _rope(rope: Callable, config: Any, grid: tuple[int, int, int], num_text: int, text_length: int) -> tuple[Any, Any]:
    return rope(config, grid, num_text, text_length)


def load_model(model: str | Path, weights: str | Path | None, system: SystemConfig) -> LoadedModel:
    """Find the weights, read their numbers, place them. See Pipeline.from_pretrained for what `model` may be."""
    keep_executables(system.cache_dir / "executables")
    mesh = make_mesh(system.mesh)
    import_ahead()
    dtype = resolve_dtype(system.dtype)
    if system.precision == "fp8":
        require_fp8(dtype)
    folder, spec = locate(model, weights, system.cache_dir)
    family = FAMILIES[spec.family]
    components: dict[str, tuple[Any, Any]] = {}
    configs: dict[str, Any] = {}
    # A bundled model loads as fast from its own 8-bit files, so nothing of it is stored twice.
    store = None if spec.bundled else WeightStore(system.cache_dir / "weights")
    for name, architecture in family.architectures.items():
        if name in family.optional and folder.component(name) is None:
            continue
        component = folder.require(name)
        _check_numbers(spec, name, component.config)
        configs[name] = read_config(architecture, component)
        place = at_rest(_placement(name, mesh, system.mesh), system.residency)
        graphdef, state = _load_component(architecture, configs[name], component, dtype, place, store)
        if name.startswith("transformer"):
            graphdef, state = prepare_denoiser(graphdef, state, family, system, mesh)
        components[name] = graphdef, state
    if ("transformer_2" in components) != (spec.sampling.boundary is not None):
        raise CheckpointError(
            f"{folder.path} holds {'two experts' if 'transformer_2' in components else 'one expert'}, but its "
            f"boundary_ratio is {spec.sampling.boundary}; two experts need a boundary_ratio in model_index.json, one has none"
        )
    tokenizers, limits = {}, {}
    for source in family.text:
        component = folder.require(source.tokenizer)
        # Older folders name the padding in the encoder's config only.
        pad_id = find_pad_id(component.path, default=folder.require(source.encoder).config.get("pad_token_id"))
        tokenizers[source.tokenizer] = load_tokenizer(component.path), pad_id
        limits[source.tokenizer] = min(source.max_length, int(component.config.get("model_max_length", source.max_length)))
    files = find_calibration(folder, spec, configs["transformer"], dtype, system.cache_dir)
    return LoadedModel(
        spec=spec,
        family=family,
        mesh=mesh,
        dtype=dtype,
        tokenizers=tokenizers,
        max_text_lengths=limits,
        text_encoders={source.encoder: components[source.encoder] for source in family.text},
        vae=components["vae"],
        denoiser_graph=components["transformer"][0],
        denoisers=[components[name][1] for name in ("transformer", "transformer_2") if name in components],
        configs=configs,
        cache_numbers=published_numbers(spec.name) | read_calibration(files),
        calibration_file=files[0],
        weights_id="-".join(folder.require(name).fingerprint for name in sorted(components)),
    )


def find_calibration(folder: CheckpointFolder, spec: ModelSpec, config: Any, dtype: Any, cache_dir: Path) -> list[Path]:
    """Where the model's calibration is looked for, as `calibration_files` has it. config: the denoiser's."""
    architecture, transformer = FAMILIES[spec.family].architectures["transformer"], folder.require("transformer")
    return calibration_files(folder, spec.bundled, cache_dir, lambda: store_key(architecture, config, transformer.files, dtype))


def read_config(architecture: Architecture, component: Component) -> Any:
    """The component's numbers, checked."""
    try:
        return architecture.config.model_validate(component.config)
    except ValidationError as error:
        raise_invalid(error, InvalidConfig, architecture.config, where=f" in {component.path / 'config.json'}")


def _load_component(
    architecture: Architecture, config: Any, component: Component, dtype: Any, sharding_for: ShardingFor,
    store: WeightStore | None,
) -> tuple[Any, Any]:  # fmt: skip
    """(graphdef, weights): from the store of converted weights where they are, else from the checkpoint's files."""

    def convert() -> Any:
        return fill(architecture, target, component.tensors(), where=component.path)

    graphdef, target = abstract(architecture, config, dtype, sharding_for)
    if store is None:
        return graphdef, convert()
    return graphdef, store.get_or_convert(store_key(architecture, config, component.files, dtype), target, convert)


def _placement(component: str, mesh: Mesh, config: MeshConfig) -> ShardingFor:
    """Denoisers as the mesh file says; text encoders over every device of one output, since they have nothing else to
    split; the VAE whole, since its picture is split."""
    if component.startswith("transformer"):
        return weight_sharding(mesh, fsdp=config.fsdp)
    if component.startswith("text_encoder"):
        return weight_sharding(mesh, tensor=("ring", "ulysses", "tensor", "cfg"))
    return weight_sharding(mesh, tensor=())


def prepare_denoiser(graphdef: Any, weights: Any, family: Family, system: SystemConfig, mesh: Mesh) -> tuple[Any, Any]:
    """A denoiser's weights in the precision and the shape that they are run in."""
    if system.precision == "fp8":
        graphdef, weights = to_fp8(graphdef, weights, fused=are_fused(mesh))
    return graphdef, apart(weights) if _lie_apart(family, system) else weights


def _lie_apart(family: Family, system: SystemConfig) -> bool:
    """Whether a denoiser's blocks lie apart: of a picture's, on a GPU, where copies out of a stack show. Weights that are
    gathered or fetched for every use are copied anyway, and come as stacks."""
    fetched = system.mesh.fsdp or system.residency != "all"
    return jax.default_backend() == "gpu" and family.task == "t2i" and not fetched


def resolve_dtype(name: str) -> Any:
    """ "auto" is bfloat16 on a GPU, float32 elsewhere, where half precision is slower."""
    if name == "auto":
        name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(name)


def locate(model: str | Path, weights: str | Path | None, cache_dir: Path) -> tuple[CheckpointFolder, ModelSpec]:
    """The checkpoint folder and the spec of what the caller named."""
    name = str(model)
    known = known_models()
    if name in known:
        spec = known[name]
        if weights is not None:
            return open_folder(Path(weights)), spec.model_copy(update={"bundled": False})
        if spec.bundled:
            return open_folder(bundled_folder(name)), spec
        if spec.repo is None:
            raise InvalidConfig("weights", None, f"{name} is published nowhere; give the folder of its weights")
        return open_folder(fetch(spec.repo, cache_dir / "hub")), spec
    if weights is not None:
        raise InvalidConfig("weights", str(weights), f"goes with a known model name, and {name!r} is none; leave one out")
    if Path(name).is_dir():
        folder = open_folder(Path(name))
        return folder, spec_of(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = open_folder(fetch(name, cache_dir / "hub"))
        return folder, spec_of(folder)
    raise InvalidConfig("model", name, f"is no folder, no hub id (organisation/name), and no known name ({', '.join(known)})")


def spec_of(folder: CheckpointFolder) -> ModelSpec:
    """A spec for a folder that is not known by name: the defaults of the known model it shares most numbers with, and the
    sampler, the shift and the boundary that its own files tell."""
    family = family_of_pipeline(folder.pipeline_class)
    if family is None:
        served = ", ".join(family.pipeline_class for family in FAMILIES.values())
        raise CheckpointError(f"{folder.path} is a {folder.pipeline_class}; served are {served}")
    scheduler = folder.require("scheduler")
    if scheduler.class_name not in SAMPLER_OF_SCHEDULER:
        raise CheckpointError(
            f"{folder.path}/scheduler names {scheduler.class_name!r}; served are {', '.join(SAMPLER_OF_SCHEDULER)}"
        )
    relatives = [spec for spec in known_models().values() if spec.family == family.name and not spec.bundled]
    settings = scheduler.config
    shift = settings.get("flow_shift", settings.get("shift", 1.0))
    # Models that differ in their training only, as Z-Image and its Turbo, differ in the shift.
    near = max(relatives, key=lambda spec: (_shared_numbers(spec, folder), -abs(spec.sampling.shift - shift)))
    found: dict[str, Any] = {"sampler": SAMPLER_OF_SCHEDULER[scheduler.class_name]}
    if settings.get("use_dynamic_shifting"):
        if near.sampling.dynamic_shift is None or near.sampling.dynamic_shift.kind == "linear":
            known = LinearShift.model_fields.keys() & settings.keys()
            found["dynamic_shift"] = LinearShift(**{name: settings[name] for name in known})
    else:
        found |= {"dynamic_shift": None, "shift": shift}
    found["terminal"] = settings.get("shift_terminal") or None
    if folder.settings.get("is_distilled") is False:
        found |= {"guidance": "cfg", "guidance_scale": 4.0, "num_inference_steps": 50}  # FLUX.2 klein base
    found["boundary"] = folder.settings.get("boundary_ratio")
    return ModelSpec(
        name=folder.path.name,
        family=family.name,
        task=near.task,
        sampling=near.sampling.model_copy(update=found),
    )


def _shared_numbers(spec: ModelSpec, folder: CheckpointFolder) -> int:
    """How many of the numbers that tell the model the folder has too."""
    return sum(
        component.config.get(field) == expected
        for name, fields in spec.components.items()
        if (component := folder.component(name)) is not None
        for field, expected in fields.items()
    )


def _check_numbers(spec: ModelSpec, component: str, config: dict[str, Any]) -> None:
    """A folder loaded under a known name must be that model."""
    for field, expected in spec.components.get(component, {}).items():
        found = config.get(field, expected)
        if found != expected:
            raise CheckpointError(
                f"{component}/config.json has {field}={found!r}, but {spec.name} has {expected!r}; "
                "load the folder by its path instead of that name"
            )
