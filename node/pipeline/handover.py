"""Giving a microbatch to the next peer, and finding another way when that fails.

Whoever holds a microbatch is answerable for it until somebody else has it: it tries the next peer of the path; then other replicas
of that peer's stage; then, going forward, the path without that stage, if the rules allow it; and then it tells the origin
that the microbatch is lost. Nothing here waits longer than `hop_timeout_s` for one peer.

Nothing counts twice. Forward passes may be run by two peers when one was given up and is alive after all: only one of them reaches
the origin first, and the loss is taken once. A backward pass counts where the holder says so, once it has been computed; a
holder says so at most once, and not before it was told so itself.

A peer that is frozen, or out of reach from here alone, stays in the directory. So whoever has cost us some time in vain is
asked last for a few times as long: not more than a fifth of the time is lost with it, and it is not given up for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from node.pipeline.messages import INPUT_PROTOCOL, NOTICE_PROTOCOL, TASK_PROTOCOL, InputRequest, Notice, Reply, Task
from node.pipeline.rules import is_order
from protocol.errors import LlmNodeError, TransportError
from protocol.ids import PeerId, RunId
from protocol.transport import Stream, Transport
from protocol.wire import bulk_buffer, read_bulk_into, read_message, write_bulk, write_message

__all__ = ["Handover", "Router", "StageTerms", "Whereabouts"]

NOTICE_TIMEOUT_S = 3.0
PENALTY = 4.0
"""Whom we have waited for in vain is asked last for so many times as long."""


Whereabouts = Literal["here", "elsewhere", "given up"]
"""Of a microbatch that we have computed: we must pass it on; it has found another way; the iteration has ended without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTerms:
    """What a stage peer and those around it have agreed on.

    Args:
        run: the run.
        peer: ourselves.
        payload_bytes: of activations, and of their gradients.
        slots: microbatches between forward and backward pass.
        waiting: microbatches taken in beyond that.
        per_origin: microbatches of one origin that are taken in at once.
        hop_timeout_s: how long the holder waits for one peer to take over, its queue and its work included.
        may_skip: whether a stage without a live replica may be left out.
    """

    run: RunId
    peer: PeerId
    payload_bytes: int
    slots: int
    waiting: int = 4
    per_origin: int = 64
    hop_timeout_s: float = 30.0
    may_skip: bool = True


class Router(Protocol):
    """Who holds what, as far as this peer knows."""

    def stage_of(self, peer: PeerId) -> int | None:
        """The stage that a peer holds; None for a stranger."""

    def replicas(self, peer: PeerId) -> list[PeerId]:
        """The other peers of that peer's stage, the best to ask first."""


