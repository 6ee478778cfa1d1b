"""Plans: counts against diffusers and transformers, bytes by hand and as collectives really send them, times as measured."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from smartdiff_jax.config.request import MAX_SIDE
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.engine.planning import outline, workload
from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.kernels import ATTENTION
from smartdiff_jax.kernels.base import QKV
from smartdiff_jax.kernels.hopper import ROWS
from smartdiff_jax.sharding import traffic
from smartdiff_jax.sharding.context_parallel import wrap
from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.sharding.plan import CARD_GB, GB, activation_bytes, gathered_bytes, meshes, name_of, plan_mesh, propose
from smartdiff_jax.sharding.rates import HOPPER
from smartdiff_jax.sharding.weights import weight_sharding
from smartdiff_jax.sharding.workload import Attention, Parameter, Workload, tokens_per_device

# Parameters as diffusers 0.42.1 and transformers 5.23 count them on the meta device.
T5, CLIP, UMT5, QWEN3, QWEN25 = 4_762_310_656, 123_060_480, 5_680_910_336, 4_022_468_096, 7_070_619_136
FLUX_VAE, WAN_VAE, WAN_14B, Z_IMAGE = 83_819_683, 126_892_531, 14_288_491_584, 6_154_908_736
# model: (size, tokens, {component: parameters})
ORACLE = {
    "flux1-dev": ("1024x1024", 4096, dict(transformer=11_901_408_320, text_encoder=CLIP, text_encoder_2=T5, vae=FLUX_VAE)),
    "flux1-schnell": ("1360x768", 4080, dict(transformer=11_891_178_560, text_encoder=CLIP, text_encoder_2=T5, vae=FLUX_VAE)),
    # The running statistics of the VAE's batch norm, mean and variance of 128 features, are buffers upstream.
    "flux2-klein-4b": ("1024x1024", 4096, dict(transformer=3_875_544_576, text_encoder=QWEN3, vae=84_046_115 + 256)),
    "qwen-image": ("1328x1328", 6889, dict(transformer=20_430_401_088, text_encoder=QWEN25, vae=WAN_VAE)),
    "wan2.1-t2v-1.3b": ("832x480x81", 32760, dict(transformer=1_418_996_800, text_encoder=UMT5, vae=WAN_VAE)),
    "wan2.1-t2v-14b": ("1280x720x81", 75600, dict(transformer=WAN_14B, text_encoder=UMT5, vae=WAN_VAE)),
    "wan2.2-t2v-a14b": (None, 75600, dict(transformer=WAN_14B, transformer_2=WAN_14B, text_encoder=UMT5, vae=WAN_VAE)),
    "z-image": ("1024x1024", 4096, dict(transformer=Z_IMAGE, text_encoder=QWEN3, vae=FLUX_VAE)),
    "z-image-turbo": ("1024x1024", 4096, dict(transformer=Z_IMAGE, text_encoder=QWEN3, vae=FLUX_VAE)),
}


@functools.cache
def work_of(model: str) -> Workload:
    return workload(outline(model), ORACLE[model][0])


def tiny(attention, *, tokens=30, text=0, parameters=(), itemsize=2, **fields) -> Workload:
    leaves = tuple(Parameter(path, shape, itemsize) for path, shape in parameters)
    defaults = dict(
        model="tiny", tokens=tokens, features=16, latent_shape=(1, 4, 1, 8, 8), text=text, width=48, inner=96, num_blocks=3,
        num_heads=attention[0].heads, guided=True, branches=2, itemsize=itemsize, attention=attention, matmul_per_token=1e6,
        matmul_fixed=1e6, read=0, parameters={"transformer": leaves}, decoder=8000,
        placement=lambda component, mesh, config: weight_sharding(mesh, fsdp=config.fsdp),
    )  # fmt: skip
    return Workload(**(defaults | fields))


SELF = Attention("self", count=3, text=0, heads=12, head_dim=4)
JOINT = Attention("joint", count=3, text=10, heads=12, head_dim=4)


@pytest.mark.parametrize("model", ORACLE)
def test_parameters_and_tokens_as_published(model):
    _, tokens, components = ORACLE[model]
    work = work_of(model)
    assert work.tokens == tokens
    assert {name: sum(leaf.size for leaf in leaves) for name, leaves in work.parameters.items()} == components


def test_work_of_wan():
    """The figures of a forward at 832x480x81: 198 TFLOP of attention and 82 of matmuls, all of it in 30 blocks."""
    work = work_of("wan2.1-t2v-1.3b")
    kinds = {calls.kind: calls for calls in work.attention}
    assert kinds == {"self": Attention("self", 30, 0, 12, 128), "cross": Attention("cross", 30, 512, 12, 128)}
    assert 30 * 4 * work.tokens**2 * 1536 == pytest.approx(198e12, rel=0.01)
    assert work.matmul_per_token * work.tokens + work.matmul_fixed == pytest.approx(82e12, rel=0.01)
    # By hand: q, k, v, out twice but for the text's k and v, and the feed-forward; patches in and out.
    by_hand = 30 * (6 * 1536**2 + 2 * 1536 * 8960) + 2 * 64 * 1536
    assert work.matmul_per_token == 2 * by_hand
    assert (work.width, work.inner, work.text, work.branches) == (1536, 8960, 0, 2)


def test_work_of_flux():
    work = work_of("flux1-dev")
    assert work.attention == (Attention("joint", 57, 512, 24, 128),)
    assert work.matmul_per_token == 2 * (57 * 12 * 3072**2 + 2 * 64 * 3072)
    # The text goes through as much as the picture, but in at 4,096 features and not out.
    assert work.matmul_fixed == 512 * 2 * (57 * 12 * 3072**2 + 4096 * 3072)
    assert (work.width, work.inner, work.text, work.branches, work.num_blocks) == (3072, 12288, 512, 1, 57)


def test_z_image_fills_its_picture_up_with_text():
    work = workload(outline("z-image"), "1040x1024")
    assert work.tokens == 4160 and work.text == 512
    odd = workload(outline("z-image"), "1040x1040")
    assert odd.tokens == 4225 and odd.text == 512 + 31
    assert {calls.kind: (calls.count, calls.text) for calls in odd.attention}["text"] == (2, 512)
    assert sorted((calls.count, calls.text) for calls in odd.attention if calls.kind == "joint") == [(2, 31), (30, 543)]


def test_bytes_by_hand():
    """30 tokens of 12 heads of 4 in bfloat16, 3 calls."""
    work = tiny((SELF,))
    assert traffic.of_evaluation(work, MeshConfig()) == {}
    assert traffic.ulysses(work, MeshConfig(ulysses=2)) == 3 * 4 * 16 * 48 * 2 // 2  # kernels see 32 rows, a multiple of 8
    assert traffic.ring(work, MeshConfig(ring=4)) == 3 * 3 * 2 * 8 * 48 * 2  # 8 of 30 on each of 4, padding included
    both = MeshConfig(ring=2, ulysses=3, tensor=2)
    # 8 of 30 on each of 6: each half of the ring is to have a multiple of 8, and of 3.
    assert traffic.ulysses(work, both) == 3 * 4 * 8 * 24 * 2 * 2 // 3
    assert traffic.ring(work, both) == 3 * 2 * 8 * 24 * 2
    assert traffic.text(work, both) == 0
    # 10 rows of text make 2 on each of 6 devices, and of the whole each passes on what the 5 others lack.
    joint = tiny((JOINT,), text=10)
    assert traffic.text(joint, both) == 3 * 5 * 2 * 24 * 2
    assert traffic.ring(joint, both) == 3 * 2 * (8 + 2) * 24 * 2
    assert traffic.cfg(work, MeshConfig(cfg=2, ring=4)) == 8 * 16 * 4


def test_bytes_of_reductions_by_hand():
    """One for each projection that is split by row, of as many rows as it works on: the tokens', the text's or both."""
    parameters = (
        ("blocks.image.q.kernel", (3, 48, 48)),
        ("blocks.image.out.kernel", (3, 48, 48)),
        ("blocks.text.out.kernel", (3, 48, 48)),
        ("single_blocks.feed_forward.linear_2.kernel", (5, 96, 48)),
        ("head.kernel", (48, 16)),
    )
    work = tiny((JOINT,), text=10, parameters=parameters)
    mesh = MeshConfig(ring=2, tensor=2)
    rows = 3 * 16 + 3 * 5 + 5 * (16 + 5)
    assert traffic.tensor(work, mesh) == rows * 48 * 2 * 2 // 2
    # 10 rows of text are whole on every device where 4 do not divide them.
    assert traffic.tensor(work, MeshConfig(ring=4, tensor=2)) == (3 * 8 + 3 * 10 + 5 * (8 + 10)) * 48 * 2 * 2 // 2
    assert traffic.tensor(work, MeshConfig(ring=2)) == 0


def test_weights_by_hand():
    """A block's kernel is cut by tensor and by fsdp, small leaves by neither."""
    parameters = (("blocks.q.kernel", (3, 256, 512)), ("blocks.q.bias", (3, 512)), ("head.kernel", (256, 16)))
    work = tiny((SELF,), parameters=parameters)
    whole, small = 3 * 256 * 512 * 2, 256 * 16 * 2
    sizes = {
        MeshConfig(): whole + 3 * 512 * 2 + small,
        MeshConfig(tensor=2): whole // 2 + 3 * 256 * 2 + small,
        MeshConfig(ulysses=4): whole + 3 * 512 * 2 + small,
        MeshConfig(ulysses=4, fsdp=True): whole // 4 + 3 * 512 * 2 + small,
        MeshConfig(ring=2, ulysses=2, tensor=2, fsdp=True): whole // 8 + 3 * 256 * 2 + small,
    }
    assert {mesh: traffic.component_bytes(work, "transformer", mesh) for mesh in sizes} == sizes
    assert traffic.fsdp(work, MeshConfig(ulysses=4, fsdp=True)) == whole * 3 // 4
    assert traffic.fsdp(work, MeshConfig(ulysses=4)) == 0
    # Two layers are whole at a time.
    assert gathered_bytes(work, MeshConfig(ulysses=4, fsdp=True)) == 2 * (256 * 512 + 512) * 2
    assert gathered_bytes(work, MeshConfig(ulysses=4)) == 0


