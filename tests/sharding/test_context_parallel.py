"""Attention on meshes of 8 virtual devices: the same result as on one, by no more communication than it takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smartdiff_jax.errors import InvalidConfig, Unsupported
from smartdiff_jax.kernels.base import QKV, Attend
from smartdiff_jax.kernels.sparse import BlockSize, SparseKernel, choose_blocks
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.models.modules import join_pieces, split_pieces
from smartdiff_jax.sharding.context_parallel import LocalAttend, MeshAttend, factorise, padded_length, wrap
from smartdiff_jax.sharding.mesh import AXES
from smartdiff_jax.sharding.ring import merge

SEQUENCE = ("ring", "ulysses")
HEADS, HEAD_DIM = 4, 8
local = LocalAttend(xla_attention)


def mesh_of(**axes: int) -> Mesh:
    shape = tuple(axes.get(axis, 1) for axis in AXES)
    return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), AXES)


def streams(tokens: int, text: int, batch: int = 2, heads: int = HEADS, dtype=jnp.float32) -> tuple[QKV, QKV]:
    draw = np.random.default_rng(tokens)

    def stream(length):
        return QKV(*(jnp.asarray(draw.normal(size=(batch, length, heads, HEAD_DIM)), dtype) for _ in range(3)))

    return stream(tokens), stream(text)


def compiled(function, **options):
    """jit without LLVM's optimisations, which take most of the time here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def attentions(attend, tokens, text, text_length):
    """The ways of attending that split anything."""
    return {
        "self": attend.self_attention(tokens),
        "cross": attend.cross_attention(tokens.q, text.k, text.v, text_length=text_length),
        "joint": attend.joint_attention(tokens, text, text_length=text_length),
    }


run = compiled(attentions, static_argnums=0)


def assert_close(ours, theirs, tolerance=1e-5):
    for (path, our), their in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert our.shape == their.shape and our.dtype == their.dtype
        our, their = np.asarray(our, np.float32), np.asarray(their, np.float32)
        assert np.max(np.abs(our - their)) <= tolerance, path


MESHES = {
    "ring 8": {"ring": 8},
    "ring 3": {"ring": 3},
    "ulysses 4": {"ulysses": 4},
    "ulysses 2 x ring 4": {"ulysses": 2, "ring": 4},
    "data 2 x ring 2 x ulysses 2": {"data": 2, "ring": 2, "ulysses": 2},
    "tensor 2 x ring 2": {"tensor": 2, "ring": 2},
    "tensor 2 x ulysses 2": {"tensor": 2, "ulysses": 2},
    "data 2": {"data": 2},
}
GATHERED = ("ring 3", "ulysses 2 x ring 4")
PRIME, TEXT, TEXT_LENGTH = 13, 5, np.array([5, 2], np.int32)


@pytest.mark.parametrize("name, ring", [(name, "permute") for name in MESHES] + [(name, "gather") for name in GATHERED])
def test_equals_one_device(name, ring):
    """A prime length, on which some devices hold nothing but padding, with text that is padded itself."""
    tokens, text = streams(PRIME, TEXT)
    attend = wrap(xla_attention, mesh_of(**MESHES[name]), ring=ring)
    assert_close(run(attend, tokens, text, TEXT_LENGTH), run(local, tokens, text, TEXT_LENGTH))


@pytest.mark.parametrize("length, text", [(16, 7), (2, 4)])
def test_joint_without_text_length(length, text):
    """Only the text is padded, or only the tokens, of which there may be fewer than devices."""
    tokens, text = streams(length, text)
    ours = compiled(wrap(xla_attention, mesh_of(ring=2, ulysses=2)).joint_attention)(tokens, text)
    assert_close(ours, compiled(local.joint_attention)(tokens, text))


def test_no_text_at_all():
    """A row without any text that counts is the picture among itself."""
    tokens, text = streams(PRIME, TEXT)
    joint = compiled(wrap(xla_attention, mesh_of(ring=2, ulysses=2)).joint_attention)
    out, _ = joint(tokens, text, text_length=np.array([0, TEXT], np.int32))
    assert_close(out[0], compiled(local.self_attention)(tokens)[0])


