"""What a policy on blocks decides, remembers and predicts, on toy stacks whose every number is known."""

import dataclasses
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import relative_error
from loops import Toy, ToyStack, toy_stacks

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.params import MAX_STEPS
from smartdiff_jax.cache.published import published_numbers
from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.samplers import base as samplers

NUMBERS = {
    "teacache": {"coefficients": [1.0, 0.0]},
    "magcache": {"ratios": [[1.0, 1.02, 0.97, 1.01, 0.95], [1.0, 1.01, 0.98, 0.99, 0.9]]},
}
NEVER_SKIPS = {
    "teacache": dict(threshold=0.0),
    "magcache": dict(threshold=0.0),
    "fbcache": dict(threshold=0.0),
    "dbcache": dict(threshold=0.0, first_blocks=3, last_blocks=2, order=1),
    "blockdance": dict(group=1),
    "taylorseer": dict(interval=1),
    "pab": dict(self_interval=1),
    "tokencache": dict(quarters=4),
}
SKIPS = {
    "teacache": dict(threshold=1.5),
    "magcache": dict(threshold=0.3),
    "fbcache": dict(threshold=0.5),
    "dbcache": dict(threshold=0.8, first_blocks=3, last_blocks=2, order=1, warmup=2),
    "blockdance": dict(group=3, block=7),
    "taylorseer": dict(interval=4, order=2),
    "pab": dict(self_interval=4, min_timestep=0, max_timestep=1000),
    "tokencache": dict(interval=4, quarters=0),
}


@pytest.fixture(scope="module")
def toy():
    return Toy()


def create(name, num_steps=40, **params):
    return POLICIES[name].create(num_steps, NUMBERS, **params)


def exact(stacks):
    """What all blocks make of each step."""
    return stacks.hidden + stacks.parts.sum(axis=1)


def test_tables_are_as_long_as_the_samplers():
    assert MAX_STEPS == samplers.MAX_STEPS


@pytest.mark.parametrize("name", SKIPS)
def test_computed_steps_are_exact_and_skipped_ones_are_not(name, toy):
    stacks = toy_stacks()
    for params in (NEVER_SKIPS[name], SKIPS[name]):
        outs, string = toy(create(name, **params), 40, stacks)
        error = np.abs(outs - exact(stacks)).max(axis=(1, 2, 3))[:40]
        assert np.all((error < 1e-4) == (np.array(list(string)) == "F")), string
    assert 3 < string.count(".") < 36


@pytest.mark.parametrize("name", SKIPS)
def test_the_text_stream_goes_along(name, toy):
    stacks = toy_stacks(pair=True)
    alone = dataclasses.replace(stacks, hidden=stacks.hidden[0])
    (tokens, text), string = toy(create(name, **SKIPS[name]), 40, stacks)
    outs, string_alone = toy(create(name, **SKIPS[name]), 40, alone)
    assert string == string_alone and np.array_equal(tokens, outs)
    for index in np.flatnonzero(np.array(list(string)) == "F"):
        # Toy blocks take from the text what they add to the first token.
        np.testing.assert_allclose(text[index], stacks.hidden[1][index] - stacks.parts[index].sum(0)[:, :1], atol=1e-4)


