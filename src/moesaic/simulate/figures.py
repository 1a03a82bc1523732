"""The pictures of a run and of a sweep: latencies, a timeline, the capacity curve and latency over load.

Each title states what was found. What is drawn is computed by functions without matplotlib (`over_time`, `curves`).
Seconds, bytes, shares in 0..1. Shapes: S stages, N buckets of time, X values of an axis.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.plotting import INK, LINES, QUIET, RULE, PathLike, drawing, duration, label_at, percent, seconds_axis
from moesaic.simulate.simulator import Run

Array = NDArray[np.float64]
Result = Mapping[str, Any]
Cells = Sequence[tuple[Mapping[str, Any], Result]]

LOADS = ("load", "rate")  # the axes that `load` draws, the first that varies
_LOAD_OF = {"load": "load", "rate": "the trace's rate"}
BUCKETS = 240
LATENCIES = {"tpot": "TPOT", "ttft": "TTFT", "end_to_end": "end to end"}
STALL, BUSY = LINES[1], "#d9d9d9"


# -- latency -------------------------------------------------------------------------------------------------------
def latency(result: Result, run: Run, path: PathLike) -> None:
    """How many requests are done within a time: first token, further tokens, all of it.

    Raises MissingExtraError without matplotlib.
    """
    served = [each for each in run.requests if each.end_s >= 0]
    spoken = [each for each in served if each.output_tokens > 1]
    values = {
        "tpot": [(each.end_s - each.first_s) / (each.output_tokens - 1) for each in spoken],
        "ttft": [each.first_s - each.arrival_s for each in served],
        "end_to_end": [each.end_s - each.arrival_s for each in served],
    }
    whole = result["latency_s"]["end_to_end"]
    title = f"Half of the requests are done within {duration(whole['p50'])}, 95 % within {duration(whole['p95'])}"
    subtitle = (
        f"Share of {len(served):,} requests that took at most so long. Circles: median, diamonds: 95th percentile. "
        f"{_system(result)}."
    )
    with drawing(path, 9.6, 3.7, title, subtitle) as figure:
        axes = figure.add_subplot()
        for (name, words), colour in zip(LATENCIES.items(), LINES, strict=False):
            if not values[name]:
                continue
            spread, times = result["latency_s"][name], np.sort(values[name])
            text = f"{words}: p50 {duration(spread['p50'])}, p95 {duration(spread['p95'])}"
            shares = np.arange(1, len(times) + 1) / len(times)
            axes.step([times[0], *times], [0, *shares], where="post", color=colour, linewidth=2, label=text)
            for share, key, marker in ((0.5, "p50", "o"), (0.95, "p95", "D")):
                axes.plot(spread[key], share, marker, color=colour, markersize=6, markeredgecolor="white", zorder=4)
        axes.set(ylim=(0, 1.02), yticks=[0, 0.25, 0.5, 0.75, 0.95], xlabel="time, logarithmic")
        axes.set_yticklabels(["0", "25 %", "50 %", "75 %", "95 %"])
        for share in (0.5, 0.95):
            axes.axhline(share, color=RULE, linewidth=0.8, zorder=0)
        seconds_axis(axes, "x", [time for times in values.values() for time in times])
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3, handlelength=1.2)


# -- timeline ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timeline:
    """A run in N buckets of equal time; seconds from the first arrival. Means are over the bucket's time.

    queue, peak:  portions that were ready and stayed behind: mean and largest.
    running:      requests.
    resident:     bytes at the bucket's end.
    busy, stall:  shares of the time in stages, and in stages waiting for entries.
    """

    edges: Array  # (N + 1,)
    queue: Array
    peak: Array
    running: Array
    resident: Array
    busy: Array
    stall: Array


def over_time(run: Run, count: int = BUCKETS) -> Timeline:
    """The run's stages in `count` buckets from the first arrival to the end."""
    begin = min(each.arrival_s for each in run.requests)
    columns = ("start_s", "seconds", "stall_s", "queued", "running", "resident_bytes")
    rows = [[getattr(row, name) for name in columns] for row in run.stages]
    start, seconds, stall, queued, running, resident = np.array(rows, dtype=float).T
    start = start - begin
    edges = np.linspace(0, max(run.end_s - begin, 1e-12), count + 1)
    knots = np.maximum.accumulate(np.column_stack([start, start + seconds]).ravel())

    def mean(amounts_S: Array) -> Array:
        """Of amounts that accrue evenly during their stages and not between them."""
        steps = np.column_stack([np.zeros_like(amounts_S), amounts_S]).ravel()
        return np.diff(np.interp(edges, knots, np.cumsum(steps))) / np.diff(edges)

    queue, peak = mean(queued * seconds), np.zeros(count)
    np.maximum.at(peak, np.clip(np.searchsorted(edges, start, "right") - 1, 0, count - 1), queued)
    last = np.searchsorted(start + seconds, edges[1:], "right") - 1
    return Timeline(
        edges=edges,
        queue=queue,
        peak=np.maximum(peak, queue),
        running=mean(running * seconds),
        resident=resident[np.maximum(last, 0)],
        busy=mean(seconds),
        stall=mean(stall),
    )


