"""The route in C does what the tiled one does, with every rule, format and kind of partner."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from averaging.codec import DELTA_CODECS
from averaging.native_passes import NativePasses
from averaging.outer import OuterConfig
from averaging.replica import Replica
from kernels import exchange
from tests.averaging.routes import CODECS, NUMEL, PAIR, THETA, config, differ_by, received, trained

pytestmark = pytest.mark.skipif(not exchange.is_available(), reason="no C compiler here")

BOTH = OuterConfig(algorithm="noloco")
OUTERS = {"pair": PAIR, "theta": THETA, "both": BOTH}
RARE_OUTERS = {
    "late": replace(BOTH, staleness_penalty=0.6),
    "clip": replace(BOTH, momentum_clip=0.5),
    "nesterov": OuterConfig(algorithm="diloco"),
    "heavy-ball": OuterConfig(algorithm="diloco", momentum="heavy-ball"),
    "sparseloco": OuterConfig(algorithm="sparseloco"),
    "no pull": OuterConfig(algorithm="sparseloco", gamma=0.0),
}


def assert_same_way(codec: str, **more: object) -> None:
    tiled, expected = trained(codec, compiled=False, **more)  # type: ignore[arg-type]
    native, found = trained(codec, compiled=True, **more)  # type: ignore[arg-type]
    assert all(isinstance(replica._passes, NativePasses) for replica in native)
    # Where φ differs in its last bit, it may be rounded to another code; where a lattice step does, all values of the block are.
    tolerance = {"fp32": 1e-6, "lattice": 1e-3}.get(codec, 1e-5)
    for mine, theirs in zip(native, tiled, strict=True):
        assert differ_by(mine.theta, theirs.theta) < tolerance
        assert differ_by(mine.phi, theirs.phi) < tolerance
        for name in ("momentum", "residual"):
            own = getattr(mine, name)
            if own.numel():
                assert differ_by(own, getattr(theirs, name)) < max(100 * tolerance, 1e-3)
    for outcome, other in zip(found, expected, strict=True):
        assert outcome.kind == other.kind
        assert outcome.step_scale == pytest.approx(other.step_scale, rel=1e-2)
        assert outcome.shift_norm == pytest.approx(other.shift_norm, rel=max(tolerance * 10, 1e-3))
        assert outcome.delta_norm == pytest.approx(other.delta_norm, rel=max(tolerance * 10, 1e-3))


@pytest.mark.parametrize(
    "more", [{}, {"late_steps": True}, {"members": 3}, {"fragments": 2}, {"fragments": 2, "blend": 0.5}], ids=str
)
@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("codec", CODECS)
def test_both_routes_agree(codec: str, outer: str, more: dict[str, object]) -> None:
    assert_same_way(codec, outer=OUTERS[outer], delta_codec="fp32", **more)


@pytest.mark.parametrize("more", [{}, {"late_steps": True, "members": 3}], ids=str)
@pytest.mark.parametrize("outer", RARE_OUTERS)
def test_both_routes_agree_on_rare_rules(outer: str, more: dict[str, object]) -> None:
    assert_same_way("fp32", outer=RARE_OUTERS[outer], delta_codec="q8", **more)


@pytest.mark.parametrize("more", [{"error_decay": 0.9}, {"members": 3, "fragments": 2}], ids=str)
@pytest.mark.parametrize("delta", [codec for codec in DELTA_CODECS if codec != "fp32"])
def test_both_routes_agree_on_deltas(delta: str, more: dict[str, object]) -> None:
    assert_same_way("bf16", outer=BOTH, delta_codec=delta, **more)


def test_threads_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("averaging.native_passes._PIECE_NUMEL", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for codec in ("q8", "lattice"):
        assert_same_way(codec, outer=THETA)


@pytest.mark.parametrize("outer", [PAIR, THETA, BOTH], ids=["pair", "theta", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("codec", ["lattice", "fp32"])
def test_a_diverged_round_leaves_the_slow_weights(codec: str, bad: float, outer: OuterConfig) -> None:
    replica = Replica(torch.randn(NUMEL), config(codec, compiled=True, outer=outer))
    phi = replica.phi.clone()
    replica.theta[-1] = bad
    with pytest.raises(FloatingPointError):
        replica.pack(round=0, tokens=1)
    assert torch.equal(replica.phi, phi)


@pytest.mark.parametrize("codec", CODECS)
def test_alone_a_pair_averaging_replica_does_not_change(codec: str) -> None:
    replica = Replica(torch.randn(NUMEL), config(codec, compiled=True))
    replica.theta.add_(1e-3)
    expected = replica.theta.clone()
    replica.pack(round=0, tokens=1)
    assert replica.apply([]).kind == "solo"
    assert torch.equal(replica.theta, expected)
    assert torch.equal(replica.phi, expected)


def test_pair_averaging_in_fp32_packs_by_one_copy_of_the_weights() -> None:
    """What is sent is the anchor as well: φ stays as it was until the step."""
    replica = Replica(torch.randn(NUMEL), config("fp32", compiled=True, outer=PAIR))
    phi = replica.phi.clone()
    replica.theta.add_(1e-3)
    expected = replica.theta.clone()
    update = replica.pack(round=0, tokens=1)
    assert bytes(update.slow) == expected.numpy().tobytes()
    assert torch.equal(replica.phi, phi)
    replica.theta.add_(1e-3)  # an inner step while the bytes travel
    assert replica.apply([], steps_since_pack=1).kind == "solo"
    assert torch.equal(replica.phi, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_equal_replicas_are_not_moved_and_a_block_of_nan_pulls_nobody(codec: str) -> None:
    start = torch.randn(NUMEL) * 0.02
    a, b = (Replica(start.clone(), config(codec, compiled=True)) for _ in range(2))
    for replica in (a, b):
        replica.theta.add_(1e-4)
    expected = a.theta.clone()
    sent = [received(replica.pack(round=0, tokens=10), name) for replica, name in ((a, "a"), (b, "b"))]
    assert a.apply([sent[1]]).kind == "averaged"
    assert torch.equal(a.theta, expected)
    sent[0].slow[:8] = b"\xff" * 8  # NaN in the first values, scales or steps
    outcome = b.apply([sent[0]])
    assert torch.equal(b.theta, expected)
    assert (outcome.kind == "refused") == (codec != "lattice")
    assert (outcome.unreadable_share > 0) == (codec == "lattice")


@pytest.mark.parametrize("delta", DELTA_CODECS)
def test_a_group_mean_counts_instead_of_the_partners_deltas(delta: str) -> None:
    outer, ends = OuterConfig(algorithm="diloco"), []
    for compiled in (False, True):
        start = torch.linspace(-0.02, 0.02, NUMEL)
        replica = Replica(start, config("bf16", compiled=compiled, outer=outer, delta_codec=delta))
        replica.theta.add_(torch.linspace(-1e-4, 3e-4, NUMEL))
        update = replica.pack(round=0, tokens=10)
        partner = received(update, "b")
        replica.apply([replace(partner, delta=memoryview(b""))], group_mean=partner.delta)
        ends.append(replica)
    for name in ("theta", "phi", "momentum"):
        assert differ_by(getattr(ends[1], name), getattr(ends[0], name)) < 1e-6
    if delta != "fp32":
        assert torch.allclose(ends[1].residual, ends[0].residual, atol=1e-9)


def test_a_rounding_error_is_not_taken_for_having_no_partners() -> None:
    """Without tokens of one's own the partners' shares may add up to a little more than 1."""
    tokens = (18, 9, 1)
    assert sum(each / sum(tokens) for each in tokens) > 1.0
    ends = []
    for compiled in (False, True):
        start = torch.linspace(-0.02, 0.02, NUMEL)
        more = {"admission": None, "outer": OuterConfig(algorithm="diloco"), "delta_codec": "fp32"}
        own, *others = (Replica(start.clone(), config("bf16", compiled=compiled, **more)) for _ in range(4))
        for replica, slope in zip((own, *others), (-4e-4, 3e-4, 2e-4, 1e-4), strict=True):
            replica.theta.add_(torch.linspace(0.0, slope, NUMEL))
        updates = [replica.pack(round=0, tokens=num) for replica, num in zip(others, tokens, strict=True)]
        own.pack(round=0, tokens=0)
        sent = [received(update, str(place)) for place, update in enumerate(updates)]
        assert own.apply(sent).kind == "averaged"
        ends.append(own)
    for name in ("theta", "phi", "momentum"):
        assert differ_by(getattr(ends[1], name), getattr(ends[0], name)) < 1e-6
