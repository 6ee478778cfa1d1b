"""The seams every model shares: what a denoiser is, what conditions it, and how a checkpoint names its tensors.

    latents [b c f h w] --pack--> tokens [b s p] --embed--> hidden, context --run_blocks--> hidden --head--> velocity [b s p]

The denoise loop only ever sees packed tokens, so a sequence is one axis to split whatever the model; the rotary table
travels with the tokens as data, so an executable depends on the number of tokens and not on their grid.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from smartdiff_jax.kernels.base import Attend

Hidden = Any
Context = Any
Rope = tuple[Float[Array, "*branches c n r"], Float[Array, "*branches c n r"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Everything a denoiser is told besides the noisy tokens and the timestep.

    A model sees one branch of guidance; the loop is handed all branches at once, every leaf with a leading axis of branches
    (positive first). The batch axis of a leaf is the tokens' or 1.

    text: states of the text encoder [b, l, d], padded to l.
    rope: cosines and sines of the tokens' positions, float32 [b, s, head_dim / 2] each.
    text_rope: the same of the text's positions [b, m, head_dim / 2], for models whose text has positions; m is l, and what a
        model puts in front of its text.
    text_length: int32 [b], how many text states count (None: all l, as Wan has it, whose padding is attended to).
    pooled: one vector for the whole prompt [b, e], for models with a pooled encoder.
    guidance: guidance scale [b], for models that were distilled to be told it.
    """

    text: Float[Array, "*branches b l d"]
    rope: Rope
    text_rope: tuple[Float[Array, "*branches e m r"], Float[Array, "*branches e m r"]] | None = None
    text_length: Int[Array, "*branches b"] | None = None
    pooled: Float[Array, "*branches b e"] | None = None
    guidance: Float[Array, "*branches b"] | None = None


@runtime_checkable
class Denoiser(Protocol):
    """A diffusion transformer as the loop and the caches see it (an nnx.Module with stacked blocks).

    hidden is the residual stream: an array [b, s, d], or for models that carry text along, a pair (tokens, text).
    num_blocks counts all blocks that `run_blocks` may split, whatever their kinds, in the order they run.
    """

    num_blocks: int

    def embed(
        self, tokens: Float[Array, "b s p"], timestep: Float[Array, ""], conditioning: Conditioning
    ) -> tuple[Hidden, Context]:
        """Tokens to the residual stream, and whatever all blocks share (modulation, text, rotary table).

        The context is a dataclass whose `rope` is the tokens': where blocks run for some of them, it is theirs.
        """
        ...

    def run_blocks(self, hidden: Hidden, context: Context, attend: Attend, lo: int, hi: int) -> Hidden:
        """Blocks lo to hi - 1 (static), one compiled scan."""
        ...

    def head(self, hidden: Hidden, context: Context) -> Float[Array, "b s p"]:
        """The residual stream to a float32 velocity of the packed latents."""
        ...

    def probe(self, hidden: Hidden, context: Context) -> Array:
        """What step caches compare between steps: the modulated input of block 0, of the picture's stream."""
        ...

    def time_embedding(self, context: Context) -> Array:
        """What the timestep alone tells the blocks, for caches that go by it: [b, n, d]."""
        ...


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """How one kind of checkpoint tensor reaches a parameter.

    pattern: regular expression that matches the whole checkpoint key; a named group `layer` says which slice of a
        stacked parameter [num_layers, ...] the tensor fills.
    path: dotted path of the parameter in the module.
    transform: the checkpoint's layout to ours, on the host (NumPy).
    keep_float32: stays float32 whatever the run's dtype, where upstream computes with it in float32.
    """

    pattern: str
    path: str
    transform: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor
    keep_float32: bool = False


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One module of a checkpoint folder: its numbers, its code, and its keys.

    config: pydantic class read from the component's own config.json.
    build: config and nnx.Rngs to module (only ever traced abstractly, but for training).
    key_rules: first match wins; a checkpoint key no rule matches is an unexpected key.
    ignored_keys: pattern of checkpoint keys that are known and not needed.
    """

    config: type
    build: Callable[[Any, nnx.Rngs], nnx.Module]
    key_rules: tuple[KeyRule, ...]
    ignored_keys: str = r"(?!)"


def linear(tensor: np.ndarray) -> np.ndarray:
    """PyTorch Linear weight [out, in] to a kernel [in, out]."""
    return tensor.T
