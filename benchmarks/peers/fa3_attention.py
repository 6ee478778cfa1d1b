"""FlashAttention-3 (fa3-fwd on PyPI, in PyTorch) on the shapes of workloads.py; prints JSON. A process of its own."""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from fa3_fwd_interface import flash_attn_func  # noqa: E402

from benchmarks.workloads import ATTENTION_SHAPES, AttentionShape  # noqa: E402


def seconds_of(call, flops: float) -> float:
    """Median of five events around as many calls in a row as take some 50 ms."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    calls, found = max(2, int(0.05 / (flops / 6e14))), []
    for _ in range(5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(min(calls, 500)):
            call()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended) / min(calls, 500) * 1e-3)
    return statistics.median(found)


def eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn with one scale a head, and the scales."""
    scale = x.abs().amax(dim=(1, 3)).float() / 448
    return (x.float() / scale[:, None, :, None]).to(torch.float8_e4m3fn), scale


def first(result):
    return result[0] if isinstance(result, tuple) else result


def measure(shape: AttentionShape) -> dict:
    sizes = [(shape.batch, size, shape.heads, shape.head_dim) for size in (shape.queries, shape.keys, shape.keys)]
    q, k, v = (torch.randn(size, device="cuda").to(torch.bfloat16) for size in sizes)
    seconds = seconds_of(lambda: flash_attn_func(q, k, v), shape.flops)
    found = {"fa3 bf16": {"seconds": seconds, "tflops": shape.flops / seconds / 1e12}}
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (eight_bits(x) for x in (q, k, v))
    scales = dict(q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    out = first(flash_attn_func(q8, k8, v8, **scales))[:, :256].double()
    logits = torch.einsum("bshd,bthd->bhst", q[:, :256, :2].double(), k[:, :, :2].double()) / shape.head_dim**0.5
    true = torch.einsum("bhst,bthd->bshd", logits.softmax(-1), v[:, :, :2].double())
    found["fa3 fp8"] = {
        "seconds": (seconds := seconds_of(lambda: flash_attn_func(q8, k8, v8, **scales), shape.flops)),
        "tflops": shape.flops / seconds / 1e12,
        "l1": float((out[:, :, :2] - true).abs().sum() / true.abs().sum()),
        "cosine": float(torch.cosine_similarity(out[:, :, :2].flatten(), true.flatten(), dim=0)),
    }
    return found


print(json.dumps({shape.name: measure(shape) for shape in ATTENTION_SHAPES}))