@pytest.mark.parametrize("name", SKIPS)
def test_hundreds_of_settings_share_one_trace(name):
    toy, rng = Toy(), np.random.RandomState(0)
    stacks = toy_stacks()
    static = {key: value for key, value in SKIPS[name].items() if key in ("first_blocks", "last_blocks", "order", "block")}
    draws = {
        "teacache": lambda: dict(
            threshold=rng.rand() * 3,
            coefficients=rng.standard_normal(rng.randint(1, 7)).tolist(),
            clamp_nonneg=rng.rand() < 0.5,
        ),
        "magcache": lambda: dict(
            threshold=rng.rand(), retention=rng.rand(), ratios=[rng.uniform(0.8, 1.2, rng.randint(1, 60)).tolist()]
        ),
        "fbcache": lambda: dict(threshold=rng.rand()),
        "dbcache": lambda: dict(threshold=rng.rand(), predictor=rng.choice(["taylor", "newton"])),
        "blockdance": lambda: dict(group=rng.randint(1, 6), start=rng.rand() / 2, end=0.5 + rng.rand() / 2),
        "taylorseer": lambda: dict(interval=rng.randint(1, 9), predictor=rng.choice(["taylor", "newton"])),
        "pab": lambda: dict(
            self_interval=rng.randint(1, 9), max_timestep=rng.randint(500, 1000), min_timestep=rng.rand() * 500
        ),
        "tokencache": lambda: dict(interval=rng.randint(1, 9), quarters=rng.randint(0, 5)),
    }
    strings = set()
    for _ in range(200):
        steps = int(rng.randint(1, MAX_STEPS + 1))
        guards = dict(
            warmup=rng.randint(0, 9),
            cooldown=rng.randint(0, 5),
            max_skips_in_row=rng.randint(0, 9),
            max_skips=rng.randint(0, 99),
            mask=rng.randint(-1, 2, steps).tolist(),
        )
        params = {key: value for key, value in guards.items() if rng.rand() < 0.4} | draws[name]() | static
        params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
        strings.add(toy(create(name, steps, **params), steps, stacks)[1])
    assert toy.traces == 1 and len(strings) > 150


@pytest.mark.parametrize("name", SKIPS)
def test_other_weights_clear_the_memory(name, toy):
    params = SKIPS[name] | dict(warmup=1, cooldown=0) | (dict(retention=0.0) if name == "magcache" else {})
    _, string = toy(create(name, mask=[-1] * 40, **params), 40, first=17)
    assert string == "F" + "." * 16 + "F" + "." * 22
    # What was remembered before the switch is in nothing that comes after.
    stacks = toy_stacks()
    other = dataclasses.replace(stacks, parts=stacks.parts.at[:17].add(100.0))
    after, other_after = (toy(create(name, **params), 40, which, first=17)[0][17:40] for which in (stacks, other))
    assert np.array_equal(after, other_after)


def test_guards_in_their_order(toy):
    never = dict(threshold=0.0)
    always = dict(threshold=1e9)
    run = lambda **params: toy(create("fbcache", 12, **params), 12)[1]  # noqa: E731
    assert run(**never) == "FFFFFFFFFFFF" and run(**always) == "F..........."
    assert run(**always, warmup=3, cooldown=2) == "FFF.......FF"
    assert run(**always, max_skips_in_row=2) == "F..F..F..F.."
    assert run(**always, max_skips=3, warmup=2) == "FF...FFFFFFF"
    assert run(**always, max_skips_in_row=0) == "FFFFFFFFFFFF"
    # The mask stands above wishes and limits, below the warm-up and the cool-down.
    assert run(**never, mask=[-1] * 12, warmup=2, cooldown=1) == "FF.........F"
    assert run(**always, mask=[0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1]) == "FF..FF.....F"
    assert run(**always, max_skips=1, mask=[0, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, -1]) == "F...FFFFFFF."


@pytest.mark.parametrize(
    "computed, skipped, string",
    [
        ([8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3], "FFFFFFFF.FFF..FFF..FF..F...F"),
        ([6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4], "FFFFFF.F...F....F.....F....F"),
        ([4, 1, 1, 1, 1], [2, 5, 6, 7], "FFFF..F.....F......F.......F"),
    ],
)
def test_published_masks_of_dbcache(computed, skipped, string, toy):
    runs = [[1] * computed[0]] + [[-1] * s + [1] * c for s, c in zip(skipped, computed[1:], strict=True)]
    mask = sum(runs, [])
    assert toy(create("dbcache", 28, mask=mask, warmup=4, threshold=0.0), 28)[1] == string


