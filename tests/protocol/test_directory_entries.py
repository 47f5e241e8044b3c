"""What the DHT keeps of the directory."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.directory import (
    MAX_EXPIRY_S,
    MAX_LIFE_S,
    bucket_key,
    pack_record,
    validate_entry,
)
from protocol.identity import Identity
from protocol.records import MAX_RECORD_BYTES
from tests.protocol.samples import RUN, SENT_AT_S, damaged, identity, record
from tests.protocol.table_dht import RUN_ID

fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def entry_for(own: Identity, level: int = 0, **changes: Any) -> tuple[str, str, bytes, float, float]:
    """Arguments of `validate_entry` for an honest record."""
    key = bucket_key(RUN_ID, level, hashlib.sha256(own.peer_id.encode()).digest())
    return key, own.peer_id, pack_record(record(own, **changes), own), SENT_AT_S + 105.0, SENT_AT_S


@pytest.mark.parametrize("level", [0, 1, 5, 17])
def test_an_honest_entry_is_kept(level: int) -> None:
    assert validate_entry(*entry_for(identity(1), level))


@pytest.mark.parametrize("expires_at_s", [math.inf, -math.inf, math.nan, SENT_AT_S + MAX_EXPIRY_S + 1.0, 1e308])
def test_no_entry_lives_for_ever(expires_at_s: float) -> None:
    key, subkey, value, _, now_s = entry_for(identity(1), sent_at_s=1e10)
    assert validate_entry(key, subkey, value, now_s + MAX_EXPIRY_S, now_s)
    assert not validate_entry(key, subkey, value, expires_at_s, now_s)


def test_an_old_record_can_not_be_stored_again_to_outlast_new_ones() -> None:
    key, subkey, value, _, now_s = entry_for(identity(1))
    assert validate_entry(key, subkey, value, now_s + MAX_LIFE_S, now_s)
    assert not validate_entry(key, subkey, value, now_s + MAX_LIFE_S + 1.0, now_s)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "peers/0/0",
        f"{RUN}/peers/0",
        f"{RUN}/peers/0/1",
        f"{RUN}/peers/0/00",
        f"{RUN}/peers/00/0",
        f"{RUN}/peers/0/0/",
        f"{RUN}/peers/0/0\n",
        f"{RUN}/blobs/0/0",
        f"{RUN}/peers/-1/0",
        f"{RUN}/peers/99/0",
        f"{RUN}/peers/٠/0",
        f"{RUN.upper()}/peers/0/0",
        f"{'cd' * 32}/peers/0/0",
        "x" * 100_000,
    ],
)
def test_a_key_that_is_not_the_peer_s_bucket_is_refused(key: str) -> None:
    _, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    assert not validate_entry(key, subkey, value, expires_at_s, now_s)


def test_each_level_has_exactly_one_bucket_for_a_peer() -> None:
    _, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    keys = [f"{RUN}/peers/3/{bucket}" for bucket in range(9)]
    assert sum(validate_entry(key, subkey, value, expires_at_s, now_s) for key in keys) == 1


def test_the_subkey_is_the_signer() -> None:
    key, _, value, expires_at_s, now_s = entry_for(identity(1))
    for subkey in (identity(2).peer_id, "", "\udcff", "x" * 100_000):
        assert not validate_entry(key, subkey, value, expires_at_s, now_s)


def test_oversize_values_are_refused() -> None:
    key, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    assert not validate_entry(key, subkey, value + bytes(MAX_RECORD_BYTES), expires_at_s, now_s)


@fuzz
@given(value=damaged(entry_for(identity(1))[2]) | st.binary(max_size=200))
def test_no_damaged_value_is_kept(value: bytes) -> None:
    key, subkey, honest, expires_at_s, now_s = entry_for(identity(1))
    assert validate_entry(key, subkey, value, expires_at_s, now_s) == (value == honest)


@fuzz
@given(
    key=st.text(max_size=100) | damaged(f"{RUN}/peers/0/0".encode()).map(lambda b: b.decode(errors="surrogateescape"))
)
def test_any_key_is_judged_without_an_error(key: str) -> None:
    honest_key, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    assert validate_entry(key, subkey, value, expires_at_s, now_s) == (key == honest_key)
