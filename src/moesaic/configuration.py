"""Configs of models that wrap a dense decoder: the dense config, where its FFNs sit, and what replaces them."""

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from moesaic.errors import MoesaicError

FORMAT_VERSION = 1  # raised when an older moesaic could misread a checkpoint


class WrappedConfig(PreTrainedConfig):
    """A config around another one, `base_config`; attributes not found here are read from it (vocab_size, ...).

    Raises MoesaicError for a checkpoint of a newer format.
    """

    sub_configs = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        moesaic_format: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if moesaic_format > FORMAT_VERSION:
            raise MoesaicError(
                f"this checkpoint has moesaic format {moesaic_format}, but this moesaic reads up to {FORMAT_VERSION}; "
                "update moesaic (pip install -U moesaic)"
            )
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        self.base_config: Any = base_config  # a PreTrainedConfig; None only in an empty config
        self.moesaic_format = moesaic_format
        if base_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(base_config, name, None))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only called when normal lookup fails. Private names and the field itself must not recurse.
        if not name.startswith("_") and (base := self.__dict__.get("base_config")) is not None:
            return getattr(base, name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")


class MoesaicConfig(WrappedConfig):
    """Everything needed to rebuild a refactored model without its weights.

    base_config:    the dense model's config (dict or PreTrainedConfig).
    sites:          one dict per decoder layer: where its FFN is (`models.ffn_sites.FFNSite`).
    layouts:        one list per decoder layer: its channel blocks (`experts.channel_blocks.BlockLayout`).
    pregate:        sizes of the router (`routing.pregate.PreGateConfig`), or None before one exists.
    expert_names:   the domain each expert came from.
    """

    model_type = "moesaic"
    keys_to_ignore_at_inference = ["past_key_values", "expert_index", "router_logits"]

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        sites: list[dict[str, Any]] | None = None,
        layouts: list[Any] | None = None,
        pregate: dict[str, Any] | None = None,
        expert_names: list[str] | None = None,
        moesaic_format: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.sites = sites or []
        self.layouts = layouts or []
        self.pregate = pregate
        self.expert_names = expert_names or []
        super().__init__(base_config, moesaic_format, **kwargs)

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return len(self.expert_names)

    @property
    def router_slot(self) -> int:
        """First KV-cache layer of the pre-gate: the one after the backbone's last."""
        return int(self.base_config.get_text_config(decoder=True).num_hidden_layers)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """For `decoder=True`, which is how caches are built: the base config with the pre-gate's layers appended.

        The pre-gate keeps its keys and values in the same Cache as the backbone, in layers of its own. So beam search
        reorders them, assisted decoding crops them, and a static cache preallocates them, with no code of ours.
        """
        if not decoder or self.base_config is None or not self.pregate:
            return self
        view = copy.deepcopy(self.base_config.get_text_config(decoder=True))
        extra = int(self.pregate["layers"])
        if getattr(view, "layer_types", None) is not None:
            view.layer_types = [*view.layer_types, *["full_attention"] * extra]
        elif getattr(view, "sliding_window", None) is not None:
            # Without layer_types the cache takes every layer as sliding; the pre-gate's are not.
            view.layer_types = ["sliding_attention"] * view.num_hidden_layers + ["full_attention"] * extra
        view.num_hidden_layers += extra
        return view


class RoutedConfig(WrappedConfig):
    """A decoder's config, where its FFNs sit, and what replaces them.

    router:  {"name": ..., options...}, see `routing.family`.
    pool:    {"experts": E, "hidden": H, "shared": n, "zero": n, "copy": n, "constant": n}; absent counts are 0.
    losses:  coefficient of "load_balance", "entropy", "z", added to the loss when labels are given.
    """

    model_type = "moesaic-routed"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        base_config: Any = None,
        sites: list[dict[str, Any]] | None = None,
        router: dict[str, Any] | None = None,
        pool: dict[str, Any] | None = None,
        losses: dict[str, float] | None = None,
        moesaic_format: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.sites, self.router, self.pool = sites or [], router or {"name": "top-k"}, pool or {}
        self.losses = losses or {}
        super().__init__(base_config, moesaic_format, **kwargs)


class DuoConfig(RoutedConfig):
    """pool: {"small": width of the small FFNs, "skip": is there a third choice, "train_skip": see attach_duo}."""

    model_type = "moesaic-duo"

    def __init__(self, **kwargs: Any) -> None:  # written out: transformers would generate another one
        super().__init__(**kwargs)


class DepthConfig(RoutedConfig):
    """router: options of DepthRouter, and "auxiliary": true once one is fitted. depth_layers: which layers may skip."""

    model_type = "moesaic-depth"

    def __init__(self, depth_layers: list[int] | None = None, **kwargs: Any) -> None:
        self.depth_layers = depth_layers or []
        super().__init__(**kwargs)


class HeadsConfig(RoutedConfig):
    """places: per decoder layer [attention, output projection], names from the root; groups: head groups G."""

    model_type = "moesaic-heads"

    def __init__(self, places: list[list[str]] | None = None, groups: int = 0, **kwargs: Any) -> None:
        self.places, self.groups = places or [], groups
        super().__init__(**kwargs)


for config in (MoesaicConfig, RoutedConfig, DuoConfig, DepthConfig, HeadsConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
