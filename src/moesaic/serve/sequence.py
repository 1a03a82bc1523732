"""A request on its way through the engine: what it asked for, how far it is, and its next portion as a work item."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesaic.schedule.work import Call, Known, Layout, Phase, WorkItem
from moesaic.serve.gate import Experts
from moesaic.serve.request import Deliver, Generation


@dataclass
class Sequence:
    """One request. ids: prompt, then sampled tokens; experts: of the same, as far as they are routed.

    done: tokens whose keys are written; slot: where, None before admission. Times in seconds of the engine's clock.
    """

    id: int
    prompt: list[int]
    generation: Generation
    deliver: Deliver
    arrival_s: float
    sampler: Any = None
    text: Any = None
    bias: Any = None
    ids: list[int] = field(default_factory=list)
    experts: Experts = field(default_factory=lambda: np.zeros(0, np.int16))
    slot: int | None = None
    done: int = 0
    cached: int = 0
    step: int = 0
    since_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    started: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def most_tokens(self) -> int:
        """Keys it may ever write: the last token is sampled but never run."""
        return len(self.prompt) + self.generation.max_tokens - 1

    @property
    def plain(self) -> bool:
        """Whether its keys are what any request with these tokens would have: nothing but tokens chose the experts."""
        return self.bias is None and self.generation.experts_per_token is None

    @property
    def output(self) -> list[int]:
        """The sampled tokens."""
        return self.ids[len(self.prompt) :]

    @property
    def left(self) -> int:
        """Prompt tokens that have not run."""
        return max(len(self.prompt) - self.done, 0)

    def item(self, calls_of: "Calls", tokens: int) -> WorkItem:
        """The next portion: at most `tokens` of what is left of the prompt, else the sampled token."""
        experts = self.experts[self.done : self.done + (min(tokens, self.left) or 1)]
        calls = calls_of(experts)
        phase: Phase = "prefill" if self.left else "decode"
        known = Known.REQUEST if self.left else Known.STEP
        return WorkItem(self.id, self.step, phase, len(experts), calls, known if calls else Known.GATE)


class Calls:
    """The calls of tokens whose experts hold in every layer; those of single tokens are built once.

    gated: routers choose in every layer, so there are no calls yet.
    """

    def __init__(self, layout: Layout, gated: bool = False) -> None:
        self.layout, self.gated = layout, gated
        self._single: dict[int, tuple[Call, ...]] = {}

    def __call__(self, experts: Experts) -> tuple[Call, ...]:
        if self.gated:
            return ()
        if len(experts) > 1:
            return self.layout.calls([dict(sorted(Counter(experts.tolist()).items()))])
        expert = int(experts[0])
        if expert not in self._single:
            self._single[expert] = self.layout.calls([{expert: 1}])
        return self._single[expert]


def majority(item: WorkItem) -> int | None:
    """The expert with most tokens, the lower number at a tie; None where routes are not known yet."""
    if not item.calls:
        return None
    first = item.calls[0].layer
    return min(item.at(first), key=lambda call: (-call.tokens, call.expert)).expert
