"""What a swarm of records amounts to, and what a lying peer can not do to the picture."""

from __future__ import annotations

import json

import pytest

from bootstrap.document import (
    MAX_DOCUMENT_BYTES,
    MAX_PEERS,
    MAX_POINTS,
    StatusDocument,
    encode_document,
    parse_document,
)
from bootstrap.store import StatusStore
from bootstrap.summary import FORGET_AFTER_S, SILENT_AFTER_S, swarm_status
from protocol.manifest_sections import PipelineSpec
from protocol.records import MAX_ROUND
from tests.bootstrap.samples import NOW_S, busy_store, document_of, manifest, note, peer_id, record, staged_document


def test_an_empty_swarm() -> None:
    document = document_of()
    assert document["run"]["name"] == "stdlib-1m"
    assert document["run"]["id"] == manifest().run_id
    assert document["run"]["parameters"] == manifest().model.num_parameters
    assert document["swarm"]["peers"] == 0
    assert document["swarm"]["val_loss"] is None
    assert document["peers"] == document["exchanges"] == document["val_loss"] == document["warnings"] == []


def test_totals_count_trainers_and_everybody_s_bytes() -> None:
    boot = record(3, role="bootstrap", state="serving", tokens=0, tokens_per_s=0.0)
    document = document_of(record(1), record(2, state="joining", tokens_per_s=100.0), boot)
    swarm = document["swarm"]
    assert (swarm["peers"], swarm["training"]) == (2, 1)
    assert swarm["tokens_per_s"] == 600.0
    assert swarm["tokens"] == 200_000
    assert swarm["sent_bytes"] == 6_000_000
    assert (swarm["exchanges_ok"], swarm["exchanges_failed"]) == (21, 3)
    assert [peer["state"] for peer in document["peers"]] == ["training", "joining", "serving"]


def test_one_liar_moves_neither_round_nor_curve() -> None:
    honest = [record(i, val_loss=3.0 + 0.1 * i, val_round=7) for i in (1, 2, 3)]
    document = document_of(
        *honest, record(4, round=10**9, val_loss=1e6, val_round=7), record(5, val_loss=0.0, val_round=10**9)
    )
    assert document["swarm"]["round"] == 8
    assert document["val_loss"] == [[7, pytest.approx(3.2), 3.1, 3.3, 3]]
    assert any("peer-4" in warning and "left out" in warning for warning in document["warnings"])


@pytest.mark.parametrize("num_liars", [1, 2, 300])
def test_the_largest_claims_that_a_record_can_hold_do_not_stop_the_page(num_liars: int) -> None:
    most = 2**63 - 1
    claims = {"round": MAX_ROUND} | dict.fromkeys(("tokens", "sent_bytes", "received_bytes", "exchanges_ok"), most)
    liars = [record(i + 2, **claims, tokens_per_s=1e12, val_loss=1e6, val_round=MAX_ROUND) for i in range(num_liars)]
    document = document_of(record(1, val_loss=3.0, val_round=7), *liars)
    assert document["swarm"]["tokens"] == 100_000 + num_liars * most
    assert [7, 3.0, 3.0, 3.0, 1] in document["val_loss"]
    assert parse_document(encode_document(document)) == document


def test_the_tile_shows_a_round_that_half_of_the_swarm_has_measured() -> None:
    peers = [record(i, val_loss=4.0, val_round=6) for i in (1, 2, 3)]
    with StatusStore(":memory:") as store:
        store.observe(peers, now_s=NOW_S)
        store.observe([record(1, sequence=2, val_loss=3.0, val_round=7)], now_s=NOW_S)
        first = swarm_status(store, manifest(), now_s=NOW_S)
        store.observe([record(2, sequence=2, val_loss=3.5, val_round=7)], now_s=NOW_S)
        second = swarm_status(store, manifest(), now_s=NOW_S)
    assert (first["swarm"]["val_round"], first["swarm"]["val_loss"]) == (6, 4.0)
    assert (second["swarm"]["val_round"], second["swarm"]["val_loss"]) == (7, 3.25)


def test_a_finished_run_keeps_its_round_and_its_curve() -> None:
    gone = [record(i, state="leaving", round=30, val_loss=2.0, val_round=29) for i in (1, 2)]
    document = document_of(*gone, record(3, role="bootstrap", state="serving", round=0))
    assert document["swarm"]["round"] == 30
    assert document["swarm"]["val_loss"] == 2.0
    assert document["swarm"]["training"] == 0
    assert len(document["val_loss"]) == 1


def test_a_peer_falls_silent_and_is_forgotten_but_its_tokens_stay() -> None:
    silent = document_of(record(1), now_s=NOW_S + SILENT_AFTER_S + 5)
    assert silent["peers"][0]["state"] == "silent"
    assert silent["swarm"]["peers"] == 0
    assert silent["swarm"]["tokens_per_s"] == silent["peers"][0]["tokens_per_s"] == 0.0
    assert "not been heard of for 50 s" in silent["warnings"][0]
    forgotten = document_of(record(1), now_s=NOW_S + FORGET_AFTER_S + 1)
    assert forgotten["peers"] == []
    assert forgotten["swarm"]["tokens"] == 100_000


