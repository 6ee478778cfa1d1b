"""What both trainings share: flat parameters, the optimizer step, the average of the weights, and the budget of time.

Parameters are float32 in a flat dictionary by dotted path (the path that key rules name), so that optimizer, checkpoint and
export all see the same names; the module is rebuilt in the dtype it runs in inside the compiled step.

    AdamW(b1 0.9, b2 0.99), gradients clipped to norm 1, learning rate: linear warm-up, then half a cosine to zero,
    over the *fraction of the budget* that is spent. A budget is minutes, so that a run ends its schedule when its time ends.
    The matrices of blocks may follow Muon instead (https://kellerjordan.github.io/posts/muon): momentum, made orthogonal.

    average_t = average + (1 - d_t) (params - average),  d_t = (1 - 1/t)^(gamma + 1)

is the power-function average of Karras et al. (arXiv 2312.02696): its length is a fixed share of the run, however long.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, Float

from smartdiff_jax.models.family import Architecture
from smartdiff_jax.weights.stream import abstract, dotted

Params = dict[str, Array]
ADAM_RMS = 0.2  # of AdamW's updates, over their elements, once a run is under way


@dataclasses.dataclass(frozen=True)
class Component:
    """A module under training: its numbers, its structure, and where each flat parameter belongs in it."""

    architecture: Architecture
    config: Any
    dtype: Any
    graphdef: Any
    paths: Mapping[str, tuple]
    dtypes: Mapping[str, Any]

    @classmethod
    def create(cls, architecture: Architecture, config: Any, dtype: Any) -> "Component":
        """dtype: what it computes in; parameters that a key rule keeps in float32 stay so."""
        graphdef, state = abstract(architecture, config, dtype, lambda path, shape: _this_device())
        leaves = {dotted(path): (path, variable.get_value()) for path, variable in nnx.to_flat_state(state)}
        paths = {name: path for name, (path, _) in leaves.items()}
        dtypes = {name: leaf.dtype for name, (_, leaf) in leaves.items()}
        return cls(architecture, config, jnp.dtype(dtype), graphdef, paths, dtypes)

    def init(self, seed: int) -> Params:
        """Fresh float32 parameters, as the module's own initialisers draw them."""

        def build(key: Array) -> Any:
            return nnx.split(self.architecture.build(self.config, nnx.Rngs(key)))[1]

        # A generator of few operations: with the default one, compiling a hundred draws takes half a minute.
        return flatten(jax.jit(build)(jax.random.key(seed, impl="unsafe_rbg")))

    def weights(self, params: Params) -> Any:
        """The parameters in the dtype they run in, nested as `nnx.merge` takes them."""
        nested: dict[Any, Any] = {}
        for name, path in self.paths.items():
            node = nested
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = params[name].astype(self.dtypes[name])
        return nested

    def module(self, params: Params) -> Any:
        """The module itself; differentiable in `params`."""
        return nnx.merge(self.graphdef, self.weights(params))


def _this_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def flatten(state: nnx.State) -> Params:
    """A module's parameters by dotted path, in float32."""
    return {dotted(path): jnp.asarray(v.get_value(), jnp.float32) for path, v in nnx.to_flat_state(state)}


