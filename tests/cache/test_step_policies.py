"""What a policy on whole steps decides, remembers and predicts, on velocities whose every number is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_toy import SCALE, StepToy, shifted, toy_start, toy_tables

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.meancache import MeanCacheNumbers, slopes_of_computed, spread
from smartdiff_jax.cache.params import MAX_STEPS
from smartdiff_jax.cache.published import published_numbers
from smartdiff_jax.errors import InvalidConfig, InvalidRequest

NEVER_SKIPS = {
    "easycache": dict(threshold=0.0),
    "schedule": dict(interval=1),
    "meancache": dict(budget=40),
    "cfgcache": dict(interval=1),
}
SKIPS = {
    "easycache": dict(threshold=0.5, retention=0.1),
    "schedule": dict(interval=4, predictor="newton", warmup=3),
    "meancache": dict(budget=18),
    "cfgcache": dict(below=900.0),
}


@pytest.fixture(scope="module")
def toy():
    return StepToy()


def create(name, num_steps=40, **params):
    return POLICIES[name].create(num_steps, {}, **params)


def tables_for(name):
    return toy_tables() if name == "cfgcache" else toy_tables()[:1]


def fresh(string):
    return np.array(list(string)) == "F"


def mask_of(string):
    """The mask that repeats a run."""
    return [1 if letter == "F" else -1 for letter in string]


@pytest.mark.parametrize("name", SKIPS)
def test_computed_steps_are_exact_and_skipped_ones_are_not(name, toy):
    tables = tables_for(name)
    guided = np.asarray(tables[-1] + SCALE * (tables[0] - tables[-1]))[:40]
    for params in (NEVER_SKIPS[name], SKIPS[name]):
        _, velocities, strings, _ = toy(create(name, **params), shifted(40), tables)
        assert np.array_equal((velocities == guided).all(axis=(1, 2, 3)), fresh(strings[-1]))
    assert 3 < strings[-1].count(".") < 36
    assert name != "cfgcache" or strings[0] == "F" * 40


@pytest.mark.parametrize("name", SKIPS)
def test_hundreds_of_settings_share_one_trace(name, toy):
    rng, strings, kinds = np.random.RandomState(0), set(), set()
    toy(create(name), shifted(40), tables_for(name))
    before = toy.traces
    draws = {
        "easycache": lambda steps: dict(threshold=rng.rand() * 2, retention=rng.rand() / 2),
        "schedule": lambda steps: dict(
            interval=rng.randint(1, 9),
            predictor=rng.choice(["hold", "mean", "newton", "taylor"]),
            order=rng.randint(0, 7),
            along=rng.choice(["sigma", "step"]),
        ),
        "meancache": lambda steps: (
            dict(budget=rng.randint(1, steps + 1)) | rng.choice([{}, {"orders": rng.randint(1, 7, steps).tolist()}])
        ),
        "cfgcache": lambda steps: dict(interval=rng.randint(1, 9), below=rng.rand() * 1001, gain=rng.rand() * 2),
    }
    for number in range(200):
        steps = int(rng.randint(1, MAX_STEPS + 1))
        guards = dict(
            warmup=rng.randint(0, 9),
            cooldown=rng.randint(0, 5),
            max_skips_in_row=rng.randint(0, 9),
            max_skips=rng.randint(0, 99),
            mask=rng.randint(-1, 2, steps).tolist(),
        )
        params = {key: value for key, value in guards.items() if rng.rand() < 0.4} | draws[name](steps)
        if name == "meancache" and "mask" in params:
            del params["budget"]
        params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
        policy = create(name, steps, **params)
        leaves, structure = jax.tree.flatten(policy)
        kinds.add((structure, tuple((leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves)))
        if number % 5 == 0:
            _, _, found, _ = toy(policy, shifted(steps, 1 + 9 * rng.rand()), tables_for(name))
            assert found[-1][0] == "F"
            strings.add(found[-1])
    # All that a trace can depend on is equal for all of them; every fifth was run.
    assert len(kinds) == 1 and toy.traces == before and len(strings) > 30


@pytest.mark.parametrize("name", SKIPS)
def test_other_weights_clear_the_memory(name, toy):
    sigmas, tables = shifted(40), tables_for(name)
    params = {key: value for key, value in SKIPS[name].items() if key != "budget"}
    forced = params | dict(mask=[-1] * 40, warmup=1, cooldown=0) | (dict(retention=0.0) if name == "easycache" else {})
    _, _, strings, _ = toy(create(name, **forced), sigmas, tables, first=17)
    assert strings[-1] == "F" + "." * 16 + "F" + "." * 22
    # What was remembered before the switch is in nothing that comes after. (The latents are not pulled, so they do not tell.)
    other = tables.at[:, :17].add(100.0 * jnp.arange(1, len(tables) + 1)[:, None, None, None, None])
    policy = create(name, **SKIPS[name] | (dict(mask=mask_of(strings[-1])) if name == "easycache" else {}))
    if name == "meancache":
        policy = create(name, mask=mask_of(strings[-1]), orders=[3] * 40)
    after, other_after = (toy(policy, sigmas, which, first=17)[1][17:] for which in (tables, other))
    if name == "easycache":  # it remembers velocities against the latents, which lie elsewhere now: equal but for rounding
        np.testing.assert_allclose(after, other_after, atol=1e-3)
    else:
        assert np.array_equal(after, other_after)


def test_evaluations_are_those_reported(toy):
    """Counted where the model would run: skipped steps cost none, so that time is linear in the computed steps."""
    counting = StepToy(count_evaluations=True)
    for interval in (1, 2, 3, 7):
        counting.evaluations = 0
        _, _, strings, _ = counting(create("schedule", interval=interval), shifted(40))
        jax.effects_barrier()
        assert counting.evaluations == strings[0].count("F") == -(-40 // interval)
    assert counting.traces == 1


# EasyCache


def plain_easycache(tables, pull, start, sigmas, threshold, warmup, cooldown):
    """The published rule in float64; with both branches the positive one decides, and what is held is held of each branch."""
    steps, x = len(sigmas) - 1, np.asarray(start, np.float64)
    tables, rate, total, string = np.asarray(tables, np.float64), None, 0.0, ""
    last = held = before = None
    margin = np.inf
    for i in range(steps):
        compute = i < warmup or i >= steps - cooldown or rate is None
        if not compute:
            total += rate * np.abs(x - before).mean() / np.abs(last[1]).mean()
            compute = not total < threshold
            margin = min(margin, abs(total / threshold - 1))
        before = x
        if compute:
            branches, total = tables[:, i] + pull * x, 0.0
            if last is not None:
                rate = np.abs(branches[0] - last[1]).mean() / np.abs(x - last[0]).mean()
            last, held = (x, branches[0]), branches - x
        else:
            branches = x + held
        string += "F" if compute else "."
        x = x + (sigmas[i + 1] - sigmas[i]) * (branches[-1] + SCALE * (branches[0] - branches[-1]))
    return x, string, margin


@pytest.mark.parametrize("branches", [1, 2])
def test_easycache_follows_its_rule(branches, toy):
    tables, sigmas, found = toy_tables(3, drift=0.05)[:branches], shifted(50), set()
    for threshold in (0.1, 0.31, 0.8, 1.7, 4.0):
        for retention, cooldown in ((0.0, 0), (0.2, 1)):
            policy = create("easycache", 50, threshold=threshold, retention=retention, cooldown=cooldown, warmup=1)
            x, _, strings, _ = toy(policy, sigmas, tables, pull=-0.4)
            warmup = max(1, round(50 * retention))
            expected, string, margin = plain_easycache(tables, -0.4, toy_start(), sigmas, threshold, warmup, cooldown)
            assert margin > 1e-4  # no decision hangs on rounding
            assert strings == [string] * branches
            np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-4)
            found.add(string)
    assert len(found) > 6


def test_easycache_has_the_published_numbers():
    policy = POLICIES["easycache"].create(50, published_numbers("wan2.1-t2v-1.3b"))
    assert (float(policy.threshold), int(policy.guards.warmup), int(policy.guards.cooldown)) == (np.float32(0.05), 10, 1)


def test_easycache_measures_each_expert(toy):
    """Two computed steps are needed for a rate, also behind a switch."""
    policy = create("easycache", threshold=1e9, retention=0.0, cooldown=0)
    assert toy(policy, shifted(40), first=17)[2] == ["FF" + "." * 15 + "FF" + "." * 21]


def test_easycache_computes_if_one_sample_needs_it(toy):
    """Also when another drowns it in a mean over the batch."""
    calm, wild = toy_tables(5, drift=1e-4)[:1] * 1e3, toy_tables(6, drift=0.5)[:1]
    policy, starts = create("easycache", threshold=2.0, retention=0.0), (toy_start(1), toy_start(2))
    both = jnp.concatenate([calm, wild], 2), jnp.concatenate(starts)
    alone, together = toy(policy, shifted(40), wild, start=starts[1])[2], toy(policy, shifted(40), both[0], start=both[1])[2]
    counts = [strings[0].count("F") for strings in (alone, together)]
    calmly = toy(policy, shifted(40), calm, start=starts[0])[2][0].count("F")
    assert calmly < counts[0] <= counts[1] < 40


def test_padding_tokens_do_not_count(toy):
    tables, weights = toy_tables(7)[:1], jnp.asarray([1.0, 1, 1, 0, 0])
    dirty = tables.at[..., 3:, :].add(1e3 * jax.random.normal(jax.random.key(0), (1, MAX_STEPS, 1, 2, 4)))
    policy = create("easycache", threshold=0.5, retention=0.0)
    clean, with_garbage = (toy(policy, shifted(40), which, token_weights=weights)[2] for which in (tables, dirty))
    assert clean == with_garbage and "." in clean[0]
    assert toy(policy, shifted(40), dirty)[2] != clean


# Predictors of a schedule


def polynomial(at, degree):
    """A velocity of this degree in `at`, the same for every token."""
    coefficients = np.array([0.3, -0.7, 0.9, 0.4])[: degree + 1]
    values = np.polynomial.polynomial.polyval(np.asarray(at, np.float64), coefficients)
    table = np.zeros((1, MAX_STEPS, 1, 5, 4), np.float32)
    table[0, : len(values)] = values[:, None, None, None]
    return jnp.asarray(table)


@pytest.mark.parametrize("predictor, order, exact", [("hold", 3, 0), ("taylor", 1, 1), ("newton", 1, 1), ("newton", 3, 3)])
@pytest.mark.parametrize("along", ["sigma", "step"])
def test_a_velocity_that_is_a_polynomial(predictor, order, exact, along, toy):
    """Exact at uneven gaps up to the predictor's degree and no higher."""
    sigmas = shifted(20)
    at = sigmas[:-1] if along == "sigma" else np.arange(20) / 20
    mask = mask_of("FFFF.F..F.FF...F...F")
    policy = create("schedule", 20, mask=mask, predictor=predictor, order=order, along=along)
    for degree in range(exact + 2) if exact < 3 else range(exact + 1):
        table = polynomial(at, degree)
        _, velocities, strings, _ = toy(policy, sigmas, table)
        error = np.abs(velocities - np.asarray(table[0, :20])).max()
        assert strings[0].count(".") == 10
        assert error < 2e-4 if degree <= exact else error > 1e-2


