"""What a mesh would cost, before anything is loaded: memory, messages and the time of a step on each device.

    evaluation   attention / (P T) + matmuls / P + the rest / P + what messages add; text that P does not divide is whole
                 outside of attention
    step         as many evaluations as a device has branches of guidance, and one exchange of their results
    memory       reserved + weights + the larger of denoising and decoding; with `stage` the largest of the stages, each with
                 the weights it uses and no others

Rates are measured ones where there are any (rates.py), bytes are counted (traffic.py), activations are estimated.
"""

import dataclasses
import math
from typing import Any

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.sharding import traffic
from smartdiff_jax.sharding.context_parallel import check_heads, ring_mode
from smartdiff_jax.sharding.layout import split_picture
from smartdiff_jax.sharding.rates import HOPPER, Rates
from smartdiff_jax.sharding.workload import Workload, mesh_of_numbers, num_shards, tokens_per_device

GB = 10**9
CARD_GB = 2**30
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one mesh would cost. Bytes and seconds are of one device; a step is of one output.

    tokens_per_device: padding included, of which `padding` on all devices together.
    heads_per_device: in attention. weights: by component. reserved: see Rates.
    denoising: activations and gathered layers. decoding: activations. Those of text encoders are not counted: they are small.
    residency: which weights are on a device at a time (SystemConfig.residency).
    traffic: bytes sent in a step, by what is sent.
    seconds: of a step, by what takes them; {} in float32, which has no measured rates.
    """

    mesh: MeshConfig
    tokens: int
    tokens_per_device: int
    padding: int
    heads_per_device: int
    weights: dict[str, int]
    reserved: int
    denoising: int
    decoding: int
    residency: str
    traffic: dict[str, int]
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        if self.residency == "all":
            return self.reserved + sum(self.weights.values()) + max(self.denoising, self.decoding)
        return self.reserved + max(self.stages.values())

    @property
    def stages(self) -> dict[str, int]:
        """Bytes of each stage by component under `stage`: its weights and what is made with them."""
        return {name: size + self.made.get(name, 0) for name, size in self.weights.items()}

    @property
    def made(self) -> dict[str, int]:
        """Bytes of what is made with a component's weights, where they are counted."""
        return {name: self.denoising for name in self.weights if name.startswith("transformer")} | {"vae": self.decoding}

    def step(self, outputs: int = 1) -> float:
        """Seconds of a step of so many outputs, `mesh.data` at a time."""
        return sum(self.seconds.values()) * math.ceil(outputs / self.mesh.data)


def check_mesh(mesh: MeshConfig, model: str, heads: int, guided: bool) -> None:
    """Raises one InvalidConfig, with what would work, for a mesh that cannot serve the model.

    heads: of the model's attention. guided: it has a negative branch.
    """
    check_heads(mesh_of_numbers(mesh), heads)
    if mesh.cfg > 1 and not guided:
        remedy = f"{model} has no negative branch to split off; use 1, and more ring, ulysses or data"
        raise InvalidConfig("mesh.cfg", mesh.cfg, remedy)
    if mesh.fsdp and mesh.ring * mesh.ulysses == 1:
        raise InvalidConfig("mesh.fsdp", True, "splits weights over ring and ulysses, both 1 here; leave it out, or raise one")


def plan_mesh(
    work: Workload, mesh: MeshConfig, *, batched: bool = False, residency: str = "all", rates: Rates = HOPPER
) -> Plan:
    """What `mesh` would cost. batched: a device runs its branches of guidance at once (SystemConfig.guidance).
    residency: as in SystemConfig.

    Raises InvalidConfig where the mesh is impossible.
    """
    check_mesh(mesh, work.model, work.num_heads, work.guided)
    tokens = tokens_per_device(work.tokens, mesh.ring, mesh.ulysses)
    evaluations = math.ceil(work.branches / mesh.cfg)
    sent = {name: evaluations * count for name, count in traffic.of_evaluation(work, mesh).items()}
    if mesh.cfg > 1:
        sent["cfg"] = traffic.cfg(work, mesh)
    seconds = {}
    if work.itemsize == 2:
        seconds = {name: evaluations * value for name, value in evaluation_seconds(work, mesh, rates).items()}
        if mesh.cfg > 1:
            seconds["messages"] += sent["cfg"] / rates.of_axis(mesh, "cfg") + rates.latency
    return Plan(
        mesh=mesh,
        tokens=work.tokens,
        tokens_per_device=tokens,
        padding=tokens * mesh.ring * mesh.ulysses - work.tokens,
        heads_per_device=work.num_heads // (mesh.ulysses * mesh.tensor),
        weights={name: traffic.component_bytes(work, name, mesh) for name in work.parameters},
        reserved=rates.reserved + (rates.buffers if mesh.num_devices > 1 else 0),
        denoising=activation_bytes(work, mesh, evaluations if batched else 1) + gathered_bytes(work, mesh),
        decoding=decoder_bytes(work, mesh),
        residency=residency,
        traffic=sent,
        seconds=seconds,
    )


