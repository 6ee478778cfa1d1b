"""Token-selective caching: what chosen tokens are computed from, which ones are chosen, what a ratio buys, and meshes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import load_golden, relative_error
from loops import Tiny, as_string, toy_stacks
from test_budget import outlook, worth
from test_pab import FAMILIES, _embedded

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.base import Step
from smartdiff_jax.cache.params import MAX_STEPS
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.models.tokens import ChosenTokens
from smartdiff_jax.samplers.flow_euler import FlowEuler
from smartdiff_jax.sharding.context_parallel import LocalAttend
from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.stages import cache_memory
from smartdiff_jax.stages.denoise import DenoiseLoop, _Stack

STEPS = 14


def create(num_steps=STEPS, **params):
    return POLICIES["tokencache"].create(num_steps, {}, **params)


def stack_of(name):
    """Of a golden's tiny model, at one evaluation."""
    if name in FAMILIES:
        module = FAMILIES[name][0]
        _, config, model = load_golden(name, module.ARCHITECTURE)
        return _Stack(model, LocalAttend(xla_attention), *_embedded(module, config, model), 1)
    tiny = Tiny.load(name)
    model = nnx.merge(tiny.loop._graphdef, tiny.weights)
    one = jax.tree.map(lambda leaf: leaf[0], tiny.branches)
    hidden, context = model.embed(tiny.tokens, jnp.float32(700), one)
    return _Stack(model, LocalAttend(xla_attention), hidden, context, 1)


@pytest.mark.parametrize("name", ["cache_wan", "cache_flux1", *FAMILIES])
def test_chosen_tokens_come_out_as_among_all_where_the_others_keys_are_new(name):
    """The text with them. From keys of another moment they come out otherwise, and their own are replaced."""
    stack = stack_of(name)

    def run():
        nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), stack.keys())
        out, keys = stack.run_tokens(nothing)
        picture = out[0] if isinstance(out, tuple) else out
        chosen = stack.choose(jax.random.normal(jax.random.key(1), (*picture.shape[:2], 1)), 0.5)
        rows, after = stack.run_tokens(keys, chosen)
        other = jax.tree.map(lambda leaf: 1.5 * leaf, keys)
        return stack.run(stack.hidden, 0, stack.num_blocks), out, chosen, rows, keys, after, stack.run_tokens(other, chosen)

    plain, out, chosen, rows, keys, after, (other_rows, other_keys) = jax.jit(run)()
    for whole, mine in zip(*map(jax.tree.leaves, (plain, out)), strict=True):
        assert relative_error(mine, whole) < 1e-6
    for few, whole in zip(*map(jax.tree.leaves, (rows, chosen.pick(out))), strict=True):
        assert relative_error(few, whole) < 1e-5
    for new, old, other in zip(*map(jax.tree.leaves, (after, keys, other_keys)), strict=True):
        assert relative_error(new, old) < 1e-5
        mask = np.zeros(new.shape[2], bool)
        mask[np.asarray(chosen.index)[0, 0]] = True
        np.testing.assert_allclose(other[0][:, ~mask], 1.5 * old[0][:, ~mask], rtol=1e-6)
    # The first block's own depend on no other's.
    assert relative_error(jax.tree.leaves(other_keys)[0][0][:, mask], jax.tree.leaves(keys)[0][0][:, mask]) < 1e-5
    assert relative_error(*(jax.tree.leaves(which)[0] for which in (other_rows, rows))) > 1e-3


def run_of(policy, stacks, num_steps, num_branches=1, weights=None):
    """A run whose blocks look at one token alone and whose velocity is what leaves them: (velocities, letters)."""

    def at(index):
        return jax.tree.map(lambda leaf: leaf[index], stacks)

    @jax.jit
    def run():
        def one_branch():
            memory = policy.init_stack(at(0))
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_branches, *leaf.shape)), memory)

        def body(index, carry):
            state, memory, outs, executed = carry
            step = Step(index, jnp.int32(num_steps), jnp.zeros(MAX_STEPS + 1), jnp.float32(0), jnp.bool_(False), weights)

            def evaluate(memory, /, stand_in=None):
                own = [jax.tree.map(lambda leaf: leaf[branch], memory) for branch in range(num_branches)]  # noqa: B023
                found = [policy.blocks(branch, step, at(index)) for branch in own]
                outs, memories, shares = zip(*found, strict=True)
                memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *memories)
                return outs[0], jnp.stack(outs), memory, jnp.stack(shares)

            velocity, state, memory, computed = policy.step(state, memory, step, at(index).hidden, evaluate, num_branches)
            return state, memory, outs.at[index].set(velocity), executed.at[index].set(computed[0])

        outs = jnp.zeros((num_steps, *stacks.hidden.shape[1:]))
        carry = policy.init_step(stacks.hidden[0]), one_branch(), outs, jnp.zeros(num_steps)
        return jax.lax.fori_loop(0, num_steps, body, carry)[2:]

    outs, executed = run()
    return np.asarray(outs), as_string(executed)


