"""Records and manifests for the tests of this folder."""

from __future__ import annotations

import hashlib
from typing import Any

from bootstrap.store import StatusStore
from bootstrap.summary import swarm_status
from protocol.ids import PeerId
from protocol.manifest import (
    DataSpec,
    InitialStateSpec,
    InnerSpec,
    Manifest,
    ModelSpec,
    PipelineSpec,
    SyncSpec,
    TokenizerSpec,
)
from protocol.records import ExchangeNote, PeerRecord

NOW_S = 1_800_000_000.0
HASH = "ab" * 32
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def peer_id(number: int) -> PeerId:
    """A well-formed id, different for each number."""
    digest = hashlib.sha512(str(number).encode()).digest()
    return PeerId("12D3KooW" + "".join(_BASE58[byte % 58] for byte in digest[:44]))


def manifest(**sync: Any) -> Manifest:
    """A run of a one-million-parameter model."""
    return Manifest(
        name="stdlib-1m",
        organiser=peer_id(0),
        model=ModelSpec(
            vocab_size=1024, hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, num_kv_heads=2
        ),
        tokenizer=TokenizerSpec(blob=HASH),
        data=DataSpec(kind="stdlib", index=HASH, heldout=HASH, heldout_tokens=8192, train_tokens=9_400_000),
        inner=InnerSpec(lr=3e-3, sequence_tokens=128),
        sync=SyncSpec(inner_steps=50, **sync),
        initial_state=InitialStateSpec(sha256=HASH),
    )


def record(number: int, **fields: Any) -> PeerRecord:
    """A training peer's record; `fields` replace any of it."""
    base: dict[str, Any] = {
        "run": manifest().run_id,
        "peer": peer_id(number),
        "sequence": 1,
        "role": "trainer",
        "state": "training",
        "name": f"peer-{number}",
        "version": "0.1.0",
        "started_at_s": NOW_S - 300.0,
        "sent_at_s": NOW_S,
        "round": 8,
        "step": 20,
        "inner_steps": 50,
        "tokens": 100_000,
        "tokens_per_s": 500.0,
        "train_loss": 4.0,
        "sent_bytes": 2_000_000,
        "received_bytes": 1_000_000,
        "exchanges_ok": 7,
        "exchanges_failed": 1,
    }
    return PeerRecord(**(base | fields))


def note(round_: int, partner: int | None, outcome: str = "averaged", seconds: float = 0.5) -> ExchangeNote:
    """One exchange with peer `partner`."""
    return ExchangeNote.model_validate(
        {
            "round": round_,
            "partner": None if partner is None else peer_id(partner),
            "outcome": outcome,
            "seconds": seconds,
        }
    )


def document_of(*records: PeerRecord, now_s: float = NOW_S) -> dict[str, Any]:
    """The status document after these records arrived together at NOW_S."""
    with StatusStore(":memory:") as store:
        store.observe(records, now_s=NOW_S)
        return swarm_status(store, manifest(), now_s=now_s)


def staged_document() -> dict[str, Any]:
    """A pipeline of six stages, of which one has lost its last peer."""
    staged = manifest().model_copy(update={"pipeline": PipelineSpec(stages=6)})
    held = [(0, 0.2), (0, 0.25), (1, 0.1), (1, 0.3), (2, 0.2), (2, 0.0), (3, 0.6), (5, 0.15), (5, 0.15)]
    with StatusStore(":memory:") as store:
        store.observe(
            [
                record(number, stage=stage, forward_s=forward_s, run=staged.run_id, tokens_per_s=90.0)
                for number, (stage, forward_s) in enumerate(held, start=1)
            ],
            now_s=NOW_S,
        )
        return swarm_status(store, staged, now_s=NOW_S)


def busy_store() -> StatusStore:
    """Three trainers of different luck, a bootstrap node, a silent peer and 24 rounds of history."""
    store = StatusStore(":memory:")
    store.observe([record(9, name="garage-pi", round=12, sequence=7, tokens=40_000)], now_s=NOW_S - 70.0)
    for round_ in range(25):
        late = round_ == 24
        for number, name in ((1, "kitchen-laptop"), (2, "Zoë's tower"), (3, "")):
            if number == 3 and late:
                continue
            loss = 2.6 + 4.3 * 0.86**round_ + 0.05 * (number - 2) * (1.0 + 3.0 * 0.8**round_)
            partner = 1 + number % 3
            kind = "clipped" if (round_, number) == (22, 2) else "averaged"
            if number == 3 and round_ % 5 == 1:
                partner_note = note(round_, None, "alone", 0.0)
            elif number == 2 and round_ == 24:
                partner_note = note(round_, 9, "timeout", 60.0)
            else:
                partner_note = note(round_, partner, kind, 0.31 * number)
            store.observe(
                [
                    record(
                        number,
                        name=name,
                        sequence=round_ + 1,
                        round=round_ + 1,
                        step=13 * number,
                        val_loss=loss,
                        val_round=round_,
                        train_loss=loss - 0.08 * number,
                        tokens=51_200 * (round_ + 1) * number,
                        tokens_per_s=1480.0 * number,
                        eta_s=11.0 * (4 - number),
                        sent_bytes=3_300_000 * (round_ + 1),
                        received_bytes=3_200_000 * (round_ + 1),
                        exchanges_ok=round_,
                        recent=[partner_note],
                        sent_at_s=NOW_S + (63.0 if number == 2 else 0.0),
                    )
                ],
                now_s=NOW_S,
            )
    boot = record(
        0, role="bootstrap", state="serving", name="", round=0, step=0, inner_steps=0, tokens=0, train_loss=None
    )
    store.observe(
        [boot.model_copy(update={"tokens_per_s": 0.0, "exchanges_ok": 0, "exchanges_failed": 0})], now_s=NOW_S
    )
    return store
