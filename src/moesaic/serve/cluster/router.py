"""Ray Serve's choice of a replica, by `affinity`. It runs where the handle is: in the process that has the API."""

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from moesaic.serve.cluster.affinity import Affinity, Holdings

REPORT = "holdings"  # the key of a replica's routing stats
WANTED = "wanted"  # the argument of a call that says which experts it needs


class ExpertRouter(RequestRouter):
    """Every request to the replica that `Affinity` ranks first, to the next one if that is full."""

    def initialize_state(self, **kwargs: Any) -> None:
        """`slots`: requests that run at a time in a replica."""
        self.affinity = Affinity(kwargs["slots"])
        self.open: dict[str, ReplicaID] = {}  # request -> replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # after all of them: without it, it asks again at once
        wanted = pending_request.kwargs.get(WANTED, {})
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        reports = {name: Holdings(**replica.routing_stats.get(REPORT, {})) for name, replica in names.items()}
        opened = dict.fromkeys(names, 0)
        for replica_id in list(self.open.values()):
            if replica_id.unique_id in opened:
                opened[replica_id.unique_id] += 1
        now = time.monotonic()
        ranked = self.affinity.ranked(wanted, reports, opened, now)
        if ranked:
            self.affinity.sent(ranked[0], wanted, now)  # at once: the next request must not wait for this one's answer
        return [[names[name]] for name in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The replica has taken the request."""
        self.open[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, or its replica has."""
        self.open.pop(internal_request_id, None)
