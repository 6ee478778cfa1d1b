"""The guided velocity of a whole step that is computed or predicted: what all policies on steps are built on.

    fresh:    velocity = evaluate();  anchors <- velocity - base
    skipped:  velocity = base + sum_h weights[h] * anchors[h]

What is remembered is of the size of the latents, of which there is always room. It is the guided velocity, not those of the
branches: where the guided one is scaled back to a norm (Qwen-Image), predictions of the branches would not add up to it. The
one `lax.cond` has the prediction as its branch 0.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smartdiff_jax.cache.base import Evaluate, State, Step
from smartdiff_jax.cache.block_cache import Verdict
from smartdiff_jax.cache.guards import Counters, Guarded
from smartdiff_jax.cache.memory import Anchors
from smartdiff_jax.cache.predict import hold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMemory:
    """All zeros before the first step.

    anchors: guided velocities, float32, at the indices of their steps.
    reference: what the decision compares with, of the last computed step. previous: the same, of the last step.
    score: numbers that the decision adds up from one computed step to the next.
    """

    counters: Counters
    anchors: Anchors
    reference: Any = ()
    previous: Any = ()
    score: Any = ()


class StepCache(Guarded):
    """Subclasses are registered dataclasses: they say what they wish in `judge`, and override the rest at need.

    num_anchors: steps that are remembered.
    every_step: whether predicted velocities are remembered too, as if they had been computed.
    """

    num_anchors: ClassVar[int] = 1
    every_step: ClassVar[bool] = False

    def judge(self, memory: StepMemory, step: Step, tokens: Float[Array, "b s p"]) -> Verdict:
        """Whether this step should be computed; the guards may know better."""
        raise NotImplementedError

    def reference(self, memory: StepMemory, step: Step, tokens: Float[Array, "b s p"], positive: Float[Array, "b s p"]) -> Any:
        """What the decisions of the steps to come compare with, of a computed step; called inside the computing branch.

        positive: velocity of the positive branch. memory: before the step, without anchors if other weights serve now.
        """
        return ()

    def base(self, tokens: Float[Array, "b s p"]) -> Float[Array, "b s p"] | float:
        """What a velocity is remembered relative to."""
        return 0.0

    def weights(self, anchors: Anchors, step: Step) -> Float[Array, " h"]:
        """Of the anchors, at a step that is not computed."""
        return hold(anchors.at, anchors.count, step.index.astype(jnp.float32))

    def init_step(self, tokens: Float[Array, "b s p"]) -> State:
        return StepMemory(Counters.zero(), Anchors.empty(tokens.astype(jnp.float32), self.num_anchors))

    def step(
        self, state: StepMemory, inner: State, step: Step, tokens: Float[Array, "b s p"], evaluate: Evaluate, num_branches: int
    ) -> tuple[Float[Array, "b s p"], State, State, Float[Array, " n"]]:
        state = dataclasses.replace(state, anchors=state.anchors.cleared(step.changed_weights))
        verdict = self.judge(state, step, tokens)
        fresh, counters = self.guards.decide(state.counters, step, verdict.wants_fresh, state.anchors.count > 0)
        base = self.base(tokens)

        def compute(kept):
            inner, anchors, _ = kept
            velocity, branches, inner, computed = evaluate(inner)
            velocity = velocity.astype(jnp.float32)
            if not self.every_step:
                anchors = anchors.push(velocity - base, step.index)
            return velocity, computed, (inner, anchors, self.reference(state, step, tokens, branches[0]))

        def reuse(kept):
            _, anchors, _ = kept
            return base + anchors.predict(self.weights(anchors, step)), jnp.zeros(num_branches), kept

        kept = inner, state.anchors, state.reference
        velocity, computed, (inner, anchors, reference) = jax.lax.cond(fresh, compute, reuse, kept)
        if self.every_step:
            anchors = anchors.push(velocity - base, step.index)
        score = jax.tree.map(lambda leaf: jnp.where(fresh, jnp.zeros_like(leaf), leaf), verdict.score)
        return velocity, StepMemory(counters, anchors, reference, verdict.previous, score), inner, computed
