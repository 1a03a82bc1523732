"""A receipt for people: what it says in sentences, its tables, and one page of Markdown.

Sentences and tables are computed here once, from the numbers alone; `terminal` shows the same in colour. This is also
the one place that decides how numbers are written.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.files import human_bytes

Receipt = Mapping[str, Any]

VARIANTS = {  # in the order of the table's columns
    "dense": "the source model",
    "moe": "the refactored model, its router choosing",
    "pruned": "the control, one fixed set of channels of an expert's width, healed on the same tokens",
    "oracle": "every token sent to its domain's own expert",
    "random": "every token sent to a random expert",
    "unhealed": "router trained, experts not",
}
PICTURES = {
    "expert_domain.png": "what each domain loses under each expert",
    "channel_ownership.png": "which expert owns which channels, layer by layer",
    "token_strip.png": "real text, each token in the colour of its expert",
    "loss_curves.png": "loss while healing",
}
MISSING = "–"


# -- numbers -------------------------------------------------------------------------------------------------------
def nats(value: float | None, digits: int = 3) -> str:
    """2.314; also for bits."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """+0.037 or −0.037, and 0.000 without a sign."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """81.4 %; what would round to nothing but is something reads <1 %."""
    if share is None:
        return MISSING
    least = 10.0**-digits
    return f"<{least:.{digits}f} %" if 0 < 100 * share < least / 2 else f"{100 * share:.{digits}f} %".replace("-", "−")


def times(ratio: float | None) -> str:
    """1.31×."""
    return MISSING if ratio is None else f"{ratio:.2f}×"


def amount(value: float | None) -> str:
    """Three significant digits and a unit: 740, 12.3 k, 620 k, 1.24 G."""
    if value is None:
        return MISSING
    units = ["", " k", " M", " G", " T"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    text = f"{value:.3g}"
    return text + units[0]


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters, its middle left out: the ends of paths and names tell most."""
    text = visible(text)
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def visible(text: str) -> str:
    """`text` with nothing hidden: ⏎ for line breaks, spaces for tabs, � for control and formatting characters."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join("⏎" if c == "\n" else c if c.isprintable() or c == "\u3000" else "�" for c in text)


# -- sentences -----------------------------------------------------------------------------------------------------
def headline(receipt: Receipt) -> list[str]:
    """What the numbers say, the verdict first: better or worse than the control, what it lost, how large, how fast."""
    quality = _part(receipt, "quality")
    sentences = [
        _verdict(quality),
        _cost(quality),
        _routing(quality),
        _sizes(receipt.get("bytes")),
        _speed(receipt.get("speed")),
    ]
    return [sentence for sentence in sentences if sentence]


def _verdict(quality: Mapping[str, Any]) -> str:
    average, difference = quality["average"], quality.get("moe_minus_pruned")
    if difference is None or "pruned" not in average:
        return (
            f"Whether the experts help is not known: no pruned control was healed beside them. They reach "
            f"{nats(average['moe'])} nats per token."
        )
    levels = f"{nats(average['moe'])} against {nats(average['pruned'])} nats per token"
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    domains = f"better in {difference['better_domains']} of {len(quality['domains'])} domains"
    if low <= 0 <= high:
        return (
            f"The refactored model cannot be told apart from the pruned control: {levels}, difference {signed(mean)} "
            f"(95 % interval {signed(low)} to {signed(high)}), {domains}."
        )
    word, near, far = ("better", high, low) if high < 0 else ("worse", low, high)
    return (
        f"The refactored model is {word} than the pruned control: {levels}, {nats(abs(mean))} {word} "
        f"(95 % interval {nats(abs(near))} to {nats(abs(far))}), {domains}."
    )


def _cost(quality: Mapping[str, Any]) -> str:
    average, gap = quality["average"], quality.get("gap_share")
    loss = average["moe"] - average["dense"]
    if abs(loss) < 5e-4:
        return f"It is level with its dense source ({nats(average['dense'])})."
    if loss < 0:
        return (
            f"It is {nats(-loss)} nats better than its dense source ({nats(average['dense'])}), which did not train on "
            "the healing tokens."
        )
    share = f", {percent(gap, 0)} of what the pruned control loses" if gap is not None else ""
    return f"It loses {nats(loss)} nats to its dense source ({nats(average['dense'])}){share}."


def _routing(quality: Mapping[str, Any]) -> str:
    average = quality["average"]
    if "oracle" not in average or "random" not in average:
        return ""
    chance, oracle = average["random"] - average["moe"], average["moe"] - average["oracle"]
    if chance < 5e-4:
        return f"The router does not help: random experts do as well or better ({signed(chance)} nats)."
    known = (
        f"{nats(oracle)} worse" if oracle >= 5e-4 else f"{nats(-oracle)} better" if oracle <= -5e-4 else "no different"
    )
    than = "from" if known == "no different" else "than"
    return (
        f"The router's choice is {nats(chance)} nats better than a random one, and {known} {than} knowing the domain."
    )


def _sizes(sizes: Mapping[str, Any] | None) -> str:
    if not sizes:
        return ""
    active = sizes["active_parameters"] / sizes["dense_parameters"]
    larger = ", so it is larger than its source," if sizes["ratio"] > 1 else ""
    stored, used = percent(sizes["ratio"], 0), percent(active, 0)
    return f"It stores {stored} of the source's bytes{larger} and uses {used} of its parameters per token."


def _speed(speed: Mapping[str, Any] | None) -> str:
    cells = (speed or {}).get("cells")
    if not cells:
        return "Its speed was not measured."
    ratios = {cell["name"]: cell["ratio"]["median"] for cell in cells}
    slower = [f"{name} ({times(ratio)})" for name, ratio in ratios.items() if round(ratio, 2) < 1]
    span = f"{times(min(ratios.values()))} to {times(max(ratios.values()))}"
    if not slower:
        return f"It is at least as fast as its source wherever measured ({span})."
    if len(slower) == len(ratios):
        return f"It is slower than its source wherever measured ({span})."
    return f"It is slower than its source in {_listed(slower)}; the best is {times(max(ratios.values()))}."


# -- tables --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Table:
    """Finished text: the first column words, the others numbers; (row, column) of cells in `bold`; a `note` below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    total: bool = False  # whether the last row sums the others up


