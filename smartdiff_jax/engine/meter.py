"""What a request took: seconds by stage, and memory."""

import resource
import sys
import time
from typing import Any

import jax


class Clock:
    """Wall seconds by stage; a lap waits for the device."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str, *arrays: Any) -> None:
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now


def peak_memory(device: Any) -> int:
    """The most bytes in use so far, on the device where it tells, else of the process."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
