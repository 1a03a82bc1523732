"""What a plan chooses from: a bank of routed experts, free ones after it, shared ones beside it.

y = sum_j weight_j * Expert[index_j](x) + sum_s Shared_s(x) + bias
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFNBank, ModuleBank
from moesaic.routing.contract import RoutePlan


class Pool(nn.Module):
    """Expert ids: 0.. of the bank, then the free experts in order. Shared experts have no id.

    bias:   (D,) added once for every token whatever runs: the down bias of a dense FFN that was cut into slices.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        bank: FFNBank | ModuleBank,
        *,
        free: Sequence[nn.Module] = (),
        shared: FFNBank | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bank = bank
        self.free = nn.ModuleList(free)
        self.shared = shared
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    @property
    def experts(self) -> int:
        """Number of experts a router may choose from."""
        return self.bank.experts + len(self.free)

    @property
    def kinds(self) -> list[str]:
        """Kind of each expert: "ffn", "module", "zero", "copy", "constant"."""
        return [self.bank.kind] * self.bank.experts + [str(expert.kind) for expert in self.free]

    @property
    def expert_bytes(self) -> list[int]:
        """Stored bytes of each expert; free experts count what they store, which is next to nothing."""
        free = [sum(p.numel() * p.element_size() for p in expert.parameters()) for expert in self.free]
        return self.bank.expert_bytes + free

    @property
    def flops_per_token(self) -> list[int]:
        """FLOPs of each expert for one token; free experts are free."""
        return self.bank.flops_per_token + [0] * len(self.free)

    def forward(self, x_ND: Tensor, plan: RoutePlan) -> Tensor:
        """(N, D) -> (N, D), the residual branch.

        Raises MoesaicError if the plan was made for another number of tokens.
        """
        if len(plan.index) != len(x_ND):
            raise MoesaicError(f"the plan is for {len(plan.index)} tokens, but {len(x_ND)} are computed")
        y_ND = self.bank(x_ND, plan)
        for offset, expert in enumerate(self.free):
            if expert.kind != "zero":
                weight = (plan.weight * (plan.index == self.bank.experts + offset)).sum(-1, keepdim=True)
                y_ND = y_ND + weight.to(y_ND.dtype) * expert(x_ND)
        for index in range(0 if self.shared is None else self.shared.experts):
            y_ND = y_ND + self.shared.run(index, x_ND)  # type: ignore[union-attr]
        return y_ND if self.bias is None else y_ND + self.bias


def all_on(tokens: int, experts: int, device: torch.device | None = None) -> RoutePlan:
    """The plan that runs every expert with weight one: what a sliced dense FFN was."""
    index = torch.arange(experts, dtype=torch.int32, device=device).expand(tokens, experts)
    return RoutePlan(index, torch.ones(tokens, experts, device=device))
