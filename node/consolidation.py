"""The end of a finite run: the peers average until they hold one model, which is then saved and exported.

    ready ──► wait for those who still train ──► meet, meet, … ──► agreed ──► wait for the others' word ──► one model
                  (at most a round and an exchange)   (bounded number, each with a deadline for its bytes)

Peers meet at random (averaging/consolidation.py) in rounds that are numbered far beyond the last one of the run, so that no
exchange of training pairs with one of these. Nobody meets the same partner twice in a row while there are others, nor one who
agreed: those who got ahead of the rest would have eyes for each other only. In its record a peer says that it is ready by taking no
sequences per step any more, and that it agrees with its partners by a sketch of its model, which the others compare with theirs:
whose partners have moved since learns it that way. Nothing here waits for ever.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from averaging.averager import Averager
from averaging.consolidation import Consolidation, agreeing_partners, num_rounds
from node.compute import Compute
from node.events import EventLog
from node.mixing import foreign_bucket
from node.progress import Progress
from node.training_state import TrainingState
from protocol.directory import SwarmView
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.records import PeerRecord
from protocol.transport import Transport

__all__ = ["Consolidated", "Consolidator"]

MAX_LAG_ROUNDS = 8
"""Two partners may be so many rounds apart here: whoever comes late can begin with anybody."""
FIRST_ROUND = 2 * MAX_LAG_ROUNDS
"""The first round's number, counted from the run's last: out of reach of any exchange that still belongs to training."""
LOOK_AGAIN_S = 0.5
"""Between two looks at the directory, where records spread in a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consolidated:
    """How it ended.

    Args:
        meetings: exchanges that came about.
        distance: ‖θi − θj‖/‖θi‖ at the last one, before it; None without any.
        agreed: whether the models are the same within the tolerance, as far as this peer's last partners tell, and most of the
            others; without any meeting, whether it trained alone all the time.
    """

    meetings: int
    distance: float | None
    agreed: bool


