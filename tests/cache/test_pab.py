"""PAB: what is inside its conditionals, which modules models have, meshes, and what it says where memory is short."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import load_golden, relative_error
from loops import Tiny

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.models import flux2, qwen_image, z_image
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.models.modules import HeldModules, module_shapes
from smartdiff_jax.samplers.flow_euler import FlowEuler
from smartdiff_jax.sharding.context_parallel import LocalAttend
from smartdiff_jax.stages import cache_memory

STEPS = 14
ALWAYS = dict(min_timestep=0, max_timestep=1000)


def create(**params):
    return POLICIES["pab"].create(STEPS, {}, **params)


@pytest.fixture(scope="module")
def tiny():
    return Tiny.load("cache_wan", "batched")


def test_projections_and_kernel_are_inside_the_conditionals(tiny):
    """A held module reads its memory and does nothing else; no attention is left outside."""
    policy = create()
    carry = tiny.loop._start(tiny.weights, tiny.tokens, tiny.branches, policy, FlowEuler())
    arguments = tiny.branches, tiny.schedule(), jnp.ones(200), policy, FlowEuler(), jnp.int32(0), jnp.int32(9), jnp.int32(0)
    jaxpr = jax.make_jaxpr(lambda: tiny.loop._run(tiny.weights, carry, *arguments))()
    conditionals, outside = [], []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "cond":
                conditionals.append([_products(branch.jaxpr) for branch in eqn.params["branches"]])
                continue
            outside.append(eqn.primitive.name)
            for inner in _inner(eqn):
                walk(inner)

    walk(jaxpr.jaxpr)
    # Queries, keys, values, output, and the two products of the kernel.
    assert conditionals == [[0, 6], [0, 6]]
    # Time, text, the feed-forward, and the two ends of the model; what modulates is a sum.
    assert outside.count("dot_general") == 8


def _products(jaxpr):
    inner = sum(_products(found) for eqn in jaxpr.eqns for found in _inner(eqn))
    return inner + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


def _inner(eqn):
    values = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [getattr(value, "jaxpr", value) for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


# Wan and FLUX.1 run through the seam in the loop, against diffusers (test_block_parity.py).
FAMILIES = {
    "flux2_klein": (flux2, [{"joint_attention"}, {"joint_attention"}]),
    "qwen_image_narrow": (qwen_image, [{"joint_attention"}]),
    "z_image_narrow": (z_image, [{"joint_attention", "text_attention"}, {"joint_attention"}]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_modules_of_every_family(name):
    module, names = FAMILIES[name]
    _, config, model = load_golden(name, module.ARCHITECTURE)
    everything, _, shapes = _run_of(module, config, model)
    assert [set(of_scan) for of_scan in shapes] == names
    for leaf in jax.tree.leaves(shapes):
        # Picture, filling, caption, both of the text, and the single stream of all: FLUX.2's and Z-Image's.
        assert leaf.shape[1] == 1 and leaf.shape[2] in (15, 17, 32, 49, 47, 64) and leaf.ndim == 4


def test_a_model_of_two_kinds_of_blocks_runs_the_same_from_what_its_modules_gave():
    """Modules that are computed, and modules that are held, on the inputs they were computed from."""
    _, config, model = load_golden("z_image_narrow", z_image.ARCHITECTURE)
    everything, attend, shapes = _run_of(z_image, config, model)

    def twice():
        nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)
        computed = HeldModules(attend, lambda name, held, compute: compute(), nothing)
        out = everything(attend=computed)
        held = HeldModules(attend, lambda name, held, compute: held, computed.after)
        return out, everything(attend=held), computed.after, held.after

    out, again, after, after_again = jax.jit(twice)()
    for stream, held in zip(*map(jax.tree.leaves, (out, again)), strict=True):
        assert np.isfinite(stream).all() and relative_error(held, stream) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, after, after_again)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


def _run_of(module, config, model):
    """All blocks of a model as a function of an `Attend`, an ordinary one, and the shapes of what its modules give."""
    hidden, context = _embedded(module, config, model)
    everything = functools.partial(model.run_blocks, hidden, context, lo=0, hi=model.num_blocks)
    attend = LocalAttend(xla_attention)
    return everything, attend, module_shapes(lambda attend: everything(attend=attend), attend)


def _embedded(module, config, model):
    rng, grid, num_text = np.random.RandomState(0), (1, 3, 5), 32
    rope, text_rope = module.rope(config, grid, num_text, 7)
    fields = config.model_dump()
    width = next(fields[key] for key in ("text_dim", "joint_attention_dim", "cap_feat_dim") if key in fields)
    embedding = getattr(model, "patch_embedding", None) or model.token_embedding

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    conditioning = Conditioning(
        text=draw(1, num_text, width),
        rope=jax.tree.map(lambda table: jnp.asarray(table)[None], rope),
        text_rope=jax.tree.map(lambda table: jnp.asarray(table)[None], text_rope),
        text_length=jnp.asarray([7]),
        pooled=draw(1, fields["pooled_projection_dim"]) if fields.get("pooled_projection_dim") else None,
        guidance=jnp.asarray([3.5]) if fields.get("guidance_embeds") else None,
    )
    return model.embed(draw(1, 15, embedding.kernel.shape[0]), jnp.float32(700), conditioning)


def test_either_kind_of_attention_keeps_its_own_counters(tiny):
    """A limit of two skips in a row shortens the long interval of cross-attention and leaves that of self-attention alone."""
    limited, _ = tiny(create(**ALWAYS, self_interval=2, cross_interval=9, max_skips_in_row=2))
    alike, _ = tiny(create(**ALWAYS, self_interval=2, cross_interval=3))
    other, _ = tiny(create(**ALWAYS, self_interval=2, cross_interval=9))
    # Step 9 falls on the long interval and is the limit's as well.
    assert np.array_equal(limited, alike) and not np.array_equal(other, alike)


def test_held_attention_is_split_over_the_mesh_as_the_tokens_are(tiny):
    mesh = Tiny.load("cache_wan", "batched", MeshConfig(cfg=2, ring=2, ulysses=2))
    policy = create(**ALWAYS, self_interval=3, cross_interval=2)
    (here, expected), (there, found) = tiny(policy), mesh(policy)
    assert found == expected and "." in found[0]
    assert relative_error(there, here) < 1e-4
    start, _ = mesh.loop.functions(mesh.weights, mesh.tokens, mesh.branches, policy, FlowEuler())
    held = start(mesh.weights, mesh.tokens, mesh.branches, policy, FlowEuler()).cache_state[0].held
    for leaf in jax.tree.leaves(held):
        # 18 tokens are padded to 16 for each half of the ring.
        assert leaf.shape[-3:] == (2, 32, 24) and leaf.sharding.shard_shape(leaf.shape)[-3:] == (1, 8, 24)


def test_more_than_a_device_has_is_refused(tiny, monkeypatch):
    arrays = tiny.weights, tiny.tokens, tiny.branches
    policy, held = create(max_skips=3), 2 * 4 * (2 * 18 * 24) * 4
    fresh = Tiny(**vars(tiny) | {"loop": _like(tiny.loop)})
    monkeypatch.setattr(cache_memory, "free_bytes", lambda mesh: held)
    with pytest.raises(InvalidRequest, match="cache='pab': .* GB to remember, and .* GB are free; .*mesh.ring.*fbcache"):
        fresh.loop.functions(*arrays, policy, FlowEuler())
    fresh.loop.functions(*arrays, POLICIES["fbcache"].create(STEPS, {}), FlowEuler())
    # What else is carried are the latents and the list of computed steps.
    monkeypatch.setattr(cache_memory, "free_bytes", lambda mesh: held + 10_000)
    fresh.loop.functions(*arrays, policy, FlowEuler())


def _like(loop):
    return type(loop)(loop._graphdef, loop._attend, loop._guidance, loop._combine, loop._dtype, loop._layout)
