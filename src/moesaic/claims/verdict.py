"""From the numbers of all seeds to a verdict, with the reason in words.

A verdict is about this comparison at this size: it never says that a paper is right or wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moesaic.claims.claim import MIN_SEEDS, Check, Claim
from moesaic.errors import MissingExtraError, MoesaicError

Outcome = Literal["met", "undecided", "missed"]
Verdict = Literal["reproduced", "tie", "not reproduced"]


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95 % t-interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Judged:
    """One check against the numbers."""

    check: Check
    outcome: Outcome
    words: str


def t_interval(values: Sequence[float]) -> Interval:
    """Student's 95 % interval of the mean of at least two values."""
    if len(values) < 2:
        raise MoesaicError(f"an interval over {len(values)} seed(s): at least 2 are needed")
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingExtraError("scipy", "train") from error
    count, mean = len(values), math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def judge(check: Check, label: str, values: Sequence[float]) -> Judged:
    """Hold one check against one number per seed.

    Met: every seed and the whole interval lie on the wanted side. Missed: all of them lie on the other side.
    Undecided: the seeds disagree, or they agree and the interval still crosses the threshold.
    """
    interval = t_interval(values)
    good = [check.good(value) for value in values]
    all_good = [*good, check.good(interval.low), check.good(interval.high)]
    outcome: Outcome = "met" if all(all_good) else "undecided" if any(all_good) else "missed"
    crosses = check.good(interval.low) != check.good(interval.high)
    how = f"so in {sum(good)} of {len(good)} seeds{', and the interval crosses it' if crosses else ''}"
    return Judged(check, outcome, f"{label} is {interval}, wanted {check.words}: {how}")


def decide(claim: Claim, rows: Sequence[dict[str, float]]) -> tuple[Verdict, str, list[Judged]]:
    """Verdict, reason and checks from one row of measures per seed.

    All checks met: reproduced. One missed: not reproduced. Otherwise a tie.
    """
    if len(rows) < MIN_SEEDS:
        raise MoesaicError(f"{len(rows)} seed(s) of {claim.name!r}: a verdict needs at least {MIN_SEEDS}")
    judged = [judge(c, claim.measures[c.measure], [row[c.measure] for row in rows]) for c in claim.checks]
    missed = [item.words for item in judged if item.outcome == "missed"]
    undecided = [item.words for item in judged if item.outcome == "undecided"]
    if missed:
        return "not reproduced", "; ".join(missed), judged
    if undecided:
        return "tie", "; ".join(undecided), judged
    return "reproduced", "; ".join(item.words for item in judged), judged