def test_taylor_misses_a_quadratic_by_what_its_form_implies(toy):
    """D_2 N k / 2 with gaps N, k steps behind the last computed one: the published form, not a better one."""
    sigmas, gap = shifted(25), 4
    table = polynomial(np.arange(25), 0).at[0, :25].set(jnp.arange(25.0)[:, None, None, None] ** 2 / 100)
    policy = create("schedule", 25, interval=gap, predictor="taylor", order=2, along="step")
    _, velocities, _, _ = toy(policy, sigmas, table)
    for index in range(3 * gap, 25):
        k = index % gap
        missed = np.asarray(table)[0, index] - velocities[index]
        np.testing.assert_allclose(missed, 2 / 100 * gap * k / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["schedule", "meancache"])
@pytest.mark.parametrize("order", [1, 2, 3, 5, 6])
def test_mean_slope_goes_its_share_of_the_way(name, order, toy):
    """(K - 1) / 2 K of a linear velocity, on equal steps; nothing for K = 1, which holds to the bit."""
    sigmas = np.linspace(1, 0, 21).astype(np.float32)
    table = polynomial(sigmas[:-1], 1)
    params = dict(predictor="mean", order=order) if name == "schedule" else dict(orders=[order] * 20)
    _, velocities, _, _ = toy(create(name, 20, mask=mask_of("F" * 8 + "." + "F" * 11), **params), sigmas, table)
    went = (velocities[8] - velocities[7]) / np.asarray(table[0, 8] - table[0, 7])
    np.testing.assert_allclose(went, (order - 1) / (2 * order), atol=1e-3)
    assert order > 1 or np.array_equal(velocities[8], velocities[7])


