"""From a name or a folder to a plan: a model's numbers, its parameters and its work, without a weight or a device."""

import dataclasses
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from pydantic import ValidationError

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.model import ModelSpec, bundled_folder, known_models
from smartdiff_jax.config.request import GenerateParams, ResolvedParams, resolve
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.engine.counting import CountedAttend, Counts, count
from smartdiff_jax.engine.loading import LoadedModel, _placement, read_config, spec_of
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.families import FAMILIES, Family
from smartdiff_jax.models.family import Architecture, Conditioning
from smartdiff_jax.sharding.mesh import replicated
from smartdiff_jax.sharding.traffic import bytes_on_device
from smartdiff_jax.sharding.workload import Attention, Parameter, Workload, mesh_of_numbers
from smartdiff_jax.stages.decode import WHOLE_CLIP_LATENTS
from smartdiff_jax.weights.folder import CheckpointFolder, open_folder
from smartdiff_jax.weights.fp8 import to_fp8
from smartdiff_jax.weights.stream import abstract, dotted

ROWS = (61, 127)
"""Tokens that a model is counted with: its work is a line through the two. No width of a model is either number."""
ALIVE = 3
"""Arrays as large as the largest that a decoder holds at a time: what it reads, what it makes, and the shortcut."""


def outline(model: str | Path, dtype: Any = jnp.bfloat16, *, precision: str = "full") -> LoadedModel:
    """A model whose weights are shapes only (jax.ShapeDtypeStruct). precision: as in SystemConfig.

    model: a known name, whose numbers are in `config/models/`, or a folder in diffusers layout; only config files are read.
    Raises InvalidConfig for what is neither.
    """
    name = str(model)
    known = known_models()
    if name in known:
        return _known(name, jnp.dtype(dtype), precision)
    if Path(name).is_dir():
        folder = open_folder(Path(name))
        return outline_of(spec_of(folder), folder, jnp.dtype(dtype), precision)
    raise InvalidConfig("model", name, f"is no folder and no known name ({', '.join(known)}); download it first")


@lru_cache(maxsize=4)
def _known(name: str, dtype: Any, precision: str) -> LoadedModel:
    spec = known_models()[name]
    return outline_of(spec, open_folder(bundled_folder(name)) if spec.bundled else None, dtype, precision)


def outline_of(spec: ModelSpec, folder: CheckpointFolder | None, dtype: Any, precision: str = "full") -> LoadedModel:
    """`outline` of what has been found already. folder: None takes the numbers of the spec."""
    family = FAMILIES[spec.family]
    configs = _configs(spec, family, folder)
    nowhere = mesh_of_numbers(MeshConfig())
    parts = {name: _shapes(family.architectures[name], config, dtype, nowhere) for name, config in configs.items()}
    if precision == "fp8":
        denoisers = {name: part for name, part in parts.items() if name.startswith("transformer")}
        parts |= {name: to_fp8(*part, fused=False) for name, part in denoisers.items()}
    return LoadedModel(
        spec=spec,
        family=family,
        mesh=nowhere,
        dtype=dtype,
        tokenizers={},
        max_text_lengths={source.tokenizer: _max_length(source, folder) for source in family.text},
        text_encoders={source.encoder: parts[source.encoder] for source in family.text},
        vae=parts["vae"],
        denoiser_graph=parts["transformer"][0],
        denoisers=[parts[name][1] for name in ("transformer", "transformer_2") if name in parts],
        configs=configs,
    )


def _shapes(architecture: Architecture, config: Any, dtype: Any, nowhere: Mesh) -> tuple[Any, Any]:
    """(graphdef, shapes of the weights), placed nowhere."""
    graphdef, weights = abstract(architecture, config, dtype, lambda path, shape: replicated(nowhere))
    return graphdef, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)


