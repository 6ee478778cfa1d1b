"""Leaving blocks of keys out: which ones are chosen, and that kernels attend to those and to no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arithmetic import exact
from test_hopper import draw, needs_jax_011

from smartdiff_jax.kernels.sparse import Blocks, BlockSize, choose_blocks
from smartdiff_jax.kernels.xla import xla_attention

SMALL = BlockSize(16, 8)


def lists_of(mask, size):
    """As `choose_blocks` gives them, of a mask [b, h, nq, nk]."""
    number = mask.shape[-1]
    index = np.zeros(mask.shape, np.int32)
    for at in np.ndindex(*mask.shape[:3]):
        chosen = np.flatnonzero(mask[at])[::-1]
        index[at][: len(chosen)] = chosen
        index[at][len(chosen) :] = number - 1  # what is behind the count must not matter
    return Blocks(jnp.asarray(mask.sum(-1), jnp.int32), jnp.asarray(index), size)


def random_lists(b, s, t, h, lengths, size, seed=0):
    """Random ones, each with at least a block with keys that count; of batch 0, row 0 is without the last of those."""
    rng = np.random.default_rng(seed)
    mask = rng.random((b, h, -(-s // size.queries), -(-t // size.keys))) < 0.5
    number = -(-np.asarray(lengths) // size.keys)
    mask &= (np.arange(mask.shape[-1]) < number[:, None])[:, None, None]
    mask[..., 0] |= ~mask.any(-1)
    if number[0] > 1:
        mask[0, :, 0, number[0] - 1], mask[0, :, 0, 0] = False, True
    return mask


def of_tokens(mask, s, t, size):
    return np.repeat(np.repeat(mask, size.queries, 2)[:, :, :s], size.keys, 3)[..., :t]


def test_a_share_of_the_blocks_is_chosen_and_the_best_of_them():
    """Against NumPy's sort of the same logits; two heads, a length within a block, and queries that fill no block."""
    q, k, _ = draw(2, 40, 70, 2, 16)
    k = k + 3.0 * jnp.sin(jnp.arange(9.0))[:, None, None].repeat(8, 0)[:70]  # blocks that differ, each alike in itself
    lengths, sparsity = np.array([70, 51]), 0.4
    found = choose_blocks(q, k, jnp.float32(sparsity), SMALL, kv_length=jnp.asarray(lengths))
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    for batch, length in enumerate(lengths):
        number = -(-length // 8)
        k_means = np.stack([k[batch, at : min(at + 8, length)].mean(0) for at in range(0, length, 8)])
        keep = number - int(sparsity * number)
        for head in range(2):
            for row in range(3):
                logits = k_means[:, head] @ q[batch, 16 * row : 16 * row + 16, head].mean(0)
                best = np.sort(np.argsort(-logits)[:keep])[::-1]
                assert found.count[batch, head, row] == keep
                np.testing.assert_array_equal(found.index[batch, head, row, :keep], best)


def test_nothing_is_left_out_at_sparsity_0_and_one_trace_serves_all():
    q, k, _ = draw(2, 40, 70, 1, 16)
    traces = []

    @jax.jit
    def run(sparsity, lengths):
        traces.append(0)
        return choose_blocks(q, k, sparsity, SMALL, kv_length=lengths)

    lengths = jnp.array([70, 33])
    full = run(0.0, lengths)
    assert (full.count == jnp.array([9, 5])[:, None, None]).all()
    for batch, number in enumerate((9, 5)):
        assert (full.index[batch, 0, :, :number] == jnp.arange(number)[::-1]).all()
    for sparsity, kept in ((0.2, [8, 4]), (0.5, [5, 3]), (0.99, [1, 1])):
        assert (run(sparsity, lengths).count == jnp.array(kept)[:, None, None]).all()
    assert len(traces) == 1


def test_what_is_never_left_out():
    """A block's own place, the text's keys, all keys of the text's queries, and blocks whose keys are not alike first."""
    q, k, _ = draw(1, 72, 72, 1, 64)
    k = jnp.repeat(k[:, ::8], 8, axis=1).astype(jnp.float32)  # every block alike in itself
    k = k.at[:, 24:32].set(jnp.eye(8, 64)[None, :, None] * 50.0)
    options = dict(text_keys=jnp.array([60]), text_queries=60)
    mask = np.asarray(choose_blocks(q, k, jnp.float32(0.4), SMALL, **options).mask())[0, 0]
    assert mask.shape == (5, 9) and mask[:, 7:].all() and mask[3:].all()  # token 60 is in block 3 of 16 and in 7 of 8
    own = np.arange(9) // 2 == np.arange(5)[:, None]
    assert mask[own].all() and mask[:, 3].all() and (mask[:3].sum(1) == 9 - int(0.4 * 9)).all()
    most = np.asarray(choose_blocks(q, k, jnp.float32(0.9), SMALL, **options).mask())[0, 0]
    assert (most[:3].sum(1) == 4).all()  # more than a tenth: two of text, two of their own place
    some = choose_blocks(q[:, :40], k, jnp.float32(0.9), SMALL)
    assert (some.count == 1).all() and (some.index[..., 0] == 3).all()  # queries of some tokens have no place of their own


@pytest.mark.parametrize("limit", [2**29, 2 * 2 * 70 * 4 * 10])
def test_the_reference_attends_to_listed_blocks_alone(monkeypatch, limit):
    """At once, and some queries at a time that are not a block's."""
    monkeypatch.setattr("smartdiff_jax.kernels.xla.MAX_LOGITS_BYTES", limit)
    q, k, v = (x.astype(jnp.float32) for x in draw(2, 40, 70, 2, 16))
    lengths = [70, 51]
    mask = random_lists(2, 40, 70, 2, lengths, SMALL)
    out, lse = xla_attention(q, k, v, kv_length=jnp.array(lengths), with_lse=True, blocks=lists_of(mask, SMALL))
    true, true_lse = exact(q, k, v, lengths, of_tokens(mask, 40, 70, SMALL))
    np.testing.assert_allclose(out, true, atol=1e-5)
    np.testing.assert_allclose(lse, true_lse, atol=1e-5)


@needs_jax_011
@pytest.mark.parametrize(
    "s, t, lengths, d",
    [
        (264, 1000, [1000], 128),  # three blocks of queries, of which the last is of 8; a ragged end
        (136, 608, [457, 600], 64),  # a batch of two that ends in different blocks
    ],
)
def test_the_kernel_attends_to_listed_blocks_alone(s, t, lengths, d):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from smartdiff_jax.kernels.mosaic.flash import BLOCK, flash
    from smartdiff_jax.kernels.mosaic.warpgroups import TILE

    size = BlockSize(TILE, BLOCK)
    q, k, v = draw(len(lengths), s, t, 1, d)
    counted = jnp.array(lengths, jnp.int32)
    run = functools.partial(flash, scale=d**-0.5, with_lse=True, cluster=1, interpret=plgpu.InterpretGPUParams())
    mask = random_lists(len(lengths), s, t, 1, lengths, size)
    out, lse = run(q, k, v, counted, blocks=lists_of(mask, size))
    true, true_lse = exact(q, k, v, lengths, of_tokens(mask, s, t, size))
    # as without lists: tests/kernels/test_hopper.py
    np.testing.assert_allclose(np.asarray(out, np.float64), true, atol=2**-8 * np.abs(true).max())
    np.testing.assert_allclose(lse, true_lse, atol=1e-5)
    every = choose_blocks(q, k, jnp.float32(0), size, kv_length=counted)
    for listed, dense in zip(run(q, k, v, counted, blocks=every), run(q, k, v, counted), strict=True):
        np.testing.assert_array_equal(np.asarray(listed, np.float32), np.asarray(dense, np.float32))
    with pytest.raises(ValueError, match="lists of"):
        run(q[:, :128], k, v, counted, blocks=every)
