"""What must hold to the last bit or to fp32 rounding, without any training run. The limit of γ is in test_outer.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from averaging.codec import SLOW_CODECS
from averaging.outer import Algorithm, OuterConfig, outer_step
from averaging.replica import Replica, ReplicaConfig
from tests.averaging.replicas import LOSSY, NUMEL, OPEN, exchange, mean_of, meet, noise, received, swarm, train


@pytest.mark.parametrize("num_peers", [2, 3, 8])
@pytest.mark.parametrize("algorithm", ["noloco", "diloco"])
def test_everyone_together_is_heavy_ball_diloco(num_peers: int, algorithm: Algorithm) -> None:
    outer = OuterConfig(algorithm=algorithm, momentum="heavy-ball", alpha=0.5, beta=0.7, gamma=0.7)
    replicas = swarm(num_peers, replace(OPEN, outer=outer))
    phi, momentum = replicas[0].phi.double(), torch.zeros(NUMEL, dtype=torch.float64)
    for step in range(6):
        for number, replica in enumerate(replicas):
            train(replica, 100 * step + number)
        mean = torch.stack([replica.theta.double() for replica in replicas]).mean(0) - phi
        exchange(replicas)
        momentum = 0.5 * momentum + 0.7 * mean
        phi = phi + momentum
        for replica in replicas:
            torch.testing.assert_close(replica.phi.double(), phi, rtol=1e-6, atol=2e-8)
            assert torch.equal(replica.theta, replica.phi)


def test_everyone_together_is_nesterov_diloco() -> None:
    replicas = swarm(3, replace(OPEN, outer=OuterConfig(algorithm="diloco", alpha=0.9, beta=0.7)))
    parameter = torch.nn.Parameter(replicas[0].phi.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(6):
        for number, replica in enumerate(replicas):
            train(replica, 100 * step + number)
        parameter.grad = parameter.detach() - torch.stack([replica.theta for replica in replicas]).mean(0)
        sgd.step()
        exchange(replicas)
        for replica in replicas:
            torch.testing.assert_close(replica.phi, parameter.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_peers", [2, 5])
def test_theta_alone_is_noloco_with_equal_constants(num_peers: int) -> None:
    constants = OuterConfig(alpha=0.5, beta=0.6, gamma=0.6)
    both = swarm(num_peers, replace(OPEN, outer=constants), equal=False)
    alone = swarm(num_peers, replace(OPEN, outer=replace(constants, theta_only=True)), equal=False)
    assert alone[0].num_payload_bytes == both[0].num_payload_bytes // 2
    for step in range(5):
        for replicas in (both, alone):
            for number, replica in enumerate(replicas):
                train(replica, 100 * step + number)
            exchange(replicas)
        for one, other in zip(both, alone, strict=True):
            torch.testing.assert_close(one.phi, other.phi, rtol=0, atol=1e-7)
            torch.testing.assert_close(one.momentum, other.momentum, rtol=0, atol=1e-7)


@pytest.mark.parametrize("slow_codec", SLOW_CODECS)
@pytest.mark.parametrize("num_peers", [2, 5])
@pytest.mark.parametrize(
    "outer",
    [
        OuterConfig(),
        OuterConfig(theta_only=True),
        OuterConfig(algorithm="pair-average"),
        OuterConfig(algorithm="diloco", alpha=0.9),
        OuterConfig(algorithm="sparseloco", beta=1.0),
    ],
    ids=["noloco", "theta only", "pair-average", "diloco", "sparseloco"],
)
def test_mean_of_slow_weights_is_conserved_without_training(
    outer: OuterConfig, num_peers: int, slow_codec: str
) -> None:
    """Δ = 0, δ = 0. Holds for lossy codecs too, since both sides use the sent values."""
    config = replace(LOSSY, outer=outer, slow_codec=slow_codec)
    apart = 2e-6 if slow_codec == "lattice" else 0.02  # without any motion the lattice's window is 2.4e-5 wide
    replicas = [Replica(noise(0, 0.02) + noise(1 + number, apart), config) for number in range(num_peers)]
    before, distance = mean_of(replicas), (replicas[0].phi - replicas[1].phi).norm()
    outcomes = exchange(replicas)
    assert {(outcome.kind, outcome.unreadable_share) for outcome in outcomes} == {("averaged", 0.0)}
    torch.testing.assert_close(mean_of(replicas), before, rtol=0, atol=1e-8)
    assert (replicas[0].phi - replicas[1].phi).norm() < 0.7 * distance


@pytest.mark.parametrize("slow_codec", ["bf16", "q8", "q4"])
def test_equal_replicas_stay_equal(slow_codec: str) -> None:
    """With the group = everyone, both sides add the same decoded values in the same proportions. The lattice can not promise it:
    its step follows each peer's own motion."""
    replicas = swarm(2, replace(LOSSY, slow_codec=slow_codec))
    for step in range(10):
        for number, replica in enumerate(replicas):
            train(replica, 100 * step + number)
        exchange(replicas)
        assert torch.equal(replicas[0].phi, replicas[1].phi)


@pytest.mark.parametrize("algorithm", ["noloco", "diloco", "sparseloco"])
def test_tokens_weigh_progress(algorithm: Algorithm) -> None:
    replicas = swarm(2, replace(OPEN, outer=OuterConfig(algorithm=algorithm, alpha=0.0)))
    start = replicas[0].phi.clone()
    progress = [train(replica, 1 + number) for number, replica in enumerate(replicas)]
    exchange(replicas, tokens=[300, 100])
    for replica in replicas:
        torch.testing.assert_close(replica.phi, start + 0.7 * (0.75 * progress[0] + 0.25 * progress[1]))


