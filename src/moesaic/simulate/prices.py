"""What a batcher may ask of the machine before it decides: seconds of fetching, reading and running."""

from moesaic.schedule.cost import move_time
from moesaic.schedule.residency import Residency
from moesaic.schedule.topology import Link
from moesaic.schedule.work import Call, Key
from moesaic.simulate.stage_cost import StageCost, StageLoad

TOKENS = 256  # a stage on which the price of a further token is read off


class Prices:
    """`schedule.batch_by_expert.Prices` of a simulated machine.

    A live engine measures the same numbers; here they are read off the cost model for a stage of one decode token and
    one of 256, at a context of `context` tokens.
    """

    def __init__(self, residency: Residency, cost: StageCost, link: Link, layers: int, context: int = 512) -> None:
        self.residency, self.cost, self.link = residency, cost, link
        self.overlap = residency.lookahead > 0

        def stage(tokens: int) -> float:
            load = StageLoad(0, tokens, 0, tokens * context, 0, tokens)
            return cost.attention(load) * layers + cost.ends(load)

        self.stage_s = stage(1)
        self.token_s = (stage(TOKENS) - self.stage_s) / (TOKENS - 1)
        self._fetch: dict[int, float] = {}
        self._read: dict[int, float] = {}

    @property
    def complete(self) -> bool:
        """Whether every entry is there."""
        return self.residency.complete

    def fetch_s(self, key: Key) -> float:
        """Seconds on the link for an entry that is not there, 0 for one that is or is on its way."""
        if key in self.residency:
            return 0.0
        size = self.residency.layout.bytes[key]
        if size not in self._fetch:
            self._fetch[size] = move_time(self.link, size)
        return self._fetch[size]

    def read_s(self, key: Key) -> float:
        """Seconds of the entry for one token."""
        size = self.residency.layout.bytes[key]
        if size not in self._read:
            call = Call(key.layer, key.unit, 1, (key,))
            self._read[size] = self.cost.experts((call,), StageLoad(0, 1, 0, 1, 0, 1)).experts_s
        return self._read[size]
