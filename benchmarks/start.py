"""From the start of a process to the first token of the engine, beside reading the bytes that it needs.

    python benchmarks/start.py --model 1b --out benchmarks/results/start.json

Every round starts a new interpreter, which imports the engine, loads the random model of `whole_model.py`, answers one
prompt and ends; and another, which only reads the same bytes (the dense part and the experts of the prompt) from the
page cache into fresh memory. They take turns; the first round counts for nothing, it fills the page cache. The parts of
the start tell what it is made of: functions of the engine's loading are timed by name where this version has them.
"""

import argparse
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TARGET = 1.5  # times the reading, at most
PARTS = {  # what is timed inside of loading, by (module, function)
    "plan": ("moesaic.serve.assemble", "plan"),
    "weights": ("moesaic.serve.loading", "_load_moesaic"),
    "norms": ("moesaic.serve.loading", "fuse_norms"),
    "layers": ("moesaic.serve.loading", "fuse_layers"),
    "packing": ("moesaic.serve.loading", "pack_linears"),
    "tokenizer": ("moesaic.serve.loading", "load_tokenizer"),
    "shapes": ("moesaic.serve.loading", "kv_shapes"),
    "store": ("moesaic.serve.assemble", "_store"),
}


# -- the processes that are timed -------------------------------------------------------------------------------------
def answer(begin: float, folder: str, threads: int, prompt: int, pin: int | None) -> dict[str, Any]:
    """Import, load, answer; seconds of each since `begin`, when the parent started this process."""
    marks = {"interpreter": time.monotonic()}
    from moesaic.serve.engine import Engine
    from moesaic.serve.options import EngineOptions
    from moesaic.serve.request import ExpertControl, Finished, Generation, Token

    marks["imports"] = time.monotonic()
    inside: dict[str, float] = {}
    for name, (module, function) in PARTS.items():
        _time(inside, name, importlib.import_module(module), function)
    engine = Engine(folder, EngineOptions(threads=threads, context=2048, max_requests=8))
    marks["load"] = time.monotonic()
    import threading

    engine.start()
    marks["experts"] = time.monotonic()

    first, ended = [], threading.Event()

    def hear(event: Any) -> None:
        if isinstance(event, Token):
            first.append(time.monotonic())
        elif isinstance(event, Finished):
            ended.set()

    ids = list(range(1, prompt + 1))
    control = ExpertControl() if pin is None else ExpertControl(pin=pin)
    engine.submit(ids, Generation(max_tokens=1, temperature=0, ignore_eos=True, experts=control), hear)
    ended.wait()
    marks["first prompt"] = first[0]
    read = engine.runner.machine.store.memory.resident
    engine.close()
    ends = list(marks.values())
    parts = {name: end - start for name, start, end in zip(marks, [begin, *ends], ends, strict=False)}
    return {"seconds": ends[-1] - begin, "parts": parts, "inside": inside, "expert_bytes": read}


def _time(into: dict[str, float], name: str, module: Any, function: str) -> None:
    """Add up the seconds of a function, wherever `module` calls it; nothing where there is none of that name."""
    call: Callable[..., Any] | None = getattr(module, function, None)
    if call is None:
        return

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            into[name] = into.get(name, 0.0) + time.monotonic() - begin

    setattr(module, function, timed)


