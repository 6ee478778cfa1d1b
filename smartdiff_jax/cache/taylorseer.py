"""TaylorSeer (ICCV 2025, arXiv 2503.06923) on the residual of the whole stack: compute every N-th step, extrapolate between.

One stream of memory where the paper keeps one for each module, which video models have no room for (32 GB at 1.3B, 480p).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import Hidden, Stack, Step
from smartdiff_jax.cache.block_cache import BlockCache, BlockMemory, Verdict
from smartdiff_jax.cache.guards import GuardParams, Guards
from smartdiff_jax.cache.memory import MAX_ANCHORS
from smartdiff_jax.cache.params import MAX_STEPS, ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.predict import forecast


class TaylorSeerParams(GuardParams):
    """interval: N; 1 computes every step. The first step after the warm-up is skipped, the next computed (as diffusers counts).

    order: degree of the extrapolation, each one more copy of the stream.
    predictor: "taylor" is the published form, "newton" the polynomial through the computed steps (`cache.predict`).
    """

    interval: int = Field(5, ge=1, le=MAX_STEPS)
    warmup: int = Field(3, ge=0)
    order: int = Field(1, ge=0, lt=MAX_ANCHORS)
    predictor: Literal["taylor", "newton"] = "taylor"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaylorSeer(BlockCache):
    """Which steps are computed is known beforehand."""

    guards: Guards
    interval: Int[Array, ""]
    order: Int[Array, ""]
    exact: Bool[Array, ""]
    num_anchors: int = dataclasses.field(metadata={"static": True})

    evenly: ClassVar[bool] = True

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "TaylorSeer":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "taylorseer")
        checked = check_params(TaylorSeerParams, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            interval=jnp.int32(checked.interval),
            order=jnp.int32(checked.order),
            exact=jnp.bool_(checked.predictor == "newton"),
            num_anchors=checked.order + 1,
        )

    def judge(self, memory: BlockMemory, step: Step, stack: Stack, entering: Hidden) -> Verdict:
        return Verdict((step.index - self.guards.warmup - 1) % self.interval == 0)

    def weights(self, at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""]) -> Float[Array, " h"]:
        return forecast(at, count, position, self.order, self.exact)