def timeline(result: Result, run: Run, path: PathLike) -> None:
    """Queue, running requests, resident bytes and the engine's time, one above the other, over the run.

    Raises MissingExtraError without matplotlib.
    """
    line = over_time(run)
    scale, unit = _unit(line.edges[-1])
    edges, width = line.edges / scale, duration(line.edges[1])
    subtitle = (
        f"{len(run.requests):,} requests in {len(run.stages):,} stages, in buckets of {width}. {_system(result)}."
    )
    with drawing(path, 10.4, 6.2, _timeline_words(result, run), subtitle) as figure:
        queue, running, resident, engine = figure.subplots(4, 1, sharex=True)
        _fill(queue, "Queue: portions that were ready and stayed behind; line: the bucket's largest", edges, line.queue)
        queue.stairs(line.peak, edges, color=LINES[0], linewidth=0.9)
        _fill(running, "Running requests", edges, line.running)
        _fill(resident, "Resident: share of all experts' bytes", edges, line.resident / result["all_bytes"])
        limit = result["capacity_bytes"] / result["all_bytes"]
        resident.axhline(limit, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
        label_at(resident, f"capacity {percent(limit)}", (1, limit), ("axes fraction", "data"), (0, 3), ha="right")
        _fill(engine, "Engine's time", edges, line.busy, BUSY, "busy")
        engine.stairs(line.stall, edges, fill=True, color=STALL, label="of it stalled: waiting for entries")
        engine.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.93), ncols=2, handlelength=1.1)
        for axes, top in ((resident, 1.3 * limit), (engine, 1.0)):
            axes.set_ylim(0, top)
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        for axes in (queue, running):
            axes.set_ylim(0, 1.12 * max(1.0, axes.dataLim.ymax))
            axes.yaxis.get_major_locator().set_params(integer=True)
        engine.set_xlabel(f"{unit} since the first arrival")
        engine.set_xlim(0, edges[-1])
        figure.align_ylabels()


def _timeline_words(result: Result, run: Run) -> str:
    most = max(run.stages, key=lambda row: row.queued)  # the first of them
    stalled = f"the engine stalled {percent(result['stall_share'])} of its time"
    if not most.queued:
        return f"Nothing that was ready ever stayed behind; {stalled}"
    after = duration(most.start_s - min(each.arrival_s for each in run.requests))
    return f"The queue peaked at {most.queued:,} portions after {after}; {stalled}"


def _fill(
    axes: Any, title: str, edges: Array, values: Array, colour: str = "#a9cbe3", label: str | None = None
) -> None:
    axes.stairs(values, edges, fill=True, color=colour, label=label)
    axes.set_title(title, loc="left", size=9.5, color=QUIET)
    axes.locator_params(axis="y", nbins=4)


# -- sweeps --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Curve:
    """y over x (X,): the mean of all runs that share an x, the least and the largest of them."""

    x: Array
    mean: Array
    low: Array
    high: Array

    def at(self, x: float) -> float:
        """The mean at one of the curve's x; NaN elsewhere."""
        found = np.flatnonzero(np.isclose(self.x, x))
        return float(self.mean[found[0]]) if len(found) else math.nan


