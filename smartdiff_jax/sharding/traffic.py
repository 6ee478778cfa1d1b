"""Bytes that one device sends, along each axis of a mesh.

P = ring * ulysses   R, U, T   the axes' sizes      H, D   heads and their features     a   bytes of an activation
n = tokens of a device + ceil(text / P), rows of its piece of an attention; text as far as it takes part
"""

import math
from collections.abc import Iterable

from jax.sharding import PartitionSpec

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.sharding.workload import Attention, Parameter, Placement, Workload, mesh_of_numbers, tokens_per_device

VELOCITY_ITEMSIZE = 4  # the loop is float32 whatever the model is


def of_evaluation(work: Workload, mesh: MeshConfig) -> dict[str, int]:
    """Of one evaluation of the model, by what is sent; nothing that is zero."""
    sent = {
        "ulysses": ulysses(work, mesh),
        "ring": ring(work, mesh),
        "text": text(work, mesh),
        "tensor": tensor(work, mesh),
        "fsdp": fsdp(work, mesh),
    }
    return {name: count for name, count in sent.items() if count}


def ulysses(work: Workload, mesh: MeshConfig) -> int:
    """Queries, keys and values there, the result back: 4 (U - 1) / U * n * H / T * D * a of each attention."""
    return sum(4 * attention_bytes(work, mesh, calls) * (mesh.ulysses - 1) // mesh.ulysses for calls in work.split_attention)


def ring(work: Workload, mesh: MeshConfig) -> int:
    """Keys and values R - 1 times onward, of U pieces and a U-th of the heads: 2 (R - 1) * n * H / T * D * a."""
    return sum(2 * attention_bytes(work, mesh, calls) * (mesh.ring - 1) for calls in work.split_attention)


def text(work: Workload, mesh: MeshConfig) -> int:
    """The text's part of joint attention, gathered where text is whole outside: (P - 1) * ceil(text / P) * H / T * D * a.

    Text that divides evenly is split outside as well.
    """
    pieces = mesh.ring * mesh.ulysses
    joint = (calls for calls in work.attention if calls.kind == "joint" and calls.text % pieces)
    rows = (calls.count * math.ceil(calls.text / pieces) * calls.heads * calls.head_dim for calls in joint)
    return (pieces - 1) * sum(rows) * work.itemsize // mesh.tensor


def tensor(work: Workload, mesh: MeshConfig) -> int:
    """A reduction behind each projection that is split by row: 2 (T - 1) / T * rows * features out * a, its rows not split
    by T. Kernels outside of blocks are left out: they are few."""
    places = mesh_of_numbers(mesh)
    place = work.placement("transformer", places, mesh)
    features = 0
    for leaf in work.parameters["transformer"]:
        if len(leaf.shape) == 3 and "tensor" in _axes(place(leaf.path, leaf.shape).spec, -2, len(leaf.shape)):
            features += leaf.shape[0] * leaf.shape[-1] * rows_of(work, mesh, leaf)
    return 2 * features * work.itemsize * (mesh.tensor - 1) // mesh.tensor


def rows_of(work: Workload, mesh: MeshConfig, leaf: Parameter) -> int:
    """Rows that a block's kernel works on: of the text, of the picture, or of both where the streams share it."""
    names = leaf.path.split(".")
    tokens = tokens_per_device(work.tokens, mesh.ring, mesh.ulysses)
    return text_rows(work, mesh) * ("image" not in names) + tokens * ("text" not in names)


def text_rows(work: Workload, mesh: MeshConfig) -> int:
    """Rows of the text's residual stream on a device: divided as the tokens are where they divide evenly, else all."""
    pieces = mesh.ring * mesh.ulysses
    return work.text if work.text % pieces else work.text // pieces


def fsdp(work: Workload, mesh: MeshConfig) -> int:
    """What a device lacks of the weights, received and passed on around the sequence axes: (P - 1) / P of what is cut."""
    if not mesh.fsdp:
        return 0
    whole, cut = (component_bytes(work, "transformer", m) for m in (mesh.model_copy(update={"fsdp": False}), mesh))
    return whole - cut


def cfg(work: Workload, mesh: MeshConfig) -> int:
    """Of a step: the velocity of a device's tokens, float32, to its partner: tokens of a device * features * 4."""
    return (mesh.cfg - 1) * tokens_per_device(work.tokens, mesh.ring, mesh.ulysses) * work.features * VELOCITY_ITEMSIZE


def component_bytes(work: Workload, component: str, mesh: MeshConfig) -> int:
    """Of a component's weights on one device."""
    return bytes_on_device(work.parameters[component], component, work.placement, mesh)


def bytes_on_device(leaves: Iterable[Parameter], component: str, placement: Placement, mesh: MeshConfig) -> int:
    """Of some of a component's parameters on one device."""
    places = mesh_of_numbers(mesh)
    place = placement(component, places, mesh)
    return sum(leaf.bytes_on_device(places, place(leaf.path, leaf.shape).spec) for leaf in leaves)


def piece_rows(work: Workload, mesh: MeshConfig, calls: Attention) -> int:
    """n of the formulas."""
    return tokens_per_device(work.tokens, mesh.ring, mesh.ulysses) + math.ceil(calls.text / (mesh.ring * mesh.ulysses))


def attention_bytes(work: Workload, mesh: MeshConfig, calls: Attention) -> int:
    """n * H / T * D * a, summed over equal calls: queries, keys, values or results of a device."""
    features = calls.count * calls.heads * calls.head_dim // mesh.tensor
    return piece_rows(work, mesh, calls) * features * work.itemsize


def _axes(spec: PartitionSpec, axis: int, rank: int) -> tuple[str, ...]:
    """The mesh axes that an axis of an array is split over."""
    entries = (*spec, *[None] * (rank - len(spec)))
    found = entries[axis]
    return found if isinstance(found, tuple) else () if found is None else (found,)
