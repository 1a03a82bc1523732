"""The receipts' pictures: which expert helps where, who owns which channel, real text by expert, and healing.

Every picture is one PNG whose title states what was found. Colours are the experts' identity in all of them, and in the
terminal too; matplotlib is imported only when something is drawn.
Shapes: E experts, G domains, L layers, W channels of a layer.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.refactor.report import amount, nats, percent, shorten, signed
from moesaic.refactor.terminal import PALETTE, Token, expert_colour, layout_tokens, tint

PathLike = str | os.PathLike[str]
INK, QUIET, RULE = "#1a1a1a", "#5f5f5f", "#c8c8c8"
DPI = 150
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
MONO_ADVANCE = 0.60205  # width of every DejaVu Sans Mono glyph, in font sizes


# -- 1: expert x domain --------------------------------------------------------------------------------------------
def expert_domain_heatmap(receipt: Mapping[str, Any], path: PathLike) -> None:
    """What each domain loses under each single expert, in nats per token above that domain's best expert.

    Raises MissingExtraError without matplotlib.
    """
    names, domains = receipt["model"]["experts"], receipt["quality"]["domains"]
    loss_EG = np.asarray(receipt["quality"]["matrix"], dtype=float)
    excess_EG = loss_EG - loss_EG.min(0)
    own = {g: names.index(domain) for g, domain in enumerate(domains) if domain in names}
    title, subtitle = _heatmap_words(excess_EG, own)
    experts, count = excess_EG.shape
    with _drawing(path, max(6.4, 2.6 + 0.82 * count), 1.7 + 0.44 * experts, title, subtitle) as figure:
        axes = figure.add_subplot()
        top = max(0.1, float(excess_EG.max()))  # small differences stay pale, even where none is large
        axes.imshow(excess_EG, cmap="Oranges", vmin=0, vmax=top, aspect="auto")
        for (expert, g), value in np.ndenumerate(excess_EG):
            text, weight = ("best", "bold") if value == 0 else (signed(value, 2), "normal")
            colour = "white" if value > 0.6 * top else INK
            axes.text(g, expert, text, ha="center", va="center", color=colour, weight=weight)
        axes.set_xticks(range(count), [shorten(name, 22) for name in domains])
        axes.set_yticks(range(experts), [shorten(name, 22) for name in names])
        axes.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, left=False, pad=5)
        axes.tick_params(axis="y", pad=16)
        if max(map(len, domains)) > 8:
            for label in axes.get_xticklabels():
                label.set(rotation=30, ha="left", rotation_mode="anchor")
        axes.spines[:].set_visible(False)
        axes.vlines(np.arange(1, count) - 0.5, -0.5, experts - 0.5, color="white", linewidth=2)
        axes.hlines(np.arange(1, experts) - 0.5, -0.5, count - 0.5, color="white", linewidth=2)
        for g, expert in own.items():
            axes.add_patch(_rectangle((g - 0.47, expert - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.8))
        for expert in range(experts):
            chip = {"transform": axes.get_yaxis_transform(), "clip_on": False, "color": expert_colour(expert)}
            axes.plot([-0.012], [expert], "s", markersize=7, **chip)
        _best_row(axes, loss_EG.min(0), experts)


def _heatmap_words(excess_EG: np.ndarray, own: Mapping[int, int]) -> tuple[str, str]:
    clear = (excess_EG < 5e-4).sum(0) == 1  # no second expert reads the same
    wins = sum(bool(clear[g]) and excess_EG[expert, g] == 0 for g, expert in own.items())
    if not own:
        title = "What each domain loses under each expert"
    elif wins == len(own):
        title = "Every domain is best served by its own expert"
    elif wins == 0:
        title = "No domain is best served by its own expert"
    else:
        title = f"{wins} of {len(own)} domains are best served by their own expert"
    subtitle = "Nats per token above the domain's best expert when one expert takes the whole domain."
    others = [excess_EG[e, g] for g in own for e in range(len(excess_EG)) if e != own[g]]
    if others:
        subtitle += f" Outlined: its own expert; the others lie {nats(float(np.mean(others)), 2)} above on average."
    return title, subtitle


def _best_row(axes: Any, best_G: np.ndarray, experts: int) -> None:
    """Below the columns, in absolute terms, what the colours are measured from."""
    for g, value in enumerate(best_G):
        axes.text(g, experts - 0.28, nats(value, 2), ha="center", va="center", color=QUIET)
    label = {"ha": "right", "va": "center", "color": QUIET, "transform": axes.get_yaxis_transform()}
    axes.text(-0.03, experts - 0.28, "nats of the best", **label)
    axes.text(-0.03, -0.72, "expert ↓  domain →", **label)
    axes.set_ylim(experts - 0.02, -0.5)


# -- 2: channels ---------------------------------------------------------------------------------------------------
def channel_ownership(masks: Sequence[np.ndarray], names: Sequence[str], path: PathLike) -> None:
    """Every layer's channels, sorted by who owns them: greys for several owners, an expert's colour for one, or white.

    masks:  one (E, W) bool array per layer; W may differ between layers.

    Raises MoesaicError without layers or if E is not the number of names; MissingExtraError without matplotlib.
    """
    masks_LEW = [np.asarray(mask, dtype=bool) for mask in masks]
    if not masks_LEW or any(mask.ndim != 2 or len(mask) != len(names) for mask in masks_LEW):
        shapes = [mask.shape for mask in masks_LEW]
        raise MoesaicError(f"masks have shapes {shapes}, expected ({len(names)}, channels) for each layer")
    shares = ownership_shares(masks_LEW)
    experts, layers, pixels = len(names), len(masks_LEW), 1400
    image = np.stack([_layer_colours(mask, pixels) for mask in masks_LEW])
    title, subtitle = _ownership_words(shares, experts)
    with _drawing(path, 9.6, 1.5 + max(1.4, min(6.0, 0.3 * layers)), title, subtitle) as figure:
        axes = figure.add_subplot()
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, 100, layers - 0.5, -0.5))
        if layers <= 40:
            axes.hlines(np.arange(1, layers) - 0.5, 0, 100, color="white", linewidth=1.5)
        axes.set_yticks(range(0, layers, max(1, layers // 12)))
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        axes.set(ylabel="layer", xlabel="share of the source's FFN channels")
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)
        handles = [
            _rectangle((0, 0), 1, 1, facecolor=c, edgecolor=RULE, label=label) for c, label in _owners(shares, names)
        ]
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=_legend_columns([handle.get_label() for handle in handles], 9.6),
            frameon=False,
            handlelength=1.1,
            handleheight=1.1,
            columnspacing=1.6,
        )


def ownership_shares(masks: Iterable[np.ndarray]) -> dict[str, Any]:
    """Shares of all channels of all layers: "owners", (E + 1,) by number of owners, and "one", (E,) owned by one only."""
    counts = [mask.sum(0) for mask in masks_list] if (masks_list := list(masks)) else []
    experts, total = len(masks_list[0]), sum(len(count) for count in counts)
    owners = sum(np.bincount(count, minlength=experts + 1) for count in counts)
    one = sum((mask & (count == 1)).sum(1) for mask, count in zip(masks_list, counts, strict=True))
    return {"owners": np.asarray(owners) / total, "one": np.asarray(one) / total}


def _layer_colours(mask_EW: np.ndarray, pixels: int) -> np.ndarray:
    """(pixels, 3) colours of a layer's channels, most owners first, then equal signatures side by side."""
    experts, width = mask_EW.shape
    count = mask_EW.sum(0)
    order = np.lexsort((*~mask_EW[::-1], -count))
    table = np.array([_rgb("#ffffff"), *(_rgb(_grey(n, experts)) for n in range(1, experts + 1))])
    colours = table[count]
    one = count == 1
    colours[one] = np.array([_rgb(expert_colour(e)) for e in range(experts)])[mask_EW.argmax(0)[one]]
    return np.asarray(colours[order][np.arange(pixels) * width // pixels])


def _grey(owners: int, experts: int) -> str:
    """Light for two owners, dark for all of them."""
    level = round(205 - 150 * (owners - 2) / max(1, experts - 2)) if experts > 2 else 55
    return f"#{min(level, 255):02x}" + f"{min(level, 255):02x}" * 2


def _ownership_words(shares: Mapping[str, Any], experts: int) -> tuple[str, str]:
    owners = shares["owners"]
    title = f"{percent(owners[-1], 0)} of the channels serve all {experts} experts, {percent(owners[1], 0)} just one"
    dropped = owners[0]
    end = "; none is dropped" if dropped == 0 else f"; {percent(dropped, 0)} are dropped"
    subtitle = (
        "The FFN channels of each layer, sorted by how many experts own them. Each is stored once, so the refactored "
    )
    return title + end, subtitle + f"model holds {percent(1 - dropped, 0)} of its source's."


def _owners(shares: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Legend entries: colour and label."""
    owners, experts = shares["owners"], len(names)
    if experts > 1:
        yield _grey(experts, experts), f"all {experts} experts {percent(owners[-1], 0)}"
    if experts > 2:
        several = f"2 to {experts - 1} of them" if experts > 3 else "2 of them"
        yield _grey((experts + 1) // 2, experts), f"{several} {percent(owners[2:-1].sum(), 0)}"
    for expert, name in enumerate(names):
        yield expert_colour(expert), f"only {shorten(name, 22)} {percent(shares['one'][expert], 0)}"
    yield "#ffffff", f"dropped {percent(owners[0], 0)}"


# -- 3: tokens -----------------------------------------------------------------------------------------------------
def token_strip(
    texts: Sequence[tuple[str, Sequence[Token]]],
    names: Sequence[str],
    path: PathLike,
    *,
    columns: int = 104,
    max_lines: int = 10,
) -> None:
    """Real texts, token by token, each on the colour of its expert; `texts` pairs a domain's name with its tokens.

    Lines break at `columns` characters and after line breaks (shown as ⏎); a text ends after `max_lines` lines.
    Raises MoesaicError without tokens, MissingExtraError without matplotlib.
    """
    if not any(tokens for _, tokens in texts):
        raise MoesaicError("there is no token to draw; give at least one text of one token")
    size, line, left = 9.5, 0.245, 0.2  # points, inches, inches
    advance = MONO_ADVANCE * size / 72
    laid = [(domain, tokens, layout_tokens(tokens, columns, max_lines)) for domain, tokens in texts if tokens]
    legend = _strip_legend(laid, names, columns)
    height = 0.1 + line * (len(legend) + sum(1.75 + pieces[-1][0] + 1 for *_, pieces in laid)) + 0.1
    with _drawing(path, columns * advance + 2 * left, height, *_strip_words(laid)) as figure:
        figure.set_layout_engine("none")
        wide, high = figure.get_size_inches()
        axes = figure.add_axes((left / wide, 0, 1 - 2 * left / wide, height / high))
        axes.set(xlim=(0, columns), ylim=(height / line, 0))  # one unit: a character across, a line down
        axes.axis("off")
        y = 0.1
        for row in legend:
            for x, expert, label in row:
                axes.add_patch(_rectangle((x, y + 0.2), 1.6, 0.6, color=expert_colour(expert)))
                axes.text(x + 2.2, y + 0.5, label, va="center")
            y += 1
        for domain, tokens, pieces in laid:
            heading = axes.text(0, y + 1.1, shorten(domain, 40), va="center", weight="bold")
            axes.annotate(_busiest(tokens, names), (1, 0.5), xycoords=heading, xytext=(8, 0), color=QUIET, va="center",
                          textcoords="offset points")  # fmt: skip
            y += 1.65
            for row_index, x, text, expert in pieces:
                _draw_piece(axes, x, y + row_index, text, expert_colour(expert), size)
            y += pieces[-1][0] + 1.1


def _draw_piece(axes: Any, x: float, y: float, text: str, colour: str, size: float) -> None:
    """A pale ground so that the text reads, and a full-colour foot so that the expert does."""
    axes.add_patch(_rectangle((x, y), len(text), 0.9, facecolor=tint(colour, 0.62), edgecolor="none"))
    axes.add_patch(_rectangle((x, y + 0.76), len(text), 0.14, facecolor=colour, edgecolor="none"))
    axes.plot([x, x], [y, y + 0.9], color="white", linewidth=0.8, solid_capstyle="butt")
    axes.text(x, y + 0.4, _drawable(text), family="DejaVu Sans Mono", size=size, va="center_baseline", color="black")


def _drawable(text: str) -> str:
    """`text` with □ for every character that the font lacks, so that none is wider or warns."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _strip_words(laid: Sequence[tuple[str, Sequence[Token], Any]]) -> tuple[str, str]:
    pairs = [(a[1], b[1]) for _, tokens, _ in laid for a, b in zip(tokens, tokens[1:], strict=False)]
    subtitle = "Held-out text; each token on the colour of the expert that the router chose for it before layer 0."
    if not pairs:
        return "Which expert takes which token", subtitle
    stays = sum(a == b for a, b in pairs) / len(pairs)
    return f"{percent(stays, 0)} of these tokens stay with the expert of the token before", subtitle


def _busiest(tokens: Sequence[Token], names: Sequence[str]) -> str:
    counts = np.bincount([expert for _, expert in tokens], minlength=len(names))
    return (
        f"{percent(counts.max() / len(tokens), 0)} of {len(tokens)} tokens go to {shorten(names[counts.argmax()], 30)}"
    )


def _strip_legend(
    laid: Sequence[tuple[str, Sequence[Token], Any]], names: Sequence[str], columns: int
) -> list[list[tuple[float, int, str]]]:
    """Rows of (column, expert, label), as many per row as fit."""
    counts = np.bincount([expert for _, tokens, _ in laid for _, expert in tokens], minlength=len(names))
    labels = [f"{shorten(name, 24)} {percent(n / counts.sum(), 0)}" for name, n in zip(names, counts, strict=True)]
    step = max(map(len, labels)) * 0.98 + 4.5
    per_row = max(1, int(columns / step))
    entries = [(i % per_row * step, i, label) for i, label in enumerate(labels)]
    return [entries[i : i + per_row] for i in range(0, len(entries), per_row)]


# -- 4: healing ----------------------------------------------------------------------------------------------------
def loss_curves(
    log: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    path: PathLike,
    control_log: Sequence[Mapping[str, Any]] | None = None,
    *,
    dense: float | None = None,
) -> None:
    """Healing loss of the experts (and of the pruned control) over tokens; the router's loss; the experts' load.

    log:    rows of the training log with `round`, `stage` ("router" or "experts"), `tokens` (of that stage) and `losses`.
    dense:  the source's held-out nats per token, drawn as a dashed line.

    Raises MoesaicError without a row; MissingExtraError without matplotlib.
    """
    moe, control = _curve(log, "experts", "lm"), _curve(control_log or (), "experts", "lm")
    router, load = _curve(log, "router", "router"), _loads(log, len(names))
    if not len(moe[0]) and not len(router[0]):
        raise MoesaicError("the healing log is empty, expected at least one training step; heal the model first")
    panels = 1 + bool(len(router[0])) + bool(len(load[0]))
    ratios = [1.7, *[1.0] * (panels - 1)]
    title, subtitle = _curve_words(moe[1], control[1], dense)
    with _drawing(path, 5.6 + 2.9 * (panels - 1), 3.5, title, subtitle) as figure:
        main, *others = figure.subplots(1, panels, gridspec_kw={"width_ratios": ratios}, squeeze=False)[0]
        lines = [(*moe, PALETTE[0], "experts"), (*control, PALETTE[4], "pruned control")]
        _draw_curves(main, [line for line in lines if len(line[0])], "Next-token loss, nats")
        if dense is not None:
            main.axhline(dense, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
            main.annotate("dense, held out", (0, dense), xycoords=("axes fraction", "data"), xytext=(4, 3), size=8.5,
                          textcoords="offset points", color=INK)  # fmt: skip
        _mark_rounds(main, log, "experts")
        if len(router[0]):
            panel = others.pop(0)
            _draw_curves(panel, [(*router, PALETTE[2], "")], "Router loss, nats")
            _mark_rounds(panel, log, "router")
        if len(load[0]):
            _draw_loads(others.pop(0), load, names)


def _curve(log: Sequence[Mapping[str, Any]], stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens read up to each step, counted through all rounds of `stage`, and that loss; rows without it are left out."""
    points = [(tokens, row.get("losses", row).get(name)) for tokens, row in _with_tokens(log, stage)]
    known = [(tokens, loss) for tokens, loss in points if loss is not None]
    return np.array([p[0] for p in known], dtype=float), np.array([p[1] for p in known], dtype=float)


def _loads(log: Sequence[Mapping[str, Any]], experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) tokens and (n, E) loads of the router stages."""
    rows = [(tokens, row.get("metrics", row).get("load")) for tokens, row in _with_tokens(log, "router")]
    known = [(tokens, load) for tokens, load in rows if load is not None and len(load) == experts]
    return np.array([r[0] for r in known], dtype=float), np.array([r[1] for r in known], dtype=float)


def _with_tokens(log: Sequence[Mapping[str, Any]], stage: str) -> Iterator[tuple[float, Mapping[str, Any]]]:
    before, last, current = 0.0, 0.0, None
    for row in (row for row in log if row["stage"] == stage):
        if row["round"] != current:  # each round's stage counts its own tokens from zero
            before, current = before + last, row["round"]
        last = float(row.get("tokens", row["step"]))
        yield before + last, row


def smooth(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Centred running mean over `share` of all points, narrower at both ends; NaN in the input stays out of it."""
    half = max(1, round(share * len(values) / 2))
    return np.array([np.nanmean(values[max(0, i - min(half, i)) : i + min(half, len(values) - 1 - i) + 1])
                     for i in range(len(values))])  # fmt: skip


def _draw_curves(axes: Any, lines: Sequence[tuple[np.ndarray, np.ndarray, str, str]], title: str) -> None:
    """Raw steps pale, the running mean on top; labels beside the ends, moved apart where they would touch."""
    for tokens, loss, colour, _ in lines:
        axes.plot(tokens, loss, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(tokens, smooth(loss), color=colour, linewidth=2, label=_)
    if len(lines) > 1:
        axes.legend(frameon=False, loc="upper right", handlelength=1.4)
    if lines:
        every = np.concatenate([loss for _, loss, _, _ in lines])
        low, high = np.percentile(every, [0, 97])  # the first steps are far off and would flatten the rest
        axes.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.08 * (high - low) + 1e-3)
    _token_axis(axes, title)


def _draw_loads(axes: Any, load: tuple[np.ndarray, np.ndarray], names: Sequence[str]) -> None:
    tokens, load_nE = load
    smoothed = np.stack([smooth(column) for column in load_nE.T])
    axes.stackplot(
        tokens, smoothed, colors=[expert_colour(e) for e in range(len(names))], edgecolor="white", linewidth=0.4
    )
    axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=["0", "50 %", "100 %"])
    _token_axis(axes, "Router's choices, share of tokens")
    centres = smoothed[:, -1].cumsum() - smoothed[:, -1] / 2
    for expert, y in enumerate(spread(centres, 1 / 17)):
        label = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "size": 8, "color": INK}
        axes.annotate(shorten(names[expert], 16), (1, y), xycoords="axes fraction", **label)


def spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Increasing `positions` in [0, 1] moved apart to at least `gap`, each as little as a sweep up and one down need."""
    moved = np.array(positions, dtype=float)
    gap = min(gap, 1 / max(1, len(moved)))
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved[-1:] = np.minimum(moved[-1:], 1 - gap / 2)
    for i in range(len(moved) - 2, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - gap)
    return moved


def _token_axis(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", size=9.5, color=QUIET)
    axes.set_xlabel("tokens")
    axes.margins(x=0)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))


def _mark_rounds(axes: Any, log: Sequence[Mapping[str, Any]], stage: str) -> None:
    starts: dict[Any, float] = {}
    previous = 0.0
    for tokens, row in _with_tokens(log, stage):
        starts.setdefault(row["round"], previous)
        previous = tokens
    for number, start in list(starts.items())[1:]:
        axes.axvline(start, color=RULE, linewidth=1, zorder=0)
        axes.annotate(f"round {number + 1}", (start, 0), xycoords=("data", "axes fraction"), xytext=(3, 3), size=8,
                      textcoords="offset points", color=QUIET)  # fmt: skip


def _curve_words(moe: np.ndarray, control: np.ndarray, dense: float | None) -> tuple[str, str]:
    def end(values: np.ndarray) -> float:
        return float(values[-max(1, len(values) // 10) :].mean())

    subtitle = "Training batches, balanced over domains; pale: single steps, bold: running mean."
    if not len(moe):
        return "The router's training", subtitle
    if not len(control):
        return f"Healing ends at {nats(end(moe))} nats per token", subtitle
    gap = end(moe) - end(control)
    if abs(gap) < 5e-4:
        verdict = "level with the pruned control"
    else:
        verdict = f"{nats(abs(gap))} nats {'below' if gap < 0 else 'above'} the pruned control"
    return f"Healing ends {verdict}", f"{subtitle} The end is the mean of the last tenth of all steps."


# -- shared --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _drawing(path: PathLike, width: float, height: float, title: str, subtitle: str) -> Iterator[Any]:
    """A figure of `width` x `height` inches below its two headings, written to `path` when the block ends well."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    titles, subtitles = textwrap.wrap(title, int(width / 0.118)), textwrap.wrap(subtitle, int(width / 0.082))
    header = 0.16 + 0.25 * len(titles) + 0.19 * len(subtitles)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height + header), layout="constrained")
        total = height + header
        figure.get_layout_engine().set(rect=(0.005, 0.01, 0.985, height / total - 0.01), w_pad=0.08)
        figure.text(
            0.15 / width, 1 - 0.12 / total, "\n".join(titles), va="top", size=13, weight="bold", linespacing=1.3
        )
        below = 0.12 + 0.25 * len(titles) + 0.02
        figure.text(0.15 / width, 1 - below / total, "\n".join(subtitles), va="top", color=QUIET, linespacing=1.3)
        yield figure
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})


def _rectangle(corner: tuple[float, float], width: float, height: float, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **options)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many columns as fit `width` inches."""
    return max(1, min(len(labels), int(width / (0.075 * max(map(len, labels)) + 0.45))))
