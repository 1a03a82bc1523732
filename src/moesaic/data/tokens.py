"""Token streams per domain and deterministic batches over them: batch(step) depends on (seed, step) alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from moesaic.data.domain import Domain
from moesaic.errors import MoesaicError


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...


@dataclass(frozen=True)
class DomainTokens:
    """One domain as two flat token streams; documents are separated by the boundary token (BOS, else EOS)."""

    name: str
    train: np.ndarray  # (tokens,) int32
    validation: np.ndarray  # (tokens,) int32
    bytes_per_token: float  # of the validation text: turns nats per token into bits per byte

    def windows(self, length: int, limit: int, split: str = "validation") -> torch.Tensor:
        """At most `limit` evenly spaced, non-overlapping windows, (n, length) int64.

        Raises MoesaicError if the split is shorter than one window.
        """
        if limit < 1 or length < 2:
            raise MoesaicError(f"{limit} windows of {length} tokens: at least one window of two tokens is needed")
        stream = getattr(self, split)
        count = len(stream) // length
        if count == 0:
            raise MoesaicError(
                f"domain {self.name!r} has {len(stream)} {split} tokens, fewer than one window of {length}; "
                "add text or lower the sequence length"
            )
        starts = np.linspace(0, count - 1, min(limit, count)).round().astype(int) * length
        return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


def _stream(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    boundary = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    head = [] if boundary is None else [boundary]
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = [np.asarray(head + row, dtype=np.int32) for row in rows]
    return (np.concatenate(ids) if ids else np.zeros(0, np.int32)), sum(len(row) for row in rows)


def tokenize_domains(domains: Sequence[Domain], tokenizer: Tokenizer) -> list[DomainTokens]:
    """Tokenize every domain; see `DomainTokens`."""
    result = []
    for domain in domains:
        train, _ = _stream(tokenizer, domain.train)
        validation, count = _stream(tokenizer, domain.validation)
        size = sum(len(text.encode()) for text in domain.validation)
        result.append(DomainTokens(domain.name, train, validation, bytes_per_token=size / max(1, count)))
    return result


@dataclass(frozen=True)
class TokenBatches:
    """Deterministic training batches: every row is a random window of one domain, domains take turns.

    `batch(step)` is a pure function of the fields and `step`, so a resumed run sees exactly what it would have seen.
    """

    domains: tuple[DomainTokens, ...]
    batch_size: int
    length: int
    seed: int = 0
    weights: tuple[float, ...] | None = None  # sampling weight per domain; None = balanced

    def __post_init__(self) -> None:
        for domain in self.domains:
            if len(domain.train) <= self.length:
                raise MoesaicError(
                    f"domain {domain.name!r} has {len(domain.train)} training tokens, not more than one window of "
                    f"{self.length}; add text or lower the sequence length"
                )

    @property
    def fingerprint(self) -> str:
        """Changes whenever any batch would."""
        digest = hashlib.sha256(repr((self.batch_size, self.length, self.seed, self.weights)).encode())
        for domain in self.domains:
            digest.update(domain.name.encode() + domain.train.tobytes())
        return digest.hexdigest()[:16]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """`input_ids` (B, S) int64 and `domain` (B,) int64."""
        rng = np.random.default_rng((self.seed, step))
        if self.weights is None:
            # Balanced: a permuted deal, so that each batch holds every domain as evenly as the batch size allows.
            labels = rng.permutation(np.arange(self.batch_size) + rng.integers(len(self.domains))) % len(self.domains)
        else:
            shares = np.asarray(self.weights, dtype=np.float64)
            labels = rng.choice(len(self.domains), size=self.batch_size, p=shares / shares.sum())
        rows = []
        for label in labels:
            stream = self.domains[label].train
            start = rng.integers(len(stream) - self.length)
            rows.append(stream[start : start + self.length])
        return {
            "input_ids": torch.from_numpy(np.stack(rows).astype(np.int64)),
            "domain": torch.from_numpy(labels.astype(np.int64)),
        }
