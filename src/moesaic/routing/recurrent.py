"""RMoE: the router's state is carried from layer to layer by one GRU cell (2408.06793, eq. 4-6)."""

from dataclasses import replace

from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopK
from moesaic.routing.scorers import Recurrent


class RecurrentRouter(Router):
    """Top-k over a recurrent score, weights renormalised. The paper's state width is 128; wider is worse.

    The state of layer l-1 is a forecast of layer l's plan: `precompute="hint"`.
    """

    caps = Caps(reads=frozenset({"hidden", "previous_plan"}), precompute="hint")

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 2, state_width: int = 128) -> None:
        policy = TopK(k, "renorm")
        super().__init__(Recurrent(width, state_width, experts, layers), policy)
        self.caps = replace(self.caps, trainable=policy.weighs)
