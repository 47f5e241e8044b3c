"""docs/PROTOCOL.md's vectors, stream names and limits are those of the code."""

from __future__ import annotations

import hashlib
from pathlib import Path

from averaging.exchange_messages import Ack, Answer, Offer, Propose, payload_hash
from averaging.priority import priority
from averaging.search import PROTOCOL as EXCHANGE_PROTOCOL
from bootstrap.document import MAX_DOCUMENT_BYTES, STATUS_PROTOCOL
from node.pipeline.archive import STATE_PROTOCOL
from node.pipeline.inference import FORWARD_PROTOCOL
from node.pipeline.links import PROBE_PROTOCOL
from node.pipeline.messages import INPUT_PROTOCOL, NOTICE_PROTOCOL, TASK_PROTOCOL, InputRequest, Notice, Reply, Task
from node.pipeline.published import PLAN_PROTOCOL
from protocol.blob_server import BLOB_PROTOCOL, BlobReply, BlobRequest
from protocol.directory import bucket_key
from protocol.identity import Identity
from protocol.ids import RunId
from protocol.merkle import LEAF_BYTES, LeafList
from protocol.publication import MANIFEST_PROTOCOL
from protocol.records import PeerRecord
from protocol.wire import MAX_HEADER_BYTES, encode_message, pack

TEXT = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text()
RUN = RunId("ab" * 32)


def test_vectors() -> None:
    zero, one = Identity.generate(bytes(32)), Identity.generate(b"\1" * 32)
    zeros = bytes(LEAF_BYTES)
    expected = {
        'payload digest of "llm-node"': payload_hash(b"llm-node").hexdigest(),
        "blob id of the empty blob": LeafList.of_leaves([]).blob,
        'blob id of "llm-node"': LeafList.of_leaves([b"llm-node"]).blob,
        'blob id of 2 MiB of zeros, then "abc"': LeafList.of_leaves([zeros, zeros, b"abc"]).blob,
        "peer id of the key with seed 00…00": zero.peer_id,
        'its signature of "x", domain manifest': zero.sign("manifest", b"x").hex(),
        "its key at level 3 in run abab…ab": bucket_key(RUN, 3, hashlib.sha256(zero.peer_id.encode()).digest()),
        "DHT key of abab…ab/peers/0/0": hashlib.sha1(pack(f"{RUN}/peers/0/0")).hexdigest(),
        "request for the leaf list of blob 00…00": encode_message(BlobRequest(blob="0" * 64, leaf=None)).hex(),
        "answer with size 5": encode_message(BlobReply(status="ok", size_bytes=5)).hex(),
        "priority of seeds 00…00 and 01…01 in round 7 of run abab…ab": (
            f"{priority(RUN.encode(), 7, zero.peer_id, one.peer_id):064x}"
        ),
    }
    section = TEXT.split("## 7. Vectors")[1]
    found = dict(line.strip().split(" = ") for line in section.splitlines() if line.strip())
    assert found == expected


def test_names_limits_and_fields_are_there() -> None:
    for name in (MANIFEST_PROTOCOL, STATUS_PROTOCOL, BLOB_PROTOCOL, EXCHANGE_PROTOCOL):
        assert f": `{name}`" in TEXT
    for name in (
        TASK_PROTOCOL,
        INPUT_PROTOCOL,
        NOTICE_PROTOCOL,
        PROBE_PROTOCOL,
        PLAN_PROTOCOL,
        STATE_PROTOCOL,
        FORWARD_PROTOCOL,
    ):
        assert f"`{name}`" in TEXT
    for limit in (MAX_HEADER_BYTES, MAX_DOCUMENT_BYTES):
        assert f"{limit:,}" in TEXT
    for field in PeerRecord.model_fields:
        assert f"`{field}`" in TEXT
    for message in (Propose, Answer, Offer, Ack, Task, Reply, InputRequest, Notice):
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| {message.__name__} |"))
        places = [row.index(f"`{field}`") for field in message.model_fields]
        assert places == sorted(places), "the order of the fields is the order in the signed statement"
