"""The pre-gate of a checkpoint by itself: it needs neither backbone nor experts."""

from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from moesaic.configuration import MoesaicConfig
from moesaic.routing.pregate import PreGate, PreGateConfig
from moesaic.serve.gate import Gate
from moesaic.serve.model_files import ModelFiles

PREFIX = "pregate."


def load_gate(folder: Path) -> Gate | None:
    """A gate for whole prompts, None where routes are known layer by layer. Raises MoesaicError for damaged files."""
    files, config = ModelFiles(folder), AutoConfig.from_pretrained(folder)
    if not isinstance(config, MoesaicConfig):
        return None
    experts = len(config.expert_names)
    if not config.pregate:
        return Gate(None, experts, 0)
    pregate = PreGate(PreGateConfig(**config.pregate))
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in {place.file for name, place in files.tensors.items() if name.startswith(PREFIX)}
        }
        weights = {
            name.removeprefix(PREFIX): opened[place.file].get_tensor(name).float()
            for name, place in files.tensors.items()
            if name.startswith(PREFIX)
        }
    pregate.load_state_dict(weights)
    return Gate(pregate.eval().requires_grad_(False), experts, 0)