def _configs(spec: ModelSpec, family: Family, folder: CheckpointFolder | None) -> dict[str, Any]:
    configs = {}
    for name, architecture in family.architectures.items():
        present = name in spec.components if folder is None else folder.component(name) is not None
        if name in family.optional and not present:
            continue
        if folder is None:
            configs[name] = _config_of_spec(architecture, spec, name)
        else:
            configs[name] = read_config(architecture, folder.require(name))
    return configs


def _config_of_spec(architecture: Architecture, spec: ModelSpec, component: str) -> Any:
    try:
        return architecture.config.model_validate(spec.components.get(component, {}))
    except ValidationError as error:
        raise_invalid(error, InvalidConfig, architecture.config, where=f" in components.{component} of {spec.name}")


def _max_length(source: Any, folder: CheckpointFolder | None) -> int:
    config = {} if folder is None else folder.require(source.tokenizer).config
    return min(source.max_length, int(config.get("model_max_length", source.max_length)))


def resolve_size(model: LoadedModel, size: str | None) -> ResolvedParams:
    """ "832x480x81" (width, height, frames), "1024x1024", a name of the model's such as "16:9", or None for its defaults.

    Raises InvalidRequest for a size that the model does not make.
    """
    parts = (size or "").lower().split("x")
    frames = parts[2] if len(parts) == 3 else None
    return resolve(
        GenerateParams.create(prompt="", size="x".join(parts[:2]) if frames else size, num_frames=frames),
        model.spec,
        size_multiple=model.size_multiple,
        frame_multiple=model.temporal_stride,
        count_tokens=model.count_tokens,
    )


def workload(model: LoadedModel, size: str | None = None) -> Workload:
    """What `model` (see `outline`; a loaded one will do) computes and keeps for one output of a size (see `resolve_size`).

    Text is counted at the length the longest prompt is padded to, guidance at its default scale.
    """
    params = resolve_size(model, size)
    shape = model.latent_shape(params.width, params.height, params.num_frames)
    tokens = model.count_tokens(params.width, params.height, params.num_frames)
    inputs = _conditioning(model, model.patches.grid(shape))
    features = shape[1] * math.prod(model.patches.size)
    few, more = (_count_evaluation(model, inputs, rows, features) for rows in ROWS)
    per_token = (more.counts.matmul - few.counts.matmul) / (ROWS[1] - ROWS[0])
    sampling = model.spec.sampling
    guided = sampling.guidance == "cfg"
    return Workload(
        model=model.spec.name,
        tokens=tokens,
        features=features,
        latent_shape=shape,
        text=few.text,
        width=few.width,
        inner=few.counts.widest,
        num_blocks=few.num_blocks,
        num_heads=model.num_heads,
        guided=guided,
        branches=2 if guided and sampling.guidance_scale != sampling.guidance_off else 1,
        itemsize=model.dtype.itemsize,
        attention=_attention(few.counts),
        matmul_per_token=per_token,
        matmul_fixed=few.counts.matmul - per_token * ROWS[0],
        read=few.counts.read,
        parameters=parameters(model),
        placement=_placement,
        decoder=_decoder_bytes(model, shape),
    )


def parameters(model: LoadedModel) -> dict[str, tuple[Parameter, ...]]:
    """The leaves of every component."""
    denoisers = zip(("transformer", "transformer_2"), model.denoisers, strict=False)
    encoders = ((name, weights) for name, (_, weights) in model.text_encoders.items())
    return {name: _leaves(weights) for name, weights in (*denoisers, *encoders, ("vae", model.vae[1]))}


def weight_bytes(model: LoadedModel, mesh: MeshConfig) -> int:
    """Of all components on one device of a mesh."""
    return sum(bytes_on_device(leaves, name, _placement, mesh) for name, leaves in parameters(model).items())


def _leaves(weights: nnx.State) -> tuple[Parameter, ...]:
    return tuple(_parameter(dotted(path), variable.get_value()) for path, variable in nnx.to_flat_state(weights))


