"""The ways to compute a bank of FFN experts, and the choice between them; as `backends.py` for channel blocks.

loop        a plain product for each expert. Never wrong, and what training uses.
grouped_mm  torch's grouped product, one call for all experts.
prepacked   the loop on copies in oneDNN's own order.
Shapes: P token-slots sorted by expert, D model width, H expert width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.experts import packed, tuning

if TYPE_CHECKING:
    from moesaic.experts.bank import FFNBank

BankPath = Callable[["FFNBank", Tensor, Sequence[int]], Tensor]
"""(bank, rows sorted by expert (P, D), rows of each expert) -> (P, D)."""


def loop(bank: "FFNBank", rows_PD: Tensor, counts: Sequence[int]) -> Tensor:
    """A plain product for each expert that has rows."""
    return by_expert(rows_PD, counts, bank.run)


def prepacked(bank: "FFNBank", rows_PD: Tensor, counts: Sequence[int]) -> Tensor:
    """The loop on packed copies."""

    def run(expert: int, x_ND: Tensor) -> Tensor:
        copy = bank.copy_of(expert)
        y_ND = copy.project(copy.hidden(x_ND, bank.activation, bank.gated))
        return y_ND if bank.down_bias is None else y_ND + bank.down_bias[expert]

    return by_expert(rows_PD, counts, run)


def grouped_mm(bank: "FFNBank", rows_PD: Tensor, counts: Sequence[int]) -> Tensor:
    """torch's grouped product."""
    ends = torch.tensor(counts, device=rows_PD.device).cumsum(0).int()
    hidden = F.grouped_mm(rows_PD, bank.gate_up.transpose(-2, -1), offs=ends)
    if bank.gated:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = bank.activation(gate) * up
    else:
        hidden = bank.activation(hidden)
    return F.grouped_mm(hidden, bank.down.transpose(-2, -1), offs=ends)


def by_expert(rows_PD: Tensor, counts: Sequence[int], run: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`run(expert, rows)` of each expert that has rows."""
    parts = rows_PD.split(list(counts))
    return torch.cat([run(expert, part) for expert, part in enumerate(parts) if len(part)])


@dataclass(frozen=True)
class BankBackend:
    """One way of computing a bank in inference. `copies`: whether it computes from a copy of each used expert."""

    name: str
    path: BankPath
    needs: str
    suits: Callable[["FFNBank"], bool]
    copies: bool = False

    def affordable(self, bank: "FFNBank", counts: Sequence[int]) -> bool:
        """Whether its copies are there or fit into the limit."""
        if not self.copies:
            return True
        sizes = bank.expert_bytes
        return bank.copies.fits(bank, [(e, sizes[e]) for e, count in enumerate(counts) if count])


def _onednn(bank: "FFNBank") -> bool:
    plain = bank.down.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and packed.available(bank.down.dtype)


def _grouped(bank: "FFNBank") -> bool:
    """No biases; rows that begin at multiples of 16 bytes."""
    aligned = all(n * bank.down.element_size() % 16 == 0 for n in (bank.width, bank.hidden))
    supported = bank.down.dtype in (torch.float32, torch.bfloat16) and hasattr(F, "grouped_mm")
    return aligned and supported and bank.gate_up_bias is None and bank.down_bias is None


# The simplest first: a later one must be clearly faster to be preferred.
BANK_BACKENDS = {
    backend.name: backend
    for backend in (
        BankBackend("loop", loop, "nothing", lambda bank: True),
        BankBackend("grouped_mm", grouped_mm, "torch's grouped_mm, no biases", _grouped),
        BankBackend("prepacked", prepacked, "oneDNN, a copy of each expert", _onednn, copies=True),
    )
}


def choose(bank: "FFNBank", counts: Sequence[int]) -> BankPath:
    """The fastest measured path that can be had, the loop where nothing was measured."""
    if torch.is_grad_enabled() or bank.down.device.type != "cpu":
        return loop
    used = sum(count > 0 for count in counts)
    for name in tuning.ranking(tuning.bank_shape(bank), sum(counts), used):
        backend = BANK_BACKENDS.get(name)
        if backend is not None and backend.suits(bank) and backend.affordable(bank, counts):
            return backend.path
    return loop
