"""Load a model and its tokenizer from a folder or a hub name, with errors that say what is wrong."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesaic.errors import MoesaicError


def load_model(
    source: str | os.PathLike[str], dtype: torch.dtype | str = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM, dense or moesaic, in eval mode. float32 by default: fp16 has no fast path on CPUs.

    Raises MoesaicError if `source` holds no causal LM that transformers can build without remote code.
    """
    _check_source(source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
    except MoesaicError:
        raise
    except Exception as error:  # OSError, KeyError, SafetensorError, RuntimeError... each for some damage
        raise MoesaicError(f"cannot load a causal language model from {source!s}: {error}") from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise MoesaicError(
            f"the checkpoint {source!s} lacks {len(missing)} tensor(s), such as {missing[0]}; copy it again "
            "from its source"
        )
    return model.eval()


def stored_dtype(source: str | os.PathLike[str]) -> torch.dtype:
    """The dtype the checkpoint's config names; float32 where it is silent."""
    dtype = getattr(AutoConfig.from_pretrained(source), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer beside the model; raises MoesaicError if there is none."""
    _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise MoesaicError(f"no tokenizer could be loaded from {source!s}: {error}") from error


def _check_source(source: str | os.PathLike[str]) -> None:
    path = Path(source)
    looks_local = path.is_absolute() or str(source).startswith(".") or path.exists()
    if path.is_file():
        raise MoesaicError(f"{path} is a file; expected a model folder with config.json and safetensors")
    if looks_local and not (path / "config.json").exists():
        raise MoesaicError(f"{path} is no model folder: it has no config.json. Expected a Hugging Face checkpoint.")
