"""A peer's counters, and the record made of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from node.progress import Progress
from protocol.directory import pack_record, unpack_record
from protocol.identity import Identity
from protocol.ids import RunId
from protocol.records import MAX_RECORD_BYTES, ExchangeNote, SnapshotRef
from protocol.transport import Traffic
from tests.protocol.samples import RUN, identity

OWN: Identity = identity(1)


def progress(name: str = "me") -> Progress:
    return Progress(run=RunId(RUN), peer=OWN.peer_id, name=name, inner_steps=10, traffic=Traffic())


def note(outcome: str, round: int = 1) -> ExchangeNote:
    partner = None if outcome == "alone" else OWN.peer_id
    return ExchangeNote.model_validate({"round": round, "partner": partner, "outcome": outcome, "seconds": 1.0})


@pytest.mark.parametrize(
    "clock",
    [lambda tick: 1_700_000_000.0, lambda tick: 1_700_000_000.0 - tick, lambda tick: 1_700_000_000.0 + 1e-6 * tick],
    ids=["stopped", "backwards", "slow"],
)
def test_the_sequence_grows_strictly_whatever_the_clock_does(
    clock: Callable[[int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "time_ns", lambda: int(clock(next(ticks)) * 1e9))
    own = progress()
    sequences = [own.record([]).sequence for _ in range(50)]
    assert all(later > earlier for earlier, later in pairwise(sequences))


def test_the_sequence_goes_on_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter((1.7e9, 1.7e9 + 1.0))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(clock_s) * 1e9))
    before = progress().record([]).sequence
    assert progress().record([]).sequence > before


def test_the_fullest_record_fits() -> None:
    own = progress(name="\N{GRINNING FACE}" * 100)
    own.tokens = own.sequences_per_step = 2**62
    own.round = 10**9
    own.count_step(loss=3.3, tokens=2**30, seconds=1e-2, now_s=0.0)
    own.count_validation(3.3, 10**9)
    for _ in range(9):
        own.count_exchange(note("averaged", 10**9))
    own.sketch = "f" * 64
    own.snapshots = [SnapshotRef(round=10**9, root="f" * 64, size_bytes=2**62)] * 5
    record = own.record(["/ip4/" + "x" * 251] * 20)
    data = pack_record(record, OWN)
    assert len(data) <= MAX_RECORD_BYTES
    assert unpack_record(data, run=RunId(RUN)) == record


def test_only_failures_count_as_failed() -> None:
    own = progress()
    for outcome in ("averaged", "clipped", "alone", "refused", "timeout", "lost"):
        own.count_exchange(note(outcome))
    assert (own.exchanges_ok, own.exchanges_failed) == (2, 3)


def test_speed_and_remaining_time_come_from_the_last_steps() -> None:
    own = progress()
    assert own.tokens_per_s == 0.0
    assert own.eta_s is None
    for _ in range(100):
        own.count_step(loss=5.0, tokens=1, seconds=100.0, now_s=0.0)
    own.step = 0
    for _ in range(4):
        own.count_step(loss=5.0, tokens=64, seconds=0.5, now_s=0.0)
    for _ in range(16 - 4):
        own._steps.append((0.5, 64))
    assert own.tokens_per_s == pytest.approx(128.0)
    assert own.eta_s == pytest.approx(3.0), "6 of 10 steps at half a second"


def test_time_to_first_step_is_measured_once() -> None:
    own = progress()
    own.began_s = 10.0
    own.count_step(loss=5.0, tokens=1, seconds=1.0, now_s=14.5)
    own.count_step(loss=5.0, tokens=1, seconds=1.0, now_s=99.0)
    assert own.time_to_first_step_s == 4.5


def test_the_first_validation_is_remembered() -> None:
    own = progress()
    own.count_validation(6.0, 0)
    own.count_validation(4.0, 1)
    assert (own.first_val_loss, own.val_loss, own.val_round) == (6.0, 4.0, 1)


def test_losses_of_earlier_rounds_are_remembered() -> None:
    own = progress()
    assert own.val_loss_after(3) is None
    for round, loss in ((5, 6.0), (6, 5.0), (9, 4.0)):
        own.count_validation(loss, round)
    assert [own.val_loss_after(round) for round in (0, 5, 6, 8, 9, 99)] == [6.0, 6.0, 5.0, 5.0, 4.0, 4.0]
    for round in range(10, 1000):
        own.count_validation(1.0, round)
    assert len(own._val_losses) < 100


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e7])
def test_a_diverged_peer_still_has_a_record(loss: float) -> None:
    own = progress()
    own.count_step(loss=loss, tokens=1, seconds=1.0, now_s=0.0)
    own.count_validation(loss, 1)
    record = own.record([])
    assert record.train_loss is None
    assert record.val_loss is None
