"""Steps of single tokens on a GPU: a batch size is captured once as a CUDA graph and replayed with other numbers.

A step launches hundreds of small kernels; on a GPU the launches take longer than the work. A graph launches them all.
Shapes: K integers that a token comes with, B tokens, P tokens of the graph that holds them.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moesaic.experts.triton_blocks import DECODE_TOKENS

log = logging.getLogger("moesaic.serve")

WARM_UP = 2  # passes before capture: kernels compile, libraries take their workspaces


class StepGraphs:
    """A function of integers (K, P) on the device, called with those of B tokens; its answer's first B rows.

    function: runs without waiting for the device, its answer has a row for each token. What fills up P repeats the
              first token: whatever that writes, it writes twice.
    most:     tokens that may come at once; P is a power of two, DECODE_TOKENS at most. Devices without graphs call the
              function as it is.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device, most: int) -> None:
        self.function, self.device = function, device
        self.most = min(DECODE_TOKENS, 1 << (most - 1).bit_length())
        self.usable = True
        self._captured: dict[int, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # graphs never run together

    def suits(self, tokens: int) -> bool:
        """Whether so many tokens can be answered."""
        return self.usable and 0 < tokens <= self.most

    @torch.inference_mode()
    def __call__(self, columns: Sequence[Sequence[int]]) -> Tensor:
        """columns: K sequences of B integers. The answer is overwritten by the next call."""
        tokens = len(columns[0])
        size = 1 << (tokens - 1).bit_length()
        integers_KP = torch.tensor([[*column, *[column[0]] * (size - tokens)] for column in columns])
        if self.device.type != "cuda":
            return self.function(integers_KP.to(self.device))[:tokens]
        if size not in self._captured:
            self._captured[size] = _Captured(self.function, integers_KP, self.device, self._memory)
        return self._captured[size](integers_KP)[:tokens]

    def warm(self, columns: Sequence[int]) -> None:
        """Capture every size with a token that may be computed; what cannot be captured is not used any more."""
        size = self.most  # the largest first: the others fit into its memory
        while self.device.type == "cuda" and self.suits(size):
            try:
                self([[integer] * size for integer in columns])
            except torch.cuda.OutOfMemoryError as error:
                log.warning("steps of %d tokens run without a CUDA graph: %s", size, str(error).splitlines()[0])
                self.most = size // 2
            except Exception as error:  # triton has errors of its own
                log.warning("steps run without CUDA graphs: %s", str(error).splitlines()[0])
                self.usable = False
                self._captured.clear()
            size //= 2


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Where all graphs are captured: libraries take a workspace for every stream that they see."""
    return torch.cuda.Stream(device)


class _Captured:
    """The graph of one size."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        integers_KP: Tensor,
        device: torch.device,
        memory: Any,
    ) -> None:
        self._host, self._sent = integers_KP.pin_memory(), torch.cuda.Event()
        self._integers = integers_KP.to(device)
        side = _side(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(self._integers)
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may load experts meanwhile, on its own stream.
        with torch.cuda.graph(self._graph, pool=memory, stream=side, capture_error_mode="thread_local"):
            self._answer = function(self._integers)

    def __call__(self, integers_KP: Tensor) -> Tensor:
        self._sent.synchronize()  # nobody may have looked at the last answer, and the integers still be on their way
        self._host.copy_(integers_KP)
        self._integers.copy_(self._host, non_blocking=True)
        self._sent.record()
        self._graph.replay()
        return self._answer
