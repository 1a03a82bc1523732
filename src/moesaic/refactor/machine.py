"""What this machine can do at best: bytes it can read and GEMM work it can do per second, measured in two seconds.

A speed in tokens/s says little on another computer; its share of these two limits does (Williams et al., "Roofline",
2009).
"""

import contextlib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

BIG_ARRAY = (2**28, 2**30)  # bytes, least and most: has to be far larger than any cache, yet fit a small machine
UNKNOWN_CACHE = 2**25  # bytes, where the system does not tell the size of its last-level cache
GEMM_SIZES = {True: (128, 1024), False: (1024, 8192)}  # is a CPU: a trial size, and one that reaches the peak
ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
SECONDS_EACH = 0.2  # spent repeating each measurement; the fastest repeat counts, the others were disturbed


@dataclass(frozen=True)
class Machine:
    """Measured limits of one device. GB is 1e9 bytes, GFLOP 1e9 multiplications or additions."""

    device: str  # "cpu", "cuda", ...
    name: str
    threads: int
    read_gb_s: float  # from memory: an array far larger than the last-level cache, each byte once
    working_set: int  # bytes
    cache_gb_s: float  # the same over an array of `working_set` bytes, read again and again
    gemm_gflop_s: dict[str, float]  # by dtype, "float32": ...
    load: float | None  # programs wanting a core just before (1-minute load average); None where unknown

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def measure_machine(
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    *,
    device: torch.device | str = "cpu",
    working_set: int = 2**23,
) -> Machine:
    """Measure `device` with `threads` threads (default: as many as torch uses now).

    dtype:          of the GEMM; bandwidth is the same for all.
    working_set:    bytes read per step by what will be compared with the result: a small model stays in the cache.
    """
    device = torch.device(device)
    with using_threads(threads):
        return Machine(
            device=device.type,
            name=device_name(device),
            threads=torch.get_num_threads(),
            read_gb_s=read_bandwidth(big_array(device), device),
            working_set=working_set,
            cache_gb_s=read_bandwidth(working_set, device),
            gemm_gflop_s={str(dtype).removeprefix("torch."): gemm_rate(dtype, device)},
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )


@torch.inference_mode()
def read_bandwidth(size: int, device: torch.device | str = "cpu") -> float:
    """GB/s when an array of `size` bytes is read over and over, by summing it: of torch's kernels the fastest reader.

    Larger sizes than `big_array` are measured at that size, where no cache helps any more.
    """
    device = torch.device(device)
    numbers = max(1, min(size, big_array(device)) // 4)
    array = torch.ones(numbers, device=device)
    return 4 * numbers / best_seconds(lambda: array.sum(), device) / 1e9


@torch.inference_mode()
def gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """GFLOP/s of a square matrix product, 2 n^3 FLOP, by the faster of torch's own kernel and oneDNN's.

    A dtype without a fast kernel is measured at a small n only.
    """
    device = torch.device(device)
    trial, full = GEMM_SIZES[device.type == "cpu"]

    def rate(n: int) -> float:
        left, right = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = best_seconds(lambda: left @ right, device)
        if device.type == "cpu" and dtype in ONEDNN_DTYPES and torch.backends.mkldnn.is_available():
            wrapped = left.to_mkldnn()
            seconds = min(seconds, best_seconds(lambda: F.linear(wrapped, right), device))
        return 2 * n**3 / seconds / 1e9

    small = rate(trial)
    return max(small, rate(full)) if 2e-9 * full**3 / small < SECONDS_EACH else small


def best_seconds(call: Callable[[], Any], device: torch.device, seconds: float = SECONDS_EACH) -> float:
    """The fastest of at least three repeats of `call`, after one to warm up."""
    call()
    synchronize(device)
    best, repeats, end = float("inf"), 0, time.perf_counter() + seconds
    while repeats < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize(device)
        best, repeats = min(best, time.perf_counter() - start), repeats + 1
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let torch use `threads` CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def big_array(device: torch.device) -> int:
    """Bytes of an array that is far larger than the last-level cache of `device`."""
    return min(max(16 * last_level_cache(device), BIG_ARRAY[0]), BIG_ARRAY[1])


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache that one core (or the GPU) sees."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    if device.type != "cpu":
        return UNKNOWN_CACHE
    texts = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    matches = [match for text in texts if (match := re.fullmatch(r"(\d+)([KM])\s*", text))]
    return max((int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]] for match in matches), default=UNKNOWN_CACHE)


def device_name(device: torch.device) -> str:
    """What people call it: the CPU's or GPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()
