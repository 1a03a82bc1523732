"""evaluate, generate, inspect: look at a model, dense or refactored."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(evaluate)
    app.command()(generate)
    app.command()(inspect)


def evaluate(
    model: options.Model,
    domains: options.Domains = None,
    windows: Annotated[int, typer.Option(help="Held-out windows per domain.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    max_bytes: options.MaxBytes = 4_000_000,
    as_json: options.Json = False,
) -> None:
    """Held-out loss per domain of MODEL, dense or refactored."""
    from moesaic.progress import set_quiet
    from moesaic.refactor.api import evaluate as run

    set_quiet(as_json)
    result = run(
        options.model_source(model), options.domain_specs(domains), windows=windows, length=length, max_bytes=max_bytes
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"{'domain':16s} {'nats/token':>10s} {'bits/byte':>10s}")
    for name, row in result.items():
        typer.echo(f"{name:16s} {row['nats_per_token']:10.4f} {row['bits_per_byte']:10.4f}")


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, hub name or pocket.")] = "moesaic-demo",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    expert: Annotated[int | None, typer.Option(help="Use this one expert for every token.")] = None,
    decode: Annotated[
        str | None, typer.Option(help="self-contrast: strong against weak routing, for mixtures.")
    ] = None,
    weak: Annotated[str, typer.Option(help="Self-contrast: the weak routing, rank:K or top:K.")] = "rank:2",
    beta: Annotated[float, typer.Option(help="Self-contrast: its strength; tune it on held-out data.")] = 0.5,
    alpha: Annotated[float, typer.Option(help="Self-contrast: least share of the best token's probability.")] = 0.1,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Continue PROMPT with a dense, refactored or routed model; tokens of a refactored one are coloured by expert."""
    import torch

    from moesaic.errors import MoesaicError
    from moesaic.models.loading import load_model, load_tokenizer

    source = options.model_source(model)
    network, tokenizer = load_model(source), load_tokenizer(source)
    if expert is not None:
        names = getattr(network.config, "expert_names", [])
        if not 0 <= expert < len(names):
            raise MoesaicError(
                f"--expert {expert}: {model} has {len(names)} experts{', numbered from 0' if names else ''}"
            )
    torch.manual_seed(seed)
    ids = _encode(tokenizer, prompt)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    extra: dict[str, Any] = {} if expert is None else {"expert_index": expert}
    extra |= _decoding(decode, weak, beta, alpha)
    output = network.generate(ids, max_new_tokens=max_new_tokens, **sampling, **extra)
    _show(network, tokenizer, output, as_json, expert)


def _decoding(decode: str | None, weak: str, beta: float, alpha: float) -> dict[str, Any]:
    """What `generate` gets for --decode."""
    from moesaic.errors import MoesaicError
    from moesaic.models.self_contrast import SelfContrast

    if decode is None:
        return {}
    if decode != "self-contrast":
        raise MoesaicError(f"--decode {decode}: expected self-contrast, or no --decode for the usual decoding")
    return {"custom_generate": SelfContrast(weak=weak, beta=beta, alpha=alpha)}


def inspect(
    text: Annotated[str, typer.Argument(help="Text to route; @FILE reads a file.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A refactored checkpoint.")] = "moesaic-demo",
    as_json: options.Json = False,
) -> None:
    """Colour every token of TEXT by the expert that the pre-gate chooses for it. The backbone does not run."""
    from moesaic.errors import MoesaicError
    from moesaic.models.loading import load_model, load_tokenizer

    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise MoesaicError(f"{path} is no file; @FILE reads the text to route from a file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MoesaicError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    source = options.model_source(model)
    network, tokenizer = load_model(source), load_tokenizer(source)
    if not hasattr(network, "pregate"):
        raise MoesaicError(f"{model} is a dense model and has no experts to show; refactor it first")
    _show(network, tokenizer, _encode(tokenizer, text), as_json, None)


def _encode(tokenizer, text: str):  # type: ignore[no-untyped-def]
    """(1, S) ids with the beginning-of-sequence token the training documents had."""
    import torch

    from moesaic.errors import MoesaicError

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise MoesaicError("the text is empty; there is nothing to route or to continue")
    return torch.tensor([ids])


def _show(network, tokenizer, ids, as_json: bool, expert: int | None) -> None:  # type: ignore[no-untyped-def]
    """Print the text of `ids`, coloured by expert where the model has experts."""
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    if not hasattr(network, "pregate"):
        typer.echo(json.dumps({"text": text}) if as_json else text)
        return
    from moesaic.refactor.receipts import token_texts

    names = network.config.expert_names
    chosen = [expert] * ids.shape[1] if expert is not None else network.plan(ids).expert.tolist()
    tokens = list(zip(token_texts(tokenizer, ids[0].tolist()), chosen, strict=True))
    if as_json:
        rows = [{"token": token, "expert": names[index]} for token, index in tokens]
        typer.echo(json.dumps({"text": text, "tokens": rows}))
        return
    from rich.console import Console

    from moesaic.refactor.terminal import coloured_tokens

    Console().print(coloured_tokens(tokens, names))
