import json
import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    admission.load_state_dict(admission.state_dict() | {"delta": list(distances), "slow": list(distances)})
    return admission


def with_company(*names: str) -> Admission:
    """A peer that has met these partners, all of them near."""
    admission = Admission(CONFIG)
    for name in names:
        assert judge(admission, peer=PeerId(name)).kind == "averaged"
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
@pytest.mark.parametrize("distance", [3.01, 1e30])
def test_a_far_update_among_near_partners_is_refused(which: str, distance: float) -> None:
    admission = with_company("bob", "cyd")
    before = admission.state_dict()
    verdict = admission.judge(ANN, Distances(**{"delta": 1.0, "slow": 0.0, "own": 1.0, which: distance}))
    assert verdict.kind == "refused"
    assert verdict.reason
    assert (verdict.weight, verdict.delta_scale, verdict.slow_scale) == (0.0, 0.0, 0.0)
    after = admission.state_dict()
    assert all(after[name] == before[name] for name in ("delta", "slow", "familiarity"))


@pytest.mark.parametrize("which", ["delta", "slow"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("admission", [with_company("bob"), Admission(CONFIG), Admission(None)])
def test_broken_updates_are_always_refused(which: str, value: float, admission: Admission) -> None:
    verdict = admission.judge(ANN, Distances(**{"delta": 1.0, "slow": 0.0, "own": 1.0, which: value}))
    assert verdict.kind == "refused"
    assert "finite" in verdict.reason


def test_progress_of_another_order_of_magnitude_is_refused_even_from_the_only_partner() -> None:
    admission = Admission(CONFIG)
    assert judge(admission, delta=16.0).kind == "clipped"
    assert {judge(admission, delta=100.0).kind for _ in range(40)} == {"refused"}


def test_the_only_partner_is_never_locked_out() -> None:
    admission = Admission(CONFIG)
    assert {judge(admission, slow=1e6).kind for _ in range(40)} == {"clipped"}


def test_when_all_are_far_from_each_other_none_is_refused_twice() -> None:
    """Each far partner makes the next one's distance more credible."""
    admission = with_company("ann", "bob", "cyd")
    kinds = [judge(admission, slow=20.0, peer=PeerId(name)).kind for name in ("ann", "bob", "cyd") * 4]
    assert kinds[0] == "refused"
    assert set(kinds[1:]) == {"clipped"}


@given(
    meetings=st.lists(
        st.tuples(st.integers(0, 9), st.floats(0.0, 1e6), st.floats(0.0, 1e6), st.floats(1e-3, 10.0)), max_size=120
    )
)
def test_no_meeting_moves_us_by_more_than_a_few_of_our_own_steps(
    meetings: list[tuple[int, float, float, float]],
) -> None:
    """Whoever sends what in which order: the influence of one exchange follows our own largest recent progress."""
    admission, own_norms = Admission(CONFIG), deque[float](maxlen=CONFIG.history + 1)
    for number, delta, slow, own in meetings:
        own_norms.append(own)
        verdict = judge(admission, delta=delta, slow=slow, own=own, peer=PeerId(f"peer{number}"))
        limit = CONFIG.clip_factor * max(own_norms) * (1.0 + 1e-9)
        assert verdict.weight * verdict.delta_scale * delta <= limit
        assert verdict.weight * verdict.slow_scale * slow <= limit


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=120))
def test_fewer_than_a_third_of_the_partners_met_last_are_ever_refused(meetings: list[tuple[int, bool]]) -> None:
    admission, latest = Admission(CONFIG), dict[int, str]()
    for number, is_far in meetings:
        latest.pop(number, None)
        latest[number] = judge(admission, slow=20.0 if is_far else 0.5, peer=PeerId(f"peer{number}")).kind
        if latest[number] == "refused":
            far = list(latest.values()).count("refused") - 1
            assert 3 * far < max(1, len(latest) - 1)


def test_who_is_far_from_everybody_is_astray() -> None:
    admission = with_company("ann", "bob", "cyd")
    for name in ("ann", "bob", "ann"):
        judge(admission, slow=1e4, peer=PeerId(name))
        assert not admission.is_astray
    judge(admission, slow=1e4, peer=PeerId("cyd"))
    assert admission.is_astray
    judge(admission, slow=0.5, peer=PeerId("dan"))
    assert not admission.is_astray