def wide(batch=2, seed=3):
    """Stacks of 12 tokens, some of which change much faster than others."""
    stacks = toy_stacks(seed, batch=batch, num_blocks=2)
    speeds = np.random.RandomState(seed).permutation(np.geomspace(0.5, 1.6, 12))[:, None]
    hidden = jnp.concatenate([stacks.hidden, stacks.hidden[:, :, ::-1], stacks.hidden[:, :, :2]], 2) * speeds
    parts = jnp.concatenate([stacks.parts, stacks.parts[:, :, :, ::-1], stacks.parts[:, :, :, :2]], 3) * speeds
    return dataclasses.replace(stacks, hidden=hidden, parts=parts)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_chosen_by_speed_and_age(padded):
    """The rule once more in NumPy; tokens that look at no other are computed exactly, others hold what was added last."""
    stacks, policy, steps = wide(), create(30, interval=6, quarters=2, warmup=2), 30
    weights = jnp.asarray([1.0] * 10 + [0.0] * 2) if padded else None
    outs, letters = run_of(policy, stacks, steps, weights=weights)
    assert letters == "FF2222" + "F22222" * 3 + "F2222F"
    added, hidden = (np.asarray(x, np.float64) for x in (stacks.parts.sum(axis=1), stacks.hidden))
    held, last = np.zeros_like(hidden[0]), np.zeros_like(hidden[0])
    age, speed = np.zeros((2, 12)), np.zeros((2, 12))
    chosen_by_token = np.zeros(12)
    for i in range(steps):
        age += 1
        priority = np.maximum(speed, 1e-12) * age
        if padded:
            priority[:, 10:] = -1.0
        for sample in range(2):
            rows = np.arange(12) if letters[i] == "F" else np.argsort(-priority[sample], kind="stable")[:6]
            held[sample, rows] = added[i, sample, rows]
            expected = hidden[i, sample] + held[sample]
            speed[sample, rows] = np.linalg.norm(expected - last[sample], axis=-1)[rows] / age[sample, rows]
            last[sample, rows], age[sample, rows] = expected[rows], 0
            np.testing.assert_allclose(outs[i, sample], expected, rtol=1e-4, atol=1e-4)
            chosen_by_token[rows] += letters[i] != "F"
    # Fast ones more often, slow ones too, and padding only where there is nothing else.
    assert chosen_by_token.max() > 2 * chosen_by_token[:10].min() > 0
    assert not padded or chosen_by_token[10:].max() == 0


def test_branches_choose_the_same_tokens():
    tiny = Tiny.load("cache_wan")
    policy = create(quarters=1, interval=9)
    like = tiny.weights, tiny.tokens, tiny.branches, policy, FlowEuler()
    start, run = tiny.loop.functions(*like)
    rest = tiny.branches, tiny.schedule(), np.full(200, 3.0, np.float32), policy, FlowEuler()
    carry = run(tiny.weights, start(*like), *rest, np.int32(0), np.int32(8), np.int32(0), None)
    memory = carry.cache_state[0]
    assert len(np.unique(memory.age[0])) > 2 and np.array_equal(*memory.age) and np.array_equal(*memory.speed)


@pytest.mark.parametrize(
    "steps, ratio, restarts", [(50, 0.5, ()), (50, 0.3, (20,)), (50, 0.8, ()), (31, 0.05, ()), (9, 0.67, ())]
)
def test_a_ratio_is_a_budget_of_tokens(steps, ratio, restarts):
    policy, notes = create(steps).within(outlook(steps, ratio, restarts))
    mask, quarters = np.asarray(policy.guards.mask)[:steps], np.asarray(policy.quarters)[:steps]
    letters = "".join("F" if whole == 1 else ".123"[some] for whole, some in zip(mask, quarters, strict=True))
    assert worth(letters) == outlook(steps, ratio).budget and letters[0] == "F"
    assert all(letters[restart] == "F" for restart in restarts) and "quarters" in notes[0]
    some = [int(letter) for letter in letters.replace("F", "").replace(".", "0")]
    assert max(some) - min(some) <= 1 and sum(some) > 0
    assert max(map(len, re.findall(r"[^F]+", letters))) <= 2 * np.ceil(steps / letters.count("F"))