def varies(results: Cells, axis: str) -> bool:
    """Whether the runs differ in this axis."""
    return len({str(cell[axis]) for cell, _ in results if axis in cell}) > 1


def line_axes(results: Cells, across: str, first: str = "") -> list[str]:
    """The axes whose combinations get a line each: all that vary but `across` and seeds, `first` before the others.

    Only the first of them where that would be more lines than there are colours.
    """
    axes = [axis for axis in results[0][0] if axis not in (across, "seed") and varies(results, axis)]
    axes.sort(key=lambda axis: axis != first)
    return axes if len({_line(cell, axes) for cell, _ in results}) <= len(LINES) else axes[:1]


def _line(cell: Mapping[str, Any], axes: Sequence[str]) -> str:
    """The name of a cell's line: values that are names stand alone, others behind the last part of their key."""
    words = []
    for axis in axes:
        value = cell[axis]
        named = isinstance(value, str) and value[:1].isalpha()
        words.append(str(value) if named else f"{axis.rpartition('.')[2]} {str(value).lower()}")
    return " · ".join(words)


def curves(
    results: Cells, axes: Sequence[str], x: Callable[[Any, Result], float], y: Callable[[Result], float]
) -> dict[str, Curve]:
    """A curve for each combination of the values of `axes` (one of all runs without axes), in the order of the runs."""
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in results:
        points[_line(cell, axes)][x(cell, result)].append(y(result))
    made = {}
    for name, by_x in points.items():
        groups = [by_x[each] for each in sorted(by_x)]
        columns = [[each(group) for group in groups] for each in (lambda g: sum(g) / len(g), min, max)]
        made[name] = Curve(*(np.array(column, dtype=float) for column in (sorted(by_x), *columns)))
    return made


