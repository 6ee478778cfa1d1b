"""Thresholds by simulation: the rule once more, the threshold that meets a budget, and the run that was recorded."""

import jax.numpy as jnp
import numpy as np
import pytest
from loops import Toy, as_string, toy_stacks
from test_budget import outlook

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.threshold import added_up, find_threshold, simulate

STEPS = 40
NOTHING = np.zeros(STEPS, bool)


@pytest.fixture(scope="module")
def toy():
    return Toy()


def l1(new, old):
    return np.abs(new - old).sum() / np.abs(old).sum()


def tables(stacks):
    """What a calibration would record of toy stacks, as numbers for the policies."""
    signal, first = (np.asarray(x, np.float64) for x in (stacks.hidden, stacks.parts[:, 0]))
    gaps = range(1, STEPS)
    from_first = [[l1(first[i], first[i - gap]) if gap <= i else 0.0 for gap in gaps] for i in range(STEPS)]
    return {
        "teacache": {
            "coefficients": [0.5, 1.0, 0.0],
            "distances": [0.0, *(l1(signal[i], signal[i - 1]) for i in range(1, STEPS))],
        },
        "fbcache": {"distances": from_first},
        "magcache": {"ratios": [np.random.RandomState(2).uniform(0.9, 1.08, STEPS).tolist()]},
    }


@pytest.mark.parametrize("name", ["teacache", "fbcache", "magcache"])
def test_the_run_that_was_recorded_goes_as_simulated(name, toy):
    """At the pace of the simulation nothing is led, and the threshold alone decides."""
    stacks = toy_stacks(4, drift=0.15)
    numbers, found = tables(stacks), set()
    for ratio in (0.3, 0.4, 0.5, 0.6, 0.7):
        run, plain = outlook(STEPS, ratio), POLICIES[name].create(STEPS, numbers)
        policy, _ = plain.within(run)
        limit = int(plain.guards.max_skips_in_row)
        threshold, computed = find_threshold(plain._scores(STEPS), policy.guards.forced(run), NOTHING, limit, run.budget)
        assert np.float32(threshold) == policy.threshold != plain.threshold
        _, string = toy(policy, STEPS, stacks)
        assert string.count("F") == run.budget <= computed.sum()
        if computed.sum() == run.budget:
            assert string == as_string(computed)
            found.add(string)
    assert len(found) >= 3


def test_the_highest_threshold_that_computes_enough():
    rng = np.random.RandomState(0)
    for _ in range(20):
        scores = added_up(rng.uniform(0, 1, STEPS))
        budget = int(rng.randint(2, STEPS))
        threshold, computed = find_threshold(scores, NOTHING, NOTHING, STEPS, budget)
        assert computed.sum() >= budget and computed[0]
        assert simulate(scores, NOTHING, NOTHING, STEPS, threshold).sum() == computed.sum()
        above = simulate(scores, NOTHING, NOTHING, STEPS, np.nextafter(next_score(scores, threshold), np.inf))
        assert above.sum() < budget or budget == 1


def next_score(scores, threshold):
    return scores[np.triu_indices(STEPS, 1)][scores[np.triu_indices(STEPS, 1)] > threshold].min()


def test_guards_of_a_simulation():
    scores = added_up(np.ones(12))
    forced, barred = np.zeros((2, 12), bool)
    forced[5], barred[8] = True, True
    run = lambda threshold, limit=12: "".join(".F"[int(x)] for x in simulate(scores, forced, barred, limit, threshold))  # noqa: E731
    assert run(2.5) == "F..F.F...F.."  # step 8 is put off by one
    assert run(99.0, limit=3) == "F...FF...F.." and run(0.5) == "FFFFFFFF.FFF"


@pytest.mark.parametrize("name", ["teacache", "fbcache", "magcache"])
def test_a_users_threshold_is_kept(name):
    numbers = tables(toy_stacks())
    given = POLICIES[name].create(STEPS, numbers, threshold=0.25)
    assert float(given.within(outlook(STEPS, 0.5, given=["threshold"]))[0].threshold) == 0.25
    assert float(given.within(outlook(STEPS, None))[0].threshold) == 0.25
    assert float(given.within(outlook(STEPS, 0.5))[0].threshold) != 0.25


@pytest.mark.parametrize("name", ["teacache", "fbcache"])
def test_other_step_counts_share_out_the_way(name):
    """On an even way, twice the steps have half the distance each, and the same share is skipped at half the threshold."""
    even = {
        "teacache": {"coefficients": [1.0, 0.0], "distances": [0.0] + [0.1] * (STEPS - 1)},
        "fbcache": {"distances": [[0.1 * min(gap, i) for gap in range(1, 7)] for i in range(STEPS)]},
    }
    short, long = (POLICIES[name].create(steps, even)._scores(steps) for steps in (STEPS, 2 * STEPS - 1))
    np.testing.assert_allclose(short, long[::2, ::2], atol=1e-6)
    ends = [POLICIES[name].create(n, even).within(outlook(n, 0.67))[0] for n in (STEPS, 2 * STEPS - 1)]
    assert 1.5 < float(ends[0].threshold) / float(ends[1].threshold) < 3
    assert jnp.all(ends[1].guards.pace[1:] >= 0) and ends[1].distances is None