def tables(receipt: Receipt) -> list[Table]:
    """All tables of a receipt, in reading order; parts that were not measured are left out."""
    quality = _part(receipt, "quality")
    result = [_quality_table(quality), _bits_table(quality)]
    if router := receipt.get("router"):
        result.append(_router_table(router, _part(receipt, "model")["experts"], quality["domains"]))
    if sizes := receipt.get("bytes"):
        result.append(_bytes_table(sizes, receipt.get("layout")))
    if (speed := receipt.get("speed")) and speed.get("cells"):
        result.append(_speed_table(speed))
    return result


def _quality_table(quality: Mapping[str, Any]) -> Table:
    nats_of, average = quality["nats"], quality["average"]
    shown = [name for name in VARIANTS if name in nats_of]
    rows = [[domain, *(nats(nats_of[name][g]) for name in shown)] for g, domain in enumerate(quality["domains"])]
    rows.append(["average", *(nats(average[name]) for name in shown)])
    columns = ["domain", *shown]
    if difference := quality.get("moe_minus_pruned"):
        columns.append("moe − pruned")
        intervals = [*difference["per_domain"], [difference[key] for key in ("mean", "low", "high")]]
        for row, (mean, low, high) in zip(rows, intervals, strict=True):
            row.append(f"{signed(mean)} ({signed(low)}, {signed(high)})")
    note = "; ".join(f"{name}: {VARIANTS[name]}" for name in shown)
    note += f". {quality['windows_per_domain']} held-out windows of {quality['sequence_length']} tokens per domain"
    note += f"; in brackets: {difference['method']}." if difference else "."
    if similar := quality.get("agreement"):
        divergence = quality.get("kl", {})
        parts = [f"{name} {percent(share)} (KL {nats(divergence.get(name))} nats)" for name, share in similar.items()]
        note += f" Same most likely token as the dense source: {', '.join(parts)}."
    return Table("Quality, nats per token", columns, rows, _best(rows, columns), note, total=True)


