"""Which stage a peer takes, and its replicas' view of the swarm.

A joiner takes the stage that the swarm lacks most: the one whose holders together are slowest. Several who join at once would all
take the same; so each announces its choice, looks again, and one of them, by lot, thinks again while the stages are out of balance.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median

from protocol.directory import Directory, SwarmView
from protocol.ids import PeerId
from protocol.records import PeerRecord

__all__ = [
    "StageView",
    "believed_pass_s",
    "choose_stage",
    "lacking_stage",
    "should_think_again",
    "usual_pass_s",
]

MAX_LOOKS = 12
CALM_LOOKS = 2
"""Looks in a row that must find nothing to change."""
MAX_SPEEDUP = 4.0
LOOK_AGAIN_S = 1.5
"""Between announcing a choice and looking what others have chosen: records spread in about a second."""


async def choose_stage(
    directory: Directory, *, stages: Sequence[int], peer: PeerId, announce: Callable[[int], Awaitable[None]]
) -> int:
    """Take a stage.

    Args:
        directory: of all peers.
        stages: to choose from.
        peer: ourselves.
        announce: publishes our record with this stage in it, and looks at the directory.
    """
    await directory.refresh()
    stage = lacking_stage(directory.neighbours, stages=stages, peer=peer)
    await announce(stage)
    calm = 0
    for _ in range(MAX_LOOKS):
        await asyncio.sleep(LOOK_AGAIN_S)
        await directory.refresh()
        calm += 1
        if should_think_again(directory.neighbours, stage=stage, stages=stages, peer=peer):
            stage, calm = lacking_stage(directory.neighbours, stages=stages, peer=peer), 0
            await announce(stage)
        if calm == CALM_LOOKS:
            break
    return stage


def usual_pass_s(records: Mapping[PeerId, PeerRecord]) -> float:
    """The median of what peers say that a forward pass takes them."""
    return median([record.forward_s for record in records.values() if record.forward_s > 0.0] or [1.0])


def believed_pass_s(record: PeerRecord, usual_s: float) -> float:
    """A peer's forward pass. Nobody is believed to be many times as fast as others: it would count as a whole stage."""
    return max(record.forward_s, usual_s / MAX_SPEEDUP) if record.forward_s > 0.0 else usual_s


def lacking_stage(records: Mapping[PeerId, PeerRecord], *, stages: Sequence[int], peer: PeerId) -> int:
    """The stage with the least speed, all holders together; ties by a lot of one's own.

    Args:
        records: of the other peers, those joining included.
        stages: to choose from.
        peer: ourselves.
    """
    speeds = dict.fromkeys(stages, 0.0)
    usual_s = usual_pass_s(records)
    for record in records.values():
        stage = record.stage if record.next_stage is None else record.next_stage
        if stage in speeds and record.state in ("joining", "training"):
            speeds[stage] += 1.0 / believed_pass_s(record, usual_s)
    return min(speeds, key=lambda stage: (speeds[stage], _lot(f"{peer}/{stage}")))


def should_think_again(
    records: Mapping[PeerId, PeerRecord], *, stage: int, stages: Sequence[int], peer: PeerId
) -> bool:
    """Whether this peer, which is about to take `stage`, leaves it to others: another stage has at least two fewer holders, and of
    those who are joining this one it has drawn the highest lot."""
    held = dict.fromkeys(stages, 0)
    for record in records.values():
        if record.stage in held and record.state in ("joining", "training"):
            held[record.stage] += 1
    rivals = [other for other, r in records.items() if r.stage == stage and r.state == "joining" and other != peer]
    is_highest = all(_lot(f"{peer}") > _lot(f"{other}") for other in rivals)
    return is_highest and held[stage] + 1 - min(held.values()) >= 2


def _lot(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class StageView(SwarmView):
    """The directory as the replicas of one stage use it: peers of other stages are not there.

    Everything that averages, fetches states or keeps snapshots works with it as it does in a run of whole replicas.

    Args:
        directory: of all peers.
        stage: whose replicas to show; None shows all.
    """

    def __init__(self, directory: Directory, stage: int | None) -> None:
        self._directory, self._stage = directory, stage

    @property
    def peers(self) -> Mapping[PeerId, PeerRecord]:
        """The other live peers of the stage."""
        records = self._directory.peers
        return {peer: record for peer, record in records.items() if self._stage in (None, record.stage)}

    async def refresh(self, *, extra: bytes | None = None) -> Mapping[PeerId, PeerRecord]:
        """Read the directory; returns the new `peers`."""
        await self._directory.refresh(extra=extra)
        return self.peers