def capacity(results: Cells, path: PathLike) -> None:
    """What stays in the cache over its size, a line for each policy, between LRU and the oracle on the same accesses.

    Over bytes where the runs' entries are not equally large in all: then the accesses are not the same, and neither
    LRU nor the oracle is drawn. Without kept ratios the hits by use. Raises MissingExtraError without matplotlib.
    """
    axes_of_lines = line_axes(results, "cache.capacity", "cache.policy")
    bounds = all("kept_ratio" in result for _, result in results)
    shares = len({result["all_bytes"] for _, result in results}) == 1
    scale, unit = _size_unit(max(result["capacity_bytes"] for _, result in results))

    def size(_: Any, result: Result) -> float:
        return float(result["capacity_bytes"] / (result["all_bytes"] if shares else scale))

    def kept(name: str) -> Callable[[Result], float]:
        return lambda result: float(result["kept_ratio"][name] if bounds else result["hit_ratio"]["use"])

    lines = curves(results, axes_of_lines, size, kept("own"))
    limits = {name: curves(results, (), size, kept(name))[""] for name in ("oracle", "lru") if bounds and shares}
    best = curves(results, axes_of_lines, size, kept("oracle")) if bounds else {}
    place = _share if shares else lambda x: f"room for {x:.3g}\u00a0{unit}"
    title = _capacity_words(lines, best, "keeps" if bounds else "hits", place)
    subtitle = "Uses of an entry that needed no load, prefetches being loads." if bounds else "Uses that were hits."
    subtitle += " LRU and oracle: each run's accesses replayed without prefetch, mean and range." if limits else ""
    drawn = ("cache.capacity", *axes_of_lines)
    subtitle += _means(results, drawn)
    with drawing(path, 9.2, 3.9, title, subtitle) as figure:
        axes = figure.add_subplot()
        _draw_lines(axes, lines, _only_seeds(results, drawn))
        for (name, curve), dashes in zip(limits.items(), ((0, (5, 3)), (0, (1, 2))), strict=False):
            text = {"oracle": "oracle, replayed", "lru": "LRU, replayed"}[name]
            axes.fill_between(curve.x, curve.low, curve.high, color=INK, alpha=0.06, linewidth=0, zorder=0)
            axes.plot(curve.x, curve.mean, color=INK, linewidth=1.3, linestyle=dashes, label=text, zorder=5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_ylabel("uses that needed no load" if bounds else "uses that were hits")
        axes.set_xlabel("capacity, share of all experts' bytes" if shares else f"capacity, {unit}")
        _ticks(axes, lines, (lambda x: f"{100 * x:.3g} %") if shares else (lambda x: f"{x:.3g}"))
        _legend(axes, axes_of_lines)


def _capacity_words(
    lines: Mapping[str, Curve], oracles: Mapping[str, Curve], verb: str, place: Callable[[float], str]
) -> str:
    """The capacity at which the choice of the line matters most; of a single line, where its oracle is farthest.

    `oracles` are those of the lines' own accesses, or none.
    """
    xs = [float(x) for x in next(iter(lines.values())).x]
    common = [x for x in xs if not any(math.isnan(curve.at(x)) for curve in lines.values())]
    if not common:  # capacities in shares of different sizes: what the least and the most room give
        ends = sorted((float(c.x[-1]), float(c.mean[-1]), name) for name, c in lines.items())
        (x, share, name), (most_x, most_share, other) = ends[0], ends[-1]
        return (
            f"{name} {verb} {percent(share, 1)} with {place(x)}, {other} {percent(most_share, 1)} with {place(most_x)}"
        )

    def ranked(x: float) -> list[tuple[float, str]]:
        return sorted((curve.at(x), name) for name, curve in lines.items())

    def gap(x: float) -> float:
        (low, _), (high, name) = ranked(x)[0], ranked(x)[-1]
        return (oracles[name].at(x) if oracles and len(lines) == 1 else high) - low

    x = max(common, key=gap)
    (worst, last), (best, first) = ranked(x)[0], ranked(x)[-1]
    most = percent(best, 1) + (f" (its oracle {percent(oracles[first].at(x), 1)})" if oracles else "")
    if len(lines) == 1:
        return f"With {place(x)} the cache {verb} {most}"
    if best == worst:
        return f"All lines are equal at every capacity: with {place(x)}, {first} {verb} {most}"
    return f"With {place(x)}, {first} {verb} {most}, {last} {percent(worst, 1)}"


def load(results: Cells, path: PathLike) -> None:
    """Normalised latency over load, mean and p95, a line for each combination of the other axes.

    Raises MissingExtraError without matplotlib.
    """
    across = next(axis for axis in LOADS if varies(results, axis))
    axes_of_lines = line_axes(results, across)
    panels = {
        name: curves(results, axes_of_lines, lambda cell, _: float(cell[across]), _normalised(name))
        for name in ("mean", "p95")
    }
    drawn = (across, *axes_of_lines)
    subtitle = "Normalised latency: arrival to last token, over the generated tokens of the request."
    subtitle += _means(results, drawn)
    with drawing(path, 10.6, 3.9, _load_words(panels["mean"], panels["p95"], across), subtitle) as figure:
        both = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (name, lines) in zip(both, panels.items(), strict=True):
            _draw_lines(axes, lines, _only_seeds(results, drawn))
            axes.set_title({"mean": "Mean", "p95": "95th percentile"}[name], loc="left", size=9.5, color=QUIET)
            axes.set_xlabel("load, share of saturation" if across == "load" else "arrivals, times the trace's rate")
            axes.grid(axis="y", color="#ececec", linewidth=0.8)
            axes.set_axisbelow(True)
        _ticks(both[0], panels["mean"], lambda x: _load(x, across))
        seconds_axis(both[0], "y", [y for lines in panels.values() for c in lines.values() for y in c.mean])
        both[0].set_ylabel("time per generated token")
        _legend(both[1], axes_of_lines)


def _load_words(mean: Mapping[str, Curve], p95: Mapping[str, Curve], across: str) -> str:
    """Who is fastest where the load is highest; of a single line, what the load costs."""
    low, high = (end(float(x) for curve in mean.values() for x in curve.x) for end in (min, max))
    if len(mean) == 1:
        (m,), (p,) = mean.values(), p95.values()
        ends = [f"{duration(c.at(low))} to {duration(c.at(high))}" for c in (m, p)]
        span = f"From {_load(low, across)} to {_load(high, across)} {_LOAD_OF[across]}"
        return f"{span} the mean goes from {ends[0]} a token, p95 from {ends[1]}"
    ranked = sorted(mean, key=lambda name: mean[name].at(high))
    first, last = ranked[0], ranked[-1]
    place = f"At {_load(high, across)} {_LOAD_OF[across]}"
    means, tails = ([duration(c[name].at(high)) for name in (first, last)] for c in (mean, p95))
    if mean[first].at(high) == mean[last].at(high):
        return f"{place} all lines have the same mean, {means[0]} a token"
    return (
        f"{place} {first} is fastest and {last} slowest: mean {means[0]} and {means[1]} a token, "
        f"p95 {tails[0]} and {tails[1]}"
    )


def _normalised(name: str) -> Callable[[Result], float]:
    return lambda result: float(result["latency_s"]["normalised"][name])


def _rest(results: Cells, drawn: Sequence[str]) -> list[str]:
    """The axes that vary and are neither drawn nor lines."""
    return [axis for axis in results[0][0] if axis not in drawn and varies(results, axis)]


def _only_seeds(results: Cells, drawn: Sequence[str]) -> bool:
    return _rest(results, drawn) == ["seed"]


def _means(results: Cells, drawn: Sequence[str]) -> str:
    rest = " and ".join(_rest(results, drawn))
    return f" Mean{' and range' * _only_seeds(results, drawn)} over {rest}." if rest else ""


def _draw_lines(axes: Any, lines: Mapping[str, Curve], ranges: bool) -> None:
    """The first is the thickest, so that equal lines show below each other."""
    for i, (name, curve) in enumerate(lines.items()):
        turn, place = divmod(i, len(LINES))
        extra = 1 - i / max(1, len(lines) - 1)
        look = {"color": LINES[place], "linestyle": ("-", "--", "-.", ":")[turn % 4], "markeredgecolor": "white"}
        size = {"linewidth": 1.7 + 2 * extra, "markersize": 5 + 3 * extra}
        axes.plot(curve.x, curve.mean, marker="osD^"[turn % 4], label=name or "this system", **look, **size)
        if ranges:
            axes.fill_between(curve.x, curve.low, curve.high, color=LINES[place], alpha=0.13, linewidth=0)


def _ticks(axes: Any, lines: Mapping[str, Curve], words: Callable[[float], str]) -> None:
    """The values that were run, where they are few and apart; round numbers otherwise."""
    xs = sorted({float(x) for curve in lines.values() for x in curve.x})
    gaps = np.diff(xs) / (xs[-1] - xs[0] or 1)
    if len(xs) <= 8 and (len(xs) == 1 or gaps.min() >= 0.12):
        axes.set_xticks(xs)
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda x, _: words(x))


def _legend(axes: Any, lines: Sequence[str]) -> None:
    """Beside the axes; none for a line that is alone."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        options: dict[str, Any] = {"frameon": False, "handlelength": 1.8, "alignment": "left"}
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1), title=" · ".join(lines), **options)


# -- words and axes ------------------------------------------------------------------------------------------------
def _unit(span: float) -> tuple[float, str]:
    """Seconds of the unit in which `span` reads well, and its name."""
    return next(
        (
            (scale, unit)
            for most, scale, unit in ((0.5, 1e-3, "milliseconds"), (180, 1, "seconds"), (10800, 60, "minutes"))
            if span < most
        ),
        (3600, "hours"),
    )


def _load(value: float, across: str) -> str:
    return f"{100 * value:g} %" if across == "load" else f"{value:g}×"


def _share(value: float) -> str:
    return f"room for {percent(value)} of the experts"


def _size_unit(size: float) -> tuple[float, str]:
    """Bytes of the unit in which `size` reads well, and its name."""
    return next(((2.0**bits, unit) for bits, unit in ((30, "GiB"), (20, "MiB")) if size >= 2**bits), (1024.0, "KiB"))


def _system(result: Result) -> str:
    return f"{result['system']['name']} on {result['system']['device']}"
