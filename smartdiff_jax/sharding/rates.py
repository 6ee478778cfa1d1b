"""What a GPU and the links between GPUs do in a second, for plans: measured where it says so, else a data sheet or assumed."""

import dataclasses
import math

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.sharding.mesh import AXES


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one kind of device, in bfloat16. Two-way figures of links are halved: what one device sends.

    attention, matmul: FLOP/s, of long sequences.
    elementwise: seconds for one feature of one token in one block, of all that is neither: norms, rotary turns, activations.
    memory: bytes/s of device memory.
    link: bytes/s within a host. network: bytes/s to another host, per device.
    latency: seconds that a collective takes besides its bytes.
    shown: the share of the time of fsdp's messages that computing does not hide.
    devices_per_host: neighbours in the mesh share hosts of so many.
    reserved: bytes of a device that no plan can use: the driver's context, executables. buffers: besides, where there are
        several devices, of collectives.
    """

    attention: float
    matmul: float
    elementwise: float
    memory: float
    link: float
    network: float
    latency: float
    shown: float
    devices_per_host: int
    reserved: int
    buffers: int

    def of_axis(self, mesh: MeshConfig, *axes: str) -> float:
        """Bytes/s along axes of `mesh` that lie next to each other, outermost first: those of the slowest link between them."""
        inside = math.prod(getattr(mesh, axis) for axis in AXES[AXES.index(axes[-1]) + 1 :])
        span = inside * math.prod(getattr(mesh, axis) for axis in axes)
        return self.link if span <= self.devices_per_host else self.network


HOPPER = Rates(
    # Measured, H200, in steps of Wan2.1-1.3B, 832x480x81, and FLUX.1-dev, 1024x1024: pallas_flash 672 and 596, cuBLAS 700 and
    # 730, and what both leave is 14e-12 and 16e-12.
    attention=670e12,
    matmul=710e12,
    elementwise=15e-12,
    memory=3.35e12,  # data sheet of the H100; an H200 has 4.8
    # Measured, two H100, link and latency together: all-to-alls in steps of Wan2.1-1.3B (50 MB, 243 microseconds) and FLUX.1
    # (14 MB, 105). Alone, from 8 to 64 MiB: 256 to 288. NVLink's data sheet says 450 each way.
    link=270e9,
    network=50e9,  # data sheet: 400 Gb/s of InfiniBand per GPU
    latency=50e-6,  # measured: see link; alone 55 to 78 microseconds, 39 to 66 for 1 MiB
    shown=0.5,  # measured, two H100 with Ulysses: 7 ms of Wan2.1-1.3B's 14 at 832x480x81, 23 of FLUX.1's 47 at 1024x1024
    devices_per_host=8,
    reserved=6 * 10**8,  # assumed
    buffers=14 * 10**8,  # assumed
)
"""H100 and H200, whose arithmetic is alike. On one and two H200 these rates give steps of Wan2.1-1.3B and FLUX.1-dev to 4 %
(docs/parallelism.md), with a kernel that serves the mesh at full speed."""
