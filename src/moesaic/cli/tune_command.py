"""tune: measure once how this machine computes a model's experts fastest."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.experts.tuning import Times


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command()(tune)


def tune(
    model: options.Model,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads that will compute; default: torch's own.")] = None,
    again: Annotated[bool, typer.Option(help="Measure what is known already, too.")] = False,
    as_json: options.Json = False,
) -> None:
    """Measure which way of computing the experts of MODEL is fastest here, for every later run to choose by.

    Example: moesaic tune ./moe. Takes seconds for each shape of a layer; measure on an idle machine, in the dtype and
    with the threads that will run.
    """
    import torch

    from moesaic.errors import MoesaicError
    from moesaic.models.loading import load_model, stored_dtype
    from moesaic.models.tuning import tune as measure
    from moesaic.progress import set_quiet

    set_quiet(as_json)
    if dtype not in ("auto", "float32", "bfloat16"):
        raise MoesaicError(f"--dtype {dtype}: expected auto, float32 or bfloat16")
    if threads is not None:
        if threads < 1:
            raise MoesaicError(f"--threads {threads}: expected 1 or more")
        torch.set_num_threads(threads)
    source = options.model_source(model)
    kind = stored_dtype(source) if dtype == "auto" else getattr(torch, dtype)
    # No CPU computes float16 well, and nothing here is measured for it.
    kind = torch.bfloat16 if kind == torch.float16 else kind
    tuned = measure(load_model(source, kind), again=again)
    if as_json:
        typer.echo(json.dumps(tuned.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console()
    for shape, times in tuned.shapes.items():
        console.print(_table(shape, times))
    typer.echo(f"{tuned.fresh} cells measured, the others known before: {tuned.file}")
    if tuned.disturbed:
        typer.echo(
            f"{tuned.disturbed} of them were disturbed and not kept: run it again when no other program computes"
        )


def _table(shape: str, times: "Times") -> "Table":
    """Microseconds by cell, the choice in bold."""
    from rich.box import SIMPLE
    from rich.table import Table

    from moesaic.experts.tuning import rank

    names = list(dict.fromkeys(name for row in times.values() for name in row))
    table = Table(title=f"microseconds a layer: {shape}", box=SIMPLE)
    for heading in ("tokens", "experts", *names):
        table.add_column(heading, justify="right", no_wrap=True)
    for (tokens, used), row in times.items():
        best = rank(row)[0]
        cells = [f"{row[name]:,.0f}" if name in row else "-" for name in names]
        shown = (f"[bold]{cell}[/bold]" if name == best else cell for name, cell in zip(names, cells, strict=True))
        table.add_row(str(tokens), str(used), *shown)
    table.caption = "bold: chosen, if its copies fit; a simpler way stays unless another is over 5 % faster"
    return table
