"""The page of all claims, written from their summaries; the summaries are kept beside it, so that pages can grow."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json, atomic_write_text

HEAD = """# Claims

Each paper's headline, tried at toy size on a CPU against a baseline. Written by `moesaic claims run`, do not edit.

"Reproduced" means: this comparison, at this size, lay on the stated side of every threshold, in every seed and with its
whole interval. "Not reproduced": every seed and the interval lay on the other side of one. Otherwise it is a tie: the
seeds disagree, or are too few. None of these says anything about the paper's own sizes, or that a paper is right or
wrong.
Losses are nats per token; intervals are 95 % t-intervals over seeds.
"""


def write_page(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the page `path` (.md) and `path` with .json; claims that are there already and were not run now are kept.

    Raises MoesaicError if the kept results are damaged.
    """
    kept = path.with_suffix(".json")
    known: dict[str, Mapping[str, Any]] = {}
    if kept.exists():
        try:
            known = {row["name"]: row for row in json.loads(kept.read_text(encoding="utf-8"))}
        except (ValueError, KeyError, TypeError):
            raise MoesaicError(f"{kept} is damaged; delete it to write the page anew") from None
    known.update({row["name"]: row for row in results})
    rows = [known[name] for name in sorted(known)]
    atomic_write_json(kept, rows)
    atomic_write_text(path, page(rows))


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table of verdicts, then one section per claim."""
    lines = [HEAD, "| claim | paper | verdict | seeds | wall seconds per seed |", "|---|---|---|---|---|"]
    for row in rows:
        paper = f"{row['paper']} ([{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']}))"
        seconds = sum(row["seconds"]) / len(row["seconds"])
        lines.append(
            f"| [{row['name']}](#{row['name']}) | {paper} | **{row['verdict']}** | {row['seeds']} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n" + "".join(section(row) for row in rows)


def section(row: Mapping[str, Any]) -> str:
    """One claim with its numbers."""
    data = row["data"]
    if isinstance(data, Mapping):
        data = ", ".join(f"{name} {count / 1000:.0f} kB" for name, count in data.items())
    scale = "" if row["scale"] == 1 else f" Scale {row['scale']:g} of the full budget: a trial, not a result."
    lines = [
        f"\n## {row['name']}\n",
        f"{row['paper']}, arXiv {row['arxiv']}. {row['headline']}\n",
        f"- Compared here: {row['compares']}",
        f"- Budgets: {row['budgets']}",
        f"- Code under test: {', '.join(f'`{name}`' for name in row['files'])}",
        f"- Command: `{row['command']}`, seeds 0 to {row['seeds'] - 1}; {row['machine']}.{scale}",
        f"- Data: {data}\n",
        f"**{row['verdict'].capitalize()}**:\n",
        *(f"- {check['outcome']}: {check['words']}" for check in row["checks"]),
        "\n| measure | mean [95 %] | each seed |",
        "|---|---|---|",
    ]
    for item in row["measures"].values():
        interval = f"{item['mean']:.4g} [{item['low']:.4g}, {item['high']:.4g}]"
        each = ", ".join(f"{value:.4g}" for value in item["values"])
        lines.append(f"| {item['words']} | {interval} | {each} |")
    return "\n".join(lines) + "\n"
