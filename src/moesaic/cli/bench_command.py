"""bench: what this machine does with a model, measured, for moesaic simulate and moesaic plan."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.simulate.calibration import Calibration


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command()(bench)


def bench(
    model: Annotated[Path, typer.Argument(help="A checkpoint that moesaic refactor wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The calibration's file.")] = Path("calibration.json"),
    memory: Annotated[str | None, typer.Option(help="Memory for everything, as 8GiB; see moesaic plan.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    weights: Annotated[str, typer.Option(help="Matrices kept as stored, int8 or int4.")] = "stored",
    context: Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compute; default: the cores.")] = None,
    seconds: Annotated[float, typer.Option(help="How long steps are measured, about.")] = 60.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Measure how fast this machine serves MODEL and how near that is to its limits, and write the calibration.

    Example: moesaic bench ./moe --out calibration.json, then moesaic plan ./moe --calibration calibration.json
    """
    from moesaic.errors import MoesaicError
    from moesaic.progress import set_quiet
    from moesaic.serve.bench import BenchOptions, bench

    set_quiet(as_json)
    if out.is_dir():
        raise MoesaicError(f"--out {out} is a folder; expected a file, such as {out / 'calibration.json'}")
    result = bench(model, BenchOptions(memory, dtype, weights, context, threads, seconds, seed))
    result.save(out)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    _show(result)
    typer.echo(f"written: {out}")


def _show(result: "Calibration") -> None:
    from rich.console import Console

    console, floors, check = Console(), result.floors, result.check
    console.print(_table(result))
    for text in (
        f"best rates with {result.machine.threads} threads: memory {floors.read_bytes_s / 1e9:.1f} GB/s, products "
        f"{floors.flops / 1e9:,.0f} GFLOP/s in {result.model.dtype}, {floors.flops_float32 / 1e9:,.0f} in float32",
        f"experts read at {floors.page_cache.bytes_s / 1e9:.2f} GB/s from the page cache, "
        f"{floors.disk.bytes_s / 1e9:.2f} GB/s from the disk",
        f"costs fit the means of these cells within {result.costs.error:.0%} (root mean square); a burst of "
        f"{check.requests} requests took {check.live_s:.3g} s in {check.live_steps} steps, simulated "
        f"{check.simulated_s:.3g} s in {check.simulated_steps}: {check.error:+.0%}, a step {check.step_error:+.0%}",
    ):
        console.print(text, highlight=False)


def _table(result: "Calibration") -> "Table":
    """One row a cell."""
    from rich.box import SIMPLE
    from rich.table import Table

    kept = "" if result.model.weights == "stored" else f", weights in {result.model.weights},"
    table = Table(title=f"{result.model.name} in {result.model.dtype}{kept} on {result.machine.cpu}", box=SIMPLE)
    table.add_column("cell", no_wrap=True)
    for name in ("tok/s", "ms", "best", "fit", "floor", "share", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in result.cells:
        times = (cell.mean_s, cell.best_s, cell.fit_s, cell.floor_s)
        table.add_row(
            cell.name,
            f"{cell.tokens_s:,.0f}",
            *(f"{seconds * 1e3:.3g}" for seconds in times),
            f"{cell.share:.0%}",
            cell.limit,
        )
    table.caption = "ms a step: mean, best, by the fitted costs, and what the machine needs at least to read or compute"
    return table