@pytest.mark.parametrize("ring", ["permute", None])
def test_padded_once_by_the_caller(ring):
    """`for_length` ignores what is behind the true length, whatever is there, and takes it traced: one executable."""
    mesh = mesh_of(ring=4)
    attend = local if ring is None else wrap(xla_attention, mesh, ring=ring)
    assert (padded_length(13, mesh), padded_length(16, mesh), padded_length(1, mesh)) == (16, 16, 4)

    @compiled
    def padded(tokens, text, text_length, num_tokens):
        return attentions(attend.for_length(num_tokens), tokens, text, text_length)

    tokens, text = streams(16, TEXT)
    for length in (13, 9):
        ours = padded(tokens, text, TEXT_LENGTH, jnp.int32(length))
        ours = jax.tree.map(lambda x, length=length: x[:, :length], ours)
        cut = jax.tree.map(lambda x, length=length: x[:, :length], tokens)
        assert_close(ours, run(local, cut, text, TEXT_LENGTH))
    assert padded._cache_size() == 1


SPARSE = SparseKernel(xla_attention, BlockSize(3, 4))


@pytest.mark.parametrize("name", ["ulysses 4", "tensor 2 x ulysses 2", "data 2"])
def test_heads_leave_out_the_same_keys_on_any_device(name):
    """Padded tokens, text that is padded or not; one program for every share; at 0 what attends without the choice."""
    tokens, text = streams(27, TEXT)  # whole blocks of queries: in no other way may padding be among the last
    plain = wrap(xla_attention, mesh_of(**MESHES[name]))

    def program(mesh):
        def ways(sparsity):
            attend = wrap(xla_attention, mesh, sparse=SPARSE).leaving_out(sparsity)
            return attentions(attend, tokens, text, jnp.asarray(TEXT_LENGTH)) | {
                "all text": attend.joint_attention(tokens, text)
            }

        return compiled(ways)

    on_one, on_mesh = program(mesh_of()), program(mesh_of(**MESHES[name]))
    one = on_one(0.5)
    assert_close(on_mesh(0.5), one)
    dense = run(plain, tokens, text, TEXT_LENGTH)
    for way in ("self", "cross", "joint"):
        np.testing.assert_array_equal(jax.tree.leaves(on_mesh(0.0)[way])[0], jax.tree.leaves(dense[way])[0])
    picture, words = (np.asarray(there - here) for there, here in zip(one["joint"], dense["joint"], strict=True))
    assert np.abs(one["self"] - dense["self"]).max() > 0.1 and np.abs(picture).max() > 0.1
    assert np.abs(words).max() < 1e-5 and np.abs(one["cross"] - dense["cross"]).max() < 1e-5  # the text attends to all
    assert on_mesh._cache_size() == 1


@pytest.mark.parametrize("axes", [dict(ring=4), dict(ulysses=4), dict(ring=2, ulysses=2), dict(tensor=2)], ids=str)
@pytest.mark.parametrize("num_tokens", [None, 29])
@pytest.mark.parametrize("length", [None, [8, 3]])
def test_one_stream_in_pieces_attends_as_two_do(axes, num_tokens, length):
    """Where lengths divide; what is padded counts for nobody, and its own outputs mean nothing."""
    tokens, text = streams(32, 8)
    attend = wrap(xla_attention, mesh_of(**axes))
    pieces = attend.pieces(32, 8)
    assert pieces == math.prod(axes.get(axis, 1) for axis in ("ring", "ulysses"))
    if pieces > 1:
        assert attend.pieces(33, 8) is attend.pieces(32, 9) is None
    if num_tokens is not None:
        attend = attend.for_length(num_tokens)
    length = None if length is None else jnp.array(length)

    @compiled
    def both(tokens, text):
        return as_one_stream(attend, tokens, text, length), attend.joint_attention(tokens, text, text_length=length)

    got, wanted = both(tokens, text)
    counted = slice(num_tokens)
    assert_close((got[0][:, counted], got[1]), (wanted[0][:, counted], wanted[1]))


def as_one_stream(attend, tokens, text, length):
    """Joint attention of 32 tokens and 8 of text, joined in pieces as the mesh has them."""
    pieces = attend.pieces(32, 8)

    def joined(x, y):
        return join_pieces(x.reshape(2, 32, -1), y.reshape(2, 8, -1), pieces).reshape(2, 40, *x.shape[2:])

    stream = QKV(*map(joined, tokens, text))
    out = attend.text_attention(stream, text_length=None if length is None else 32 + length, picture=32)
    apart = split_pieces(out.reshape(2, 40, -1), 32, 8, pieces)
    return tuple(x.reshape(*x.shape[:2], *out.shape[2:]) for x in apart)


