"""Duo-LLM's models: every layer holds the dense FFN and a much smaller one, and perhaps nothing at all (2410.10846).

Stage 1 draws big or small with probability 1/2 for every token and layer, so that both can be exchanged freely
afterwards; stage 2 asks an oracle which layers deserve the big one (`analyze.oracle_routes`); stage 3 freezes the
model and trains a `BigSmallRouter`. Expert ids: 0 big, 1 small, 2 skip, as in `routing.big_small`.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.configuration import DuoConfig
from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFN, ModuleBank
from moesaic.experts.channel_blocks import FFNWeights
from moesaic.experts.free import Zero
from moesaic.experts.pool import Pool
from moesaic.experts.upcycle import fill_copies
from moesaic.models.depth import PlannedForCausalLM
from moesaic.models.ffn_sites import FFNSite, find_ffn_sites, get_ffn_weights, replace_ffn
from moesaic.models.routed import ExpertLayer
from moesaic.routing.contract import Router
from moesaic.routing.family import build_router

STAGE_ONE = {"name": "random", "train_draw": "token", "eval_draw": "token"}

Small = Literal["first", "important", "random"]


class DuoForCausalLM(PlannedForCausalLM):
    """See the module. The random router draws anew only when `step` changes: set `model.step` before each forward."""

    config_class = DuoConfig

    def make_router(self, dense: PreTrainedModel) -> Router:
        options = {name: value for name, value in self.config.router.items() if name != "name"}
        name, pool = self.config.router["name"], self.config.pool
        choices = 2 + bool(pool["train_skip"] if name == "random" else pool["skip"])
        return build_router(name, self.config.sites[0]["hidden"], choices, len(self.config.sites), **options)

    def place(self, dense: PreTrainedModel) -> None:
        for layer, raw in enumerate(self.config.sites):
            site = FFNSite.from_dict(raw)
            weights, activation = get_ffn_weights(dense, site), _activation(dense, site)
            members = [
                FFN(
                    site.hidden,
                    hidden,
                    activation,
                    gated=weights.gate is not None,
                    up_bias=weights.up_bias is not None,
                    down_bias=weights.down_bias is not None,
                )
                for hidden in (site.width, self.config.pool["small"])
            ]
            pool = Pool(ModuleBank(members), free=[Zero()] if self.config.pool["skip"] else [])
            replace_ffn(dense, site, ExpertLayer(pool, layer, self))

    def learn_routes(self, budget: float = 0.5, tau_end: float = 0.1) -> Router:
        """Begin stage 3: everything but a fresh BigSmallRouter is frozen; returns it. Train with its "budget" loss.

        budget:  share of layers, averaged over a sequence, that run the big FFN.
        """
        self.requires_grad_(False)
        self.config.router = {"name": "big-small", "budget": budget, "tau_end": tau_end}
        self.set_router(self.make_router(self.backbone))
        return self.router


def _activation(dense: PreTrainedModel, site: FFNSite) -> Any:
    return getattr(dense.get_submodule(site.path), site.activation)


@torch.no_grad()
def attach_duo(
    dense: PreTrainedModel,
    *,
    small: int | None = None,
    channels: Small = "important",
    importance: Sequence[Tensor] | None = None,
    skip: bool = False,
    train_skip: bool = False,
    router: dict[str, Any] | None = None,
) -> DuoForCausalLM:
    """Give every layer of a copy of `dense` a small FFN beside its own, and a router that draws between them.

    small:       width of the small FFNs; by default a 16th of the dense width, as in the paper.
    channels:    what a small FFN starts as: the "first" channels, the most "important" ones, or "random" weights.
    importance:  (W,) a layer, larger is kept; by default the product of a channel's weight norms.
    skip:        add the choice of no FFN at all. train_skip: also draw it in stage 1, each of three with 1/3; the paper
                 does not, so that its three-way oracle tries a path that was never trained.
    router:      a config of `routing.family`; by default stage 1's random draws.

    Raises MoesaicError if the FFNs are of an unknown structure, or `small` is not below their width.
    """
    sites = find_ffn_sites(dense)
    width = sites[0].width
    small = max(1, width // 16) if small is None else small
    if not 1 <= small < width:
        raise MoesaicError(f"small = {small}: expected at least 1 channel and fewer than the dense FFN's {width}")
    if channels not in ("first", "important", "random"):
        raise MoesaicError(f"channels = {channels!r}: expected first, important or random")
    if train_skip and not skip:
        raise MoesaicError("train_skip draws a choice that is not there: give skip=True too")
    config = DuoConfig(
        base_config=copy.deepcopy(dense.config),
        sites=[site.to_dict() for site in sites],
        router=dict(STAGE_ONE if router is None else router),
        pool={"small": small, "skip": skip, "train_skip": train_skip},
        dtype=dense.dtype,
    )
    model = DuoForCausalLM(config, copy.deepcopy(dense))
    for layer, (site, pool) in enumerate(zip(sites, model.pools(), strict=True)):
        weights, (big, little) = get_ffn_weights(dense, site), pool.bank.members  # type: ignore[misc]
        fill_copies(big.bank, weights)
        if channels != "random":
            scores = None if importance is None else importance[layer]
            kept = torch.arange(small) if channels == "first" else _best(weights, small, scores)
            fill_copies(little.bank, _rows(weights, kept))
        pool.to(device=dense.device, dtype=dense.dtype)
    model.router.to(dense.device)
    return model.train(dense.training)


def _best(weights: FFNWeights, count: int, scores: Tensor | None) -> Tensor:
    """The channels of highest importance, in order."""
    if scores is None:
        scores = weights.down.float().norm(dim=0)
        for part in (weights.gate, weights.up):
            scores = scores if part is None else scores * part.float().norm(dim=1)
    return scores.topk(count).indices.sort().values


def _rows(weights: FFNWeights, kept: Tensor) -> FFNWeights:
    """The FFN of some channels only; its down bias stays whole."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[kept]

    up = weights.up[kept]
    return FFNWeights(
        up, weights.down[:, kept], pick(weights.gate), pick(weights.gate_bias), pick(weights.up_bias), weights.down_bias
    )


AutoModelForCausalLM.register(DuoConfig, DuoForCausalLM, exist_ok=True)
