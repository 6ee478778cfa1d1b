"""The mesh of devices, and where arrays lie on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.errors import InvalidConfig

AXES = ("data", "cfg", "ring", "ulysses", "tensor")


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh of the first `config.num_devices` devices, all axes automatic (kernels are wrapped in shard_map)."""
    devices = jax.devices() if devices is None else devices
    if config.num_devices > len(devices):
        raise InvalidConfig(
            "mesh", config.num_devices, f"needs more devices than the {len(devices)} present; use fewer, or more hosts"
        )
    used = devices[: config.num_devices]
    idle = sorted(set(range(jax.process_count())) - {device.process_index for device in used})
    if idle:
        raise InvalidConfig("mesh", config.num_devices, f"leaves hosts {idle} without work; use all {len(devices)} devices")
    shape = tuple(getattr(config, axis) for axis in AXES)
    return Mesh(np.asarray(used).reshape(shape), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def describe(mesh: Mesh) -> str:
    """For reports: the axes longer than one, and the kind of device."""
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    return f"{axes} ({mesh.devices.flat[0].device_kind})"
