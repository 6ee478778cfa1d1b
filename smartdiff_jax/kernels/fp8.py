"""Products in 8 bits (W8A8, e4m3): a scale for each row of what is multiplied, and one for each feature that comes out.

    x = x8 * row_scale, kernel = kernel8 * column_scale:   x @ kernel = (x8 @ kernel8) * row_scale * column_scale

A `Product` waits for its scales and its bias until whoever reads it applies them, so that they cost no pass of their own.
`Rows` are made of products, with the activation between, in one pass (fused_rows.py, on one GPU) or by XLA. Tensor cores read
8 bits along the summed features only, so kernels lie transposed: [out, in].
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
MULTIPLE = 16
"""cuBLAS, and tensor cores, take 8 bits only where every size divides by it."""

SMALLEST = 1e-12
"""Largest number of a row or a feature of zeros."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """x [*lead, d] = values * scale. On one GPU values are [n, d], with rows behind prod(lead) that mean nothing."""

    values: Float8e4m3fn[Array, "*n d"]
    scale: Float[Array, "*n 1"]
    lead: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """What a layer gives [*lead, o]: values, or in 8 bits values * row_scale * column_scale + bias, padded as `Rows` are."""

    values: Float[Array, "*n o"]
    row_scale: Float[Array, "*n 1"] | None = None
    column_scale: Float[Array, " o"] | None = None
    bias: Float[Array, " o"] | None = None
    lead: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def array(self, dtype: DTypeLike) -> Float[Array, "*b o"]:
        """In `dtype`, scaled in float32."""
        if self.row_scale is None:
            return self.values.astype(dtype)
        assert self.column_scale is not None
        y = self.values.astype(jnp.float32) * self.row_scale * self.column_scale
        y = y if self.bias is None else y + self.bias.astype(jnp.float32)
        if self.values.shape[:-1] != self.lead:
            y = y[: math.prod(self.lead)].reshape(*self.lead, -1)
        return y.astype(dtype)


class Columns(NamedTuple):
    """`width` features of a product from `first` on; None is all that follow."""

    product: Product
    first: int = 0
    width: int | None = None

    @property
    def size(self) -> int:
        return self.product.values.shape[-1] - self.first if self.width is None else self.width

    def array(self, dtype: DTypeLike) -> Float[Array, "*b w"]:
        return self.product.array(dtype)[..., self.first : self.first + self.size]


class Part(NamedTuple):
    """Some of the features that a layer takes: `activation` of columns, or one product's columns as they are.

    An activation is computed in float32, but of one full product in its dtype: so XLA has cuBLAS compute it.
    """

    columns: tuple[Columns, ...]
    activation: Callable[..., Array] | None = None

    @classmethod
    def of(cls, x: Float[Array, "*b d"]) -> "Part":
        return cls((Columns(Product(x, lead=x.shape[:-1])),))

    @property
    def lead(self) -> tuple[int, ...]:
        return self.columns[0].product.lead

    def array(self, dtype: DTypeLike) -> Float[Array, "*b w"]:
        if self.activation is None:
            return self.columns[0].array(dtype)
        if len(self.columns) == 1 and self.columns[0].product.row_scale is None:
            return self.activation(self.columns[0].array(dtype)).astype(dtype)
        return self.activation(*(columns.array(jnp.float32) for columns in self.columns)).astype(dtype)


def quantize_rows(x: Float[Array, "*b d"]) -> Rows:
    """The largest number of each row becomes FP8_MAX."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), SMALLEST)
    return Rows((x * (FP8_MAX / largest)).astype(FP8), largest * (1 / FP8_MAX), x.shape[:-1])


def join_rows(parts: Sequence[Part]) -> Rows:
    """Parts side by side."""
    features = [part.array(jnp.float32) for part in parts]
    return quantize_rows(features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1))


def quantize_kernel(kernel: Float[Array, "*n i o"]) -> tuple[Float8e4m3fn[Array, "*n o i"], Float[Array, "*n o"]]:
    """kernel8 and column_scale."""
    kernel = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-1), SMALLEST)
    return (kernel * (FP8_MAX / largest)[..., None]).astype(FP8), largest * (1 / FP8_MAX)


def multiply(
    x: Rows, kernel: Float8e4m3fn[Array, "o i"], scale: Float[Array, " o"], bias: Float[Array, " o"] | None, dtype: DTypeLike
) -> Product:
    """x @ kernel + bias. `dtype` of its values must reach as far as bfloat16: they are as large as 448 squared times i."""
    contract = ((x.values.ndim - 1,), (1,)), ((), ())
    values = lax.dot_general(x.values, kernel, contract, preferred_element_type=jnp.dtype(dtype))
    return Product(values, x.scale, scale, bias, x.lead)
