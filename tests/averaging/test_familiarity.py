import pytest

from averaging.familiarity import Familiarity
from protocol.ids import PeerId

ANN, BOB = PeerId("ann"), PeerId("bob")


def acquainted(*names: str, times: int = 10) -> Familiarity:
    """Somebody who has met these partners so often, and nobody else."""
    familiarity = Familiarity(newcomer_weight=0.25, num_exchanges=10, window=16)
    for _ in range(times):
        for name in names:
            familiarity.met(PeerId(name))
    return familiarity


def test_at_the_beginning_of_a_run_everybody_counts_fully() -> None:
    """All are new to each other, so that being new tells nothing."""
    familiarity = acquainted()
    for number in range(40):
        assert familiarity.weight(PeerId(f"peer{number}")) == 1.0
        familiarity.met(PeerId(f"peer{number}"))


def test_a_stranger_among_acquaintances_ramps_up() -> None:
    familiarity = acquainted("bob", "cyd", times=30)
    weights = []
    for _ in range(11):
        for name in ("ann", "bob", "cyd", "bob", "cyd"):
            if name == "ann":
                weights.append(familiarity.weight(ANN))
            familiarity.met(PeerId(name))
    assert weights[0] == 0.25
    assert weights == sorted(weights)
    assert weights[5] < 0.7
    assert weights[10] == 1.0
    assert familiarity.weight(BOB) == 1.0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_made_up_identities_gain_no_more_than_their_share_of_the_meetings(share: float) -> None:
    familiarity = acquainted("bob", "cyd", times=30)
    for number in range(200):
        is_sybil = int((number + 1) * share) > int(number * share)
        familiarity.met(PeerId(f"sybil{number}") if is_sybil else BOB)
    assert familiarity.weight(ANN) == pytest.approx(0.25 + 0.75 * share, abs=0.05)


def test_remembered_peers_are_bounded() -> None:
    familiarity = acquainted()
    for number in range(4100):
        familiarity.met(PeerId(f"sybil{number}"))
        familiarity.met(ANN)
    accepted = familiarity.state_dict()["accepted"]
    assert len(accepted) == 4096
    assert accepted[ANN] == 4100


def test_state_restores_the_same_weights() -> None:
    familiarity, restored = acquainted("bob", "cyd", times=12), acquainted()
    restored.load_state_dict(familiarity.state_dict())
    assert restored.state_dict() == familiarity.state_dict()
    assert [restored.weight(peer) for peer in (ANN, BOB)] == [familiarity.weight(peer) for peer in (ANN, BOB)]
    assert restored.weight(ANN) < restored.weight(BOB)


@pytest.mark.parametrize("strangeness", [None, [2.0], [-0.1], ["x"], [float("nan")]])
def test_malformed_state_is_refused(strangeness: object) -> None:
    familiarity = acquainted("bob")
    before = familiarity.state_dict()
    with pytest.raises(ValueError, match="admission history"):
        familiarity.load_state_dict({"accepted": {}, "strangeness": strangeness})
    assert familiarity.state_dict() == before