class Handover:
    """The outgoing side of a stage peer.

    Args:
        on_failure: told of every task that a peer did not take, and why.
    """

    def __init__(
        self, terms: StageTerms, transport: Transport, router: Router, on_failure: Callable[[Task, str], None]
    ) -> None:
        self._terms, self._transport, self._router, self._on_failure = terms, transport, router, on_failure
        self._last_until_s: dict[PeerId, float] = {}

    async def forward(
        self, task: Task, payload: memoryview, taken: asyncio.Future[bool], state: Callable[[], Whereabouts]
    ) -> bool:
        """Pass activations on.

        Args:
            task: the forward task that we have just done.
            payload: what came out.
            taken: is set to whether somebody has taken the microbatch, as soon as that is known.
            state: where the microbatch is by now: only one that is here has to be passed on.

        Returns:
            Whether it has got further than the next peer, or the next peer answers for it now. If not, it is lost, or the holder
            answers for it still.
        """
        try:
            for way in self._ways(task):
                if state() == "given up":
                    break
                if state() == "elsewhere" or await self._give(way, payload, taken):
                    return True
            if taken.done():  # else the holder is told, and may know somebody else
                await self.lose(task)
            return False
        finally:
            if not taken.done():
                taken.set_result(False)

    async def backward(self, task: Task, payload: memoryview, counts: asyncio.Future[bool]) -> bool:
        """Pass a gradient back to `task.position` of the path; True once that peer has computed and was told to count it.

        Args:
            counts: tells, once that is known, whether our own part of the microbatch counts. The gradient is on its way before;
                if it does not, then neither does what was made of it, and nobody else is asked.
        """
        position = task.position
        ways = [task.model_copy(update={"kind": "backward"})]
        if position > 0:
            for replica in sorted(self._replacements(task.path, position), key=self._comes_last):
                path = [*task.path[:position], replica, *task.path[position + 1 :]]
                ways.append(task.model_copy(update={"kind": "again", "path": path}))
        for way in ways:
            started_s = asyncio.get_running_loop().time()
            decided = await self._give_back(way, payload, counts)
            self._remember(PeerId(way.path[position]), bool(decided), started_s)
            if decided:
                return True
            if decided is not None or not await asyncio.shield(counts):
                break
        if await asyncio.shield(counts):
            await self.lose(task)
        return False

    async def input_of(self, task: Task) -> memoryview:
        """What the peer before `task.position` sent on in its forward pass.

        Raises:
            TransportError: it can not be reached, or does not have it any more, which is no fault: its iteration may have ended.
            ProtocolError: it broke a rule.
        """
        request = InputRequest(run=task.run, iteration=task.iteration, origin=task.path[0], microbatch=task.microbatch)
        before = PeerId(task.path[task.position - 1])
        async with asyncio.timeout(self._terms.hop_timeout_s):
            async with await self._transport.open(before, INPUT_PROTOCOL) as stream:
                await write_message(stream, request)
                if not (await read_message(stream, Reply)).ok:
                    raise TransportError("the input of a microbatch is gone")
                payload = bulk_buffer(self._terms.payload_bytes)
                await read_bulk_into(stream, payload)
                return payload

    async def lose(self, task: Task) -> None:
        """Tell the origin that a microbatch goes no further; it knows by itself if that is us."""
        if task.path[0] == self._terms.peer:
            return
        kind: Literal["lost", "lost-gradient"] = "lost" if task.kind == "forward" else "lost-gradient"
        notice = Notice(run=task.run, iteration=task.iteration, kind=kind, microbatch=task.microbatch)
        await self.notify(PeerId(task.path[0]), notice)

    async def notify(self, peer: PeerId, notice: Notice) -> None:
        """Send a notice; one that does not arrive costs the receiver its deadline, and nothing else."""
        with contextlib.suppress(LlmNodeError, TimeoutError):
            async with asyncio.timeout(NOTICE_TIMEOUT_S):
                async with await self._transport.open(peer, NOTICE_PROTOCOL) as stream:
                    await write_message(stream, notice)
                    await _until_closed(stream)

    # ---- ways

    def _ways(self, task: Task) -> Iterator[Task]:
        """The tasks that could follow a forward pass, the planned one first."""
        following, path = task.position + 1, task.path
        if following == len(path):
            yield task.model_copy(update={"kind": "loss", "position": 0})
            return
        holders = [PeerId(path[following]), *self._replacements(path, following)]
        for peer in sorted(holders, key=self._comes_last):
            other = [*path[:following], peer, *path[following + 1 :]]
            yield task.model_copy(update={"position": following, "path": other})
        shorter = [*path[:following], *path[following + 1 :]]
        stages = [self._router.stage_of(PeerId(peer)) for peer in shorter]
        is_path = len(shorter) > 1 and None not in stages  # the origin alone is none
        if self._terms.may_skip and is_path and is_order([stage for stage in stages if stage is not None]):
            yield from self._ways(task.model_copy(update={"path": shorter}))

    def _replacements(self, path: list[str], position: int) -> list[PeerId]:
        return [peer for peer in self._router.replicas(PeerId(path[position])) if peer not in path]

    # ---- one peer

    def heard_from(self, peer: PeerId) -> None:
        """It is there, and can reach us."""
        self._last_until_s.pop(peer, None)

    def _remember(self, peer: PeerId, has_helped: bool, since_s: float) -> None:
        if has_helped:
            self.heard_from(peer)
        else:
            now_s = asyncio.get_running_loop().time()
            self._last_until_s[peer] = now_s + PENALTY * (now_s - since_s)

    def _comes_last(self, peer: PeerId) -> bool:
        return asyncio.get_running_loop().time() < self._last_until_s.get(peer, 0.0)

    async def _give(self, task: Task, payload: memoryview, taken: asyncio.Future[bool]) -> bool:
        """Hand activations to one peer, and wait until we need not answer for them any more."""
        started_s = asyncio.get_running_loop().time()
        is_given = await self._try_to_give(task, payload, taken)
        self._remember(PeerId(task.path[task.position]), is_given, started_s)
        return is_given

    async def _try_to_give(self, task: Task, payload: memoryview, taken: asyncio.Future[bool]) -> bool:
        loop, timeout_s = asyncio.get_running_loop(), self._terms.hop_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                async with await self._transport.open(PeerId(task.path[task.position]), TASK_PROTOCOL) as stream:
                    if not await self._send(stream, task, payload):
                        return False
                    if not taken.done():
                        taken.set_result(True)
                    limit.reschedule(loop.time() + timeout_s)
                    while (reply := await read_message(stream, Reply)).ok and reply.reason == "trying":
                        limit.reschedule(loop.time() + timeout_s)
                    return self._is_taken(reply, task)
        except (LlmNodeError, TimeoutError) as error:
            self._on_failure(task, str(error) or "too slow")
            return False

    async def _send(self, stream: Stream, task: Task, payload: memoryview) -> bool:
        """A task and, without waiting for the answer, what comes with it: a round trip less for each hop. Whether it was taken."""
        await write_message(stream, task)
        # The peer may let us wait until it has room, as long as a hop may take.
        sending = asyncio.create_task(write_bulk(stream, payload, chunk_timeout_s=self._terms.hop_timeout_s))
        try:
            if not await self._is_yes(stream, task):
                return False
            await sending
            return True
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _is_yes(self, stream: Stream, task: Task) -> bool:
        return self._is_taken(await read_message(stream, Reply), task)

    def _is_taken(self, reply: Reply, task: Task) -> bool:
        if not reply.ok:
            self._on_failure(task, reply.reason)
        return reply.ok

    async def _give_back(self, task: Task, payload: memoryview, counts: asyncio.Future[bool]) -> bool | None:
        """Hand a gradient to one peer. True or False: it was told to count, which succeeded as far as we know or not; None: it was
        not, so another may be asked."""
        has_computed = False
        try:
            async with asyncio.timeout(self._terms.hop_timeout_s):
                async with await self._transport.open(PeerId(task.path[task.position]), TASK_PROTOCOL) as stream:
                    if not await self._send(stream, task, payload) or not await self._is_yes(stream, task):
                        return None
                    has_computed = True
                    await write_message(stream, Reply(ok=await asyncio.shield(counts)))
                    await _until_closed(stream)
                    return True
        except (LlmNodeError, TimeoutError) as error:
            self._on_failure(task, str(error) or "too slow")
            return False if has_computed else None  # it may have heard it: nobody else is asked


async def _until_closed(stream: Stream) -> None:
    """Let the peer close first: on a busy machine p2pd resets a stream before what was written right before its end is read."""
    with contextlib.suppress(LlmNodeError, TimeoutError):
        async with asyncio.timeout(NOTICE_TIMEOUT_S):
            await stream.read_exactly(1)
