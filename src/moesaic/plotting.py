"""How every picture is drawn: one PNG below a title that states what was found; the same ink, font and resolution.

matplotlib is the extra `plots` and is imported only when something is drawn. Sizes in inches, offsets in points.
"""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import MissingExtraError
from moesaic.files import replacing

PathLike = str | os.PathLike[str]
INK, QUIET, RULE = "#1a1a1a", "#5f5f5f", "#c8c8c8"
# Okabe and Ito's, without the yellow that is lost on white, and an indigo
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288")
DPI = 150
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.parse_math": False,  # names and texts may hold dollar signs
}


@contextlib.contextmanager
def drawing(path: PathLike, width: float, height: float, title: str, subtitle: str) -> Iterator[Any]:
    """A figure of `width` x `height` inches below its two headings, written to `path` when the block ends well.

    The file is whole or absent. Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    titles, subtitles = textwrap.wrap(title, int(width / 0.118)), textwrap.wrap(subtitle, int(width / 0.079))
    below = 0.14 + 0.25 * len(titles)
    total = height + below + 0.02 + 0.19 * len(subtitles)
    with style.context(["default", STYLE]):
        room = (0.005, 0.01, 0.985, height / total - 0.01)
        figure = Figure(figsize=(width, total), layout=ConstrainedLayoutEngine(rect=room, w_pad=0.08))
        heading: dict[str, Any] = {"va": "top", "linespacing": 1.3}
        figure.text(0.15 / width, 1 - 0.12 / total, "\n".join(titles), size=13, weight="bold", **heading)
        figure.text(0.15 / width, 1 - below / total, "\n".join(subtitles), color=QUIET, **heading)
        yield figure
        with replacing(Path(path)) as whole:
            figure.savefig(whole, dpi=DPI, format="png", metadata={"Software": None})


def label_at(axes: Any, text: str, at: Any, coordinates: Any, offset: tuple[float, float], **look: Any) -> None:
    """`text` at a place given in `coordinates`, shifted by `offset` points."""
    axes.annotate(text, at, xycoords=coordinates, xytext=offset, textcoords="offset points", **look)


def rectangle(corner: tuple[float, float], width: float, height: float, **look: Any) -> Any:
    """A patch for `axes.add_patch`, or a legend's chip."""
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **look)


def rgb(colour: str) -> tuple[float, ...]:
    """Red, green and blue in 0..1 of #rrggbb."""
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


# -- numbers -------------------------------------------------------------------------------------------------------
def duration(seconds: float) -> str:
    """Three digits and the unit that suits: 850 µs, 3.1 ms, 1.24 s, 12.5 min, 3.4 h."""
    if not seconds:
        return "0\u00a0s"
    for most, scale, unit in ((9.995e-4, 1e-6, "µs"), (0.9995, 1e-3, "ms"), (119.5, 1.0, "s"), (7170.0, 60.0, "min")):
        if seconds < most:
            return f"{seconds / scale:.3g}\u00a0{unit}"
    hours = seconds / 3600
    return f"{hours:.3g}\u00a0h" if hours < 999.5 else f"{hours:,.0f}\u00a0h"


def percent(share: float, digits: int = 0) -> str:
    """41 %; what would round to nothing but is something reads <1 %."""
    least = 10.0**-digits
    return f"<{least:.{digits}f}\u00a0%" if 0 < 100 * share < least / 2 else f"{100 * share:.{digits}f}\u00a0%"


def seconds_axis(axes: Any, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis of times with a few ticks that say their unit, at least a factor of 3 long."""
    from matplotlib.ticker import LogLocator, NullLocator

    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.15, max(positive) * 1.15
    grow = max(1.0, math.sqrt(3 * low / high))
    low, high = low / grow, high * grow
    decades = math.log10(high / low)
    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}lim": (low, high)})  # first: without positive values the scale finds no limits
    axes.set(**{f"{which}scale": "log"})
    subs = range(1, 10) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _tick(value))


def _tick(seconds: float) -> str:
    """Of a logarithmic axis, where minutes would read oddly: 20 µs, 100 ms, 1 s, 1,000 s."""
    for most, scale, unit in ((9.5e-4, 1e-6, "µs"), (0.95, 1e-3, "ms")):
        if seconds < most:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:,.3g} s" if seconds < 950 else f"{seconds:,.0f} s"
