"""Records of stage peers for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protocol.directory import SwarmView
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.records import PeerRecord
from tests.node.pipeline.stages import RUN

__all__ = ["FixedView", "peer_id", "record"]


def peer_id(number: int) -> PeerId:
    """The id of a peer."""
    return Identity.generate(bytes([number]) * 32).peer_id


def record(number: int, stage: int | None, **fields: Any) -> PeerRecord:
    """What that peer says of itself."""
    known = {"state": "training", "run": RUN} | fields
    return PeerRecord(
        peer=peer_id(number), sequence=1, role="trainer", started_at_s=0.0, sent_at_s=0.0, stage=stage, **known
    )


class FixedView(SwarmView):
    """A directory that never changes by itself."""

    def __init__(self, *records: PeerRecord) -> None:
        self.records = {PeerId(each.peer): each for each in records}

    @property
    def peers(self) -> Mapping[PeerId, PeerRecord]:
        return self.records

    async def refresh(self, *, extra: bytes | None = None) -> Mapping[PeerId, PeerRecord]:
        return self.records
