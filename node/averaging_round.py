"""How one round averages: not at all, with one partner, by swaps with everybody, or by the group all-reduce.

    group = "none"    nobody
    group = "pair"    one partner                                                 averaging/averager.py
    group = "all"     the group's mean Δ, from owners of its parts                averaging/allreduce.py
                      swaps with everybody, where a mean of Δ does not do (`reduces`)

A group's replicas stay equal without φ ever travelling, as long as all get the same mean. Whoever missed a round, or a part of one,
is apart from then on. So where γ > 0 peers also mend φ: they exchange it with one partner beside the all-reduce, by the same
two-phase exchange without Δ. They do so in every eighth round, and in a few rounds after one in which something or somebody
was missing, or the partner met was not near. In all other rounds whoever proposes that is turned down at once.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from averaging.allreduce import GroupAverager, GroupLimits, GroupResult
from averaging.averager import Averager, ExchangeResult
from averaging.codec import codec_named
from averaging.fragments import Fragments
from averaging.replica import Outcome
from averaging.update import RemoteUpdate, Update
from node.training_state import TrainingState
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest import Manifest, SyncSpec
from protocol.records import ExchangeNote
from protocol.transport import Transport

__all__ = ["Averaged", "AveragingRounds", "averagers_of", "averaging_rounds", "group_summary", "reduces"]

_MEND_EVERY = 8
"""Of so many rounds of each fragment the last one exchanges φ, too."""
_MEND_ROUNDS = 4
"""So many do so after one in which something or somebody was missing, or the partner was not near: enough to meet several."""
_NEAR = 0.25
"""A partner is near whose φ differs from ours by less than this share of ‖Δ‖. Rounding to bf16 hides what is much less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaged:
    """What a round brought.

    Args:
        exchanges: with single peers; beside an all-reduce, at most the one of φ.
        group: how the all-reduce ended; None where there was none.
        group_mean: its mean Δ, to be applied instead of partners' Δ.
    """

    exchanges: Sequence[ExchangeResult] = ()
    group: GroupResult | None = None
    group_mean: memoryview | None = None

    @property
    def partners(self) -> list[RemoteUpdate]:
        """The updates that came."""
        return [exchange.remote for exchange in self.exchanges if exchange.remote is not None]


def group_summary(group: GroupResult) -> dict[str, Any]:
    """An all-reduce as fields of an event: how it ended, how many were in it, who was not, and how much of Δ has no mean."""
    return {
        "outcome": group.outcome,
        "members": 1 + len(group.peers),
        "missing": dict(group.missing),
        "own_numel": sum(stop - start for start, stop in group.own_parts),
        "seconds": round(group.seconds, 3),
    }


class AveragingRounds(ABC):
    """One way of averaging, round after round."""

    @abstractmethod
    async def average(self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float) -> Averaged:
        """Average with some or all of the candidates.

        Args:
            update: our progress; its buffers must not change until this returns.
            candidates: the live trainers.
            deadline_s: loop time at which we go on with what we have.

        Returns:
            What came of it. Cancellation leaves no stream open.
        """

    def conclude(self, averaged: Averaged, outcome: Outcome, *, round: int) -> list[ExchangeNote]:
        """Take in what `Trainer.apply` made of it.

        Returns:
            What to tell the world: a note per partner.
        """
        return [_note(exchange, outcome, round) for exchange in averaged.exchanges]


class SoloRounds(AveragingRounds):
    """A run that never averages."""

    async def average(self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float) -> Averaged:
        return Averaged()


class SwapRounds(AveragingRounds):
    """Whole updates are swapped, with one partner or with everybody.

    Args:
        averager: whose payload is Δ and φ.
        with_all: everybody.
    """

    def __init__(self, averager: Averager, *, with_all: bool) -> None:
        self._averager, self._with_all = averager, with_all

    async def average(self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float) -> Averaged:
        if self._with_all:
            results = await self._averager.exchange_all(update, candidates=candidates, deadline_s=deadline_s)
            return Averaged(exchanges=results)
        return Averaged(exchanges=[await self._averager.exchange(update, candidates=candidates, deadline_s=deadline_s)])


