"""Policies on steps driven over velocities whose every number is known, with Euler's method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from loops import as_string

from smartdiff_jax.cache.base import Step
from smartdiff_jax.samplers.base import MAX_STEPS

SCALE = 3.0


class StepToy:
    """A policy over a whole run, as one compiled loop. The velocity of a branch is table[branch, step] + pull * x."""

    def __init__(self, count_evaluations=False):
        self.traces = self.evaluations = 0
        self._counts = count_evaluations
        self._run = jax.jit(self._loop)

    def _evaluated(self):
        self.evaluations += 1

    def _loop(self, policy, tables, pull, start, sigmas, num_steps, first, token_weights):
        self.traces += 1

        def body(index, carry):
            x, memory, velocities, executed, where = carry
            changed = (index == first) & (first > 0)
            step = Step(index, num_steps, sigmas, 1000 * sigmas[index], changed, token_weights)

            def evaluate(inner, /, stand_in=None):
                if self._counts:
                    jax.debug.callback(self._evaluated)
                branches, computed = tables[:, index] + pull * x, jnp.ones(len(tables))
                if stand_in is not None:
                    predicted = stand_in.predict(branches[0])
                    branches = branches.at[1].set(jnp.where(stand_in.when, predicted, branches[1]))
                    computed = computed.at[1].set(1.0 - stand_in.when)
                guided = branches[-1] + SCALE * (branches[0] - branches[-1])
                return guided, branches, inner + 1, computed

            inner, memory = memory
            velocity, memory, inner, computed = policy.step(memory, inner, step, x, evaluate, len(tables))
            following = x + (sigmas[index + 1] - sigmas[index]) * velocity
            carry = following, (inner, memory), velocities.at[index].set(velocity)
            return *carry, executed.at[index].set(computed), where.at[index].set(x)

        empty = jnp.zeros((MAX_STEPS, *start.shape))
        memory = jnp.int32(0), policy.init_step(start)
        carry = start, memory, empty, jnp.zeros((MAX_STEPS, len(tables))), empty
        x, (inner, _), velocities, executed, where = jax.lax.fori_loop(0, num_steps, body, carry)
        return x, velocities, executed, where, inner

    def __call__(self, policy, sigmas, tables=None, *, pull=0.0, start=None, first=0, token_weights=None):
        """(x at the end, velocities [steps ...], a string of computed steps for each branch, x before each step)."""
        steps = len(sigmas) - 1
        start = toy_start() if start is None else start
        tables = toy_tables()[:1] if tables is None else tables
        padded = np.zeros(MAX_STEPS + 1, np.float32)
        padded[: steps + 1] = sigmas
        numbers = jnp.float32(pull), start, jnp.asarray(padded), jnp.int32(steps), jnp.int32(first)
        x, velocities, executed, where, inner = self._run(policy, tables, *numbers, token_weights)
        strings = [as_string(column) for column in np.asarray(executed[:steps]).T]
        assert int(inner) == strings[0].count("F")  # a state that passes through is touched where the model runs
        return np.asarray(x), np.asarray(velocities[:steps]), strings, np.asarray(where[:steps])


@functools.cache
def toy_start(seed=0, batch=1):
    return jnp.asarray(np.random.RandomState(seed).standard_normal((batch, 5, 4)), jnp.float32)


@functools.cache
def toy_tables(seed=0, batch=1, drift=0.2):
    """Of two branches, [2, MAX_STEPS, b, 5, 4]: random walks."""
    steps = np.random.RandomState(seed).standard_normal((2, MAX_STEPS, batch, 5, 4)) * drift
    steps[:, 0] /= drift
    return jnp.asarray(np.cumsum(steps, axis=1), jnp.float32)


def shifted(steps, shift=3.0):
    """Noise levels of a run."""
    line = np.linspace(1, 0, steps + 1)
    return (shift * line / (1 + (shift - 1) * line)).astype(np.float32)
