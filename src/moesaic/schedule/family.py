"""Batchers, eviction policies and predictors by name, as system files and the command line write them."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from moesaic.errors import MoesaicError
from moesaic.schedule import batch, batch_by_expert, eviction, predict

T = TypeVar("T")

BATCHERS: dict[str, Callable[..., batch.Batcher]] = {
    "fcfs": batch.FCFS,
    "decode-first": batch.DecodeFirst,
    "prefill-first": batch.PrefillFirst,
    "chunked-prefill": batch.ChunkedPrefill,
    "longest-queue": batch_by_expert.LongestQueue,
    "adaptive": batch_by_expert.Adaptive,
    "regroup": batch_by_expert.Regroup,
    "continuous-stage": batch.ContinuousStage,
    "serial-requests": batch.SerialRequests,
}

EVICTIONS: dict[str, Callable[..., eviction.Eviction]] = {
    "lru": eviction.LRU,
    "lfu": eviction.LFU,
    "fifo": eviction.FIFO,
    "random": eviction.Random,
    "belady": eviction.Belady,
    "predicted-set": eviction.PredictedSet,
    "pinned": eviction.Pinned,
    "section-round-robin": eviction.SectionRoundRobin,
    "all-resident": eviction.AllResident,
}

PREDICTORS: dict[str, Callable[..., predict.Predictor]] = {
    "none": predict.Null,
    "exact-pre-gate": predict.ExactPreGate,
    "learned": predict.Learned,
    "previous-step": predict.PreviousStep,
    "previous-layer": predict.PreviousLayer,
    "markov": predict.Markov,
    "popularity": predict.Popularity,
    "prompt-router": predict.PromptRouter,
    "oracle": predict.Oracle,
}


def near(name: str, known: Iterable[str], what: str) -> MoesaicError:
    """The error for a name that is not among `known`, with the nearest one that is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return MoesaicError(f"unknown {what} {name!r}: {hint}there are {', '.join(known)}")


def make(family: Mapping[str, Callable[..., T]], what: str, name: str, **options: Any) -> T:
    """A member of a family; options that it does not take are dropped, so that one table of options serves all.

    Raises MoesaicError with the nearest name for an unknown one, and for one that needs what `options` lacks.
    """
    if name not in family:
        raise near(name, family, what)
    takes = inspect.signature(family[name]).parameters
    gathers = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each for each, own in takes.items() if own.default is own.empty and own.kind not in gathers]
    if missing := [each for each in needed if each not in options]:
        raise MoesaicError(f"the {what} {name!r} needs {', '.join(missing)}, which is not known here: choose another")
    return family[name](**{option: value for option, value in options.items() if option in takes})
