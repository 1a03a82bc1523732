"""How an engine is set up; the same names as in the systems of `simulate/`."""

from dataclasses import dataclass
from typing import Literal

from moesaic.errors import MoesaicError
from moesaic.experts.lowbit_sizes import bits_of

Dtype = Literal["auto", "float32", "bfloat16"]
Weights = Literal["stored", "int8", "int4"]


@dataclass(frozen=True)
class EngineOptions:
    """Raises MoesaicError for values out of range.

    memory:        bytes for everything the engine holds, as a number or "8GiB"; None = what the plan takes.
    experts:       bytes for resident experts, or a share of them in (0, 1]; None = what the budget leaves.
    weights:       what matrices of linear layers and experts are kept in; rows are computed in `dtype` all the same.
    max_tokens:    tokens in one step; longer prompts run in chunks of at most `chunk`.
    max_requests:  running at a time. max_waiting: queued beyond those; more are refused.
    context:       longest prompt plus output, None = what the model allows.
    batcher, policy, predictor: by name, see `schedule.family`.
    lookahead:     layers whose entries are fetched ahead; 0 = on demand alone.
    max_wait_s:    the longest a ready portion is passed over (adaptive batcher).
    prefix_reuse:  keep keys and values of ended requests while memory allows, and reuse equal beginnings.
    batch_invariant: in bfloat16 too no bit of a request depends on its batch mates; decoding of several experts at once
                   is slower. In float32 that is so anyway. On CPUs: devices promise nothing of the kind.
    page_cache:    "keep" lets the system keep read files in memory it does not need; "drop" forces reads from the disk.
    device:        an accelerator, such as "cuda", that computes and has `memory` bytes; None = the CPU. "cpu" runs the
                   accelerator's path on the CPU.
    host_memory:   with a device: main memory for experts, None = for all of them, or what is available.
    """

    memory: int | str | None = None
    experts: int | float | str | None = None
    dtype: Dtype = "auto"
    weights: Weights = "stored"
    max_tokens: int = 512
    chunk: int = 256
    max_requests: int = 32
    max_waiting: int = 1024
    context: int | None = None
    batcher: str = "adaptive"
    policy: str = "belady"
    predictor: str = "exact-pre-gate"
    lookahead: int = 1
    max_wait_s: float = 1.0
    prefix_reuse: bool = True
    batch_invariant: bool = False
    pack: bool = True
    page_cache: Literal["keep", "drop"] = "keep"
    threads: int | None = None
    device: str | None = None
    host_memory: int | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bits_of(self.weights)
        for name in ("max_tokens", "chunk", "max_requests"):
            if getattr(self, name) < 1:
                raise MoesaicError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.max_waiting < 0 or self.lookahead < 0:
            raise MoesaicError(f"max_waiting {self.max_waiting}, lookahead {self.lookahead}: expected at least 0")
        if self.host_memory is not None and self.device is None:
            raise MoesaicError("host_memory is for experts that a device does not hold: name one, such as device cuda")
        if self.context is not None and self.context < 2:
            raise MoesaicError(f"a context of {self.context} tokens holds no prompt and answer: expected at least 2")
