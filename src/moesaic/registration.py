"""Make `AutoConfig` and `AutoModelForCausalLM` know moesaic checkpoints, without importing transformers early.

`import moesaic` must stay cheap (the command line starts in a fraction of a second), yet after it
`AutoModelForCausalLM.from_pretrained(dir)` must work. So the registration waits for the Auto modules to be imported.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# transformers' module -> ours, which registers itself at its end.
REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": ["moesaic.configuration"],
    "transformers.models.auto.modeling_auto": [
        f"moesaic.models.{name}" for name in ("modeling_moesaic", "routed", "duo", "depth", "heads")
    ],
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the Auto modules the ordinary way and runs our registration once they are loaded."""

    def __init__(self) -> None:
        self.pending = dict(REGISTRATIONS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.pending:
            return None
        ours = self.pending.pop(fullname)  # popped first: the nested find_spec must not land here again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for name in ours:
                importlib.import_module(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_auto_classes() -> None:
    """Register now what is already imported, and the rest when it is."""
    finder = _AfterImport()
    for theirs, ours in REGISTRATIONS.items():
        if theirs in sys.modules:
            del finder.pending[theirs]
            for name in ours:
                importlib.import_module(name)
    if finder.pending:
        sys.meta_path.insert(0, finder)
