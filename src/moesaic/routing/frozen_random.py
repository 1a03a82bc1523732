"""SMoE-Dropout: a frozen random router whose k grows until all experts are on (2303.01610).

No router is learned, so none over-fits to one k, and the trained model runs with any k. Weights are a softmax over the
k chosen logits: their sum, and so the scale of the output, does not change with k.
"""

import math
from typing import Any

from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopK, check_k
from moesaic.routing.scorers import FrozenRandom


class FrozenRandomRouter(Router):
    """schedule: "linear", "cosine", "exponential", or "constant"; from k_min to k (default: half to all experts).

    The last `hold` of the steps run at k: else the model is hardly ever trained with all experts.
    """

    caps = Caps(reads=frozenset({"hidden"}), trainable=False, any_k=True)

    def __init__(
        self,
        width: int,
        experts: int,
        layers: int,
        *,
        k_min: int | None = None,
        k: int | None = None,
        growth: str = "linear",
        hold: float = 0.2,
        seed: int = 0,
    ) -> None:
        k_max = experts if k is None else k
        super().__init__(FrozenRandom(width, experts, layers, seed), TopK(k_max, "renorm"))
        self.k_max, self.k_min = k_max, min(k_max, max(1, experts // 2)) if k_min is None else k_min
        check_k(self.k_max, experts)
        check_k(self.k_min, self.k_max)
        if growth not in GROWTH:
            raise MoesaicError(f"growth = {growth!r}: expected one of {', '.join(GROWTH)}")
        self.growth, self.hold = growth, hold

    def schedule(self, step: int, steps: int) -> None:
        """Set k for optimizer step `step` of `steps`."""
        share = min(1.0, step / max(1.0, steps * (1 - self.hold)))
        self.set_k(round(self.k_min + (self.k_max - self.k_min) * GROWTH[self.growth](share)))

    def set_k(self, k: int) -> None:
        """Run with k experts from now on."""
        check_k(k, self.experts)
        self.policy = TopK(k, "renorm")


GROWTH = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: 1 - math.cos(math.pi * share / 2),
    "exponential": lambda share: (1 - 0.99 ** (300 * share)) / (1 - 0.99**300),
}


class EmbeddingRandomRouter(FrozenRandomRouter):
    """Our variant, fed with token embeddings: a fixed hash of the token id, so all plans are known before layer 0.

    embedding:  (vocabulary, D), copied; it stays as it is when the model's own is trained.
    """

    caps = Caps(reads=frozenset({"ids"}), trainable=False, precompute="exact", any_k=True)

    def __init__(self, width: int, experts: int, layers: int, *, embedding: Tensor, seed: int = 0, **options: Any):
        super().__init__(width, experts, layers, seed=seed, **options)
        self.scorer = FrozenRandom(width, experts, layers, seed, embedding)
