"""Which microbatches are here, in which iteration, and whether a task that comes in fits.

A visit belongs to one iteration, and so to one version of the weights. Tasks of an earlier iteration are refused, those of the next
one wait until it begins here. An iteration ends when every origin has said so, or when its deadline makes the node go on; what has
not come back by then is forgotten and counts nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median_low
from typing import Literal

from node.pipeline.handover import Router, StageTerms
from node.pipeline.messages import Refusal, Task
from node.pipeline.rules import is_order
from node.pipeline.turnstile import Turnstile
from node.pipeline.worker import MicrobatchKey
from protocol.errors import LlmNodeError
from protocol.ids import PeerId

__all__ = ["MAX_LEAD", "Held", "Ledger", "MicrobatchLostError", "key_of"]

MAX_LEAD = 1024
"""Iterations by which others may be ahead; who is further behind has to join anew."""


class MicrobatchLostError(LlmNodeError):
    """A microbatch did not come back to its origin."""


@dataclass(slots=True, kw_only=True)
class Held:
    """A microbatch that is here, or was and will come back.

    Args:
        path: the way it has gone and will go, as far as we know.
        has_slot: whether it holds one.
        sent: what we passed on, for a replica that must run the next stage again.
        phase: out until its gradient is on its way here; turned at the origin from the loss on; back once its backward pass has
            begun.
        loss: at the origin, once it is known.
        finished: at the origin: the loss, once everything is counted.
    """

    path: list[str]
    has_slot: bool = False
    sent: memoryview | None = None
    phase: Literal["out", "turned", "back"] = "out"
    loss: float | None = None
    finished: asyncio.Future[float] | None = None

    def lose(self, reason: str) -> None:
        """At the origin: it will not come back."""
        if self.finished is not None and not self.finished.done():
            self.finished.set_exception(MicrobatchLostError(reason))
            self.finished.exception()  # nobody may be waiting any more


class Ledger:
    """What one stage peer holds.

    Args:
        terms: what was agreed on.
        router: who holds what.
        turnstile: gets slots back.
        on_forget: called with every microbatch that leaves.
    """

    def __init__(
        self, terms: StageTerms, router: Router, turnstile: Turnstile, on_forget: Callable[[MicrobatchKey], None]
    ) -> None:
        self.iteration = 0
        self._terms, self._router, self._turnstile, self._on_forget = terms, router, turnstile, on_forget
        self._held: dict[MicrobatchKey, Held] = {}
        self._ended: dict[PeerId, int] = {}
        self._told_us: dict[PeerId, int] = {}
        self._changed = asyncio.Event()
        self._is_open, self._has_left = True, False

    # ---- microbatches

    def take(self, key: MicrobatchKey, held: Held) -> None:
        """Keep a microbatch that was not here."""
        assert key not in self._held
        self._held[key] = held

    def get(self, task: Task) -> Held | None:
        """The microbatch of a task, if it is here and of the present iteration."""
        return self._held.get(key_of(task)) if self._is_open and task.iteration == self.iteration else None

    def find(self, key: MicrobatchKey) -> Held | None:
        """A microbatch of the present iteration."""
        return self._held.get(key)

    def sent(self, key: MicrobatchKey, iteration: int) -> memoryview | None:
        """What was passed on for a microbatch."""
        held = self._held.get(key)
        return None if held is None or iteration != self.iteration else held.sent

    def forget(self, key: MicrobatchKey) -> None:
        """Let a microbatch go; harmless for one that is not here."""
        held = self._held.pop(key, None)
        if held is not None:
            self.free_slot(held)
            self._on_forget(key)
            self._change()

    def free_slot(self, held: Held) -> None:
        """Give its slot back, if it has one."""
        if held.has_slot:
            held.has_slot = False
            self._turnstile.give_back()

    # ---- iterations

    def note_end(self, peer: PeerId, iteration: int, *, by_record: bool = False) -> None:
        """A peer of stage 0 has no microbatch of that iteration under way any more, as it has told us or as its record says. What
        lies absurdly far ahead is a lie."""
        if iteration > self.iteration + MAX_LEAD:
            return
        self._ended[peer] = max(iteration, self._ended.get(peer, -1))
        if not by_record:
            self._told_us[peer] = max(iteration, self._told_us.get(peer, -1))
        self._change()

    def look_again(self) -> None:
        """Who holds what may have changed."""
        self._change()

    def has_ended(self, peer: PeerId) -> bool:
        """Whether it has said so of the present iteration, or of a later one."""
        return self._ended.get(peer, -1) >= self.iteration

    def has_told_us(self, peer: PeerId) -> bool:
        """Like `has_ended`, but what its record says does not count."""
        return self._told_us.get(peer, -1) >= self.iteration

    async def wait_for_end(self, origins: Callable[[], Iterable[PeerId]]) -> bool:
        """Until all of these have said that the iteration ended (True), or most of them are further on (False). They are asked for
        again after every look: who is gone from the swarm is not waited for any more, and who is new not yet."""
        wanted = set(origins())
        while not all(self.has_ended(peer) for peer in wanted.intersection(origins())):
            if self._swarm_iteration() > self.iteration + 1:
                return False
            await self._changed.wait()
        return True

    def close(self) -> None:
        """The iteration is over: forget everything, and take nothing more for it while the inner step is taken."""
        self._is_open = False
        for key, held in list(self._held.items()):
            held.lose("the iteration is over")
            self.forget(key)

    def leave(self) -> None:
        """Take nothing more in, and let nobody wait for it."""
        self._has_left = True
        self.close()
        self._change()

    def next_iteration(self) -> None:
        """Begin the next iteration, or the one that the swarm is in if that is further on."""
        self.close()
        self.iteration = max(self.iteration + 1, self._swarm_iteration())
        self._is_open = True
        self._change()

    def begin_at(self, iteration: int) -> None:
        """Enter a swarm that is in this iteration."""
        assert not self._held
        self.iteration = iteration
        self._change()

    def _swarm_iteration(self) -> int:
        """The one that most origins have reached, as the median with ourselves: a single one can say anything."""
        origins = [ended + 1 for peer, ended in self._ended.items() if self._router.stage_of(peer) == 0]
        return median_low([self.iteration, *origins]) if len(origins) > 1 else max([self.iteration, *origins])

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- what comes in

    async def refusal(self, task: Task, sender: PeerId) -> Refusal | None:
        """Why a task does not fit, or None.

        One of the next iteration waits here until that begins, and one that finds no room until there is some: its holder keeps
        the microbatch meanwhile, and a stage that is only busy is not skipped.
        """
        if task.run != self._terms.run:
            return "wrong-run"
        if task.kind == "forward" and sender == task.path[0] and self._router.stage_of(sender) == 0:
            self.note_end(sender, task.iteration - 1)  # in case its notice was lost
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._terms.hop_timeout_s):
                while not self._has_left and (task.iteration == self.iteration + 1 or self._waits_for_room(task)):
                    await self._changed.wait()
        if task.iteration > self.iteration and not self._has_left:
            return "early"
        if task.iteration < self.iteration or not self._is_open:
            return "stale"
        if not self._leads_here(task, sender):
            return "not-for-me"
        held = self._held.get(key_of(task))
        if task.kind in ("forward", "again"):
            is_full = not self._has_room or self._num_of(task.path[0]) >= self._terms.per_origin
            return "full" if held is not None or is_full else None
        due = "turned" if task.kind == "backward" and task.position == 0 else "out"
        if held is None or held.phase != due or held.sent is None:
            return "unknown"
        is_ours = task.kind == "loss" or task.path[: task.position + 1] == held.path[: task.position + 1]
        return None if is_ours else "not-for-me"

    @property
    def _has_room(self) -> bool:
        return len(self._held) < self._terms.slots + self._terms.waiting

    def _num_of(self, origin: str) -> int:
        """Microbatches of one origin that are here."""
        return sum(started == origin for started, _ in self._held)

    def _waits_for_room(self, task: Task) -> bool:
        """Whether a task is due now and would fit, were there room. An origin that has its share here is not waited for."""
        is_due = self._is_open and task.iteration == self.iteration and task.kind in ("forward", "again")
        return is_due and not self._has_room and self._num_of(task.path[0]) < self._terms.per_origin

    def _leads_here(self, task: Task, sender: PeerId) -> bool:
        """Whether the path keeps the rules, passes through us at this position, and comes from the sender."""
        path, position = task.path, task.position
        if position >= len(path) or path[position] != self._terms.peer or len(set(path)) != len(path):
            return False
        stages = [self._router.stage_of(PeerId(peer)) for peer in path]
        if None in stages or not is_order([stage for stage in stages if stage is not None]):
            return False
        following = path[position + 1] if position + 1 < len(path) else path[0]
        match task.kind:
            case "forward":
                return position > 0 and path[position - 1] == sender
            case "loss":
                return position == 0 and path[-1] == sender
            case "again":
                return position > 0 and following == sender
            case "backward":
                return following == sender


def key_of(task: Task) -> MicrobatchKey:
    """What tells a microbatch from all others of its iteration."""
    return (task.path[0], task.microbatch)
