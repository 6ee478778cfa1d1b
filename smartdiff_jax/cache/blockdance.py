"""BlockDance (CVPR 2025, arXiv 2503.15927): in the middle of a run, share the stream as it leaves an early block.

The steps of a window go in groups: the first of each runs all blocks and remembers the stream behind block b; the others start
from there with block b + 1. Little is gained and little is lost.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from pydantic import Field, model_validator

from smartdiff_jax.cache.base import Hidden, Outlook, Stack, Step
from smartdiff_jax.cache.block_cache import BlockCache, BlockMemory, Verdict
from smartdiff_jax.cache.guards import GuardParams, Guards
from smartdiff_jax.cache.params import MAX_STEPS, ModelNumbers, check_numbers, check_params
from smartdiff_jax.errors import InvalidRequest


class BlockDanceParams(GuardParams):
    """group: steps that share a stream; 1 computes every step. start, end: the window, as fractions of the steps.

    block: the last one whose work is shared; None shares two thirds of the blocks.
    """

    group: int = Field(2, ge=1, le=MAX_STEPS)
    block: int | None = Field(None, ge=0)
    start: float = Field(0.40, ge=0.0, le=1.0)
    end: float = Field(0.95, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _in_order(self) -> "BlockDanceParams":
        if self.start > self.end:
            raise ValueError(f"start={self.start} must not be above end={self.end}")
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDance(BlockCache):
    """start, end: the window in steps. A step that shares counts as skipped, though the later blocks run."""

    guards: Guards
    group: Int[Array, ""]
    start: Int[Array, ""]
    end: Int[Array, ""]
    block: int | None = dataclasses.field(metadata={"static": True})

    adds: ClassVar[bool] = False
    evenly: ClassVar[bool] = True

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "BlockDance":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "blockdance")
        checked = check_params(BlockDanceParams, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            group=jnp.int32(checked.group),
            start=jnp.int32(max(checked.warmup, round(num_steps * checked.start))),
            end=jnp.int32(min(num_steps - checked.cooldown, round(num_steps * checked.end))),
            block=checked.block,
        )

    def span(self, num_blocks: int) -> tuple[int, int]:
        shared = max(1, round(num_blocks * 2 / 3)) if self.block is None else self.block + 1
        if shared > num_blocks:
            raise InvalidRequest(
                "cache_params.block", self.block, f"the model has {num_blocks} blocks; give at most {num_blocks - 1}"
            )
        return 0, shared

    def busy(self, outlook: Outlook) -> Bool[np.ndarray, " t"]:
        index = np.arange(outlook.num_steps)
        return (index < int(self.start)) | (index >= int(self.end))

    def judge(self, memory: BlockMemory, step: Step, stack: Stack, entering: Hidden) -> Verdict:
        outside = (step.index < self.start) | (step.index >= self.end)
        return Verdict(outside | ((step.index - self.start) % self.group == 0))
