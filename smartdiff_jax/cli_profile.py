"""`smartdiff generate --profile`: the same request, with a trace and the ten largest costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from smartdiff_jax.errors import InvalidRequest


def prepare(path: Path, compare_cache: bool) -> None:
    """Before a model is loaded. Raises InvalidRequest where no trace could be written."""
    from smartdiff_jax.engine.profiling import check_profile, keep_scopes

    check_profile(path)
    if compare_cache:
        raise InvalidRequest("profile", str(path), "is of one run, and --compare-cache makes two; leave one out")
    keep_scopes()


def made(pipe: Any, request: Any, show: Callable[[Any], Any], path: Path | None, console: Console) -> Any:
    """The output of a request, whose events are shown; with a path, of its second run, because the first one compiles."""

    def run(show: Callable[[Any], Any]) -> Any:
        output = None
        for event in pipe.stream(request):
            output = show(event)
        return output

    if path is None:
        return run(show)
    from smartdiff_jax.engine.profiling import profiled
    from smartdiff_jax.engine.warming import warm

    def nothing(event: Any) -> None: ...

    if request.cache == "none":
        warm(pipe, request, nothing)  # in two steps, which compiles as much
    else:
        run(nothing)
    pipe.forget_prompts()
    output, costs = profiled(lambda: run(show), path)
    table = Table(Column("scope", overflow="fold"), "kernels", "calls", "ms", "share", title="the largest costs")
    for cost in costs:
        scope, time = cost.scope or "(none)", f"{1e3 * cost.seconds:.2f}"
        table.add_row(scope, cost.kind, str(cost.calls), time, f"{cost.share:.1%}")
    console.print(table)
    return output