def activation_bytes(work: Workload, mesh: MeshConfig, batch: int) -> int:
    """Estimate of the most that is alive while denoising, for `batch` evaluations at once.

    Of every row, tokens and text, bytes of ten streams (residual, its float32 norm, queries, keys, values and their copies in
    messages, the result) and of the widest projection behind and before its activation, which is float32; of the latents six
    float32 copies (the carry, the sampler's memory, the velocities).
    """
    tokens = tokens_per_device(work.tokens, mesh.ring, mesh.ulysses)
    row = 10 * work.width * work.itemsize + work.inner // mesh.tensor * (FLOAT32 + work.itemsize)
    return batch * (tokens + traffic.text_rows(work, mesh)) * row + 6 * FLOAT32 * tokens * work.features


def gathered_bytes(work: Workload, mesh: MeshConfig) -> int:
    """With fsdp, two layers whole: the one that computes and the next, of the kind of block that weighs most."""
    if not mesh.fsdp:
        return 0
    places = mesh_of_numbers(mesh)
    place = work.placement("transformer", places, mesh.model_copy(update={"fsdp": False}))
    layers: dict[str, int] = {}
    for leaf in work.parameters["transformer"]:
        stack, _, rest = leaf.path.partition(".")
        if rest and stack.endswith(("blocks", "refiners")):
            held = leaf.bytes_on_device(places, place(leaf.path, leaf.shape).spec) // leaf.shape[0]
            layers[stack] = layers.get(stack, 0) + held
    return 2 * max(layers.values(), default=0)


def decoder_bytes(work: Workload, mesh: MeshConfig) -> int:
    """The decoder's activations, divided as the picture is (layout.split_picture)."""
    height, width = work.latent_shape[3:]
    return work.decoder // math.prod(split_picture(height, width, mesh.num_devices))


def evaluation_seconds(work: Workload, mesh: MeshConfig, rates: Rates) -> dict[str, float]:
    """Of one evaluation, by what takes them.

    attention  4 * queries * keys * H * D FLOP, divided by P and by T; attention of the text to itself by T only
    matmuls    FLOP of a device's tokens and text; what tensor does not split is not divided by it. Kernels for one
               row take the time of reading them
    rest       features * rows * blocks of norms, rotary turns and activations
    messages   bytes / rate and a latency a call. Ulysses sends four arrays and copies two, read and written; a ring sends two
               a turn, and where it is longer than two merges two float32 results into one

    Of fsdp's gathers a share is hidden behind computing (Rates.shown). Of attention's messages half and more is hidden as well,
    and counted all the same: kernels of half the size are slower by about as much.
    """
    tokens = tokens_per_device(work.tokens, mesh.ring, mesh.ulysses)
    attention = attention_flop(work, mesh) / rates.attention
    share = _split_share(work, mesh)
    text = traffic.text_rows(work, mesh)
    # What is fixed is the text's, but for a row of the timestep. Text that is only looked at is whole on every device.
    flop = work.matmul_per_token * tokens + work.matmul_fixed * (text / work.text if work.text else 1)
    matmuls = flop * (1 - share + share / mesh.tensor) / rates.matmul + work.read / mesh.tensor / rates.memory
    rest = rates.elementwise * work.num_blocks * work.width * (tokens + text)
    calls = sum(calls.count for calls in work.split_attention)
    joint = sum(calls.count for calls in work.attention if calls.kind == "joint")
    sent = traffic.of_evaluation(work, mesh)
    messages = _copied_bytes(work, mesh) / rates.memory
    for name, axes, number in (
        ("ulysses", ("ulysses",), 4 * calls),
        ("ring", ("ring", "ulysses"), 2 * (mesh.ring - 1) * calls),
        ("text", ("ring", "ulysses"), joint),
        ("tensor", ("tensor",), 2 * work.num_blocks),
        ("fsdp", ("ring", "ulysses"), work.num_blocks),
    ):
        if name in sent:
            seconds = sent[name] / rates.of_axis(mesh, *axes) + number * rates.latency
            messages += seconds * (rates.shown if name == "fsdp" else 1)
    return {"attention": attention, "matmuls": matmuls, "rest": rest, "messages": messages}


def attention_flop(work: Workload, mesh: MeshConfig) -> float:
    """Of one evaluation, on one device: 4 * queries * keys * heads * features of a head, all calls together."""
    flop, pieces = 0.0, mesh.ring * mesh.ulysses
    for calls in work.attention:
        rows = traffic.piece_rows(work, mesh, calls) * pieces
        queries, keys, division = {
            "self": (rows, rows, pieces),
            "joint": (rows, rows, pieces),
            "cross": (work.tokens, calls.text, pieces),
            "text": (calls.text, calls.text, 1),
        }[calls.kind]
        flop += calls.count * 4 * queries * keys * calls.heads * calls.head_dim / division
    return flop / mesh.tensor


