"""Steps computed as planned, and the guided velocity of the others predicted: one latent-sized tensor a remembered step.

Nothing of a picture is looked at, so that how long a run takes is known beforehand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from smartdiff_jax.cache.base import CachePolicy, Evaluate, Outlook, State, Step
from smartdiff_jax.cache.memory import Anchors
from smartdiff_jax.cache.params import MAX_STEPS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planned(CachePolicy):
    """fresh: which steps are computed. weights: of the last computed velocities, newest first, at the others."""

    fresh: Bool[Array, " max_steps"]
    weights: Float[Array, "max_steps h"]

    @classmethod
    def of(cls, fresh: Bool[np.ndarray, " t"], weights: Float[np.ndarray, "t h"]) -> "Planned":
        """A plan for T steps; see `planner.Plan`."""
        more = MAX_STEPS - len(fresh)
        table = np.pad(weights, ((0, more), (0, 0))).astype(np.float32)
        return cls(jnp.asarray(np.pad(fresh, (0, more), constant_values=True)), jnp.asarray(table))

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        """A plan is made for one budget already."""
        return self, ()

    def init_step(self, tokens: Float[Array, "b s p"]) -> State:
        return Anchors.empty(tokens.astype(jnp.float32), self.weights.shape[1])

    def step(
        self, state: Anchors, inner: State, step: Step, tokens: Float[Array, "b s p"], evaluate: Evaluate, num_branches: int
    ) -> tuple[Float[Array, "b s p"], State, State, Float[Array, " n"]]:
        state = state.cleared(step.changed_weights)
        fresh = self.fresh[step.index] | (state.count == 0)

        def compute(kept):
            anchors, inner = kept
            velocity, _, inner, computed = evaluate(inner)
            velocity = velocity.astype(jnp.float32)
            return velocity, computed, (anchors.push(velocity, step.index), inner)

        def reuse(kept):
            anchors, _ = kept
            return anchors.predict(self.weights[step.index]), jnp.zeros(num_branches), kept

        velocity, computed, (state, inner) = jax.lax.cond(fresh, compute, reuse, (state, inner))
        return velocity, state, inner, computed
