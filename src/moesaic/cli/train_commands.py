"""train, compare: language models under any router of the family."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(train)
    app.command()(compare)


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; examples/ has two.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the checkpoint. Default: the file's name.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an earlier run in --out.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train a model under the router, pool and losses that CONFIG describes, and measure its routes.

    An interrupted run continues where it stopped when the same command is given again. Under torchrun the batches are
    split over the processes.

    Example: moesaic train examples/train_top_p.toml --out top-p
    """
    from moesaic.analyze.routed_training import read_config, train_routed
    from moesaic.progress import set_quiet

    set_quiet(as_json)
    folder = Path(config.stem) if out is None else out
    metrics = train_routed(read_config(config), folder, restart=restart)
    if metrics is None:
        return  # a torchrun process that is not the first
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    _show(_run_tables(metrics))
    typer.echo(f"checkpoint and metrics.json: {folder}")


def compare(
    routers: Annotated[
        str, typer.Option(help="Comma-separated names; the first is the reference, dense is a control.")
    ] = "top-k,recurrent,top-p,fine-grained,zero-computation,random,frozen-random,dense",
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="Domains, as everywhere. Default: the six installed kinds.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 200,
    seeds: Annotated[int, typer.Option(help="Runs of each router; a difference needs three.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the comparison.")] = Path(
        "moesaic-compare"
    ),
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    width: Annotated[int, typer.Option(help="Hidden size of the model.")] = 128,
    experts: Annotated[int, typer.Option(help="Experts E of the common budget.")] = 8,
    expert_width: Annotated[int, typer.Option(help="Width H of each.")] = 128,
    k: Annotated[int, typer.Option(help="How many of them a token may use.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    balance_scope: Annotated[str, typer.Option(help="Load balance over: micro, sequence or global.")] = "micro",
    windows: Annotated[int, typer.Option(help="Held-out windows per domain.")] = 24,
    max_bytes: options.MaxBytes = 1_000_000,
    seed: options.Seed = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier runs in --out.")] = False,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Train the same small model under several routers on the same tokens, and compare what they learnt.

    Sizes follow one budget of parameters and FLOPs as far as a router allows; the table shows the difference. Finished
    runs are not repeated when the command is given again.

    Example: moesaic compare --routers top-k,recurrent,top-p --data python,prose --steps 100 --seeds 3
    """
    from moesaic.analyze import compare as analysis
    from moesaic.analyze.routed_training import RoutedTraining
    from moesaic.progress import set_quiet

    set_quiet(as_json)
    heads = max(1, width // 32)
    base = RoutedTraining(
        model={"layers": layers, "hidden": width, "heads": heads, "ffn": expert_width},
        experts=experts,
        hidden=expert_width,
        balance={"scope": balance_scope},
        domains=options.domain_specs(data),
        max_bytes=max_bytes,
        steps=steps,
        batch_size=batch_size,
        length=length,
        lr=lr,
        windows=windows,
        seed=seed,
    )
    names = options.domain_specs([routers]) or []
    command = " ".join(["moesaic", *sys.argv[1:]])
    result = analysis.compare(names, base, out, k=k, seeds=seeds, restart=restart, command=command)
    if as_json:
        typer.echo(json.dumps(result))
        return
    _show([_table(grid.title, grid.columns, grid.rows) for grid in analysis.tables(result)])
    for note in analysis.notes(result):
        typer.echo(note)
    typer.echo(f"compare.json, compare.md{', compare.png' if result['picture'] else ''}: {out}")


def _run_tables(metrics: dict[str, Any]) -> "list[Table]":
    measured = metrics["measured"]
    experts = measured["experts_per_token_by_domain"]
    rows = [
        [name, f"{loss:.4f}", f"{measured['bits_per_byte'][name]:.4f}", f"{experts[name]:.2f}"]
        for name, loss in measured["loss_by_domain"].items()
    ]
    by_domain = _table("Held-out text", ["domain", "nats/token", "bits/byte", "experts"], rows)
    entropy, shared = measured["router_entropy"], measured["adjacent_layers_information"]
    rows = [
        [str(layer), f"{measured['experts_per_token'][layer]:.2f}", f"{measured['load_entropy'][layer]:.3f}",
         f"{measured['largest_load'][layer]:.3f}", "–" if entropy is None else f"{entropy[layer]:.3f}",
         f"{measured['domain_nmi'][layer]:.3f}", f"{shared[layer]:.3f}" if layer < len(shared) else "–"]
        for layer in range(len(measured["load"]))
    ]  # fmt: skip
    columns = ["layer", "experts", "load H", "largest load", "router H", "domain NMI", "MI with next"]
    cost = (
        f"{measured['parameters'] / 1e6:.2f} M parameters, {measured['active_parameters'] / 1e6:.2f} M active; "
        f"{measured['expert_flops_per_token'] / 1e6:.2f} M expert FLOPs per token; "
        f"{measured['tokens_per_second']:,.0f} tokens/s"
    )
    return [by_domain, _table(f"Routes ({cost})", columns, rows)]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _show(tables: "list[Table]") -> None:
    from rich.console import Console

    console = Console()
    for grid in tables:
        console.print(grid)
