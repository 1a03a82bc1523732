"""trace: record the routes of a mixture, look at a trace, make one, and put real arrivals to recorded routes."""

import difflib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options

if TYPE_CHECKING:
    from moesaic.analyze.route_recording import Prompt
    from moesaic.schedule.replay import Arrivals
    from moesaic.schedule.trace import Trace

trace = typer.Typer(no_args_is_help=True, help="Requests with the experts their tokens used: record, make, replay.")

Out = Annotated[Path, typer.Option("--out", "-o", help="The trace to write; any name, .trace by custom.")]
Log = Annotated[
    Path,
    typer.Option(
        help="A log: CSV with arrival_s, context_tokens, generated_tokens and perhaps prompt_id, or JSON lines with "
        "timestamp (ms), input_length, output_length."
    ),
]
First = Annotated[int | None, typer.Option("--requests", help="Only the log's first requests.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.add_typer(trace, name="trace")


@trace.command()
def record(
    model: options.Model,
    out: Out,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with id and text, or turns (a list of texts).")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Without --prompts: domains as elsewhere; default: the installed six.")
    ] = None,
    each: Annotated[int, typer.Option(help="Prompts per domain of --data.")] = 32,
    arrivals: Annotated[Path | None, typer.Option(help="A log whose times and lengths the trace takes.")] = None,
    requests: First = None,
    max_output: Annotated[int, typer.Option(help="Output tokens to record per prompt; longer requests repeat.")] = 256,
    max_prompt: Annotated[int, typer.Option(help="Prompt tokens to record.")] = 1024,
    library: Annotated[Path | None, typer.Option(help="Keep the recording before the replay here too.")] = None,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Sequences generated together.")] = 32,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Generate from prompts with MODEL, a mixture of experts, and write which experts every token used.

    With --arrivals the requests of a log take the routes of the prompts they name, or of prompts of near length; every
    prompt is generated once, as long as its longest request wants. Without, every prompt is one request at time 0.

    Example: moesaic trace record moesaic-demo --prompts prompts.jsonl --arrivals log.csv --out log.trace
    """
    from moesaic.analyze.route_recording import Sampling
    from moesaic.analyze.route_recording import record as run
    from moesaic.models.loading import load_model, load_tokenizer, stored_dtype
    from moesaic.progress import set_quiet
    from moesaic.schedule.replay import replay

    set_quiet(as_json)
    log = None if arrivals is None else _log(arrivals, requests)
    texts, outputs = _wanted(_prompts(prompts, data, each), log, max_output)
    source = options.model_source(model)
    recorded = run(
        load_model(source),
        load_tokenizer(source),
        texts,
        outputs,
        sampling=Sampling(temperature, seed),
        batch=batch,
        prompt_tokens=max_prompt,
        weight_bytes=stored_dtype(source).itemsize,
        name=Path(model).name,
    )
    if library is not None:
        recorded.save(library)
    _write(recorded if log is None else replay(log, recorded, seed), out, as_json)
    if cut := recorded.meta["cut"]:
        typer.echo(f"{cut} of {len(texts)} prompts were cut, by the model's positions or --max-prompt", err=True)


@trace.command()
def info(path: Annotated[Path, typer.Argument(help="A trace.")], as_json: options.Json = False) -> None:
    """What a trace holds: requests, tokens, load of the experts, how local the routes are, and of which model."""
    from moesaic.schedule.trace import Trace

    _show(Trace.load(path), as_json)


@trace.command()
def synth(
    out: Out,
    requests: Annotated[int, typer.Option(help="How many.")] = 1000,
    rate: Annotated[float, typer.Option(help="Requests per second in the mean.")] = 1.0,
    arrival: Annotated[str, typer.Option(help="poisson, gamma, uniform or burst.")] = "poisson",
    cv: Annotated[float, typer.Option(help="gamma: coefficient of variation of the gaps.")] = 2.0,
    burst: Annotated[int, typer.Option(help="burst: requests at once.")] = 8,
    prompt: Annotated[float, typer.Option(help="Mean prompt tokens.")] = 128.0,
    prompt_sigma: Annotated[float, typer.Option(help="Spread of their logarithm.")] = 0.8,
    output: Annotated[float, typer.Option(help="Mean output tokens.")] = 32.0,
    output_sigma: Annotated[float, typer.Option(help="Spread of their logarithm.")] = 0.8,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 8,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="A choice in every layer, not one for all.")] = False,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    k: Annotated[int, typer.Option("--k", help="Experts per token.")] = 1,
    stay: Annotated[float, typer.Option(help="Probability that a token keeps the experts before it.")] = 0.5,
    skew: Annotated[float, typer.Option(help="Zipf exponent of the experts' popularity.")] = 0.0,
    topics: Annotated[int, typer.Option(help="Topics with experts of their own; 0 = none.")] = 0,
    concentration: Annotated[float, typer.Option(help="Of a topic's Dirichlet; small = few experts.")] = 0.5,
    sharpness: Annotated[
        float | None, typer.Option(help="Of the Markov chain between layers; small = certain, none = independent.")
    ] = None,
    known_at: Annotated[str, typer.Option(help="When routes are known: prompt, request, step or gate.")] = "request",
    d: Annotated[int, typer.Option("--d", help="Model width.")] = 512,
    ffn: Annotated[int, typer.Option(help="Channels of an expert; with --shared of the dense FFN.")] = 1024,
    shared: Annotated[float | None, typer.Option(help="Share of channels that all experts own.")] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Make a trace with a chosen arrival process, lengths and locality. The same options give the same bytes."""
    from moesaic.schedule.synthetic import Synthetic, synthesize

    made = Synthetic(
        requests=requests, rate=rate, arrival=arrival, cv=cv, burst=burst, prompt=prompt,  # type: ignore[arg-type]
        prompt_sigma=prompt_sigma, output=output, output_sigma=output_sigma, layers=layers,
        route_layers=layers if per_layer else 1, experts=experts, k=k, stay=stay, skew=skew, topics=topics,
        concentration=concentration, sharpness=sharpness, known_at=known_at, d=d, ffn=ffn, shared=shared, seed=seed,
    )  # fmt: skip
    _write(synthesize(made), out, as_json)


@trace.command()
def replay(
    library: Annotated[Path, typer.Argument(help="A recorded trace, one sequence per prompt.")],
    arrivals: Log,
    out: Out,
    requests: First = None,
    load: Annotated[float, typer.Option(help="Times the log's own load: arrivals are divided by it.")] = 1.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Give the requests of a log the routes of LIBRARY: of the prompt they name, or of one of near length."""
    from moesaic.schedule.replay import replay as run
    from moesaic.schedule.trace import Trace

    _write(run(_log(arrivals, requests), Trace.load(library), seed).scaled(load), out, as_json)


@trace.command()
def predict(
    path: Annotated[Path, typer.Argument(help="A trace with token ids: recordings have them.")],
    out: Out,
    width: Annotated[int | None, typer.Option(help="Experts named a layer. Default: twice the model's top k.")] = None,
    folds: Annotated[int, typer.Option(help="Parts; each is answered by a model trained on the others.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each model.")] = 600,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Train a route predictor on a trace and write its answers beside the routes, for systems with predictor learned.

    No request is answered by a model that has seen it. The answers are those of 2410.17954's kind of predictor.
    """
    from moesaic.analyze.route_predictor import FitConfig, cross_annotate
    from moesaic.schedule.trace import Trace

    own = Trace.load(path)
    _write(cross_annotate(own, width or 2 * own.card.top_k, folds, FitConfig(steps=steps, seed=seed)), out, as_json)


def _log(path: Path, requests: int | None) -> "Arrivals":
    from moesaic.errors import MoesaicError
    from moesaic.schedule.replay import read_arrivals

    if requests is not None and requests < 1:
        raise MoesaicError(f"--requests {requests}: expected at least 1")
    log = read_arrivals(path)
    return log if requests is None else log.head(requests)


def _prompts(path: Path | None, data: list[str] | None, each: int) -> "list[Prompt]":
    from moesaic.analyze.route_recording import domain_prompts, read_prompts
    from moesaic.data.sources import load_domains
    from moesaic.errors import MoesaicError

    if path is not None:
        if data:
            raise MoesaicError("give --prompts or --data, not both")
        return read_prompts(path)
    if each < 1:
        raise MoesaicError(f"--each {each}: expected at least 1 prompt per domain")
    return domain_prompts(load_domains(options.domain_specs(data), 1_000_000), each)


def _wanted(prompts: "list[Prompt]", log: "Arrivals | None", most: int) -> "tuple[list[Prompt], list[int]]":
    """The prompts the log names (all, where it names none), and the output tokens to record of each."""
    from moesaic.errors import MoesaicError

    if most < 0:
        raise MoesaicError(f"--max-output {most}: expected at least 0")
    if log is None:
        return prompts, [most] * len(prompts)
    if log.prompt_id is None:
        return prompts, [min(most, int(log.output_tokens.max()))] * len(prompts)
    longest: dict[str, int] = {}
    for name, tokens in zip(log.prompt_id, log.output_tokens.tolist(), strict=True):
        longest[name] = max(longest.get(name, 0), tokens)
    names = {prompt.id for prompt in prompts}
    if unknown := next((name for name in longest if name not in names), None):
        near = difflib.get_close_matches(unknown, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MoesaicError(f"the log names the prompt {unknown!r}, which is not among the {len(names)} prompts{hint}")
    used = [prompt for prompt in prompts if prompt.id in longest]
    return used, [min(most, longest[prompt.id]) for prompt in used]


def _write(made: "Trace", out: Path, as_json: bool) -> None:
    made.save(out)
    _show(made, as_json)
    if not as_json:
        typer.echo(f"\nTrace: {out}")


def _show(shown: "Trace", as_json: bool) -> None:
    about = shown.info()
    if as_json:
        typer.echo(json.dumps(about, sort_keys=True))  # a trace is shown alike before and after its file
        return
    card = about["card"]
    rate = about["requests_per_s"]
    load = [f"{share:.3f}" for share in sorted(about["load"], reverse=True)]
    bits = f"{about['entropy']:.2f} of {math.log2(about['experts']):.2f} bits"
    rows: dict[str, Any] = {
        "requests": f"{about['requests']:,d} in {about['hours']:.3f} h" + ("" if rate is None else f", {rate:.3g}/s"),
        "tokens": f"{about['prompt_tokens']:,d} prompt, {about['output_tokens']:,d} output",
        "rows": f"{about['rows']:,d}; {about['stretched']:.1%} of the tokens repeat one",
        "model": f"{card['model']}: {about['layers']} layers, {about['experts']} experts, top {card['top_k']}, "
        f"{'stored as channel blocks' if card['blocks'] else 'stored whole'}",
        "routes": f"known at {about['known_at']}; "
        + ("one choice for all layers" if about["route_layers"] == 1 else "a choice in every layer"),
        "load": " ".join(load if len(load) <= 8 else [*load[:4], "...", *load[-3:]]) + f"; entropy {bits}",
        "stay": "no decode tokens" if about["stay"] is None else f"{about['stay']:.1%} keep the experts before them",
        "unique": ", ".join(
            f"{count:.2f} experts for {batch} decode tokens"
            for batch, count in about["unique_experts"].items()
            if count is not None
        ),
    }
    for name, value in rows.items():
        typer.echo(f"{name:9s} {value}")