def test_activations_by_hand():
    work = tiny((JOINT,), text=10)
    row = 10 * 48 * 2 + 96 * 6
    assert activation_bytes(work, MeshConfig(), 1) == 40 * row + 24 * 30 * 16
    assert activation_bytes(work, MeshConfig(ring=4), 2) == 2 * 18 * row + 24 * 8 * 16
    plan = plan_mesh(work, MeshConfig(ring=4))
    assert plan.decoding == 2000  # 8 rows of latents over 4 devices
    reserved = HOPPER.reserved + HOPPER.buffers
    assert plan.peak == sum(plan.weights.values()) + reserved + max(plan.denoising, plan.decoding)
    assert plan_mesh(work, MeshConfig(ring=3)).decoding == 8000
    batched = plan_mesh(work, MeshConfig(), batched=True)
    assert batched.denoising == activation_bytes(work, MeshConfig(), 2)


def collective_bytes(jaxpr: Jaxpr, mesh) -> dict[str, int]:
    """What one device sends in the collectives of a jaxpr without loops."""
    sent = {"all_to_all": 0, "ppermute": 0, "all_gather": 0}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in sent:
            size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in equation.invars)
            axes = equation.params["axis_name"]
            number = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
            sent[name] += {"all_to_all": size * (number - 1) // number, "ppermute": size, "all_gather": size * (number - 1)}[
                name
            ]
        for value in equation.params.values():
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                for key, size in collective_bytes(inner, mesh).items():
                    sent[key] += size
    return sent