def _parameter(path: str, leaf: Any) -> Parameter:
    """Blocks that lie apart (weights/apart.py) count as the stack they came from."""
    if isinstance(leaf, tuple):
        return Parameter(path, (len(leaf), *leaf[0].shape), leaf[0].dtype.itemsize)
    return Parameter(path, tuple(leaf.shape), leaf.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """One evaluation of the model: what it computes, and what the residual stream is made of."""

    counts: Counts
    num_blocks: int
    width: int
    text: int


def _count_evaluation(model: LoadedModel, inputs: dict[str, Any], rows: int, features: int) -> _Evaluation:
    num_blocks = 0

    def evaluate(weights, tokens, timestep, fields):
        nonlocal num_blocks
        denoiser: Any = nnx.merge(model.denoiser_graph, weights)
        num_blocks = denoiser.num_blocks
        hidden, context = denoiser.embed(tokens, timestep, Conditioning(**fields))
        hidden = denoiser.run_blocks(hidden, context, CountedAttend(), 0, num_blocks)
        return denoiser.head(hidden, context), hidden

    table = jax.ShapeDtypeStruct((1, rows, inputs["rope"][0].shape[-1]), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, rows, features), jnp.float32)
    timestep = jax.ShapeDtypeStruct((), jnp.float32)
    trace = jax.make_jaxpr(evaluate, return_shape=True)
    jaxpr, (_, hidden) = trace(model.denoisers[0], tokens, timestep, inputs | {"rope": (table, table)})
    streams = jax.tree.leaves(hidden)
    text = sum(stream.shape[1] for stream in streams[1:])
    return _Evaluation(count(jaxpr, rows), num_blocks, streams[0].shape[-1], text)


def _conditioning(model: LoadedModel, grid: tuple[int, int, int]) -> dict[str, Any]:
    """The fields of one branch's Conditioning, as shapes."""
    fields: dict[str, Any] = {}
    for source in model.family.text:
        graphdef, weights = model.text_encoders[source.encoder]
        length = model.max_text_lengths[source.tokenizer]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        extra = {} if source.layers is None else {"layers": source.layers}
        states = jax.eval_shape(lambda w, ids: nnx.merge(graphdef, w)(ids, ids, **extra), weights, ids)  # noqa: B023
        shape = states.shape
        if source.field == "text":
            num_text = min(source.padded_length(length - source.skip), length - source.skip)
            shape = (1, num_text, shape[-1])
            if source.buckets:
                fields["text_length"] = jax.ShapeDtypeStruct((1,), jnp.int32)
        fields[source.field] = jax.ShapeDtypeStruct(shape, model.dtype)
    num_text = fields["text"].shape[1]
    for name, table in zip(("rope", "text_rope"), model.rope(grid, num_text, num_text), strict=True):
        fields[name] = None if table is None else tuple(jax.ShapeDtypeStruct((1, *half.shape), half.dtype) for half in table)
    if model.spec.sampling.guidance == "embedded":
        fields["guidance"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    return fields


def _attention(counts: Counts) -> tuple[Attention, ...]:
    return tuple(
        Attention(kind, number, text, heads, head_dim)
        for (kind, (_, _, heads, head_dim), text), number in counts.attention.items()
    )


def _decoder_bytes(model: LoadedModel, shape: tuple[int, ...]) -> int:
    """Estimate: ALIVE times the largest array, what the chunks of a clip hand on, and the pixels as float32."""
    graphdef, weights = model.vae
    chunk = None if math.prod(shape[2:]) <= WHOLE_CLIP_LATENTS else 1

    def decode(weights, latents):
        return nnx.merge(graphdef, weights).decode(latents, chunk=chunk)

    jaxpr, pixels = jax.make_jaxpr(decode, return_shape=True)(weights, jax.ShapeDtypeStruct(shape, jnp.float32))
    counts = count(jaxpr)
    return ALIVE * counts.largest + counts.carried + 4 * math.prod(pixels.shape)
