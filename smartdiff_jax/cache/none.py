"""The exact path: every block at every step."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoCache:
    """Computes always and remembers nothing."""

    def init(self, hidden):
        return ()

    def run(self, state, index, num_steps, hidden, probe, blocks):
        return blocks(hidden), state, jnp.bool_(True)
