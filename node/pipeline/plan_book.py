"""The newest plan of a run, as one node holds it: fetched from whoever has it, checked, and handed on.

Every stage peer keeps one, and so does a bootstrap node, where `llm-node plan --peer` finds it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

from node.events import EventLog
from node.pipeline.live_case import live_case
from node.pipeline.published import (
    MAX_PLAN_BYTES,
    PLAN_PROTOCOL,
    PlanDocument,
    SignedPlan,
    is_slower_than_none,
    planners,
)
from protocol.errors import DeadlineError, LlmNodeError, ProtocolError
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord
from protocol.transport import Stream, Transport
from protocol.violations import Violations
from protocol.wire import read_frame, write_frame

__all__ = ["PlanBook"]

FETCH_TIMEOUT_S = 10.0
MAX_ASKED = 3
"""Peers asked at one look."""


class PlanBook:
    """One node's newest plan; serves it from now on.

    Args:
        manifest: of the run.
        payload_bytes: of a microbatch's activations; 0 if plans are only kept here, and not followed and so not judged.
        violations: counts broken rules per peer.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        payload_bytes: int,
        transport: Transport,
        events: EventLog,
        violations: Violations,
    ) -> None:
        self._run, self._spec, self._payload_bytes = manifest.run_id, manifest.pipeline, payload_bytes
        self._transport, self._events, self._violations = transport, events, violations
        self._refused: set[tuple[int, PeerId]] = set()
        self.newest: PlanDocument | None = None
        self._data = b""
        transport.handle(PLAN_PROTOCOL, self.serve)

    @property
    def number(self) -> int:
        """Of the newest plan; 0 for none."""
        return 0 if self.newest is None else self.newest.number

    async def serve(self, stream: Stream) -> None:
        """Hand the plan to whoever asks; an empty frame if there is none."""
        await write_frame(stream, self._data)

    def take(self, signed: SignedPlan, **search: float) -> None:
        """Keep a plan that is sound and newer."""
        document = self.newest = signed.document
        self._data = signed.pack()
        self._refused = {(number, peer) for number, peer in self._refused if number > document.number}
        self._events.emit(
            "plan",
            number=document.number,
            planner=document.planner,
            iteration_s=round(document.iteration_s, 4),
            microbatches=len(document.table()),
            **search,
        )

    async def fetch(self, records: Mapping[PeerId, PeerRecord], *, at_most: int) -> None:
        """Take up the newest plan that anybody holds.

        Args:
            records: of all live stage peers.
            at_most: the number whose turn it is.
        """
        own = self._transport.peer_id
        newer = [peer for peer, record in records.items() if self.number < record.plan <= at_most]
        newer = [peer for peer in newer if (records[peer].plan, peer) not in self._refused]
        newer.sort(key=lambda peer: (-records[peer].plan, hashlib.sha256(f"{own}/{peer}".encode()).digest()))
        for peer in newer[:MAX_ASKED]:
            try:
                signed = await self._ask(peer)
            except ProtocolError:
                self._violations.blame(peer)
                self._refused.add((records[peer].plan, peer))
                continue
            except LlmNodeError:
                continue
            if signed is None:
                continue
            reason = await self._objection(signed.document, records, at_most=at_most)
            if reason is None:
                self.take(signed)
                return
            self._refused.add((records[peer].plan, peer))
            self._events.emit("plan_refused", number=signed.document.number, reason=reason, peer=peer)

    async def _ask(self, peer: PeerId) -> SignedPlan | None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                async with await self._transport.open(peer, PLAN_PROTOCOL) as stream:
                    data = await read_frame(stream, max_bytes=MAX_PLAN_BYTES)
        except TimeoutError:
            raise DeadlineError(f"the peer did not send its plan within {FETCH_TIMEOUT_S:g} s") from None
        return SignedPlan.unpack(data, run=self._run, spec=self._spec) if data else None

    async def _objection(
        self, document: PlanDocument, records: Mapping[PeerId, PeerRecord], *, at_most: int
    ) -> str | None:
        """Why a sound plan is not one to follow, or None. Views of the swarm differ, so whoever handed it on is not blamed."""
        if not self.number < document.number <= at_most:
            return "it is not that number's turn"
        if document.planner not in planners(records, run=self._run, number=document.number):
            return "it was not its planner's turn"
        if self._payload_bytes:
            problem = live_case(records, spec=self._spec, payload_bytes=self._payload_bytes)
            if problem is not None and await asyncio.to_thread(is_slower_than_none, document, *problem):
                return "it is slower than none"
        return None
