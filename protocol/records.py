"""What a peer says about itself: one signed record, refreshed every few seconds in the directory.

The same record lets others find the peer, choose it as a partner or donor, and draw the status page; so a page needs
no server of its own. It is small (≤ 4 KiB signed), every field is bounded, and the signature binds it to the libp2p identity:
the directory's subkey must equal the signer's peer id. Freshness is decided by `sequence`, never by a clock.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MAX_LINKS", "MAX_RECORD_BYTES", "MAX_ROUND", "ExchangeNote", "LinkNote", "PeerRecord", "SnapshotRef"]

MAX_RECORD_BYTES = 4096
MAX_ROUND = 10**9
"""More rounds than any run has: at one a second, 30 years."""
MAX_LINKS = 24
"""Links that a record tells of; fewer where long addresses take the room."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PeerIdText = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Round = Annotated[int, Field(ge=0, le=MAX_ROUND)]
Loss = Annotated[float, Field(ge=0.0, le=1e6)]
Seconds = Annotated[float, Field(ge=0.0, le=1e6)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class SnapshotRef(_Strict):
    """A whole training state that this peer holds, has checked, and serves to joiners."""

    round: Round
    root: Hash
    """Merkle root of the snapshot blob."""
    size_bytes: Count


class ExchangeNote(_Strict):
    """How one recent exchange ended."""

    round: Round
    partner: PeerIdText | None
    """None when no partner was found."""
    outcome: Literal["averaged", "clipped", "refused", "alone", "timeout", "lost"]
    """averaged, clipped (averaged after clipping), refused (partner's update was out of bounds), alone (no partner free),
    timeout (deadline passed), lost (partner vanished)."""
    seconds: Seconds


class LinkNote(_Strict):
    """What a peer has measured of the link from another peer to itself."""

    peer: Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{8}$")]
    """The last characters of the other one's id."""
    latency_s: Annotated[float, Field(ge=0.0, le=60.0)]
    """One way: half of the shortest round trip."""
    bytes_per_s: Annotated[float, Field(ge=0.0, le=1e12)] = 0.0
    """Goodput from the other one to this peer; 0 if not measured yet."""


class PeerRecord(_Strict):
    """One peer's self-description at one moment."""

    run: Hash
    peer: PeerIdText
    sequence: Count
    """Strictly increasing over the life of the identity, restarts included (milliseconds of the peer's clock, or last + 1)."""
    role: Literal["trainer", "bootstrap"]
    state: Literal["joining", "training", "leaving", "serving"]
    """joining: fetching state; training; leaving: said goodbye; serving: a bootstrap node."""
    name: Annotated[str, Field(max_length=32)] = ""
    """Chosen by the owner; shown as plain text only."""
    version: Annotated[str, Field(max_length=32)] = ""
    addresses: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=8)] = []
    started_at_s: Annotated[float, Field(ge=0.0, le=1e11)]
    """Unix time of the peer's start, by its own clock; for display only."""
    sent_at_s: Annotated[float, Field(ge=0.0, le=1e11)]
    """Unix time of this record, by the peer's clock. For display and the clock-skew warning; and the directory refuses
    an expiry long after it, so that an old record cannot be re-stored to outlive newer ones."""

    stage: Annotated[int, Field(ge=0, lt=64)] | None = None
    """The pipeline stage that this peer holds; None for a whole replica."""
    next_stage: Annotated[int, Field(ge=0, lt=64)] | None = None
    """The one that it goes to when the present iteration is over; None to stay."""
    iteration: Round = 0
    """The pipeline's iteration that it is in."""
    forward_s: Seconds = 0.0
    """Its stage's forward pass of one microbatch; 0 if not measured yet."""
    backward_s: Seconds = 0.0
    """The same for the backward pass."""
    loss_s: Seconds = 0.0
    """The same for head and loss, at stage 0."""
    links: Annotated[list[LinkNote], Field(max_length=MAX_LINKS)] = []
    plan: Round = 0
    """The number of the newest plan that it holds; 0 for none."""
    round: Round = 0
    step: Count = 0
    """Inner steps taken in this round."""
    inner_steps: Count = 0
    sequences_per_step: Count = 0
    tokens: Count = 0
    """Tokens trained by this peer in this run."""
    tokens_per_s: Annotated[float, Field(ge=0.0, le=1e12)] = 0.0
    train_loss: Loss | None = None
    val_loss: Loss | None = None
    """Loss on the held-out set after `val_round` rounds (0: before the first), nats per token."""
    val_round: Round | None = None
    eta_s: Annotated[float, Field(ge=0.0, le=1e9)] | None = None
    """Expected seconds to the end of the round."""
    sent_bytes: Count = 0
    received_bytes: Count = 0
    exchanges_ok: Count = 0
    exchanges_failed: Count = 0
    recent: Annotated[list[ExchangeNote], Field(max_length=4)] = []
    """Newest last."""
    snapshots: Annotated[list[SnapshotRef], Field(max_length=2)] = []
    """Newest last."""
    sketch: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """In the averaging after the last round: it agrees with its partners, and by this their models can be compared; else empty."""
    wants_state: bool = False
    """It has no state that it can train with the others from, or an old one: they publish one before its time."""
