"""Products in 8 bits: what they are, by float64; and the kernels that make rows, interpreted, against XLA's way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from smartdiff_jax.kernels import fp8, fused_rows
from smartdiff_jax.kernels.fp8 import FP8, Columns, Part
from smartdiff_jax.models.layers import gelu, layer_norm, swiglu

LEAD, WIDTH, FEATURES = (2, 13), 96, 1160


@pytest.fixture(scope="module")
def numbers():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*LEAD, WIDTH)).at[0, 3].set(0).at[1, 5, 7].set(900.0)
    kernel = jax.random.normal(keys[1], (WIDTH, 2 * FEATURES)).at[:, 3].multiply(100)
    bias = jax.random.normal(keys[2], (2 * FEATURES,)).astype(jnp.bfloat16)
    return x.astype(jnp.bfloat16), kernel, bias, jax.random.normal(keys[3], (2, 2, 1, WIDTH))


def as_float64(rows):
    values, scale = (np.asarray(x, np.float64) for x in (rows.values.astype(jnp.float32), rows.scale))
    return (values * scale)[: np.prod(rows.lead)].reshape(*rows.lead, -1)


def test_a_row_loses_four_bits_of_its_own_largest_number_at_most(numbers):
    x = numbers[0]
    rows = fp8.join_rows([Part.of(x)])
    true = np.asarray(x, np.float64)
    error = np.abs(as_float64(rows) - true)
    # e4m3 keeps 3 bits behind the point: half of the last is 2**-4 of a number, or of the smallest normal one, 2**-6 of 448
    smallest = np.abs(true).max(-1, keepdims=True) * 2**-6 / 448
    assert (error <= np.maximum(np.abs(true), smallest) * 2**-4 * 1.001).all()
    assert not as_float64(rows)[0, 3].any() and error[1, 4].max() < 0.3  # a large number is of its own row alone


def test_a_product_is_that_of_what_was_rounded(numbers):
    x, kernel, bias, _ = numbers
    rows = fp8.join_rows([Part.of(x)])
    kernel8, scale = fp8.quantize_kernel(kernel)
    product = fp8.multiply(rows, kernel8, scale, bias, jnp.bfloat16)
    rounded = np.asarray(kernel8.astype(jnp.float32), np.float64) * np.asarray(scale)[:, None]
    summed = as_float64(rows) @ rounded.T
    true = summed + np.asarray(bias, np.float64)
    # the product is rounded to bfloat16 before it is scaled
    assert (np.abs(np.asarray(product.array(jnp.float32)) - true) <= 2**-8 * np.abs(summed) + 1e-4).all()
    columns = Columns(product, 5, 20).array(jnp.float32)
    np.testing.assert_array_equal(columns, product.array(jnp.float32)[..., 5:25])


@pytest.mark.parametrize("case", ["plain", "norm", "joined"])
def test_the_kernel_makes_the_rows_that_xla_makes(numbers, case):
    x, kernel, bias, (shift, scale) = numbers
    if case == "plain":
        expected, rows = fp8.join_rows([Part.of(x)]), fused_rows.join_rows([Part.of(x)], interpret=True)
    elif case == "norm":
        expected = fp8.quantize_rows(layer_norm(x, 1e-6) * (1 + scale) + shift)
        rows = fused_rows.norm_rows(x, shift, scale, 1e-6, interpret=True)
    else:
        kernel8, of_columns = fp8.quantize_kernel(kernel)

        def parts(rows):
            product = fp8.multiply(rows, kernel8, of_columns, bias, jnp.bfloat16)
            halves = Columns(product, 0, FEATURES), Columns(product, FEATURES, FEATURES)
            return [Part.of(x), Part(halves, swiglu), Part((Columns(product),), gelu)]

        expected = fp8.join_rows(parts(fp8.join_rows([Part.of(x)])))
        rows = fused_rows.join_rows(parts(fused_rows.join_rows([Part.of(x)], interpret=True)), interpret=True)
    assert rows.lead == LEAD and rows.values.shape[0] == 32  # 26 rows, padded to what cuBLAS takes
    np.testing.assert_allclose(np.asarray(rows.scale)[:26, 0], np.asarray(expected.scale).reshape(-1), rtol=1e-6)
    of_rows, of_expected = as_float64(rows), as_float64(expected)
    # where float32 sums differ in their last bit, a number in the middle of two of 8 bits may go either way
    assert (np.abs(of_rows - of_expected) > 1e-5 * np.abs(of_expected)).mean() < 1e-3
    np.testing.assert_allclose(of_rows, of_expected, rtol=0.13)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="lowers without a device from JAX 0.11 on")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")  # docs/decisions/0070
def test_rows_of_a_flux_block_lower_for_gpus():
    from jax.sharding import AbstractDevice

    abstract_device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=abstract_device)
    shape = jax.ShapeDtypeStruct

    def block(x, m, kernel8, scale):
        rows = fused_rows.norm_rows(x, m, m, 1e-6)
        product = fp8.multiply(rows, kernel8, scale, None, jnp.bfloat16)
        return fused_rows.join_rows([Part.of(x), Part((Columns(product),), gelu)])

    arguments = (
        shape((1, 100, 1536), jnp.bfloat16), shape((1, 1, 1536), jnp.float32), shape((8960, 1536), FP8),
        shape((8960,), jnp.float32),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(block).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2 and "tensor<112x1536xf8E4M3FN>" in text
