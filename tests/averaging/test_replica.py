from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from averaging.admission import AdmissionConfig
from averaging.outer import Algorithm, OuterConfig, outer_step
from averaging.replica import Outcome, Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from kernels.dispatch import tile_numel
from protocol.ids import PeerId

NUMEL = 700  # two whole blocks of 256 and a tail
OPEN = ReplicaConfig(admission=None, delta_codec="fp32", slow_codec="fp32")
LOSSY = ReplicaConfig(admission=None, delta_codec="q8", slow_codec="bf16")
ALGORITHMS: list[Algorithm] = ["local", "pair-average", "noloco", "diloco"]


def noise(seed: int, scale: float = 1.0, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def swarm(num_peers: int, config: ReplicaConfig, *, equal: bool = True, numel: int = NUMEL) -> list[Replica]:
    return [Replica(noise(0 if equal else seed, 0.02, numel), config) for seed in range(num_peers)]


def received(update: Update, peer: int) -> RemoteUpdate:
    """What a partner holds after the exchange: its own copy."""
    return RemoteUpdate(
        peer=PeerId(f"peer{peer}"),
        round=update.round,
        tokens=update.tokens,
        delta=memoryview(bytearray(update.delta)),
        slow=memoryview(bytearray(update.slow)),
    )


def exchange(replicas: Sequence[Replica], *, tokens: Sequence[int] | None = None) -> list[Outcome]:
    """All with all, everything delivered."""
    counts = tokens or [100] * len(replicas)
    updates = [
        received(replica.pack(round=0, tokens=count), number)
        for number, (replica, count) in enumerate(zip(replicas, counts, strict=True))
    ]
    return [replica.apply(updates[:own] + updates[own + 1 :]) for own, replica in enumerate(replicas)]


def train(replica: Replica, seed: int, scale: float = 1e-3) -> torch.Tensor:
    """Stands for inner steps; returns the progress made."""
    progress = noise(seed, scale, replica.theta.numel())
    replica.theta += progress
    return progress


@pytest.mark.parametrize("num_peers", [2, 3, 8])
def test_everyone_together_is_heavy_ball_diloco(num_peers: int) -> None:
    replicas = swarm(num_peers, OPEN)
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


@pytest.mark.parametrize("config", [OPEN, LOSSY], ids=["exact", "lossy"])
@pytest.mark.parametrize("num_peers", [2, 5])
def test_mean_of_slow_weights_is_conserved_without_training(config: ReplicaConfig, num_peers: int) -> None:
    """Δ = 0, δ = 0. Holds for lossy codecs too, since both sides use the sent values."""
    replicas = swarm(num_peers, config, equal=False)
    before = torch.stack([replica.phi.double() for replica in replicas]).mean(0)
    distance = (replicas[0].phi - replicas[1].phi).norm()
    exchange(replicas)
    after = torch.stack([replica.phi.double() for replica in replicas]).mean(0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-8)
    assert (replicas[0].phi - replicas[1].phi).norm() < 0.5 * distance


def test_lossy_codecs_do_not_drive_equal_replicas_apart() -> None:
    """With the group = everyone, both sides add the same decoded values in the same proportions."""
    replicas = swarm(2, LOSSY)
    for step in range(10):
        for number, replica in enumerate(replicas):
            train(replica, 100 * step + number)
        exchange(replicas)
        assert torch.equal(replicas[0].phi, replicas[1].phi)


def test_tokens_weigh_progress() -> None:
    replicas = swarm(2, OPEN)
    start = replicas[0].phi.clone()
    progress = [train(replica, 1 + number) for number, replica in enumerate(replicas)]
    exchange(replicas, tokens=[300, 100])
    for replica in replicas:
        torch.testing.assert_close(replica.phi, start + 0.7 * (0.75 * progress[0] + 0.25 * progress[1]))


@pytest.mark.parametrize("config", [OPEN, LOSSY], ids=["exact", "lossy"])
@pytest.mark.parametrize("algorithm", ["noloco", "diloco"])
def test_dropped_exchange_is_the_solo_step_bit_for_bit(config: ReplicaConfig, algorithm: Algorithm) -> None:
    outer = OuterConfig(algorithm=algorithm)
    replica = Replica(noise(0), replace(config, outer=outer))
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


@pytest.mark.parametrize("delta_codec", ["q8", "bf16"])
def test_what_was_sent_plus_the_residual_is_the_sum_of_progress(delta_codec: str) -> None:
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
        decoded = torch.empty(NUMEL)
        replica._delta_codec.decode(torch.frombuffer(bytearray(update.delta), dtype=torch.uint8), decoded)
        sent += decoded.double()
        total += progress
        replica.apply([received(partner.pack(round=step, tokens=1), 1)])
        partner.apply([])
    torch.testing.assert_close(sent + replica.residual.double(), total, rtol=0, atol=1e-8)
    assert 0 < replica.residual.norm() < 0.02 * total.norm()


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
    assert replicas[0].num_delta_bytes == 0
    assert replicas[0].num_slow_bytes == 4 * NUMEL
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


def test_admission_weighs_newcomers_and_clips() -> None:
    """With equal Δ norms a fresh pair is clipped to τ = ‖Δi‖ and weighs a quarter (SECURITY.md, step 3)."""
    config = replace(OPEN, admission=AdmissionConfig())
    replicas = swarm(2, config)
    start = replicas[0].phi.clone()
    ours, theirs = (train(replica, 1 + number) for number, replica in enumerate(replicas))
    outcome = exchange(replicas)[0]
    assert outcome.kind == "clipped"
    difference = theirs - ours
    clipped = difference * (ours.norm() / difference.norm())
    torch.testing.assert_close(replicas[0].phi, start + 0.7 * (ours + 0.5 * 0.25 * clipped), rtol=0, atol=1e-7)


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


def test_spread_shrinks_with_the_learning_rate() -> None:
    """Replicas under random pairing stay apart in proportion to the size of their progress."""
    spreads = []
    for scale in (1e-3, 1e-4):
        replicas = swarm(8, OPEN)
        generator = torch.Generator().manual_seed(0)
        for step in range(40):
            for number, replica in enumerate(replicas):
                train(replica, 100 * step + number, scale)
            order = torch.randperm(8, generator=generator).tolist()
            for first, second in zip(order[0::2], order[1::2], strict=True):
                exchange([replicas[first], replicas[second]])
        stack = torch.stack([replica.phi for replica in replicas])
        spreads.append(float((stack - stack.mean(0)).norm()))
    assert spreads[1] == pytest.approx(spreads[0] / 10, rel=0.05)


def meet(replicas: Sequence[Replica], group: Sequence[int], generator: torch.Generator) -> list[Outcome]:
    """One round of random pairs within a group."""
    order = [group[place] for place in torch.randperm(len(group), generator=generator).tolist()]
    outcomes = []
    for first, second in zip(order[0::2], order[1::2], strict=True):
        updates = {n: received(replicas[n].pack(round=0, tokens=100), n) for n in (first, second)}
        outcomes.append(replicas[first].apply([updates[second]]))
        outcomes.append(replicas[second].apply([updates[first]]))
    return outcomes


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
