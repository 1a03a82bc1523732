"""What a claim is: a paper's headline, the comparison that stands for it here, and the thresholds that decide."""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moesaic.claims import papers
from moesaic.errors import MoesaicError

if TYPE_CHECKING:
    from moesaic.data.domain import Domain

MIN_SEEDS = 3


@dataclass(frozen=True)
class Check:
    """One threshold: `measure` must lie above or below a bound."""

    measure: str
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise MoesaicError(f"check of {self.measure!r}: give either above or below")

    @property
    def bound(self) -> float:
        """The threshold itself."""
        return self.above if self.above is not None else self.below  # type: ignore[return-value]

    def good(self, value: float) -> bool:
        """Whether one number lies strictly on the wanted side."""
        return value > self.bound if self.above is not None else value < self.bound

    @property
    def words(self) -> str:
        """The wish: `above 0`."""
        return f"{'above' if self.above is not None else 'below'} {self.bound:g}"


class Run(Protocol):
    """The experiment of one seed: numbers by name, for method and baselines alike.

    `scale` shrinks steps and evaluation (tests use a tiny one); equal arguments give equal numbers.
    """

    def __call__(self, seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's headline and how it is tried here.

    measures:   every name that `run` returns, in words.
    files:      the package's files under test, relative to src/moesaic; a change in them makes stored results stale.
    minutes:    expected for one seed on one thread.
    text:       whether it reads text; claims that make their own data get none.
    """

    name: str
    paper: str
    arxiv: str
    headline: str
    compares: str
    budgets: str
    measures: Mapping[str, str]
    checks: tuple[Check, ...]
    files: tuple[str, ...]
    minutes: float
    run: Run
    text: bool = True

    def __post_init__(self) -> None:
        if unknown := [check.measure for check in self.checks if check.measure not in self.measures]:
            raise MoesaicError(f"claim {self.name!r} checks {unknown[0]!r}, which is none of its measures")


def claim_names() -> list[str]:
    """Names of all claims, sorted; a file `frozen_random.py` is the claim `frozen-random`."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(papers.__path__))


def find_claim(name: str) -> Claim:
    """The claim called `name`; raises MoesaicError with the nearest name if there is none."""
    names = claim_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MoesaicError(f"unknown claim {name!r}: {hint}expected one of {', '.join(names)}")
    claim: Claim = importlib.import_module(f"moesaic.claims.papers.{name.replace('-', '_')}").CLAIM
    assert claim.name == name, f"{name}'s file defines the claim {claim.name!r}"
    return claim
