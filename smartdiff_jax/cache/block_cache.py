"""A range of blocks that is computed or stood in for: what all policies on blocks are built on.

    hidden --prefix [0, lo)--> entering --[lo, hi) or entering + prediction--> --suffix [hi, L)--> out

Prefix and suffix always run. The one `lax.cond` has the reuse as its branch 0 and changes the memory in the other branch only,
because XLA copies what passes through a branch in other arrangements.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smartdiff_jax.cache.base import Hidden, Stack, State, Step
from smartdiff_jax.cache.guards import Counters, Guarded
from smartdiff_jax.cache.memory import Anchors
from smartdiff_jax.cache.predict import hold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMemory:
    """A branch's memory; all zeros before the first step.

    anchors: what the range of blocks adds to the stream at computed steps.
    reference: what the decision compares with, of the last computed step. previous: the same, of the last step.
    score: numbers that the decision adds up from one computed step to the next.
    """

    counters: Counters
    anchors: Anchors
    reference: Any = ()
    previous: Any = ()
    score: Any = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A policy's wish at one step, with what it wants remembered: `previous` whatever comes, `score` if the step is skipped."""

    wants_fresh: Bool[Array, ""]
    previous: Any = ()
    score: Any = ()


class BlockCache(Guarded):
    """Subclasses are registered dataclasses: they say what they wish in `judge`, and override the rest at need.

    num_anchors: computed steps that are remembered.
    adds: whether the range's part is what it adds to the stream, or the stream itself as it leaves.
    """

    num_anchors: int = 1
    adds: ClassVar[bool] = True

    def check_model(self, num_blocks: int, num_branches: int) -> None:
        self.span(num_blocks)

    def span(self, num_blocks: int) -> tuple[int, int]:
        """The range of a stack: blocks lo to hi - 1. Raises InvalidRequest if the stack has no such range."""
        return 0, num_blocks

    def judge(self, memory: BlockMemory, step: Step, stack: Stack, entering: Hidden) -> Verdict:
        """Whether this step should be computed; the guards may know better."""
        raise NotImplementedError

    def reference(self, stack: Stack, entering: Hidden) -> Any:
        """What the decisions of the steps to come compare with, of a computed step; called inside the computing branch."""
        return ()

    def weights(self, at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""]) -> Float[Array, " h"]:
        """Of the anchors, at a step that is not computed."""
        return hold(at, count, position)

    def init_blocks(self, hidden: Hidden) -> State:
        return BlockMemory(Counters.zero(), Anchors.empty(hidden, self.num_anchors))

    def blocks(self, state: BlockMemory, step: Step, stack: Stack) -> tuple[Hidden, State, Bool[Array, ""]]:
        lo, hi = self.span(stack.num_blocks)
        entering = stack.run(stack.hidden, 0, lo) if lo else stack.hidden
        state = dataclasses.replace(state, anchors=state.anchors.cleared(step.changed_weights))
        verdict = self.judge(state, step, stack, entering)
        fresh, counters = self.guards.decide(state.counters, step, verdict.wants_fresh, state.anchors.count > 0)
        position = step.index.astype(jnp.float32)

        def compute(kept):
            anchors, _ = kept
            out = stack.run(entering, lo, hi)
            part = jax.tree.map(jnp.subtract, out, entering) if self.adds else out
            return out, (anchors.push(part, position), self.reference(stack, entering))

        def reuse(kept):
            anchors, _ = kept
            part = anchors.predict(self.weights(anchors.at, anchors.count, position))
            return jax.tree.map(jnp.add, entering, part) if self.adds else part, kept

        out, (anchors, reference) = jax.lax.cond(fresh, compute, reuse, (state.anchors, state.reference))
        score = jax.tree.map(lambda leaf: jnp.where(fresh, jnp.zeros_like(leaf), leaf), verdict.score)
        memory = BlockMemory(counters, anchors, reference, verdict.previous, score)
        return stack.run(out, hi, stack.num_blocks) if hi < stack.num_blocks else out, memory, fresh


def picture(hidden: Hidden) -> Array:
    """The stream of the picture's tokens."""
    return hidden[0] if isinstance(hidden, tuple) else hidden
