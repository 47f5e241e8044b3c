"""A stage peer: what comes in from others, checked before it is kept.

    forward    read activations ─► compute, hand over, and only then let the holder go
    loss       (at the origin) read activations ─► head and loss ─► hand the gradient to the last peer of the path
    backward   read gradient ─► compute, ask the holder whether it still counts, hand over
    again      the same, for a microbatch whose forward pass ran on a replica that is gone

Whether a task fits is known by node/pipeline/ledger.py; the size of what comes with it follows from the manifest; and whether the
values can be real is looked at when they are decoded. What happens then is in node/pipeline/visits.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

from torch import Tensor

from node.compute import Compute
from node.pipeline.activations import ActivationCodec
from node.pipeline.handover import Handover, Router, StageTerms
from node.pipeline.ledger import Held, Ledger, key_of
from node.pipeline.links import Links
from node.pipeline.messages import INPUT_PROTOCOL, NOTICE_PROTOCOL, TASK_PROTOCOL, InputRequest, Notice, Reply, Task
from node.pipeline.origin import Origin
from node.pipeline.passes import Passes
from node.pipeline.turnstile import Turnstile
from node.pipeline.visits import Visits
from node.pipeline.worker import StageWorker, VisitGoneError
from protocol.errors import ProtocolError, TransportError
from protocol.ids import PeerId
from protocol.transport import Stream, Transport
from protocol.violations import Violations
from protocol.wire import bulk_buffer, read_bulk_into, read_message, write_bulk, write_message

__all__ = ["StageServer"]

HEADER_TIMEOUT_S = 10.0
"""Time for a stranger's message."""
PROMPT_S = 0.005
"""A task that waited here longer says nothing about its link: what came with it had the time to arrive."""


