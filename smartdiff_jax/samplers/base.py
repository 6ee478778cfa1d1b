"""What a sampler (an ODE solver for flow matching) is.

A flow-matching model predicts the velocity v = noise - data of x_sigma = (1 - sigma) * data + sigma * noise.
A sampler walks sigma from 1 to 0. All of its tables are padded to MAX_STEPS so that one executable serves every step
count; `num_steps` is a traced number.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

MAX_STEPS = 200
NUM_TRAIN_TIMESTEPS = 1000

State = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The discretisation of one request, padded with zeros behind `num_steps`.

    sigmas: noise levels, sigmas[0] the first, sigmas[num_steps] = 0.
    timesteps: what the model is told at each step (sigma * 1000 for the Wan family, as upstream rounds it).
    num_steps: how many entries of `timesteps` count.
    """

    sigmas: Float[Array, " max_steps_plus_1"]
    timesteps: Float[Array, " max_steps"]
    num_steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Spacing:
    """Where a model wants its noise levels, besides the shift.

    from_one: n levels from 1 to 1/n before the shift (image models), not from the training grid.
    terminal: the last level the model is asked at, to which the others are stretched (Qwen-Image).
    """

    from_one: bool = False
    terminal: float | None = None


@runtime_checkable
class Sampler(Protocol):
    """An ODE solver. `schedule` runs on the host (NumPy), `init` and `step` inside the compiled loop, in float32.

    Registered by `jax.tree_util.register_static`: registered dataclasses without fields are equal to one another in JAX,
    whatever their class, and jit could take the executable of another sampler.
    """

    def schedule(self, num_steps: int, shift: float, spacing: Spacing = Spacing()) -> Schedule:
        """The padded tables of a request: 1 <= num_steps <= MAX_STEPS, shift > 0.

        The multistep solvers lay their own grids whatever the spacing says, as their diffusers schedulers do.
        """
        ...

    def init(self, latents: Float[Array, "*shape"]) -> State:
        """History before the first step (zeros; never read before it is written)."""
        ...

    def step(
        self,
        state: State,
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        schedule: Schedule,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "*shape"], State]:
        """From sigmas[index] to sigmas[index + 1], given the model's velocity at sigmas[index]."""
        ...
