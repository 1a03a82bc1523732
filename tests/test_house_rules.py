"""The house rules of CONTRIBUTING.md, read off the syntax tree of every file in src/moesaic."""

import ast
import math
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "moesaic"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE, P95_FILE = 600, 450  # lines
MAX_FUNCTION, P95_FUNCTION = 80, 60  # lines: signature, docstring and body
MAX_ARGUMENTS = 10

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAY_PRINT = ("cli/", "progress")
NO_TORCH = ("schedule/", "simulate/")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def optional_packages() -> set[str]:
    """Import names of what only the users' extras install."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    specs = [spec for extra, specs in extras.items() if extra not in ("all", "test", "dev") for spec in specs]
    return {re.split(r"[^\w.-]", spec)[0].replace("-", "_") for spec in specs}


OPTIONAL = optional_packages()
BEHIND_EXTRA = ("serve/api/", "serve/cluster/", "serve/replay.py")


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every absolute import under `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]


def eager(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not function bodies, not `if TYPE_CHECKING:`."""
    for node in statements:
        if isinstance(node, Function) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from eager(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from eager(handler.body)


# Each rule: (file's path inside the package, its tree) -> what is wrong, as "line: message".


def arguments(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith("cli/"):
        return  # a command's arguments are its interface: typer makes the options from them
    for node in functions(tree):
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_ARGUMENTS:
            yield f"{node.lineno}: {node.name}: {count} arguments, limit {MAX_ARGUMENTS}: group them in a dataclass"


def prints(path: str, tree: ast.Module) -> Iterator[str]:
    if not path.startswith(MAY_PRINT):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield f"{node.lineno}: print outside cli/ and progress: return the data"


def unsafe(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree):
        if name in PICKLES:
            yield f"{line}: imports {name}: safetensors and JSON only"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if ast.unparse(node) in ("torch.load", "torch.save"):
                yield f"{node.lineno}: {ast.unparse(node)} is pickle: safetensors and JSON only"
            case ast.ImportFrom(module="torch") if {"load", "save"} & {alias.name for alias in node.names}:
                yield f"{node.lineno}: torch's load and save are pickle: safetensors and JSON only"
            case ast.keyword(arg="trust_remote_code" | "allow_pickle") if ast.unparse(node.value) != "False":
                yield f"{node.lineno}: {node.arg} runs code from a file: never"


def docstring(path: str, tree: ast.Module) -> Iterator[str]:
    """Nothing is asked of an empty __init__.py or of a module whose own name or folder is private."""
    private = any(part.startswith("_") and not part.startswith("__") for part in path.split("/"))
    if tree.body and not private and not ast.get_docstring(tree):
        yield "1: a public module says in a docstring what it is for"


def optional(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith(BEHIND_EXTRA):
        return  # what imports these asks for the extra first
    for node in eager(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, name in imports(node):
                if name in OPTIONAL:
                    yield f"{line}: {name} is an extra: import it inside the function that needs it"


def torch_free(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith(NO_TORCH):
        for line, name in imports(tree):
            if name in ("torch", "transformers"):
                yield f"{line}: {path.split('/')[0]}/ must run without {name}"


RULES = [arguments, prints, unsafe, docstring, optional, torch_free]
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Callable[[str, ast.Module], Iterator[str]]) -> None:
    offenders = [f"src/moesaic/{path}:{found}" for path, tree in TREES.items() for found in rule(path, tree)]
    assert not offenders, "\n" + "\n".join(offenders)


BAD = [
    (arguments, "routing/x.py", f"class A:\n    def f(self, {', '.join('abcdefghij')}, *, k): pass"),
    (prints, "routing/x.py", "print(1)"),
    (unsafe, "models/x.py", "import pickle"),
    (unsafe, "models/x.py", "def f():\n    from joblib import dump"),
    (unsafe, "models/x.py", "torch.save(x, 'x')"),
    (unsafe, "models/x.py", "from torch import load"),
    (unsafe, "models/x.py", "f(trust_remote_code=True)"),
    (docstring, "models/x.py", "x = 1"),
    (docstring, "models/__init__.py", "x = 1"),
    (optional, "refactor/x.py", "try:\n    import matplotlib.pyplot\nexcept ImportError:\n    pass"),
    (torch_free, "schedule/x.py", "def f():\n    import torch.nn"),
]
GOOD = [
    (arguments, "routing/x.py", f"class A:\n    def f(self, {', '.join('abcdefghij')}, *more, **rest): pass"),
    (prints, "cli/x.py", "print(1)"),
    (prints, "progress.py", "print(1)"),
    (unsafe, "models/x.py", "import torch\nf(trust_remote_code=False)"),
    (docstring, "models/__init__.py", ""),
    (docstring, "models/_x.py", "x = 1"),
    (optional, "refactor/x.py", "if TYPE_CHECKING:\n    import datasets\ndef f():\n    import matplotlib"),
    (torch_free, "routing/x.py", "import torch"),
]


@pytest.mark.parametrize(("rule", "path", "code"), BAD)
def test_rule_finds_the_bad(rule: Callable[[str, ast.Module], Iterator[str]], path: str, code: str) -> None:
    assert list(rule(path, ast.parse(code)))


@pytest.mark.parametrize(("rule", "path", "code"), GOOD)
def test_rule_leaves_the_good(rule: Callable[[str, ast.Module], Iterator[str]], path: str, code: str) -> None:
    assert not list(rule(path, ast.parse(code)))


def oversized(sizes: dict[str, int], top: int, p95: int) -> list[str]:
    """Everything over `top`; and if the 95th percentile (nearest rank) is over `p95`, everything over `p95`."""
    ranked = sorted(sizes.values())
    limit = p95 if ranked and ranked[math.ceil(0.95 * len(ranked)) - 1] > p95 else top
    over = {name: size for name, size in sizes.items() if size > limit}
    return [f"{name}: {over[name]} lines, limit {limit}" for name in sorted(over, key=lambda name: -over[name])]


def test_oversized() -> None:
    many = {f"small{i}": 10 for i in range(19)}
    assert oversized({**many, "a": 70}, top=80, p95=60) == []
    assert oversized({**many, "a": 81}, top=80, p95=60) == ["a: 81 lines, limit 80"]
    assert oversized({"small": 10, "a": 61}, top=80, p95=60) == ["a: 61 lines, limit 60"]
    assert oversized({}, top=80, p95=60) == []


def test_file_sizes() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    offenders = oversized(sizes, MAX_FILE, P95_FILE)
    assert not offenders, "\n" + "\n".join(offenders)


def test_function_sizes() -> None:
    sizes = {
        f"src/moesaic/{path}:{node.lineno} {node.name}": length(node)
        for path, tree in TREES.items()
        for node in functions(tree)
    }
    offenders = oversized(sizes, MAX_FUNCTION, P95_FUNCTION)
    assert not offenders, "\n" + "\n".join(offenders)
