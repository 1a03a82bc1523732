"""What stages cost on this machine, measured while it serves: the numbers an adaptive batcher decides by."""

import time

import torch

from moesaic.schedule.residency import Residency
from moesaic.schedule.work import Key
from moesaic.serve.store import ExpertStore

FORGET = 0.98  # weight of the past at each step: about the last fifty count
DISK = 1e9  # bytes a second, before the first read has been timed
LEAST = 1e-5  # seconds of a stage: waits are weighed against it


class LivePrices:
    """`schedule.batch_by_expert.Prices` of the running engine: seconds = stage_s + tokens * token_s, fitted to steps.

    Read and fetched bytes are priced at the measured rates of memory and of the store's reads.
    """

    def __init__(self, residency: Residency, store: ExpertStore, device: torch.device) -> None:
        self.residency, self.store = residency, store
        self.overlap = residency.lookahead > 0
        self.stage_s, self.token_s = 2e-3, 2e-4  # before the first steps: a guess that they soon outweigh
        self.memory_rate = memory_rate(device)
        self._sums = [0.0] * 5  # weight, tokens, seconds, tokens^2, tokens * seconds

    @property
    def complete(self) -> bool:
        """Whether every entry is there."""
        return self.store.complete

    def fetch_s(self, key: Key) -> float:
        """Seconds to read an entry that is not there."""
        return 0.0 if key in self.residency else self.residency.layout.bytes[key] / (self.store.bytes_s or DISK)

    def read_s(self, key: Key) -> float:
        """Seconds to read the entry from memory."""
        return self.residency.layout.bytes[key] / self.memory_rate

    def step(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` tokens took `seconds` without stalls and without reading experts' weights."""
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [FORGET * old + one for old, one in zip(self._sums, new, strict=True)]
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        if spread > 1e-9 * weight * xx:
            self.token_s = max((weight * xy - x * y) / spread, 0.0)
            self.stage_s = max((y - self.token_s * x) / weight, LEAST)
        else:  # steps of one size only: all of it is the stage's
            self.stage_s = max((y - self.token_s * x) / weight, LEAST)


def memory_rate(device: torch.device, size: int = 32 << 20) -> float:
    """Bytes a second of reading the device's memory, the best of three passes over `size` bytes."""
    data = torch.ones(size // 4, device=device)
    best = min(_seconds(data) for _ in range(3))
    return size / best


def _seconds(data: torch.Tensor) -> float:
    begin = time.perf_counter()
    float(data.sum())  # waits for it
    return time.perf_counter() - begin