@pytest.mark.parametrize("axes", [dict(ulysses=4), dict(ring=3), dict(ring=2, ulysses=2, tensor=2)], ids=str)
@pytest.mark.parametrize("text", [0, 10, 12])
def test_bytes_are_those_that_attention_sends(axes, text):
    config = MeshConfig(**axes)
    mesh = make_mesh(config)
    attend = wrap(ATTENTION["xla"], mesh)

    def stream(rows):
        return QKV(*[jax.ShapeDtypeStruct((1, rows, 12, 4), jnp.float32)] * 3)

    tokens = 31 + Layout(mesh).padding(31)
    if text:
        jaxpr = jax.make_jaxpr(lambda tokens, text: attend.joint_attention(tokens, text))(stream(tokens), stream(text))
        calls = Attention("joint", 1, text, 12, 4)
    else:
        jaxpr, calls = jax.make_jaxpr(attend.self_attention)(stream(tokens)), Attention("self", 1, 0, 12, 4)
    work = tiny((calls,), tokens=31, text=text, itemsize=4)
    sent = collective_bytes(jaxpr.jaxpr, mesh)
    assert sent["all_to_all"] == traffic.ulysses(work, config)
    assert sent["ppermute"] == (traffic.ring(work, config) if config.ring > 2 else 0)  # two gather
    assert sent["ppermute"] + sent["all_gather"] == traffic.ring(work, config) + traffic.text(work, config)


