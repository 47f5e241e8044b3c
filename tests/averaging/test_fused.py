"""The compiled route does what the tiled one does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import averaging.fused
import averaging.replica
from averaging.outer import OuterConfig
from averaging.replica import Replica
from kernels.dispatch import compiler_works
from tests.averaging.routes import CODECS, NUMEL, PAIR, THETA, config, differ_by, received, trained


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same functions without torch.compile, which takes seconds each."""
    monkeypatch.setattr(averaging.replica, "use_native", lambda numel, wanted, device: False)
    monkeypatch.setattr(averaging.replica, "use_compiled", lambda numel, wanted: wanted)
    monkeypatch.setattr(averaging.fused, "compiled_version", lambda function: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"late_steps": True},
        {"members": 3},
        {"fragments": 2},
        {"fragments": 2, "blend": 0.5},
        {"fragments": 2, "fragment_choice": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("outer", [PAIR, THETA, replace(THETA, staleness_penalty=0.6)], ids=["pair", "theta", "late"])
@pytest.mark.parametrize("codec", CODECS)
def test_both_routes_agree(codec: str, outer: OuterConfig, more: dict[str, object]) -> None:
    tiled, expected = trained(codec, compiled=False, outer=outer, **more)  # type: ignore[arg-type]
    fused, found = trained(codec, compiled=True, outer=outer, **more)  # type: ignore[arg-type]
    # Where a lattice step differs in its last bit, all values of the block are rounded anew; they moved by 1e-2.
    tolerance = 1e-3 if codec == "lattice" else 1e-6
    for mine, theirs in zip(fused, tiled, strict=True):
        assert differ_by(mine.theta, theirs.theta) < tolerance
    for outcome, other in zip(found, expected, strict=True):
        assert outcome.kind == other.kind
        assert outcome.shift_norm == pytest.approx(other.shift_norm, rel=max(tolerance * 10, 1e-4))
        assert outcome.delta_norm == pytest.approx(other.delta_norm, rel=max(tolerance * 10, 1e-4))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("codec", CODECS)
def test_a_fused_and_a_tiled_replica_end_with_the_same_weights(codec: str) -> None:
    numel, random = NUMEL, torch.Generator().manual_seed(5)
    start = torch.randn(numel, generator=random) * 0.02
    a, b = (Replica(start.clone(), config(codec, compiled=compiled, admission=None)) for compiled in (False, True))
    for replica in (a, b):
        replica.theta.add_(torch.randn(numel, generator=random), alpha=1e-4)
    sent = [received(replica.pack(round=0, tokens=10), name) for replica, name in ((a, "a"), (b, "b"))]
    before = (a.theta - b.theta).norm()
    outcomes = [a.apply([sent[1]]), b.apply([sent[0]])]
    assert [outcome.kind for outcome in outcomes] == ["averaged", "averaged"]
    assert (a.theta - b.theta).norm() < {"fp32": 1e-6, "bf16": 0.6, "q8": 1.5, "q4": 20.0, "lattice": 0.4}[
        codec
    ] * before


@pytest.mark.usefixtures("uncompiled")
def test_alone_a_pair_averaging_replica_does_not_change() -> None:
    replica = Replica(torch.randn(NUMEL), config("q8", compiled=True))
    replica.theta.add_(1e-3)
    expected = replica.theta.clone()
    replica.pack(round=0, tokens=1)
    outcome = replica.apply([])
    assert outcome.kind == "solo"
    assert torch.equal(replica.theta, expected)
    assert torch.equal(replica.phi, expected)


@pytest.mark.usefixtures("uncompiled")
def test_alone_momentum_goes_on() -> None:
    tiled, fused = (
        Replica(torch.zeros(NUMEL), config("q8", compiled=compiled, outer=THETA)) for compiled in (False, True)
    )
    for round in range(3):
        for replica in (tiled, fused):
            replica.theta.add_(torch.linspace(-1, 1, NUMEL))
            replica.pack(round=round, tokens=1)
            assert replica.apply([]).kind == "solo"
    assert float(fused.momentum.norm()) > 1.0
    assert torch.allclose(fused.theta, tiled.theta, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("outer", [PAIR, THETA], ids=["pair", "theta"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_diverged_round_leaves_the_slow_weights(bad: float, outer: OuterConfig) -> None:
    replica = Replica(torch.randn(NUMEL), config("lattice", compiled=True, outer=outer))
    phi = replica.phi.clone()
    replica.theta[-1] = bad
    with pytest.raises(FloatingPointError):
        replica.pack(round=0, tokens=1)
    assert torch.equal(replica.phi, phi)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compiled", [False, True], ids=["tiled", "fused"])
@pytest.mark.parametrize("codec", CODECS)
def test_equal_replicas_are_not_moved_and_a_block_of_nan_pulls_nobody(codec: str, compiled: bool) -> None:
    start = torch.randn(NUMEL) * 0.02
    a, b = (Replica(start.clone(), config(codec, compiled=compiled)) for _ in range(2))
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


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
@pytest.mark.parametrize("outer", [PAIR, THETA], ids=["pair", "theta"])
@pytest.mark.parametrize("codec", CODECS)
def test_compiled_code_agrees(codec: str, outer: OuterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler_works():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(averaging.replica, "use_native", lambda numel, wanted, device: False)
    tiled, _ = trained(codec, compiled=False, outer=outer)
    fused, _ = trained(codec, compiled=True, outer=outer)
    for mine, theirs in zip(fused, tiled, strict=True):
        assert differ_by(mine.theta, theirs.theta) < (1e-3 if codec == "lattice" else 1e-6)
