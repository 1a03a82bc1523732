"""Expert placement by affinity: is the optimum found, how far is it from proven bounds, how much faster than a solver?

    python benchmarks/affinity.py --out benchmarks/results/affinity.json

Made traces with sharp transitions between layers; half of the tokens are fitted, half scored. "search" is
`affinity_assign.assign` without its exact shortcut, "optimum" the exact chain solver where it can run, "HiGHS" the
integer programme under a time limit, "bound" the best proven lower bound there is. Ratios are of seconds in this run.
"""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json
from moesaic.progress import track
from moesaic.refactor.receipts import environment
from moesaic.schedule import affinity
from moesaic.schedule.affinity_assign import assign
from moesaic.schedule.affinity_bounds import lower_bound
from moesaic.schedule.affinity_exact import Solved, solvable, solve_chain, solve_integer
from moesaic.schedule.synthetic import Synthetic, synthesize

CASES = ((3, 6, 3), (4, 8, 4), (6, 8, 4), (12, 8, 4), (12, 8, 2), (6, 16, 4), (12, 16, 8), (24, 64, 8))  # L, E, P
LARGEST = 200_000  # constraints of the programme that are still tried


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return run(), time.perf_counter() - begin


def integer_programme(counts: affinity.Counts, devices: int, limit: float) -> Solved | None:
    """HiGHS' placement; None where the programme is too large to build or nothing was found in time."""
    if counts.size * devices > LARGEST:
        return None
    try:
        return solve_integer(counts, devices, limit)
    except MoesaicError:
        return None


def case(layers: int, experts: int, devices: int, seed: int, limit: float) -> dict[str, Any]:
    """Costs as shares of the transitions that change device, and seconds."""
    options = Synthetic(requests=100, prompt=100, prompt_sigma=0, output=1, output_sigma=0, layers=layers, seed=seed)
    options = Synthetic(**{**vars(options), "route_layers": layers, "experts": experts, "stay": 0.0, "sharpness": 0.1})
    routes = synthesize(options).routes
    fit, held_out = (affinity.transitions(part, experts) for part in (routes[::2], routes[1::2]))
    total = fit.sum()
    places, seconds = timed(lambda: assign(fit, devices, seed=seed, exact=False))
    found = affinity.cost(fit, places)
    row: dict[str, Any] = {"case": f"L{layers} E{experts} P{devices}", "seed": seed}
    row["contiguous"] = affinity.crossing(held_out, affinity.contiguous(layers, experts, devices))
    row["search held out"] = affinity.crossing(held_out, places)
    row["search"], row["search_s"] = found / total, seconds
    optimum, exact_s = timed(lambda: solve_chain(fit, devices)) if solvable(experts, devices) else (None, math.nan)
    row["optimum"], row["exact_s"] = (optimum.cost / total if optimum else math.nan), exact_s
    integer, row["highs_s"] = timed(lambda: integer_programme(fit, devices, limit))
    row["HiGHS"] = integer.cost / total if integer else math.nan
    row["HiGHS proved"] = bool(integer and integer.proven)
    bound = optimum.cost if optimum else max(lower_bound(fit, devices), integer.bound if integer else 0.0)
    row["over bound"] = found / bound - 1 if bound else 0.0
    row["faster"] = row["highs_s"] / seconds if integer else math.nan
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Medians over seeds."""
    table = Table(title="placement by affinity, medians over seeds")
    columns = [name for name in rows[0] if name != "seed"]
    for name in columns:
        table.add_column(name, justify="right")
    for name in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == name]
        table.add_row(name, *(f"{statistics.median(row[column] for row in own):.4g}" for column in columns[1:]))
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of the solver in each case")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = [(*each, seed) for each in CASES for seed in range(args.seeds)]
    rows = [case(*each, args.limit) for each in track(work, "affinity", unit="cases")]
    show(rows)
    if args.out:
        clean = [{key: None if value != value else value for key, value in row.items()} for row in rows]
        command = shlex.join(["python", *sys.argv])
        atomic_write_json(args.out, {"command": command, "environment": environment(), "cases": clean})


if __name__ == "__main__":
    main()
