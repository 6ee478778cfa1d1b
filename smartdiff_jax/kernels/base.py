"""The one contract of every attention kernel."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class AttentionFn(Protocol):
    """Softmax attention on one device, unmasked but for the length of K and V.

    q [b, s, h, d]; k, v [b, t, h, d], same dtype. `kv_length` int32 [b]: keys at and behind it are ignored (None: all t
    count). `scale` multiplies q @ k (None: 1/sqrt(d)). `with_lse` is static: only context parallelism asks for the
    log-sum-exp. Returns out [b, s, h, d] in q's dtype and, if asked, lse float32 [b, h, s] (natural log).
    A kernel that cannot serve the call raises `Unsupported(why)` while tracing.
    """

    def __call__(
        self,
        q: Float[Array, "b s h d"],
        k: Float[Array, "b t h d"],
        v: Float[Array, "b t h d"],
        *,
        kv_length: Int[Array, " b"] | None = None,
        scale: float | None = None,
        with_lse: bool = False,
    ) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]: ...


@runtime_checkable
class Attend(Protocol):
    """What a model's block calls: a kernel, already wrapped for the mesh it runs on. Returns out [b, s, h, d]."""

    def __call__(
        self,
        q: Float[Array, "b s h d"],
        k: Float[Array, "b t h d"],
        v: Float[Array, "b t h d"],
        *,
        kv_length: Int[Array, " b"] | None = None,
        scale: float | None = None,
    ) -> Float[Array, "b s h d"]: ...
