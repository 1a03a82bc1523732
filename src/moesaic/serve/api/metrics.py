"""The engine's counters for Prometheus, read when they are asked for."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from moesaic.serve.stats import Histogram, Stats

COUNTERS = {
    "steps": "Steps of the engine",
    "prompt_tokens": "Prompt tokens run",
    "cached_tokens": "Prompt tokens reused from a prefix",
    "output_tokens": "Tokens sampled",
    "rejected": "Requests refused because the queue was full",
    "uses": "Expert entries asked for by layers of steps",
    "use_hits": "Of these, entries that were in memory",
    "loads": "Expert entries read",
    "evictions": "Expert entries that left the memory",
    "demand_bytes": "Bytes read for layers that waited",
    "prefetch_bytes": "Bytes read ahead",
    "wasted_bytes": "Bytes read ahead that left unused",
}
SECONDS = {
    "busy": "Seconds in steps",
    "stall": "Seconds of steps spent waiting for entries",
    "overhead": "Seconds of steps spent on batching, bookkeeping and the pre-gate",
}
HISTOGRAMS = {
    "ttft_s": ("time_to_first_token_seconds", "From arrival to the first token"),
    "tpot_s": ("time_per_output_token_seconds", "Seconds per token after the first, a request"),
    "step_s": ("step_seconds", "Seconds of a step"),
    "wait_s": ("wait_seconds", "From arrival until something of the request ran"),
    "experts_per_step": ("unique_experts_per_step", "Distinct experts in a step"),
    "batch": ("requests_per_step", "Requests in a step"),
}
GAUGES = {"waiting": "Requests of which nothing has run", "running": "Requests with keys in memory"}
PREFIX = "moesaic_"


class EngineCollector(Collector):
    """One snapshot per scrape, so that all numbers of a scrape agree."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.stats = stats

    def collect(self) -> Iterable[Any]:
        """The families."""
        stats = self.stats()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value=getattr(stats, name))
        for name, text in SECONDS.items():
            yield CounterMetricFamily(f"{PREFIX}{name}_seconds", text, value=getattr(stats, f"{name}_s"))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=getattr(stats, name))
        yield GaugeMetricFamily(PREFIX + "hit_ratio", "Hits over uses since the start", value=stats.hit_ratio)
        yield self._labelled("memory_bytes", "Memory by use", "use", vars(stats.memory))
        for name, text in (
            ("queued_tokens_by_expert", "Tokens of ready portions by majority expert"),
            ("tokens_by_expert", "Tokens run by expert"),
        ):
            values = {str(expert): tokens for expert, tokens in enumerate(getattr(stats, name))}
            yield self._labelled(name, text, "expert", values)
        finished = CounterMetricFamily(PREFIX + "requests_finished", "Requests by how they ended", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        for name, (metric, text) in HISTOGRAMS.items():
            yield self._histogram(PREFIX + metric, text, getattr(stats, name))

    @staticmethod
    def _labelled(name: str, text: str, label: str, values: dict[str, float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        return family

    @staticmethod
    def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
        buckets, below = [], 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            below += count
            buckets.append((bound, below))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)


class Metrics:
    """The text of /metrics."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(stats))

    def text(self) -> bytes:
        """In the exposition format."""
        return generate_latest(self._registry)