def test_nobody_is_astray_for_one_partner_s_sake_or_for_what_averaging_mends() -> None:
    alone_with_ann, drifting = Admission(CONFIG), with_company("ann", "bob", "cyd")
    for name in ("ann", "bob", "cyd") * 3:
        judge(alone_with_ann, slow=1e4, peer=ANN)
        judge(drifting, slow=20.0, peer=PeerId(name))
    assert not alone_with_ann.is_astray
    assert not drifting.is_astray


def test_what_cannot_be_read_leads_astray_only_after_the_window_has_had_time_to_widen() -> None:
    admission = with_company("ann", "bob")
    for meeting in range(16):
        assert not admission.is_astray, meeting
        verdict = judge(admission, slow=math.inf, peer=PeerId("ann" if meeting % 2 else "bob"))
        assert verdict.kind == "refused"
    assert admission.is_astray
    admission.start_anew()
    assert not admission.is_astray


def test_one_readable_partner_ends_the_doubt() -> None:
    admission = Admission(CONFIG)
    for _ in range(4):
        for name in ("ann", "bob", "ann", "bob"):
            judge(admission, slow=math.inf, peer=PeerId(name))
        judge(admission, slow=0.5, peer=PeerId("cyd"))
    assert not admission.is_astray


def test_what_cannot_be_read_says_nothing_about_who_is_near() -> None:
    """Neither does it make a far partner more credible, nor is it held against the one that sent it."""
    admission = with_company("bob", "cyd")
    before = admission.state_dict()
    for name in ("bob", "cyd", "dan", "eve"):
        judge(admission, slow=math.inf, peer=PeerId(name))
    assert admission.state_dict() == before
    assert judge(admission, slow=20.0).kind == "refused", "most of the others are near, as before"
    assert judge(admission, slow=0.5, peer=PeerId("dan")).kind == "averaged"


def test_an_attacker_at_the_limit_can_not_raise_the_threshold_without_end() -> None:
    admission = Admission(CONFIG)
    for _ in range(100):
        judge(admission, delta=3.0 * admission.thresholds(1.0)[0])
    assert admission.thresholds(1.0)[0] == 3.0


def test_one_round_without_progress_does_not_close_the_door() -> None:
    """A round that diverged is given up and sends Δ = 0."""
    admission = with_company("ann", "bob", "cyd")
    assert judge(admission, slow=0.8, own=0.0).kind == "averaged"


def test_without_config_only_broken_values_are_refused() -> None:
    admission = Admission(None)
    verdict = judge(admission, delta=1e9, slow=1e9)
    assert (verdict.kind, verdict.weight, verdict.delta_scale, verdict.slow_scale) == ("averaged", 1.0, 1.0, 1.0)
    assert judge(admission, delta=math.nan).kind == "refused"
    for _ in range(20):
        for name in "ab":
            assert judge(admission, slow=math.inf, peer=PeerId(name)).kind == "refused"
            assert judge(admission, slow=1.0, peer=PeerId(name)).kind == "averaged"
    assert not admission.is_astray, "unreadable now and then is not astray"


def test_state_survives_json() -> None:
    admission = Admission(CONFIG)
    for distance in (0.5, 0.9, 1.4):
        judge(admission, delta=distance)
    restored = Admission(CONFIG)
    restored.load_state_dict(json.loads(json.dumps(admission.state_dict())))
    assert restored.state_dict() == admission.state_dict()
    assert judge(restored, delta=2.0) == judge(admission, delta=2.0)


@pytest.mark.parametrize(
    "damage",
    [
        {"delta": None},
        {"slow": [math.nan]},
        {"own": [-1.0]},
        {"delta": ["x"]},
        {"far": []},
        {"far": {"ann": 1}},
        {"familiarity": None},
        {"familiarity": {"accepted": {"ann": -3}, "strangeness": []}},
    ],
)
def test_malformed_state_is_refused(damage: dict[str, object]) -> None:
    admission = with_history(1.0, 2.0)
    before = admission.state_dict()
    with pytest.raises(ValueError, match="admission history"):
        admission.load_state_dict(before | damage)
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
