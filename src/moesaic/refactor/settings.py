"""Everything that decides the numbers of a refactoring run, in one place."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from moesaic.errors import MoesaicError
from moesaic.refactor.extract import Keep, keep_per_layer
from moesaic.refactor.heal import HealConfig
from moesaic.refactor.profile import Importance


@dataclass(frozen=True, kw_only=True)
class RefactorConfig:
    """Settings of all stages; `HealConfig` holds those of the pre-gate and healing."""

    keep: Keep = 0.5  # share of FFN channels per expert: one number, or one per layer
    importance: Importance = "contribution"  # or "magnitude", the paper's
    untied: bool = False  # every expert its own copy of its channels
    experts: int | None = None  # None: one per domain; a number: ignore the labels and cluster sequences
    profile_tokens: int = 65_536  # per domain
    heal: HealConfig = field(default_factory=HealConfig)
    control: bool = True  # heal the pruned control too, on the same tokens
    windows: int = 24  # held-out windows per domain in the receipts
    speed: bool = True  # measure speed in the receipts

    def check(self, layers: int, domains: int) -> None:
        """Raises MoesaicError for settings that cannot be met by this model and these domains."""
        keep_per_layer(self.keep, layers)
        if self.importance not in get_args(Importance):
            raise MoesaicError(f"importance = {self.importance!r}: expected one of {', '.join(get_args(Importance))}")
        for name in ("profile_tokens", "windows"):
            if getattr(self, name) < 1:
                raise MoesaicError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.experts is None and domains < 2:
            raise MoesaicError("one domain gives one expert: name at least two domains, or cluster with experts=N")
        if self.experts is not None and self.experts < 2:
            raise MoesaicError(f"experts = {self.experts}: a mixture needs at least 2")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        row = asdict(self)
        row["keep"] = list(self.keep) if isinstance(self.keep, Sequence) else self.keep
        return row
