"""Feature caches: which evaluations of the block stack are computed, and what stands in for the others.

A policy is a frozen dataclass of arrays (its numbers are data, its type is static). It is handed the stack of blocks as a
function and decides, inside the compiled loop, whether to call it.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Int

State = Any
Hidden = Any


@runtime_checkable
class CachePolicy(Protocol):
    """One way to skip work; `state` is its memory for one branch of guidance."""

    def init(self, hidden: Hidden) -> State:
        """Memory before the first step, for a residual stream like `hidden` (shapes and dtypes only)."""
        ...

    def run(
        self,
        state: State,
        index: Int[Array, ""],
        num_steps: Int[Array, ""],
        hidden: Hidden,
        probe: Callable[[], Array],
        blocks: Callable[[Hidden], Hidden],
    ) -> tuple[Hidden, State, Bool[Array, ""]]:
        """What leaves the block stack at step `index`, the new memory, and whether the blocks were computed.

        probe: what this step may be compared by with earlier ones (evaluated only if called).
        blocks: the whole stack; to skip it, call it under `lax.cond` on a scalar that is equal on every device.
        """
        ...
