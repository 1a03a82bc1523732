"""How the engine's memory is shared at run time: keys and values take what requests need, experts have the rest."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemorySplit:
    """Bytes. pool: shared by experts and keys. least: experts never have less. all_experts: they never want more.

    fixed: experts have exactly this much, None = what keys leave, in steps of `grain`: a capacity that changed with
    every request would only cost evictions.
    """

    budget: int
    dense: int
    buffers: int
    least: int
    all_experts: int
    fixed: int | None = None

    @property
    def pool(self) -> int:
        """What experts and keys share."""
        return self.budget - self.dense - self.buffers

    @property
    def grain(self) -> int:
        """The steps in which memory moves between keys and experts."""
        return max(self.pool // 64, 1)

    @property
    def most_kv(self) -> int:
        """What running requests may take together."""
        return self.pool - (self.least if self.fixed is None else self.fixed)

    def for_experts(self, taken: int) -> int:
        """The capacity of experts while keys take `taken`."""
        if self.fixed is not None:
            return self.fixed
        return max(self.least, min(self.all_experts, (self.pool - taken) // self.grain * self.grain))

    def for_packs(self, taken: int) -> int:
        """What is left for packed copies of hot experts, once every expert is in memory."""
        return max(0, self.pool - taken - (self.all_experts if self.fixed is None else self.fixed))

    def prefixes_until(self, running: int) -> int:
        """Up to which bytes prefixes may stay beside the keys of running requests: only what experts leave."""
        wanted = self.all_experts if self.fixed is None else self.fixed
        return min(max(running, self.pool - wanted), max(self.most_kv, running))
