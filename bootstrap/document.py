"""The status document: what the page, `/api/v1/status`, `/metrics` and the stream `/llm-node/status/1` all show.

One strict schema serves both ends: `bootstrap.summary` builds a document from signed records, and `node.status` checks one
that a stranger sent. Every list is capped, so that a document of a very large swarm stays below MAX_DOCUMENT_BYTES, and
every text is made printable here, since names come from strangers and end in browsers and terminals (escape sequences
and characters that reverse the reading direction are replaced).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import ProtocolError

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "MAX_EXCHANGES",
    "MAX_PEERS",
    "MAX_POINTS",
    "MAX_WARNINGS",
    "STATUS_PROTOCOL",
    "ExchangeStatus",
    "PeerState",
    "PeerStatus",
    "RunStatus",
    "StageStatus",
    "StatusDocument",
    "SwarmStatus",
    "display_name",
    "encode_document",
    "parse_document",
    "printable",
]

STATUS_PROTOCOL = "/llm-node/status/1"
MAX_DOCUMENT_BYTES = 1 << 20
MAX_PEERS = 500
"""Peers listed one by one; the totals count all."""
MAX_STAGES = 64
MAX_EXCHANGES = 50
MAX_POINTS = 600
"""Rounds in the validation curve; longer histories are thinned evenly."""
MAX_WARNINGS = 20

PeerState = Literal["joining", "training", "leaving", "serving", "silent"]
"""What the peer last said, or silent: its record has lapsed without a goodbye."""


def printable(text: str) -> str:
    """`text` with every character that is not plainly visible (controls, escapes, bidirectional marks) replaced by ·."""
    return "".join(char if char.isprintable() else "·" for char in text)


def display_name(name: str, peer: str) -> str:
    """A peer's chosen name, or else the last eight characters of its id (the first ones are the same for everybody)."""
    return name.strip() or f"…{peer[-8:]}"


Text = Annotated[str, Field(max_length=256), AfterValidator(printable)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PeerIdText = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
Count = Annotated[int, Field(ge=0, lt=2**80)]
"""Sums of 63-bit counts fit too, over as many peers as a store remembers."""
Loss = Annotated[float, Field(ge=0.0, le=1e6)]
Seconds = Annotated[float, Field(ge=0.0, le=1e11)]
Rate = Annotated[float, Field(ge=0.0, le=1e18)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class RunStatus(_Strict):
    """What is being trained; from the signed manifest."""

    id: Hash
    name: Text
    organiser: PeerIdText
    algorithm: Text
    data: Text
    parameters: Count
    vocab_size: Count
    train_tokens: Count
    """Tokens in the run's own shards; 0 when every volunteer trains on their own files."""
    inner_steps: Count
    sequence_tokens: Count
    total_rounds: Count
    """0: a run without end."""
    round_target_s: Seconds
    stages: Count
    """Pipeline stages; 1: every peer trains the whole model."""


class StageStatus(_Strict):
    """One stage of a pipeline, all its peers together."""

    stage: Count
    peers: Count
    """Trainers of it heard of lately."""
    microbatches_per_s: Rate
    """Forward passes that they say they could do together."""


class SwarmStatus(_Strict):
    """All peers together. Totals cover every peer ever heard of; rates and counts only those heard of lately."""

    peers: Count
    """Trainers heard of lately, joining ones included."""
    training: Count
    round: Count
    """The round that at least half of the training peers have reached (of the last known ones when nobody trains)."""
    tokens_per_s: Rate
    tokens: Count
    val_loss: Loss | None
    """Mean over peers at the newest round that at least half of them have measured, nats per token."""
    val_round: Count | None
    exchanges_ok: Count
    exchanges_failed: Count
    sent_bytes: Count
    received_bytes: Count


class PeerStatus(_Strict):
    """One peer as its newest signed record describes it."""

    peer: PeerIdText
    name: Text
    role: Literal["trainer", "bootstrap"]
    state: PeerState
    version: Text
    stage: Count | None
    """The pipeline stage that it holds; None for a whole replica."""
    round: Count
    step: Count
    inner_steps: Count
    tokens: Count
    tokens_per_s: Rate
    train_loss: Loss | None
    val_loss: Loss | None
    val_round: Count | None
    eta_s: Seconds | None
    sent_bytes: Count
    received_bytes: Count
    exchanges_ok: Count
    exchanges_failed: Count
    age_s: Seconds
    """Seconds since the newest record arrived, by the collector's clock."""


class ExchangeStatus(_Strict):
    """How one exchange ended, as `peer` reports it."""

    peer: PeerIdText
    name: Text
    partner: PeerIdText | None
    partner_name: Text
    round: Count
    outcome: Literal["averaged", "clipped", "refused", "alone", "timeout", "lost"]
    seconds: Annotated[float, Field(ge=0.0, le=1e6)]


ValPoint = tuple[Count, Loss, Loss, Loss, Count]
"""Round, mean, smallest, largest, number of peers."""


class StatusDocument(_Strict):
    """The whole document."""

    format: Literal[1] = 1
    generated_at_s: Seconds
    """Unix time by the collector's clock."""
    run: RunStatus
    swarm: SwarmStatus
    stages: Annotated[list[StageStatus], Field(max_length=MAX_STAGES)]
    """In order; empty where every peer trains the whole model."""
    peers: Annotated[list[PeerStatus], Field(max_length=MAX_PEERS)]
    exchanges: Annotated[list[ExchangeStatus], Field(max_length=MAX_EXCHANGES)]
    """Newest first."""
    val_loss: Annotated[list[ValPoint], Field(max_length=MAX_POINTS)]
    """By round, oldest first."""
    warnings: Annotated[list[Text], Field(max_length=MAX_WARNINGS)]


def encode_document(document: dict[str, Any]) -> bytes:
    """UTF-8 JSON of a document built by `bootstrap.summary.swarm_status`."""
    data = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    assert len(data) <= MAX_DOCUMENT_BYTES, "the caps on lists keep a document below its limit"
    return data


def parse_document(data: bytes) -> dict[str, Any]:
    """Check a document that a peer sent.

    Returns:
        The document as a JSON-able dictionary.

    Raises:
        ProtocolError: too large, not JSON, or not in this schema.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ProtocolError(f"status document exceeds {MAX_DOCUMENT_BYTES} bytes")
    try:
        return StatusDocument.model_validate_json(data).model_dump(mode="json")
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(part if isinstance(part, str) and part.isidentifier() else "#" for part in problem["loc"][:4])
        raise ProtocolError(f"status document: {where or 'document'}: {problem['type']}") from None
