"""How attention over a split sequence is put together from a kernel that knows one device only."""

from functools import cache

import jax.numpy as jnp
from jax.sharding import Mesh

from smartdiff_jax.kernels.base import QKV, Attend, AttentionFn


class LocalAttend:
    """`Attend` where every device holds whole sequences: the kernel itself.

    Joint attention puts the text behind the picture, so that padded text is the end of the keys.
    """

    def __init__(self, kernel: AttentionFn):
        self._kernel = kernel

    def self_attention(self, tokens):
        return self._kernel(*tokens)[0]

    def cross_attention(self, q, k, v, *, text_length=None):
        return self._kernel(q, k, v, kv_length=text_length)[0]

    def text_attention(self, text, *, text_length=None):
        return self._kernel(*text, kv_length=text_length)[0]

    def joint_attention(self, tokens, text, *, text_length=None):
        size = tokens.q.shape[1]
        both = QKV(*(jnp.concatenate(pair, axis=1) for pair in zip(tokens, text, strict=True)))
        out, _ = self._kernel(*both, kv_length=None if text_length is None else size + text_length)
        return out[:, :size], out[:, size:]


@cache
def wrap(kernel: AttentionFn, mesh: Mesh) -> Attend:
    """`kernel` made to serve arrays laid out on `mesh`.

    Memoised: the same kernel and mesh give the same object, which is what keeps an executable from being compiled twice.
    """
    assert mesh.shape["ring"] == mesh.shape["ulysses"] == 1, "make_mesh lets no split sequence through"
    return LocalAttend(kernel)
