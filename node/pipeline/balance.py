"""When a stage peer leaves its stage for another that needs it more.

A stage that nobody holds any more is taken over by a peer of the stage that has most to spare; and when the slowest stage would
gain a quarter, a peer of a faster one moves there. Everybody computes the same order of those who could go, and the first in it
goes; should it not (its memory may be too small), the next one does some looks later. Moving costs the peer's share of
the present round, so nobody moves on a passing impression, or soon after it came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from node.pipeline.stage_choice import believed_pass_s, usual_pass_s
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord

__all__ = ["Balance", "moves"]

GAIN = 1.25
"""The slower one of two stages becomes so many times as fast, or nobody moves between them."""
LOOKS, LOOKS_IF_LOST = 5, 2
"""Looks in a row at which a move must be called for."""
LOOKS_PER_PLACE = 4
"""Further looks for everybody who stands before us."""
SETTLING_LOOKS = 20
"""Looks after coming in which a peer leaves only for a stage that is lost."""


def moves(records: Mapping[PeerId, PeerRecord], *, num_stages: int, path_length: int) -> tuple[int, list[PeerId], bool]:
    """The stage that needs another peer most.

    Args:
        records: of all peers.

    Returns:
        The stage; who could go there, the best first; and whether nobody holds it.
    """
    held: dict[int, dict[PeerId, PeerRecord]] = {stage: {} for stage in range(num_stages)}
    for peer, record in records.items():
        stage = record.stage if record.next_stage is None else record.next_stage
        if stage in held and record.state in ("joining", "training"):
            held[stage][peer] = record
    usual_s = usual_pass_s(records)

    def gives(peer: PeerId, record: PeerRecord, stage: int) -> float:
        """Microbatches per second, times their share that visits the stage."""
        share = 1.0 if stage == 0 else (path_length - 1) / max(num_stages - 1, 1)
        return 1.0 / (believed_pass_s(record, usual_s) * share)

    pace = {stage: sum(gives(peer, r, stage) for peer, r in peers.items()) for stage, peers in held.items()}
    target = min(pace, key=lambda stage: (pace[stage], stage))
    worth: dict[PeerId, float] = {}
    for stage, peers in held.items():
        if stage == target or len(peers) < (2 if stage or not held[target] else 3):
            continue  # a stage is left by nobody if that leaves nobody, stage 0 not if that leaves one, who could say anything
        for peer, record in peers.items():
            left = pace[stage] - gives(peer, record, stage)
            after = min(left, pace[target] + gives(peer, record, target)) if held[target] else left
            is_free = record.state == "training" and record.next_stage is None
            if is_free and after >= GAIN * pace[target]:
                worth[peer] = after
    lot = {peer: hashlib.sha256(f"llm-node:move\0{target}\0{peer}".encode()).digest() for peer in worth}
    return target, sorted(worth, key=lambda peer: (-worth[peer], lot[peer])), not held[target]


class Balance:
    """One peer's looks at the stages.

    Args:
        peer: ourselves.
        stage: ours.
        fitting: those that our memory allows.
    """

    def __init__(self, manifest: Manifest, *, peer: PeerId, stage: int, fitting: Sequence[int]) -> None:
        self._spec, self._total = manifest.pipeline, manifest.sync.total_rounds * manifest.sync.inner_steps
        self._inner_steps = manifest.sync.inner_steps
        self._peer, self._stage, self._fitting = peer, stage, fitting
        self._num_looks = 0
        self._wanted: int | None = None
        self._times = 0

    def look(self, records: Mapping[PeerId, PeerRecord], *, iteration: int) -> int | None:
        """The stage to go to now, or None to stay.

        Args:
            records: of all peers, our own included.
            iteration: the present one.
        """
        self._num_looks += 1
        target, who, is_lost = moves(records, num_stages=self._spec.stages, path_length=self._spec.path_length)
        is_ending = self._total and iteration + self._inner_steps >= self._total  # the last round averages to the end
        is_called_for = self._peer in who and target in self._fitting and target != self._stage and not is_ending
        if not is_called_for or not (is_lost or self._num_looks > SETTLING_LOOKS):
            self._wanted, self._times = None, 0
            return None
        self._times = self._times + 1 if target == self._wanted else 1
        self._wanted = target
        needed = (LOOKS_IF_LOST if is_lost else LOOKS) + LOOKS_PER_PLACE * who.index(self._peer)
        return target if self._times >= needed else None
