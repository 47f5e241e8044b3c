import json
import math

import pytest

from averaging.admission import Admission, AdmissionConfig, Distances, Verdict, token_shares
from protocol.ids import PeerId

CONFIG = AdmissionConfig()
ANN, BOB = PeerId("ann"), PeerId("bob")


def judge(
    admission: Admission, *, delta: float = 1.0, slow: float = 0.0, own: float = 1.0, peer: PeerId = ANN
) -> Verdict:
    return admission.judge(peer, Distances(delta=delta, slow=slow, own=own))


def with_history(*distances: float) -> Admission:
    admission = Admission(CONFIG)
    admission.load_state_dict({"delta": list(distances), "slow": list(distances), "accepted": {}})
    return admission


def test_cold_start_threshold_is_our_own_norm() -> None:
    assert Admission(CONFIG).thresholds(2.0) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("history", "threshold"), [([1.5, 9.0, 1.4], 1.5), ([100.0] * 5, 3.0), ([0.0] * 5, 1.0), ([1.0, 2.0], 1.5)]
)
def test_threshold_is_the_median_between_once_and_thrice_our_norm(history: list[float], threshold: float) -> None:
    assert with_history(*history).thresholds(1.0) == (threshold, threshold)


def test_equal_start_does_not_lock_everybody_out() -> None:
    """All peers begin with one φ: e = 0 in the first rounds must not refuse the first e > 0."""
    admission = Admission(CONFIG)
    for _ in range(16):
        assert judge(admission, slow=0.0).kind == "averaged"
    assert judge(admission, slow=0.8).kind == "averaged"


def test_clip_scales_the_difference_to_the_threshold() -> None:
    verdict = judge(Admission(CONFIG), delta=2.0, slow=2.5)
    assert verdict.kind == "clipped"
    assert verdict.delta_scale * 2.0 == pytest.approx(1.0)
    assert verdict.slow_scale * 2.5 == pytest.approx(1.0)


@pytest.mark.parametrize("which", ["delta", "slow"])
@pytest.mark.parametrize("distance", [3.01, 1e30, math.inf, math.nan])
def test_far_or_broken_updates_are_refused_and_leave_no_trace(which: str, distance: float) -> None:
    admission = Admission(CONFIG)
    before = admission.state_dict()
    verdict = admission.judge(ANN, Distances(**{"delta": 1.0, "slow": 0.0, "own": 1.0, which: distance}))
    assert verdict.kind == "refused"
    assert verdict.reason
    assert (verdict.weight, verdict.delta_scale, verdict.slow_scale) == (0.0, 0.0, 0.0)
    assert admission.state_dict() == before


def test_refusals_are_counted_until_the_next_acceptance() -> None:
    admission = Admission(CONFIG)
    for _ in range(3):
        judge(admission, delta=50.0)
    assert admission.refusals_in_a_row == 3
    judge(admission)
    assert admission.refusals_in_a_row == 0


def test_an_attacker_at_the_limit_can_not_raise_the_threshold_without_end() -> None:
    admission = Admission(CONFIG)
    for _ in range(100):
        judge(admission, delta=3.0 * admission.thresholds(1.0)[0])
    assert admission.thresholds(1.0)[0] == 3.0


def test_few_far_partners_are_refused_and_many_are_clipped() -> None:
    """After a partition half of the meetings are far in φ; refusing them for ever would keep the swarm split."""
    admission = Admission(CONFIG)
    few = [judge(admission, slow=20.0 if number % 4 == 0 else 0.5).kind for number in range(40)]
    assert few.count("refused") == 10
    many = [judge(admission, slow=20.0 if number % 2 == 0 else 0.5) for number in range(40)]
    assert "refused" not in {verdict.kind for verdict in many[20:]}
    assert all(verdict.slow_scale * 20.0 <= 3.0 for verdict in many[20::2])


def test_implausible_progress_is_refused_however_many_send_it() -> None:
    admission = Admission(CONFIG)
    assert {judge(admission, delta=50.0).kind for _ in range(40)} == {"refused"}


def test_newcomers_weight_ramps_per_peer() -> None:
    admission = Admission(CONFIG)
    weights = [judge(admission).weight for _ in range(12)]
    assert weights[0] == 0.25
    assert weights[5] == pytest.approx(0.625)
    assert weights[10:] == [1.0, 1.0]
    assert judge(admission, peer=BOB).weight == 0.25


def test_remembered_peers_are_bounded() -> None:
    admission = Admission(CONFIG)
    for number in range(4100):
        judge(admission, peer=PeerId(f"sybil{number}"))
        judge(admission, peer=ANN)
    accepted = admission.state_dict()["accepted"]
    assert len(accepted) == 4096
    assert accepted[ANN] == 4100


def test_without_config_only_broken_values_are_refused() -> None:
    admission = Admission(None)
    verdict = judge(admission, delta=1e9, slow=1e9)
    assert (verdict.kind, verdict.weight, verdict.delta_scale, verdict.slow_scale) == ("averaged", 1.0, 1.0, 1.0)
    assert judge(admission, delta=math.nan).kind == "refused"


def test_state_survives_json() -> None:
    admission = Admission(CONFIG)
    for distance in (0.5, 0.9, 1.4):
        judge(admission, delta=distance)
    restored = Admission(CONFIG)
    restored.load_state_dict(json.loads(json.dumps(admission.state_dict())))
    assert restored.state_dict() == admission.state_dict()
    assert judge(restored, delta=2.0) == judge(admission, delta=2.0)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"delta": [1.0], "slow": [math.nan], "accepted": {}},
        {"delta": [-1.0], "slow": [], "accepted": {}},
        {"delta": [], "slow": [], "accepted": {"ann": -3}},
        {"delta": [], "slow": [], "accepted": {"ann": 0.5}},
        {"delta": ["x"], "slow": [], "accepted": {}},
    ],
)
def test_malformed_state_is_refused(state: dict[str, object]) -> None:
    admission = with_history(1.0, 2.0)
    before = admission.state_dict()
    with pytest.raises(ValueError, match="admission history"):
        admission.load_state_dict(state)
    assert admission.state_dict() == before


def test_token_shares() -> None:
    assert token_shares(100, [100], CONFIG) == [0.5]
    assert token_shares(300, [100], CONFIG) == [0.25]
    assert token_shares(1, [1, 2], None) == [0.25, 0.5]
    assert token_shares(0, [0, 0], None) == pytest.approx([1 / 3, 1 / 3])
    assert token_shares(7, [], CONFIG) == []


def test_claimed_tokens_can_not_buy_all_the_weight() -> None:
    assert token_shares(100, [2**200], CONFIG) == pytest.approx([0.8])
    assert token_shares(0, [2**200], CONFIG)[0] <= 1.0
    assert token_shares(100, [-5], CONFIG) == [0.0]