@pytest.mark.parametrize("axes", [dict(ulysses=4, fsdp=True), dict(ring=2, ulysses=2, tensor=2), dict(cfg=2, ring=2)], ids=str)
def test_bytes_are_those_that_weights_take(axes):
    """The bundled model, placed: every device of a mesh holds what the plan says."""
    from smartdiff_jax.engine.loading import _placement

    config, model = MeshConfig(**axes), outline("pocket-video", jnp.float32)
    work, mesh = workload(model), make_mesh(config)
    for component, shapes in (("transformer", model.denoisers[0]), ("text_encoder", model.text_encoders["text_encoder"][1])):
        place = _placement(component, mesh, config)
        held = 0
        for path, variable in nnx.to_flat_state(shapes):
            leaf = variable.get_value()
            array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), place(".".join(map(str, path)), leaf.shape))
            held += array.addressable_shards[0].data.nbytes
        assert traffic.component_bytes(work, component, config) == held


def test_times_are_near_the_measured_ones():
    """Seconds of a step on one H200 and two (benchmarks/results/parallel-*-nvidia-h200.json)."""
    wan, flux = work_of("wan2.1-t2v-1.3b"), work_of("flux1-dev")
    one, ulysses, ring = MeshConfig(), MeshConfig(ulysses=2), MeshConfig(ring=2)
    for work, mesh, seconds in (
        (wan, one, 0.884),
        (wan, ulysses, 0.476),
        (wan, MeshConfig(ulysses=2, fsdp=True), 0.482),
        (wan, ring, 0.470),
        (wan, MeshConfig(cfg=2), 0.449),
        (flux, one, 0.1209),
        (flux, ulysses, 0.0745),
        (flux, ring, 0.0713),
    ):
        assert plan_mesh(work, mesh).step() == pytest.approx(seconds, rel=0.04), (work.model, mesh)
    for work in (wan, flux):  # without guidance two devices are faster along a ring, and the plan says so
        assert plan_mesh(work, ring).step() < plan_mesh(work, ulysses).step()
    single = plan_mesh(wan, one)
    # A branch on each of two devices halves a step but for one exchange.
    assert single.step() / plan_mesh(wan, MeshConfig(cfg=2)).step() == pytest.approx(2.0, rel=0.001)
    assert plan_mesh(wan, MeshConfig(data=2)).step(outputs=4) == 2 * single.step()


def test_flux_on_a_card_of_24_gb():
    """One component at a time, with what is made with it; a component more and it would not fit."""
    work = work_of("flux1-dev")
    all_there, staged = (plan_mesh(work, MeshConfig(), residency=residency) for residency in ("all", "stage"))
    assert staged.peak == staged.reserved + staged.weights["transformer"] + staged.denoising <= 24 * 2**30
    assert staged.peak + staged.weights["vae"] + staged.decoding > 24 * 2**30
    assert all_there.peak == staged.reserved + sum(staged.weights.values()) + staged.decoding
    decoding = plan_mesh(work_of("wan2.1-t2v-1.3b"), MeshConfig(), residency="stage")
    assert max(decoding.stages, key=lambda name: decoding.stages[name]) == "text_encoder"  # UMT5-XXL, 11.4 GB


def test_a_link_between_hosts_is_slow():
    inside = HOPPER.of_axis(MeshConfig(ring=2, ulysses=4), "ring", "ulysses")
    outside = HOPPER.of_axis(MeshConfig(ring=4, ulysses=4), "ring", "ulysses")
    assert (inside, outside) == (HOPPER.link, HOPPER.network)
    assert HOPPER.of_axis(MeshConfig(cfg=2, ring=4, ulysses=4), "ulysses") == HOPPER.link
    assert HOPPER.of_axis(MeshConfig(cfg=2, ring=2, ulysses=4), "cfg") == HOPPER.network


@pytest.mark.parametrize("ring, ulysses", [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 4), (4, 3), (8, 2)])
def test_tokens_of_a_device_are_the_fewest_that_suit_kernels(ring, ulysses):
    for tokens in (*range(1, 100), 4096, 6889, 32_760):
        each = tokens_per_device(tokens, ring, ulysses)
        if ring * ulysses == 1:
            assert each == tokens
            continue
        enough = [n for n in range(1, each + 1) if n * ring * ulysses >= tokens and n * ulysses % ROWS == 0]
        assert enough == [each]  # what one kernel sees is a piece of each device along ulysses


def test_heads_and_padding():
    plan = plan_mesh(work_of("qwen-image"), MeshConfig(cfg=2, ring=2, ulysses=4))
    assert (plan.tokens, plan.tokens_per_device, plan.padding, plan.heads_per_device) == (6889, 862, 7, 6)
    assert set(plan.traffic) == {"ulysses", "ring", "cfg"}
    assert plan_mesh(workload(outline("flux1-dev", jnp.float32)), MeshConfig()).seconds == {}