MAGCACHE = [
    ("flux1-dev", 28, {}, 0, "1110010001010000010000010010"),
    ("flux1-dev", 28, dict(threshold=0.06, max_skips_in_row=3, retention=0.2, mask=[0] * 28), 0, 14),
    ("wan2.1-t2v-1.3b", 50, {}, 0, 25),
    ("wan2.1-t2v-1.3b", 50, dict(max_skips_in_row=4), 0, 21),
    ("wan2.1-t2v-14b", 50, {}, 0, 18),
    ("qwen-image", 50, {}, 0, 37),
    ("wan2.2-t2v-a14b", 40, {}, 26, 26),
]


@pytest.mark.parametrize("model, steps, params, switch, expected", MAGCACHE)
def test_magcache_skips_what_is_published(model, steps, params, switch, expected, toy):
    """With the settings that its scripts ship."""
    policy = POLICIES["magcache"].create(steps, published_numbers(model), **params)
    string = toy(policy, steps, first=switch)[1].replace("F", "1").replace(".", "0")
    assert string == expected if isinstance(expected, str) else string.count("1") == expected
    # It follows the rule, stated once more in plain Python, of either branch.
    tables = published_numbers(model)["magcache"]["ratios"]
    for table in tables:
        assert string == plain_magcache(table, steps, policy, switch)


def plain_magcache(table, steps, policy, switch):
    forced = set(range(int(policy.guards.warmup)))
    forced |= set(np.flatnonzero(policy.guards.mask))
    if switch:
        forced |= {i for i in range(switch, steps) if i - switch <= 0.4 * (steps - switch)}
    ratio, error, skips, string = 1.0, 0.0, 0, ""
    for index in range(steps):
        ratio, skips = ratio * table[index], skips + 1
        error += abs(1 - ratio)
        skip = index not in forced and error < float(policy.threshold) and skips <= int(policy.guards.max_skips_in_row)
        if not skip:
            ratio, error, skips = 1.0, 0.0, 0
        string += "0" if skip else "1"
    return string


def test_magcache_skips_both_branches_only_if_both_may(toy):
    calm, wild = [1.0] * 40, [1.0, *[1.2] * 39]
    strings = [
        toy(POLICIES["magcache"].create(40, {}, ratios=ratios, threshold=0.1), 40)[1]
        for ratios in ([calm], [wild], [calm, wild], [wild, calm])
    ]
    assert strings[0].count(".") > 20 and strings[1] == strings[2] == strings[3] == "F" * 40


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("kind", ["modulated_input", "time_embedding"])
def test_teacache_follows_its_rule(kind, clamp, toy):
    stacks = toy_stacks(3, drift=0.05)
    signal = np.asarray(stacks.hidden if kind == "modulated_input" else stacks.time, np.float64)
    coefficients = [100.0, 25.0, -1.3]  # negative for small distances, as fitted ones are
    numbers = {"teacache": {"signal": kind, "rows": 6, "coefficients": coefficients}}
    found, negative = set(), False
    for threshold in (0.05, 0.3, 0.8, 2.0):
        expected, total = "", 0.0
        for i in range(60):
            moved = 0.0
            if i > 0:
                distance = np.abs(signal[i] - signal[i - 1]).mean() / np.abs(signal[i - 1]).mean()
                moved = np.polyval(coefficients, distance)
                negative |= moved < 0
            total += max(moved, 0) if clamp else moved
            fresh = i < 2 or i == 59 or not total < threshold
            total = 0.0 if fresh else total
            expected += "F" if fresh else "."
        policy = POLICIES["teacache"].create(60, numbers, threshold=threshold, clamp_nonneg=clamp, warmup=2, cooldown=1)
        assert toy(policy, 60, stacks)[1] == expected
        found.add(expected)
    assert len(found) > 2 and negative


def test_teacache_on_the_time_embedding_does_not_see_the_picture(toy):
    numbers = {"teacache": {"signal": "time_embedding", "rows": 6, "coefficients": [1.0, 0.0]}}
    one, two = toy_stacks(1), toy_stacks(2)
    policy = POLICIES["teacache"].create(50, numbers, threshold=0.9)
    assert toy(policy, 50, one)[1] == toy(policy, 50, dataclasses.replace(two, time=one.time))[1]
    assert toy(policy, 50, one)[1] != toy(policy, 50, dataclasses.replace(one, time=two.time))[1]