SOLO = [
    OuterConfig(algorithm="noloco"),
    OuterConfig(algorithm="noloco", theta_only=True),
    OuterConfig(algorithm="diloco", alpha=0.9),
    OuterConfig(algorithm="diloco", momentum="heavy-ball"),
    OuterConfig(algorithm="sparseloco"),
]


@pytest.mark.parametrize("delta_codec", ["fp32", "q8", "topk"])
@pytest.mark.parametrize("slow_codec", ["bf16", "lattice"])
@pytest.mark.parametrize("outer", SOLO, ids=lambda outer: f"{outer.algorithm} {outer.momentum} {outer.theta_only}")
def test_dropped_exchange_is_the_solo_step_bit_for_bit(outer: OuterConfig, slow_codec: str, delta_codec: str) -> None:
    """The odd peer of a round takes it too."""
    config = replace(LOSSY, outer=outer, slow_codec=slow_codec, delta_codec=delta_codec)
    replica = Replica(noise(0), config)
    phi, momentum = replica.phi.clone(), replica.momentum.clone()
    for step in range(3):
        train(replica, step)
        outer_step(phi, momentum, replica.theta - phi, None, outer)
        replica.pack(round=step, tokens=1)
        assert replica.apply([]).kind == "solo"
        assert torch.equal(replica.phi, phi)
        assert torch.equal(replica.momentum, momentum)
        assert torch.equal(replica.theta, phi)
        assert not replica.residual.any()


@pytest.mark.parametrize(("delta_codec", "largest"), [("q8", 0.02), ("bf16", 0.02), ("q4", 0.2), ("topk", 1.0)])
def test_what_was_sent_plus_the_residual_is_the_sum_of_progress(delta_codec: str, largest: float) -> None:
    """Progress of dropped rounds is never sent, and the residual waits."""
    replica, partner = (Replica(noise(0, 0.02), replace(LOSSY, delta_codec=delta_codec)) for _ in range(2))
    total, sent = torch.zeros(NUMEL).double(), torch.zeros(NUMEL).double()
    for step in range(30):
        train(replica, step)
        train(partner, 1000 + step)
        progress = (replica.theta - replica.phi).double()
        update = replica.pack(round=step, tokens=1)
        if step % 3 == 2:
            replica.apply([])
            continue
        sent += decoded(replica, update.delta).double()
        total += progress
        replica.apply([received(partner.pack(round=step, tokens=1), 1)])
        partner.apply([])
    torch.testing.assert_close(sent + replica.residual.double(), total, rtol=0, atol=1e-7)
    assert 0 < replica.residual.norm() < largest * total.norm()


def decoded(replica: Replica, delta: memoryview) -> torch.Tensor:
    out = torch.empty(NUMEL)
    replica._payloads.delta_codec.decode(torch.frombuffer(bytearray(delta), dtype=torch.uint8), out)
    return out


def test_sparseloco_s_error_feedback_decays_as_in_its_paper() -> None:
    """e ← b·e + Δ; send Q(top-k of e); e ← e − sent; φ ← φ + β·mean of what was sent (2508.15706)."""
    outer = OuterConfig(algorithm="sparseloco", alpha=0.0, beta=0.8, gamma=0.0)
    config = ReplicaConfig(admission=None, outer=outer, delta_codec="topk", error_decay=0.95)
    replicas = swarm(2, config)
    phi, errors = replicas[0].phi.clone(), [torch.zeros(NUMEL) for _ in replicas]
    assert replicas[0].config.payload_bytes(NUMEL)[1] == 0
    for step in range(5):
        sent = []
        updates = []
        for number, replica in enumerate(replicas):
            errors[number] = 0.95 * errors[number] + train(replica, 100 * step + number)
            updates.append(received(replica.pack(round=step, tokens=1), number))
            sent.append(decoded(replica, updates[-1].delta))
            assert 0 < int((sent[-1] != 0).sum()) <= 64
            errors[number] -= sent[-1]
        phi += 0.8 * (sent[0] + sent[1]) / 2
        for number, replica in enumerate(replicas):
            replica.apply([updates[1 - number]])
            torch.testing.assert_close(replica.residual, errors[number], rtol=0, atol=1e-7)
            torch.testing.assert_close(replica.phi, phi, rtol=0, atol=1e-7)
            assert torch.equal(replica.theta, replica.phi)


@pytest.mark.parametrize(
    "outer",
    [OuterConfig(), OuterConfig(theta_only=True), OuterConfig(algorithm="pair-average")],
    ids=["noloco", "theta only", "pair-average"],
)
def test_spread_shrinks_with_the_learning_rate(outer: OuterConfig) -> None:
    """Replicas under random pairing stay apart in proportion to the size of their progress."""
    spreads = []
    for scale in (1e-3, 1e-4):
        replicas, generator = swarm(8, replace(OPEN, outer=outer)), torch.Generator().manual_seed(0)
        for step in range(40):
            for number, replica in enumerate(replicas):
                train(replica, 100 * step + number, scale)
            meet(replicas, range(8), generator)
        stack = torch.stack([replica.phi for replica in replicas])
        spreads.append(float((stack - stack.mean(0)).norm()))
    assert spreads[1] == pytest.approx(spreads[0] / 10, rel=0.05)
