"""Ray and Ray Serve on this machine, for as long as a block runs: loopback, no dashboard, nothing reported anywhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from moesaic.errors import MoesaicError
from moesaic.serve.cluster.affinity import PERIOD_S
from moesaic.serve.cluster.replica import Replica
from moesaic.serve.cluster.router import ExpertRouter
from moesaic.serve.machine_memory import available_bytes
from moesaic.serve.memory_plan import SHARE, plan
from moesaic.serve.options import EngineOptions

OBJECTS = 80 * 2**20  # bytes of Ray's object store: events are small and never lie there
HEALTH_S = 1.0  # between health checks
SPARE = 16  # calls a replica takes beyond its requests: the engine refuses those, with a time to come back


@dataclass(frozen=True)
class Replicas:
    """How many engines there are. Raises MoesaicError for a range that is none.

    affinity: send requests to where their experts are; False = Serve's own choice, the shorter of two queues.
    """

    least: int = 1
    most: int = 1
    affinity: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise MoesaicError(f"{self.least} to {self.most} replicas: expected at least 1, and no more than the most")

    @classmethod
    def parse(cls, text: str) -> "Replicas":
        """2, or 1:4."""
        least, _, most = text.partition(":")
        try:
            return cls(int(least), int(most or least))
        except ValueError:
            raise MoesaicError(f"--replicas {text!r}: expected a number such as 2, or a range such as 1:4") from None


def room(replicas: Replicas) -> int:
    """Cores that Ray is told of: a place for every replica, and for one that follows another that still ends."""
    return max(os.cpu_count() or 1, replicas.most + 1)


@contextmanager
def running(cores: int) -> Iterator[None]:
    """Ray with room for `cores` replicas; at the end all its processes are gone."""
    ray.init(
        address="local",
        num_cpus=cores,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=OBJECTS,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(proxy_location="Disabled", logging_config=_quiet())
        yield
    finally:
        try:
            serve.shutdown()
        finally:
            ray.shutdown()


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def fitted(model: Path, options: EngineOptions, replicas: Replicas) -> EngineOptions:
    """Options of one replica: its share of the cores and, where no budget is given, of the memory.

    Raises MoesaicError, before anything is started, if the model does not fit.
    """
    threads = options.threads or max((os.cpu_count() or 1) // replicas.most, 1)
    memory = options.memory
    if memory is None and replicas.most > 1:
        memory = int(SHARE * available_bytes()) // replicas.most
    planned = plan(
        model,
        memory=memory,
        experts=options.experts,
        context=options.context,
        max_requests=options.max_requests,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        weights=options.weights,
    )
    return replace(options, threads=threads, memory=memory if options.memory is not None else planned.budget)


def deploy(name: str, model: Path, options: EngineOptions, replicas: Replicas, drain_s: float) -> Any:
    """Start the replicas; returns a handle once the least number of them is ready.

    Raises MoesaicError if they do not come up.
    """
    routing: dict[str, Any] = {"request_routing_stats_period_s": PERIOD_S}
    if replicas.affinity:
        routing |= {"request_router_class": ExpertRouter, "request_router_kwargs": {"slots": options.max_requests}}
    deployment: Any = serve.deployment(
        Replica,
        name="replica",
        autoscaling_config={
            "min_replicas": replicas.least,
            "initial_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": options.max_requests,
        },
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=options.max_requests + options.max_waiting + SPARE,
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=drain_s,
        logging_config=_quiet(),
    )
    try:
        return serve.run(deployment.bind(str(model), options), name=name, route_prefix=None)
    except RuntimeError as error:
        reason = serve.status().applications[name].deployments
        detail = "; ".join(status.message.strip().splitlines()[-1] for status in reason.values() if status.message)
        raise MoesaicError(f"the replicas did not start: {detail or error}") from None


def alive(name: str) -> int:
    """How many replicas run."""
    application = serve.status().applications.get(name)
    if application is None:
        return 0
    states = [state for deployment in application.deployments.values() for state in deployment.replica_states.items()]
    return sum(count for state, count in states if state.value == "RUNNING")
