"""moesaic: dense language models refactored into mixtures of experts whose routes are known before the backbone runs.

    import moesaic
    moe = moesaic.refactor("path/to/dense-model", domains=["code=./src", "web=hf:allenai/c4"], out="moe")
    print(moe.receipt["quality"]["average"])

After `import moesaic`, `transformers.AutoModelForCausalLM.from_pretrained` reads moesaic checkpoints.
Everything below is imported when first used, so that importing moesaic costs nothing.
"""

import importlib
from typing import Any

from moesaic.registration import register_auto_classes

_EXPORTS = {
    "refactor": "moesaic.refactor.api",
    "evaluate": "moesaic.refactor.api",
    "Refactored": "moesaic.refactor.api",
    "Refactoring": "moesaic.refactor.pipeline",
    "RefactorConfig": "moesaic.refactor.settings",
    "HealConfig": "moesaic.refactor.heal",
    "MoesaicConfig": "moesaic.configuration",
    "MoesaicForCausalLM": "moesaic.models.modeling_moesaic",
    "attach": "moesaic.models.attach",
    "attach_router": "moesaic.models.routed",
    "RoutedForCausalLM": "moesaic.models.routed",
    "SelfContrast": "moesaic.models.self_contrast",
    "tune": "moesaic.models.tuning",
    "optimize": "moesaic.models.tuning",
    "load_model": "moesaic.models.loading",
    "load_tokenizer": "moesaic.models.loading",
    "pocket_path": "moesaic.pocket",
    "MoesaicError": "moesaic.errors",
}
__all__ = list(_EXPORTS)

register_auto_classes()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
