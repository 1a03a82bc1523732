"""What the engine counts, as one consistent snapshot: the source of metrics, the dashboard and reports."""

from dataclasses import dataclass, field

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


@dataclass
class Histogram:
    """Counts of values up to each bound, the last one beyond them all; `sum` of all values."""

    bounds: tuple[float, ...] = BUCKETS_S
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        place = next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += 1
        self.sum += value

    @property
    def total(self) -> int:
        """Number of values."""
        return sum(self.counts)

    def copy(self) -> "Histogram":
        """A snapshot."""
        return Histogram(self.bounds, list(self.counts), self.sum)


@dataclass
class Memory:
    """Bytes: what is planned for each use and what it takes now. experts and kv share `pool`."""

    budget: int = 0
    dense: int = 0  # everything but experts, loaded once
    buffers: int = 0  # activations and other scratch, reserved
    pool: int = 0
    experts_capacity: int = 0
    experts: int = 0
    kv: int = 0
    process: int = 0  # resident set of the process, measured


@dataclass
class Stats:
    """Counters since the start, gauges of now. Lists by expert have E places, empty where routes are layer-wise."""

    model: str = ""
    uptime_s: float = 0.0
    # requests
    waiting: int = 0  # submitted, nothing has run
    running: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by reason
    rejected: int = 0  # refused because the queue was full
    queued_tokens_by_expert: list[int] = field(default_factory=list)  # of portions that are ready
    # work
    steps: int = 0
    prompt_tokens: int = 0  # run, without those reused from a prefix
    cached_tokens: int = 0
    output_tokens: int = 0
    tokens_by_expert: list[int] = field(default_factory=list)
    busy_s: float = 0.0  # in steps
    stall_s: float = 0.0  # of it, waiting for entries
    overhead_s: float = 0.0  # of it, batching, bookkeeping and pre-gate
    # experts
    uses: int = 0
    use_hits: int = 0
    loads: int = 0
    evictions: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0
    resident: list[list[float]] = field(default_factory=list)  # (L, E): share of each expert's bytes that is resident
    # distributions
    ttft_s: Histogram = field(default_factory=Histogram)
    tpot_s: Histogram = field(default_factory=Histogram)  # of each request, seconds per output token after the first
    step_s: Histogram = field(default_factory=Histogram)
    wait_s: Histogram = field(default_factory=Histogram)  # from submission until something of the request ran
    experts_per_step: Histogram = field(default_factory=lambda: Histogram(SIZES))
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))  # requests per step
    memory: Memory = field(default_factory=Memory)

    @property
    def hit_ratio(self) -> float:
        """Uses whose entry was there, in 0..1; 1 before the first use."""
        return self.use_hits / self.uses if self.uses else 1.0