def read(ranges: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """Seconds of reading the ranges of files into fresh memory, with nothing imported."""
    begin, kept, handles = time.monotonic(), [], {}
    for path, start, stop in ranges:
        if path not in handles:
            handles[path] = os.open(path, os.O_RDONLY)
        target = bytearray(stop - start)
        kept.append(target)
        view = memoryview(target)
        while view:
            count = os.preadv(handles[path], [view], stop - len(view))
            view = view[count:]
    return {"seconds": time.monotonic() - begin, "bytes": sum(map(len, kept))}


def child(words: list[str]) -> None:
    kind, begin, job = words[0], float(words[1]), json.load(sys.stdin)
    out = read(job) if kind == "read" else answer(begin, **job)
    sys.stdout.write("\n" + json.dumps(out) + "\n")


def ask(kind: str, job: Any) -> dict[str, Any]:
    """The answer of a fresh process."""
    command = [sys.executable, __file__, "--child", kind, str(time.monotonic())]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process of the benchmark failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# -- the benchmark ----------------------------------------------------------------------------------------------------
def needed(folder: Path, experts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Ranges of the checkpoint's files: all that is no expert's, and the blocks of these experts."""
    from moesaic.serve.model_files import CONFIG, ModelFiles, expert_entries, read_json

    files = ModelFiles(folder)
    layout, parts = expert_entries(read_json(folder / CONFIG), files, 2)
    owned = {part.tensor for ranges in parts.values() for part in ranges}
    ranges = {(str(place.file), place.start, place.stop) for name, place in files.tensors.items() if name not in owned}
    for (_, expert), keys in layout.entries.items():
        if expert in experts:
            ranges |= {(str(part.file), part.start, part.stop) for key in keys for part in parts[key]}
    merged: list[tuple[str, int, int]] = []
    for path, start, stop in sorted(ranges):
        if merged and merged[-1][0] == path and merged[-1][2] == start:
            merged[-1] = (path, merged[-1][1], stop)
        else:
            merged.append((path, start, stop))
    return merged


def rounds(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    from speed import EXPERTS

    from moesaic.progress import Progress

    experts = list(range(EXPERTS)) if args.mixed else [0]
    jobs = {
        "start": {"folder": str(folder), "threads": args.threads, "prompt": args.prompt},
        "read": needed(folder, experts),
    }
    jobs["start"]["pin"] = None if args.mixed else 0
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    numbers = range(int(args.quick), args.rounds + 1)
    with Progress("start", total=len(numbers), unit="rounds") as progress:
        for number in numbers:
            for name in sorted(jobs, reverse=bool(number % 2)):
                out = ask(name, jobs[name])
                if number:
                    results[name].append(out)
            progress.advance()
    return results


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; the ratio by rounds."""
    starts, reads = results["start"], results["read"]

    def middle(key: str) -> dict[str, float]:
        names = {name: None for each in starts for name in each[key]}
        return {name: statistics.median(each[key].get(name, 0.0) for each in starts) for name in names}

    over = [start["seconds"] / own["seconds"] for start, own in zip(starts, reads, strict=True)]
    value = statistics.median(over)
    return {
        "start_s": statistics.median(each["seconds"] for each in starts),
        "read_s": statistics.median(each["seconds"] for each in reads),
        "needed_bytes": reads[0]["bytes"],
        "parts_s": middle("parts"),
        "inside_load_s": middle("inside"),
        "expert_bytes_read": starts[-1]["expert_bytes"],
        "targets": [{"target": 7, "what": "start / reading", "at_most": TARGET, "is": value, "met": value <= TARGET}],
        "rounds": results,
    }


def tables(record: dict[str, Any]) -> Iterator[Any]:
    from rich.table import Table

    rate = record["needed_bytes"] / record["read_s"] / 1e9
    view = Table("", "seconds", "of reading", title=f"start with {record['model']}, {record['dtype']}")
    rows = {f"reading {record['needed_bytes'] / 2**30:.2f} GiB at {rate:.1f} GB/s": record["read_s"]}
    rows |= record["parts_s"]
    rows["start to first token"] = record["start_s"]
    for name, seconds in rows.items():
        view.add_row(name, f"{seconds:.3f}", f"{seconds / record['read_s']:.2f}")
        if name == "load":
            for part, own in record["inside_load_s"].items():
                view.add_row(f"  {part}", f"{own:.3f}", f"{own / record['read_s']:.2f}")
            rest = seconds - sum(record["inside_load_s"].values())
            view.add_row("  rest", f"{rest:.3f}", f"{rest / record['read_s']:.2f}")
    yield view
    for each in record["targets"]:
        met = "met" if each["met"] else "missed"
        yield f"target {each['target']}: {each['what']} at most {each['at_most']}, is {each['is']:.2f}: {met}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="shape of the random model: pocket, wide, 1b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--mixed", action="store_true", help="the prompt's tokens go to all experts, not to one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/whole-model"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    if args.quick:
        args.model, args.rounds, args.threads = "tiny", 1, 1
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    from speed import commit
    from whole_model_files import moe_folder

    from moesaic.refactor.receipts import environment

    load, folder = os.getloadavg()[0], moe_folder(args.work, args.model, args.dtype)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "environment": environment(),
        "load_before": load,
        "model": args.model,
        "dtype": args.dtype,
        "prompt": args.prompt,
        "mixed": args.mixed,
        **summary(rounds(args, folder)),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    args = parse()
    from rich.console import Console

    from moesaic.files import atomic_write_json

    console, record = Console(), run(args)
    for each in tables(record):
        console.print(each)
    if args.out:
        atomic_write_json(args.out, record)


if __name__ == "__main__":
    main()
