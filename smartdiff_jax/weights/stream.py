"""Tensors of a checkpoint straight to their place: header -> plan -> one shard at a time -> device.

    checkpoint key --KeyRule--> leaf of the module (and which layer of it) --sharding_for--> shards --> jax.Array

Nothing is placed before every key and every shape has been checked against the module, traced abstractly. The host then holds
one shard of one leaf at a time: layers of a stacked leaf [num_layers, ...] are written into it from memory-mapped files.
"""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.models.family import Architecture, KeyRule
from smartdiff_jax.weights.tensor_file import Tensor

ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
MAX_LISTED = 20
COPY_BLOCK = 64  # columns: a transposed copy in strips of this width stays in cache, and is twice as fast


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where the numbers of one parameter come from: one source, or one a layer where it is stacked."""

    sources: tuple[tuple[Tensor, KeyRule], ...]
    stacked: bool


def abstract(
    architecture: Architecture, config: Any, dtype: DTypeLike, sharding_for: ShardingFor
) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's structure, and its parameters as jax.ShapeDtypeStruct with the dtype and sharding they will have.

    dtype: of every float parameter, but for those a key rule keeps in float32.
    sharding_for: dotted path and shape of a parameter to its sharding.
    """
    graphdef, variables = _traced(architecture.build, config)

    def target(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        value, name = variable.get_value(), dotted(path)
        kept = jnp.float32 if _keeps_float32(architecture, name) else dtype
        leaf_dtype = kept if jnp.issubdtype(value.dtype, jnp.floating) else value.dtype
        sharding = sharding_for(name, value.shape)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, leaf_dtype, sharding=sharding))

    return graphdef, nnx.from_flat_state([(path, target(path, variable)) for path, variable in variables])


