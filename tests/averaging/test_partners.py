"""Partners' factors: tokens, newcomers, clipping, and the age of what they send."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from averaging.admission import Admission, AdmissionConfig, Distances, Verdict
from averaging.partners import Measurement, Partner, TileNorm, weigh_partners
from averaging.replica_config import ReplicaConfig
from protocol.ids import PeerId

OPEN = ReplicaConfig(admission=None, lag_decay=0.5)
NOTHING = torch.empty(0, dtype=torch.uint8)


def partner(name: str, *, tokens: int = 100, lag_rounds: int = 0) -> Partner:
    return Partner(PeerId(name), tokens, lag_rounds, NOTHING, NOTHING)


def factors(partners: list[Partner], config: ReplicaConfig = OPEN, **verdicts: Verdict) -> dict[str, list[float]]:
    accepted = {p.peer: verdicts.get(p.peer, Verdict(kind="averaged")) for p in partners}
    weighed = weigh_partners(partners, accepted, own_tokens=100, config=config)
    return {p.peer: [p.delta_factor, p.slow_factor] for p in weighed}


def test_tokens_weigh_progress_and_heads_weigh_slow_weights() -> None:
    assert factors([partner("a", tokens=300)]) == {"a": [0.75, 0.5]}
    assert factors([partner("a"), partner("b", tokens=200)]) == {"a": [0.25, 1 / 3], "b": [0.5, 1 / 3]}


@pytest.mark.parametrize("lag_rounds", [0, 1, 2])
def test_a_stale_partner_counts_less(lag_rounds: int) -> None:
    assert factors([partner("a", lag_rounds=lag_rounds)]) == {"a": [0.5 * 0.5**lag_rounds] * 2}
    assert factors([partner("a", lag_rounds=lag_rounds)], replace(OPEN, lag_decay=1.0)) == {"a": [0.5, 0.5]}


def test_refused_partners_are_left_out_and_verdicts_multiply() -> None:
    clipped = Verdict(kind="clipped", weight=0.5, delta_scale=0.2, slow_scale=0.4)
    found = factors([partner("a"), partner("b")], a=Verdict.refused("far"), b=clipped)
    assert found == {"b": [pytest.approx(0.5 * 0.5 * 0.2), pytest.approx(0.5 * 0.5 * 0.4)]}


def measured(slow: float, *, num_unreadable: int) -> Measurement:
    found = Measurement(num_unreadable=num_unreadable, num_blocks=10)
    found.slow.add(torch.tensor([slow]))
    return found


def test_a_partner_that_is_mostly_unreadable_is_refused() -> None:
    admission = Admission(AdmissionConfig())
    peer = PeerId("a")
    half = measured(0.5, num_unreadable=5).judge(peer, own=1.0, admission=admission)
    assert half.kind == "averaged"
    assert half.distances == Distances(delta=0.0, slow=0.5, own=1.0)
    most = measured(0.5, num_unreadable=6).judge(peer, own=1.0, admission=admission)
    assert most.kind == "refused"
    assert most.reason == "replicas are too far apart for the lattice codec"


def test_values_that_overflow_are_not_taken_for_unreadable() -> None:
    admission = Admission(AdmissionConfig())
    for _ in range(100):
        for name in "abc":
            verdict = measured(1e30, num_unreadable=0).judge(PeerId(name), own=1.0, admission=admission)
            assert verdict.kind == "refused"
    assert not admission.is_astray


def test_a_norm_shows_what_is_not_finite() -> None:
    norm = TileNorm()
    assert norm.total() == 0.0
    norm.add(torch.tensor([3.0, 0.0]))
    norm.add(torch.tensor([4.0]))
    assert norm.total() == 5.0
    norm.add(torch.tensor([torch.nan]))
    assert norm.total() != norm.total()
