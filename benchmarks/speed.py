"""Speed of a refactored model against its dense source: `python benchmarks/speed.py --model wide --out out.json`.

--tune measures the model's backends first, as `moesaic tune` does; without it, an earlier table counts, or constants.
--pack packs the linear layers of both sides outside the experts, the dense side's FFNs included: what is left is what
experts are worth, not what packing is.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moesaic
from moesaic.data import DomainTokens, installed_domains, tokenize_domains
from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json
from moesaic.models.attach import attach
from moesaic.models.tuning import limit_copies
from moesaic.refactor.extract import top_channels
from moesaic.refactor.speed import measure_speed

EXPERTS, KEEP = 6, 0.5  # of the randomly initialised shapes
SHAPES = {  # random weights: speed does not depend on their values, only the routes do
    "wide": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16),
    "pocket": dict(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4
    ),
    "1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
    ),
}
VOCABULARY = 4096
PROMPTS, PROMPT_LENGTH = 48, 512
TEXT_BYTES = 200_000  # per domain, enough for the prompts


class HashTokenizer:
    """Word -> CRC-32 modulo the vocabulary: real text's frequencies and repetitions for models without a tokenizer."""

    bos_token_id = eos_token_id = 0

    def __call__(self, texts: list[str], **kwargs: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[zlib.crc32(word.encode()) % VOCABULARY for word in text.split()] for text in texts]}


def prompts(tokenizer: Any) -> Tensor:
    """Windows of the installed domains in turn, (PROMPTS, PROMPT_LENGTH) int64: a batch holds all kinds of text."""
    domains: list[DomainTokens] = tokenize_domains(installed_domains(TEXT_BYTES), tokenizer)
    windows = [domain.windows(PROMPT_LENGTH, -(-PROMPTS // len(domains)), split="train") for domain in domains]
    shortest = min(len(rows) for rows in windows)
    rows = torch.stack([rows[:shortest] for rows in windows], 1).flatten(0, 1)
    return rows.repeat(-(-PROMPTS // len(rows)), 1)[:PROMPTS]


def random_pair(shape: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random Llama and its refactoring. Every domain's channel scores are half common, half its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPES[shape])
    torch.set_default_dtype(dtype)  # a large model never exists in float32 first
    try:
        dense = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    masks = random_masks(config.num_hidden_layers, config.intermediate_size, seed)
    return dense, attach(dense, masks, [f"domain{e}" for e in range(EXPERTS)])


def random_masks(layers: int, width: int, seed: int) -> list[Tensor]:
    """(EXPERTS, width) bool for every layer: which channels experts own."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(EXPERTS + 1, width, generator=generator) for _ in range(layers)]
    return [top_channels(x[:1] + x[1:], KEEP) for x in noise]


def saved_pair(folder: Path, dense: str | None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A refactored checkpoint and its source, the latter from `dense` or else from the checkpoint's receipt."""
    receipt = folder / "receipts" / "receipt.json"
    if dense is None:
        if not receipt.exists():
            raise MoesaicError(f"{receipt} does not exist, so the dense source is unknown: name it with --dense")
        dense = json.loads(receipt.read_text())["model"]["source"]
    return AutoModelForCausalLM.from_pretrained(dense), AutoModelForCausalLM.from_pretrained(folder)


def commit() -> str:
    """Commit of the repository this file is in, with a mark if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return (git("rev-parse", "HEAD") or "none") + (", modified" if git("status", "--porcelain") else "")


def table(result: dict[str, Any]) -> Table:
    machine, settings = result["machine"], result["settings"]
    title = f"{machine['name']}, {machine['threads']} thread(s), {settings['dtype']}, {settings['rounds']} rounds"
    view = Table(title=title, caption=result["verdict"])
    for heading in ("", "dense ms", "moe ms", "dense tok/s", "moe tok/s", "ratio (min to max)", "share of limit"):
        view.add_column(heading, justify="right" if heading else "left")
    for cell in result["cells"]:
        dense, moe, ratio = cell["dense"], cell["moe"], cell["ratio"]
        view.add_row(
            cell["name"],
            f"{dense['ms']:.2f}",
            f"{moe['ms']:.2f}",
            f"{dense['tokens_per_second']:,.0f}",
            f"{moe['tokens_per_second']:,.0f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            f"{dense['share']:.0%} {dense['limit']}, {moe['share']:.0%} {moe['limit']}",
        )
    return view


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="wide", help=f"{', '.join(SHAPES)} (random weights) or a checkpoint folder")
    parser.add_argument("--dense", help="the dense source of a checkpoint, where its receipt does not name it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no new round begins")
    parser.add_argument("--tune", action="store_true", help="measure the backends of this shape first")
    parser.add_argument("--copies", type=float, help="GiB that copies of experts may take; default: as the FFNs")
    parser.add_argument("--pack", action="store_true", help="pack linear layers outside the experts, of both sides")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    return parser.parse_args()


def prepare(dense: PreTrainedModel, moe: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Tune and pack as asked; returns what was done."""
    done: dict[str, Any] = {"packed": args.pack, "tuned": None}
    if args.tune:
        done["tuned"] = moesaic.tune(moe).to_dict()
    if args.copies is not None:
        limit_copies(moe.ffns(), int(args.copies * 2**30))
    if args.pack:
        for model in (dense, moe):
            moesaic.optimize(model)
    done["copies_limit"] = sum(blocks.copies.limit_for(blocks) for blocks in moe.ffns())
    return done


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.model in SHAPES:
        (dense, moe), tokenizer = random_pair(args.model, args.seed, getattr(torch, args.dtype)), HashTokenizer()
    else:
        dense, moe = saved_pair(Path(args.model), args.dense)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    dense, moe = (model.to(args.device, dtype) for model in (dense, moe))
    compute = prepare(dense, moe, args)
    result = measure_speed(dense, moe, prompts(tokenizer), rounds=args.rounds, budget_s=args.budget)
    Console().print(table(result))
    if args.out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "compute": {**compute, "copies_bytes": sum(blocks.copies.bytes for blocks in moe.ffns())},
            "model": {"name": args.model, "config": dense.config.to_diff_dict()},
            **result,
        }
        atomic_write_json(args.out, record)


if __name__ == "__main__":
    try:
        main()
    except MoesaicError as error:
        sys.exit(f"error: {error}")
