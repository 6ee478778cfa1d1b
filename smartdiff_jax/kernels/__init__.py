"""Attention on one device: one contract (`base.AttentionFn`), one file a kernel."""

from collections.abc import Mapping

from smartdiff_jax.errors import Unsupported
from smartdiff_jax.kernels.base import AttentionFn
from smartdiff_jax.kernels.cudnn import cudnn_attention
from smartdiff_jax.kernels.pallas_flash import pallas_flash_attention
from smartdiff_jax.kernels.pallas_sage import pallas_sage_attention
from smartdiff_jax.kernels.sparse import BlockSize, SparseKernel
from smartdiff_jax.kernels.triton_sage import triton_sage_attention
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.registry import Registry

PREFERENCE = {"pallas_flash": 1024, "cudnn": 0, "xla": 0}
"""What `attention: auto` tries for each shape, best first, and from how many keys on: with few, cuDNN is the faster one."""


def first_of(preference: Mapping[str, int]) -> AttentionFn:
    """The first kernel that serves a call, of names with the least keys from which each is asked."""

    def auto_attention(q, k, v, *, kv_length=None, scale=None, with_lse=False):
        reasons = []
        for name, least_keys in preference.items():
            if k.shape[1] < least_keys:
                continue
            try:
                return ATTENTION[name](q, k, v, kv_length=kv_length, scale=scale, with_lse=with_lse)
            except Unsupported as error:
                reasons.append(str(error))
        raise Unsupported("; ".join(reasons))

    return auto_attention


ATTENTION: Registry[AttentionFn] = Registry(
    "attention",
    {
        "auto": first_of(PREFERENCE),
        "pallas_flash": pallas_flash_attention,
        "pallas_sage": pallas_sage_attention,
        "triton_sage": triton_sage_attention,
        "cudnn": cudnn_attention,
        "xla": xla_attention,
    },
)

DIFFERENTIABLE: Registry[AttentionFn] = Registry(
    "attention", {"auto": first_of({"cudnn": 0, "xla": 0}), "cudnn": cudnn_attention, "xla": xla_attention}
)
"""For training: kernels in Pallas have no gradient."""

HOPPER_BLOCKS = BlockSize(128, 192)
"""Of Mosaic's kernels, which refuse others and whose import takes seconds."""

SPARSE: Registry[SparseKernel] = Registry(
    "attention",
    {
        "auto": SparseKernel(pallas_flash_attention, HOPPER_BLOCKS),
        "pallas_flash": SparseKernel(pallas_flash_attention, HOPPER_BLOCKS),
        "pallas_sage": SparseKernel(pallas_sage_attention, HOPPER_BLOCKS),
        "xla": SparseKernel(xla_attention, BlockSize(16, 24)),
    },
)
"""Kernels that take lists of blocks. XLA's goes by a mask and is no faster for it: it is asked for by name, never by "auto"; it
takes any blocks, and gets such as leave a small model something to choose from."""
