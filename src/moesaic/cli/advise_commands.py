"""advise: which methods help a model on a machine, each judged by a simulator run on a trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(advise)


def advise(
    model: Annotated[
        str,
        typer.Argument(
            help="[bold]trace[/bold] (the traced model), a checkpoint folder, a config.json, or a size: mixtral-8x7b, "
            "llama-2-7b, ..."
        ),
    ],
    trace: Annotated[
        Path | None, typer.Option(help="The requests and their routes: moesaic trace record, synth or replay.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Fast memory of a device for backbone, keys and values, and experts: 8GiB.")
    ] = None,
    link: Annotated[str | None, typer.Option(help="From slow to fast memory: 25GB/s.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Preset whose memory and link these replace. Default: a100-pcie; 2x8-a100-ib for several."),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="How many of the device; default: the preset's.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a stage.")] = 512,
    max_requests: Annotated[int, typer.Option(help="Requests that run at once: their keys and values need room.")] = 64,
    slo: Annotated[
        float | None, typer.Option(help="Seconds 95 % of the requests may take: what meets it is ranked by bytes.")
    ] = None,
    events: Annotated[int, typer.Option(help="Expert calls to run for each option: the first requests.")] = 100_000,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Propose methods for MODEL on a machine by rules over what is measured; rank them by simulated runs of a trace.

    Example: moesaic advise trace --memory 8GiB --link 25GB/s --trace conv.trace
    """
    from moesaic.errors import MoesaicError
    from moesaic.progress import set_quiet
    from moesaic.schedule.trace import Trace
    from moesaic.simulate.advise import advise as run
    from moesaic.simulate.advise_facts import Ask
    from moesaic.simulate.report import dumps
    from moesaic.simulate.simulator import Limits

    if trace is None:
        raise MoesaicError(
            "advise needs --trace: options are ranked by runs of it. Record one with `moesaic trace record MODEL "
            "--prompts P.jsonl --out X.trace`, or make one up with `moesaic trace synth --out X.trace`"
        )
    set_quiet(as_json)
    ask = Ask(device, memory, link, devices, Limits(max_tokens, max_requests), slo, events, seed)
    answer = run(Trace.load(trace), ask, model)
    typer.echo(dumps(answer), nl=False) if as_json else _show(answer)


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for line in _head(answer):
        typer.echo(line)
    if answer["ranked"]:
        console.print(_table(answer))
    else:
        typer.echo("nothing that the simulator can run: see the reasons below")
    for rank, row in enumerate(answer["ranked"], 1):
        typer.echo(
            f"{rank}. {row['id']} ({row['rule']}, {row['level']}, {row['paper']}): {row['what']}. {row['reason']}"
        )
    if answer["listed"]:
        typer.echo("\nNot run, so not ranked:")
    for row in answer["listed"]:
        typer.echo(f"-  {row['id']} ({row['rule']}, {row['level']}, {row['paper']}): {row['reason']}. {row['why_not']}")
    for line in _bounds(answer):
        typer.echo(line)


def _head(answer: dict[str, Any]) -> list[str]:
    """Model, machine, memory."""
    from moesaic.files import human_bytes
    from moesaic.simulate.advise_facts import rate

    machine, size = answer["machine"], answer["bytes"]
    parts = (("backbone", "backbone"), ("keys and values", "kv"), ("experts", "held"))
    needs = ", ".join(f"{words} {human_bytes(size[f'{name}_bytes'])}" for words, name in parts)
    verdict = "fits" if size["fits"] else "does not fit"
    return [
        f"{answer['model']} on {machine['devices']} x {machine['device']}, link {rate(machine['link_bytes_per_s'])}",
        f"memory of a device {human_bytes(machine['memory_bytes'])}, needed {human_bytes(size['need_bytes'])}: "
        f"{verdict} ({needs})",
        f"trace: first {answer['trace']['requests']:,} of {answer['trace']['of']:,} requests",
    ]


def _table(answer: dict[str, Any]) -> "Table":
    """One row an option, best first."""
    from rich import box
    from rich.table import Table

    from moesaic.files import human_bytes

    order = "p95 end to end" if answer["slo_s"] is None else f"p95 within {answer['slo_s']:g} s, then moved bytes"
    table = Table(
        title=f"by {order}; * changes what the model says", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    table.add_column("option", min_width=20)
    for name in ("p95", "TTFT p95", "TPOT", "tokens/s", "moved/token", "stall"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, row in enumerate(answer["ranked"], 1):
        result = row["result"]
        table.add_row(
            f"{rank}. {row['id']}" + ("" if row["changes_output"] == "no" else " *"),
            *(_seconds(result[name]) for name in ("e2e_p95_s", "ttft_p95_s", "tpot_mean_s")),
            f"{result['tokens_per_s']:.1f}",
            human_bytes(result["bytes_per_token"]),
            f"{result['stall_share']:.1%}",
        )
    return table


def _bounds(answer: dict[str, Any]) -> list[str]:
    """What binds the plain run and the best one."""
    from moesaic.simulate.advise_facts import rate

    runs = {"without any method": answer["plain_run"], "with the first": None}
    if answer["ranked"]:
        runs["with the first"] = answer["ranked"][0]["result"]
    lines = []
    for (words, numbers), verdict in zip(runs.items(), answer["bound"].values(), strict=True):
        if numbers is not None:
            lines.append(
                f"binds {words}: {verdict} (link {rate(numbers['link_needed'])} needed so that nothing waits, "
                f"{rate(numbers['link_there'])} there; engine works {numbers['busy_share']:.0%} of the time, exchange "
                f"{numbers['collective_share']:.0%} of its time)"
            )
    return lines


def _seconds(value: float) -> str:
    """1.24 s, 3.1 ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
