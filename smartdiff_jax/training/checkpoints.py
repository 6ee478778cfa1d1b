"""Checkpoints of a training run, with Orbax: what a later run needs to go on where this one stopped.

RUN/<stage>/<step>/ holds the float32 parameters, their average, the optimizer's moments and the step count, and as JSON the
seconds spent. The two newest are kept. Saving goes on in the background; leaving the context waits for it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.training.state import Params, TrainState


class Checkpoints:
    """The checkpoints of one stage of a run."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest step there is."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Write `state` under its step; `meta` must be JSON. A step that is there already is left as it is."""
        step = int(state.step)
        if step != self.latest:
            args = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args)

    def meta(self) -> dict[str, Any] | None:
        """What was saved beside the newest state, or None where there is none."""
        if self.latest is None:
            return None
        return self._manager.restore(self.latest, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, like: TrainState) -> TrainState:
        """The newest state. like: of the same shapes (arrays or jax.ShapeDtypeStruct). Raises CheckpointError."""
        if self.latest is None:
            raise CheckpointError(f"{self.folder}: no checkpoint; run this stage first")
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_device()), like)
        self._check_fits(self.latest, _named(target))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_named(target)))
        named = self._manager.restore(self.latest, args=args)["state"]
        leaves, structure = jax.tree.flatten(like)
        return jax.tree.unflatten(structure, [named[name] for name in _named(like)])

    def _check_fits(self, step: int, wanted: dict[str, Any]) -> None:
        """Compared before anything is read: a restore that fails half-way leaves Orbax's readers running."""
        stored = self._manager.item_metadata(step)["state"].tree
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        differing = [
            name for name in shapes.keys() | wanted.keys() if name not in wanted or shapes.get(name) != wanted[name].shape
        ]
        if differing:
            raise CheckpointError(
                f"{self.folder}: step {step} does not fit this recipe ({', '.join(sorted(differing)[:5])} differ); "
                "go on with the recipe it was made with, or give another run directory"
            )

    def average(self) -> Params:
        """The averaged parameters of the newest state. Raises CheckpointError where there is none."""
        if self.latest is None:
            raise CheckpointError(f"{self.folder}: no checkpoint; run this stage first")
        named = self._manager.restore(self.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
        return {name.removeprefix("average/"): jnp.asarray(a) for name, a in named.items() if name.startswith("average/")}


def _device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _named(state: TrainState) -> dict[str, Any]:
    """Every leaf under a name made from its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {"/".join(str(getattr(part, "name", getattr(part, "key", getattr(part, "idx", part)))) for part in path): leaf
            for path, leaf in leaves}  # fmt: skip
