"""What transformers asks of a model that wraps a decoder it does not own: shared by refactored and routed models."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from moesaic.errors import MoesaicError
from moesaic.models.checkpoint import save_checkpoint, verify_checkpoint
from moesaic.models.routes import Current
from moesaic.models.tuning import refuse_packed
from moesaic.routing.pregate import positions


class WrappedCausalLM(PreTrainedModel, GenerationMixin):
    """`backbone` is any HF decoder; what one forward knows reaches its layers through `current`."""

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # token ids decide which weights are read

    backbone: PreTrainedModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.base_config is None:
            raise MoesaicError(
                f"a {config.model_type} config needs a base_config; moesaic.refactor and moesaic.attach make one from "
                "a dense model"
            )
        self.current: Current[Any] = Current()

    def ready(self) -> None:
        """The last thing a constructor does, when the backbone's layers are replaced."""
        dense = self.backbone
        self._backbone_takes_positions = "position_ids" in inspect.signature(dense.forward).parameters
        self._no_split_modules = getattr(dense, "_no_split_modules", None)
        self.post_init()
        if dense.generation_config is not None:
            self.generation_config = dense.generation_config

    def tokens(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ids, 2-D padding mask and positions of a forward's new tokens, as far as they are given or follow.

        Raises MoesaicError when only `inputs_embeds` is given: routers read token ids.
        """
        if input_ids is None or inputs_embeds is not None:
            raise MoesaicError("a moesaic model routes by token ids: pass input_ids, not inputs_embeds")
        if padding_mask is None and attention_mask is not None and attention_mask.ndim == 2:
            padding_mask = attention_mask
        if position_ids is None and padding_mask is not None and padding_mask.shape[1] > 1:
            position_ids = positions(input_ids, padding_mask, padding_mask.shape[1] - input_ids.shape[1])
        return input_ids, padding_mask, position_ids

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        function = gradient_checkpointing_func or torch.utils.checkpoint.checkpoint
        super()._set_gradient_checkpointing(enable, self.current.checkpoint(function), **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Keeps the 2-D padding mask beside whatever the backbone's own preparation turns it into."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            inputs["padding_mask"] = mask
        return inputs

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', after checking every file against the checkpoint's manifest."""
        if name is not None and os.path.isdir(name):
            verify_checkpoint(name)
        return super().from_pretrained(name, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As transformers', but all or nothing, and with a manifest of checksums."""
        refuse_packed(self)
        save_checkpoint(super().save_pretrained, save_directory, **kwargs)