@pytest.mark.parametrize("name", ["teacache", "fbcache"])
def test_one_sample_that_moves_is_enough(name, toy):
    """Also when the others drown it in a mean over the batch."""
    params = dict(threshold=1.0) if name == "teacache" else dict(threshold=0.5)
    calm, wild = toy_stacks(5, drift=0.001), toy_stacks(6, drift=1.0)
    calm = jax.tree.map(lambda leaf: 1000.0 * leaf, calm)
    # Axes of samples: parts have theirs behind the blocks.
    both = ToyStack(
        jnp.concatenate([calm.hidden, wild.hidden], 1),
        jnp.concatenate([calm.parts, wild.parts], 2),
        jnp.concatenate([calm.time, wild.time], 1),
    )
    alone, together = toy(create(name, **params), 40, wild)[1], toy(create(name, **params), 40, both)[1]
    assert alone == together and toy(create(name, **params), 40, calm)[1].count(".") > alone.count(".") > 0


@pytest.mark.parametrize("name", ["teacache", "fbcache"])
def test_padding_tokens_do_not_count(name, toy):
    stacks = toy_stacks(7)
    weights = jnp.asarray([1.0, 1, 1, 0, 0])
    garbage = 1e3 * jax.random.normal(jax.random.key(0), (MAX_STEPS, 1, 2, 4))
    dirty = dataclasses.replace(
        stacks, hidden=stacks.hidden.at[:, :, 3:].add(garbage), parts=stacks.parts.at[:, :, :, 3:].add(garbage[:, None])
    )
    params = SKIPS[name]
    clean, with_garbage = (toy(create(name, **params), 40, which, token_weights=weights)[1] for which in (stacks, dirty))
    assert clean == with_garbage and "." in clean
    assert toy(create(name, **params), 40, dirty)[1] != clean


def test_a_residual_that_is_a_polynomial_of_the_step(toy):
    """Newton's form of order 2 is exact for a quadratic residual at uneven gaps; TaylorSeer's is only for a straight line."""
    t = jnp.arange(MAX_STEPS, dtype=jnp.float32)[:, None, None, None] / 10
    base = toy_stacks(8)
    for predictor, degree in (("newton", 2), ("taylor", 1), ("taylor", 2)):
        parts = jnp.zeros_like(base.parts).at[:, 5].set(0.3 - 0.2 * t + (0.1 * t**2 if degree == 2 else 0))
        stacks = dataclasses.replace(base, parts=parts)
        policy = create("taylorseer", order=2, interval=4, predictor=predictor, warmup=6)
        outs, string = toy(policy, 40, stacks)
        error = np.abs(outs - exact(stacks))[:40].max()
        assert string.count(".") > 20
        assert error > 1e-2 if (predictor, degree) == ("taylor", 2) else error < 1e-3


def test_blockdance_runs_the_later_blocks(toy):
    stacks = toy_stacks(9)
    outs, string = toy(create("blockdance", 20, group=3, block=4, start=0.3, end=0.8), 20, stacks)
    assert string == "FFFFFF" + "F..F..F..F" + "FFFF"
    entering = stacks.hidden + stacks.parts[:, :5].sum(1)
    np.testing.assert_allclose(outs[8], entering[6] + stacks.parts[8, 5:].sum(0), rtol=1e-5)