@pytest.mark.parametrize(
    "model, axes, words",
    [
        ("wan2.1-t2v-1.3b", dict(ulysses=8), ["mesh.ulysses=8", "12 heads", "ring=2 ulysses=4", "ring=8 ulysses=1"]),
        ("wan2.1-t2v-1.3b", dict(ulysses=4, tensor=2), ["mesh.ulysses=4", "over tensor=2", "ring=2 ulysses=2"]),
        ("wan2.1-t2v-1.3b", dict(tensor=8), ["mesh.tensor=8", "12 heads"]),
        ("flux1-dev", dict(cfg=2), ["mesh.cfg=2", "flux1-dev", "ulysses"]),
        ("z-image", dict(cfg=2, fsdp=True), ["mesh.fsdp=True", "ring and ulysses"]),
    ],
)
def test_an_impossible_mesh_is_one_error(model, axes, words):
    with pytest.raises(InvalidConfig) as raised:
        plan_mesh(work_of(model), MeshConfig(**axes))
    assert all(word in str(raised.value) for word in words), raised.value


def test_meshes_use_every_device_once():
    found = meshes(12, outputs=4)
    assert len({name_of(mesh) for mesh in found}) == len(found)
    assert all(mesh.num_devices == 12 and mesh.cfg <= 2 and mesh.data <= 4 for mesh in found)
    assert any(mesh.ring == 3 and mesh.data == 4 for mesh in found)
    assert not any(mesh.data > 1 for mesh in meshes(12))


@pytest.mark.parametrize("devices", [8, 16])
def test_a_proposal_divides_the_heads(devices):
    work = work_of("wan2.1-t2v-1.3b")
    proposal = propose(work, devices, 80 * GB)
    plans = (proposal.best, *proposal.others, *proposal.too_big)
    assert all(12 % (plan.mesh.ulysses * plan.mesh.tensor) == 0 for plan in plans)
    assert "must divide the model's 12 heads" in proposal.impossible["ulysses=8"]
    times = [plan.step() for plan in (proposal.best, *proposal.others)]
    assert times == sorted(times) and times[0] < proposal.single.step()


@pytest.mark.parametrize(
    "model, devices, expected",
    [
        ("wan2.1-t2v-1.3b", 1, {}),
        ("wan2.1-t2v-1.3b", 2, dict(cfg=2)),
        ("wan2.1-t2v-1.3b", 8, dict(cfg=2, ulysses=4)),
        ("z-image", 8, dict(cfg=2, ring=2, ulysses=2)),
        ("z-image-turbo", 2, dict(ring=2)),  # guidance is off by default
        ("flux1-dev", 8, dict(ulysses=8)),
        ("wan2.1-t2v-1.3b", 16, dict(cfg=2, ring=2, ulysses=4)),  # each branch on a host of its own
        ("wan2.2-t2v-a14b", 16, dict(cfg=2, ulysses=8)),
    ],
)
def test_proposals(model, devices, expected):
    assert propose(work_of(model), devices, 80 * GB).best.mesh == MeshConfig(**expected)


def test_weights_are_split_only_where_they_must_be():
    work = work_of("flux1-dev")
    roomy, tight = propose(work, 4, 80 * GB).best, propose(work, 4, 20 * GB).best
    assert not roomy.mesh.fsdp and tight.mesh.fsdp
    assert tight.peak <= 20 * GB < roomy.peak and tight.step() > roomy.step()
    with pytest.raises(InvalidConfig, match=r"memory=5\.0.*no mesh of 4 devices.*the least is"):
        propose(work, 4, 5 * CARD_GB)


def test_outputs_go_over_the_data_axis():
    best = propose(work_of("flux1-dev"), 4, 80 * GB, outputs=4).best
    assert best.mesh == MeshConfig(data=4)


def test_a_folder_is_read_from_its_config_files(tmp_path):
    import tiny as tiny_wan

    folder = tiny_wan.write_folder(tmp_path / "tiny-wan")
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    work = workload(outline(folder), "64x32x9")
    assert work.tokens == 3 * 2 * 4 and work.num_heads == 2
    with pytest.raises(InvalidConfig, match="no-such-model"):
        outline("no-such-model")


@pytest.mark.parametrize("size", ["1024x1000", "1024x1024x5", f"{2 * MAX_SIDE}x16", "5:7", "1024x1024x"])
def test_an_impossible_size_is_one_error(size):
    with pytest.raises(InvalidRequest):
        workload(outline("flux1-dev"), size)