@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_one_stream_leaves_out_what_two_do(ulysses):
    tokens, text = streams(32, 8)
    attend = wrap(xla_attention, mesh_of(ulysses=ulysses), sparse=SPARSE).leaving_out(jnp.float32(0.6))

    @compiled
    def both(tokens, text, length):
        return as_one_stream(attend, tokens, text, length), attend.joint_attention(tokens, text, text_length=length)

    for length in (None, jnp.array([8, 3])):
        assert_close(*both(tokens, text, length))
    assert_close(attend.text_attention(text), local.text_attention(text))
    if ulysses > 1:
        return
    stream = QKV(*(jnp.concatenate(pair, axis=1) for pair in zip(tokens, text, strict=True)))
    blocks = choose_blocks(stream.q, stream.k, jnp.float32(0.6), SPARSE.size, text_keys=32, text_queries=32)
    assert_close(xla_attention(*stream, blocks=blocks)[0], attend.text_attention(stream, picture=32))


def collectives(function, operands, expected) -> dict[str, int]:
    """How many of each kind one device runs; also checks the result."""
    executable = compiled(function).lower(*operands).compile()
    assert_close(executable(*operands), expected)
    kinds = ("all-to-all", "collective-permute", "all-gather", "all-reduce", "reduce-scatter", "collective-broadcast")
    counts = {kind: len(re.findall(rf"= .*\b{kind}(?:-start)?\(", executable.as_text())) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}


