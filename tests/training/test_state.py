"""The optimizer's step, the average of the weights, the schedule and the budget of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartdiff_jax.training.state import ADAM_RMS, Budget, Optimizer, learning_rate


def test_budget_follows_time_or_steps_and_ends_with_the_call():
    now = [100.0]
    budget = Budget(minutes=2.0, steps=None, spent=30.0, deadline=150.0, clock=lambda: now[0])
    now[0] = 120.0
    assert budget.spent == 30.0  # compiling does not count
    budget.start()
    now[0] = 149.0
    assert budget.spent == 59.0 and budget.fraction(10) == pytest.approx(59 / 120) and not budget.stop()
    now[0] = 150.0
    assert budget.stop()
    hurried = Budget(minutes=2.0, steps=None, spent=30.0, deadline=170.0, finish=True, clock=lambda: now[0])
    hurried.start()
    now[0] = 169.0
    assert hurried.fraction(0) == pytest.approx(49 / 50)
    assert Budget(minutes=2.0, steps=8, spent=0.0, deadline=999.0).fraction(4) == 0.5


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(fraction, 1.0, 0.1) for fraction in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.02) and rates[10] == pytest.approx(1) and rates[-1] == pytest.approx(0)
    assert rates[55] == pytest.approx(0.5)


def test_the_average_follows_a_fixed_share_of_the_run():
    optimizer = Optimizer(weight_decay=0.0, gamma=9.0)
    state = optimizer.init({"x.kernel": jnp.zeros((2, 2))})
    assert all(leaf.committed for leaf in jax.tree.leaves(state))  # else the second call of a stage would compile anew
    apply = jax.jit(optimizer.apply)
    for _ in range(100):
        state, norm = apply(state, {"x.kernel": jnp.full((2, 2), -1.0)}, jnp.float32(1.0))
    # x rises by one a step, so the average lags by a tenth of the run, and a bit
    lag = float(jnp.mean(state.params["x.kernel"] - state.average["x.kernel"]))
    assert 7 < lag / float(jnp.mean(state.params["x.kernel"])) * 100 < 12 and float(norm) == 2.0


def test_muon_steps_of_matrices_are_orthogonal_and_as_large_as_asked():
    shapes = {
        "blocks.a.kernel": (2, 16, 64),
        "text.blocks.b.kernel": (3, 64, 16),
        "blocks.bias": (2, 8),
        "head.kernel": (16, 4),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    optimizer, adam = Optimizer(weight_decay=0.0, muon=2.0), Optimizer(weight_decay=0.0)
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    moved, plainly = (o.apply(o.init(zeros), gradients, jnp.float32(1.0))[0].params for o in (optimizer, adam))
    for name, gradient in gradients.items():
        if "blocks." not in name or gradient.ndim < 3:
            # AdamW with Nesterov's momentum, whose first step is longer.
            np.testing.assert_allclose(moved[name], plainly[name] * (1 + 0.09 / 0.19), rtol=1e-3)
            continue
        step = -np.asarray(moved[name])
        assert np.sqrt((step**2).mean()) == pytest.approx(2 * ADAM_RMS, rel=0.2)
        values = np.linalg.svd(step, compute_uv=False)
        assert values.max() / values.min() < 2  # those of the gradient, before: about 3
        u, _, vh = np.linalg.svd(np.asarray(gradient), full_matrices=False)
        nearest = u @ vh * np.sqrt((step**2).sum((1, 2), keepdims=True) / 16)
        assert np.linalg.norm(step - nearest) < 0.25 * np.linalg.norm(nearest)
