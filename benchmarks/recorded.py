"""Queries, keys and values as the bundled models make them: smoother than random numbers, with directions that stand out."""

from typing import Any
from unittest import mock

import jax
import numpy as np

from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.kernels import ATTENTION
from smartdiff_jax.kernels.xla import xla_attention

PROMPTS = {
    "pocket-image": "a red apple on a blue background",
    "pocket-video": "a dog moving to the left on a green background",
}
STEPS = 4
QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


def record(model: str) -> list[QKV]:
    """q, k, v, each float32 [1, tokens, heads, head_dim], of every self-attention while `model` makes what PROMPTS says: of
    each step, branch of guidance and block."""
    kept: list[Any] = []

    def recording(q, k, v, **options):
        if q.shape == k.shape:
            jax.debug.callback(lambda *qkv: kept.append(tuple(np.asarray(x, np.float32) for x in qkv)), q, k, v)
        return xla_attention(q, k, v, **options)

    with mock.patch.dict(ATTENTION._entries, recording=recording):
        pipe = Pipeline.from_pretrained(model, system=SystemConfig.create(attention="recording", dtype="float32"))
        pipe(PROMPTS[model], num_inference_steps=STEPS, seed=1)
        jax.effects_barrier()
    return kept
