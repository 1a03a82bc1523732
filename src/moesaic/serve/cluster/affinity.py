"""Which replica a request goes to: where most of the bytes it calls for are in memory, unless others have less to do.

    score = share of the request's expert bytes that is there - open requests / requests that run at a time

Replicas report what they hold once a period. Between reports, experts of requests that were just sent count as there,
the newest first, as far as they fit: requests of one expert that arrive together go to one replica.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PERIOD_S = 1.0  # between reports
FRESH_S = 3 * PERIOD_S  # by then a report has shown what a request brought, or that it has left again


@dataclass(frozen=True)
class Holdings:
    """What a replica reports. Lists by expert, over all layers: its bytes, and the share of them that is in memory.

    capacity: bytes for resident experts. failed: it takes no requests; it is asked last.
    """

    bytes_E: Sequence[int] = ()
    share_E: Sequence[float] = ()
    capacity: int = 0
    failed: bool = False


@dataclass
class Sent:
    """What was sent to a replica: expert -> when last, oldest first."""

    experts: OrderedDict[int, float] = field(default_factory=OrderedDict)
    last_s: float = float("-inf")


class Affinity:
    """Ranks replicas; `slots`: requests that run at a time in each."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._sent: dict[str, Sent] = {}

    def ranked(
        self,
        wanted: Mapping[int, int],
        replicas: Mapping[str, Holdings],
        opened: Mapping[str, int],
        now: float,
    ) -> list[str]:
        """Replicas, the best first, for a request of `wanted` {expert: tokens}.

        Equal ones: the one with fewer open requests, then the one that was sent nothing for longest, so that experts
        that are nowhere spread.
        """
        self._sent = {name: sent for name, sent in self._sent.items() if name in replicas}

        def order(name: str) -> tuple[bool, float, int, float]:
            queue = opened.get(name, 0)
            score = self.share(wanted, name, replicas[name], now) - queue / self.slots
            return replicas[name].failed, -round(score, 6), queue, self._sent.get(name, Sent()).last_s

        return sorted(replicas, key=order)

    def sent(self, name: str, wanted: Mapping[int, int], now: float) -> None:
        """A request goes to a replica: its experts will be there, the one with most tokens longest."""
        sent = self._sent.setdefault(name, Sent())
        sent.last_s = now
        for expert in sorted(wanted, key=lambda expert: wanted[expert]):
            sent.experts[expert] = now
            sent.experts.move_to_end(expert)

    def share(self, wanted: Mapping[int, int], name: str, holdings: Holdings, now: float) -> float:
        """Of the bytes that the tokens call for, the share that is there; 0 where nothing is known."""
        known = {expert: tokens for expert, tokens in wanted.items() if expert < len(holdings.bytes_E)}
        called = {expert: tokens * holdings.bytes_E[expert] for expert, tokens in known.items()}
        fresh = self._fresh(name, holdings, now)
        there = sum(size * (1.0 if expert in fresh else holdings.share_E[expert]) for expert, size in called.items())
        total = sum(called.values())
        return there / total if total else 0.0

    def _fresh(self, name: str, holdings: Holdings, now: float) -> set[int]:
        """Experts that were sent since the report, as many as fit."""
        found: set[int] = set()
        taken = 0
        for expert, at in reversed(self._sent.get(name, Sent()).experts.items()):
            size = holdings.bytes_E[expert] if expert < len(holdings.bytes_E) else 0
            if now - at > FRESH_S or (taken := taken + size) > holdings.capacity:
                break
            found.add(expert)
        return found
