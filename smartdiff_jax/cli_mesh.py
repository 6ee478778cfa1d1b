"""`smartdiff mesh`: what a mesh file would cost, and which mesh to write. Nothing is loaded, and no GPU is needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from smartdiff_jax.sharding.plan import Plan, Proposal
    from smartdiff_jax.sharding.workload import Workload

app = typer.Typer(help="Check a mesh file, or have one proposed.", no_args_is_help=True)

Model = Annotated[str, typer.Option("--model", "-m", help="A known name, or a folder.")]
Size = Annotated[
    str | None, typer.Option(help="WIDTHxHEIGHTxFRAMES, of pictures WIDTHxHEIGHT.", show_default="the model's default")
]
Memory = Annotated[float, typer.Option(help="GB of one device, as it is sold: of 2^30 bytes.", min=0.1)]
SHOWN = 4
"""Meshes besides the best that a proposal names."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML file of system parameters, as `generate --config` takes it.")],
    model: Model,
    size: Size = None,
    memory: Memory = 80.0,
) -> None:
    """Print what the mesh of FILE costs: tokens, memory and messages of a device, and how long a step takes."""
    import jax.numpy as jnp

    from smartdiff_jax.config.system import MeshConfig, SystemConfig
    from smartdiff_jax.engine.planning import outline, workload
    from smartdiff_jax.kernels import ATTENTION
    from smartdiff_jax.sharding.plan import plan_mesh

    system = SystemConfig.from_file(file)
    ATTENTION[system.attention]  # an unknown name is an error here, and not on the GPUs
    # A mesh file is for GPUs, where "auto" is bfloat16.
    dtype = "bfloat16" if system.dtype == "auto" else system.dtype
    work = workload(outline(model, jnp.dtype(dtype), precision=system.precision), size)
    if system.precision == "fp8":
        dtype += " with fp8 products, whose time is told as bfloat16's"
    batched = system.guidance == "batched"
    plan, single = (plan_mesh(work, mesh, batched=batched, residency=system.residency) for mesh in (system.mesh, MeshConfig()))
    for label, text in describe_plan(work, plan, single, dtype, memory):
        print(f"{label:<22}{text}".rstrip())


@app.command()
def plan(
    devices: Annotated[int, typer.Option(help="How many GPUs to use.", min=1, max=1024)],
    model: Model,
    size: Size = None,
    memory: Memory = 80.0,
    outputs: Annotated[int, typer.Option(help="How many outputs are wanted at once.", min=1, max=64)] = 1,
) -> None:
    """Print the fastest mesh that fits as a YAML file, and why as comments in it."""
    from smartdiff_jax.engine.planning import outline, workload
    from smartdiff_jax.sharding.plan import CARD_GB, propose

    work = workload(outline(model), size)
    proposal = propose(work, devices, round(memory * CARD_GB), outputs=outputs)
    for line in describe_proposal(work, proposal, memory, outputs):
        print(f"# {line}")
    print("mesh:")
    fields = proposal.best.mesh.model_dump(exclude_defaults=True) or {"data": 1}
    for field, value in fields.items():
        print(f"  {field}: {str(value).lower()}")
    if proposal.best.residency != "all":
        print(f"residency: {proposal.best.residency}")


def describe_plan(work: "Workload", plan: "Plan", single: "Plan", dtype: str, memory: float) -> list[tuple[str, str]]:
    """Rows of (what, how much); decimal GB and MB."""
    from smartdiff_jax.sharding.layout import describe_pieces
    from smartdiff_jax.sharding.plan import GB, name_of

    mesh = plan.mesh
    text = max((calls.text for calls in work.attention), default=0)
    height, width = work.latent_shape[3:]
    rows = [
        ("model", f"{work.model}, {dtype}, {work.branches} evaluation{'s' * (work.branches > 1)} a step"),
        ("mesh", f"{name_of(mesh)}: {mesh.num_devices} device{'s' * (mesh.num_devices > 1)}"),
        (
            "tokens",
            f"{plan.tokens:,} and {text} of text; {plan.tokens_per_device:,} a device, {plan.padding} of all are padding",
        ),
        ("heads", f"{plan.heads_per_device} of {work.num_heads} a device, in attention"),
        ("decoder", describe_pieces(height, width, mesh.num_devices)),
        ("memory of a device", f"{plan.peak / GB:.2f} GB at most; {_fits(plan, memory)}"),
    ]
    alternative = "or " if plan.residency == "stage" else ""
    parts = {
        **{f"{alternative}{name}": size for name, size in plan.weights.items()},
        "reserved": plan.reserved,
        "or while denoising": plan.denoising,
        "or while decoding": plan.decoding,
    }
    if plan.residency == "stage":
        rows.append(("", "one component at a time, the others in pinned host memory"))
    rows += [(f"  {name}", f"{size / GB:8.2f} GB") for name, size in parts.items()]
    rows.append(("sent by a device", f"{sum(plan.traffic.values()) / 1e6:,.1f} MB a step"))
    rows += [(f"  {name}", f"{size / 1e6:8,.1f} MB") for name, size in plan.traffic.items()]
    rows.append(("step", _step(plan, single, mesh.data)))
    rows += [(f"  {name}", f"{_ms(seconds):>11}") for name, seconds in plan.seconds.items()]
    return rows


def describe_proposal(work: "Workload", proposal: "Proposal", memory: float, outputs: int) -> list[str]:
    """Why this mesh: its figures, the next best, what does not fit, what cannot be."""
    from smartdiff_jax.sharding.plan import GB, name_of

    best = proposal.best
    devices = f"{best.mesh.num_devices} device{'s' * (best.mesh.num_devices > 1)}"
    lines = [
        f"{work.model}, {work.tokens:,} tokens, on {devices} of {memory:g} GB: {name_of(best.mesh)}",
        f"a step takes {_step(best, proposal.single, outputs)}",
        f"a device holds {best.peak / GB:.1f} GB at most and sends {sum(best.traffic.values()) / 1e6:,.0f} MB a step",
    ]
    if best.residency == "stage":
        host = sum(best.weights.values()) * best.mesh.num_devices
        lines.append(
            "no mesh holds all components at once: one at a time, the others in pinned memory of the host, "
            f"{host / GB:.1f} GB of it; a request moves every component once, which the step does not count"
        )
    slower = [f"{name_of(plan.mesh)} {_ms(plan.step(outputs))}" for plan in proposal.others[:SHOWN]]
    too_big = [f"{name_of(plan.mesh)} {plan.peak / GB:.1f} GB" for plan in proposal.too_big[:SHOWN]]
    impossible = [f"{name} ({reason})" for name, reason in proposal.impossible.items()]
    for title, entries in (("slower", slower), ("too big", too_big), ("impossible", impossible)):
        if entries:
            lines.append(f"{title}: {', '.join(entries)}")
    return lines


def _step(plan: "Plan", single: "Plan", outputs: int) -> str:
    if not plan.seconds:
        return "not predicted: rates are measured in bfloat16 only"
    of_outputs = f"for {outputs} outputs, " if outputs > 1 else ""
    faster = single.step(outputs) / plan.step(outputs)
    return f"{_ms(plan.step(outputs))}, {of_outputs}{faster:.2f}x one device, as predicted for H100 and H200"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds > 1e-3 else f"{seconds * 1e3:.3f} ms"


def _fits(plan: "Plan", memory: float) -> str:
    from smartdiff_jax.sharding.plan import CARD_GB, GB

    card = f"{memory:g} GB, a card of {memory * CARD_GB / GB:.2f}"
    return f"fits {card}" if plan.peak <= memory * CARD_GB else f"does not fit {card}"
