"""The receipt and coloured text in a terminal, with the same words and numbers as on paper.

Here too: the experts' colours, the same in every picture, and how tokens are laid out in lines of characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesaic.refactor.report import Table, caveats, facts, headline, percent, shorten, tables, visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Token = tuple[str, int]  # what the token adds to the text, and its expert

# Okabe and Ito's seven, then five that stay apart from them and each other under simulated protanopia, deuteranopia
# and tritanopia (Machado et al., 2009); tests/test_report.py measures it.
PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9",
    "#F0E442", "#332288", "#7A4E10", "#9C70FF", "#A8EFC4", "#7A0A00",
)  # fmt: skip


def expert_colour(expert: int) -> str:
    """The colour of an expert, #rrggbb; the second dozen are tints of the first, and then they repeat."""
    colour = PALETTE[expert % len(PALETTE)]
    return tint(colour, 0.5) if expert // len(PALETTE) % 2 else colour


def tint(colour: str, white: float) -> str:
    """`colour` mixed with a share of `white`."""
    mixed = [round((1 - white) * int(colour[i : i + 2], 16) + white * 255) for i in (1, 3, 5)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour`: its contrast (WCAG 2.1) is then 4.5 or more."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def layout_tokens(tokens: Iterable[Token], columns: int, max_lines: int) -> list[tuple[int, int, str, int]]:
    """Pieces (line, column, characters, expert) in lines of at most `columns` characters and `max_lines` lines.

    A line ends after ⏎, or before a token that would cross its end; a token longer than a line is several pieces.
    """
    pieces: list[tuple[int, int, str, int]] = []
    line = column = 0
    end = False  # whether the next character begins a line
    for text, expert in tokens:
        text, piece, start = visible(text), "", column
        end = end or columns - column < len(text.partition("⏎")[0]) <= columns
        for character in text:
            if column == columns or (end and character != "⏎"):  # empty lines stay on the line before them: ⏎⏎
                if piece:
                    pieces.append((line, start, piece, expert))
                line, column, start, piece = line + 1, 0, 0, ""
                if line == max_lines:
                    return pieces
            piece, column, end = piece + character, column + 1, character == "⏎"
        if piece:
            pieces.append((line, start, piece, expert))
    return pieces or [(0, 0, " ", 0)]


def coloured_tokens(tokens: Sequence[Token], names: Sequence[str]) -> Text:
    """`tokens` (what each adds to the text, its expert) on their experts' colours, and below them who took what share.

    Line breaks show as ⏎ and break; control characters of the text never reach the terminal.
    """
    from rich.text import Text

    text = Text()
    for piece, expert in tokens:
        text.append(visible(piece).replace("⏎", "⏎\n"), style=_style(expert))
    text.append("" if text.plain.endswith("\n") else "\n")
    counts = Counter(expert for _, expert in tokens)
    for expert, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        text.append("\n")
        text.append(f" {percent(count / len(tokens)):>7} ", style=_style(expert))
        text.append(f" {shorten(names[expert], 60)}")
    return text


def receipt_tables(receipt: Mapping[str, Any]) -> list[RenderableType]:
    """What to print, in order: the sentences, every table with its note, settings and environment, in 100 columns.

    Raises MoesaicError as `report.receipt_markdown` does.
    """
    from rich.text import Text

    first, *rest = headline(receipt)
    result: list[RenderableType] = [Text.assemble((first, "bold"), " " + " ".join(rest), "\n")]
    result += [Text(f"Thin data: {caveat}\n", style="yellow") for caveat in caveats(receipt)]
    for table in tables(receipt):
        result.append(_rich_table(table))
        result.append(Text(table.note + "\n" if table.note else "", style="dim"))
    result += [Text.assemble((f"{title}: ", "bold"), text) for title, text in facts(receipt)]
    return result


def _rich_table(table: Table) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    names = 18 if len(table.columns) > 7 else 24  # what fits 100 columns
    grid.add_column(table.columns[0], no_wrap=True)
    for column in table.columns[1:]:
        grid.add_column(column, justify="right")
    for i, (name, *numbers) in enumerate(table.rows, 1):
        cells = [
            Text(visible(cell), "bold green" if (i - 1, j) in table.bold else "") for j, cell in enumerate(numbers, 1)
        ]
        grid.add_row(Text(shorten(name, names)), *cells, end_section=i + 1 == len(table.rows) and table.total)
    return grid


def _style(expert: int) -> str:
    colour = expert_colour(expert)
    return f"{ink_on(colour)} on {colour}"
