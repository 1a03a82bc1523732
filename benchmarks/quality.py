"""Quality over seeds, recipes and learning rates: refactored models, the dense source, the healed pruned control.

    python benchmarks/quality.py --out benchmarks/results/quality.json                  # 3 seeds, default recipe
    python benchmarks/quality.py --sweep recipes --seeds 1 --out benchmarks/results/recipes.json
    python benchmarks/quality.py --sweep rates --seeds 1 --out benchmarks/results/rates.json

Every run is a complete `refactor` (profile, extract, pregate, heal, control, receipts) that continues where it stopped.
Intervals are 95 % Student t over seeds.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic import HealConfig, RefactorConfig, pocket_path
from moesaic.claims.verdict import t_interval
from moesaic.refactor.api import prepare
from moesaic.refactor.receipts import environment

DEFAULT = RefactorConfig(speed=False)


def healed(config: RefactorConfig = DEFAULT, **changes: Any) -> RefactorConfig:
    """`config` with other healing settings."""
    return dataclasses.replace(config, heal=dataclasses.replace(config.heal, **changes))


MAGNITUDE = dataclasses.replace(DEFAULT, importance="magnitude")
SWEEPS = {
    "default": {"ours": DEFAULT},
    "recipes": {
        "paper: |a|, no distillation": healed(MAGNITUDE, distillation=0.0),
        "|a| x column norm, no distillation": healed(distillation=0.0),
        "|a|, distillation": MAGNITUDE,
        "ours: |a| x column norm, distillation": DEFAULT,
    },
    "rates": {f"expert lr {lr:g}": healed(expert_lr=lr) for lr in (1e-4, 2e-4, 4e-4, 8e-4)},
}


def run(config: RefactorConfig, model: str, domains: list[str] | None, out: Path, max_bytes: int) -> dict[str, Any]:
    """One complete refactoring; returns its receipt, from disk if it is there."""
    path = out / "receipts" / "receipt.json"
    if path.exists():
        return json.loads(path.read_text())
    receipt = prepare(model, domains, out=out, config=config, max_bytes=max_bytes).run()
    assert receipt is not None
    return receipt


def interval(values: list[float]) -> list[float]:
    """Mean and 95 % t-interval; the interval is the mean itself for one value."""
    if len(values) < 2:
        return [values[0]] * 3
    result = t_interval(values)
    return [result.mean, result.low, result.high]


def summarise(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the targets ask for, over the seeds of one recipe."""
    average = {
        name: interval([r["quality"]["average"][name] for r in receipts]) for name in receipts[0]["quality"]["nats"]
    }

    def difference(a: str, b: str) -> list[float]:
        return interval([r["quality"]["average"][a] - r["quality"]["average"][b] for r in receipts])

    domains = receipts[0]["quality"]["domains"]
    by_domain = {
        name: interval([r["quality"]["nats"]["pruned"][i] - r["quality"]["nats"]["moe"][i] for r in receipts])
        for i, name in enumerate(domains)
    }
    gaps = [r["quality"]["gap_share"] for r in receipts if r["quality"]["gap_share"] is not None]
    return {
        "seeds": len(receipts),
        "average_nats": average,
        "moe_minus_oracle": difference("moe", "oracle"),
        "random_minus_moe": difference("random", "moe"),
        "pruned_minus_moe": difference("pruned", "moe"),
        "pruned_minus_moe_by_domain": by_domain,
        "better_domains": sum(value[0] > 0 for value in by_domain.values()),
        "domains": len(domains),
        "gap_share": interval(gaps) if gaps else None,
        "stay_probability": interval([r["router"]["stay_probability"] for r in receipts]),
        "label_accuracy": interval([r["router"]["label_accuracy"] for r in receipts]),
        "agreement": interval([r["quality"]["agreement"]["moe"] for r in receipts]),
        "bytes_ratio": receipts[0]["bytes"]["ratio"],
    }


def show(console: Console, results: dict[str, dict[str, Any]]) -> None:
    """One row a recipe."""
    table = Table(
        "recipe",
        "dense",
        "moe",
        "pruned",
        "moe - oracle",
        "random - moe",
        "pruned - moe [95 %]",
        "better in",
        "gap share",
    )
    for name, row in results.items():
        mean = {key: value[0] for key, value in row["average_nats"].items()}
        low, high = row["pruned_minus_moe"][1:]
        table.add_row(
            name,
            *(f"{mean[key]:.3f}" for key in ("dense", "moe", "pruned")),
            f"{row['moe_minus_oracle'][0]:+.4f}",
            f"{row['random_minus_moe'][0]:+.3f}",
            f"{row['pruned_minus_moe'][0]:+.4f} [{low:+.4f}, {high:+.4f}]",
            f"{row['better_domains']}/{row['domains']}",
            "-" if row["gap_share"] is None else f"{row['gap_share'][0]:.2f}",
        )
    console.print(table)


def main() -> None:
    """Run, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(pocket_path()))
    parser.add_argument("--domains", nargs="*", help="default: the six installed ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", choices=list(SWEEPS), default="default", help="what to compare")
    parser.add_argument("--tokens", type=int, default=HealConfig.tokens)
    parser.add_argument("--max-bytes", type=int, default=4_000_000)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = {}
    for name, config in SWEEPS[args.sweep].items():
        receipts = []
        for seed in range(args.seeds):
            folder = args.work / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}"
            seeded = healed(config, seed=seed, tokens=args.tokens)
            receipts.append(run(seeded, args.model, args.domains, folder, args.max_bytes))
        results[name] = summarise(receipts)
        show(Console(width=160), results)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        "healing_tokens": args.tokens,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
