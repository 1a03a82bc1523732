"""Many streaming clients for minutes, some of which vanish or read slowly: what is lost or wrong, does memory grow?

    python benchmarks/serving_load.py --model moe --clients 500 --seconds 600 --out results.json

Starts `moesaic serve` itself. Answers are greedy and compared with what the same server said to one at a time before.
"""

import argparse
import asyncio
import json
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from moesaic.files import atomic_write_json
from moesaic.progress import Progress
from moesaic.refactor.receipts import environment

VANISH, SLOW = 0.2, 0.1  # shares of requests
WORDS = [
    "the",
    "of",
    "and",
    "code",
    "function",
    "return",
    "number",
    "story",
    "once",
    "model",
    "river",
    "light",
    "paper",
    "seven",
]


def prompts(count: int) -> list[str]:
    chooser = random.Random(0)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 60))) for _ in range(count)]


async def ask(client: httpx.AsyncClient, prompt: str, tokens: int, kind: str = "plain") -> str | None:
    """The answer; None if this client left, or was told to come back later."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["Retry-After"]))
            return None
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                text += chunk["choices"][0]["text"]
                if kind == "vanish" and len(text) > 5:
                    return None
                if kind == "slow":
                    await asyncio.sleep(0.05)
    raise RuntimeError("the stream was cut")


async def load(url: str, args: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    texts, counts, memory = prompts(args.prompts), Counter[str](), []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
        wanted = {text: await ask(client, text, args.tokens) for text in texts}
        before = (await client.get("/v1/moesaic/state")).json()
        end = time.monotonic() + args.seconds

        async def user(number: int) -> None:
            chooser = random.Random(number)
            while time.monotonic() < end:
                draw, text = chooser.random(), chooser.choice(texts)
                kind = "vanish" if draw < VANISH else "slow" if draw < VANISH + SLOW else "plain"
                try:
                    answer = await ask(client, text, args.tokens, kind)
                except (httpx.HTTPError, RuntimeError) as error:
                    counts["lost"] += 1
                    counts[f"lost: {type(error).__name__} {error}"[:80]] += 1
                    continue
                counts[kind if answer is not None or kind == "vanish" else "asked to come back"] += 1
                counts["wrong"] += answer is not None and answer != wanted[text]

        async def watch() -> None:
            with Progress("load", total=args.seconds, unit="seconds") as progress:
                while time.monotonic() < end:
                    await asyncio.sleep(1)
                    state = (await client.get("/v1/moesaic/state")).json()
                    memory.append(state["memory"]["process"])
                    counts["over budget"] += (
                        state["memory"]["experts"] > state["memory"]["experts_capacity"] + args.edges
                    )
                    progress.advance(1)

        await asyncio.gather(watch(), *(user(number) for number in range(args.clients)))
        await asyncio.sleep(1)
        after = (await client.get("/v1/moesaic/state")).json()
    quarter = max(len(memory) // 4, 1)
    return {
        "counts": dict(counts),
        "tokens": after["output_tokens"] - before["output_tokens"],
        "still_running": after["running"],
        "memory_first_quarter": sum(memory[:quarter]) / quarter,
        "memory_last_quarter": sum(memory[-quarter:]) / quarter,
        "memory_most": max(memory),
        "memory_budget": after["memory"]["budget"],
        "hit_ratio": after["hit_ratio"],
        "failed": after["finished"].get("error", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--experts", default="0.5")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--edges", type=int, default=2**20, help="bytes of pages shared by neighbours")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = ["--memory", args.memory, "--experts", args.experts, "--dtype", "float32", "--port", "0"]
    command = [sys.executable, "-m", "moesaic", "serve", str(args.model), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    first = next((line for line in server.stderr if "http://" in line or "error" in line), "no answer")
    if "http://" not in first:
        sys.exit(first)
    log = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
    try:
        result = asyncio.run(load(first.split(" on ")[1].split(",")[0], args))
    finally:
        server.terminate()
        server.wait(60)
        log.wait(10)
    print(json.dumps(result, indent=2))
    if args.out is not None:
        shown = "python " + " ".join(shlex.quote(Path(arg).name if "/" in arg else arg) for arg in sys.argv)
        atomic_write_json(args.out, {"command": shown, **environment(), **result})


if __name__ == "__main__":
    main()
