"""The headers of `/llm-node/stage/1`. A stream carries one task of one microbatch from the peer that holds it to the next one.

    holder                                 next peer
    Task      ──────────────────────────►            what it is, and the whole path
    payload   ──────────────────────────►            activations or gradients, length known from the manifest
              ◄──────────────────────────  Reply     ok: I have room; else why not, and the rest of the payload is not read
    ── forward and loss ──
              ◄──────────────────────────  Reply     trying: computed, and I am looking for somebody to take it; any number of these
              ◄──────────────────────────  Reply     ok: somebody after me has it, or I keep it; the holder may forget the stream
    ── backward ──
              ◄──────────────────────────  Reply     ok: computed, not counted yet
    Reply     ──────────────────────────►            ok: count it; else I have given you up, throw it away

`/llm-node/stage-input/1` asks a peer for the bytes that it sent on for a microbatch, so that another replica can run the next stage
again. `/llm-node/stage-notice/1` carries one Notice and no answer.

Shape only is checked here; whether a task fits is checked by node/pipeline/ledger.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.wire import Message

__all__ = [
    "INPUT_PROTOCOL",
    "MAX_PATH",
    "NOTICE_PROTOCOL",
    "TASK_PROTOCOL",
    "InputRequest",
    "Notice",
    "Refusal",
    "Reply",
    "Task",
]

TASK_PROTOCOL = "/llm-node/stage/1"
INPUT_PROTOCOL = "/llm-node/stage-input/1"
NOTICE_PROTOCOL = "/llm-node/stage-notice/1"
MAX_PATH = 64

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PeerIdText = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]

Refusal = Literal["wrong-run", "stale", "early", "full", "not-for-me", "unknown", "bad-payload", "failed"]
"""wrong-run: I train another run. stale: I have ended that iteration. early: I have not begun it. full: I hold too many
microbatches. not-for-me: the path does not lead here from you. unknown: I never saw that microbatch. bad-payload: values nobody
honest sends. failed: I could neither keep it nor pass it on."""


class Task(Message):
    """One visit of one microbatch."""

    run: Hash
    iteration: Count
    microbatch: Count
    """A number that the origin, path[0], has drawn at random: only those on the path know it, so nobody else can name it."""
    kind: Literal["forward", "loss", "backward", "again"]
    """again: a backward pass for a microbatch whose forward pass was run by another replica, which is gone."""
    path: Annotated[list[PeerIdText], Field(min_length=1, max_length=MAX_PATH)]
    """The whole path: travelled so far, and still to come."""
    position: Annotated[int, Field(ge=0, lt=MAX_PATH)]
    """Of the receiver in the path; 0 for the loss."""
    priority: Annotated[int, Field(ge=0, lt=1 << 20)] = 0
    """Lower goes first."""
    payload_bytes: Count
    """Length of a microbatch's encoded activations; whoever expects another has another shape."""


class Reply(Message):
    """Yes, or why not."""

    ok: bool
    reason: Refusal | Literal["", "trying"] = ""
    """trying: comes with a yes that is not the last word."""


class InputRequest(Message):
    """Asks for what the receiver sent on in its forward pass."""

    run: Hash
    iteration: Count
    origin: PeerIdText
    microbatch: Count


class Notice(Message):
    """Something to know, unasked."""

    run: Hash
    iteration: Count
    kind: Literal["lost", "lost-gradient", "end"]
    """lost: one of the receiver's microbatches goes no further, lost-gradient: on its way back. end: none of the sender's is under
    way any more."""
    microbatch: Count = 0
    """Which one, where it is lost."""
