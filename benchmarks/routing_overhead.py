"""Routing overhead: plan + dispatch + combine against the bare expert products, and against transformers' own block.

    python benchmarks/routing_overhead.py --out benchmarks/results/routing_overhead.json

All sides share weights and tokens and take turns in every round; a ratio is the median over rounds of time over the
bare products' time. "bare" runs each expert's own tokens, gathered beforehand, and stops there.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moesaic.experts.bank import FFNBank
from moesaic.experts.pool import Pool
from moesaic.refactor.receipts import environment
from moesaic.routing.contract import RouteInput
from moesaic.routing.family import ROUTERS, build_router

OPTIONS: dict[str, dict[str, Any]] = {"fine-grained": {"k": 2}, "top-p": {"max_k": 2}, "frozen-random": {"k": 2}}
SKIPPED = {"embedding-random", "modality", "big-small"}  # need an embedding, modalities, another pool
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies weights per token: 200 times slower here


def bare(bank: FFNBank, x_ND: Tensor, index_NK: Tensor) -> Any:
    """A function that runs every expert on its tokens and does nothing else."""
    rows = [x_ND[(index_NK == expert).any(-1)] for expert in range(bank.experts)]
    return lambda: [bank.run(expert, part) for expert, part in enumerate(rows)]


def sides(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> function to time."""
    torch.manual_seed(0)
    x_ND = torch.randn(args.tokens, args.width)
    bank = FFNBank(args.experts, args.width, args.hidden)
    pool, inp = Pool(bank), RouteInput.of(torch.zeros(1, args.tokens, dtype=torch.long), x_ND)
    result: dict[str, Any] = {}
    for name in ROUTERS:
        if name in SKIPPED:
            continue
        router = build_router(name, args.width, args.experts, 1, **OPTIONS.get(name, {}))
        for parameter in router.parameters():  # as a trained router: scores that differ between experts
            torch.nn.init.normal_(parameter, std=0.05)
        plan = router.plan(inp)[0]
        result[f"bare {name}"] = bare(bank, x_ND, plan.index)
        result[name] = lambda router=router: pool(x_ND, router.plan(inp)[0])
    shape = dict(hidden_size=args.width, intermediate_size=args.hidden, num_local_experts=args.experts)
    top_k = build_router("top-k", args.width, args.experts, 1)
    for implementation in IMPLEMENTATIONS:
        config = MixtralConfig(**shape, num_experts_per_tok=2, experts_implementation=implementation)
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config).eval()
        block.gate.weight = top_k.scorer.heads[0].weight
        block.experts.gate_up_proj, block.experts.down_proj = bank.gate_up, bank.down
        result[f"transformers {implementation}"] = lambda block=block: block(x_ND[None])
    result["bare top-k weights"] = bare(bank, x_ND, top_k.plan(inp)[0].index)
    result["top-k on the same weights"] = lambda: pool(x_ND, top_k.plan(inp)[0])
    ours, theirs = result["top-k on the same weights"](), result["transformers eager"]()[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return result


def measure(functions: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds per round of every side, in turn; forwards and backwards, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode():
        for function in functions.values():
            function()
        for number in range(rounds):
            for name in functions if number % 2 == 0 else reversed(functions):
                start = time.perf_counter()
                functions[name]()
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    times = measure(sides(args), args.rounds)
    rows = {}
    for name, own in times.items():
        if name.startswith("bare "):
            continue
        peer = times.get(f"bare {name}", times["bare top-k weights"])
        ratios = [a / b for a, b in zip(own, peer, strict=True)]
        rows[name] = {"ms": 1e3 * statistics.median(own), "over_bare": statistics.median(ratios)}
    table = Table("side", "ms", "time over bare products", title=f"{args.tokens} tokens, width {args.width}")
    for name, row in rows.items():
        table.add_row(name, f"{row['ms']:.2f}", f"{row['over_bare']:.3f}")
    Console().print(table)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        record = {"command": shlex.join(["python", *sys.argv]), "environment": environment(), "settings": settings}
        args.out.write_text(json.dumps({**record, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