class StageServer:
    """One peer's part in the pipeline.

    Args:
        terms: what was agreed on.
        worker: our stage.
        codec: of activations and gradients.
        router: who holds what.
        violations: counts broken rules per peer.
        links: measures what comes in.
        on_failure: told of every task that a peer did not take from us, and why.
    """

    def __init__(
        self,
        terms: StageTerms,
        *,
        transport: Transport,
        compute: Compute,
        worker: StageWorker,
        codec: ActivationCodec,
        router: Router,
        violations: Violations,
        links: Links | None = None,
        on_failure: Callable[[Task, str], None] = lambda task, reason: None,
    ) -> None:
        self._terms, self._router, self._violations, self._links = terms, router, violations, links
        self._handover = Handover(terms, transport, router, on_failure)
        turnstile = Turnstile(terms.slots)
        self._ledger = Ledger(terms, router, turnstile, worker.forget)
        self._passes = Passes(compute=compute, worker=worker, codec=codec)
        self._visits = Visits(ledger=self._ledger, turnstile=turnstile, passes=self._passes, handover=self._handover)
        self.origin = Origin(terms, ledger=self._ledger, visits=self._visits, handover=self._handover)
        """Sends our own microbatches, at stage 0."""
        self._transport = transport
        self._handlers = {
            TASK_PROTOCOL: self.serve_task,
            INPUT_PROTOCOL: self.serve_input,
            NOTICE_PROTOCOL: self.serve_notice,
        }
        for protocol, handler in self._handlers.items():
            transport.handle(protocol, handler)

    @property
    def iteration(self) -> int:
        """The present one."""
        return self._ledger.iteration

    @property
    def pace(self) -> Mapping[int, float]:
        """Seconds of a forward pass, loss and backward pass, as measured lately."""
        return self._passes.pace

    # ---- iterations

    async def wait_for_end(self, origins: Callable[[], Iterable[PeerId]]) -> bool:
        """Until all of these have said that the iteration ended (True), or most of them are further on (False); the caller sets
        the deadline. They are asked for again after every look."""
        return await self._ledger.wait_for_end(origins)

    def note_end(self, peer: PeerId, iteration: int) -> None:
        """The directory says that an origin has ended that iteration."""
        self._ledger.note_end(peer, iteration, by_record=True)

    def look_again(self) -> None:
        """The router has been brought up to date."""
        self._ledger.look_again()

    def has_ended(self, peer: PeerId) -> bool:
        """Whether that origin has said that the iteration ended."""
        return self._ledger.has_ended(peer)

    def has_told_us(self, peer: PeerId) -> bool:
        """Whether it has said so to us, and not only in its record, which comes late."""
        return self._ledger.has_told_us(peer)

    def begin_at(self, iteration: int) -> None:
        """Enter a swarm that is in this iteration; before anything is served."""
        self._ledger.begin_at(iteration)

    def close_iteration(self) -> None:
        """Forget what is still here and refuse more of it, so that the inner step can be taken."""
        self._ledger.close()

    def next_iteration(self) -> None:
        """Serve the next iteration. The caller has closed this one and taken the inner step."""
        self._ledger.next_iteration()

    async def close(self) -> None:
        """Serve nobody any more."""
        for protocol in self._handlers:
            self._transport.unhandle(protocol)
        self._ledger.leave()
        await self.origin.close()

    # ---- handlers

    async def serve_task(self, stream: Stream) -> None:
        """Handler of one task; see protocol.transport.Handler."""
        serve = {"forward": self._forward, "loss": self._loss, "backward": self._backward, "again": self._again}
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                task = await read_message(stream, Task)
            heard_s = asyncio.get_running_loop().time()
            refusal = await self._ledger.refusal(task, stream.peer)
            if refusal is None:  # of our run, so its microbatches have the shape of ours
                if task.payload_bytes != self._terms.payload_bytes:
                    raise ProtocolError("activations of a wrong shape", peer=stream.peer)
                self._handover.heard_from(stream.peer)
                await serve[task.kind](stream, task, heard_s)
                return
            if refusal == "not-for-me":
                self._violations.blame(stream.peer)
            await write_message(stream, Reply(ok=False, reason=refusal))
        except VisitGoneError:  # the iteration ended while we were at it
            await write_message(stream, Reply(ok=False, reason="stale"))
        except ProtocolError:
            self._violations.blame(stream.peer)
            raise
        except TimeoutError:
            raise TransportError("a task was begun and not finished") from None

    async def serve_input(self, stream: Stream) -> None:
        """Handler of an InputRequest."""
        async with _header_timeout():
            request = await read_message(stream, InputRequest)
        sent = self._ledger.sent((request.origin, request.microbatch), request.iteration)
        if sent is None or request.run != self._terms.run:
            await write_message(stream, Reply(ok=False, reason="unknown"))
            return
        await write_message(stream, Reply(ok=True))
        await write_bulk(stream, sent)

    async def serve_notice(self, stream: Stream) -> None:
        """Handler of a Notice."""
        async with _header_timeout():
            notice = await read_message(stream, Notice)
        if notice.run != self._terms.run:
            return
        if notice.kind == "end":
            if self._router.stage_of(stream.peer) == 0:
                self._ledger.note_end(stream.peer, notice.iteration)
            return
        if notice.iteration != self.iteration:
            return
        held = self._ledger.find((self._terms.peer, notice.microbatch))
        if held is not None and (notice.kind == "lost") == (held.phase == "out"):
            held.lose(f"…{stream.peer[-8:]} could not pass it on")

    # ---- the tasks

    async def _forward(self, stream: Stream, task: Task, heard_s: float) -> None:
        held = Held(path=task.path)
        self._ledger.take(key_of(task), held)
        has_moved = False
        try:
            inputs = await self._receive(stream, heard_s)
            taken = asyncio.get_running_loop().create_future()
            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(self._visits.outward(task, inputs, taken))
                is_taken = await self._until_taken(stream, taken, held)
                with contextlib.suppress(TransportError):  # the holder may be gone; the microbatch goes on
                    await write_message(stream, Reply(ok=is_taken, reason="" if is_taken else "failed"))
                has_moved = await moving
        finally:
            if not has_moved and self._ledger.get(task) is not None:
                self._ledger.forget(key_of(task))

    async def _until_taken(self, stream: Stream, taken: asyncio.Future[bool], held: Held) -> bool:
        """Whether it is. The holder hears meanwhile that we have computed and are at it, or it would give us up for somebody else's
        silence."""
        while not taken.done():
            await asyncio.wait((taken,), timeout=self._terms.hop_timeout_s / 2)
            if not taken.done() and held.sent is not None:
                with contextlib.suppress(TransportError):
                    await write_message(stream, Reply(ok=True, reason="trying"))
        return taken.result()

    async def _loss(self, stream: Stream, task: Task, heard_s: float) -> None:
        hidden = await self._receive(stream, heard_s)
        held = self._ledger.get(task)
        if held is None or held.phase != "out":  # another peer was faster
            await write_message(stream, Reply(ok=False, reason="unknown"))
            return
        held.phase, held.path = "turned", task.path
        await write_message(stream, Reply(ok=True))
        await self._visits.turn(task, held, hidden)

    async def _backward(self, stream: Stream, task: Task, heard_s: float) -> None:
        held = self._ledger.get(task)
        assert held is not None, "the ledger has looked"
        held.phase = "back"
        try:
            gradient = await self._receive(stream, heard_s)
        except BaseException:
            if held.finished is None and self._ledger.get(task) is held:
                self._ledger.forget(key_of(task))
            held.lose("its gradient was broken")
            raise
        await self._visits.homeward(task, gradient, holder=stream)

    async def _again(self, stream: Stream, task: Task, heard_s: float) -> None:
        held = Held(path=task.path, phase="back")
        self._ledger.take(key_of(task), held)
        try:
            gradient = await self._receive(stream, heard_s)
            inputs = await self._passes.decode(await self._handover.input_of(task))
        except BaseException:
            self._ledger.forget(key_of(task))
            raise
        if self._ledger.get(task) is held:
            self._passes.admit(key_of(task), inputs)
            await self._visits.homeward(task, gradient, holder=stream)

    async def _receive(self, stream: Stream, heard_s: float) -> Tensor:
        """Say yes to a task and read what comes with it.

        Args:
            heard_s: when we read the task. What follows it is on its way by then, and says how fast the link is unless it was let
                wait here.
        """
        loop = asyncio.get_running_loop()
        has_waited = loop.time() - heard_s > PROMPT_S
        await write_message(stream, Reply(ok=True))
        payload = bulk_buffer(self._terms.payload_bytes)
        await read_bulk_into(stream, payload)
        if self._links is not None and not has_waited:
            self._links.note_transfer(stream.peer, self._terms.payload_bytes, loop.time() - heard_s)
        try:
            return await self._passes.decode(payload)
        except ProtocolError:
            with contextlib.suppress(TransportError):
                await write_message(stream, Reply(ok=False, reason="bad-payload"))
            raise


@contextlib.asynccontextmanager
async def _header_timeout() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(HEADER_TIMEOUT_S):
            yield
    except TimeoutError:
        raise TransportError("a stream was opened and nothing said") from None
