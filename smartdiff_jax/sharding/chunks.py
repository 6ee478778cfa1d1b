"""Which keys of a split sequence count, and where they lie.

A kernel ignores keys from a length on, and only there. A chunk of keys that came off several devices is padded in between:
at the end of the picture's tokens, and at the end of the text.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Keys in chunks of `blocks` blocks, each block [tokens | text]; both streams run on from block to block.

    tokens, text: length of a block's two parts, padding included; text is 0 where there is none.
    num_tokens, text_length: how many count of the streams; None if all do. num_tokens is one for the batch.
    """

    blocks: int
    tokens: int
    text: int
    num_tokens: int | Int[Array, ""] | None
    text_length: Int[Array, " b"] | None

    @property
    def all_count(self) -> bool:
        return self.num_tokens is None and self.text_length is None

    def lengths(self, chunk: int | Int[Array, ""], batch: int) -> Int[Array, " b"]:
        """How many keys of a chunk count."""
        num_tokens = _part(chunk, self.blocks * self.tokens, self.num_tokens)
        text_length = _part(chunk, self.blocks * self.text, self.text_length)
        return jnp.broadcast_to(num_tokens + text_length, (batch,)).astype(jnp.int32)

    def arrange(self, keys: Float[Array, "*stack b t h d"], chunk: int | Int[Array, ""]) -> Float[Array, "*stack b t h d"]:
        """A chunk with the keys that count first. Without a mask their order is all the same, and nothing moves."""
        if self.all_count or not self.text:
            return keys
        tokens, text = self._streams(keys)
        keys = jnp.concatenate([tokens, text], axis=-3)
        if self.num_tokens is None:
            return keys
        # Over the padded tokens. What is left behind the text is its own end, which no length reaches.
        return lax.dynamic_update_slice_in_dim(keys, text, _part(chunk, tokens.shape[-3], self.num_tokens), axis=-3)

    def apart(self, x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        """A chunk with the tokens of all its blocks first, then their text, whatever of them counts."""
        return jnp.concatenate(self._streams(x), axis=-3) if self.blocks > 1 and self.text else x

    def in_blocks(self, x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        """What `apart` gives, as it lay before."""
        if self.blocks == 1 or not self.text:
            return x
        streams = jnp.split(x, [self.blocks * self.tokens], axis=1)
        blocks = [stream.reshape(len(x), self.blocks, -1, *x.shape[2:]) for stream in streams]
        return jnp.concatenate(blocks, axis=2).reshape(x.shape)

    def _streams(self, x: Array) -> tuple[Array, Array]:
        *stack, _, heads, width = x.shape
        blocks = x.reshape(*stack, self.blocks, self.tokens + self.text, heads, width)
        tokens = blocks[..., : self.tokens, :, :].reshape(*stack, -1, heads, width)
        text = blocks[..., self.tokens :, :, :].reshape(*stack, -1, heads, width)
        return tokens, text


def _part(chunk: int | Array, size: int, whole: int | Array | None) -> int | Array:
    """How many of the first `whole` of a stream are in its `chunk`-th `size`."""
    return size if whole is None else jnp.clip(whole - chunk * size, 0, size)
