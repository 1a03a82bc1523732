"""One link with one stream: transfers follow one another, what a layer waits for first."""

from collections.abc import Iterable

from moesaic.schedule.cache import Transfer
from moesaic.schedule.cost import move_time
from moesaic.schedule.residency import Residency
from moesaic.schedule.topology import Link
from moesaic.schedule.work import Key


class Channel:
    """Carries a residency's transfers. A transfer that has begun is finished: prefetch can delay a demand.

    Call `advance(now)` before anything is asked for at `now`, and `kick(now)` after it.
    """

    def __init__(self, residency: Residency, link: Link) -> None:
        self.residency, self.link = residency, link
        self.busy_s = 0.0
        self._transfer: Transfer | None = None
        self._end = 0.0

    def advance(self, now: float) -> None:
        """Finish what is done by `now`, each transfer followed at once by the next."""
        while self._transfer is not None and self._end <= now:
            self._finish()

    def kick(self, now: float) -> None:
        """Begin with what was asked for, if nothing is under way."""
        if self._transfer is None:
            self._begin(now)

    def wait(self, keys: Iterable[Key], now: float) -> float:
        """When all `keys` are there, at the earliest `now`."""
        for key in keys:
            while not self.residency.ready(key):
                assert self._transfer is not None, "a key was waited for that nobody asked for"
                now = max(now, self._end)
                self._finish()
        return now

    def _begin(self, at: float) -> None:
        self._transfer = self.residency.start()
        if self._transfer is not None:
            seconds = move_time(self.link, self._transfer.bytes)
            self.busy_s += seconds
            self._end = at + seconds

    def _finish(self) -> None:
        assert self._transfer is not None
        self.residency.arrived(self._transfer)
        self._begin(self._end)
