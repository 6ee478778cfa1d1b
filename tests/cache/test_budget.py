"""A ratio is kept to the step, whatever the policy would do by itself."""

import numpy as np
import pytest
from loops import Toy, toy_stacks
from test_block_policies import NUMBERS, SKIPS

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.base import Outlook
from smartdiff_jax.cache.guards import COMPUTE, SKIP, Guards
from smartdiff_jax.cache.params import MAX_STEPS
from smartdiff_jax.errors import InvalidRequest

ALWAYS = {"blockdance": dict(start=0.0, end=1.0, block=7)}


def outlook(steps, ratio, restarts=(), given=()):
    return Outlook(steps, np.linspace(1.0, 0.0, steps + 1), restarts, ratio, frozenset(given))


def fitted(name, steps, ratio, restarts=(), **params):
    policy = POLICIES[name].create(steps, NUMBERS, **params)
    return policy.within(outlook(steps, ratio, restarts, params))[0]


def worth(string):
    """Of how many whole steps as much is computed."""
    return string.count("F") + sum(string.count(letter) * int(letter) for letter in "123") / 4


@pytest.fixture(scope="module")
def toys():
    return {name: Toy() for name in SKIPS}


@pytest.mark.parametrize("name", SKIPS)
def test_exactly_the_budget_is_computed(name, toys):
    toy, rng, stacks, strings = toys[name], np.random.RandomState(1), toy_stacks(), set()
    for _ in range(25):
        steps = int(rng.randint(2, MAX_STEPS + 1))
        ratio = rng.uniform(0.0, 0.9)
        restarts = (int(rng.randint(1, steps)),) if rng.rand() < 0.3 else ()
        params = SKIPS[name] | ALWAYS.get(name, {})
        if "threshold" in params:
            params = params | dict(threshold=float(10.0 ** rng.uniform(-6, 3)))
        params.pop("warmup", None)  # one that was asked for is not shortened
        budget = outlook(steps, ratio).budget
        if budget <= len(restarts):
            continue
        _, string = toy(fitted(name, steps, ratio, restarts, **params), steps, stacks, first=restarts[0] if restarts else 0)
        assert worth(string) == budget, (steps, ratio, restarts, params, string)
        strings.add(string)
    assert toy.traces == 1 and len(strings) > 15


@pytest.mark.parametrize("name", SKIPS)
def test_ratio_zero_computes_every_step_to_the_bit(name, toys):
    stacks = toy_stacks()
    params = SKIPS[name]
    outs, string = toys[name](fitted(name, 30, 0.0, **params), 30, stacks)
    full, _ = toys[name](POLICIES[name].create(30, NUMBERS, **params | dict(mask=[1] * 30)), 30, stacks)
    assert string == "F" * 30 and np.array_equal(outs, full)


def test_a_mask_is_kept_within_the_budget(toys):
    mask = [1] + [0] * 10 + [-1] * 8 + [0] * 10 + [1]
    _, string = toys["fbcache"](fitted("fbcache", 30, 0.5, threshold=0.5, mask=mask), 30)
    assert string.count("F") == 15 and string[11:19] == "." * 8 and string[0] == string[29] == "F"


def test_thresholds_are_led_to_the_pace(toys):
    """Without being led, a threshold too low spends the budget at once, and one too high saves it for the end."""
    for threshold in (1e-3, 1e2):
        _, string = toys["fbcache"](fitted("fbcache", 60, 0.5, threshold=threshold), 60)
        counts = [string[i : i + 15].count("F") for i in range(0, 60, 15)]
        assert string.count("F") == 30 and max(counts) <= 13 and min(counts) >= 2, (threshold, string)


def test_evenly_spread_schedules(toys):
    _, string = toys["taylorseer"](fitted("taylorseer", 20, 0.5, order=2, warmup=2), 20)
    assert string.count("F") == 10
    gaps = np.diff(np.flatnonzero(np.array(list(string)) == "F")[1:])
    assert gaps.max() - gaps.min() <= 1


def test_warmups_nobody_asked_for_give_way():
    guards = Guards.create(POLICIES["dbcache"].params(), 20)
    assert int(guards.within(outlook(20, 0.5)).warmup) == 4 and int(guards.within(outlook(20, 0.0)).warmup) == 8
    assert int(guards.within(outlook(20, 0.5, given=["warmup"])).warmup) == 8
    with pytest.raises(InvalidRequest, match="cache_ratio=0.7.*from 8 to 20 of 20.*give 0.0 to 0.6"):
        guards.within(outlook(20, 0.7, given=["warmup"]))


@pytest.mark.parametrize(
    "name, ratio, params, words",
    [
        ("none", 0.5, {}, "cache_ratio=0.5.*auto"),
        ("blockdance", 0.7, {}, "cache_ratio=0.7.*give 0.0 to 0.55"),
        ("fbcache", 0.2, dict(mask=[1] + [-1] * 39), "cache_ratio=0.2.*from 1 to 1 of 40"),
        ("fbcache", 0.9, dict(mask=[1] * 40), "cache_ratio=0.9.*from 40 to 40 of 40"),
    ],
)
def test_ratios_that_cannot_be_kept_are_refused(name, ratio, params, words):
    with pytest.raises(InvalidRequest, match=words):
        fitted(name, 40, ratio, **params)


def test_pab_lays_the_budget_between_its_timesteps():
    for steps, ratio, restarts in ((50, 0.5, ()), (50, 0.0, ()), (31, 0.4, (13,)), (200, 0.3, (7, 150)), (5, 0.2, ())):
        told = np.asarray(fitted("pab", steps, ratio, restarts).guards.mask)[:steps]
        computed = told == COMPUTE
        assert set(told) <= {COMPUTE, SKIP} and computed[[0, *restarts]].all()
        timesteps = 1000.0 * outlook(steps, ratio).sigmas[:-1]
        assert computed[(timesteps <= 100) | (timesteps >= 800)].all()
        assert computed.sum() == outlook(steps, ratio).budget, (steps, ratio, restarts)
    with pytest.raises(InvalidRequest, match="give 0.0 to 0.68"):
        fitted("pab", 50, 0.9)


def test_a_ratio_of_ditango_is_its_share():
    assert fitted("ditango", 50, 0.3).rate == POLICIES["ditango"].create(50, NUMBERS, share=0.3).rate
    with pytest.raises(InvalidRequest, match="leave one out"):
        fitted("ditango", 50, 0.3, share=0.3)
