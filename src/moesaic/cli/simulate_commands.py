"""simulate, sweep: serving systems judged on a trace."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.simulate.sweep import Measured

TraceFile = Annotated[Path, typer.Argument(help="A trace: moesaic trace record, synth or replay makes one.")]
SystemName = Annotated[
    str,
    typer.Option(
        "--system",
        "-s",
        help="A preset (read-me, expertflow, exflow, deepspeed, tutel, duplex, sn40l-coe) or a YAML file.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the system: --set cache.capacity=8GiB --set batcher.kind=adaptive."),
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Cost the routes at the size of another model: llama-2-7b, mixtral-8x7b, ... or a config.json. "
        "Default: the traced model."
    ),
]
Head = Annotated[int | None, typer.Option(help="Take only the first requests.")]


# A sweep's numbers in the terminal, with short heads.
SHOWN = {"kept.own": "kept", "kept.oracle": "oracle", "stall_share": "stall", "ttft_p95_s": "TTFT p95"}
SHOWN |= {"normalised_mean_s": "s/token", "e2e_p95_s": "end p95"}


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(simulate)
    app.command()(sweep)


def simulate(
    trace: TraceFile,
    system: SystemName = "read-me",
    changes: Set = None,
    shape: Shape = None,
    head: Head = None,
    rate: Annotated[float, typer.Option(help="Arrivals this many times as fast as the trace's.")] = 1.0,
    bounds: Annotated[
        bool, typer.Option(help="Replay the run's cache accesses under LRU, random and the oracle.")
    ] = True,
    op_times: Annotated[
        Path | None,
        typer.Option(help="Measured operator times (Vidur's CSV of an FFN): the device runs at the rates found there."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Which GPU of --op-times.")] = "a100",
    calibration: options.Calibration = None,
    page_cache: options.PageCache = "keep",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.json, requests.csv, stages.csv and figures.")
    ] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Serve TRACE with a system on a modelled device and report hits, bytes, stalls and latencies.

    Example: moesaic simulate conv.trace --system read-me --set cache.capacity=0.5 --shape llama-2-7b
    """
    from moesaic.errors import MoesaicError
    from moesaic.progress import set_quiet
    from moesaic.simulate.assemble import assemble, machine_of
    from moesaic.simulate.output import save
    from moesaic.simulate.report import dumps, report
    from moesaic.simulate.stage_cost import calibrated
    from moesaic.simulate.system import read_system

    set_quiet(as_json)
    own = read_system(system, _changes(changes))
    if calibration is not None:
        if op_times is not None or shape is not None:
            raise MoesaicError("--calibration has the sizes and the seconds: leave --shape and --op-times out")
        simulator, device = _measured(_trace(trace, None, head, rate), own, seed, calibration, page_cache)
    else:
        machine = None if op_times is None else calibrated(machine_of(own), op_times, gpu)
        simulator, device = assemble(_trace(trace, shape, head, rate), own, seed, machine=machine), own.device
    begin = time.perf_counter()
    run = simulator.run(own.name)
    seconds = time.perf_counter() - begin
    result = report(simulator, run, own, seed, bounds=bounds)
    result["system"]["device"] = device
    files = [] if out is None else save(out, result, run)
    if as_json:
        typer.echo(dumps(result), nl=False)
        return
    _show(_summary(result))
    events = result["events"]["choices"]
    typer.echo(f"{events:,} choices of experts in {seconds:.1f} s: {events / seconds * 60:,.0f} a minute")
    if files:
        typer.echo(f"{', '.join(files)}: {out}")


def sweep(
    trace: TraceFile,
    system: SystemName = "read-me",
    axis: Annotated[
        list[str] | None,
        typer.Option(
            "--axis", "-a", help="key=value,value: a key of the system, seed, rate, or load (a share of saturation)."
        ),
    ] = None,
    changes: Set = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs, the table and the figures.")] = Path(
        "moesaic-sweep"
    ),
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time.")] = 2,
    calibration: options.Calibration = None,
    page_cache: options.PageCache = "keep",
    bounds: Annotated[bool, typer.Option(help="Replay every run under LRU, random and the oracle.")] = True,
    as_json: options.Json = False,
) -> None:
    """Run every combination of the axes on TRACE. Finished runs are not repeated when the command is given again.

    Example: moesaic sweep conv.trace -a cache.policy=lru,belady -a cache.capacity=0.3,0.5,0.7 -a load=0.8,1.2
    """
    from moesaic.progress import set_quiet
    from moesaic.simulate import sweep as runs
    from moesaic.simulate.output import save_table

    set_quiet(as_json)
    axes = runs.read_axes(axis or ["cache.policy=lru,belady", "cache.capacity=0.25,0.5,0.75,1.0"])
    fixed = {key: [value] for key, value in _changes(changes).items()}
    measured = None if calibration is None else measured_by(calibration, page_cache)
    results = runs.run_sweep(runs.Sweep(trace, system, {**fixed, **axes}, bounds, measured), out, jobs)
    files = save_table(results, out, " ".join(["moesaic", *sys.argv[1:]]))
    if as_json:
        typer.echo(json.dumps([{"cell": cell, "report": result} for cell, result in results]))
        return
    _show(_grid(results, list(axes)))
    typer.echo(f"{', '.join(files)}: {out}")


