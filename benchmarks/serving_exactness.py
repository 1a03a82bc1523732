"""Are a request's greedy tokens those of transformers' generate(), whatever the server's memory, batch and policies?

    python benchmarks/serving_exactness.py --model moe --prompts texts.jsonl --out results.json

Every setting serves all prompts at once; the reference is generate() on each prompt alone, in the same dtype.
"""

import argparse
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import moesaic  # noqa: F401 - registers the Auto classes
from moesaic.analyze.route_recording import read_prompts
from moesaic.files import atomic_write_json
from moesaic.models.loading import load_tokenizer
from moesaic.progress import Progress
from moesaic.refactor.receipts import environment
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Event, Finished, Generation, Token

SETTINGS: dict[str, dict[str, Any]] = {
    "experts 100 %": {},
    "experts 50 %": {"experts": 0.5},
    "experts 25 %": {"experts": 0.25},
    "experts at the minimum": {"experts": "least"},
    "one request at a time": {"max_requests": 1},
    "8 requests, 50 %": {"max_requests": 8, "experts": 0.5},
    "steps of 16 tokens, 50 %": {"max_tokens": 16, "experts": 0.5},
    "steps of 61 tokens": {"max_tokens": 61},
    "no prefetch, 50 %": {"lookahead": 0, "experts": 0.5},
    "fcfs, lru, 50 %": {"batcher": "fcfs", "policy": "lru", "experts": 0.5},
    "longest queue, 50 %": {"batcher": "longest-queue", "experts": 0.5, "max_tokens": 64},
    "prefill first, random, 50 %": {"batcher": "prefill-first", "policy": "random", "experts": 0.5},
    "prefixes reused": {"prefix_reuse": True},
}


@torch.no_grad()
def generated(folder: Path, dtype: torch.dtype, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    answers = []
    with Progress("generate", total=len(prompts), unit="prompts") as progress:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
            answers.append(out[0, len(prompt) :].tolist())
            progress.advance(1)
    return answers


def served(
    folder: Path, options: EngineOptions, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], float]:
    """Answers to all prompts at once, and the hit ratio."""
    engine = Engine(folder, options)
    engine.runner.eos = frozenset()  # as generate() above: no token ends a text
    engine.start()
    answers: list[list[int]] = [[] for _ in prompts]
    done = threading.Semaphore(0)

    def listener(number: int) -> Any:
        def hear(event: Event) -> None:
            if isinstance(event, Token):
                answers[number].append(event.id)
            elif isinstance(event, Finished):
                done.release()

        return hear

    for number, prompt in enumerate(prompts):
        engine.submit(prompt, Generation(max_tokens=tokens, temperature=0), listener(number))
    for _ in prompts:
        done.acquire()
    hits = engine.stats().hit_ratio
    engine.close()
    return answers, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = [list(tokenizer(prompt.text).input_ids) for prompt in read_prompts(args.prompts)]
    # beginnings and later pieces of the texts, of 1 to 120 tokens
    pieces = [
        ids[start : start + 1 + (7 * start) % 120] for start in range(0, 4000, 97) for ids in texts if len(ids) > start
    ]
    prompts = [piece for piece in pieces if piece][: args.count]
    wanted = generated(args.model, getattr(torch, args.dtype), prompts, args.tokens)
    rows = []
    probe = Engine(args.model, EngineOptions(dtype=args.dtype, memory=args.memory))
    least = probe.runner.machine.memory.least
    probe.close()
    for name, changes in SETTINGS.items():
        changes = {key: least if value == "least" else value for key, value in changes.items()}
        options = EngineOptions(**{"dtype": args.dtype, "memory": args.memory, "prefix_reuse": False, **changes})
        begin = time.perf_counter()
        answers, hits = served(args.model, options, prompts, args.tokens)
        same = sum(one == two for one, two in zip(answers, wanted, strict=True))
        rows.append(
            {
                "setting": name,
                "same": same,
                "of": len(prompts),
                "hit_ratio": hits,
                "seconds": time.perf_counter() - begin,
            }
        )
    table = Table(title=f"{args.dtype}: requests whose {args.tokens} tokens are generate()'s")
    for head in ("setting", "same", "hit ratio", "seconds"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row["setting"], f"{row['same']} of {row['of']}", f"{row['hit_ratio']:.3f}", f"{row['seconds']:.1f}"
        )
    Console().print(table)
    if args.out is not None:
        command = "python " + " ".join(shlex.quote(Path(arg).name if "/" in arg else arg) for arg in sys.argv)
        atomic_write_json(args.out, {"command": command, "dtype": args.dtype, **environment(), "rows": rows})


if __name__ == "__main__":
    main()
