"""What the collector remembers: an SQLite file of signed records, validation losses and exchanges.

A record is appended only when its `sequence` is new for its peer, so that refreshing a directory a thousand times costs nothing.
Each record also carries the peer's newest validation loss and its last few exchanges; these go into tables of their own, keyed
so that repeats fall away. The newest record of every peer is kept in memory too: that is what a status document needs,
and the page stays alive when the disk is full (`problem` says so; writing resumes with the next records once there is room).

The tables are bounded: strangers choose how many peers and rounds they claim. `prune` removes the oldest rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from protocol.errors import UserError
from protocol.ids import PeerId
from protocol.records import PeerRecord

__all__ = ["SeenRecord", "StatusStore", "StoreLimits", "StoredExchange", "ValRound"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY, peer TEXT NOT NULL, sequence INTEGER NOT NULL, seen_at_s REAL NOT NULL, record TEXT NOT NULL,
    UNIQUE (peer, sequence));
CREATE TABLE IF NOT EXISTS val_losses (
    id INTEGER PRIMARY KEY, peer TEXT NOT NULL, round INTEGER NOT NULL, loss REAL NOT NULL,
    UNIQUE (peer, round));
CREATE INDEX IF NOT EXISTS val_losses_by_round ON val_losses (round, loss);
CREATE TABLE IF NOT EXISTS exchanges (
    id INTEGER PRIMARY KEY, peer TEXT NOT NULL, round INTEGER NOT NULL, partner TEXT NOT NULL, outcome TEXT NOT NULL,
    seconds REAL NOT NULL,
    UNIQUE (peer, round, partner, outcome));
"""

_NEWEST_IDS = "SELECT MAX(id) FROM records GROUP BY peer ORDER BY MAX(id) DESC LIMIT ?"
_LOAD_NEWEST = f"SELECT seen_at_s, record FROM records WHERE id IN ({_NEWEST_IDS})"
_PRUNE_RECORDS = f"DELETE FROM records WHERE id <= (SELECT MAX(id) FROM records) - ? AND id NOT IN ({_NEWEST_IDS})"

_MAX_INTEGER = 2**63 - 1
"""SQLite's largest; strangers may claim a round so close to it that the next one is beyond."""