class Consolidator:
    """Consolidates one peer's model.

    Args:
        trainer: has finished the run.
        announce: publishes this peer's record.
    """

    def __init__(
        self,
        trainer: TrainingState,
        *,
        compute: Compute,
        transport: Transport,
        identity: Identity,
        directory: SwarmView,
        progress: Progress,
        events: EventLog,
        announce: Callable[[], Awaitable[None]],
    ) -> None:
        self._trainer, self._compute, self._directory = trainer, compute, directory
        self._transport, self._identity = transport, identity
        self._progress, self._events, self._announce = progress, events, announce
        self._run, self._sync = trainer.manifest.run_id, trainer.manifest.sync
        self._round = self._sync.total_rounds + FIRST_ROUND
        self._recent: deque[PeerId] = deque()
        self._num_others = 0  # at most, so far: the rest of a swarm is no majority of it
        self._meetings = 0

    @property
    def is_due(self) -> bool:
        """Whether the run has ended and wants one model."""
        sync = self._sync
        has_ended = bool(sync.total_rounds) and self._trainer.round >= sync.total_rounds
        return has_ended and sync.algorithm != "local" and sync.consolidation_tolerance > 0.0

    async def run(self) -> Consolidated:
        """Average with whoever is there, and measure the result. Cancellation leaves a whole model.

        When nobody is there it ends at once: a peer that was alone all the time holds the run's model, one that comes after the
        others have left holds its own, and says so.
        """
        await self._directory.refresh()
        others = self._others()
        if not others:
            return self._without_others()
        self._events.emit("consolidating", peers=len(others))
        consolidation = await self._compute.run(
            Consolidation, self._trainer.replica, tolerance=self._sync.consolidation_tolerance
        )
        try:
            agreed = await self._meet_until_agreed(consolidation)
        finally:
            await self._compute.run(consolidation.finish)
        done = Consolidated(meetings=self._meetings, distance=consolidation.agreement.distance, agreed=agreed)
        loss = await self._compute.run(self._trainer.evaluate)
        if loss is not None:
            self._progress.count_validation(loss, self._sync.total_rounds)
            loss = round(loss, 4)
        self._events.emit("consolidated", loss=loss, meetings=done.meetings, distance=done.distance, agreed=done.agreed)
        return done

    def _without_others(self) -> Consolidated:
        alone = not self._trainer.is_shared
        done = Consolidated(meetings=0, distance=None, agreed=alone)
        if not alone:
            own = self._progress.val_loss
            loss = None if own is None else round(own, 4)
            self._events.emit("consolidated", loss=loss, meetings=0, distance=None, agreed=False)
        return done

    async def _meet_until_agreed(self, consolidation: Consolidation) -> bool:
        averager = Averager(
            transport=self._transport,
            identity=self._identity,
            run=self._run,
            payload_bytes=consolidation.num_payload_bytes,
            max_lag_rounds=MAX_LAG_ROUNDS,
        )
        async with averager:
            self._progress.step, self._progress.sequences_per_step = 0, 0
            await self._announce()
            await self._wait_for_the_late()
            self._count()
            for _ in range(num_rounds(1 + self._num_others)):
                if await self._is_over(consolidation):
                    break
                await self._meet(averager, consolidation)
            else:
                await self._look()
                await self._tell(consolidation)
        return self._is_one_model(consolidation)

    def _is_one_model(self, consolidation: Consolidation) -> bool:
        """Whether we agree with our partners, and no more than half of those who agree hold another model: one liar is no proof."""
        own = bytes.fromhex(self._progress.sketch)
        num_agreeing = sum(bool(record.sketch) for record in self._others().values())
        return bool(own) and 2 * len(self._elsewhere(consolidation, own)) <= num_agreeing

    async def _wait_for_the_late(self) -> None:
        """Until the others are ready, too, or should be."""
        patience_s = self._sync.round_target_s + self._sync.exchange_timeout_s
        deadline_s = asyncio.get_running_loop().time() + patience_s
        while asyncio.get_running_loop().time() < deadline_s:
            if all(self._is_ready(record) for record in self._others().values()):
                return
            await asyncio.sleep(LOOK_AGAIN_S)
            await self._directory.refresh()

    def _is_ready(self, record: PeerRecord) -> bool:
        return record.round >= self._sync.total_rounds and record.sequences_per_step == 0

    async def _is_over(self, consolidation: Consolidation) -> bool:
        """Whether nobody else is there any more, or we and all the others who are through with training agree."""
        await self._look()
        had_agreed = bool(self._progress.sketch)
        await self._tell(consolidation)
        if self._progress.sketch and not had_agreed and not self._do_others_agree(consolidation):
            await asyncio.sleep(LOOK_AGAIN_S)  # perhaps they do, and are just saying so
            await self._look()
        return not self._others() or self._do_others_agree(consolidation)

    async def _tell(self, consolidation: Consolidation) -> None:
        """Say in our record whether we agree with our partners. Those who agree on another model by now are none of them."""
        agreement, told = consolidation.agreement, ""
        if agreement.is_reached(self._num_others):
            own = await self._compute.run(consolidation.sketch)
            agreement.partners.difference_update(self._elsewhere(consolidation, own))
            told = own.hex() if agreement.is_reached(self._num_others) else ""
        if self._progress.sketch != told:
            self._progress.sketch = told
            await self._announce()

    def _elsewhere(self, consolidation: Consolidation, own: bytes) -> list[PeerId]:
        """Those who agree on another model than ours."""
        others = {peer: record.sketch for peer, record in self._others().items() if record.sketch}
        return [peer for peer, other in others.items() if not consolidation.is_near(own, bytes.fromhex(other))]

    def _do_others_agree(self, consolidation: Consolidation) -> bool:
        own = bytes.fromhex(self._progress.sketch)
        ready = [record for record in self._others().values() if self._is_ready(record)]
        return bool(own) and all(r.sketch for r in ready) and not self._elsewhere(consolidation, own)

    async def _meet(self, averager: Averager, consolidation: Consolidation) -> None:
        update = await self._compute.run(consolidation.pack, self._round)
        others = list(self._others())
        fresh = [peer for peer in others if peer not in self._recent]
        of_another_mind = [peer for peer in fresh if peer not in consolidation.agreement.partners]
        # After a meeting that came to nothing anybody will do: of another mind may only be one that is gone.
        candidates = (of_another_mind if self._recent else []) or fresh or others
        deadline_s = asyncio.get_running_loop().time() + self._limit_s(consolidation)
        result = await averager.exchange(update, candidates=candidates, deadline_s=deadline_s)
        outcome, distance = str(result.outcome), math.inf
        if result.remote is not None:
            verdict, distance = await self._compute.run(consolidation.apply, result.remote)
            outcome = verdict.kind
            self._meetings += 1
            self._round = max(self._round, result.remote.round) + 1
            self._recent.append(result.remote.peer)
            while len(self._recent) >= agreeing_partners(len(others)):  # that many in a row must be different ones
                self._recent.popleft()
        else:
            if not self._recent:  # twice in a row: there is nothing to be had just now
                await asyncio.sleep(LOOK_AGAIN_S)
            # Else on at once, to be at the others' doors when they come out of their meetings; late ones find them taken again.
            self._recent.clear()
            self._round += 1
        seconds = round(result.seconds, 3)
        known = distance if math.isfinite(distance) else None
        self._events.emit("consolidation", partner=result.partner, outcome=outcome, seconds=seconds, distance=known)

    def _limit_s(self, consolidation: Consolidation) -> float:
        """Deadline of one meeting: the run's for its exchanges, and as much longer as there is more to send, in fp32."""
        ratio = consolidation.num_payload_bytes / max(1, self._trainer.replica.num_payload_bytes)
        return self._sync.exchange_timeout_s * max(1.0, ratio)

    async def _look(self) -> None:
        await self._directory.refresh(extra=foreign_bucket(self._run, self._round, self._identity.peer_id))
        self._count()

    def _count(self) -> None:
        self._num_others = max(self._num_others, len(self._others()))

    def _others(self) -> dict[PeerId, PeerRecord]:
        records = self._directory.peers
        return {peer: r for peer, r in records.items() if r.role == "trainer" and r.state == "training"}
