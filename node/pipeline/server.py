"""A stage peer: takes microbatches in, computes them in the order of the turnstile, and passes them on.

    forward    read activations ─► wait for processor and slot ─► compute ─► hand over, and only then let the holder go
    loss       (at the origin) read activations ─► head and loss ─► hand the gradient to the last peer of the path
    backward   read gradient ─► compute ─► ask the holder whether it still counts ─► count ─► hand over
    again      the same, for a microbatch whose forward pass ran on a replica that is gone

Everything from outside is checked before it is kept: whether the task fits (node/pipeline/ledger.py), its size, which follows from
the manifest, and whether the values can be real.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import ParamSpec, TypeVar

from torch import Tensor

from node.compute import Compute
from node.pipeline.activations import ActivationCodec
from node.pipeline.handover import Handover, Router, StageTerms, Whereabouts
from node.pipeline.ledger import Held, Ledger, MicrobatchLostError, key_of
from node.pipeline.links import Links
from node.pipeline.messages import INPUT_PROTOCOL, NOTICE_PROTOCOL, TASK_PROTOCOL, InputRequest, Notice, Reply, Task
from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.turnstile import Turnstile
from node.pipeline.worker import MicrobatchKey, StageWorker, VisitGoneError
from protocol.errors import LlmNodeError, ProtocolError, TransportError
from protocol.ids import PeerId
from protocol.transport import Stream, Transport
from protocol.wire import bulk_buffer, read_bulk_into, read_message, write_bulk, write_message

__all__ = ["StageServer"]

P = ParamSpec("P")
T = TypeVar("T")

RECENT = 0.2
"""Weight of the latest measurement of our speed."""
HEADER_TIMEOUT_S = 10.0
"""Time for a stranger's message, and for the holder to say whether a computed gradient counts."""
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
        violations: Counter[PeerId],
        links: Links | None = None,
        on_failure: Callable[[Task, str], None] = lambda task, reason: None,
    ) -> None:
        self._terms, self._compute, self._worker, self._codec = terms, compute, worker, codec
        self._violations, self._router, self._links = violations, router, links
        self.pace: dict[int, float] = {}
        """Seconds of a forward pass, loss and backward pass, as measured lately."""
        self._handover = Handover(terms, transport, router, on_failure)
        self._turnstile = Turnstile(terms.slots)
        self._ledger = Ledger(terms, router, self._turnstile, worker.forget)
        self._announcing: set[asyncio.Task[None]] = set()
        transport.handle(TASK_PROTOCOL, self.serve_task)
        transport.handle(INPUT_PROTOCOL, self.serve_input)
        transport.handle(NOTICE_PROTOCOL, self.serve_notice)

    @property
    def iteration(self) -> int:
        """The present one."""
        return self._ledger.iteration

    # ---- our own microbatches, at stage 0

    async def train(self, tokens: Tensor, *, path: list[PeerId], priority: int = 0) -> float:
        """Send one microbatch through the pipeline and back.

        Args:
            tokens: int64 [B, T + 1].
            path: the peers to visit; the first is ourselves.
            priority: lower goes first, everywhere.

        Returns:
            Its loss, once its gradients are counted here and wherever it went.

        Raises:
            MicrobatchLostError: it did not come back. What its gradient added before it was lost stays counted there.
        """
        task = Task(
            run=self._terms.run,
            iteration=self.iteration,
            microbatch=secrets.randbits(62),
            kind="forward",
            path=list(path),
            position=0,
            priority=priority,
        )
        finished: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._ledger.take(key_of(task), Held(path=task.path, finished=finished))
        try:
            async with asyncio.TaskGroup() as tasks:
                visit = tasks.create_task(self._visit(task, tokens, asyncio.get_running_loop().create_future()))
                await asyncio.wait((visit, finished), return_when=asyncio.FIRST_COMPLETED)
                if finished.done():
                    visit.cancel()  # it need not be passed on any more
            if not finished.done() and not visit.result():
                raise MicrobatchLostError("nobody could take it")
            return await finished
        finally:
            if self._ledger.iteration == task.iteration:
                self._ledger.forget(key_of(task))

    def announce_end(self, peers: Iterable[PeerId]) -> asyncio.Task[None]:
        """Tell everybody that none of our microbatches of this iteration is under way; returns the task that does it."""
        notice = Notice(run=self._terms.run, iteration=self.iteration, kind="end")
        self._ledger.note_end(self._terms.peer, self.iteration)
        announcing = asyncio.get_running_loop().create_task(self._announce(list(peers), notice))
        self._announcing.add(announcing)
        announcing.add_done_callback(self._announcing.discard)
        return announcing

    async def _announce(self, peers: list[PeerId], notice: Notice) -> None:
        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                if peer != self._terms.peer:
                    tasks.create_task(self._handover.notify(peer, notice))

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

    # ---- handlers

    async def serve_task(self, stream: Stream) -> None:
        """Handler of one task; see protocol.transport.Handler."""
        serve = {"forward": self._forward, "loss": self._loss, "backward": self._backward, "again": self._again}
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                task = await read_message(stream, Task)
            heard_s = asyncio.get_running_loop().time()
            refusal = await self._ledger.refusal(task, stream.peer)
            if refusal is None:
                self._handover.heard_from(stream.peer)
                await serve[task.kind](stream, task, heard_s)
                return
            self._violations[stream.peer] += refusal == "not-for-me"
            await write_message(stream, Reply(ok=False, reason=refusal))
        except VisitGoneError:  # the iteration ended while we were at it
            await write_message(stream, Reply(ok=False, reason="stale"))
        except ProtocolError:
            self._violations[stream.peer] += 1
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

    # ---- forward and loss

    async def _forward(self, stream: Stream, task: Task, heard_s: float) -> None:
        held = Held(path=task.path)
        self._ledger.take(key_of(task), held)
        has_moved = False
        try:
            inputs = await self._receive(stream, heard_s)
            taken = asyncio.get_running_loop().create_future()
            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(self._visit(task, inputs, taken))
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

    async def _visit(self, task: Task, inputs: Tensor, taken: asyncio.Future[bool]) -> bool:
        """Compute a forward pass and pass it on; whether that succeeded."""
        async with self._turnstile.turn(FORWARD, task.priority):
            held = self._ledger.get(task)
            if held is None:
                self._turnstile.give_back()
                taken.set_result(False)
                return False
            held.has_slot = True
            held.sent = await self._paced(FORWARD, self._run_forward, key_of(task), inputs)
        if self._ledger.get(task) is not held:  # the iteration ended meanwhile
            self._worker.forget(key_of(task))
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

    def _run_forward(self, key: MicrobatchKey, inputs: Tensor) -> memoryview:
        return self._codec.encode(self._worker.forward(key, inputs))

    async def _loss(self, stream: Stream, task: Task, heard_s: float) -> None:
        hidden = await self._receive(stream, heard_s)
        held = self._ledger.get(task)
        if held is None or held.phase != "out":  # another peer was faster
            await write_message(stream, Reply(ok=False, reason="unknown"))
            return
        held.phase, held.path = "turned", task.path
        await write_message(stream, Reply(ok=True))
        gradient = await self._head(task, held, hidden)
        if gradient is None:
            return
        counts = asyncio.get_running_loop().create_future()
        counts.set_result(True)
        if not await self._handover.backward(_returning(task, len(task.path) - 1), gradient, counts):
            held.lose("nobody could take its gradient")

    async def _head(self, task: Task, held: Held, hidden: Tensor) -> memoryview | None:
        async with self._turnstile.turn(LOSS, task.priority):
            if self._ledger.get(task) is not held:
                return None
            held.loss, gradient = await self._paced(LOSS, self._run_loss, key_of(task), hidden)
            return gradient

    def _run_loss(self, key: MicrobatchKey, hidden: Tensor) -> tuple[float, memoryview]:
        loss, gradient = self._worker.loss(key, hidden)
        return loss, self._codec.encode(gradient)

    async def _turn_alone(self, task: Task, sent: memoryview) -> None:
        """Loss and backward pass of a microbatch that visits nobody else."""
        held = self._ledger.get(task)
        gradient = None if held is None else await self._head(task, held, self._codec.decode(sent))
        if gradient is not None:
            await self._return(task, self._codec.decode(gradient), stream=None)

    # ---- backward

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
        await self._return(task, gradient, stream=stream)

    async def _again(self, stream: Stream, task: Task, heard_s: float) -> None:
        held = Held(path=task.path, phase="back")
        self._ledger.take(key_of(task), held)
        try:
            gradient = await self._receive(stream, heard_s)
            inputs = await self._compute.run_beside(self._codec.decode, await self._handover.input_of(task))
        except BaseException:
            self._ledger.forget(key_of(task))
            raise
        if self._ledger.get(task) is held:
            self._worker.admit(key_of(task), inputs)
            await self._return(task, gradient, stream=stream)

    async def _return(self, task: Task, gradient: Tensor, *, stream: Stream | None) -> None:
        """Compute a backward pass, count it if the holder says so, and pass the gradient on."""
        held = self._ledger.get(task)
        try:
            async with self._turnstile.turn(BACKWARD, task.priority):
                if held is None or self._ledger.get(task) is not held:
                    return
                self._ledger.free_slot(held)
                onward = await self._paced(BACKWARD, self._run_backward, key_of(task), gradient)
            await self._count(task, held, onward, stream)
        finally:
            if held is not None and held.finished is None and self._ledger.get(task) is held:
                self._ledger.forget(key_of(task))

    async def _count(self, task: Task, held: Held, onward: memoryview | None, stream: Stream | None) -> None:
        """Ask the holder whether a backward pass still counts; meanwhile its gradient is on its way already, since the next peer's
        does not count before ours does. The origin's microbatch has then come back."""
        if stream is not None and not await self._tell_computed(stream):
            return
        counts = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as tasks:
            if onward is not None:
                back = _returning(task, task.position - 1)
                passing = tasks.create_task(self._handover.backward(back, onward, counts))
            is_ours = await self._still_counts(stream) and await self._commit(task)
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
            # Beside the passes: others wait for our word, and a pass may take long.
            await self._compute.run_beside(self._worker.commit, key_of(task))
        except VisitGoneError:  # nobody else answers for it any more
            await self._handover.lose(task)
            return False
        return True

    def _run_backward(self, key: MicrobatchKey, gradient: Tensor) -> memoryview | None:
        onward = self._worker.backward(key, gradient)
        return None if onward is None else self._codec.encode(onward)

    async def _paced(self, kind: int, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Compute, and remember how long it took."""
        result, seconds = await self._compute.timed(function, *args, **kwargs)
        self.pace[kind] = (1.0 - RECENT) * self.pace.get(kind, seconds) + RECENT * seconds
        return result

    async def _tell_computed(self, stream: Stream) -> bool:
        """Whether the holder may still hear that we have; a stream that it has closed says that it has given us up."""
        with contextlib.suppress(TransportError):
            await write_message(stream, Reply(ok=True))
            return True
        return False

    async def _still_counts(self, stream: Stream | None) -> bool:
        """The holder's answer; nobody else may have been asked meanwhile, or the microbatch would count twice."""
        if stream is None:
            return True
        with contextlib.suppress(LlmNodeError, TimeoutError):
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                reply = await read_message(stream, Reply)
            await stream.close()  # the holder waits for that
            return reply.ok
        return False

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
            # Beside the passes: behind one, it would come to the turnstile when that has already admitted something less urgent.
            return await self._compute.run_beside(self._codec.decode, payload)
        except ProtocolError:
            with contextlib.suppress(TransportError):
                await write_message(stream, Reply(ok=False, reason="bad-payload"))
            raise


def _returning(task: Task, position: int) -> Task:
    """The task of the next backward pass."""
    return task.model_copy(update={"kind": "backward", "position": position})


@contextlib.asynccontextmanager
async def _header_timeout() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(HEADER_TIMEOUT_S):
            yield
    except TimeoutError:
        raise TransportError("a stream was opened and nothing said") from None
