"""One replica with its partners: what travels, what a step does with it, what is refused."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from averaging.admission import AdmissionConfig
from averaging.outer import Algorithm, OuterConfig
from averaging.replica import Replica, ReplicaConfig
from averaging.update import RemoteUpdate
from kernels.dispatch import tile_numel
from protocol.ids import PeerId
from tests.averaging.replicas import ALGORITHMS, LOSSY, NUMEL, OPEN, exchange, meet, noise, received, swarm, train


def test_refused_exchange_is_the_solo_step_and_keeps_the_residual() -> None:
    config = replace(LOSSY, admission=AdmissionConfig())
    alone, met = Replica(noise(0), config), Replica(noise(0), config)
    far = Replica(noise(0), config)
    for replica in (alone, met):
        train(replica, 1)
    train(far, 2, scale=1.0)
    alone.pack(round=0, tokens=1)
    alone.apply([])
    met.pack(round=0, tokens=1)
    outcome = met.apply([received(far.pack(round=0, tokens=1), 1)])
    assert outcome.kind == "refused"
    for name in ("phi", "momentum", "theta"):
        assert torch.equal(getattr(met, name), getattr(alone, name))
    assert met.residual.any(), "the partner has our bytes, so what they lacked must be sent later"


@pytest.mark.parametrize("algorithm", ["noloco", "diloco", "pair-average"])
def test_progress_made_during_the_exchange_is_kept(algorithm: Algorithm) -> None:
    config = replace(OPEN, outer=OuterConfig(algorithm=algorithm))
    still, moving = swarm(2, config, equal=False), swarm(2, config, equal=False)
    for replicas in (still, moving):
        for number, replica in enumerate(replicas):
            train(replica, number)
    exchange(still)
    updates = [received(replica.pack(round=0, tokens=100), number) for number, replica in enumerate(moving)]
    meanwhile = [train(replica, 50 + number) for number, replica in enumerate(moving)]
    moving[0].apply([updates[1]])
    moving[1].apply([updates[0]])
    for before, after, progress in zip(still, moving, meanwhile, strict=True):
        assert torch.equal(after.phi, before.phi)
        torch.testing.assert_close(after.theta, before.theta + progress, rtol=0, atol=1e-7)


def test_pair_average_takes_the_plain_mean_of_both_weights() -> None:
    replicas = swarm(2, replace(OPEN, outer=OuterConfig(algorithm="pair-average")), equal=False)
    assert replicas[0].config.payload_bytes(NUMEL) == (0, 4 * NUMEL)
    for number, replica in enumerate(replicas):
        train(replica, number, scale=1.0)
    mean = (replicas[0].theta + replicas[1].theta) / 2
    exchange(replicas, tokens=[900, 100])
    for replica in replicas:
        torch.testing.assert_close(replica.theta, mean)
        assert torch.equal(replica.phi, replica.theta)


@pytest.mark.parametrize("algorithm", ["local", "pair-average"])
def test_without_a_partner_these_leave_theta_untouched(algorithm: Algorithm) -> None:
    replica = Replica(noise(0), replace(LOSSY, outer=OuterConfig(algorithm=algorithm)))
    train(replica, 1)
    replica.pack(round=0, tokens=1)
    anchor = replica.theta.clone()
    train(replica, 2)
    theta = replica.theta.clone()
    replica.apply([])
    assert torch.equal(replica.theta, theta)
    assert torch.equal(replica.phi, anchor)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_payload_sizes_follow_from_the_configuration(algorithm: Algorithm) -> None:
    config = replace(LOSSY, outer=OuterConfig(algorithm=algorithm))
    replica = Replica(noise(0), config)
    update = replica.pack(round=3, tokens=5)
    assert (update.delta.nbytes, update.slow.nbytes) == config.payload_bytes(NUMEL)
    assert update.num_bytes == replica.num_payload_bytes
    assert (update.round, update.tokens) == (3, 5)


def test_diloco_without_pull_sends_progress_only() -> None:
    config = replace(LOSSY, outer=OuterConfig(algorithm="diloco", gamma=0.0))
    assert config.payload_bytes(NUMEL) == (3 * 258, 0)


def test_vectors_of_several_tiles() -> None:
    numel = 2 * tile_numel(torch.device("cpu")) + 300
    replicas = swarm(2, LOSSY, equal=False, numel=numel)
    start = [replica.phi.clone() for replica in replicas]
    progress = [train(replica, number) for number, replica in enumerate(replicas)]
    outcome = exchange(replicas)[0]
    expected = start[0] + 0.7 * (progress[0] + progress[1]) / 2 + 0.7 * (start[1] - start[0]) / 2
    torch.testing.assert_close(replicas[0].phi, expected, rtol=0, atol=3e-4)
    distances = outcome.verdicts[PeerId("peer1")].distances
    assert distances is not None
    assert distances.slow == pytest.approx(float((start[1] - start[0]).norm()), rel=1e-3)
    assert distances.delta == pytest.approx(float((progress[1] - progress[0]).norm()), rel=1e-2)
    assert outcome.delta_norm == pytest.approx(float(progress[0].norm()), rel=1e-3)


def test_the_step_takes_admission_s_weight_and_clipping() -> None:
    config = replace(OPEN, admission=AdmissionConfig())
    replicas = swarm(2, config)
    start = replicas[0].phi.clone()
    ours, theirs = (train(replica, 1 + number) for number, replica in enumerate(replicas))
    outcome = exchange(replicas)[0]
    verdict = outcome.verdicts[PeerId("peer1")]
    assert outcome.kind == verdict.kind == "clipped"
    clipped = (theirs - ours) * (ours.norm() / (theirs - ours).norm())  # τ = ‖Δi‖ in the first round
    expected = start + 0.7 * (ours + 0.5 * verdict.weight * clipped)
    torch.testing.assert_close(replicas[0].phi, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta_codec": "lattice"}, "delta_codec 'lattice' is none of"),
        ({"slow_codec": "topk"}, "slow_codec 'topk' is none of"),
        ({"error_decay": 0.0}, "error_decay"),
        ({"lag_decay": 1.5}, "lag_decay"),
        ({"fragments": 0}, "fragments"),
        ({"blend": 0.5}, "only one fragment"),
        ({"fragments": 2, "blend": 1.0}, "blend"),
    ],
)
def test_settings_that_can_not_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplicaConfig(**changes)  # type: ignore[arg-type]  # wrong values on purpose


BAD = {
    "nan delta": ("delta", struct.pack("<f", float("nan"))),
    "inf delta": ("delta", struct.pack("<f", float("inf"))),
    "huge delta": ("delta", struct.pack("<f", 3e38)),
    "nan slow": ("slow", struct.pack("<f", float("nan"))),
    "huge slow": ("slow", struct.pack("<f", -1e20)),
}


@pytest.mark.parametrize("config", [OPEN, replace(OPEN, admission=AdmissionConfig())], ids=["open", "guarded"])
@pytest.mark.parametrize("name", BAD)
def test_one_broken_value_is_refused(config: ReplicaConfig, name: str) -> None:
    field, value = BAD[name]
    replica, partner = swarm(2, config)
    for number, peer in enumerate((replica, partner)):
        train(peer, number)
    update = received(partner.pack(round=0, tokens=1), 1)
    getattr(update, field)[4 * 513 : 4 * 514] = value
    replica.pack(round=0, tokens=1)
    verdict = replica.apply([update]).verdicts[PeerId("peer1")]
    assert verdict.kind == "refused"
    assert replica.phi.isfinite().all()


@pytest.mark.parametrize(("delta_bytes", "slow_bytes"), [(0, 1400), (774, 0), (773, 1400), (774, 1 << 16)])
def test_payloads_of_wrong_length_are_refused(delta_bytes: int, slow_bytes: int) -> None:
    replica = Replica(noise(0), LOSSY)
    replica.pack(round=0, tokens=1)
    update = RemoteUpdate(
        peer=PeerId("peer1"),
        round=0,
        tokens=1,
        delta=memoryview(bytes(delta_bytes)),
        slow=memoryview(bytes(slow_bytes)),
    )
    outcome = replica.apply([update])
    assert outcome.kind == "refused"
    assert "due" in outcome.verdicts[PeerId("peer1")].reason


def test_refused_partners_do_not_dilute_the_others() -> None:
    replicas = swarm(3, OPEN)
    start = replicas[0].phi.clone()
    progress = [train(replica, 1 + number) for number, replica in enumerate(replicas)]
    updates = [received(replica.pack(round=0, tokens=100), number) for number, replica in enumerate(replicas)]
    updates[2].delta[:4] = struct.pack("<f", float("nan"))
    outcome = replicas[0].apply(updates[1:])
    assert outcome.kind == "averaged"
    torch.testing.assert_close(replicas[0].phi, start + 0.7 * (progress[0] + progress[1]) / 2)


def test_broken_local_weights_are_not_sent() -> None:
    replica = Replica(noise(0), LOSSY)
    replica.theta[5] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        replica.pack(round=0, tokens=1)
    assert replica.phi.isfinite().all()


def test_state_restores_the_same_future() -> None:
    replicas = swarm(2, LOSSY, equal=False)
    for number, replica in enumerate(replicas):
        train(replica, number)
    exchange(replicas)
    restored = Replica(replicas[0].theta.clone(), LOSSY)
    restored.load_state_dict({name: tensor.clone() for name, tensor in replicas[0].state_dict().items()})
    for replica in (replicas[0], restored):
        train(replica, 7)
    train(replicas[1], 8)
    update = received(replicas[1].pack(round=1, tokens=1), 1)
    for replica in (replicas[0], restored):
        replica.pack(round=1, tokens=1)
        replica.apply([update])
    assert torch.equal(restored.theta, replicas[0].theta)
    for name, tensor in replicas[0].state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor)


def test_state_of_another_shape_is_refused() -> None:
    replica = Replica(noise(0), LOSSY)
    before = {name: tensor.clone() for name, tensor in replica.state_dict().items()}
    with pytest.raises(ValueError, match="residual"):
        replica.load_state_dict({"phi": torch.zeros(NUMEL), "momentum": torch.zeros(NUMEL)})
    assert all(torch.equal(replica.state_dict()[name], tensor) for name, tensor in before.items())


def test_joiner_starts_from_the_swarms_slow_weights() -> None:
    replicas = swarm(2, LOSSY, equal=False)
    for number, replica in enumerate(replicas):
        train(replica, number)
    exchange(replicas)
    phi = noise(9)
    replicas[0].replace_slow(phi)
    assert torch.equal(replicas[0].theta, phi)
    assert torch.equal(replicas[0].phi, phi)
    assert not replicas[0].momentum.any()
    assert not replicas[0].residual.any()
    with pytest.raises(AssertionError, match="without a pack"):
        replicas[0].apply([])


def train_all(replicas: Sequence[Replica], step: int) -> None:
    """Progress that is half common and half each replica's own."""
    for number, replica in enumerate(replicas):
        train(replica, 10**6 + step)
        train(replica, 100 * step + number)


def test_honest_peers_are_not_refused() -> None:
    replicas, generator = swarm(8, ReplicaConfig()), torch.Generator().manual_seed(0)
    for step in range(60):
        train_all(replicas, step)
        assert "refused" not in {outcome.kind for outcome in meet(replicas, range(8), generator)}


def test_a_long_partition_heals() -> None:
    replicas, generator = swarm(8, ReplicaConfig()), torch.Generator().manual_seed(0)

    def distance() -> float:
        left, right = (torch.stack([r.phi for r in half]).mean(0) for half in (replicas[:4], replicas[4:]))
        return float((left - right).norm())

    for step in range(100):
        train_all(replicas, step)
        for half in (range(4), range(4, 8)):
            meet(replicas, half, generator)
    apart = distance()
    for step in range(100, 140):
        train_all(replicas, step)
        outcomes = meet(replicas, range(8), generator)
    assert distance() < 0.3 * apart
    assert "refused" not in {outcome.kind for outcome in outcomes}
