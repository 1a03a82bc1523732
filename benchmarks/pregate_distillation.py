"""How much of a layer-wise router's plans a pre-gate knows from token ids: two small mixtures, distilled and compared.

    python benchmarks/pregate_distillation.py --out benchmarks/results/pregate_distillation.json

Both are upcycled from the pocket model and trained briefly with a balance loss on installed texts: "fine-grained"
(30 routed slices, top-6, raw probabilities, and 2 shared ones; DeepSeekMoE, 2401.06066) and "top-2" (8 copies, weights
that sum to one). Then their plans are recorded on training text, a pre-gate is trained on them, and everything is
measured on held-out text. Continues where it stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic import pocket_path
from moesaic.analyze.pregate_distillation import DistillationConfig, distil, markdown, record, report
from moesaic.balance.load_balance import expert_load
from moesaic.data import TokenBatches, installed_domains, tokenize_domains
from moesaic.models.routed import RoutedForCausalLM, attach_router
from moesaic.refactor.receipts import environment
from moesaic.training.loop import train
from moesaic.training.schedule import Stage

MIXTURES: dict[str, dict[str, Any]] = {
    # scale: a probability is about 1/30 at first, so that each chosen slice starts with its dense weight.
    "fine-grained": dict(
        router={"name": "fine-grained", "k": 6}, experts=30, shared=2, upcycle="split", scale=30.0, steps=80
    ),
    "top-2": dict(router={"name": "top-k", "k": 2}, experts=8, upcycle="copy", noise=0.1, steps=30),
}
BALANCE = 0.05
TARGET = 0.8  # recall@2k


def lm_step(model: RoutedForCausalLM) -> Callable[[dict[str, torch.Tensor]], dict[str, Any]]:
    """Next-token loss and load balance."""

    def step(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        ids = batch["input_ids"]
        out = model(input_ids=ids, labels=ids, use_cache=False)
        return {"lm": out.loss, **model.losses(["load_balance"])}

    return step


def build(options: dict[str, Any], batches: TokenBatches, lr: float, folder: Path) -> RoutedForCausalLM:
    """A mixture of the pocket model, trained for its number of steps."""
    torch.manual_seed(0)
    options = dict(options)
    steps = options.pop("steps")
    model = attach_router(AutoModelForCausalLM.from_pretrained(pocket_path(), dtype=torch.float32), **options)
    coefficients = {"lm": 1.0, "load_balance": BALANCE}
    stage = Stage(name=folder.name, steps=steps, lr=lr, coefficients=coefficients, schedule_args={"warmup": 10})
    train(stage, model, lm_step(model), batches, folder)
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train, record, distil, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="*", choices=list(MIXTURES), default=list(MIXTURES))
    parser.add_argument("--steps", type=int, help="training steps of each mixture; default: 80 and 30")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--calibration", type=int, default=80, help="recorded training batches")
    parser.add_argument("--held-out", type=int, default=8, help="windows of each domain")
    parser.add_argument("--distil-steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128, help="of the pre-gate")
    parser.add_argument("--max-bytes", type=int, default=1_000_000, help="of text in each domain")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/pregate-distillation"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    console = Console(width=160)
    tokens = tokenize_domains(installed_domains(args.max_bytes), AutoTokenizer.from_pretrained(pocket_path()))
    batches = TokenBatches(tuple(tokens), args.batch_size, args.length, seed=1)
    calibration = TokenBatches(tuple(tokens), args.batch_size, args.length, seed=2)
    held_out = [{"input_ids": domain.windows(args.length, args.held_out)} for domain in tokens]
    trunk = {"width": args.width, "mlp_width": 2 * args.width, "heads": 4, "layers": 2}
    results: dict[str, Any] = {}
    for name in args.mixtures:
        options = dict(MIXTURES[name])
        options["steps"] = args.steps or options["steps"]
        stem = f"{name}-{options['steps']}"
        model = build(options, batches, args.lr, args.work / stem)
        known = record(model, (calibration.batch(i) for i in range(args.calibration)), calibration.fingerprint)
        config = DistillationConfig(steps=args.distil_steps, trunk=trunk)
        folder = args.work / f"{stem}-pregate-{args.calibration}-{args.distil_steps}-{args.width}"
        router = distil(model, known, folder, config)
        unseen = record(model, held_out)
        result = report(model, router, known, unseen)
        recall = result["agreement"]["pre-gate"]["recall@2k"]["mean"]
        load = torch.stack([expert_load(b["index"].flatten(0, 1).flatten(1), known.experts) for b in known.batches])
        result |= {
            "training_steps": options["steps"],
            "target": {"recall@2k": TARGET, "met": recall >= TARGET},
            "largest_load": float(load.mean(0).max()),
        }
        results[name] = result
        console.print(f"## {name}: recall@2k {recall:.3f}, target {TARGET}\n\n{markdown(result)}\n", markup=False)
        save(args, results)


def save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Everything so far, with what made it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