Outcome = Literal["averaged", "clipped", "refused", "alone", "timeout", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """How much is kept."""

    num_records: int = 100_000
    num_val_losses: int = 200_000
    num_exchanges: int = 100_000
    num_peers: int = 10_000
    """Peers whose newest record stays in memory; beyond it the ones longest unheard of go first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRecord:
    """The newest record of a peer."""

    record: PeerRecord
    seen_at_s: float
    """Unix time of its arrival by our clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredExchange:
    """One exchange as `peer` reported it."""

    peer: PeerId
    partner: PeerId | None
    round: int
    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValRound:
    """Validation losses of one round over peers, nats per token."""

    round: int
    mean: float
    smallest: float
    largest: float
    num_peers: int


class StatusStore:
    """History of one run's records.

    Args:
        path: the database file, created when missing, or ":memory:".
        limits: how much is kept.

    Raises:
        UserError: the file can not be opened or is not such a database.
    """

    def __init__(self, path: Path | str, *, limits: StoreLimits | None = None) -> None:
        self._limits = limits or StoreLimits()
        self._latest: dict[PeerId, SeenRecord] = {}
        self.problem: str | None = None
        """Why the last write failed, or None."""
        try:
            self._db = sqlite3.connect(str(path), timeout=1.0)
        except sqlite3.Error as error:
            raise _unusable(path, error) from None
        try:
            self._load()
        except (sqlite3.Error, ValueError) as error:
            self._db.close()
            raise _unusable(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing else may be called afterwards."""
        self._db.close()

    @property
    def latest(self) -> Mapping[PeerId, SeenRecord]:
        """The newest record of every peer ever seen."""
        return self._latest

    def observe(self, records: Iterable[PeerRecord], *, now_s: float) -> int:
        """Take in records, already checked by the directory; known ones are skipped.

        Args:
            records: any mixture of old and new ones of this run.
            now_s: Unix time.

        Returns:
            The number of new records. A full disk is not raised: see `problem`.
        """
        fresh = [record for record in records if self._is_new(record)]
        for record in fresh:
            self._latest[PeerId(record.peer)] = SeenRecord(record=record, seen_at_s=now_s)
        self._drop_oldest_peers()
        if fresh:
            self._write(fresh, now_s)
        return len(fresh)

    def val_rounds(self, *, max_round: int, max_loss: float) -> list[ValRound]:
        """Validation losses by round, oldest first, without claims beyond `max_round` or above `max_loss`. Empty when the
        file cannot be read: see `problem`."""
        rows = self._read(
            "SELECT round, AVG(loss), MIN(loss), MAX(loss), COUNT(*) FROM val_losses "
            "WHERE round <= ? AND loss <= ? GROUP BY round ORDER BY round",
            (min(max_round, _MAX_INTEGER), max_loss),
        )
        return [ValRound(round=r, mean=mean, smallest=low, largest=high, num_peers=n) for r, mean, low, high, n in rows]

    def exchanges(self, *, limit: int) -> list[StoredExchange]:
        """The exchanges reported last, newest first. Empty when the file cannot be read: see `problem`."""
        rows = self._read(
            "SELECT peer, partner, round, outcome, seconds FROM exchanges ORDER BY id DESC LIMIT ?", (limit,)
        )
        return [
            StoredExchange(
                peer=PeerId(peer),
                partner=PeerId(partner) if partner else None,
                round=round_,
                outcome=outcome,
                seconds=seconds,
            )
            for peer, partner, round_, outcome, seconds in rows
        ]

    def num_records(self) -> int:
        """Number of records in the history."""
        return int(self._db.execute("SELECT COUNT(*) FROM records").fetchone()[0])

    def prune(self) -> None:
        """Remove the oldest rows beyond the limits; every peer's newest record stays."""
        limits = self._limits
        try:
            with self._db:
                self._db.execute(_PRUNE_RECORDS, (limits.num_records, limits.num_peers))
                for table, limit in (("val_losses", limits.num_val_losses), ("exchanges", limits.num_exchanges)):
                    self._db.execute(f"DELETE FROM {table} WHERE id <= (SELECT MAX(id) FROM {table}) - ?", (limit,))
        except sqlite3.Error as error:
            self.problem = _first_line(error)

    def _load(self) -> None:
        # A crash may lose the last seconds of history, never the file; so no fsync per record.
        self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + _SCHEMA)
        for seen_at_s, text in self._db.execute(_LOAD_NEWEST, (self._limits.num_peers,)):
            record = PeerRecord.model_validate_json(text)
            self._latest[PeerId(record.peer)] = SeenRecord(record=record, seen_at_s=seen_at_s)

    def _read(self, query: str, parameters: tuple[float, ...]) -> list[Any]:
        """All rows, or none: a damaged file costs the page its history, and not the node its life."""
        try:
            return self._db.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            self.problem = _first_line(error)
            return []

    def _is_new(self, record: PeerRecord) -> bool:
        known = self._latest.get(PeerId(record.peer))
        return known is None or record.sequence > known.record.sequence

    def _drop_oldest_peers(self) -> None:
        excess = len(self._latest) - self._limits.num_peers
        if excess > 0:
            by_age = sorted(self._latest, key=lambda peer: self._latest[peer].seen_at_s)
            for peer in by_age[:excess]:
                del self._latest[peer]

    def _write(self, records: list[PeerRecord], now_s: float) -> None:
        try:
            with self._db:
                for record in records:
                    self._insert(record, now_s)
        except sqlite3.Error as error:
            self.problem = _first_line(error)
        else:
            self.problem = None

    def _insert(self, record: PeerRecord, now_s: float) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO records (peer, sequence, seen_at_s, record) VALUES (?, ?, ?, ?)",
            (record.peer, record.sequence, now_s, record.model_dump_json()),
        )
        if record.val_loss is not None and record.val_round is not None:
            self._db.execute(
                "INSERT INTO val_losses (peer, round, loss) VALUES (?, ?, ?) "
                "ON CONFLICT (peer, round) DO UPDATE SET loss = excluded.loss",
                (record.peer, record.val_round, record.val_loss),
            )
        self._db.executemany(
            "INSERT OR IGNORE INTO exchanges (peer, round, partner, outcome, seconds) VALUES (?, ?, ?, ?, ?)",
            [(record.peer, note.round, note.partner or "", note.outcome, note.seconds) for note in record.recent],
        )


def _unusable(path: Path | str, error: Exception) -> UserError:
    return UserError(f"status history {path} is not usable ({_first_line(error)}); move it away")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
