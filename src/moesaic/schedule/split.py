"""Which unit runs which expert when two units share the memory (Duplex, 2409.01141, section V-B).

Experts are sorted by tokens; of the n + 1 ways to give the busiest to one unit and the rest to the other, take the
best. The paper moves experts one way and its simulator the other, both stopping at the first loss; the scan of all
n + 1 finds the best of what either could. Units are data: a GPU and its PIM, or a GPU and a CPU (tables with the copy).
Shapes: E experts; tables are indexed by token count, in seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from moesaic.errors import MoesaicError

Table = Sequence[float] | Callable[[int], float]


@dataclass(frozen=True)
class Split:
    """Experts with tokens on each unit, busiest first, and the seconds of each unit; `seconds` includes the join."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    first_seconds: float
    second_seconds: float
    seconds: float


def coprocess(
    tokens_E: Sequence[int],
    first: Table,
    second: Table,
    groups: Sequence[Sequence[int]] | None = None,
    join: float = 0.0,
) -> Split:
    """The best prefix split: the busiest experts on `first` (strong in flops), the rest on `second` (in bandwidth).

    groups: experts that must stay together (a section of memory that only one unit may touch); None = each alone.
    join: seconds to add the partial sums, paid when both units work.
    Never worse than all on `first` or all on `second`: both are among the candidates. Experts without tokens cost 0.
    Raises MoesaicError for negative tokens, a table that is too short, and groups that are no partition.
    """
    if any(tokens < 0 for tokens in tokens_E):
        raise MoesaicError("an expert cannot have a negative number of tokens")
    blocks = _blocks(tokens_E, groups)
    a = [sum(_look(first, tokens_E[e], "first") for e in block) for block in blocks]
    b = [sum(_look(second, tokens_E[e], "second") for e in block) for block in blocks]
    front = list(accumulate(a, initial=0.0))
    back = list(accumulate(reversed(b), initial=0.0))[::-1]
    n = len(blocks)
    costs = [max(front[cut], back[cut]) + (join if 0 < cut < n else 0.0) for cut in range(n + 1)]
    cut = min(range(n + 1), key=lambda at: (costs[at], -at))  # at a tie more on `first`: one unit, no join
    return Split(_flat(blocks[:cut]), _flat(blocks[cut:]), front[cut], back[cut], costs[cut])


def sections(experts: int, count: int = 4) -> list[list[int]]:
    """Experts dealt round-robin over `count` sections of memory (2409.01141, section V-C), empty ones left out."""
    return [list(range(start, experts, count)) for start in range(min(count, experts))]


def _blocks(tokens_E: Sequence[int], groups: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Busy experts of each group, the group with most tokens first."""
    groups = [[expert] for expert in range(len(tokens_E))] if groups is None else groups
    if sorted(e for group in groups for e in group) != list(range(len(tokens_E))):
        raise MoesaicError(f"groups must hold each of the {len(tokens_E)} experts once")
    busy = [[e for e in group if tokens_E[e]] for group in groups]
    busy = [sorted(group, key=lambda e: (-tokens_E[e], e)) for group in busy if group]
    return sorted(busy, key=lambda group: (-sum(tokens_E[e] for e in group), group))


def _look(table: Table, tokens: int, name: str) -> float:
    if callable(table):
        return table(tokens)
    if tokens >= len(table):
        raise MoesaicError(f"the {name} unit's table ends at {len(table) - 1} tokens, but an expert has {tokens}")
    return float(table[tokens])


def _flat(blocks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(expert for block in blocks for expert in block)
