"""One small language model under many routers: the same text, seeds, tokens and, as far as a router allows, size.

    OUT/runs/ROUTER-seedN/      a checkpoint, its metrics and its log, see `routed_training`
        compare.json, compare.md, compare.png

A pool of E experts of width H with k of them active is the common budget; `recipe` says how each router spends it, and
the table shows what is left of the difference. Runs that are finished are not repeated.
"""

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.analyze.routed_training import RoutedTraining, tokenizer_source, train_routed
from moesaic.data.sources import load_domains
from moesaic.data.tokens import tokenize_domains
from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.files import atomic_write_json, atomic_write_text, storage_errors
from moesaic.models.loading import load_tokenizer
from moesaic.progress import Progress
from moesaic.routing.family import router_class
from moesaic.routing.fine_grained import segment

DENSE = "dense"  # the control: one expert as wide as the k active ones, for every token
INK, QUIET, REFERENCE, OTHER = "#1a1a1a", "#5f5f5f", "#D55E00", "#0072B2"  # the latter two: Okabe and Ito


def recipe(name: str, base: RoutedTraining, k: int = 2) -> RoutedTraining:
    """How router `name` spends the budget of `base`: `experts` E of width `hidden` H, `k` of them active.

    Raises MoesaicError for an unknown router, one that is not causal, or a budget that it cannot spend.
    """
    experts, hidden = base.experts, base.hidden or 0
    if hidden < 1 or not 1 <= k <= experts:
        raise MoesaicError(f"{k} of {experts} experts of width {hidden}: give a width and a k from 1 to {experts}")
    if name == DENSE:
        single = {"name": "top-k", "k": 1}
        return replace(base, router=single, experts=1, hidden=k * hidden, losses={}, balance={})
    router_class(name)
    changes: dict[str, Any] = {"router": {"name": name, "k": k}}
    if name == "top-p":  # as many experts as it likes: no k
        changes = {"router": name}
    elif name == "recurrent":
        changes["router"] |= {"state_width": 64}
    elif name in ("frozen-random", "embedding-random"):
        changes["router"] |= {"k_min": 1}
    elif name == "zero-computation":
        free = {"zero": 1, "copy": 1, "constant": max(experts // 4 - 2, 1)}
        changes |= {"free": free, "balance": {"tau": 0.75, **base.balance}}
    elif name == "fine-grained":
        if hidden % 2:
            raise MoesaicError(f"fine-grained halves the experts, but their width is {hidden}; make it even")
        routed, routed_k = segment(experts, k, granularity=2, shared=1)
        changes = {"router": {"name": name, "k": routed_k}, "experts": routed, "hidden": hidden // 2, "shared": 1}
    elif name == "random":  # one expert per token, as wide as the k others
        token = {"name": name, "eval_draw": "token"}
        changes = {"router": token, "experts": max(1, experts // k), "hidden": k * hidden}
    elif name == "big-small":  # one expert of twice the active width, used by half of the tokens, or nothing
        changes = {"router": {"name": name, "budget": 0.5}, "experts": 1, "hidden": 2 * k * hidden, "free": {"zero": 1}}
    return replace(base, **changes)


def compare(
    routers: Sequence[str],
    base: RoutedTraining,
    out: str | os.PathLike[str],
    *,
    k: int = 2,
    seeds: int = 1,
    restart: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train `base` under every router and seed, and write the comparison; returns what compare.json holds.

    seeds:      base.seed and the following ones; all routers get the same.
    command:    what to print as the way to repeat it.

    Differences are to the first router. Raises MoesaicError before any training where a router cannot be compared.
    """
    if not routers or seeds < 1 or len(set(routers)) < len(routers):
        raise MoesaicError(f"{list(routers)} with {seeds} seeds: give distinct routers and at least one seed")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MoesaicError("a comparison runs in one process; use torchrun for a single `moesaic train`")
    out = Path(out)
    configs = {name: recipe(name, base, k) for name in routers}
    tokenizer = load_tokenizer(tokenizer_source(base))
    domains = tokenize_domains(load_domains(base.domains, base.max_bytes), tokenizer)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in routers}
    with Progress("compare", total=len(routers) * seeds, unit="runs") as progress:
        for seed in range(base.seed, base.seed + seeds):
            for name, config in configs.items():
                folder = out / "runs" / f"{name}-seed{seed}"
                metrics = train_routed(replace(config, seed=seed), folder, domains=domains, restart=restart)
                assert metrics is not None
                runs[name].append(metrics)
                progress.advance(router=name, loss=metrics["measured"]["loss"])
    result = summary(runs, command)
    atomic_write_json(out / "compare.json", result)
    try:
        draw(result, out / "compare.png")
        result["picture"] = "compare.png"
    except MissingExtraError:
        result["picture"] = None
    atomic_write_json(out / "compare.json", result)
    atomic_write_text(out / "compare.md", markdown(result))
    return result


# -- numbers -------------------------------------------------------------------------------------------------------
def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Column of the summary -> its value in a run's measurements; None where the router has none.
Measured = Mapping[str, Any]
COLUMNS: dict[str, Callable[[Measured], float | None]] = {
    "loss": lambda m: m["loss"],
    "parameters": lambda m: m["parameters"],
    "active_parameters": lambda m: m["active_parameters"],
    "expert_flops": lambda m: m["expert_flops_per_token"],
    "experts_per_token": lambda m: _mean(m["experts_per_token"]),
    "load_entropy": lambda m: _mean(m["load_entropy"]),
    "router_entropy": lambda m: None if m["router_entropy"] is None else _mean(m["router_entropy"]),
    "domain_nmi": lambda m: _mean(m["domain_nmi"]),
    "layers_information": lambda m: _mean(shared) if (shared := m["adjacent_layers_information"]) else None,
    "tokens_per_second": lambda m: m["tokens_per_second"],
}


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]], command: str = "") -> dict[str, Any]:
    """Per router the mean of every column over seeds, with the sample standard deviation and seed by seed.

    `difference` is that of the loss to the first router, paired by seed.
    """
    reference = [run["measured"]["loss"] for run in next(iter(runs.values()))]
    rows = {}
    for name, found in runs.items():
        measured = [run["measured"] for run in found]
        row: dict[str, Any] = {}
        for column, read in COLUMNS.items():
            values = [value for m in measured if (value := read(m)) is not None]
            row[column] = _spread(values) if values else None
        row["difference"] = _spread([m["loss"] - other for m, other in zip(measured, reference, strict=True)])
        row["loss_by_domain"] = {d: _mean([m["loss_by_domain"][d] for m in measured]) for d in measured[0]["windows"]}
        row["experts"] = found[0]["measured"]["experts"]
        rows[name] = row
    first = next(iter(runs.values()))[0]
    config = first["settings"]["config"]
    kept = ("model", "domains", "steps", "batch_size", "length", "lr", "optimizer", "schedule", "warmup", "windows")
    return {
        "format": 1,
        "command": command,
        "reference": next(iter(runs)),
        "seeds": [run["settings"]["config"]["seed"] for run in next(iter(runs.values()))],
        "tokens": first["training"]["tokens"],
        "settings": {name: config[name] for name in kept} | {"domains": list(first["measured"]["windows"])},
        "environment": first["environment"],
        "routers": rows,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": _mean(values), "deviation": deviation, "seeds": list(values)}


# -- words ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Table:
    """Columns and cells as text; the first column is the router."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What a router learnt at which size, what it does, and the loss by domain; `notes` explains the columns."""
    routers, domains = result["routers"], result["settings"]["domains"]
    size = ["router", "loss", "difference", "params", "active", "expert FLOPs"]
    routes = ["router", "experts", "load H", "router H", "domain NMI", "layer MI", "tokens/s"]
    return [
        Table("Loss and size", size, [_size(name, result) for name in routers]),
        Table("Routes", routes, [_routes(name, row) for name, row in routers.items()]),
        Table(
            "Loss by domain",
            ["router", *domains],
            [[name, *(f"{row['loss_by_domain'][domain]:.3f}" for domain in domains)] for name, row in routers.items()],
        ),
    ]


def _size(name: str, result: Mapping[str, Any]) -> list[str]:
    """Sizes of the reference in millions, of the others as a difference to it."""
    row, reference = result["routers"][name], result["routers"][result["reference"]]
    cells = [name, _with_deviation(row["loss"]), "–" if row is reference else _with_deviation(row["difference"], "+")]
    for column in ("parameters", "active_parameters", "expert_flops"):
        value, base = row[column]["mean"], reference[column]["mean"]
        cells.append(f"{value / 1e6:.2f} M" if row is reference else f"{100 * (value / base - 1):+.1f} %")
    return cells


def _routes(name: str, row: Mapping[str, Any]) -> list[str]:
    digits = {"experts_per_token": 2, "load_entropy": 2, "router_entropy": 2, "domain_nmi": 3, "layers_information": 2}
    cells = ["–" if row[column] is None else f"{row[column]['mean']:.{n}f}" for column, n in digits.items()]
    cells[1] += f"/{math.log(row['experts']):.2f}"
    return [name, *cells, f"{row['tokens_per_second']['mean']:,.0f}"]


def _with_deviation(spread: Mapping[str, Any], sign: str = "") -> str:
    deviation = "" if spread["deviation"] is None else f"±{spread['deviation']:.3f}"
    return f"{spread['mean']:{sign}.3f}{deviation}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the columns mean and how much they carry, one sentence or two each."""
    seeds = len(result["seeds"])
    spread = "± is the sample standard deviation over seeds." if seeds > 1 else "One seed: the spread is unknown."
    caution = "" if seeds >= 3 else " With fewer than three seeds no difference is claimed."
    return [
        f"loss: held-out nats per token, mean over {len(result['settings']['domains'])} domains; difference: to "
        f"{result['reference']}, paired by seed. {spread}{caution}",
        "active: parameters that a token uses on average. expert FLOPs: per token, of experts alone (shared ones "
        "included, free ones nothing). Percentages: more or less than the reference.",
        "experts: used per token. load H: entropy of their load / its largest value; router H: of a token's scores. "
        "domain NMI: normalised mutual information of expert and domain; layer MI: of the first choices in adjacent "
        "layers. In nats, means over layers, Miller-Madow corrected except router H.",
        "tokens/s: full forwards in batches; a small model's depends on the machine's other work more than on the "
        "router. random trains with two forwards per step (consistency loss), the others with one.",
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """compare.md: the command, the settings, the tables, and what they mean."""
    settings, environment = result["settings"], result["environment"]
    lines = ["# Routers compared", "", *(["```", result["command"], "```", ""] if result["command"] else [])]
    lines.append(
        f"{result['tokens']:,} tokens each ({settings['steps']} steps of {settings['batch_size']} x "
        f"{settings['length']}), {settings['optimizer']}, peak rate {settings['lr']}; model {settings['model']}; seeds "
        f"{result['seeds']}; {environment['device']}, {environment['threads']} thread(s), torch {environment['torch']}."
    )
    for grid in tables(result):
        rule = ["---", *("---:" for _ in grid.columns[1:])]
        rows = ["| " + " | ".join(cells) + " |" for cells in (grid.columns, rule, *grid.rows)]
        lines += ["", f"## {grid.title}", "", *rows]
    lines += ["", *(f"- {note}" for note in notes(result))]
    if result.get("picture"):
        lines += ["", f"![every router in every column]({result['picture']})"]
    return "\n".join(lines) + "\n"


# -- picture -------------------------------------------------------------------------------------------------------
PANELS = {
    "loss": ("Held-out loss", "nats per token", 1.0),
    "expert_flops": ("Expert FLOPs", "millions per token", 1e6),
    "experts_per_token": ("Experts per token", "", 1.0),
    "domain_nmi": ("Expert and domain", "NMI", 1.0),
    "layers_information": ("Adjacent layers", "mutual information, nats", 1.0),
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One row per router, best loss first, one panel per measure; small dots are seeds, the large one their mean.

    Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    names = sorted(result["routers"], key=lambda name: result["routers"][name]["loss"]["mean"])
    look = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": QUIET}
    with style.context(["default", look]):
        figure = Figure(figsize=(12.5, 1.7 + 0.34 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True, gridspec_kw={"width_ratios": [1.7, 1, 1, 1, 1]})
        for axes, (column, (title, unit, scale)) in zip(panels, PANELS.items(), strict=True):
            _panel(axes, [result["routers"][name][column] for name in names], names, result["reference"], scale)
            axes.set_title(title, loc="left", size=9.5, weight="bold")
            axes.set_xlabel(unit)
            if column != "loss":
                axes.axvline(0, color="#c8c8c8", linewidth=1, zorder=0)  # the zero is in view
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        seeds = len(result["seeds"])
        figure.suptitle(
            f"Lowest held-out loss: {names[0]}; highest: {names[-1]}. {result['tokens']:,} tokens each, {seeds} "
            f"seed{'s' * (seeds > 1)} (small dots); diamond: the reference, {result['reference']}",
            x=0.01, ha="left", size=11, weight="bold",
        )  # fmt: skip
        with storage_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            figure.savefig(Path(folder) / path.name, dpi=150, format="png", metadata={"Software": None})
            os.replace(Path(folder) / path.name, path)


def _panel(
    axes: Any, spreads: Sequence[Mapping[str, Any] | None], names: Sequence[str], reference: str, scale: float
) -> None:
    for y, (spread, name) in enumerate(zip(spreads, names, strict=True)):
        if spread is None:
            continue
        colour, marker = (REFERENCE, "D") if name == reference else (OTHER, "o")
        seeds = [value / scale for value in spread["seeds"]]
        axes.plot(seeds, [y] * len(seeds), "o", color=colour, alpha=0.45, markersize=3.5, markeredgewidth=0)
        axes.plot([spread["mean"] / scale], [y], marker, color=colour, markersize=7)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
