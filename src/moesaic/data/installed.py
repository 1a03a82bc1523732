"""Six domains of text that every installation carries, so that everything runs offline and unassisted."""

import ast
import hashlib
import importlib.metadata
import site
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from moesaic.data.arithmetic import word_problems
from moesaic.data.domain import Domain, drop_near_duplicates, split_documents
from moesaic.errors import MoesaicError

MAX_DOCUMENT_CHARS = 40_000  # one huge file must not be a whole domain
MIN_DOCUMENT_CHARS = 200
WALK_LIMIT = 4_000  # files looked at per folder: /usr/include and torch's headers are large


def _site_folders() -> list[Path]:
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    return [Path(folder) for folder in sorted(folders) if Path(folder).is_dir()]


def _by_hash(paths: Iterable[Path]) -> list[Path]:
    """A fixed pseudo-random order, so that taking the first N bytes samples every corner of a folder."""
    return sorted(paths, key=lambda path: hashlib.sha256("/".join(path.parts[-3:]).encode()).digest())


def _read(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield text[:MAX_DOCUMENT_CHARS]


def _python() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "__pycache__", "encodings"}
    return _read(_by_hash(path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts)))


def _headers() -> Iterator[str]:
    system = Path("/usr/include")
    roots = [folder / name for folder in _site_folders() for name in ("torch/include", "numpy/_core/include")]
    roots += [Path(sysconfig.get_path("include")), *([system] if system.is_dir() else [])]
    files = (path for root in roots for suffix in ("*.h", "*.hpp", "*.cuh") for path in root.rglob(suffix))
    return drop_near_duplicates(_read(_by_hash(files)[:WALK_LIMIT]))


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text and len(text) > MIN_DOCUMENT_CHARS)


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    # Docstrings of third-party packages only: those of the standard library are inside the `python` domain.
    packages = ("torch", "numpy", "transformers", "scipy", "tokenizers", "huggingface_hub", "typer", "rich")
    roots = [folder / name for folder in _site_folders() for name in packages]
    files = _by_hash(path for root in roots for path in root.rglob("*.py"))[:WALK_LIMIT]
    texts = chain((str(text) for text in topics.values()), map(_docstrings, files))
    return drop_near_duplicates(text[:MAX_DOCUMENT_CHARS] for text in texts if len(text) >= MIN_DOCUMENT_CHARS)


def _readmes() -> Iterator[str]:
    bodies = (dist.metadata.get_payload() for dist in importlib.metadata.distributions())  # type: ignore[attr-defined]
    files = (path for folder in _site_folders() for path in folder.glob("*/**/README*") if path.is_file())
    texts = chain((body for body in bodies if isinstance(body, str)), _read(_by_hash(files)[:WALK_LIMIT]))
    long_enough = (text[:MAX_DOCUMENT_CHARS] for text in texts if len(text) >= MIN_DOCUMENT_CHARS)
    # Not the plain hash, by which `split_documents` holds out: a small share of it would be validation text only.
    return drop_near_duplicates(sorted(long_enough, key=lambda text: hashlib.sha256(text[::-1].encode()).digest()))


def _licences() -> Iterator[str]:
    names = ("LICEN[CS]E*", "COPYING*", "NOTICE*")
    files = [path for folder in _site_folders() for name in names for path in folder.glob(f"*.dist-info/**/{name}")]
    files += [Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"]
    common = Path("/usr/share/common-licenses")
    files += list(common.iterdir()) if common.is_dir() else []
    debian = Path("/usr/share/doc")
    files += list(debian.glob("*/copyright"))[:WALK_LIMIT] if debian.is_dir() else []
    return drop_near_duplicates(_read(_by_hash({path for path in files if path.is_file()})))


def _arithmetic() -> Iterator[str]:
    return word_problems(documents=3_000, seed=0)


INSTALLED_DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "python": _python,
    "c": _headers,
    "prose": _prose,
    "readme": _readmes,
    "licence": _licences,
    "arithmetic": _arithmetic,
}


def installed_domain(name: str, max_bytes: int | None = None) -> Domain:
    """Collect one domain from this machine, at most about `max_bytes` of text (all of it when None)."""
    if name not in INSTALLED_DOMAINS:
        raise MoesaicError(f"no installed domain {name!r}; there are: {', '.join(INSTALLED_DOMAINS)}")
    documents, size = [], 0
    for text in INSTALLED_DOMAINS[name]():
        if max_bytes is not None and size >= max_bytes:
            break
        documents.append(text)
        size += len(text.encode())
    return split_documents(name, documents)


def installed_domains(max_bytes: int | None = None) -> list[Domain]:
    """All six installed domains; see `INSTALLED_DOMAINS`."""
    return [installed_domain(name, max_bytes) for name in INSTALLED_DOMAINS]
