"""Whether the swarm can be reached, as far as the owner needs to know.

The network fails for seconds all the time, and nothing comes of it: training goes on and the directory's view lives on. So the
owner hears of it only when it has lasted, once, and once more when it is over. A peer that never met another one is not alone,
it is the first.
"""

from __future__ import annotations

from node.events import EventLog

__all__ = ["PATIENCE_S", "Contact"]

PATIENCE_S = 20.0
"""Trouble shorter than this is not worth a word."""


class Contact:
    """Turns single heartbeats into events: `swarm_unreachable` and `swarm_reachable` when the network fails, `alone` and
    `company` when it works but nobody else is there any more."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._has_met = False
        self._network, self._peers = _Lasting(), _Lasting()

    def note(self, problem: str | None, *, num_peers: int, now_s: float) -> None:
        """One heartbeat.

        Args:
            problem: what the network refused, None if nothing.
            num_peers: other live nodes in the directory's view.
            now_s: loop time.
        """
        self._has_met |= num_peers > 0
        if self._network.changed(problem is not None, now_s):
            if problem is None:
                self._events.emit("swarm_reachable")
            else:
                self._events.emit("swarm_unreachable", seconds=round(self._network.lasted_s), reason=problem)
        is_alone = problem is None and self._has_met and not num_peers
        if self._peers.changed(is_alone, now_s):
            self._events.emit("alone" if is_alone else "company")


class _Lasting:
    """A condition that counts once it has held for PATIENCE_S."""

    def __init__(self) -> None:
        self.lasted_s = 0.0
        self._since_s: float | None = None
        self._counts = False

    def changed(self, holds: bool, now_s: float) -> bool:
        """Whether it began or ceased to count just now."""
        if holds and self._since_s is None:
            self._since_s = now_s
        elif not holds:
            self._since_s = None
        self.lasted_s = 0.0 if self._since_s is None else now_s - self._since_s
        before, self._counts = self._counts, holds and self.lasted_s >= PATIENCE_S
        return before != self._counts
