"""Whether the swarm can be reached, as far as the owner needs to know.

The network fails for seconds all the time, and nothing comes of it: training goes on and the directory's view lives on. So the
owner hears of it only when it has lasted, once, and once more when it is over. A peer that never met another one is not cut off.
"""

from __future__ import annotations

from node.events import EventLog

__all__ = ["PATIENCE_S", "Contact"]

PATIENCE_S = 20.0
"""Trouble shorter than this is not worth a word."""


class Contact:
    """Turns single heartbeats into `swarm_unreachable` and `swarm_reachable`."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._has_met = False
        self._trouble_since_s: float | None = None
        self._told = False

    def note(self, problem: str | None, *, num_peers: int, now_s: float) -> None:
        """One heartbeat.

        Args:
            problem: what the network refused, None if nothing.
            num_peers: other live nodes in the directory's view.
            now_s: loop time.
        """
        self._has_met |= num_peers > 0
        if problem is None and self._has_met and not num_peers:
            problem = "no other node answers any more"
        if problem is None:
            if self._told:
                self._events.emit("swarm_reachable")
            self._trouble_since_s, self._told = None, False
            return
        if self._trouble_since_s is None:
            self._trouble_since_s = now_s
        lasted_s = now_s - self._trouble_since_s
        if lasted_s >= PATIENCE_S and not self._told:
            self._events.emit("swarm_unreachable", seconds=round(lasted_s), reason=problem)
            self._told = True
