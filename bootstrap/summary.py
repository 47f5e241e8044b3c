"""Draws up the status document: what a swarm of signed records amounts to.

Records are claims by strangers. One peer's claim must not spoil everybody's picture, so the swarm's round is the one that
half of the live trainers have reached, validation losses far above a uniform guess (ln vocab_size) stay out of the curve and
are named in a warning, and rounds from the future are not drawn. Everything else is shown as claimed, beside its claimant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bootstrap.document import (
    MAX_EXCHANGES,
    MAX_PEERS,
    MAX_POINTS,
    MAX_WARNINGS,
    ExchangeStatus,
    PeerState,
    PeerStatus,
    RunStatus,
    StageStatus,
    StatusDocument,
    SwarmStatus,
    display_name,
)
from bootstrap.store import SeenRecord, StatusStore, StoredExchange, ValRound
from protocol.ids import PeerId
from protocol.manifest import Manifest

__all__ = ["CLOCK_SKEW_S", "FORGET_AFTER_S", "SILENT_AFTER_S", "swarm_status"]

SILENT_AFTER_S = 45.0
"""A record older than this counts as lapsed (the directory's time to live)."""
FORGET_AFTER_S = 600.0
"""Silent and departed peers leave the list after this; the totals keep them."""
CLOCK_SKEW_S = 30.0
"""Difference between a peer's clock and ours that is worth a warning; the directory itself takes some seconds."""
LEAST_PASS_S = 1e-6
"""A shorter forward pass is a lie, and one over it might be infinite."""
_LIVE_STATES = ("joining", "training")


def swarm_status(store: StatusStore, manifest: Manifest, *, now_s: float) -> dict[str, Any]:
    """Build the status document from what the collector stored.

    Args:
        store: the history of this run.
        manifest: of this run.
        now_s: Unix time.

    Returns:
        A JSON-able dictionary in the schema `bootstrap.document.StatusDocument`.
    """
    now_s = max(now_s, 0.0)
    peers = _peers(store.latest, now_s)
    live = [peer for peer in peers if peer.role == "trainer" and peer.state in _LIVE_STATES]
    swarm_round = _swarm_round(live, store.latest.values())
    credible = store.val_rounds(
        max_round=swarm_round + manifest.sync.max_lag_rounds + 1, max_loss=_credible_loss(manifest)
    )
    document = StatusDocument(
        generated_at_s=now_s,
        run=_run(manifest),
        swarm=_swarm(store.latest.values(), live, swarm_round, credible),
        stages=_stages(manifest, live, store.latest),
        peers=peers[:MAX_PEERS],
        exchanges=_exchanges(store.exchanges(limit=2 * MAX_EXCHANGES), store.latest),
        val_loss=[(p.round, p.mean, p.smallest, p.largest, p.num_peers) for p in _thinned(credible, MAX_POINTS)],
        warnings=_warnings(store, peers, manifest, swarm_round)[:MAX_WARNINGS],
    )
    return document.model_dump(mode="json")


def _run(manifest: Manifest) -> RunStatus:
    return RunStatus(
        id=manifest.run_id,
        name=manifest.name,
        organiser=manifest.organiser,
        algorithm=manifest.sync.algorithm,
        data=manifest.data.kind,
        parameters=manifest.model.num_parameters,
        vocab_size=manifest.model.vocab_size,
        train_tokens=manifest.data.train_tokens,
        inner_steps=manifest.sync.inner_steps,
        sequence_tokens=manifest.inner.sequence_tokens,
        total_rounds=manifest.sync.total_rounds,
        round_target_s=manifest.sync.round_target_s,
        stages=manifest.pipeline.stages,
    )


def _stages(manifest: Manifest, live: list[PeerStatus], latest: Mapping[PeerId, SeenRecord]) -> list[StageStatus]:
    """Who holds what of a pipeline."""
    if manifest.pipeline.stages == 1:
        return []
    held: dict[int, list[float]] = {stage: [] for stage in range(manifest.pipeline.stages)}
    for peer in live:
        if peer.stage in held and peer.state == "training":
            held[peer.stage].append(latest[PeerId(peer.peer)].record.forward_s)
    return [
        StageStatus(
            stage=stage,
            peers=len(forward_s),
            microbatches_per_s=math.fsum(1.0 / max(each, LEAST_PASS_S) for each in forward_s if each),
        )
        for stage, forward_s in held.items()
    ]


def _peers(latest: Mapping[PeerId, SeenRecord], now_s: float) -> list[PeerStatus]:
    """Peers worth listing: trainers first, the furthest first, silent ones last."""
    shown = [_peer(seen, now_s) for seen in latest.values() if now_s - seen.seen_at_s <= FORGET_AFTER_S]
    order = {"training": 0, "joining": 1, "serving": 2, "leaving": 3, "silent": 4}
    shown.sort(key=lambda peer: (order[peer.state], -peer.round, -peer.tokens, peer.peer))
    return shown


def _peer(seen: SeenRecord, now_s: float) -> PeerStatus:
    record = seen.record
    age_s = max(now_s - seen.seen_at_s, 0.0)
    state: PeerState = "silent" if age_s > SILENT_AFTER_S and record.state != "leaving" else record.state
    is_active = state in _LIVE_STATES
    return PeerStatus(
        peer=record.peer,
        name=record.name,
        role=record.role,
        state=state,
        version=record.version,
        stage=record.stage,
        round=record.round,
        step=record.step,
        inner_steps=record.inner_steps,
        tokens=record.tokens,
        tokens_per_s=record.tokens_per_s if is_active else 0.0,
        train_loss=record.train_loss,
        val_loss=record.val_loss,
        val_round=record.val_round,
        eta_s=record.eta_s if is_active else None,
        sent_bytes=record.sent_bytes,
        received_bytes=record.received_bytes,
        exchanges_ok=record.exchanges_ok,
        exchanges_failed=record.exchanges_failed,
        age_s=age_s,
    )


def _swarm(
    seen: Iterable[SeenRecord], live: list[PeerStatus], swarm_round: int, credible: list[ValRound]
) -> SwarmStatus:
    records = [item.record for item in seen]
    num_training = sum(peer.state == "training" for peer in live)
    newest = _newest_common(credible, num_training)
    return SwarmStatus(
        peers=len(live),
        training=num_training,
        round=swarm_round,
        tokens_per_s=math.fsum(peer.tokens_per_s for peer in live),
        tokens=sum(record.tokens for record in records),
        val_loss=newest.mean if newest else None,
        val_round=newest.round if newest else None,
        exchanges_ok=sum(record.exchanges_ok for record in records),
        exchanges_failed=sum(record.exchanges_failed for record in records),
        sent_bytes=sum(record.sent_bytes for record in records),
        received_bytes=sum(record.received_bytes for record in records),
    )


def _swarm_round(live: list[PeerStatus], seen: Iterable[SeenRecord]) -> int:
    rounds = [peer.round for peer in live if peer.state == "training"]
    if not rounds:  # the run is over or paused: its curve and its round stay on the page
        rounds = [item.record.round for item in seen if item.record.role == "trainer" and item.record.round]
    return sorted(rounds, reverse=True)[(len(rounds) - 1) // 2] if rounds else 0


def _newest_common(points: list[ValRound], num_training: int) -> ValRound | None:
    """The newest round that half of the swarm has measured: the mean over the first to finish would flicker."""
    for point in reversed(points):
        if 2 * point.num_peers >= num_training:
            return point
    return points[-1] if points else None


def _credible_loss(manifest: Manifest) -> float:
    # An untrained model guesses uniformly: ln(vocab). Bad luck or a bad start may double that, nothing honest goes beyond.
    return 2.0 * math.log(manifest.model.vocab_size)


def _exchanges(stored: list[StoredExchange], latest: Mapping[PeerId, SeenRecord]) -> list[ExchangeStatus]:
    """Both partners report an exchange; told alike, it is listed once."""
    once: dict[tuple[int, str, frozenset[PeerId | None]], StoredExchange] = {}
    for item in stored:
        once.setdefault((item.round, item.outcome, frozenset((item.peer, item.partner))), item)
    return [_exchange(item, latest) for item in list(once.values())[:MAX_EXCHANGES]]


def _exchange(item: StoredExchange, latest: Mapping[PeerId, SeenRecord]) -> ExchangeStatus:
    def name_of(peer: PeerId | None) -> str:
        if peer is None:
            return ""
        return display_name(latest[peer].record.name if peer in latest else "", peer)

    return ExchangeStatus(
        peer=item.peer,
        name=name_of(item.peer),
        partner=item.partner,
        partner_name=name_of(item.partner),
        round=item.round,
        outcome=item.outcome,
        seconds=item.seconds,
    )


def _thinned(points: list[ValRound], limit: int) -> list[ValRound]:
    """At most `limit` points, evenly chosen, the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[i * (len(points) - 1) // (limit - 1)] for i in range(limit)]


def _warnings(store: StatusStore, peers: list[PeerStatus], manifest: Manifest, swarm_round: int) -> list[str]:
    found = []
    if store.problem is not None:
        found.append(
            f"The status history is not being written ({store.problem}); free some disk space. Training goes on."
        )
    lost = [str(number) for number in _lost_stages(manifest, peers)]
    if lost:
        found.append(
            f"Nobody holds stage {', '.join(lost)} of the pipeline; another peer moves there, or let one more join."
        )
    for peer in peers:
        found += _peer_warnings(peer, store.latest[PeerId(peer.peer)], manifest, swarm_round)
    return found


def _lost_stages(manifest: Manifest, peers: list[PeerStatus]) -> list[int]:
    """Stages without a live peer, while others train."""
    live = [peer for peer in peers if peer.state in _LIVE_STATES and peer.stage is not None]
    held = {peer.stage for peer in live}
    is_at_work = any(peer.state == "training" for peer in live)
    return [stage for stage in range(manifest.pipeline.stages) if stage not in held] if is_at_work else []


def _peer_warnings(peer: PeerStatus, seen: SeenRecord, manifest: Manifest, swarm_round: int) -> list[str]:
    name = display_name(peer.name, peer.peer)
    if peer.state == "silent":
        return [f"{name} has not been heard of for {peer.age_s:.0f} s; it may have lost its network or its power."]
    if peer.state == "leaving":
        return []
    found = []
    skew_s = seen.record.sent_at_s - seen.seen_at_s
    if abs(skew_s) > CLOCK_SKEW_S:
        direction = "ahead of" if skew_s > 0 else "behind"
        found.append(f"The clock of {name} is {abs(skew_s):.0f} s {direction} ours; set it by network time.")
    if peer.val_loss is not None and peer.val_loss > _credible_loss(manifest):
        found.append(
            f"{name} reports a validation loss of {peer.val_loss:.3g}; that is worse than guessing, so it is left out."
        )
    lag = swarm_round - peer.round
    if peer.state == "training" and lag > manifest.sync.max_lag_rounds:
        found.append(f"{name} is {lag} rounds behind the swarm and trains alone until it has caught up.")
    return found