def measured_by(path: Path, page_cache: str) -> "Measured":
    """A calibration file to simulate with; says on stderr if it was measured elsewhere."""
    from moesaic.errors import MoesaicError
    from moesaic.simulate.sweep import Measured

    if page_cache not in ("keep", "drop"):
        raise MoesaicError(f"--page-cache {page_cache}: expected keep or drop")
    measured = Measured(path, page_cache)  # type: ignore[arg-type]
    if (differs := measured.calibration.elsewhere()) is not None:
        typer.secho(f"note: {differs}", fg="yellow", err=True)
    return measured


def _measured(trace: Any, own: Any, seed: int, path: Path, page_cache: str) -> tuple[Any, str]:
    """A simulator at measured costs, and the machine they are of; says on stderr what is not as it was measured."""
    from moesaic.simulate.calibration import simulator

    found = measured_by(path, page_cache).calibration
    if trace.card.model != found.card.model:
        text = f"note: routes of {trace.card.model}, sizes and seconds of {found.model.name} in {found.model.dtype}"
        typer.secho(text, fg="yellow", err=True)
    return simulator(trace, own, found, seed, page_cache), found.machine.cpu  # type: ignore[arg-type]


def _changes(given: list[str] | None) -> dict[str, Any]:
    from moesaic.errors import MoesaicError
    from moesaic.simulate.sweep import read_axes

    changes = read_axes(given or [])
    for key, values in changes.items():
        if len(values) > 1:
            raise MoesaicError(f"--set {key} takes one value; to compare several use moesaic sweep --axis")
    return {key: value for key, (value,) in changes.items()}


def _trace(path: Path, shape: str | None, head: int | None, rate: float) -> Any:
    from moesaic.schedule.trace import Trace
    from moesaic.simulate.models import at_size, find_shape

    trace = Trace.load(path)
    trace = trace if head is None else trace.head(head)
    trace = trace if shape is None else at_size(trace, find_shape(shape))
    return trace if rate == 1.0 else trace.scaled(rate)


def _summary(result: dict[str, Any]) -> "Table":
    """The report's main numbers, two columns."""
    from rich.table import Table

    table = Table(title=f"{result['system']['name']} on {result['system']['device']}", show_header=False)
    for name, text in _lines(result).items():
        table.add_row(name, text)
    return table


def _lines(result: dict[str, Any]) -> dict[str, str]:
    from moesaic.files import human_bytes
    from moesaic.plotting import duration, percent

    shares = [result[f"{part}_share"] for part in ("stall", "attention", "experts", "collective")]
    spread = ("mean", "p50", "p95", "p99")
    lines = {
        "requests, stages": f"{result['requests']:,}, {result['stages']:,}",
        "cache": f"{human_bytes(result['capacity_bytes'])} of {human_bytes(result['all_bytes'])}",
        "hit ratio: use, call, token, byte": ", ".join(f"{value:.3f}" for value in result["hit_ratio"].values()),
        "moved a token": human_bytes(result["bytes_per_token"]),
        "time: stall, attention, experts, collective": ", ".join(percent(share, 1) for share in shares),
        "experts, tokens a step": f"{result['experts_per_step']:.2f}, {result['tokens_per_step']:.1f}",
        "tokens/s, requests/s": ", ".join(f"{value:.4g}" for value in result["throughput"].values()),
        "busy: engine, link": ", ".join(percent(share, 1) for share in result["busy_share"].values()),
        "longest wait: admission, decode": ", ".join(duration(value) for value in result["longest_wait_s"].values()),
    }
    for name, values in result["latency_s"].items():
        lines[f"{name.replace('_', ' ')}: {', '.join(spread)}"] = ", ".join(duration(values[key]) for key in spread)
    if kept := result.get("kept_ratio"):
        lines["kept: own, LRU, random, oracle"] = ", ".join(
            f"{kept[name]:.3f}" for name in ("own", "lru", "random", "oracle")
        )
    return lines


def _grid(results: list[tuple[dict[str, Any], dict[str, Any]]], axes: list[str]) -> "Table":
    """One row a run: the axes and the few numbers a terminal has room for."""
    from rich.box import SIMPLE
    from rich.table import Table

    from moesaic.simulate.output import flat

    axes = [axis for axis in axes if len({str(cell[axis]) for cell, _ in results}) > 1]
    table = Table(title="seconds and shares; sweep.csv has every number", box=SIMPLE)
    for name in (*axes, *SHOWN.values()):
        table.add_column(name.split(".")[-1], justify="right")
    for cell, result in results:
        row = flat(result)
        table.add_row(*(str(cell[axis]) for axis in axes), *(f"{row[name]:.3g}" for name in SHOWN))
    return table


def _show(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)
