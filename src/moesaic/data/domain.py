"""A domain is a named list of documents, split by document so that no text is on both sides."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moesaic.errors import MoesaicError

VALIDATION_SHARE = 0.1
MIN_DOCUMENTS = 2


@dataclass(frozen=True)
class Domain:
    """One kind of text. `train` and `validation` never share a document."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of both splits."""
        return sum(len(text.encode()) for text in self.train + self.validation)


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_documents(name: str, documents: Iterable[str], validation_share: float = VALIDATION_SHARE) -> Domain:
    """Split by each document's own hash: stable whatever the order, the machine, or what else is in the domain.

    A document is held out when its SHA-256, read as a fraction, falls below `validation_share`; if that leaves a side
    empty (few documents), the document with the lowest or highest hash is moved.

    Raises MoesaicError if fewer than two distinct non-empty documents are given, or one that cannot be UTF-8.
    """
    if isinstance(documents, str):
        raise MoesaicError(f"domain {name!r} is one string; expected a list of documents")
    try:
        unique = sorted({text for text in documents if text.strip()}, key=_rank)
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no UTF-8 text contains
        raise MoesaicError(
            f"domain {name!r} has a document that is not Unicode text ({error.reason} at character {error.start}); "
            "remove or mend it"
        ) from None
    if len(unique) < MIN_DOCUMENTS:
        raise MoesaicError(
            f"domain {name!r} has {len(unique)} non-empty document(s); at least {MIN_DOCUMENTS} are needed, so that "
            "validation text is never training text. Add documents, or split the file (jsonl: one document a line; "
            "txt: documents separated by a blank line)."
        )
    held_out = sum(int.from_bytes(_rank(text)[:4], "big") < validation_share * 2**32 for text in unique)
    held_out = min(max(held_out, 1), len(unique) - 1)
    return Domain(name, train=tuple(unique[held_out:]), validation=tuple(unique[:held_out]))


def drop_near_duplicates(documents: Iterable[str], words: int = 8, limit: float = 0.5) -> Iterator[str]:
    """Yield documents of which at most `limit` of the `words`-word shingles were seen in earlier ones.

    Licence texts and README boilerplate repeat across packages; without this a held-out document would have a twin in
    the training split.
    """
    seen: set[int] = set()
    for text in documents:
        tokens = re.findall(r"\w+", text.lower())
        shingles = {hash(tuple(tokens[i : i + words])) for i in range(max(1, len(tokens) - words + 1))}
        if len(shingles & seen) <= limit * len(shingles):
            yield text
        seen |= shingles
