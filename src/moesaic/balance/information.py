"""Entropy and information of counted choices, nats: the one definition that receipts, comparisons and claims share."""

from torch import Tensor


def entropy(counts: Tensor, corrected: bool = True) -> float:
    """Entropy of what was counted; 0 for nothing. `corrected` adds Miller and Madow's (cells - 1) / (2 samples)."""
    counts = counts.flatten().double()
    counts = counts[counts > 0]
    if not len(counts):
        return 0.0
    share = counts / counts.sum()
    bias = (len(counts) - 1) / (2 * counts.sum()) if corrected else 0.0
    return float(-(share * share.log()).sum() + bias)


def mutual_information(table: Tensor, corrected: bool = True) -> float:
    """I(row; column) of a table of counts: H(row) + H(column) - H(cell)."""
    return sum(entropy(table.sum(axis), corrected) for axis in (0, 1)) - entropy(table, corrected)


def normalised_information(table: Tensor) -> float:
    """2 I / (H(row) + H(column)): 0 for independence, 1 where each tells the other; 0 where neither varies."""
    total = entropy(table.sum(1)) + entropy(table.sum(0))
    return 2 * mutual_information(table) / total if total > 0 else 0.0
