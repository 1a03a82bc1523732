"""Domain specifications from the command line or Python: installed names, files, folders, Hugging Face datasets."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moesaic.data.domain import Domain, split_documents
from moesaic.data.installed import INSTALLED_DOMAINS, installed_domain
from moesaic.errors import MissingExtraError, MoesaicError

TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".java",
    ".tex",
}
HF_PREFIX = "hf:"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MoesaicError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}). Convert it first, for example with "
            f"`iconv -f LATIN1 -t UTF-8`."
        ) from None
    except OSError as error:
        raise MoesaicError(f"cannot read {path}: {error.strerror}") from None


def _jsonl(path: Path) -> Iterator[str]:
    # Not splitlines(): that also cuts at U+2028 and friends, which are legal inside JSON strings.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoesaicError(f"{path} line {number} is not JSON ({error.msg}); expected one object a line") from None
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise MoesaicError(f'{path} line {number}: expected {{"text": "..."}} or a JSON string')
        yield text


def _blank_line_documents(text: str, at_least: int = 2_000) -> Iterator[str]:
    """Cut one long text at blank lines into documents of at least `at_least` characters."""
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph)
        if size >= at_least:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _folder(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        if file.suffix == ".jsonl":
            yield from _jsonl(file)
        elif file.suffix in TEXT_SUFFIXES and file.is_file():
            yield _read_text(file)


def _hf_dataset(name: str, max_bytes: int | None) -> Iterator[str]:
    """`hf:dataset[:config][#column]`, streamed; stops after `max_bytes` of text."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    name, _, column = name.partition("#")
    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
    except Exception as error:  # the library raises a dozen unrelated types
        raise MoesaicError(f"cannot open the dataset {path!r}: {error}. Check the name and the network.") from error
    size = 0
    for row in rows:
        text = row.get(column or "text")
        if not isinstance(text, str):
            raise MoesaicError(f"dataset {path!r} has no text column {column or 'text'!r}; it has: {', '.join(row)}")
        yield text
        size += len(text.encode())
        if max_bytes is not None and size >= max_bytes:
            return


def _documents(source: str, max_bytes: int | None) -> Iterable[str]:
    if source.startswith(HF_PREFIX):
        return _hf_dataset(source.removeprefix(HF_PREFIX), max_bytes)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    if not path.exists():
        raise MoesaicError(
            f"{source!r} is no file or folder. A domain is an installed name ({', '.join(INSTALLED_DOMAINS)}), "
            f"name=path (txt, jsonl, folder) or name={HF_PREFIX}dataset."
        )
    return _blank_line_documents(_read_text(path))


def _up_to(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    size = 0
    for text in documents:
        if max_bytes is not None and size >= max_bytes:
            return
        yield text
        size += len(text.encode())


def parse_domain(spec: str, max_bytes: int | None = None) -> Domain:
    """One domain from `name` (installed), `name=path` (txt, jsonl, folder of texts) or `name=hf:dataset`.

    Raises MoesaicError for an unreadable, empty or one-document source.
    """
    name, equals, source = spec.partition("=")
    if not equals:
        return installed_domain(name, max_bytes)
    if not name or not source:
        raise MoesaicError(f"domain {spec!r}: expected name=path")
    return split_documents(name, _up_to(_documents(source, max_bytes), max_bytes))


def load_domains(specs: Sequence[str] | None = None, max_bytes: int | None = None) -> list[Domain]:
    """All domains of `specs` (the six installed ones when None), in order; names must differ."""
    names = [spec.partition("=")[0] for spec in specs or INSTALLED_DOMAINS]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MoesaicError(f"two domains are named {twice[0]!r}; every domain needs a name of its own")
    return [parse_domain(spec, max_bytes) for spec in specs or INSTALLED_DOMAINS]
