"""The pocket model: a small real Llama that ships with moesaic, so that everything runs without a network."""

from pathlib import Path


def pocket_path() -> Path:
    """Folder of the pocket model: config, bf16 safetensors, tokenizer and model card."""
    return Path(__file__).parent
