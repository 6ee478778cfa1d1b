"""How attention over a split sequence is put together from a kernel that knows one device only."""

from collections.abc import Callable
from functools import cache

from jax.sharding import Mesh


@cache
def wrap(kernel: Callable, mesh: Mesh) -> Callable:
    """`kernel` (an AttentionFn) made to serve arrays laid out on `mesh` (an Attend).

    Memoised: the same kernel and mesh give the same object, which is what keeps an executable from being compiled twice.
    """
    assert mesh.shape["ring"] == mesh.shape["ulysses"] == 1, "make_mesh lets no split sequence through"

    def attend(q, k, v, *, kv_length=None, scale=None):
        out, _ = kernel(q, k, v, kv_length=kv_length, scale=scale)
        return out

    return attend
