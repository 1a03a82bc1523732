"""replay: a recorded arrival process at a live server, beside the simulator's word on it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from rich.table import Table


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(replay)


def replay(
    trace: Annotated[Path, typer.Argument(help="A trace: moesaic trace record, synth or replay makes one.")],
    url: Annotated[str, typer.Option(help="The server, as moesaic serve prints it.")] = "http://127.0.0.1:8000",
    model: Annotated[
        Path | None, typer.Option(help="The served folder: its tokenizer cuts --prompts to exact token counts.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with id and text: what is asked. Default: the trace's own prompts.")
    ] = None,
    head: Annotated[int | None, typer.Option(help="Take only the first requests.")] = None,
    rate: Annotated[float, typer.Option(help="Arrivals this many times as fast as the trace's.")] = 1.0,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.", envvar="MOESAIC_API_KEY")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a single request may take.")] = 600.0,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="Simulate the trace with this system too and show both.")
    ] = None,
    calibration: options.Calibration = None,
    page_cache: options.PageCache = "keep",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report as JSON.")] = None,
    as_json: options.Json = False,
) -> None:
    """Fire TRACE's requests at a server when the trace says so, and report latencies, hits and bytes.

    Example: moesaic replay conv.trace --url http://127.0.0.1:8000 --model ./moe --prompts texts.jsonl --rate 2
    """
    from moesaic.errors import MoesaicError
    from moesaic.files import atomic_write_json
    from moesaic.progress import set_quiet
    from moesaic.schedule.trace import Trace
    from moesaic.serve.extra import needed
    from moesaic.simulate.system import read_system

    needed("httpx")
    from moesaic.serve.replay import Target, prompts_for, report
    from moesaic.serve.replay import replay as run

    set_quiet(as_json)
    if not rate > 0:
        raise MoesaicError(f"--rate {rate}: expected a number above 0")
    if system is not None:
        read_system(system)  # an unknown one is found before the server is asked, not after
    own = Trace.load(trace)
    own = own if head is None else own.head(head)
    measured = _measured(own, system, calibration, page_cache)
    outcome = run(own, prompts_for(own, _texts(own, model, prompts)), Target(url, api_key, rate, timeout))
    result = report(outcome)
    if out is not None:
        atomic_write_json(out, result)
    whole = not outcome.interrupted and outcome.lost is None
    if system is not None and whole:
        result["simulated"] = _simulated(own, system, rate, measured)
    if out is not None:
        atomic_write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from rich.console import Console

        Console().print(_table(result))
    if not whole:
        raise typer.Exit(130 if outcome.interrupted else 1)


def _texts(trace: Any, model: Path | None, prompts: Path | None) -> list[list[int]]:
    """Token ids to ask with: a file's texts, or the prompts that the trace was recorded with."""
    from moesaic.errors import MoesaicError

    if prompts is not None:
        if model is None:
            raise MoesaicError("--prompts needs --model: its tokenizer turns texts into tokens")
        from moesaic.analyze.route_recording import read_prompts
        from moesaic.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
        return [list(tokenizer(prompt.text).input_ids) for prompt in read_prompts(prompts)]
    if trace.token_ids is None:
        raise MoesaicError("the trace holds no token ids: give texts with --prompts FILE --model FOLDER")
    rows = zip(trace.prompt_row.tolist(), trace.prompt_rows.tolist(), strict=True)
    return [trace.token_ids[row : row + count].tolist() for row, count in rows]


def _measured(trace: Any, system: str | None, calibration: Path | None, page_cache: str) -> Any:
    """The calibration to simulate with, None without; what cannot be is found before the server is asked."""
    from moesaic.cli.simulate_commands import measured_by
    from moesaic.errors import MoesaicError

    if calibration is None:
        return None
    if system is None:
        raise MoesaicError("--calibration is for the simulated system: name one with --system, such as moesaic")
    measured = measured_by(calibration, page_cache)
    measured.calibration.sized(trace)
    return measured


def _simulated(trace: Any, system: str, rate: float, measured: Any) -> dict[str, Any]:
    from moesaic.simulate.sweep import simulate
    from moesaic.simulate.system import read_system

    own = trace if rate == 1.0 else trace.scaled(rate)
    return simulate(own, read_system(system), bounds=False, measured=measured)


def _table(result: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title=f"{result['finished']} of {result['requests']} requests finished")
    table.add_column("")
    table.add_column("live", justify="right")
    simulated = result.get("simulated")
    if simulated:
        table.add_column("simulated", justify="right")
        table.add_column("ratio", justify="right")
    for name, path in ROWS.items():
        live = _at(result, path)
        cells = [_number(live)]
        if simulated:
            there = _at(simulated, path)
            cells += [_number(there), _number(live / there) if live is not None and there else ""]
        table.add_row(name, *cells)
    for kind, count in result["errors"].items():
        table.add_row(f"failed: {kind}", str(count))
    if result["interrupted"]:
        table.caption = f"interrupted after {result['sent']} requests were sent"
    elif result["server_lost"]:
        table.caption = result["server_lost"]
    if result["refused"]:
        table.add_row("429, tried again", str(result["refused"]))
    return table


ROWS = {
    "steps": "stages",
    "hit ratio (use)": "hit_ratio.use",
    "moved bytes": "moved_bytes",
    "stall share": "stall_share",
    "overhead share": "overhead_share",
    "experts per step": "experts_per_step",
    "sent late, most, s": "sent_late_s",
    "tokens/s": "throughput.tokens_per_s",
    "TTFT mean, s": "latency_s.ttft.mean",
    "TTFT p95, s": "latency_s.ttft.p95",
    "TPOT mean, s": "latency_s.tpot.mean",
    "TPOT p95, s": "latency_s.tpot.p95",
    "end to end mean, s": "latency_s.end_to_end.mean",
    "end to end p95, s": "latency_s.end_to_end.p95",
    "normalised mean, s/token": "latency_s.normalised.mean",
    "normalised p95, s/token": "latency_s.normalised.p95",
}


def _at(result: dict[str, Any], path: str) -> float | None:
    value: Any = result
    for name in path.split("."):
        if name not in value:
            return None
        value = value[name]
    return float(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
