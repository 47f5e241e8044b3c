"""A microbatch's visits to this peer: its passes at their turn, and handing over what came out.

    outward    wait for processor and slot ─► forward pass ─► hand over, and only then let the holder go
    head       wait for the processor ─► head and loss, at the origin
    homeward   wait for the processor ─► backward pass ─► ask the holder whether it still counts ─► count ─► hand over

An iteration may end while a pass waits for its turn or runs; what was given up meanwhile is neither passed on nor counted.
"""

from __future__ import annotations

import asyncio
import contextlib

from torch import Tensor

from node.pipeline.handover import Handover, Whereabouts
from node.pipeline.ledger import Held, Ledger, key_of
from node.pipeline.messages import Reply, Task
from node.pipeline.passes import Passes
from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.turnstile import Turnstile
from node.pipeline.worker import VisitGoneError
from protocol.errors import LlmNodeError, TransportError
from protocol.transport import Stream
from protocol.wire import read_message, write_message

__all__ = ["Visits", "returning"]

ANSWER_TIMEOUT_S = 10.0
"""For the holder to say whether a computed gradient counts."""


class Visits:
    """Those to one peer.

    Args:
        ledger: what is here.
        turnstile: whose turn it is.
    """

    def __init__(self, *, ledger: Ledger, turnstile: Turnstile, passes: Passes, handover: Handover) -> None:
        self._ledger, self._turnstile, self._passes, self._handover = ledger, turnstile, passes, handover

    async def outward(self, task: Task, inputs: Tensor, taken: asyncio.Future[bool]) -> bool:
        """Compute a forward pass and pass it on; whether that succeeded.

        Args:
            inputs: what came in.
            taken: is set to whether somebody has taken the microbatch, as soon as that is known.
        """
        async with self._turnstile.turn(FORWARD, task.priority):
            held = self._ledger.get(task)
            if held is None:
                self._turnstile.give_back()
                taken.set_result(False)
                return False
            held.has_slot = True
            held.sent = await self._passes.forward(key_of(task), inputs)
        if self._ledger.get(task) is not held:  # the iteration ended meanwhile
            self._passes.forget(key_of(task))
            taken.set_result(False)
            return False
        if len(task.path) == 1:
            taken.set_result(True)
            with contextlib.suppress(VisitGoneError):  # then it is lost, and known to be
                await self._turn_alone(task, held.sent)
            return True
        return await self._handover.forward(task, held.sent, taken, lambda: self._where_is(task, held))

    def _where_is(self, task: Task, held: Held) -> Whereabouts:
        if held.phase != "out":
            return "elsewhere"
        return "here" if self._ledger.get(task) is held else "given up"

    async def turn(self, task: Task, held: Held, hidden: Tensor) -> None:
        """Head and loss of one of our own microbatches, and send its gradient back the way it came."""
        gradient = await self._head(task, held, hidden)
        if gradient is None:
            return
        counts = asyncio.get_running_loop().create_future()
        counts.set_result(True)
        if not await self._handover.backward(returning(task, len(task.path) - 1), gradient, counts):
            held.lose("nobody could take its gradient")

    async def _turn_alone(self, task: Task, sent: memoryview) -> None:
        """Loss and backward pass of a microbatch that visits nobody else."""
        held = self._ledger.get(task)
        gradient = None if held is None else await self._head(task, held, await self._passes.decode(sent))
        if gradient is not None:
            await self.homeward(task, await self._passes.decode(gradient), holder=None)

    async def _head(self, task: Task, held: Held, hidden: Tensor) -> memoryview | None:
        async with self._turnstile.turn(LOSS, task.priority):
            if self._ledger.get(task) is not held:
                return None
            held.loss, gradient = await self._passes.loss(key_of(task), hidden)
            return gradient

    async def homeward(self, task: Task, gradient: Tensor, *, holder: Stream | None) -> None:
        """Compute a backward pass, count it if the holder says so, and pass the gradient on.

        Args:
            holder: where the gradient came from; None for one of our own microbatches that visits nobody else.
        """
        held = self._ledger.get(task)
        try:
            async with self._turnstile.turn(BACKWARD, task.priority):
                if held is None or self._ledger.get(task) is not held:
                    return
                self._ledger.free_slot(held)
                onward = await self._passes.backward(key_of(task), gradient)
            await self._count(task, held, onward, holder)
        finally:
            if held is not None and held.finished is None and self._ledger.get(task) is held:
                self._ledger.forget(key_of(task))

    async def _count(self, task: Task, held: Held, onward: memoryview | None, holder: Stream | None) -> None:
        """Ask the holder whether a backward pass still counts; meanwhile its gradient is on its way already, since the next peer's
        does not count before ours does. The origin's microbatch has then come back."""
        if holder is not None and not await _tell_computed(holder):
            return
        counts = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as tasks:
            if onward is not None:
                back = returning(task, task.position - 1)
                passing = tasks.create_task(self._handover.backward(back, onward, counts))
            is_ours = await _still_counts(holder) and await self._commit(task)
            counts.set_result(is_ours)
            if not is_ours:
                if onward is not None:
                    passing.cancel()
                return
            if held.finished is None:
                self._ledger.forget(key_of(task))
            elif not held.finished.done():
                assert held.loss is not None
                held.finished.set_result(held.loss)

    async def _commit(self, task: Task) -> bool:
        """Count a backward pass; False if its visit was given up meanwhile, as when the iteration has ended."""
        try:
            await self._passes.commit(key_of(task))
        except VisitGoneError:  # nobody else answers for it any more
            await self._handover.lose(task)
            return False
        return True


def returning(task: Task, position: int) -> Task:
    """The task of the next backward pass."""
    return task.model_copy(update={"kind": "backward", "position": position})


async def _tell_computed(holder: Stream) -> bool:
    """Whether the holder may still hear that we have; a stream that it has closed says that it has given us up."""
    with contextlib.suppress(TransportError):
        await write_message(holder, Reply(ok=True))
        return True
    return False


async def _still_counts(holder: Stream | None) -> bool:
    """The holder's answer; nobody else may have been asked meanwhile, or the microbatch would count twice."""
    if holder is None:
        return True
    with contextlib.suppress(LlmNodeError, TimeoutError):
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reply = await read_message(holder, Reply)
        await holder.close()  # the holder waits for that
        return reply.ok
    return False