def test_a_goodbye_is_no_reason_for_a_warning() -> None:
    document = document_of(record(1, state="leaving"), now_s=NOW_S + SILENT_AFTER_S + 5)
    assert document["peers"][0]["state"] == "leaving"
    assert document["warnings"] == []


@pytest.mark.parametrize(("skew_s", "words"), [(63.0, "63 s ahead of"), (-60.0, "60 s behind"), (12.0, None)])
def test_clock_skew_warns_and_changes_nothing_else(skew_s: float, words: str | None) -> None:
    document = document_of(record(1, sent_at_s=NOW_S + skew_s))
    assert document["peers"][0]["state"] == "training"
    if words is None:
        assert document["warnings"] == []
    else:
        assert words in document["warnings"][0]


def test_a_lagging_peer_is_named() -> None:
    document = document_of(record(1), record(2), record(3, name="slow-pi", round=3))
    assert document["warnings"] == ["slow-pi is 5 rounds behind the swarm and trains alone until it has caught up."]


def test_a_store_that_can_not_write_is_named() -> None:
    with StatusStore(":memory:") as store:
        store.problem = "database or disk is full"
        assert "disk is full" in swarm_status(store, manifest(), now_s=NOW_S)["warnings"][0]


def test_an_exchange_told_by_both_partners_is_listed_once() -> None:
    document = document_of(
        record(1, recent=[note(7, 2)]), record(2, name="", recent=[note(7, 1), note(8, None, "alone", 0.0)])
    )
    assert [(e["round"], e["name"], e["partner_name"], e["outcome"]) for e in document["exchanges"]] == [
        (8, f"…{peer_id(2)[-8:]}", "", "alone"),
        (7, f"…{peer_id(2)[-8:]}", "peer-1", "averaged"),
    ]


def test_names_lose_what_a_terminal_or_a_reader_could_trip_over() -> None:
    document = document_of(record(1, name="a\x1b[31mb\u202ec\nd é 漢"))
    assert document["peers"][0]["name"] == "a·[31mb·c·d é 漢"


def test_a_huge_swarm_fits_the_limit() -> None:
    worst = "\U0001f980" * 32
    many = [
        record(i, name=worst, version=worst, sent_at_s=0.0, recent=[note(j, i + 1) for j in range(4)])
        for i in range(MAX_PEERS + 300)
    ]
    with StatusStore(":memory:") as store:
        store.observe(many, now_s=NOW_S)
        for i in range(2, MAX_POINTS + 200):
            store.observe([record(1, sequence=i, round=i, val_loss=3.123456789012345, val_round=i)], now_s=NOW_S)
        store.observe([record(i, sequence=10**6, round=10**6) for i in range(600)], now_s=NOW_S)
        document = swarm_status(store, manifest(), now_s=NOW_S)
    assert len(encode_document(document)) < MAX_DOCUMENT_BYTES
    assert len(document["peers"]) == MAX_PEERS
    assert document["swarm"]["peers"] == MAX_PEERS + 300
    rounds = [point[0] for point in document["val_loss"]]
    assert len(rounds) == MAX_POINTS
    assert (rounds[0], rounds[-1]) == (2, MAX_POINTS + 199)
    assert rounds == sorted(set(rounds))


def test_the_document_is_json_in_its_own_schema() -> None:
    with busy_store() as store:
        document = swarm_status(store, manifest(), now_s=NOW_S)
    assert json.loads(encode_document(document)) == document
    assert parse_document(encode_document(document)) == document
    assert set(document) == set(StatusDocument.model_fields)


def test_a_pass_of_no_time_at_all_does_not_cost_everybody_the_page() -> None:
    staged = manifest().model_copy(update={"pipeline": PipelineSpec(stages=2)})
    with StatusStore(":memory:") as store:
        store.observe([record(1, stage=0, forward_s=5e-324, run=staged.run_id)], now_s=NOW_S)
        assert swarm_status(store, staged, now_s=NOW_S)["stages"][0]["microbatches_per_s"] == 1e6


def test_stages_of_a_pipeline() -> None:
    document = staged_document()
    assert [stage["peers"] for stage in document["stages"]] == [2, 2, 2, 1, 0, 2]
    speeds = [stage["microbatches_per_s"] for stage in document["stages"]]
    assert speeds == pytest.approx([9.0, 13.33, 5.0, 1.67, 0.0, 13.33], abs=0.01)
    assert [text for text in document["warnings"] if "stage" in text] == [
        "Nobody holds stage 4 of the pipeline; another peer moves there, or let one more join."
    ]
    assert document_of(record(1))["stages"] == []
