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

CONFIG_MODULE = "transformers.models.auto.configuration_auto"
MODEL_MODULE = "transformers.models.auto.modeling_auto"


def _register_config(auto: ModuleType) -> None:
    from moesaic.models.configuration_moesaic import MoesaicConfig

    auto.AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)


def _register_model(auto: ModuleType) -> None:
    from moesaic.models.configuration_moesaic import MoesaicConfig
    from moesaic.models.modeling_moesaic import MoesaicForCausalLM

    auto.AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)


REGISTRATIONS = {CONFIG_MODULE: _register_config, MODEL_MODULE: _register_model}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the Auto modules the ordinary way and runs our registration once they are loaded."""

    def __init__(self) -> None:
        self.pending = dict(REGISTRATIONS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.pending:
            return None
        register = self.pending.pop(fullname)  # popped first: the nested find_spec must not land here again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_auto_classes() -> None:
    """Register now what is already imported, and the rest when it is."""
    finder = _AfterImport()
    for name, register in REGISTRATIONS.items():
        if name in sys.modules:
            del finder.pending[name]
            register(sys.modules[name])
    if finder.pending:
        sys.meta_path.insert(0, finder)