# MeanCache


def plain_meancache(tables, pull, start, sigmas, computed, orders):
    """Its source's arithmetic: slopes from where the latents went, over all steps, predicted ones included."""
    x, history, velocities = np.asarray(start, np.float64), [], []
    for i in range(len(sigmas) - 1):
        if computed[i]:
            velocity = np.asarray(tables[0, i], np.float64) + pull * x
        else:
            oldest, newest = history[-min(orders[i], len(history))], history[-1]
            span = newest["after"] - oldest["before"]
            mean = (newest["x_after"] - oldest["x_before"]) / span
            velocity = newest["v"] - (oldest["v"] - mean) / span * (sigmas[i + 1] - sigmas[i])
        following = x + (sigmas[i + 1] - sigmas[i]) * velocity
        history.append(dict(v=velocity, x_before=x, x_after=following, before=sigmas[i], after=sigmas[i + 1]))
        velocities.append(velocity)
        x = following
    return x, np.stack(velocities)


@pytest.mark.parametrize("model, budget", [("qwen-image", 25), ("qwen-image", 10), ("flux1-dev", 17), ("z-image", 20)])
def test_meancache_follows_its_tables(model, budget, toy):
    numbers = published_numbers(model)
    table = next(t for t in MeanCacheNumbers(**numbers["meancache"]).tables if len(t.computed) == budget)
    edges = list(zip(table.computed, table.computed[1:], strict=False))
    computed, orders, kinds = np.zeros(50, bool), np.zeros(50, int), list(table.orders)
    computed[list(table.computed)] = True
    for i, j in edges:
        orders[i + 1 : j] = kinds.pop(0) if j > i + 1 else 0
    sigmas, tables = shifted(50).astype(np.float64), toy_tables(drift=0.05)[:1]
    x, velocities, strings, _ = toy(POLICIES["meancache"].create(50, numbers, budget=budget), sigmas, tables, pull=-0.3)
    assert np.array_equal(fresh(strings[0]), computed)
    expected, predicted = plain_meancache(tables, -0.3, toy_start(), sigmas, computed, orders)
    np.testing.assert_allclose(velocities, predicted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-3)