def test_a_ratio_that_cannot_be_kept_names_itself():
    with pytest.raises(InvalidRequest, match="cache_ratio=0.5: from 30 to 50 of 50 .*give 0.0 to 0.4"):
        create(50, warmup=30).within(outlook(50, 0.5, given=["warmup"]))
    with pytest.raises(InvalidRequest, match="cache_params.quarters=5"):
        create(quarters=5)


MESHES = [
    ("cache_wan", "batched", MeshConfig(cfg=2, ring=2, ulysses=2)),
    ("cache_flux1", "sequential", MeshConfig(ring=2, ulysses=2)),
]


class Quartered(Layout):
    """Of one device, that chooses as four do."""

    @property
    def shards(self):
        return 4


@pytest.mark.parametrize("name, guidance, config", MESHES)
def test_every_device_chooses_among_its_own_tokens(name, guidance, config):
    policy = create(warmup=2, interval=20, quarters=2)
    mesh, one = Tiny.load(name, guidance, config), Tiny.load(name, guidance)
    assert mesh.num_tokens is not None  # 18 and 15 tokens are padded
    here = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (mesh.tokens, mesh.branches))
    old = one.loop
    layout = Quartered(old._layout.mesh)
    loop = DenoiseLoop(old._graphdef, old._attend, old._guidance, old._combine, jnp.float32, layout)
    one = Tiny(**vars(one) | {"loop": loop, "tokens": here[0], "branches": here[1]})
    (tokens, letters), (expected, alone) = mesh(policy), one(policy)
    assert letters == alone and letters[0] == "FF" + "2" * 11 + "F"
    assert relative_error(tokens, expected) < 1e-5

    like = mesh.weights, mesh.tokens, mesh.branches, policy, FlowEuler()
    start, _ = mesh.loop.functions(*like)
    carry = start(*like)
    keys = jax.tree.leaves(carry.cache_state[0].keys)
    size = mesh.tokens.shape[1]
    assert keys and all(leaf.sharding.shard_shape(leaf.shape)[-2] == size // 4 for leaf in keys)
    # Of the picture keys and values alone are gathered, of one head a device; FLUX.1's text is, padded to 8 rows.
    leaves, structure = jax.tree.flatten(carry)
    rest = mesh.branches, mesh.schedule(), jnp.ones(200), policy, FlowEuler()
    steps = jnp.int32(0), jnp.int32(9), jnp.int32(0), jnp.int32(mesh.num_tokens)
    run = jax.jit(
        lambda weights, leaves: jax.tree.leaves(mesh.loop._run(weights, jax.tree.unflatten(structure, leaves), *rest, *steps)),
        out_shardings=[leaf.sharding for leaf in leaves],
    )
    found = re.findall(r"\[([\d,]*)\]\S* all-gather\(", run.lower(mesh.weights, leaves).compile().as_text())
    gathered = [shape for shape in (shape.split(",") for shape in found) if shape[-2] != "1"]
    assert all("8" in shape for shape in gathered) and bool(gathered) == (name == "cache_flux1")


def test_more_than_a_device_has_is_refused(monkeypatch):
    tiny = Tiny.load("cache_wan")
    # Of two branches keys and values of four blocks, and what they add; four bytes a number.
    held = 2 * (2 * 4 + 1) * (18 * 24) * 4
    monkeypatch.setattr(cache_memory, "free_bytes", lambda mesh: held)
    with pytest.raises(InvalidRequest, match="cache='tokencache': .* GB to remember"):
        tiny.loop.functions(tiny.weights, tiny.tokens, tiny.branches, create(), FlowEuler())
    monkeypatch.setattr(cache_memory, "free_bytes", lambda mesh: held + 20_000)
    tiny.loop.functions(tiny.weights, tiny.tokens, tiny.branches, create(), FlowEuler())


def test_rows_of_every_shard():
    """Half of each of three parts, the highest first among equals, and back in their places."""
    priority = jnp.asarray([[3.0, 1, 2, 4, 0, 0, 0, 0, 1, 9, 9, 2]])[..., None]
    chosen = ChosenTokens.of(priority, 0.5, 3)
    assert chosen.index.tolist() == [[[0, 3], [0, 1], [1, 2]]]
    rows = chosen.pick(priority)
    assert rows[0, :, 0].tolist() == [3, 4, 0, 0, 9, 9]
    assert chosen.put(priority, rows + 10)[0, :, 0].tolist() == [13, 1, 2, 14, 10, 10, 0, 0, 1, 19, 19, 2]
    assert ChosenTokens.of(priority, 0.1, 3).index.shape == (1, 3, 1)  # at least one