def count(params: Mapping[str, Any]) -> int:
    """How many numbers there are."""
    return sum(math.prod(leaf.shape) for leaf in params.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on: float32 parameters, their average, the optimizer's moments, steps done (int32).

    Leaves are arrays, or shapes of arrays where a checkpoint is to be read.
    """

    params: dict[str, Any]
    average: dict[str, Any]
    moments: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with clipping and averaging; `lr_scale` multiplies the rate of the parameters it names.

    weight_decay: of kernels only; gamma: how short the average is (its spread is about 1/gamma of the run).
    muon: the size of a step of the blocks' matrices by Muon, in steps of AdamW (arXiv 2502.16982, section 2.2), which moves the
    rest, with Nesterov's momentum; 0: all by plain AdamW.
    """

    weight_decay: float = 0.01
    gamma: float = 12.0
    lr_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    muon: float = 0.0

    def _transform(self) -> optax.GradientTransformation:
        steps = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8) if self.muon == 0 else self._muon()
        decay = optax.add_decayed_weights(self.weight_decay, mask=_decayed)
        return optax.chain(optax.clip_by_global_norm(1.0), steps, decay)

    def _muon(self) -> optax.GradientTransformation:
        down = optax.contrib.muon(
            1.0, adam_b1=0.9, adam_b2=0.99, consistent_rms=ADAM_RMS * self.muon,
            muon_weight_dimension_numbers=_matrices_of_blocks,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return optax.chain(down, optax.scale(-1.0))

    def init(self, params: Params) -> TrainState:
        """A state at step 0, on this device, as that of a checkpoint is: a step compiled for a state that is on no device in
        particular would be compiled again for the one it returns. The average is a copy of its own, since the compiled step
        takes the state over.
        """

        def start(params: Params) -> TrainState:
            return TrainState(params, jax.tree.map(jnp.copy, params), self._transform().init(params), jnp.int32(0))

        return jax.jit(start, out_shardings=_this_device())(params)

    def apply(
        self, state: TrainState, gradients: Params, learning_rate: Float[Array, ""]
    ) -> tuple[TrainState, Float[Array, ""]]:
        """The state after one step, and the norm of the gradients before clipping."""
        updates: Any
        updates, moments = self._transform().update(gradients, state.moments, state.params)
        step = state.step + 1
        keep = (1 - 1 / step.astype(jnp.float32)) ** (self.gamma + 1)
        params = {
            name: value - learning_rate * self.lr_scale.get(name, 1.0) * updates[name] for name, value in state.params.items()
        }
        average = {name: params[name] + keep * (value - params[name]) for name, value in state.average.items()}
        return TrainState(params, average, moments, step), optax.tree.norm(gradients)


def _matrices_of_blocks(params: Any) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Stacked layer by layer: [layers, in, out]."""
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return {
        name: stacked if "blocks." in name and name.endswith("kernel") and leaf.ndim == 3 else None
        for name, leaf in params.items()
    }


def _decayed(params: Any) -> dict[str, bool]:
    return {name: name.endswith("kernel") for name in params}


def learning_rate(fraction: float, peak: float, warmup: float) -> float:
    """The rate when `fraction` of the budget is spent: up to `peak` at `warmup`, then half a cosine down to 0."""
    if fraction < warmup:
        return peak * max(fraction / warmup, 0.02)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warmup) / (1 - warmup))))


class Budget:
    """How much of a stage is done: seconds of training (compiling not counted) out of `minutes`, or steps out of `steps`.

    spent: seconds that earlier runs used. deadline: when this process must stop (time.monotonic), finished or not.
    finish: end the schedule at the deadline, whatever `minutes` says.
    """

    def __init__(
        self,
        minutes: float,
        steps: int | None,
        spent: float,
        deadline: float,
        finish: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps, self._clock, self._deadline = steps, clock, deadline
        self._began: float | None = None
        self._before, self._total = spent, minutes * 60
        self._finish = finish

    def start(self) -> None:
        """Begin to count: after the first compiled call."""
        if self._began is None:
            self._began = self._clock()
            if self._finish:
                self._total = self._before + max(1.0, self._deadline - self._began)

    @property
    def spent(self) -> float:
        """Seconds of training, those of earlier runs included."""
        return self._before + (0.0 if self._began is None else self._clock() - self._began)

    def fraction(self, step: int) -> float:
        """0 at the start, 1 when the schedule is over."""
        return min(1.0, step / self._steps if self._steps is not None else self.spent / self._total)

    def stop(self) -> bool:
        """Whether the process has to stop now."""
        return self._clock() >= self._deadline