def test_tables_serve_only_their_own_number_of_steps():
    numbers = published_numbers("qwen-image")
    for steps, budget in ((28, None), (60, 25), (50, 13)):
        policy = POLICIES["meancache"].create(steps, numbers, budget=budget)
        assert np.array_equal(policy.computed[:steps], spread(steps, budget or (steps + 1) // 2))
    assert POLICIES["meancache"].create(50, numbers).computed[:50].sum() == 25


def test_spread_lays_every_budget():
    for steps in (1, 2, 3, 9, 20, 50, 200):
        for budget in range(1, steps + 1):
            computed = spread(steps, budget)
            assert computed.sum() == budget and computed[0] and (budget == 1 or computed[-1])
    # As the table of Qwen-Image and 17 of 50 steps, but for one step.
    assert "".join(".F"[int(done)] for done in spread(50, 17)) == "FFFFFFFFF......F.....F......F.....F......F.....FFF"


def test_a_slope_is_only_taken_of_computed_velocities():
    computed = fresh("FFF..F.FF.F...FF....")
    assert "".join(map(str, slopes_of_computed(computed))) == "11122111121111112222"


# CFG-cache


def test_cfgcache_holds_the_difference_of_the_branches(toy):
    tables, sigmas = toy_tables(), shifted(20)
    policy = create("cfgcache", 20, interval=4, below=2000.0, gain=0.9)
    _, velocities, strings, _ = toy(policy, sigmas, tables)
    assert strings == ["F" * 20, "F..." * 5]
    for index in range(20):
        last = index - index % 4
        share = 1.0 if index == last else 0.9
        negative = tables[0, index] + share * (tables[1, last] - tables[0, last])
        guided = negative + SCALE * (tables[0, index] - negative)
        np.testing.assert_allclose(velocities[index], guided, rtol=1e-4, atol=1e-4)


def test_cfgcache_needs_a_negative_branch(toy):
    with pytest.raises(InvalidRequest, match="cache='cfgcache'.*no negative branch"):
        toy(create("cfgcache"), shifted(40))


# Wrong parameters


@pytest.mark.parametrize(
    "name, params, words",
    [
        ("easycache", dict(threshold=-0.1), ["cache_params.threshold=-0.1", "greater than or equal to 0"]),
        ("easycache", dict(retention=1.5), ["cache_params.retention=1.5"]),
        ("schedule", dict(predictor="foca"), ["cache_params.predictor='foca'", "newton"]),
        ("schedule", dict(order=7), ["cache_params.order=7", "6"]),
        ("schedule", dict(mask=[1] * 39), ["cache_params.mask", "each of the 40 steps"]),
        ("meancache", dict(budget=41), ["cache_params.budget=41", "40 steps"]),
        ("meancache", dict(budget=3, mask=[1] * 40), ["cache_params.budget=3", "mask"]),
        ("meancache", dict(orders=[2] * 39), ["cache_params.orders", "each of the 40 steps"]),
        ("meancache", dict(orders=[7] * 40), ["cache_params.orders.0=7"]),
        ("cfgcache", dict(gain=3.0), ["cache_params.gain=3.0"]),
        ("cfgcache", dict(inteval=3), ["cache_params.inteval=3", "did you mean 'interval'"]),
    ],
)
def test_wrong_parameters_are_one_clear_error(name, params, words):
    with pytest.raises(InvalidRequest) as raised:
        create(name, **params)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    "table", [dict(num_steps=4, computed=[0, 4], orders=[1]), dict(num_steps=9, computed=[0, 1, 4], orders=[])]
)
def test_wrong_tables_are_one_clear_error(table):
    with pytest.raises(InvalidConfig, match="meancache.tables"):
        POLICIES["meancache"].create(9, {"meancache": {"tables": [table]}})
