"""The receipts' pictures: which expert helps where, who owns which channel, real text by expert, and healing.

Every picture is one PNG whose title states what was found. Colours are the experts' identity in all of them, and in the
terminal too; matplotlib is imported only when something is drawn.
Shapes: E experts, G domains, L layers, W channels of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from moesaic.errors import MoesaicError
from moesaic.plotting import CENTRED, INK, QUIET, RULE, PathLike, drawing, label_at, rectangle, rgb
from moesaic.refactor.report import amount, nats, percent, shorten, signed
from moesaic.refactor.terminal import PALETTE, Token, expert_colour, layout_tokens, tint

__all__ = ["PALETTE", "channel_ownership", "expert_domain_heatmap", "loss_curves", "token_strip"]

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
    with drawing(path, max(6.4, 2.6 + 0.82 * count), 1.7 + 0.44 * experts, title, subtitle) as figure:
        axes = figure.add_subplot()
        top = max(0.1, float(excess_EG.max()))  # small differences stay pale, even where none is large
        axes.imshow(excess_EG, cmap="Oranges", vmin=0, vmax=top, aspect="auto")
        for (expert, g), value in np.ndenumerate(excess_EG):
            text, weight = ("best", "bold") if value == 0 else (signed(value, 2), "normal")
            colour = "white" if value > 0.6 * top else INK
            axes.text(g, expert, text, color=colour, weight=weight, **CENTRED)
        axes.set_xticks(range(count), [shorten(name, 22) for name in domains])
        axes.set_yticks(range(experts), [shorten(name, 22) for name in names])
        axes.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, left=False, pad=5)
        axes.tick_params(axis="y", pad=17)
        if max(map(len, domains)) > 8:
            for label in axes.get_xticklabels():
                label.set(rotation=30, ha="left", rotation_mode="anchor")
        axes.spines[:].set_visible(False)
        axes.vlines(np.arange(1, count) - 0.5, -0.5, experts - 0.5, color="white", linewidth=2)
        axes.hlines(np.arange(1, experts) - 0.5, -0.5, count - 0.5, color="white", linewidth=2)
        for g, expert in own.items():
            axes.add_patch(rectangle((g - 0.47, expert - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.8))
        for expert in range(experts):
            label_at(
                axes, "■", (0, expert), axes.get_yaxis_transform(), (-9, 0), color=expert_colour(expert), **CENTRED
            )
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
        axes.text(g, experts - 0.28, nats(value, 2), color=QUIET, **CENTRED)
    for y, text in ((experts - 0.28, "nats of the best"), (-0.72, "expert ↓  domain →")):
        label_at(axes, text, (0, y), axes.get_yaxis_transform(), (-16, 0), ha="right", va="center", color=QUIET)
    axes.set_ylim(experts - 0.02, -0.5)


# -- 2: channels ---------------------------------------------------------------------------------------------------
def channel_ownership(masks: Sequence[np.ndarray], names: Sequence[str], path: PathLike) -> None:
    """Every layer's channels, sorted by who owns them: greys for several owners, an expert's colour for one, or white.

    masks:  one (E, W) bool array per layer; W may differ between layers.

    Raises MoesaicError without layers or if E is not the number of names; MissingExtraError without matplotlib.
    """
    masks = [np.asarray(mask, dtype=bool) for mask in masks]
    if not masks or any(mask.ndim != 2 or len(mask) != len(names) for mask in masks):
        shapes = [mask.shape for mask in masks]
        raise MoesaicError(f"masks have shapes {shapes}, expected ({len(names)}, channels) for each layer")
    shares, layers, width = ownership_shares(masks), len(masks), 9.6
    image = np.stack([_layer_colours(mask, pixels=1400) for mask in masks])
    with drawing(path, width, 1.5 + max(1.4, min(6.0, 0.3 * layers)), *_ownership_words(*shares)) as figure:
        axes = figure.add_subplot()
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, 100, layers - 0.5, -0.5))
        if layers <= 40:
            axes.hlines(np.arange(1, layers) - 0.5, 0, 100, color="white", linewidth=1.5)
        axes.set_yticks(range(0, layers, max(1, layers // 12)))
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        axes.set(ylabel="layer", xlabel="share of the source's FFN channels")
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)
        colours, labels = zip(*_owners(*shares, names), strict=True)
        chips = [rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=RULE) for colour in colours]
        columns = int(width / (0.075 * max(map(len, labels)) + 0.45))
        options = {"frameon": False, "handlelength": 1.1, "handleheight": 1.1, "columnspacing": 1.6}
        figure.legend(chips, labels, loc="outside lower left", ncols=max(1, min(len(labels), columns)), **options)


def ownership_shares(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of all channels of all layers: (E + 1,) by number of owners, and (E,) owned by that expert alone."""
    counts = [mask.sum(0) for mask in masks]
    owners = np.sum([np.bincount(count, minlength=len(masks[0]) + 1) for count in counts], axis=0)
    alone = np.sum([(mask & (count == 1)).sum(1) for mask, count in zip(masks, counts, strict=True)], axis=0)
    return owners / owners.sum(), alone / owners.sum()