class GroupRounds(AveragingRounds):
    """The all-reduce, with φ mended now and then.

    Args:
        group: of Δ.
        averager: whose payload is φ alone.
        num_fragments: F; a fragment that was missed can be mended F rounds later.
    """

    def __init__(self, group: GroupAverager, averager: Averager, *, num_fragments: int) -> None:
        self._group, self._averager, self._num_fragments = group, averager, num_fragments
        self._left: Counter[int] = Counter()  # rounds of each fragment that are still to mend φ

    async def average(self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float) -> Averaged:
        mending: asyncio.Task[ExchangeResult] | None = None
        async with asyncio.TaskGroup() as tasks:
            reducing = tasks.create_task(self._group.reduce(update, candidates=candidates, deadline_s=deadline_s))
            if update.slow.nbytes:
                # Without candidates it turns down who proposes for this round, and lets wait who does for the next one.
                mending = tasks.create_task(
                    self._averager.exchange(
                        replace(update, delta=memoryview(b"")),
                        candidates=candidates if self._mends(update.round) else [],
                        deadline_s=deadline_s,
                    )
                )
        group, exchanges = reducing.result(), [] if mending is None else [mending.result()]
        # A partner's φ needs a Δ that is as encoded: alone with one, ours is the mean, and its rounding error is carried over.
        has_partner = any(exchange.remote is not None for exchange in exchanges)
        alone = update.delta if has_partner else None
        return Averaged(exchanges=exchanges, group=group, group_mean=alone if group.mean is None else group.mean)

    def conclude(self, averaged: Averaged, outcome: Outcome, *, round: int) -> list[ExchangeNote]:
        group, fragment = averaged.group, round % self._num_fragments
        assert group is not None
        found = [verdict.distances for verdict in outcome.verdicts.values()]
        is_far = any(distances is None or distances.slow >= _NEAR * distances.own for distances in found)
        if is_far or group.missing or group.outcome != "averaged":
            self._left[fragment] = _MEND_ROUNDS
        else:
            self._left[fragment] = max(0, self._left[fragment] - 1)
        met = [exchange for exchange in averaged.exchanges if exchange.partner is not None]  # nobody is no news here
        return [*_group_notes(group, round), *(_note(exchange, outcome, round) for exchange in met)]

    def _mends(self, round: int) -> bool:
        cycle, fragment = divmod(round, self._num_fragments)
        return self._left[fragment] > 0 or cycle % _MEND_EVERY == _MEND_EVERY - 1


def reduces(sync: SyncSpec) -> bool:
    """Whether the run averages by the group all-reduce: where the rule needs nothing but the mean Δ, and Δ bears to be encoded
    again as a mean. NoLoCo and pair-average want each other's φ or θ in every round, and of a mean of sparse Δ, made sparse
    again, most would be lost."""
    is_of_delta = sync.algorithm in ("diloco", "sparseloco")
    return sync.group == "all" and is_of_delta and sync.delta_codec != "topk"


def averagers_of(
    trainer: TrainingState, *, transport: Transport, identity: Identity
) -> tuple[Averager, GroupAverager | None]:
    """What a peer of the trainer's run averages by: the averager of pairs, and that of the group if the run has one.

    Beside an all-reduce the payload of pairs is φ alone.
    """
    manifest, numel = trainer.manifest, trainer.flat.theta.numel()
    sync, config, run = manifest.sync, trainer.replica.config, manifest.run_id
    is_group = reduces(sync)
    fragments = Fragments(numel, sync.fragments)
    averager = Averager(
        transport=transport,
        identity=identity,
        run=run,
        payload_bytes=lambda round: sum(config.payload_bytes(numel, round)[1 if is_group else 0 :]),
        max_lag_rounds=sync.max_lag_rounds,
        sends_early=sync.early_slow,
    )
    if not is_group:
        return averager, None
    group = GroupAverager(
        transport=transport,
        identity=identity,
        run=run,
        codec=codec_named(sync.delta_codec),
        numel=numel if sync.fragments == 1 else lambda round: fragments.numel(fragments.index(round)),
        limits=GroupLimits(clip_factor=manifest.safety.clip_factor),
    )
    return averager, group


def averaging_rounds(manifest: Manifest, averager: Averager, group: GroupAverager | None) -> AveragingRounds:
    """The way in which the run averages."""
    sync = manifest.sync
    if sync.group == "none":
        return SoloRounds()
    if group is not None:
        return GroupRounds(group, averager, num_fragments=sync.fragments)
    return SwapRounds(averager, with_all=sync.group == "all")


def _note(exchange: ExchangeResult, outcome: Outcome, round_: int) -> ExchangeNote:
    kind = exchange.outcome if exchange.remote is None else outcome.verdicts[exchange.remote.peer].kind
    return ExchangeNote(round=round_, partner=exchange.partner, outcome=kind, seconds=round(exchange.seconds, 3))


def _group_notes(group: GroupResult, round_: int) -> list[ExchangeNote]:
    """A note per member of the group; a record has room for the last few, so those who failed come last."""
    seconds = round(group.seconds, 3)
    if not group.members:
        return [ExchangeNote(round=round_, partner=None, outcome="alone", seconds=seconds)]
    told = [
        ExchangeNote(round=round_, partner=member, outcome=_fate(group, member), seconds=seconds)
        for member in group.members
    ]
    return sorted(told, key=lambda note: note.outcome != "averaged")


def _fate(group: GroupResult, member: PeerId) -> Literal["averaged", "lost", "timeout"]:
    """Whether a member's Δ is in the mean, and it saw the round through as far as that mattered."""
    if member in group.peers and (group.outcome == "averaged" or member not in group.missing):
        return "averaged"
    return "lost" if member in group.missing else "timeout"
