"""Linear layers, and what passes between them.

The dtype of a layer's kernel is the dtype it computes in, but where its kernel has 8 bits (`precision: fp8`): then what
goes in becomes 8 bits too, once for all layers that share it, and what comes out is scaled where it is read (kernels/fp8.py).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from smartdiff_jax.kernels import fp8
from smartdiff_jax.kernels.fp8 import Columns, Part, Product, Rows

Features = Float[Array, "..."] | Rows
"""What a linear layer takes: [*batch, in]."""


class Linear(nnx.Module):
    """x @ kernel + bias, in the kernel's dtype.

    kernel [in, out], Xavier uniform unless told otherwise; bias zero. In 8 bits it is [out, in] with a scale [out], and what
    comes out has `compute_dtype`. fused: rows of 8 bits are made by a kernel that runs on one device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        kernel_init: Initializer = initializers.xavier_uniform(),
    ):
        self.compute_dtype: Any = None
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if use_bias else None
        self.scale: nnx.Param | None = nnx.data(None)
        self.fused = False

    def __call__(self, x: Features) -> Float[Array, "*batch o"]:
        if self.scale is not None:
            return self.product(x).array(self.compute_dtype)
        assert not isinstance(x, Rows), "8 bits are for layers of 8 bits"
        kernel = self.kernel[...]
        y = x.astype(kernel.dtype) @ kernel
        return y if self.bias is None else y + self.bias[...]

    def project(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """The same in float32, for one vector a sample, as modulations are projected from.

        Little happens there but that the kernel is read. Written as a product it would be copied to float32 first, for cuBLAS.
        """
        y = jnp.sum(x.astype(jnp.float32)[:, :, None] * self.kernel[...].astype(jnp.float32), axis=1)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)

    def take(self, x: Features) -> Features:
        """x as this layer multiplies it, for several that do so alike."""
        return x if self.scale is None or isinstance(x, Rows) else self._rows(Part.of(x.astype(self.compute_dtype)))

    def product(self, x: Features) -> Product:
        """What `__call__` gives, for a layer that takes it in `join`."""
        if self.scale is None:
            y = self(x)
            return Product(y, lead=y.shape[:-1])
        bias = None if self.bias is None else self.bias[...]
        rows = self.take(x)
        assert isinstance(rows, Rows)
        return fp8.multiply(rows, self.kernel[...], self.scale[...], bias, self.compute_dtype)

    def join(self, *parts: Part) -> Float[Array, "*batch o"]:
        """Of the parts side by side."""
        if self.scale is not None:
            return self(self._rows(*parts))
        kernel, bias = self.kernel[...], self.bias
        if len(parts) == 1:
            return self(parts[0].array(kernel.dtype))
        # cuBLAS adds what the part behind gave, and takes its part of the kernel where it lies, unless it is to add a bias as
        # well: then XLA copies that part. To put the parts side by side would be a pass.
        *others, last = (part.array(kernel.dtype) for part in parts)
        at = kernel.shape[0] - last.shape[-1]
        y = last @ kernel[at:]
        for x in reversed(others):
            at -= x.shape[-1]
            y = x @ kernel[at : at + x.shape[-1]] + y
        return y if bias is None else (y.astype(jnp.float32) + bias[...].astype(jnp.float32)).astype(kernel.dtype)

    def round_to_8_bits(self, quantize: Callable[[Any], tuple[Any, Any]], *, fused: bool) -> None:
        """Its kernel, or each of a stack [..., in, out]. quantize: as fp8.quantize_kernel. What comes out keeps the dtype."""
        self.compute_dtype = self.kernel.get_value().dtype
        values, scale = quantize(self.kernel.get_value())
        self.kernel, self.scale, self.fused = nnx.Param(values), nnx.Param(scale), fused

    def _rows(self, *parts: Part) -> Rows:
        if not self.fused:
            return fp8.join_rows(parts)
        from smartdiff_jax.kernels import fused_rows  # Pallas takes half a second to import

        return fused_rows.join_rows(parts)

    def normed(self, x: Float[Array, "b s d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], eps: float) -> Rows:
        """Layer norm * (1 + scale) + shift as a fused layer takes it."""
        from smartdiff_jax.kernels import fused_rows

        return fused_rows.norm_rows(x, shift, scale, eps)


def products(x: Features, *layers: Linear) -> tuple[Product, ...]:
    """What each of the layers gives of x, computed one after the other, the last first.

    So on a mesh values leave while keys are computed, and keys while queries are, whatever order XLA would have.
    """
    made: list[Product] = []
    for layer in reversed(layers):
        made.append(layer.product(x))
        x, made[-1] = jax.lax.optimization_barrier((x, made[-1]))
    return tuple(reversed(made))


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: Callable[[Array], Array],
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = initializers.xavier_uniform(),
    ):
        self.activation = activation
        self.linear_1 = Linear(in_features, hidden_features, rngs, dtype=dtype, kernel_init=kernel_init)
        self.linear_2 = Linear(hidden_features, out_features, rngs, dtype=dtype, kernel_init=kernel_init)

    def __call__(self, x: Features) -> Float[Array, "*batch o"]:
        return self.linear_2.join(Part((Columns(self.linear_1.product(x)),), self.activation))
