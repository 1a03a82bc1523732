"""plan: what serving a model takes, and what fits into how much memory. Runs without torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.serve.bench_work import Speed
    from moesaic.serve.memory_plan import MemoryPlan

BAR = 16  # characters


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command()(plan)


def plan(
    model: Annotated[Path, typer.Argument(help="A folder that moesaic refactor wrote, or a mixture of experts.")],
    memory: Annotated[
        str | None, typer.Option("--memory", "-m", help="The budget, such as 8GiB. Default: 80 % of what is available.")
    ] = None,
    experts: options.Experts = None,
    context: Annotated[int | None, typer.Option(help="Longest prompt and answer, tokens. Default: what fits.")] = None,
    max_requests: options.MaxRequests = 32,
    max_tokens: options.MaxTokens = 512,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    host_memory: options.HostMemory = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What moesaic bench wrote for MODEL: the plan says how fast it will be.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show how memory would be split when MODEL is served, and what to change where it does not fit.

    Example: moesaic plan moesaic-demo --memory 600MiB --context 1024
    """
    from moesaic.serve.memory_plan import plan as make

    result = make(
        model,
        memory=memory,
        experts=experts,
        context=context,
        max_requests=max_requests,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        host_memory=host_memory,
    )
    speed = None if calibration is None else _speed(result, calibration)
    if as_json:
        found = asdict(result) | {"requests": result.requests, "spare": result.spare}
        typer.echo(json.dumps(found if speed is None else found | {"expected": asdict(speed)}, indent=2))
        return
    _show(result)
    if speed is not None:
        _show_speed(speed)


def _speed(result: "MemoryPlan", path: Path) -> "Speed":
    """What the calibration says; says on stderr if it was measured elsewhere."""
    from moesaic.serve.bench_work import expected
    from moesaic.simulate.calibration import read_calibration

    calibration = read_calibration(path)
    if (differs := calibration.elsewhere()) is not None:
        typer.secho(f"note: {differs}", fg="yellow", err=True)
    return expected(calibration, result)


def _show_speed(speed: "Speed") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    context = speed.steps[0].context
    title = f"decode steps at {context} tokens of context, every expert in memory"
    table = Table(title=title, box=SIMPLE)
    for name in ("requests", "ms", "tokens/s"):
        table.add_column(name, justify="right")
    for step in speed.steps:
        least, most = f"{step.least_s * 1e3:.3g}", f"{step.most_s * 1e3:.3g}"
        slow, fast = f"{step.requests / step.most_s:,.0f}", f"{step.requests / step.least_s:,.0f}"
        table.add_row(
            str(step.requests),
            least if least == most else f"{least} to {most}",
            slow if slow == fast else f"{slow} to {fast}",
        )
    table.caption = "from all tokens at the smallest expert to as many experts as there can be"
    Console().print(table)
    if speed.miss_s is not None:
        text = f"an expert that is not there: up to {speed.miss_s * 1e3:.3g} ms a layer from the page cache, "
        typer.echo(text + f"{(speed.miss_disk_s or 0) * 1e3:.3g} ms from the disk; how often depends on the routes")


def _show(result: "MemoryPlan") -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(result))
    for text in result.problems:
        console.print(f"[yellow]note[/yellow] {text}", highlight=False)
    for text in result.advice:
        console.print(f"[green]try[/green]  {text}", highlight=False)


def _table(result: "MemoryPlan") -> "Table":
    """A row and a bar for each use of the budget."""
    from rich.bar import Bar
    from rich.box import SIMPLE
    from rich.table import Table

    from moesaic.files import human_bytes

    where = f" on {result.device}" if result.device else ""
    table = Table(title=f"{human_bytes(result.budget)}{where} for {result.model} in {result.dtype}", box=SIMPLE)
    for name in ("use", "size", "share"):
        table.add_column(name, justify="left" if name == "use" else "right")
    table.add_column("", width=BAR)
    table.add_column("")
    begin = 0
    for name, count, color, text in _uses(result):
        bar = Bar(result.budget, begin, begin + count, width=BAR, color=color)
        table.add_row(name, human_bytes(count), f"{count / result.budget:.1%}", bar, text)
        begin += count
    if result.device:
        table.caption = (
            f"beside it {human_bytes(result.host)} of main memory for experts that are not on {result.device}"
        )
    return table


def _uses(result: "MemoryPlan") -> list[tuple[str, int, str, str]]:
    """Name, bytes, colour and remark of each use."""
    from moesaic.files import human_bytes

    buffers = f"process, activations, logits, kernels {human_bytes(result.kernels)}"
    if result.device:
        buffers = "activations, logits"
    share = f"{result.experts / result.all_experts:.0%} of {human_bytes(result.all_experts)}"
    return [
        ("weights", result.dense, "blue", "all but experts"),
        ("buffers", result.buffers, "cyan", buffers),
        ("experts", result.experts, "magenta", f"{share}, {human_bytes(result.least_experts)} at least"),
        ("keys, values", result.kv, "yellow", _keys(result, human_bytes(result.kv_request))),
        ("spare", result.spare, "white", ""),
    ]


def _keys(result: "MemoryPlan", request: str) -> str:
    plural = "" if result.requests == 1 else "s"
    return f"{result.requests} request{plural} of {result.context} tokens, {request} each"
