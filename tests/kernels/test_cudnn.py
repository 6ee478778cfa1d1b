"""What can be told of cuDNN's attention without a GPU: what it refuses, and that the private function of JAX is as it was."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from smartdiff_jax.errors import Unsupported
from smartdiff_jax.kernels import cudnn

Q = jnp.ones((2, 5, 3, 16), jnp.bfloat16)


@pytest.mark.parametrize(
    "q, words",
    [
        (Q.astype(jnp.float32), "not float32"),
        (jnp.ones((1, 5, 3, 12), jnp.bfloat16), "12"),
        (jnp.ones((1, 5, 3, 256), jnp.bfloat16), "256"),
    ],
)
def test_what_it_does_not_serve(monkeypatch, q, words):
    with pytest.raises(Unsupported, match="NVIDIA GPU"):
        cudnn.cudnn_attention(q, q, q)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(Unsupported, match=words):
        cudnn.cudnn_attention(q, q, q, with_lse=True)


@pytest.mark.parametrize("lengths", [None, [4, 5]])
def test_the_log_sum_exp_stays_in_float32(monkeypatch, lengths):
    """The private function is called as its signature says, with a scale, which is 1 if not given, and lengths as a mask."""
    seen = {}

    def private(*args, **kwargs):
        seen.update(inspect.signature(dot_product_attention).bind(*args, **kwargs).arguments)
        return Q, jnp.zeros((2, 3, 5), jnp.float32)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(f"{dot_product_attention.__module__}.dot_product_attention", private)
    kv_length = None if lengths is None else jnp.array(lengths, jnp.int32)
    out, lse = cudnn.cudnn_attention(Q, Q, Q, kv_length=kv_length, with_lse=True)
    assert out.shape == Q.shape and lse is not None and lse.dtype == jnp.float32
    assert seen["return_residual"] and seen["scale"] == 0.25
    if lengths is None:
        assert "kv_seqlen" not in seen
    else:
        assert seen["kv_seqlen"].tolist() == lengths and seen["q_seqlen"].tolist() == [5, 5]
        assert seen["mask_type"] == MaskType.PADDING
