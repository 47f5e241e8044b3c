"""The history: what is new is kept once, what is old is pruned, and a full disk does not stop the page."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest

from bootstrap.collector import PRUNE_EVERY, Collector
from bootstrap.store import StatusStore, StoreLimits
from protocol.errors import UserError
from protocol.ids import PeerId
from protocol.records import PeerRecord
from tests.bootstrap.samples import NOW_S, note, peer_id, record


def test_only_a_higher_sequence_is_new() -> None:
    with StatusStore(":memory:") as store:
        assert store.observe([record(1, sequence=5)], now_s=NOW_S) == 1
        assert store.observe([record(1, sequence=5, round=99)], now_s=NOW_S + 1) == 0
        assert store.observe([record(1, sequence=4, round=99)], now_s=NOW_S + 2) == 0
        assert store.latest[peer_id(1)].record.round == 8
        assert store.latest[peer_id(1)].seen_at_s == NOW_S
        assert store.observe([record(1, sequence=6)], now_s=NOW_S + 3) == 1
        assert store.num_records() == 2


def test_validation_history_by_round() -> None:
    with StatusStore(":memory:") as store:
        store.observe([record(1, val_loss=4.0, val_round=3), record(2, val_loss=5.0, val_round=3)], now_s=NOW_S)
        store.observe([record(1, sequence=2, val_loss=4.0, val_round=3)], now_s=NOW_S)
        store.observe(
            [record(1, sequence=3, val_loss=3.5, val_round=4), record(3, val_loss=900.0, val_round=4)], now_s=NOW_S
        )
        store.observe([record(4, val_loss=3.0, val_round=10**9)], now_s=NOW_S)
        rounds = store.val_rounds(max_round=9, max_loss=20.0)
    assert [(r.round, r.mean, r.smallest, r.largest, r.num_peers) for r in rounds] == [
        (3, 4.5, 4.0, 5.0, 2),
        (4, 3.5, 3.5, 3.5, 1),
    ]


def test_exchanges_are_kept_once_and_listed_newest_first() -> None:
    with StatusStore(":memory:") as store:
        store.observe([record(1, recent=[note(1, 2), note(2, None, "alone")])], now_s=NOW_S)
        store.observe([record(1, sequence=2, recent=[note(2, None, "alone"), note(3, 2, "timeout")])], now_s=NOW_S)
        found = store.exchanges(limit=10)
        assert [(e.round, e.partner, e.outcome) for e in found] == [
            (3, peer_id(2), "timeout"),
            (2, None, "alone"),
            (1, peer_id(2), "averaged"),
        ]
        assert len(store.exchanges(limit=2)) == 2


def test_history_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "status.db"
    with StatusStore(path) as store:
        store.observe([record(1, sequence=1), record(2)], now_s=NOW_S)
        store.observe([record(1, sequence=2, round=9)], now_s=NOW_S + 5)
    with StatusStore(path) as store:
        assert store.latest[peer_id(1)].record.round == 9
        assert store.latest[peer_id(1)].seen_at_s == NOW_S + 5
        assert len(store.latest) == 2
        assert store.observe([record(1, sequence=2)], now_s=NOW_S + 9) == 0


def test_pruning_keeps_the_newest_rows_and_every_peer(tmp_path: Path) -> None:
    limits = StoreLimits(num_records=10, num_val_losses=5, num_exchanges=5, num_peers=3)
    path = tmp_path / "status.db"
    with StatusStore(path, limits=limits) as store:
        store.observe([record(2, name="early bird")], now_s=NOW_S)
        for i in range(1, 40):
            new = record(1, sequence=i, val_loss=3.0, val_round=i, recent=[note(i, 2)])
            store.observe([new], now_s=NOW_S + i)
        store.prune()
        assert store.num_records() == 11
        assert [r.round for r in store.val_rounds(max_round=100, max_loss=9.0)] == [35, 36, 37, 38, 39]
        assert [e.round for e in store.exchanges(limit=50)] == [39, 38, 37, 36, 35]
    with StatusStore(path, limits=limits) as store:
        assert store.latest[peer_id(2)].record.name == "early bird"


def test_a_flood_of_peers_does_not_grow_memory() -> None:
    with StatusStore(":memory:", limits=StoreLimits(num_peers=20)) as store:
        for i in range(100):
            store.observe([record(i)], now_s=NOW_S + i)
        assert set(store.latest) == {peer_id(i) for i in range(80, 100)}


def test_a_full_disk_is_reported_and_the_newest_records_stay_visible(tmp_path: Path) -> None:
    path = tmp_path / "status.db"
    with StatusStore(path) as store:
        store.observe([record(1)], now_s=NOW_S)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        for i in range(2, 60):
            store.observe([record(1, sequence=i, name="x" * 32)], now_s=NOW_S + i)
        problem = store.problem
        assert problem is not None
        assert "full" in problem
        assert store.latest[peer_id(1)].record.sequence == 59
        store._db.execute("PRAGMA max_page_count = 100000")
        store.observe([record(1, sequence=60)], now_s=NOW_S + 60)
        assert vars(store)["problem"] is None
    with StatusStore(path) as store:
        assert store.latest[peer_id(1)].record.sequence == 60


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 40, None])
def test_an_unusable_file_is_a_user_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "status.db"
    if content is None:
        path = tmp_path / "missing-folder" / "status.db"
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="move it away") as caught:
        StatusStore(path)
    assert "\n" not in str(caught.value)


def test_rows_that_are_no_records_are_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "status.db"
    StatusStore(path).close()
    db = sqlite3.connect(path)
    db.execute("INSERT INTO records (peer, sequence, seen_at_s, record) VALUES ('x', 1, 0.0, '{}')")
    db.commit()
    db.close()
    with pytest.raises(UserError, match="not usable"):
        StatusStore(path)


class _Directory:
    """Shows whatever the test puts into it."""

    def __init__(self) -> None:
        self.num_refreshes = 0
        self.all_records: Mapping[PeerId, PeerRecord] = {}

    async def refresh(self) -> None:
        self.num_refreshes += 1


async def test_collector_stores_what_the_directory_shows_and_prunes_now_and_then() -> None:
    directory = _Directory()
    with StatusStore(":memory:", limits=StoreLimits(num_records=10)) as store:
        collector = Collector(directory, store, clock=lambda: NOW_S)
        for i in range(1, PRUNE_EVERY + 1):
            directory.all_records = {peer_id(1): record(1, sequence=i), peer_id(2): record(2)}
            assert await collector.collect() == (2 if i == 1 else 1)
        assert directory.num_refreshes == PRUNE_EVERY
        assert store.latest[peer_id(1)].record.sequence == PRUNE_EVERY
        assert store.num_records() == 11


def test_a_damaged_file_costs_the_history_and_is_reported(tmp_path: Path) -> None:
    with StatusStore(tmp_path / "status.db") as store:
        store.observe([record(1, val_loss=3.0, val_round=7, recent=[note(7, 2)])], now_s=NOW_S)
        store._db.executescript("DROP TABLE val_losses; DROP TABLE exchanges;")
        assert store.val_rounds(max_round=100, max_loss=9.0) == []
        assert store.exchanges(limit=50) == []
        assert "no such table" in (store.problem or "")
        assert store.latest[peer_id(1)].record.round == 8