def placed(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


SELF = [
    ({"ulysses": 4}, "permute", {"all-to-all": 4}),
    ({"ring": 4}, "permute", {"collective-permute": 6}),
    ({"ring": 4}, "gather", {"all-gather": 2}),
    ({"ring": 2, "ulysses": 4}, "permute", {"all-to-all": 4, "collective-permute": 2}),
    ({"ring": 2, "ulysses": 2, "data": 2}, "gather", {"all-to-all": 4, "all-gather": 2}),
    ({"tensor": 2, "ring": 2}, "permute", {"collective-permute": 2}),
    ({"ring": 2, "ulysses": 2}, None, {"all-to-all": 4, "all-gather": 2}),
    ({"ring": 4}, None, {"collective-permute": 6}),
    ({"tensor": 2, "data": 2}, "permute", {}),
]


@pytest.mark.parametrize("axes, ring, expected", SELF, ids=str)
def test_self_attention_communicates_as_said(axes, ring, expected):
    mesh = mesh_of(**axes)
    attend = wrap(xla_attention, mesh, ring=ring)
    tokens, _ = streams(16, 8)
    theirs = compiled(local.self_attention)(tokens)
    tokens = placed(mesh, tokens, "data", SEQUENCE, "tensor")
    assert collectives(attend.self_attention, (tokens,), theirs) == expected


def test_masks_communicate_nothing():
    mesh = mesh_of(ring=2, ulysses=2)
    attend, same = wrap(xla_attention, mesh, ring="permute").for_length(13), local.for_length(13)
    tokens, text = streams(16, 8)
    operands = placed(mesh, tokens, None, SEQUENCE), placed(mesh, text), TEXT_LENGTH

    def joint(attend):
        return lambda tokens, text, text_length: attend.joint_attention(tokens, text, text_length=text_length)

    counts = collectives(joint(attend), operands, compiled(joint(same))(tokens, text, TEXT_LENGTH))
    assert counts == {"all-to-all": 4, "collective-permute": 2}


@pytest.mark.parametrize("text_mode", ["replicated", "split"])
def test_text_travels_with_the_tokens(text_mode):
    """Joint attention communicates as often as self-attention, but for handing out the text's part."""
    mesh = mesh_of(ring=2, ulysses=2)
    attend = wrap(xla_attention, mesh, ring="permute", text=text_mode)
    tokens, text = streams(16, 8)
    theirs = compiled(local.joint_attention)(tokens, text)
    split, whole = P(None, SEQUENCE), P()
    operands = placed(mesh, tokens, *split), placed(mesh, text, *(split if text_mode == "split" else whole))
    handed_out = {"all-gather": 1} if text_mode == "replicated" else {}
    expected = {"all-to-all": 4, "collective-permute": 2} | handed_out
    assert collectives(attend.joint_attention, operands, theirs) == expected


def test_work_on_the_text_is_divided():
    """A stream of text that comes in whole is multiplied in pieces, without a message, where it divides evenly."""
    mesh = mesh_of(ring=2, ulysses=2)
    tokens, text = streams(16, 8)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(HEAD_DIM, 3 * HEAD_DIM)) / 3, jnp.float32)

    def blocks(attend, tokens, text):
        def block(text, _):
            stream = QKV(*jnp.split(text @ kernel, 3, axis=-1))
            return attend.joint_attention(tokens, stream)[1], None

        return jax.lax.scan(block, text, length=3)[0]

    def run(tokens, text):
        return blocks(wrap(xla_attention, mesh, ring="permute"), tokens, text)

    theirs = compiled(blocks, static_argnums=0)(local, tokens, text.q)
    operands = placed(mesh, tokens, None, SEQUENCE), placed(mesh, text.q)
    assert collectives(run, operands, theirs) == {"all-to-all": 4, "collective-permute": 2}
    program = compiled(run).lower(*operands).compile().as_text()
    sizes = {tuple(map(int, found.split(","))) for found in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program)}
    assert 2 * (8 // 4) * HEADS * 24 in map(np.prod, sizes) and 2 * 8 * HEADS * 24 not in map(np.prod, sizes)


@pytest.mark.parametrize("axes", [{"ring": 2, "ulysses": 2}, {"tensor": 2, "data": 2}], ids=str)
def test_whole_text_communicates_nothing(axes):
    mesh = mesh_of(**axes)
    tokens, text = streams(16, 8)

    def attention(attend):
        return lambda q, text, text_length: (
            attend.cross_attention(q, text.k, text.v, text_length=text_length),
            attend.text_attention(text, text_length=text_length),
        )

    theirs = compiled(attention(local))(tokens.q, text, TEXT_LENGTH)
    q, text = placed(mesh, tokens.q, "data", SEQUENCE, "tensor"), placed(mesh, text, "data", None, "tensor")
    operands = q, text, placed(mesh, TEXT_LENGTH, "data")
    assert collectives(attention(wrap(xla_attention, mesh)), operands, theirs) == {}


@pytest.mark.parametrize("text_mode", ["replicated", "split"])
def test_outputs_lie_as_declared(text_mode):
    mesh = mesh_of(data=2, ring=2)
    tokens, text = streams(16, 8)
    out = run(wrap(xla_attention, mesh, text=text_mode), tokens, text, TEXT_LENGTH)
    split, whole = NamedSharding(mesh, P("data", SEQUENCE)), NamedSharding(mesh, P("data"))
    expected = {"self": split, "cross": split, "joint": (split, split if text_mode == "split" else whole)}
    for x, sharding in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert_close(out, run(local, tokens, text, TEXT_LENGTH))


def test_inside_a_conditional_in_a_loop():
    """As the denoise loop runs it: some steps skipped, the predicate computed from the split array itself."""
    tokens, _ = streams(PRIME, TEXT)

    def steps(attend: Attend, x, count):
        def step(index, x):
            skip = (index % 2 == 1) & (jnp.sum(x) < jnp.inf)
            return jax.lax.cond(skip, lambda x: x, lambda x: attend.self_attention(QKV(x, x, x)), x)

        return jax.lax.fori_loop(0, count, step, x)

    attend = wrap(xla_attention, mesh_of(ring=2, ulysses=2, data=2))
    loop = compiled(steps, static_argnums=0)
    for count in (4, 3):
        assert_close(loop(attend, tokens.q, jnp.int32(count)), loop(local, tokens.q, jnp.int32(count)))
    assert loop._cache_size() == 2


def test_one_executable_for_one_shape():
    mesh, traced = mesh_of(ring=2, ulysses=2), []
    tokens = placed(mesh, streams(16, 8)[0], None, SEQUENCE)

    @jax.jit
    def run(tokens):
        traced.append(tokens)
        out = wrap(xla_attention, mesh).self_attention(tokens)
        return QKV(out, out, out)

    run(run(tokens))
    run(tokens)
    assert len(traced) == run._cache_size() == 1
    assert wrap(xla_attention, mesh) is wrap(xla_attention, mesh_of(ring=2, ulysses=2))


@pytest.mark.parametrize("nested", [True, False])
def test_branches_of_guidance_on_their_own_axis(nested):
    """CFG-parallel either way: a shard_map over "cfg" around the model, or the branches as a batch split over it."""
    mesh = mesh_of(cfg=2, ring=2, ulysses=2)
    operands = (*streams(PRIME, TEXT), TEXT_LENGTH)
    if nested:
        attend = wrap(xla_attention, mesh)

        def branches(*operands):
            return jax.shard_map(
                lambda *operands: attentions(attend, *operands),
                mesh=mesh,
                in_specs=P("cfg"),
                out_specs=P("cfg"),
                axis_names=frozenset({"cfg"}),
                check_vma=False,
            )(*operands)

        ours = compiled(branches)(*operands)
    else:
        ours = run(wrap(xla_attention, mesh, batch=("cfg", "data")), *operands)
    assert_close(ours, run(local, *operands))


def test_bfloat16_merges_in_float32():
    tokens, text = streams(PRIME, TEXT, dtype=jnp.bfloat16)
    ours = compiled(wrap(xla_attention, mesh_of(ring=2)).joint_attention)(tokens, text)
    exact = compiled(local.joint_attention)(*jax.tree.map(lambda x: x.astype(jnp.float32), (tokens, text)))
    for our, their in zip(ours, exact, strict=True):
        assert our.dtype == jnp.bfloat16
        assert np.linalg.norm(our.astype(jnp.float32) - their) <= 1e-2 * np.linalg.norm(their)


def test_merge_of_empty_and_far_apart_parts():
    draw = np.random.default_rng(0)
    parts = [jnp.asarray(draw.normal(size=(1, 3, 2, 4)), jnp.float32) for _ in range(2)]
    lse, empty = jnp.full((1, 2, 3), 2.0), jnp.full((1, 2, 3), -jnp.inf)

    def check(ours, out, lse):
        np.testing.assert_allclose(ours[0], out, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[1], lse, rtol=1e-6)

    merged = jax.jit(merge)
    check(merged(parts[0], lse, parts[1], empty), parts[0], lse)
    check(merged(parts[0], empty, parts[1], lse), parts[1], lse)
    check(merged(parts[0], empty, parts[1], empty), parts[0], empty)
    check(merged(parts[0], lse - 500, parts[1], lse + 500), parts[1], lse + 500)
    check(merged(parts[0], lse, parts[1], lse), (parts[0] + parts[1]) / 2, lse + np.log(2))


def without_lse(q, k, v, *, kv_length=None, scale=None, with_lse=False):
    if with_lse:
        raise Unsupported("no log-sum-exp")
    return xla_attention(q, k, v, kv_length=kv_length, scale=scale)


def test_kernels_without_log_sum_exp():
    """They serve every mode but the ring of permutes, which says so while tracing."""
    tokens, _ = streams(PRIME, TEXT)
    mesh = mesh_of(ring=2, ulysses=2)
    with pytest.raises(Unsupported, match="no log-sum-exp"):
        jax.eval_shape(wrap(without_lse, mesh, ring="permute").self_attention, tokens)
    with pytest.raises(Unsupported, match="no log-sum-exp"):
        jax.eval_shape(wrap(without_lse, mesh_of(ring=3)).self_attention, tokens)
    jax.eval_shape(wrap(without_lse, mesh_of(ring=3), ring="gather").self_attention, tokens)
    jax.eval_shape(wrap(without_lse, mesh).self_attention, tokens)
    jax.eval_shape(wrap(without_lse, mesh_of(ulysses=4)).self_attention, tokens)


def test_factorisations():
    assert factorise(8, 12) == [(2, 4), (4, 2), (8, 1)]  # Wan2.1-1.3B
    assert factorise(8, 40) == [(1, 8), (2, 4), (4, 2), (8, 1)]  # Wan2.1-14B
    assert factorise(8, 30) == [(4, 2), (8, 1)]  # Z-Image
    assert factorise(6, 12) == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert factorise(1, 12) == [(1, 1)]


def test_heads_or_batch_that_do_not_divide():
    tokens, text = streams(16, 8, heads=12)
    attend = wrap(xla_attention, mesh_of(ulysses=8))
    with pytest.raises(
        InvalidConfig, match=r"mesh\.ulysses=8: .* 12 heads; use ring=2 ulysses=4 or ring=4 ulysses=2 or ring=8"
    ):
        jax.eval_shape(attend.self_attention, tokens)
    with pytest.raises(InvalidConfig, match=r"12 heads over tensor=4; use ring=2 ulysses=1"):
        jax.eval_shape(wrap(xla_attention, mesh_of(tensor=4, ulysses=2)).joint_attention, tokens, text)
    with pytest.raises(InvalidConfig, match=r"mesh\.tensor=8: must divide the 12 heads"):
        jax.eval_shape(wrap(xla_attention, mesh_of(tensor=8)).text_attention, text)
    with pytest.raises(InvalidConfig, match=r"mesh\.data=4: must divide the 2 outputs"):
        jax.eval_shape(wrap(xla_attention, mesh_of(data=4)).self_attention, tokens)
    # The text is whole everywhere: cross-attention asks nothing of the heads.
    jax.eval_shape(attend.cross_attention, tokens.q, text.k, text.v)


def test_one_device_is_the_kernel_itself():
    assert isinstance(wrap(xla_attention, mesh_of()), LocalAttend)
    assert isinstance(wrap(xla_attention, mesh_of(data=2)), MeshAttend)
    assert isinstance(wrap(xla_attention, mesh_of(ring=2)), Attend)
