"""Refactored models as folders, engines on them, and what generate() says to one prompt: shared by tests of serving."""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from families import tiny
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Event, Finished, Generation, Routed, Token

NAMES = ["alpha", "beta", "gamma"]
VOCAB = 96  # as the families have it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of experts that main memory only stands behind
ROUTE_STD = 0.5  # far from initialisation, so that routes change from token to token


def letters() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 96 tokens: three special ones and printable ASCII without ~ and |."""
    words = ["<pad>", "<s>", "</s>"] + ["\u0120"] + [chr(c) for c in range(33, 127) if chr(c) not in "~|"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def served_folder(folder: Path, family: str = "llama", untied: bool = False) -> Path:
    """A random refactored model of a family, with three experts and a tokenizer, as a checkpoint in `folder`."""
    dense = tiny(family)
    generator = torch.Generator().manual_seed(7)
    masks = [torch.rand(3, site.width, generator=generator) < 0.5 for site in find_ffn_sites(dense)]
    model = attach(dense, masks, NAMES, untied=untied)
    for name, parameter in model.pregate.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=ROUTE_STD, generator=generator)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def reference(folder: Path) -> MoesaicForCausalLM:
    """The whole model, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def alone(model: MoesaicForCausalLM, prompt: Sequence[int], tokens: int) -> list[int]:
    """What generate() says to a single prompt, greedily; past the end-of-sequence token."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@dataclass
class Heard:
    """All that was told of one request."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    number: int = -1

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    def wait(self, seconds: float = 60) -> "Heard":
        assert self.ended.wait(seconds), "the request did not end"
        return self

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if not isinstance(event, Routed))

    @property
    def end(self) -> Finished:
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


def greedy(tokens: int, **changes: object) -> Generation:
    """Generation as `alone` does it, where the end-of-sequence token counts as any other."""
    return Generation(max_tokens=tokens, temperature=0, **changes)  # type: ignore[arg-type]


@contextmanager
def engine(folder: Path, **options: object) -> Iterator[Engine]:
    """A running engine in float32 that ends with the block."""
    own = Engine(folder, EngineOptions(**{"memory": "2GiB", "dtype": "float32", **options}))  # type: ignore[arg-type]
    own.runner.eos = frozenset()
    own.start()
    try:
        yield own
    finally:
        own.close()
        if torch.cuda.is_available():  # an engine's process ends with it; here the next one wants its memory
            del own
            gc.collect()
            torch.cuda.empty_cache()


def ask(own: Engine, prompt: Sequence[int], generation: Generation) -> Heard:
    """Submit, and listen."""
    heard = Heard()
    heard.number = own.submit(prompt, generation, heard)
    return heard


def ask_all(own: Engine, wanted: Sequence[Sequence[int]], generation: Generation) -> list[list[int]]:
    """The answers to all prompts, submitted at once."""
    heard = [ask(own, prompt, generation) for prompt in wanted]
    return [each.wait().ids for each in heard]
