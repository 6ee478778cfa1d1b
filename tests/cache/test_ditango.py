"""DiTango: the held remote part against plain softmax, whole intervals, the rule on toy stacks, and the real loop on a ring."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import Tiny, Toy

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.base import Stack
from smartdiff_jax.cache.ditango import plan_intervals
from smartdiff_jax.cache.params import MAX_STEPS
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.kernels.base import QKV
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.sharding.context_parallel import wrap
from smartdiff_jax.sharding.mesh import make_mesh

HEADS, WIDTH = 2, 4


def create(num_steps, **params):
    return POLICIES["ditango"].create(num_steps, {}, **params)


def draw(rng, length):
    return QKV(*(jnp.asarray(rng.standard_normal((1, length, HEADS, WIDTH)), jnp.float32) for _ in range(3)))


def softmax_sums(q, k, v):
    """Of one device: sum exp(score) v [s h d], and sum exp(score) [s h 1]."""
    weights = np.exp(np.einsum("shd,thd->sht", q, k) / WIDTH**0.5)
    return np.einsum("sht,thd->shd", weights, v), weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("ring, ulysses, text", [(4, 1, 0), (2, 2, 5)])
def test_own_keys_of_now_and_remote_keys_of_then(ring, ulysses, text):
    rng = np.random.RandomState(ring)
    size = 18  # padded to 20
    attend = wrap(xla_attention, make_mesh(MeshConfig(ring=ring, ulysses=ulysses)))
    streams = [(draw(rng, size), draw(rng, text) if text else None) for _ in range(2)]
    call = jax.jit(lambda streams, held, fresh: attend.attention_with_remote(*streams, None, held, fresh))
    held = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), attend.remote_shapes(*streams[0]))
    *then, held = call(streams[0], held, True)
    *now, after = call(streams[1], held, False)
    jax.tree.map(np.testing.assert_array_equal, after, held)
    # Which device of the ring a row is on, row by row, padding left out.
    rows = [
        np.arange(stream.q.shape[1]) // (-(-stream.q.shape[1] // (ring * ulysses)) * ulysses) for stream in streams[1] if stream
    ]
    device = np.concatenate(rows)
    (q0, k0, v0), (q1, k1, v1) = (
        [np.concatenate([np.asarray(stream[i][0], np.float64) for stream in pair if stream]) for i in range(3)]
        for pair in streams
    )
    values, total = softmax_sums(q0, k0, v0)
    np.testing.assert_allclose(joined(then), values / total, atol=1e-5)
    expected = np.zeros_like(q1)
    for own in range(ring):
        here = device == own
        values, total = softmax_sums(q1[here], k1[here], v1[here])
        remote_values, remote_total = softmax_sums(q0[here], k0[~here], v0[~here])
        expected[here] = (values + remote_values) / (total + remote_total)
    np.testing.assert_allclose(joined(now), expected, atol=1e-5)


def joined(outs):
    return np.concatenate([np.asarray(out[0], np.float64) for out in outs if out is not None])


def test_nothing_goes_round_where_the_remote_part_is_held():
    attend = wrap(xla_attention, make_mesh(MeshConfig(ring=4)))
    tokens = draw(np.random.RandomState(0), 20)
    held = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), attend.remote_shapes(tokens, None))
    jaxpr = jax.make_jaxpr(lambda fresh: attend.attention_with_remote(tokens, None, None, held, fresh))(True)
    [mapped] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    [conditional] = [eqn for eqn in mapped.params["jaxpr"].eqns if eqn.primitive.name == "cond"]
    assert str(mapped.params["jaxpr"]).count("ppermute[") == 6
    reuse, compute = (str(branch) for branch in conditional.params["branches"])
    assert reuse.count("ppermute[") == 0 and compute.count("ppermute[") == 6


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_mesh_without_a_ring_is_refused(num_devices):
    attend = wrap(xla_attention, make_mesh(MeshConfig(ulysses=num_devices)))
    with pytest.raises(InvalidConfig, match="mesh.ring=1: no keys of other devices go round"):
        attend.remote_shapes(draw(np.random.RandomState(0), 4), None)


plan = jax.jit(plan_intervals)


def plain_plan(speed, rate, longest, power):
    """The same by trying scales."""
    scales = np.exp(np.linspace(-8, 16, 200_001))[:, None]
    for chunk in np.array_split(scales, 200):
        tried = np.clip(chunk * speed**-power, 1, longest)
        met = np.mean(1 / tried, axis=1) <= rate + 1e-6
        if met.any():
            return np.round(tried[np.argmax(met)])
    return np.full(len(speed), longest)


def test_intervals_keep_the_rate_and_follow_the_speed():
    rng = np.random.RandomState(0)
    for _ in range(30):
        speed = np.exp(1.5 * rng.standard_normal(12))
        rate, longest, power = rng.uniform(0.1, 1), rng.randint(2, 12), rng.uniform(0.1, 1)
        found = np.asarray(plan(*map(jnp.float32, (speed, rate, longest, power))))
        assert found.min() >= 1 and found.max() <= longest
        assert np.all(np.diff(found[np.argsort(speed)]) <= 0)
        # Rounding may go either way where a number lies between two.
        assert np.abs(found - plain_plan(speed, rate, longest, power)).max() <= 1
        assert np.array_equal(found, plan(*map(jnp.float32, (1000 * speed, rate, longest, power))))
    assert plan(*map(jnp.float32, (speed, 1.0, 8.0, 0.3))).tolist() == [1] * 12
    assert plan(*map(jnp.float32, (speed, 0.01, 8.0, 0.3))).tolist() == [8] * 12
    assert plan(jnp.zeros(4), *map(jnp.float32, (0.5, 8.0, 0.3))).tolist() == [2] * 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingStack(Stack):
    """Blocks in two scans whose mean features are given. What leaves tells which blocks were computed, and what each held."""

    hidden: Any
    means: Any
    cut = 5

    num_blocks = 12

    def remotes(self):
        shapes = [(self.cut,), (self.num_blocks - self.cut,)]
        return tuple(
            {
                "fresh": jax.ShapeDtypeStruct(shape, bool),
                "remote": jax.ShapeDtypeStruct(shape, jnp.float32),
                "mean": jax.ShapeDtypeStruct((*shape, *self.means.shape[1:]), jnp.float32),
            }
            for shape in shapes
        )

    def run_remotes(self, held):
        means = self.means[: self.cut], self.means[self.cut :]
        held = tuple(
            {
                "fresh": of_scan["fresh"],
                "remote": jnp.where(of_scan["fresh"], self.hidden[0, 0, 0], of_scan["remote"]),
                "mean": mean,
            }
            for of_scan, mean in zip(held, means, strict=True)
        )
        fresh, remote = (jnp.concatenate([of_scan[key] for of_scan in held]) for key in ("fresh", "remote"))
        return jnp.stack([fresh.astype(jnp.float32), remote], axis=-1)[None], held


@pytest.fixture(scope="module")
def toy():
    return Toy()


def ring_stacks(seed):
    rng = np.random.RandomState(seed)
    speed = np.exp(rng.standard_normal((1, 12, 1, 1, 1)))
    means = np.cumsum(rng.standard_normal((MAX_STEPS, 12, 1, 5, 1)) * speed, axis=0)
    hidden = np.broadcast_to(np.arange(MAX_STEPS)[:, None, None, None], (MAX_STEPS, 1, 12, 2))
    return RingStack(jnp.asarray(hidden, jnp.float32), jnp.asarray(means, jnp.float32))


def plain_rule(means, steps, *, share, warmup, cooldown, anchor_interval, max_interval=8, power=1 / 3, first=0):
    """Which blocks are computed at which steps."""
    between = sum((i - warmup + 1) % anchor_interval != 0 for i in range(warmup, steps - cooldown))
    rate, computed, anchors, last = 1 - min(1, share * steps / between), [], [], 0
    intervals = np.ones(12)
    for i in range(steps):
        if first and i == first:
            anchors = []
        anchor = i >= warmup - 2 and (len(anchors) < 2 or i - last >= anchor_interval)
        forced = i < warmup or i >= steps - cooldown or not anchors or (first and i == first)
        computed.append(np.full(12, True) if forced or anchor else (i - last) % intervals == 0)
        if anchor:
            if anchors:
                speed = np.sqrt(((means[i] - means[last]) ** 2).sum((1, 2, 3))) / (i - last)
                intervals = np.asarray(plan(*map(jnp.float32, (speed, rate, max_interval, power))))
            anchors.append(i)
            last = i
    return np.stack(computed)


@pytest.mark.parametrize("share, first", [(0.0, 0), (0.3, 0), (0.6, 0), (1.0, 0), (0.5, 23)])
def test_the_rule(share, first, toy):
    stacks = ring_stacks(3)
    numbers = dict(share=share, warmup=4, cooldown=3, anchor_interval=6)
    outs, string = toy(create(50, **numbers), 50, stacks, first=first)
    fresh, remote = np.asarray(outs[:50, 0, :, 0]) > 0, np.asarray(outs[:50, 0, :, 1])
    assert np.array_equal(fresh, plain_rule(np.asarray(stacks.means, np.float64), 50, first=first, **numbers))
    assert string == "".join("F" if step.all() else "." for step in fresh)
    # Every block holds what it computed last.
    last = np.maximum.accumulate(np.where(fresh, np.arange(50)[:, None], 0))
    assert np.array_equal(remote, last)
    held = 1 - fresh.mean()
    assert held == 0 if share == 0 else abs(held - share) < 0.1 if share < 0.6 else held > 0.5
    assert toy.traces == 1


@pytest.mark.parametrize(
    "params, words",
    [
        (dict(share=1.1), "cache_params.share=1.1"),
        (dict(warmup=1), "cache_params.warmup=1: .*2"),
        (dict(max_interval=0), "cache_params.max_interval=0"),
    ],
)
def test_wrong_parameters(params, words):
    with pytest.raises(InvalidRequest, match=words):
        create(50, **params)


def test_the_loop_on_a_ring():
    """All signal in one shard; under a watchdog, for devices that decide by themselves would wait for each other."""
    tiny = Tiny.load("cache_wan", mesh=MeshConfig(ring=4))
    louder = jnp.ones(tiny.tokens.shape[1]).at[:5].set(30.0)
    tiny.tokens = jax.device_put(tiny.tokens * louder[None, :, None], tiny.tokens.sharding)
    numbers = dict(warmup=3, cooldown=1, anchor_interval=5)
    policies = [create(14, share=share, **numbers) for share in (0.0, 0.5, 0.0)] + [POLICIES["none"]()]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(tiny, policy).result(timeout=300) for policy in policies]
    (never, strings), (held, skipping), (again, _), (exact, _) = runs
    assert strings == ["F" * 14] * 2 and np.array_equal(never, again)
    # The remote parts are merged with each other first, and not one by one into the device's own.
    np.testing.assert_allclose(never, exact, rtol=1e-4, atol=1e-4)
    assert skipping[0].startswith("FFF") and skipping[0].count(".") > 5
    assert np.isfinite(held).all() and np.abs(held - exact).max() > 1e-3
    assert len(tiny.loop._compiled) == 2