def _copied_bytes(work: Workload, mesh: MeshConfig) -> int:
    """Read and written in device memory only because attention is split."""
    rows = sum(traffic.attention_bytes(work, mesh, calls) for calls in work.split_attention)
    packed = 2 * 2 * (mesh.ulysses > 1)
    merged = (mesh.ring - 1) * 3 * FLOAT32 // work.itemsize if ring_mode(mesh.ring) == "permute" else 0
    return rows * (packed + merged)


def _split_share(work: Workload, mesh: MeshConfig) -> float:
    """The share of the blocks' kernels that the tensor axis splits."""
    if mesh.tensor == 1:
        return 0.0
    places = mesh_of_numbers(mesh)
    place = work.placement("transformer", places, mesh.model_copy(update={"fsdp": False}))
    kernels = [leaf for leaf in work.parameters["transformer"] if len(leaf.shape) == 3]
    split = [leaf for leaf in kernels if num_shards(places, place(leaf.path, leaf.shape).spec) > 1]
    return sum(leaf.size for leaf in split) / max(1, sum(leaf.size for leaf in kernels))


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The fastest mesh, the others that fit, fastest first, those that do not, and what is impossible and why.

    single: what one device would take, whether it fits or not.
    """

    best: Plan
    others: tuple[Plan, ...]
    too_big: tuple[Plan, ...]
    impossible: dict[str, str]
    single: Plan


def propose(work: Workload, devices: int, memory: int, *, outputs: int = 1, rates: Rates = HOPPER) -> Proposal:
    """The fastest mesh of all `devices` for `outputs` at once, among those whose peak is at most `memory` bytes a device.

    Weights are split over the sequence axes (fsdp) only where they would not fit otherwise, and components are on the devices
    one at a time (residency "stage") only where no mesh fits that holds them all.
    Raises InvalidConfig where none fits.
    """
    fitting, too_big, impossible = _sorted_out(work, devices, memory, outputs, rates, "all")
    if not fitting:
        fitting, staged, _ = _sorted_out(work, devices, memory, outputs, rates, "stage")
        if not fitting:
            least = min(staged, key=lambda plan: plan.peak)
            remedy = (
                f"no mesh of {devices} devices fits, one component at a time either; the least is {least.peak / GB:.1f} GB a "
                f"device with {name_of(least.mesh)} and residency=stage: use more devices, or larger ones"
            )
            raise InvalidConfig("memory", round(memory / CARD_GB, 1), remedy)
    fitting.sort(key=lambda plan: (round(plan.step(outputs), 6), len(plan.traffic)))
    best, *others = fitting
    single = plan_mesh(work, MeshConfig(), rates=rates)
    return Proposal(best, tuple(others), tuple(sorted(too_big, key=lambda plan: plan.peak)), impossible, single)


def _sorted_out(
    work: Workload, devices: int, memory: int, outputs: int, rates: Rates, residency: str
) -> tuple[list[Plan], list[Plan], dict[str, str]]:
    """Plans that fit, those that do not, and what is impossible and why."""
    fitting, too_big, impossible = [], [], {}
    for mesh in meshes(devices, outputs):
        if mesh.cfg > work.branches:
            impossible["cfg=2"] = f"{work.model} evaluates one branch a step"
            continue
        try:
            plan = plan_mesh(work, mesh, residency=residency, rates=rates)
        except InvalidConfig as error:
            if mesh.tensor == 1 or error.field == "mesh.tensor":
                impossible[f"{error.field.removeprefix('mesh.')}={error.value}"] = error.remedy.partition(";")[0]
            continue
        if plan.peak > memory and mesh.ring * mesh.ulysses > 1:
            split = plan_mesh(work, mesh.model_copy(update={"fsdp": True}), residency=residency, rates=rates)
            plan = min(plan, split, key=lambda plan: plan.peak)
        (fitting if plan.peak <= memory else too_big).append(plan)
    return fitting, too_big, impossible


def meshes(devices: int, outputs: int = 1) -> list[MeshConfig]:
    """Every mesh of exactly `devices` that could help with so many outputs, without fsdp."""
    found = []
    for data in (data for data in divisors(devices) if data <= outputs):
        for cfg in (cfg for cfg in divisors(devices // data) if cfg <= 2):
            for tensor in divisors(devices // data // cfg):
                sequence = devices // data // cfg // tensor
                axes: dict[str, Any] = dict(data=data, cfg=cfg, tensor=tensor)
                found += [MeshConfig(**axes, ring=sequence // ulysses, ulysses=ulysses) for ulysses in divisors(sequence)]
    return found


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def name_of(mesh: MeshConfig) -> str:
    """The fields that are not their defaults: "cfg=2 ulysses=4 fsdp"."""
    sizes = [f"{name}={value}" for name, value in mesh.model_dump(exclude={"fsdp"}).items() if value > 1]
    return " ".join([*sizes, *["fsdp"] * mesh.fsdp]) or "one device"
