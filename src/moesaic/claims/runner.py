"""Run a claim over its seeds; finished seeds are kept and not run again.

WORK/NAME-FINGERPRINT/seed-S.json holds one seed. The fingerprint covers the claim's code and settings (its file up to
`CLAIM = `), what claims share, the package's files under test, the scale, the data and torch's version: change one and
the old results are not found. Words and thresholds in `CLAIM` decide no number and may change.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import MIN_SEEDS, Claim
from moesaic.claims.verdict import decide, t_interval
from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json, clean_leftovers

if TYPE_CHECKING:
    from moesaic.data.domain import Domain

PACKAGE = Path(__file__).parent.parent
SHARED = ("claims/tiny_lm.py",)  # what decides the numbers of several claims
MAX_BYTES = 200_000  # of text per domain


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How claims are run: the seeds are 0 .. seeds - 1. `specs` is only quoted in the command that made the numbers."""

    seeds: int = MIN_SEEDS
    scale: float = 1.0
    work: Path = Path("runs/claims")
    restart: bool = False
    specs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds < MIN_SEEDS:
            raise MoesaicError(f"--seeds {self.seeds}: a difference is claimed over at least {MIN_SEEDS} seeds")
        if not 0 < self.scale <= 1:
            raise MoesaicError(f"scale = {self.scale}: expected a share of the full budget, above 0 and at most 1")


def fingerprint(claim: Claim, data: Sequence["Domain"], scale: float) -> str:
    """Changes with everything that decides the numbers of a seed; see the module."""
    import torch

    digest = hashlib.sha256(repr((claim.name, scale, torch.__version__)).encode())
    own = (PACKAGE / f"claims/papers/{claim.name.replace('-', '_')}.py").read_text(encoding="utf-8")
    digest.update(deciding(own).encode())
    for name in (*SHARED, *claim.files):
        digest.update((PACKAGE / name).read_bytes())
    for domain in data if claim.text else ():
        digest.update(repr((domain.name, domain.train, domain.validation)).encode())
    return digest.hexdigest()[:16]


def deciding(source: str) -> str:
    """The part of a claim's file that decides its numbers: everything before `CLAIM = `."""
    return source.partition("\nCLAIM = ")[0]


def run_claim(claim: Claim, data: Sequence["Domain"], settings: Settings | None = None) -> dict[str, Any]:
    """Every seed that has no result yet, then the verdict over all of them; JSON (see `summary`).

    data:   labelled texts, empty for claims that make their own.

    Raises MoesaicError if a seed's result is damaged, or is not finite.
    """
    settings = settings or Settings()
    if claim.text and not data:
        raise MoesaicError(f"claim {claim.name!r} needs labelled text")
    print_ = fingerprint(claim, data, settings.scale)
    folder = settings.work / f"{claim.name}-{print_}"
    if folder.exists():
        clean_leftovers(folder)
    rows = []
    for seed in range(settings.seeds):
        path = folder / f"seed-{seed}.json"
        row = None if settings.restart else stored(path, claim, seed, print_)
        if row is None:
            row = {"claim": claim.name, "seed": seed, "fingerprint": print_, **run_seed(claim, seed, data, settings)}
            atomic_write_json(path, row)
        rows.append(row)
    return summary(claim, rows, data, settings)


def stored(path: Path, claim: Claim, seed: int, print_: str) -> dict[str, Any] | None:
    """The kept result of a seed, None if there is none.

    Raises MoesaicError if the file is damaged or belongs to another run: it is never taken for a result.
    """
    if not path.exists():
        return None
    try:
        row = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        raise MoesaicError(f"{path} is damaged; delete it, or run with --restart") from None
    if (row.get("claim"), row.get("seed"), row.get("fingerprint")) != (claim.name, seed, print_):
        raise MoesaicError(
            f"{path} was made with other settings, data or code than now (fingerprint {row.get('fingerprint')}, "
            f"expected {print_}); delete it, or run with --restart"
        )
    return row


def run_seed(claim: Claim, seed: int, data: Sequence["Domain"], settings: Settings) -> dict[str, Any]:
    """The measures of one seed and the seconds it took; the global generator is as before afterwards."""
    import torch

    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        measures = claim.run(seed, data, settings.scale)
    if set(measures) != set(claim.measures):
        wrong = sorted(set(measures) ^ set(claim.measures))
        raise MoesaicError(f"claim {claim.name!r} declares and returns different measures: {', '.join(wrong)}")
    if bad := [name for name, value in measures.items() if not math.isfinite(value)]:
        raise MoesaicError(f"claim {claim.name!r}, seed {seed}: {bad[0]} is {measures[bad[0]]}; nothing was kept")
    return {"measures": {k: float(v) for k, v in measures.items()}, "seconds": time.perf_counter() - begin}


def command(claim: Claim, settings: Settings) -> str:
    """What to type for the same numbers."""
    data = [f"--data {spec}" for spec in settings.specs if claim.text]
    scale = [] if settings.scale == 1 else [f"--scale {settings.scale:g}"]
    return " ".join([f"moesaic claims run {claim.name} --seeds {settings.seeds}", *data, *scale])


def summary(
    claim: Claim, rows: Sequence[dict[str, Any]], data: Sequence["Domain"], settings: Settings
) -> dict[str, Any]:
    """Everything a reader needs to judge the verdict, as JSON."""
    import torch

    numbers = [row["measures"] for row in rows]
    verdict, reason, judged = decide(claim, numbers)
    measures = {}
    for name, words in claim.measures.items():
        values = [row[name] for row in numbers]
        measures[name] = {"words": words, **asdict(t_interval(values)), "values": values}
    return {
        **{key: getattr(claim, key) for key in ("name", "paper", "arxiv", "headline", "compares", "budgets")},
        "files": list(claim.files),
        "verdict": verdict,
        "reason": reason,
        "checks": [{"outcome": item.outcome, "words": item.words} for item in judged],
        "measures": measures,
        "command": command(claim, settings),
        "seeds": settings.seeds,
        "scale": settings.scale,
        "seconds": [row["seconds"] for row in rows],
        "data": {domain.name: domain.bytes for domain in data} if claim.text else "made by the claim itself",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}",
        "fingerprint": rows[0]["fingerprint"],
    }
