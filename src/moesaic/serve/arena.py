"""Virtual memory whose pages exist only where something was written: budgets without copying, paging without a table.

A large range is reserved once and costs nothing. Writing makes pages; `release` gives them back to the system. So an
expert's rows keep their place in one contiguous matrix however often they leave and return, and a request's keys grow
in one contiguous slot.
"""

import math
import mmap
import sys
import warnings

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class Arena:
    """`size` bytes of zeroed address space. Not thread-safe where ranges overlap."""

    def __init__(self, size: int) -> None:
        self.size = -(-max(size, 1) // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, self.size, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would outlive the small range that is released
        self._bytes = memoryview(self._map)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch remarks on buffers that cannot be written; ours can
            self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def bytes(self, start: int, stop: int) -> memoryview:
        """The range, to be filled."""
        return self._bytes[start:stop]

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of the range that begins at `start`; its strides are those of a contiguous tensor."""
        return self._tensor[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def release(self, start: int, stop: int) -> None:
        """Give back the whole pages inside the range; they read as zero until they are written again."""
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class DeviceRange:
    """`size` zeroed bytes on a device, which has no virtual memory that torch gives out: they exist as long as this."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = -(-max(size, 1) // PAGE) * PAGE
        self._tensor = torch.zeros(self.size, dtype=torch.uint8, device=device)

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of the range that begins at `start`, contiguous."""
        return self._tensor[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def release(self, start: int, stop: int) -> None:
        """Nothing: what is written next overwrites it."""


def resident_bytes() -> int:
    """Bytes of this process that are in memory now, shared libraries included."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:  # not Linux
        import resource  # the most it ever had: the nearest that the standard library knows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
