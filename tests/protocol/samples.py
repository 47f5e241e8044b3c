"""Valid manifests and records for the tests to start from, and the edits that fuzzing makes to valid bytes."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import strategies as st

from protocol.identity import Identity
from protocol.manifest import Manifest
from protocol.records import MAX_ROUND, PeerRecord

RUN = "ab" * 32
SENT_AT_S = 1.7e9


def identity(number: int) -> Identity:
    """The same key for the same number, always."""
    return Identity.generate(hashlib.sha256(f"identity {number}".encode()).digest())


def manifest(organiser: Identity | None = None, **changes: Any) -> Manifest:
    """A small valid manifest; `changes` replaces whole sections or top-level fields."""
    return Manifest.model_validate(manifest_fields(organiser) | changes)


def manifest_fields(organiser: Identity | None = None) -> dict[str, Any]:
    return {
        "name": "a-test",
        "organiser": (organiser or identity(0)).peer_id,
        "model": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "max_sequence_tokens": 128,
        },
        "tokenizer": {"blob": "00" * 32},
        "data": {
            "kind": "stdlib",
            "index": "11" * 32,
            "heldout": "22" * 32,
            "heldout_tokens": 4096,
            "train_tokens": 1_000_000,
        },
        "inner": {"lr": 1e-3, "sequence_tokens": 64},
        "initial_state": {"sha256": "33" * 32},
    }


def record(own: Identity, **changes: Any) -> PeerRecord:
    """A trainer's record."""
    fields: dict[str, Any] = {
        "run": RUN,
        "peer": own.peer_id,
        "sequence": 1,
        "role": "trainer",
        "state": "training",
        "started_at_s": SENT_AT_S,
        "sent_at_s": SENT_AT_S,
    }
    return PeerRecord.model_validate(fields | changes)


def largest_record(peer: Identity) -> PeerRecord:
    """Every field as long as it may be, text in the script that takes most bytes."""
    note = {"round": MAX_ROUND, "partner": peer.peer_id, "outcome": "averaged", "seconds": 999_999.9}
    snapshot = {"round": MAX_ROUND, "root": "ff" * 32, "size_bytes": 2**63 - 1}
    counts = "sequence round step inner_steps sequences_per_step tokens sent_bytes received_bytes exchanges_ok exchanges_failed"
    return record(
        peer,
        **(dict.fromkeys(counts.split(), 2**63 - 1) | {"round": MAX_ROUND}),
        name="\N{GRINNING FACE}" * 32,
        version="\N{GRINNING FACE}" * 32,
        addresses=["/" * 256] * 8,
        tokens_per_s=1e12,
        train_loss=3.3,
        val_loss=3.3,
        val_round=MAX_ROUND,
        eta_s=1e9,
        recent=[note] * 4,
        snapshots=[snapshot] * 2,
        sketch="f" * 64,
    )


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes changed, cut out, cut off, doubled or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        end = min(len(changed), start + draw(st.sampled_from([0, 1, 1, 2, 8, 64])))
        piece = bytes(changed[start:end])
        edits = [
            piece + piece,
            b"",
            draw(st.binary(max_size=8)),
            bytes(len(piece)),
            b"\xdf\xff\xff\xff\xff",
            b"\xc7\x01\x40\xc0",
        ]
        changed[start:end] = draw(st.sampled_from(edits))
    if draw(st.booleans()):
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)
