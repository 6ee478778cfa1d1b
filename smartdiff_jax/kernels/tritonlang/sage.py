"""SageAttention's forward pass (arXiv 2410.02367 and 2411.10958) in Triton, for GPUs from Ampere on, any length.

Scores in int8, with a scale for each query and each block of keys; weights times values in fp8 where the GPU has it (Ada,
Hopper), in float16 on Ampere. Softmax is online (arXiv 2205.14135), in base 2.
"""

import triton
import triton.language as tl

QUERIES, KEYS = 128, 64
"""Of a program, and of a block, which has one scale."""


@triton.jit
def forward(
    q8,  # int8 [b, s, h, d]
    q_scale,  # float32 [b, h, s], with the factor of softmax in base 2 in it
    k8,  # int8 [b, t, h, d]
    k_scale,  # float32 [b, h, blocks]
    values,  # fp8 [b, h, d, padded] or float16 [b, t, h, d]
    v_scale,  # float32 [b, h, d]
    lengths,  # int32 [b], keys that count
    out,  # half precision [b, s, h, d]
    lse,  # float32 [b, h, s], natural
    S: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    one = batch * H + head
    rows, features = tile * M + tl.arange(0, M), tl.arange(0, D)
    at_q = ((batch * S + rows[:, None]) * H + head) * D + features[None, :]
    q = tl.load(q8 + at_q, mask=rows[:, None] < S, other=0)
    of_row = tl.load(q_scale + one * S + rows, mask=rows < S, other=0.0)
    length = tl.load(lengths + batch)

    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for block in range(0, tl.cdiv(length, N)):
        columns = block * N + tl.arange(0, N)
        counts = columns < length
        at_k = ((batch * T + columns[None, :]) * H + head) * D + features[:, None]
        k = tl.load(k8 + at_k, mask=counts[None, :], other=0)
        scores = tl.dot(q, k).to(tl.float32) * (of_row * tl.load(k_scale + one * BLOCKS + block))[:, None]
        scores = tl.where(counts[None, :], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        if FP8:
            at_v = (one * D + features[None, :]) * PADDED + columns[:, None]
            v = tl.load(values + at_v, mask=counts[:, None], other=0.0)
            # a block's own sum first: what adds fp8 keeps fewer bits than float32
            part = tl.dot((weights * 448.0).to(tl.float8e4nv), v)
        else:
            at_v = ((batch * T + columns[:, None]) * H + head) * D + features[None, :]
            v = tl.load(values + at_v, mask=counts[:, None], other=0.0)
            part = tl.dot(weights.to(tl.float16), v)
        acc = acc * shrink[:, None] + part
        top = higher

    of_column = tl.load(v_scale + one * D + features)
    if FP8:
        of_column = of_column * (1.0 / 448.0)
    some = total > 0.0
    acc = acc * of_column[None, :] / tl.where(some, total, 1.0)[:, None]
    tl.store(out + at_q, acc.to(out.dtype.element_ty), mask=rows[:, None] < S)
    found = tl.where(some, top * 0.6931471805599453 + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse + one * S + rows, found, mask=rows < S)