def test_dbcache_corrects_with_the_last_blocks(toy):
    stacks = toy_stacks(10)
    outs, string = toy(create("dbcache", 12, first_blocks=3, last_blocks=2, threshold=1e9, warmup=0), 12, stacks)
    assert string == "F" + "." * 11
    first, last = stacks.parts[:, :3].sum(1), stacks.parts[:, 10:].sum(1)
    held = stacks.parts[0, 3:10].sum(0)
    np.testing.assert_allclose(outs[7], stacks.hidden[7] + first[7] + held + last[7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, params, words",
    [
        ("teacache", dict(threshold=-0.1), ["cache_params.threshold=-0.1", "greater than or equal to 0"]),
        ("teacache", dict(treshold=0.1), ["cache_params.treshold=0.1", "did you mean 'threshold'"]),
        ("teacache", dict(threshold=float("nan")), ["cache_params.threshold=nan", "finite"]),
        ("teacache", dict(coefficients=[1.0] * 7), ["cache_params.coefficients", "6"]),
        ("magcache", dict(retention=1.5), ["cache_params.retention=1.5"]),
        ("magcache", dict(ratios=[[]]), ["cache_params.ratios.0=[]"]),
        ("fbcache", dict(first_blocks=0), ["cache_params.first_blocks=0"]),
        ("fbcache", dict(order=6), ["cache_params.order=6", "less than 6"]),
        ("dbcache", dict(predictor="foca"), ["cache_params.predictor='foca'", "newton"]),
        ("blockdance", dict(start=0.9, end=0.5), ["cache_params", "start=0.9", "end=0.5"]),
        ("taylorseer", dict(interval=0), ["cache_params.interval=0"]),
        ("pab", dict(self_interval=0), ["cache_params.self_interval=0"]),
        ("pab", dict(min_timestep=300, max_timestep=200), ["min_timestep=300", "max_timestep=200"]),
        ("taylorseer", dict(mask=[1] * 39), ["cache_params.mask", "each of the 40 steps"]),
        ("taylorseer", dict(mask=[2] * 40), ["cache_params.mask.0=2"]),
        ("taylorseer", dict(max_skips_in_row=-1), ["cache_params.max_skips_in_row=-1"]),
    ],
)
def test_wrong_parameters_are_one_clear_error(name, params, words):
    with pytest.raises(InvalidRequest) as raised:
        create(name, **params)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    "name, params, word",
    [
        ("fbcache", dict(first_blocks=12), "cache_params.first_blocks=12: the model has 12 blocks"),
        ("dbcache", dict(last_blocks=4), "cache_params.last_blocks=4: the model has 12 blocks"),
        ("blockdance", dict(block=12), "cache_params.block=12: the model has 12 blocks; give at most 11"),
    ],
)
def test_a_range_that_the_model_does_not_have(name, params, word, toy):
    with pytest.raises(InvalidRequest, match=word):
        toy(create(name, **params), 40)


@pytest.mark.parametrize("name", ["teacache", "magcache"])
def test_a_model_nobody_measured(name):
    with pytest.raises(InvalidRequest, match=f"cache='{name}'.*calibrate"):
        POLICIES[name].create(40, published_numbers("no-such-model"))
    with pytest.raises(InvalidConfig, match=f"{name}.coefficient"):
        POLICIES[name].create(40, {name: {"coefficient": [1.0]}})


def test_published_numbers_are_of_known_models_and_fit_their_policies():
    known = {file.name.removesuffix(".yaml") for file in resources.files("smartdiff_jax.config.models").iterdir()}
    files = [file for file in (resources.files("smartdiff_jax.cache") / "data").iterdir() if file.name.endswith(".json")]
    names = [(file.name.removesuffix(".json"), name) for file in files for name in json.loads(file.read_text())]
    assert {model for model, _ in names} <= known and len(names) >= 11
    for model, name in names:
        if name in SKIPS:
            POLICIES[name].create(30, published_numbers(model))


@pytest.mark.parametrize("name", SKIPS)
def test_a_stream_in_bfloat16(name, toy):
    stacks = toy_stacks(11)
    half = dataclasses.replace(
        stacks, hidden=stacks.hidden.astype(jnp.bfloat16), parts=stacks.parts.astype(jnp.bfloat16), time=stacks.time
    )
    outs, string = toy(create(name, **SKIPS[name]), 40, half)
    expected, _ = toy(create(name, mask=mask_of(string), **SKIPS[name]), 40, stacks)
    assert outs.dtype == jnp.bfloat16 and "." in string
    assert relative_error(outs[:40].astype(jnp.float32), expected[:40]) < 2e-2


def mask_of(string):
    """The mask that repeats a run."""
    return [1 if letter == "F" else -1 for letter in string]
