"""Dynamic routing: harder tokens use more experts (2403.07652).

Its losses are the usual balance loss, with the expert shares normalised by the mean number of experts, and the
router's entropy, minimised (`balance.router_entropy`): without it the model flattens its scores to get more experts.
"""

from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopP
from moesaic.routing.scorers import Linear


class TopPRouter(Router):
    """As many experts as reach probability p, weights raw. `max_k` bounds the cost of an undecided router (ours)."""

    caps = Caps(reads=frozenset({"hidden"}))

    def __init__(self, width: int, experts: int, layers: int, *, p: float = 0.4, max_k: int | None = None) -> None:
        super().__init__(Linear(width, experts, layers), TopP(p, max_k))