@functools.lru_cache(maxsize=32)
def _traced(build: Callable[[Any, nnx.Rngs], nnx.Module], config: Any) -> tuple[nnx.GraphDef, tuple[tuple[Any, Any], ...]]:
    """A module's structure and its variables by path, in shapes alone: half a second that an upgrade need not take again."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))
    return graphdef, tuple(nnx.to_flat_state(state))


def load(
    architecture: Architecture,
    config: Any,
    tensors: Mapping[str, Tensor],
    dtype: DTypeLike,
    sharding_for: ShardingFor,
    where: object = "the checkpoint",
) -> nnx.State:
    """The parameters of a component, in place: float tensors in `dtype` (float32 where a rule keeps it), sharded.

    tensors: by checkpoint key, as `Component.tensors()` gives them.
    where: what errors call the checkpoint, for example the component's folder.
    Raises one CheckpointError naming all missing, unexpected and mis-shaped keys before anything is placed.
    """
    return fill(architecture, abstract(architecture, config, dtype, sharding_for)[1], tensors, where)


def fill(architecture: Architecture, state: nnx.State, tensors: Mapping[str, Tensor], where: object) -> nnx.State:
    """As `load`, for parameters as `abstract` gives them."""
    targets = [(path, variable) for path, variable in nnx.to_flat_state(state)]
    leaves = plan(architecture, {dotted(path): variable.get_value() for path, variable in targets}, tensors, where)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        placed = [(path, v.replace(_place(leaves[dotted(path)], v.get_value(), pool))) for path, v in targets]
    return nnx.from_flat_state(placed)


def check(architecture: Architecture, config: Any, tensors: Mapping[str, Tensor], where: object = "the checkpoint") -> None:
    """Raises the CheckpointError that `load` would raise, from the headers alone."""
    _, variables = _traced(architecture.build, config)
    plan(architecture, {dotted(path): v.get_value() for path, v in variables}, tensors, where)


def plan(
    architecture: Architecture,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, Tensor],
    where: object = "the checkpoint",
) -> dict[str, Leaf]:
    """Which tensors fill which parameter, by dotted path; raises CheckpointError with everything that does not fit.

    Tied weights saved under two names reach one place twice; the name whose rule comes first is the one read.
    """
    rules = [(re.compile(rule.pattern), number, rule) for number, rule in enumerate(architecture.key_rules)]
    ignored = re.compile(architecture.ignored_keys)
    unexpected, misshaped = [], []
    found: dict[str, dict[int | None, tuple[int, Tensor, KeyRule]]] = collections.defaultdict(dict)
    for key, tensor in tensors.items():
        if ignored.fullmatch(key):
            continue
        match, number, rule = next(((m, n, r) for pattern, n, r in rules if (m := pattern.fullmatch(key))), (None, -1, None))
        path = match.expand(rule.path) if match and rule else ""
        target = targets.get(path)
        layer = match.groupdict().get("layer") if match else None
        slot = None if layer is None else int(layer)
        if rule is None or target is None or (slot is not None and slot >= (target.shape or (0,))[0]):
            unexpected.append(key)
            continue
        wrong = _misfit(tensor, rule, target.shape if slot is None else target.shape[1:], target.dtype)
        if wrong:
            misshaped.append(f"{key} ({wrong})")
        if slot not in found[path] or number < found[path][slot][0]:
            found[path][slot] = (number, tensor, rule)

    leaves, missing = {}, []
    for path, target in targets.items():
        slots = found.get(path, {})
        stacked = bool(slots) and None not in slots
        wanted: Sequence[int | None] = range(target.shape[0]) if stacked else [None]
        absent = [slot for slot in wanted if slot not in slots]
        missing += [path if slot is None else f"{path} of layer {slot}" for slot in absent]
        if not absent:
            leaves[path] = Leaf(tuple(slots[slot][1:] for slot in wanted), stacked)
    if missing or unexpected or misshaped:
        raise CheckpointError(_report(where, missing, unexpected, misshaped))
    return leaves


def _misfit(tensor: Tensor, rule: KeyRule, shape: tuple[int, ...], dtype: np.dtype) -> str:
    """Why a tensor cannot fill a parameter, or nothing. The rule is tried on one zero broadcast: no bytes are read."""
    try:
        given = rule.transform(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)).shape
    except (ValueError, IndexError):  # a transpose, reshape or slice meant for another rank
        return f"checkpoint {list(tensor.shape)}, the model needs {list(shape)} after its change of layout"
    if given != shape:
        return f"checkpoint {list(given)}, model {list(shape)}"
    if jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"checkpoint {tensor.dtype}, the model needs floats"
    return ""


def _report(where: object, missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    lines = [f"{where}: the weights do not fit the model that config.json describes; nothing was loaded"]
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
        if keys:
            more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
            lines.append(f"{what} ({len(keys)}): {', '.join(sorted(keys)[:MAX_LISTED])}{more}")
    lines.append("use the config.json and the weights of one and the same release")
    return "\n  ".join(lines)


def _place(leaf: Leaf, target: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor) -> jax.Array:
    sharding = target.sharding
    assert sharding is not None
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(target.shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index or (), target.shape, strict=True))
        holders[spans].append(device)
    arrays = []
    for spans, devices in holders.items():
        shard = _read_shard(leaf, tuple(slice(*span) for span in spans), target.dtype, pool)
        places = [jax.sharding.SingleDeviceSharding(d, memory_kind=sharding.memory_kind) for d in devices]
        copies = [jax.device_put(shard, place) for place in places]
        arrays += jax.block_until_ready(copies)  # transfers hold on to the host's copy: never two shards at once
    return jax.make_array_from_single_device_arrays(target.shape, sharding, arrays)


def _read_shard(leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype, pool: ThreadPoolExecutor) -> np.ndarray:
    shard = np.empty([s.stop - s.start for s in index], dtype)
    if leaf.stacked:
        layers = leaf.sources[index[0]]
        list(pool.map(lambda out, layer: _copy(out, layer[0], layer[1], index[1:]), shard, layers))
    else:
        _copy(shard, *leaf.sources[0], index)
    return shard


def _copy(out: np.ndarray, tensor: Tensor, rule: KeyRule, index: tuple[slice, ...]) -> None:
    source = rule.transform(tensor.read())[index]
    if source.dtype == out.dtype and out.dtype.itemsize == 2:  # plain integers copy without a call an element
        source, out = source.view(np.uint16), out.view(np.uint16)
    if out.ndim < 2 or source.flags.c_contiguous:
        np.copyto(out, source, casting="unsafe")
        return
    for start in range(0, out.shape[-1], COPY_BLOCK):
        strip = np.s_[..., start : start + COPY_BLOCK]
        np.copyto(out[strip], source[strip], casting="unsafe")


def _keeps_float32(architecture: Architecture, path: str) -> bool:
    return any(rule.keep_float32 and _path_pattern(rule.path).fullmatch(path) for rule in architecture.key_rules)


@functools.lru_cache
def _path_pattern(path: str) -> re.Pattern[str]:
    """A rule's path as a pattern of paths: \\1 or \\g<name> in it stands for what that group of the key matched."""
    return re.compile(".+".join(re.escape(part) for part in re.split(r"\\g<\w+>|\\\d+", path)))


def dotted(path: tuple) -> str:
    """A path of nnx as a rule writes it: blocks.attn1.to_q.kernel."""
    return ".".join(map(str, path))
