"""Feature caches: which evaluations are computed, and what stands in for the others.

    step:  velocity = policy.step(tokens, evaluate)              the guided velocity of a whole step may be predicted
    guidance:  evaluate(stand_in)                                or the velocity of the negative branch
    model:   hidden = policy.blocks(stack)                       or what a range of blocks makes of one branch
    module:  stack.run_modules(around, held)                     or what single modules of each block make of it

A policy is a registered frozen dataclass of arrays (its numbers are data, its type is static), one object a request. It
is handed the work as a function and decides, inside the compiled loop, whether to call it: under `lax.cond` on a scalar that is
equal on every device. Its memory is part of the loop's carry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Hidden = Any
State = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Where the loop is.

    index, num_steps: of the request. sigmas: its noise levels, padded. timestep: what the model is told.
    changed_weights: another set of weights than at the step before serves this one (Wan 2.2's experts).
    token_weights: 1 for a token of the picture, 0 for padding that fills up a mesh's shards (None: there is none).
    """

    index: Int[Array, ""]
    num_steps: Int[Array, ""]
    sigmas: Float[Array, " max_steps_plus_1"]
    timestep: Float[Array, ""]
    changed_weights: Bool[Array, ""]
    token_weights: Float[Array, " s"] | None = None


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What is known of a run before it begins; lives on the host.

    sigmas: of its steps and the end.
    restarts: steps from which on other weights serve (Wan 2.2's experts).
    ratio: the share of steps that are to be skipped, of all of them; None leaves that to the policy.
    given: the policy's parameters that the user set.
    """

    num_steps: int
    sigmas: Float[np.ndarray, " t_plus_1"]
    restarts: tuple[int, ...] = ()
    ratio: float | None = None
    given: frozenset[str] = frozenset()

    @property
    def budget(self) -> int | None:
        """How many steps are computed: as near to the ratio as whole steps come, and one at least."""
        return None if self.ratio is None else max(1, round((1.0 - self.ratio) * self.num_steps))


Held = tuple[Mapping[str, Any], ...]
"""What modules gave: for each scan over blocks, by the module's name, arrays stacked over the blocks [n, ..., d]."""

Around = Callable[[str, Any, Callable[[], Any]], Any]
"""(module's name, what is held of it, compute) -> what it gives now, which is held from then on."""


@runtime_checkable
class Chosen(Protocol):
    """Some of a picture's tokens, as many on every device that the tokens are split over.

    Both take arrays [b, s, d], or a pair of picture and text streams of which the text goes through whole.
    """

    def pick(self, x: Hidden) -> Hidden:
        """The chosen rows."""
        ...

    def put(self, x: Hidden, rows: Hidden) -> Hidden:
        """x with `rows` in the chosen places."""
        ...


@runtime_checkable
class Stack(Protocol):
    """The blocks of one branch at one step. hidden: what enters them (an array, or a pair of picture and text streams)."""

    hidden: Hidden
    num_blocks: int

    def run(self, hidden: Hidden, lo: int, hi: int) -> Hidden:
        """Blocks lo to hi - 1 (static)."""
        ...

    def modules(self) -> Held:
        """What the attention modules of all blocks give, as shapes and dtypes."""
        ...

    def run_modules(self, around: Around, held: Held) -> tuple[Hidden, Held]:
        """All blocks, with `around` between each module and its block; and what is held after."""
        ...

    def remotes(self) -> Held:
        """What a ring's other devices give to each block, as shapes and dtypes. Raises InvalidConfig without a ring.

        Of each scan {"fresh": bool [n], "remote": ..., "mean": float32 [n b s 1], the mean feature of what was attended to}.
        """
        ...

    def run_remotes(self, held: Held) -> tuple[Hidden, Held]:
        """All blocks; what other devices give is computed where "fresh" says so, else it is what is held."""
        ...

    def keys(self) -> Held:
        """Keys and values that each block has of the picture's tokens, as shapes and dtypes: {"k", "v": [n, b, s, d]}."""
        ...

    def choose(self, priority: Float[Array, "b s 1"], share: float) -> Chosen:
        """The tokens of highest priority, of every device this share of its own (static; to the nearest token)."""
        ...

    def run_tokens(self, held: Held, chosen: Chosen | None = None) -> tuple[Hidden, Held]:
        """All blocks for all tokens, or for those chosen and for the text; and the keys and values that are held after.

        Chosen ones attend to all: to the others by the keys and values that are held of them. Of the picture only their
        stream comes out.
        """
        ...

    def modulated_input(self) -> Float[Array, "b s d"]:
        """The modulated input of block 0, computed only if asked for."""
        ...

    def time_embedding(self) -> Float[Array, "b n d"]:
        """What the timestep alone tells the blocks."""
        ...


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Something for the velocity of the negative branch.

    when: whether it is used, and the branch not run. predict: (velocity of the positive branch) -> that of the negative one.
    """

    when: Bool[Array, ""]
    predict: Callable[[Float[Array, "b s p"]], Float[Array, "b s p"]]


@runtime_checkable
class Evaluate(Protocol):
    """One evaluation of the model, from the state of the blocks.

    Returns the guided velocity, those of the branches (positive first), the state, and of each branch the share of the tokens
    whose blocks were computed.
    """

    def __call__(
        self, state: State, /, stand_in: StandIn | None = None
    ) -> tuple[Float[Array, "b s p"], Float[Array, "n b s p"], State, Float[Array, " n"]]: ...


class CachePolicy:
    """The exact path, and what a policy changes of it: the memory of a branch's blocks, or of the whole step, or both.

    A request makes one in two steps: `create` checks the user's parameters, `within` fits it to the run.
    """

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "CachePolicy":
        """From a request's `cache_params`, and from what is known of the model, by policy. Raises InvalidRequest."""
        raise NotImplementedError

    def within(self, outlook: Outlook) -> "tuple[CachePolicy, tuple[str, ...]]":
        """The policy that computes `outlook.budget` steps of this run, and what the user should know of it.

        Raises InvalidRequest where it cannot. Without a ratio it is the policy itself.
        """
        raise NotImplementedError

    def check_model(self, num_blocks: int, num_branches: int) -> None:
        """Raises InvalidRequest where a model of so many blocks, and branches of guidance, has no room for it."""

    def init_blocks(self, hidden: Hidden) -> State:
        """A branch's memory before the first step, for a residual stream like `hidden` (shapes and dtypes only)."""
        return ()

    def init_stack(self, stack: Stack) -> State:
        """The same where the stream alone does not tell; `blocks` is handed what this gives."""
        return self.init_blocks(stack.hidden)

    def blocks(self, state: State, step: Step, stack: Stack) -> tuple[Hidden, State, Bool[Array, ""] | Float[Array, ""]]:
        """What leaves the stack, the new memory, and whether the blocks were computed, or for which share of the tokens."""
        return stack.run(stack.hidden, 0, stack.num_blocks), state, jnp.bool_(True)

    def init_step(self, tokens: Float[Array, "b s p"]) -> State:
        """The step's memory before the first, for tokens like these (shapes and dtypes only)."""
        return ()

    def step(
        self, state: State, inner: State, step: Step, tokens: Float[Array, "b s p"], evaluate: Evaluate, num_branches: int
    ) -> tuple[Float[Array, "b s p"], State, State, Float[Array, " n"]]:
        """The guided velocity, the new memory of the step and of the blocks, and what was computed of each branch."""
        velocity, _, inner, computed = evaluate(inner)
        return velocity, state, inner, computed
