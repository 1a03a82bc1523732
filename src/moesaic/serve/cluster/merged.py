"""The counters of several engines as those of one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from moesaic.serve.stats import Histogram, Memory, Stats


def merged(stats: Sequence[Stats]) -> Stats:
    """Sums; of the share of an expert that is resident, the mean; of the time since the start, the longest.

    A replica that has died takes its counters along, which Prometheus knows as a restart.
    """
    if not stats:
        return Stats()
    total = Stats(model=stats[0].model, uptime_s=max(one.uptime_s for one in stats))
    for field in fields(Stats):
        if field.name not in ("model", "uptime_s"):
            setattr(total, field.name, _sum([getattr(one, field.name) for one in stats]))
    total.resident = [[share / len(stats) for share in row] for row in total.resident]
    return total


def _sum(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return dict(sum((Counter(value) for value in values), Counter()))
    if isinstance(first, list):
        return [_sum(parts) for parts in zip(*values, strict=True)]
    if isinstance(first, Histogram):
        return Histogram(first.bounds, _sum([value.counts for value in values]), sum(value.sum for value in values))
    if isinstance(first, Memory):
        return Memory(
            **{field.name: _sum([getattr(value, field.name) for value in values]) for field in fields(Memory)}
        )
    return sum(values)
