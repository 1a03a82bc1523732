"""claims: papers' headlines, tried at toy size."""

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options

claims = typer.Typer(no_args_is_help=True, help="Papers' headlines, tried at toy size over several seeds.")


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.add_typer(claims, name="claims")


@claims.command("list")
def list_(as_json: options.Json = False) -> None:
    """Every claim, its paper, and how long a seed takes."""
    from moesaic.claims.claim import claim_names, find_claim

    found = [find_claim(name) for name in claim_names()]
    if as_json:
        rows = [{"name": c.name, "paper": c.paper, "arxiv": c.arxiv, "minutes": c.minutes} for c in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    for claim in found:
        typer.echo(f"{claim.name:18s} {claim.arxiv:11s} {claim.minutes:4.1f} min/seed  {claim.paper}")


@claims.command()
def show(name: Annotated[str, typer.Argument(help="A claim's name.")], as_json: options.Json = False) -> None:
    """What claim NAME compares, at which budgets, and what decides."""
    from moesaic.claims.claim import find_claim

    claim = find_claim(name)
    row = {key: getattr(claim, key) for key in ("name", "paper", "arxiv", "headline", "compares", "budgets", "minutes")}
    wanted = [f"{claim.measures[check.measure]}: {check.words}" for check in claim.checks]
    if as_json:
        typer.echo(json.dumps({**row, "measures": dict(claim.measures), "checks": wanted}, indent=2))
        return
    for key, value in row.items():
        _paragraph(key, str(value))
    for line in wanted:
        _paragraph("wanted", line)


@claims.command()
def run(
    name: Annotated[str | None, typer.Argument(help="A claim's name; or --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every claim.")] = False,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1, at least three.")] = 3,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Labelled text: an installed kind, name=path or name=hf:dataset. Default: the installed six."
        ),
    ] = None,
    as_json: options.Json = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write or extend this page (.md).")] = None,
    work: Annotated[Path, typer.Option(help="Where finished seeds are kept.")] = Path("runs/claims"),
    scale: Annotated[float, typer.Option(help="Share of the full budget, for a trial.")] = 1.0,
    restart: Annotated[bool, typer.Option("--restart", help="Run finished seeds again.")] = False,
) -> None:
    """Run a claim, or all, and print the verdicts. Run again to continue: finished seeds are kept."""
    from moesaic.claims.claim import claim_names, find_claim
    from moesaic.claims.runner import Settings
    from moesaic.errors import MoesaicError
    from moesaic.progress import set_quiet

    if (name is None) != every:
        raise MoesaicError("name one claim, or give --all; `moesaic claims list` shows them")
    found = [find_claim(each) for each in (claim_names() if name is None else [name])]
    if data and not any(claim.text for claim in found):
        raise MoesaicError(f"claim {name!r} makes its own data; drop --data")
    if out is not None and out.suffix != ".md":
        raise MoesaicError(f"--out {out}: expected a page ending in .md")
    specs = options.domain_specs(data)
    settings = Settings(seeds=seeds, scale=scale, work=work, restart=restart, specs=tuple(specs or ()))
    set_quiet(as_json)
    results = _run(found, specs, settings, out, as_json)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


def _run(found: list[Any], specs: list[str] | None, settings: Any, out: Path | None, quiet: bool) -> list[Any]:
    from moesaic.claims.page import write_page
    from moesaic.claims.runner import MAX_BYTES, run_claim
    from moesaic.data import load_domains

    domains = load_domains(specs, MAX_BYTES) if any(claim.text for claim in found) else []
    results = []
    for claim in found:
        results.append(run_claim(claim, domains if claim.text else [], settings))
        if out is not None:
            write_page(out, results)
        if not quiet:
            _paragraph(claim.name, f"{results[-1]['verdict'].upper()}. {results[-1]['reason']}")
    return results


def _paragraph(key: str, text: str) -> None:
    indent = " " * 19
    typer.echo(textwrap.fill(text, 110, initial_indent=f"{key:18s} ", subsequent_indent=indent))
