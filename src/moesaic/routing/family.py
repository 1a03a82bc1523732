"""The routers by name: what configs, the command line and the conformance tests choose from."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.routing.contract import Router

# name -> module and class; imported when first used. Every class is built as (width, experts, layers, **options).
ROUTERS = {
    "top-k": ("top_k", "TopKRouter"),
    "recurrent": ("recurrent", "RecurrentRouter"),
    "union": ("union", "UnionRouter"),
    "union-data-selection": ("union", "DataSelectionRouter"),
    "union-expert-selection": ("union", "ExpertSelectionRouter"),
    "frozen-random": ("frozen_random", "FrozenRandomRouter"),
    "embedding-random": ("frozen_random", "EmbeddingRandomRouter"),
    "random": ("random_experts", "RandomRouter"),
    "top-p": ("top_p", "TopPRouter"),
    "zero-computation": ("zero_computation", "ZeroComputationRouter"),
    "fine-grained": ("fine_grained", "FineGrainedRouter"),
    "modality": ("modality", "ModalityRouter"),
    "big-small": ("big_small", "BigSmallRouter"),
}


def router_class(name: str) -> Callable[..., Router]:
    """The class called `name`; raises MoesaicError with the nearest name if there is none."""
    if name not in ROUTERS:
        near = difflib.get_close_matches(name, ROUTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MoesaicError(f"unknown router {name!r}: {hint}expected one of {', '.join(ROUTERS)}")
    module, attribute = ROUTERS[name]
    result: Callable[..., Router] = getattr(importlib.import_module(f"moesaic.routing.{module}"), attribute)
    return result


def build_router(name: str, width: int, experts: int, layers: int, **options: Any) -> Router:
    """A freshly initialised router for `layers` layers of model width `width`.

    Raises MoesaicError for an unknown name or option.
    """
    cls = router_class(name)
    known = [p for p in inspect.signature(cls).parameters if p not in ("width", "experts", "layers")]
    if unknown := [option for option in options if option not in known and "options" not in known]:
        raise MoesaicError(f"router {name!r} has no option {unknown[0]!r}; it takes {', '.join(known) or 'none'}")
    return cls(width, experts, layers, **options)
