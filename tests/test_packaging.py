"""What a user meets before the first tensor: a light import, a quick --help, true metadata, links that resolve."""

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "lm_eval", "matplotlib")
POCKET_LIMIT = 16 * 2**20  # bytes

REPORT = """
import json, sys
print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]), file=sys.stderr)
"""


def heavy_modules_after(code: str) -> list[str]:
    """Which of HEAVY are loaded once `code` has run in a new interpreter; prints the time it all took."""
    command = [sys.executable, "-c", code + REPORT, *HEAVY]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(f"{time.perf_counter() - start:.2f} s")  # pytest -rP shows it
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_import_is_light() -> None:
    assert heavy_modules_after("import moesaic") == []


def test_help_is_light() -> None:
    module, function = PROJECT["scripts"]["moesaic"].split(":")
    code = f"""
import sys
from {module} import {function}
names, sys.argv = sys.argv, ["moesaic", "--help"]
try:
    {function}()
except SystemExit as stop:
    assert not stop.code, f"moesaic --help ends with {{stop.code}}"
sys.argv = names
"""
    assert heavy_modules_after(code) == []


def direct_dependencies() -> list[str]:
    """Names in pyproject.toml, extras included, without moesaic's own references to itself."""
    specs = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    return sorted({re.split(r"[^\w.-]", spec)[0] for spec in specs} - {"moesaic"})


@pytest.mark.parametrize("name", direct_dependencies())
def test_dependency_is_pinned_and_justified(name: str) -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(rf"^{re.escape(name)}==\S+$", pins, re.M), f"pin {name} in constraints.txt"
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    assert re.search(rf"^\| `{re.escape(name)}` \|.*\w", reasons, re.M), f"say in docs/dependencies.md why {name}"


def test_nothing_else_is_pinned() -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert sorted(pins) == direct_dependencies()


def test_pocket_model_fits_and_is_packaged() -> None:
    package = ROOT / "src" / "moesaic"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["moesaic"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert not set(files) - shipped, "in the package's folder, but not in the wheel: extend package-data"
    weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    assert weights <= POCKET_LIMIT, f"the package's weights take {weights} bytes, limit {POCKET_LIMIT}"


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose(page: Path) -> str:
    """The page without its code, where brackets are not links and # is not a heading."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Heading ids as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def internal_links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Link as written, the file it means, and the heading it means (or "")."""
    for link in re.findall(r"\]\(\s*<?([^)\s>]+)", prose(page)):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            yield link, (page.parent / name if name else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_internal_links_resolve(page: Path) -> None:
    for link, target, anchor in internal_links(page):
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}: no such heading"


@pytest.mark.parametrize(
    "first",
    [
        "import moesaic.models.routed",
        "import moesaic.models.depth",
        "import moesaic.configuration",
        "import moesaic; from transformers import PreTrainedModel",
        "import moesaic; from transformers import AutoConfig",
        "import transformers; from transformers import AutoModelForCausalLM; import moesaic",
        "import moesaic; moesaic.attach_router",
    ],
)
def test_any_import_may_be_the_first(first):
    """Registration imports modules that import transformers, and back: none may be half imported then."""
    code = (
        f"{first}\n"
        "from transformers import AutoModelForCausalLM, AutoConfig\n"
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as known\n"
        "print(sorted(config.model_type for config in known._extra_content))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "moesaic" in done.stdout and "moesaic-routed" in done.stdout and "moesaic-heads" in done.stdout
