"""serve: a refactored model behind an OpenAI-compatible API."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options

ModelFolder = Annotated[Path, typer.Argument(help="A checkpoint that moesaic refactor wrote.")]
KEYS = "MOESAIC_API_KEYS"
BatchInvariant = Annotated[
    bool, typer.Option("--batch-invariant", help="In bfloat16 too no bit of a request depends on its batch mates.")
]
ApiKeys = Annotated[
    list[str] | None, typer.Option(help=f"Who may ask; repeatable, or {KEYS} with commas. None = everybody.")
]
MostOutput = Annotated[
    int | None, typer.Option(help="Tokens of an answer whose request names no number. Default: the context.")
]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(serve)


def serve(
    model: ModelFolder,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    memory: Annotated[str | None, typer.Option(help="Memory of a replica, as 8GiB; see moesaic plan.")] = None,
    experts: options.Experts = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = "stored",
    context: Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")] = None,
    max_requests: options.MaxRequests = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait beyond those; more get 429.")] = 1024,
    max_tokens: options.MaxTokens = 512,
    batcher: Annotated[str, typer.Option(help="What runs together: adaptive, fcfs, decode-first, ...")] = "adaptive",
    policy: Annotated[str, typer.Option(help="Which experts leave: belady, lru, ...")] = "belady",
    lookahead: Annotated[int, typer.Option(help="Layers whose experts are fetched ahead; 0 = on demand.")] = 1,
    batch_invariant: BatchInvariant = False,
    max_wait: Annotated[float, typer.Option(help="Longest a ready token is passed over, in seconds.")] = 1.0,
    page_cache: Annotated[str, typer.Option(help="keep, or drop to force reads from the disk.")] = "keep",
    api_key: ApiKeys = None,
    per_minute: Annotated[int, typer.Option(help="Requests a key may make in a minute; 0 = any number.")] = 0,
    most_output: MostOutput = None,
    most_per_call: Annotated[int, typer.Option(help="Requests that one call may make: its prompts times n.")] = 16,
    drain: Annotated[float, typer.Option(help="Seconds running requests may take to finish at the end.")] = 30.0,
    threads: Annotated[int | None, typer.Option(help="Threads that compute; default: the cores.")] = None,
    device: options.Device = None,
    host_memory: options.HostMemory = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run replicas under Ray Serve, on this machine.")] = False,
    replicas: Annotated[str, typer.Option(help="With --ray: 2, or 1:4 to add and remove them by load.")] = "1",
) -> None:
    """Serve MODEL with experts in memory as far as they fit, on demand from the disk beyond.

    Example: moesaic serve ./moe --memory 8GiB --port 8000
    """
    from moesaic.serve.extra import needed

    needed("fastapi", "uvicorn", "prometheus_client")
    needed(*(["ray"] if ray else []), extra="ray")
    from moesaic.serve.api.app import ApiOptions, create_app
    from moesaic.serve.api.server import ServerOptions, bound, log_json, open_to_others, serve
    from moesaic.serve.options import EngineOptions

    named = api_key or [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    api = ApiOptions(tuple(named), per_minute, most_output=most_output, most_requests=most_per_call)
    engine_options = EngineOptions(
        memory=memory,
        experts=_share(experts),
        dtype=dtype,  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        max_requests=max_requests,
        max_waiting=max_waiting,
        context=context,
        batcher=batcher,
        policy=policy,
        lookahead=lookahead,
        batch_invariant=batch_invariant,
        max_wait_s=max_wait,
        page_cache=page_cache,  # type: ignore[arg-type]
        threads=threads,
        device=device,
        host_memory=host_memory,
    )
    listening = bound(host, port)
    if open_to_others(listening) and not named:
        typer.echo(f"warning: whoever reaches {host} may use this server: it asks for no --api-key", err=True)

    def run(build: Callable[[], Any]) -> None:
        def load() -> tuple[Any, Any]:
            engine = build()
            ready = create_app(engine, api)
            log_json()
            _say(engine.name, f"http://{host}:{listening.getsockname()[1]}")
            return engine, ready

        serve(load, listening, ServerOptions(host, port, drain))

    if ray:
        _replicated(model, engine_options, replicas, drain, run)
    else:
        _interruptible(lambda: run(lambda: _started(model, engine_options)))


def _say(name: str, where: str) -> None:
    typer.echo(f"{name} on {where}, dashboard at {where}/, OpenAI API at {where}/v1 (Ctrl-C ends)", err=True)


def _started(model: Path, options: Any) -> Any:
    """One engine, in this process."""
    from moesaic.serve.engine import Engine

    engine = Engine(model, options)
    engine.start()
    return engine


def _interruptible(run: Callable[[], None]) -> None:
    """End at once by Ctrl-C while the model loads: a thread that computes would abort an ordinary exit."""
    try:
        run()
    except KeyboardInterrupt:
        typer.secho("interrupted", fg="yellow", err=True)
        os._exit(130)


def _replicated(
    model: Path, options: Any, replicas: str, drain: float, run: Callable[[Callable[[], Any]], None]
) -> None:
    """Run a cluster of engines in place of one."""
    from moesaic.serve.cluster.cluster import Cluster
    from moesaic.serve.cluster.runtime import Replicas, room, running

    wanted = Replicas.parse(replicas)
    with running(room(wanted)):
        run(lambda: Cluster(model, options, wanted, drain_s=drain))


def _share(value: str | None) -> str | float | None:
    """0.5 is a share, 2GiB a size."""
    try:
        return value if value is None or float(value) > 1 else float(value)
    except ValueError:
        return value
