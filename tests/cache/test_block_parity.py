"""Which steps are computed, and what comes out, against diffusers' cache hooks (golden/make_block_caches.py, make_pab.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import relative_error
from loops import Tiny

from smartdiff_jax.cache import POLICIES

STEPS = 14


@pytest.fixture(scope="module", params=["cache_wan", "cache_flux1"])
def tiny(request):
    return Tiny.load(request.param)


def policy_of(kind, numbers, arrays):
    """Our name and numbers of diffusers' configuration."""
    if kind == "first_block":
        return POLICIES["fbcache"].create(STEPS, {}, threshold=numbers["threshold"])
    if kind == "magcache":
        return POLICIES["magcache"].create(
            STEPS,
            {},
            ratios=[arrays["ratios"].tolist()],
            threshold=numbers["threshold"],
            max_skips_in_row=numbers["max_skip_steps"],
            retention=numbers["retention_ratio"],
        )
    after = numbers["disable_cache_after_step"]
    return POLICIES["taylorseer"].create(
        STEPS,
        {},
        interval=numbers["cache_interval"],
        warmup=numbers["disable_cache_before_step"],
        cooldown=0 if after is None else STEPS - after,
    )


def test_equals_diffusers_hooks(tiny):
    cases, strings = (json.loads(str(tiny.arrays[name])) for name in ("cases", "strings"))
    skipped = 0
    for case, (kind, numbers) in cases.items():
        tokens, found = tiny(policy_of(kind, numbers, tiny.arrays))
        assert found == strings[case], case
        skipped += "".join(found).count(".")
        if kind != "taylorseer":
            golden = jnp.asarray(tiny.arrays[f"{case}/out"])
            golden = tiny.patches.pack(golden if golden.ndim == 5 else golden[:, :, None])
            assert relative_error(tokens, golden) < 2e-5, case
    assert len(cases) == 18 and skipped > 60


def test_pab_equals_diffusers_hooks(tiny):
    golden = np.load(Path(__file__).parents[1] / "golden" / "cache_pab.npz")
    name = "cache_flux1" if "pooled" in tiny.arrays else "cache_wan"
    cases, strings = (json.loads(str(golden[key])) for key in ("cases", "strings"))
    for number, numbers in enumerate(cases[name]):
        tokens, found = tiny(POLICIES["pab"].create(STEPS, {}, **numbers))
        of_modules = strings[f"{name}/{number}"]
        assert set(found) == {"".join("F" if set(step) == {"F"} else "." for step in zip(*of_modules, strict=True))}
        out = jnp.asarray(golden[f"{name}/{number}/out"])
        out = tiny.patches.pack(out if out.ndim == 5 else out[:, :, None])
        assert relative_error(tokens, out) < 2e-5, numbers


def test_taylorseer_computes_the_published_steps():
    from loops import Toy

    toy = Toy()
    _, string = toy(POLICIES["taylorseer"].create(50, {}), 50)
    assert [index for index, letter in enumerate(string) if letter == "F"] == [0, 1, 2, *range(4, 50, 5)]


@pytest.mark.parametrize("steps", [1, 2, 27, 28, 29, 50, 200])
def test_tables_of_other_lengths_take_the_nearest_entry(steps):
    from smartdiff_jax.cache.magcache import resample

    table = np.arange(28)
    found = resample(table, steps)
    assert len(found) == steps and found[-1] == 27 and (steps == 1 or found[0] == 0)
    assert np.all(np.diff(found) >= 0) and (steps != 28 or np.array_equal(found, table))