def _layer_colours(mask_EW: np.ndarray, pixels: int) -> np.ndarray:
    """(pixels, 3) colours of a layer's channels, most owners first, then equal signatures side by side."""
    experts, width = mask_EW.shape
    count = mask_EW.sum(0)
    order = np.lexsort((*~mask_EW[::-1], -count))
    by_count = np.array([rgb("#ffffff"), *(rgb(_grey(n, experts)) for n in range(1, experts + 1))])
    by_owner = np.array([rgb(expert_colour(expert)) for expert in range(experts)])
    colours = np.where((count == 1)[:, None], by_owner[mask_EW.argmax(0)], by_count[count])
    return np.asarray(colours[order][np.arange(pixels) * width // pixels])


def _grey(owners: int, experts: int) -> str:
    """Light for two owners, dark for all of them."""
    level = round(205 - 150 * max(0, owners - 2) / (experts - 2)) if experts > 2 else 55
    return "#" + 3 * f"{level:02x}"


def _ownership_words(owners: np.ndarray, alone: np.ndarray) -> tuple[str, str]:
    experts, dropped = len(alone), f"{percent(owners[0], 0)} are dropped" if owners[0] else "none is dropped"
    shared = f"{percent(owners[-1], 0)} of the channels serve {_all(experts)}, {percent(owners[1], 0)} just one"
    title = f"{shared if experts > 1 else percent(owners[1], 0) + ' of the channels are kept'}; {dropped}"
    subtitle = "The FFN channels of each layer, sorted by how many experts own them."
    return title, f"{subtitle} Stored once each, they are {percent(1 - owners[0], 0)} of the source's."


def _all(experts: int) -> str:
    return "both experts" if experts == 2 else f"all {experts} experts"


def _owners(owners: np.ndarray, alone: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Legend entries: colour and label."""
    experts = len(names)
    if experts > 1:
        yield _grey(experts, experts), f"{_all(experts)}: {percent(owners[-1], 0)}"
    if experts > 2:
        several = f"2 to {experts - 1}" if experts > 3 else "2"
        yield _grey((experts + 1) // 2, experts), f"{several} of them: {percent(owners[2:-1].sum(), 0)}"
    for expert, name in enumerate(names):
        yield expert_colour(expert), f"only {shorten(name, 22)}: {percent(alone[expert], 0)}"
    yield "#ffffff", f"dropped: {percent(owners[0], 0)}"


# -- 3: tokens -----------------------------------------------------------------------------------------------------
Laid = Sequence[tuple[str, Sequence[Token], list[tuple[int, int, str, int]]]]  # domain, tokens, pieces


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
    laid = [(domain, tokens, layout_tokens(tokens, columns, max_lines)) for domain, tokens in texts if tokens]
    legend = _strip_legend(laid, names, columns)
    height = 0.1 + line * (len(legend) + sum(1.75 + pieces[-1][0] + 1 for *_, pieces in laid)) + 0.1
    with drawing(path, columns * MONO_ADVANCE * size / 72 + 2 * left, height, *_strip_words(laid)) as figure:
        figure.set_layout_engine("none")
        wide, high = figure.get_size_inches()
        axes = figure.add_axes((left / wide, 0, 1 - 2 * left / wide, height / high))
        axes.set(xlim=(0, columns), ylim=(height / line, 0))  # one unit: a character across, a line down
        axes.axis("off")
        y = 0.1
        for row in legend:
            for x, expert, label in row:
                axes.add_patch(rectangle((x, y + 0.2), 1.6, 0.6, color=expert_colour(expert)))
                axes.text(x + 2.2, y + 0.5, label, va="center")
            y += 1
        for domain, tokens, pieces in laid:
            heading = axes.text(0, y + 1.1, shorten(domain, 40), va="center", weight="bold")
            label_at(axes, _busiest(tokens, names), (1, 0.5), heading, (8, 0), color=QUIET, va="center")
            y += 1.65
            for row_index, x, text, expert in pieces:
                _draw_piece(axes, x, y + row_index, text, expert_colour(expert), size)
            y += pieces[-1][0] + 1.1


def _draw_piece(axes: Any, x: float, y: float, text: str, colour: str, size: float) -> None:
    """A pale ground so that the text reads, and a full-colour foot so that the expert does."""
    axes.add_patch(rectangle((x, y), len(text), 0.9, facecolor=tint(colour, 0.62), edgecolor="none"))
    axes.add_patch(rectangle((x, y + 0.76), len(text), 0.14, facecolor=colour, edgecolor="none"))
    axes.plot([x, x], [y, y + 0.9], color="white", linewidth=0.8, solid_capstyle="butt")
    axes.text(x, y + 0.58, _drawable(text), family="DejaVu Sans Mono", size=size, va="baseline", color="black")


def _drawable(text: str) -> str:
    """`text` with □ for every character that the font lacks, so that none is wider or warns."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _strip_words(laid: Laid) -> tuple[str, str]:
    pairs = [(a[1], b[1]) for _, tokens, _ in laid for a, b in pairwise(tokens)]
    subtitle = "Each token stands on the colour of its expert, which the router chose from token ids alone."
    if not pairs:
        return "Which expert takes which token", subtitle
    stays = sum(a == b for a, b in pairs) / len(pairs)
    return f"{percent(stays, 0)} of these tokens stay with the expert of the token before", subtitle


def _busiest(tokens: Sequence[Token], names: Sequence[str]) -> str:
    counts = np.bincount([expert for _, expert in tokens])
    share, name = percent(counts.max() / len(tokens), 0), shorten(names[int(counts.argmax())], 30)
    return f"{share} of {len(tokens)} tokens go to {name}"


def _strip_legend(laid: Laid, names: Sequence[str], columns: int) -> list[list[tuple[float, int, str]]]:
    """Rows of (column, expert, label), as many per row as fit."""
    counts = np.bincount([expert for _, tokens, _ in laid for _, expert in tokens], minlength=len(names))
    labels = [f"{shorten(name, 24)} {percent(n / counts.sum(), 0)}" for name, n in zip(names, counts, strict=True)]
    step = max(map(len, labels)) * 0.92 + 3.4
    per_row = max(1, int(columns / step))
    entries = [(i % per_row * step, i, label) for i, label in enumerate(labels)]
    return [entries[i : i + per_row] for i in range(0, len(entries), per_row)]


# -- 4: healing ----------------------------------------------------------------------------------------------------
Log = Sequence[Mapping[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]  # tokens (n,), values (n,) or (n, E)


def loss_curves(
    log: Log, names: Sequence[str], path: PathLike, control_log: Log | None = None, *, dense: float | None = None
) -> None:
    """Healing loss of the experts (and of the pruned control) over tokens; the router's loss; the experts' load.

    log:    the training log's rows with `round`, `stage` ("router" or "experts"), `tokens` (of that stage), `losses`.
    dense:  the source's held-out nats per token, drawn as a dashed line.

    Raises MoesaicError without a step; MissingExtraError without matplotlib.
    """
    moe, control = _curve(log, "experts", "losses", "lm"), _curve(control_log or (), "experts", "losses", "lm")
    router, load = _curve(log, "router", "losses", "router"), _curve(log, "router", "metrics", "load")
    if not len(moe[0]) and not len(router[0]):
        raise MoesaicError("the healing log is empty, expected at least one training step; heal the model first")
    shown = [len(moe[0]) > 0, len(router[0]) > 0, len(load[0]) > 0]
    with drawing(path, 0.2 + 2.9 * sum(shown) + 2.2 * shown[0], 3.5, *_curve_words(moe[1], control[1])) as figure:
        ratios = [ratio for ratio, here in zip((1.8, 1, 1), shown, strict=True) if here]
        panels = iter(figure.subplots(1, sum(shown), gridspec_kw={"width_ratios": ratios}, squeeze=False)[0])
        if shown[0]:
            axes = next(panels)
            lines = [(moe, PALETTE[0], "experts"), (control, PALETTE[4], "pruned control")]
            _draw_curves(axes, [line for line in lines if len(line[0][0])], "Next-token loss, nats", dense)
            _mark_rounds(axes, log, "experts")
        if shown[1]:
            axes = next(panels)
            _draw_curves(axes, [(router, PALETTE[2], "router")], "Router loss, nats")
            _mark_rounds(axes, log, "router")
        if shown[2]:
            _draw_loads(next(panels), load, names)


def _curve(log: Log, stage: str, group: str, name: str) -> Curve:
    """What a stage logged under row[group][name], over the tokens read; steps without it are left out."""
    known = [(at, row[group][name]) for at, row in _with_tokens(log, stage) if name in row.get(group, ())]
    return np.array([at for at, _ in known], dtype=float), np.array([value for _, value in known], dtype=float)


def _with_tokens(log: Log, stage: str) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """A stage's rows, each with the tokens read up to its end in all rounds: every round counts its own from zero."""
    before, last, current = 0.0, 0.0, None
    for row in log:
        if row["stage"] == stage:
            if row["round"] != current:
                before, current = before + last, row["round"]
            last = float(row["tokens"])
            yield before + last, row


def _draw_curves(axes: Any, lines: Sequence[tuple[Curve, str, str]], title: str, dense: float | None = None) -> None:
    """Single steps pale, the running mean bold."""
    for (tokens, loss), colour, label in lines:
        axes.plot(tokens, loss, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(tokens, smooth(loss), "o-" if len(loss) == 1 else "-", color=colour, linewidth=2, label=label)
    if len(lines) > 1:
        axes.legend(frameon=False, loc="upper right", handlelength=1.4)
    losses = np.concatenate([loss for (_, loss), *_ in lines])
    low, high = np.percentile(losses, [0, 97])  # the first steps are far off and would flatten the rest
    if dense is not None:
        low, high = min(low, dense), max(high, dense)
        axes.axhline(dense, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
        label_at(axes, "dense source, held out", (0, dense), ("axes fraction", "data"), (4, 3), size=8.5)
    margin = 0.07 * (high - low) + 0.01
    axes.set_ylim(low - margin, high + margin)
    _token_axis(axes, title)


def _draw_loads(axes: Any, load: Curve, names: Sequence[str]) -> None:
    tokens, load_nE = load
    smoothed_En = np.stack([smooth(column) for column in load_nE.T])
    colours = [expert_colour(expert) for expert in range(len(names))]
    axes.stackplot(tokens, smoothed_En, colors=colours, edgecolor="white", linewidth=0.4)
    axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=["0", "50 %", "100 %"])
    _token_axis(axes, "Router's choices")
    centres = smoothed_En[:, -1].cumsum() - smoothed_En[:, -1] / 2
    for name, y in zip(names, spread(centres, 1 / 17), strict=True):
        label_at(axes, shorten(name, 16), (1, y), "axes fraction", (5, 0), va="center", size=8)


def smooth(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Running mean over `share` of all points: centred, so that the steep start stays; only backwards at the end."""
    half = max(1, round(share * len(values) / 2))
    return np.array([values[max(0, i - half) : i + min(half, i) + 1].mean() for i in range(len(values))])


def spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Increasing `positions` in [0, 1] moved apart to at least `gap`: pushed up, then down from the top."""
    moved = np.array(positions, dtype=float)
    gap = min(gap, 1 / max(1, len(moved)))
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    ceiling = 1 - gap / 2
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def _token_axis(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", size=9.5, color=QUIET)
    axes.set_xlabel("tokens")
    axes.margins(x=0)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))


def _mark_rounds(axes: Any, log: Log, stage: str) -> None:
    starts: dict[int, float] = {}
    previous = 0.0
    for tokens, row in _with_tokens(log, stage):
        starts.setdefault(row["round"], previous)
        previous = tokens
    for number, start in list(starts.items())[1:]:
        axes.axvline(start, color=RULE, linewidth=1, zorder=0)
        label_at(axes, f"round {number + 1}", (start, 0), ("data", "axes fraction"), (3, 3), size=8, color=QUIET)


def _curve_words(moe: np.ndarray, control: np.ndarray) -> tuple[str, str]:
    subtitle = "Training batches, balanced over domains; pale: single steps, bold: running mean."
    if not len(moe):
        return "The router's training", subtitle
    last = slice(-max(1, len(moe) // 10), None)
    subtitle += " The end is the mean of the last tenth."
    end = float(moe[last].mean())
    if not len(control):
        return f"Healing ends at {nats(end)} nats per token", subtitle
    gap = end - float(control[last].mean())
    if abs(gap) < 5e-4:
        return "Healing ends level with the pruned control", subtitle
    return f"Healing ends {nats(abs(gap))} nats {'below' if gap < 0 else 'above'} the pruned control", subtitle
