"""Train the pocket model: the small real Llama that moesaic ships, from scratch, on a CPU, in about an hour.

    python scripts/train_pocket.py --out src/moesaic/pocket [--domains name=path ...] [--steps 2400]

Without --domains it uses only the six kinds of text every installation carries. Weights are saved as bf16 safetensors
with the tokenizer and `training.json` (settings, data, losses). The run is seeded; it saves every 200 steps and
continues from the last save when started again.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moesaic.data import Domain, TokenBatches, installed_domains, parse_domain, tokenize_domains

VOCABULARY = 4096
SPACE = "▁"
# Words with their leading space, single digits, runs of punctuation, and a newline with its indentation.
WORD = rf"\n{SPACE}*|{SPACE}?\p{{L}}+|\p{{N}}|{SPACE}?[^\s\p{{L}}\p{{N}}{SPACE}]+|{SPACE}+|\s"
# The six installed domains take this share of the batches; further domains share the rest.
INSTALLED_SHARE = 0.6


def train_tokenizer(domains: list[Domain], bytes_per_domain: int = 700_000) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE: unknown characters become their UTF-8 bytes, so every text encodes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=False))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, limit_alphabet=400, min_frequency=2, show_progress=False
    )

    def sample() -> Iterator[str]:
        for domain in domains:
            size = 0
            for text in domain.train:
                if size > bytes_per_domain:
                    break
                size += len(text)
                yield text

    tokenizer.train_from_iterator(sample(), trainer)
    # The trainer marks all `special` pieces as special; the byte pieces are ordinary vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=1024,
    )


def pocket_config() -> LlamaConfig:
    """6.95 M parameters, 68 % of them in the FFNs."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=lr * 0.3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def multiplier(step: int, steps: int, warmup: int = 60, decay_share: float = 0.45) -> float:
    """Warm-up, stable, linear decay to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - decay_share)
    return 1.0 if step < start else 1.0 - 0.98 * (step - start) / (steps - start)


@torch.no_grad()
def validation(model: LlamaForCausalLM, domains: list, length: int, windows: int = 16) -> dict[str, dict[str, float]]:
    """Nats per token and bits per byte of each domain's held-out documents."""
    result = {}
    for domain in domains:
        ids = domain.windows(length, windows)
        loss = sum(model(input_ids=ids[i : i + 4], labels=ids[i : i + 4]).loss.item() * len(ids[i : i + 4]) for i in
                   range(0, len(ids), 4)) / len(ids)  # fmt: skip
        result[domain.name] = {"nats_per_token": loss, "bits_per_byte": loss / math.log(2) / domain.bytes_per_token}
    return result


def save(out: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], step: int, work: Path) -> None:
    """Weights to `out`, optimizer moments beside them in `work`; each file is renamed into place."""
    tensors = {}
    for number, opt in enumerate(opts):
        for key, state in opt.state_dict()["state"].items():
            tensors |= {f"{number}.{key}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors |= {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors["step"] = torch.tensor(step)
    work.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, work / "state.tmp")
    os.replace(work / "state.tmp", work / "state.safetensors")


def restore(model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], work: Path) -> int:
    """Continue from `work`; returns the number of finished steps."""
    if not (work / "state.safetensors").exists():
        return 0
    tensors = load_file(work / "state.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
    for number, opt in enumerate(opts):
        state: dict = {}
        for name, value in tensors.items():
            if name.startswith(f"{number}."):
                _, key, field = name.split(".")
                state.setdefault(int(key), {})[field] = value
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    return int(tensors["step"])


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("pocket-work"))
    parser.add_argument("--domains", nargs="*", default=[], help="further domains, name=path")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    installed = installed_domains()
    domains = installed + [parse_domain(spec) for spec in args.domains]
    tokenizer = train_tokenizer(domains)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    streams = tokenize_domains(domains, tokenizer)
    # Square-root sampling inside each of the two groups: large domains do not drown small ones.
    size = np.sqrt([len(stream.train) for stream in streams])
    first = np.arange(len(streams)) < len(installed)
    rest_share = 1 - INSTALLED_SHARE if args.domains else 0.0
    weights = np.where(
        first, INSTALLED_SHARE * size / size[first].sum(), rest_share * size / max(1e-9, size[~first].sum())
    )
    batches = TokenBatches(tuple(streams), args.batch, args.length, seed=0, weights=tuple(weights))
    for stream, weight in zip(streams, weights, strict=True):
        print(f"{stream.name:14s} {len(stream.train):9,d} train tokens  weight {weight:.3f}", flush=True)

    model = LlamaForCausalLM(pocket_config())
    opts = optimizers(model, args.lr)
    done = restore(model, opts, args.work)
    print(f"{model.num_parameters():,d} parameters; starting at step {done}", flush=True)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    base = [[args.lr], [args.lr * 0.3]] if done else base
    started, seconds = time.time(), 0.0
    for step in range(done, args.steps):
        for opt, lrs in zip(opts, base, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * multiplier(step, args.steps)
        ids = batches.batch(step)["input_ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seconds = time.time() - started
        if step % 20 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:7.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save(args.out, model, opts, step + 1, args.work)
            losses = validation(model, streams, args.length, windows=8)
            print(json.dumps({name: round(row["nats_per_token"], 3) for name, row in losses.items()}), flush=True)

    losses = validation(model.eval(), streams, args.length, windows=32)
    model.to(torch.bfloat16).save_pretrained(args.out)
    record = {
        "parameters": model.num_parameters(),
        "steps": args.steps,
        "tokens": args.steps * args.batch * args.length,
        "batch": args.batch,
        "sequence_length": args.length,
        "lr": args.lr,
        "seconds_of_last_run": round(seconds),
        "torch": torch.__version__,
        "domains": [
            {"name": s.name, "documents": len(d.train), "train_tokens": len(s.train), "weight": round(float(w), 4),
             "held_out_documents": len(d.validation), **losses[s.name]}
            for d, s, w in zip(domains, streams, weights, strict=True)
        ],
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