def _bits_table(quality: Mapping[str, Any]) -> Table:
    bits = quality["bits_per_byte"]
    shown = [name for name in VARIANTS if name in bits]
    rows = [[domain, *(nats(bits[name][g]) for name in shown)] for g, domain in enumerate(quality["domains"])]
    columns = ["domain", *shown]
    return Table("Quality, bits per byte", columns, rows, _best(rows, columns))


def _best(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> frozenset[tuple[int, int]]:
    """Cells of the lower of moe and pruned in each row; none where they read the same."""
    if "pruned" not in columns:
        return frozenset()
    moe, pruned = columns.index("moe"), columns.index("pruned")

    def value(text: str) -> float:
        return float(text.replace("−", "-")) if text != MISSING else float("inf")

    different = [(i, row) for i, row in enumerate(rows) if row[moe] != row[pruned]]
    return frozenset((i, moe if value(row[moe]) < value(row[pruned]) else pruned) for i, row in different)


def _router_table(router: Mapping[str, Any], experts: Sequence[str], domains: Sequence[str]) -> Table:
    rows = []
    for expert, name in enumerate(experts):
        shares = dict(zip(domains, router["confusion"][expert], strict=True))
        own = shares.pop(name, None)
        other = max(shares, key=lambda domain: shares[domain], default=None)
        most = f"{percent(shares[other])} of {shorten(other, 20)}" if other is not None else MISSING
        rows.append([name, percent(router["load"][expert]), percent(own), most])
    label, stay = percent(router["label_accuracy"]), percent(router["stay_probability"])
    note = (
        f"The router takes the expert that the dense model's activations favour for {label} of the tokens, and the "
        f"expert of the token before for {stay}. "
        f"Entropy of the load: {nats(router['entropy'], 2)} of at most {nats(router['max_entropy'], 2)} nats."
    )
    if shared := router.get("layer_mutual_information"):
        note += (
            f" What the activations of one layer favour tells {nats(sum(shared) / len(shared), 2)} nats about the next "
            f"({nats(min(shared), 2)} to {nats(max(shared), 2)})."
        )
    return Table("Router", ["expert", "load", "takes of its domain", "takes most elsewhere"], rows, note=note)


def _bytes_table(sizes: Mapping[str, Any], layout: Mapping[str, Any] | None) -> Table:
    def row(name: str, stored: float, parameters: float | None, active: float | None) -> list[str]:
        return [name, human_bytes(stored), percent(stored / sizes["dense"]), amount(parameters), amount(active)]

    dense, moe = sizes["dense_parameters"], sizes["moe_parameters"]
    rows = [
        row("dense source", sizes["dense"], dense, dense),
        row("refactored", sizes["moe"], moe, sizes["active_parameters"]),
        row("of which router", sizes["router"], None, None),
    ]
    if sizes["untied"] != sizes["moe"]:
        rows.append(row("with a copy per expert", sizes["untied"], None, None))
    note = ""
    if layout:
        total = sum(layout["source_widths"])
        kept, shared, dropped = (sum(layout[key]) / total for key in ("widths", "shared", "dropped"))
        note = (
            f"FFN channels: {percent(kept)} of the source's are stored, {percent(shared)} serve all experts, "
            f"{percent(dropped)} are dropped. A layer has at most {max(layout['blocks'])} blocks; an expert's lie in "
            f"at most {max(layout['runs'])} unbroken runs."
        )
    return Table("Bytes", ["", "bytes", "of the source", "parameters", "active per token"], rows, note=note)


def _speed_table(speed: Mapping[str, Any]) -> Table:
    rows = []
    for cell in speed["cells"]:
        dense, moe, ratio = cell["dense"], cell["moe"], cell["ratio"]
        spread = f"{times(ratio['median'])} ({ratio['min']:.2f}, {ratio['max']:.2f})"
        speeds = [amount(side["tokens_per_second"]) for side in (dense, moe)]
        shares = f"{percent(dense['share'], 0)} / {percent(moe['share'], 0)}"
        limits = dict.fromkeys((dense["limit"], moe["limit"]))
        rows.append([cell["name"], *speeds, spread, shares, " / ".join(limits)])
    note = (
        "Tokens per second, medians; a ratio above 1 is faster than dense (in brackets: the slowest and the fastest "
        "round). Of floor, dense / moe: the least time in which this machine can read the bytes and do the operations "
        "needed, over the time taken; limit: which of the two sets that floor."
    )
    if machine := speed.get("machine"):
        gemm = ", ".join(f"{amount(rate * 1e9)}FLOP/s {dtype}" for dtype, rate in machine["gemm_gflop_s"].items())
        note += f" {machine['name']}, {machine['threads']} threads: reads {machine['read_gb_s']:.1f} GB/s, {gemm}."
        load = machine.get("load")
        if load is not None and load > machine["threads"]:
            note += f" It was busy with other work (load {load:.1f}), so trust the ratios more than the rates."
    columns = ["", "dense tok/s", "moe tok/s", "ratio", "of floor", "limit"]
    return Table("Speed", columns, rows, note=note)


def facts(receipt: Receipt) -> list[tuple[str, str]]:
    """Model, settings and environment as one line each."""
    model = _part(receipt, "model")
    shape = (
        f"{model['layers']} layers, width {model['hidden']}, FFN {model['ffn_width']}, vocabulary {model['vocabulary']}"
    )
    lines = [("Source", f"{model['source'] or model['name']}: {shape}")]
    for title in ("settings", "environment"):
        if part := receipt.get(title):
            lines.append((title.capitalize(), ", ".join(f"{key} {value}" for key, value in _flat(part))))
    return lines


def caveats(receipt: Receipt) -> list[str]:
    """What weakens the numbers: domains with too little text."""
    return list((receipt.get("coverage") or {}).get("warnings", ()))


# -- Markdown ------------------------------------------------------------------------------------------------------
def receipt_markdown(receipt: Receipt) -> str:
    """One page: what was found, the tables, the pictures in `receipt["pictures"]` (file names), settings, environment.

    Raises MoesaicError if the receipt has no quality or model part.
    """
    model = _part(receipt, "model")
    first, *rest = headline(receipt)
    lines = [
        f"# Receipt: {_escape(model['name'])} as {len(model['experts'])} experts",
        "",
        f"**{first}** {' '.join(rest)}",
        "",
    ]
    lines += [line for caveat in caveats(receipt) for line in (f"> Thin data: {_escape(caveat)}", "")]
    for table in tables(receipt):
        lines += _markdown_table(table)
    for name in receipt.get("pictures") or ():
        lines += [f"![{PICTURES.get(name, name)}]({name})", ""]
    lines += ["## How", ""]
    lines += [f"- {title}: {_escape(text)}" for title, text in facts(receipt)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    yield from (f"## {table.title}", "")
    yield _markdown_row(table.columns)
    yield _markdown_row(["---"] + ["---:"] * (len(table.columns) - 1))
    for i, row in enumerate(table.rows):
        yield _markdown_row(f"**{_escape(c)}**" if (i, j) in table.bold else _escape(c) for j, c in enumerate(row))
    yield ""
    if table.note:
        yield from (_escape(table.note), "")


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """`text` on one line, with the characters that Markdown would act on made plain."""
    return "".join("\\" + c if c in "\\|*_`<>[]#" else c for c in " ".join(text.split()))


# -- small things --------------------------------------------------------------------------------------------------
def _part(receipt: Receipt, name: str) -> Any:
    if not receipt.get(name):
        raise MoesaicError(f"this receipt has no {name!r} part; expected one written by `moesaic refactor`")
    return receipt[name]


def _flat(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values for people: nested keys joined by a dot, underscores as spaces, None left out."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
            yield (prefix + str(key)).replace("_", " "), text


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
