"""demo, refactor, profile: from a dense model to a refactored one with receipts."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from moesaic.refactor.pipeline import Refactoring
    from moesaic.refactor.settings import RefactorConfig


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(demo)
    app.command()(refactor)
    app.command()(profile)


def demo(
    out: options.Out = Path("moesaic-demo"),
    tokens: Annotated[int, typer.Option(help="Healing tokens.")] = 180_000,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an earlier run in --out.")] = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Refactor the pocket model on text this machine already has; ends with the receipt and four pictures.

    Takes minutes on two CPU cores and needs no network. Run again to continue an interrupted demo.
    """
    from moesaic.refactor.heal import HealConfig
    from moesaic.refactor.settings import RefactorConfig

    config = RefactorConfig(profile_tokens=32_768, windows=16, heal=HealConfig(tokens=tokens, seed=seed))
    _run("pocket", None, out, config, max_bytes=2_000_000, restart=restart, as_json=as_json)
    if not as_json:
        typer.echo(f"\nTry it:  moesaic inspect 'def area(r): return 3.14 * r ** 2' --model {out}")


def refactor(
    model: options.Model,
    out: options.Out,
    domains: options.Domains = None,
    keep: Annotated[str, typer.Option(help="Share of FFN channels per expert, one number or one per layer.")] = "0.5",
    importance: Annotated[str, typer.Option(help="contribution, or magnitude (the paper's).")] = "contribution",
    experts: Annotated[int | None, typer.Option(help="Ignore labels; cluster into this many experts.")] = None,
    untied: Annotated[bool, typer.Option("--untied", help="Every expert its own copy of its channels.")] = False,
    tokens: Annotated[int, typer.Option(help="Healing tokens.")] = 400_000,
    rounds: Annotated[int, typer.Option(help="Rounds of router and expert training.")] = 2,
    distillation: Annotated[float, typer.Option(help="Weight of KL(dense || refactored); the paper: 0.")] = 1.0,
    length: Annotated[int, typer.Option(help="Sequence length.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    until: Annotated[str, typer.Option(help="Last stage: profile, extract, pregate, heal or receipts.")] = "receipts",
    max_bytes: options.MaxBytes = 4_000_000,
    seed: options.Seed = 0,
    control: Annotated[bool, typer.Option(help="Also heal the pruned control of the same size.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure speed for the receipt.")] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an earlier run in --out.")] = False,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Refactor MODEL into a pre-gated mixture of experts, heal it, and write receipts.

    Stages: profile, extract, pregate, heal, receipts. An interrupted run continues where it stopped when the same
    command is given again.

    Example: moesaic refactor ./llama-1b --out ./moe -d code=./src -d web=hf:allenai/c4:en -d math=./gsm.jsonl
    """
    from moesaic.refactor.heal import HealConfig
    from moesaic.refactor.settings import RefactorConfig

    heal = HealConfig(
        tokens=tokens, rounds=rounds, distillation=distillation, length=length, batch_size=batch_size, seed=seed
    )
    config = RefactorConfig(
        keep=options.keep_value(keep),
        importance=importance,  # type: ignore[arg-type]
        experts=experts,
        untied=untied,
        heal=heal,
        control=control,
        speed=speed,
    )
    _run(
        model,
        options.domain_specs(domains),
        out,
        config,
        max_bytes=max_bytes,
        restart=restart,
        as_json=as_json,
        until=until,
    )


def profile(
    model: options.Model,
    out: options.Out,
    domains: options.Domains = None,
    max_bytes: options.MaxBytes = 4_000_000,
    as_json: options.Json = False,
) -> None:
    """Only the first stage: which FFN channels each domain uses, with a coverage report."""
    from moesaic.refactor.settings import RefactorConfig

    run = _prepare(model, options.domain_specs(domains), out, RefactorConfig(), max_bytes, False, as_json)
    coverage = run.profile.coverage()
    typer.echo(json.dumps(coverage, indent=2) if as_json else _coverage_text(coverage))


def _coverage_text(coverage: dict[str, Any]) -> str:
    lines = [f"{name:16s} {count:10,d} tokens" for name, count in coverage["tokens"].items()]
    lines.append(f"channels that never fired, per layer: {coverage['never_active_channels']}")
    return "\n".join(lines + [f"warning: {text}" for text in coverage["warnings"]])


def _prepare(
    model: str,
    domains: list[str] | None,
    out: Path,
    config: "RefactorConfig",
    max_bytes: int,
    restart: bool,
    quiet: bool,
) -> "Refactoring":
    from moesaic.progress import set_quiet
    from moesaic.refactor.api import prepare

    set_quiet(quiet)
    return prepare(options.model_source(model), domains, out=out, config=config, max_bytes=max_bytes, restart=restart)


def _run(
    model: str,
    domains: list[str] | None,
    out: Path,
    config: "RefactorConfig",
    *,
    max_bytes: int,
    restart: bool,
    as_json: bool,
    until: str = "receipts",
) -> None:
    run = _prepare(model, domains, out, config, max_bytes, restart, as_json)
    receipt = run.run(until)
    if as_json:
        typer.echo(json.dumps(receipt))
        return
    if receipt is None:
        typer.echo(f"stage {until} is done; its result is in {run.work}")
        return
    from rich.console import Console

    from moesaic.refactor.terminal import receipt_tables

    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in receipt_tables(receipt):
        console.print(table)
    folder = out / "receipts"
    console.print(f"\nCheckpoint: {out}\nReceipt:    {folder / 'receipt.md'}", highlight=False)
    for name in receipt.get("pictures", []):
        console.print(f"Picture:    {folder / name}", highlight=False)
