"""The outer step from a group's mean Δ, as an all-reduce brings it, instead of from partners' updates one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from averaging.codec import codec_named
from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from protocol.errors import ProtocolError
from tests.averaging.replicas import NUMEL, exchange, received, swarm, train

DILOCO = OuterConfig(algorithm="diloco", alpha=0.9, beta=0.7, gamma=0.0)


def group_mean(updates: list[Update], codec_name: str) -> memoryview:
    """What the part owners of an all-reduce agree on: the mean of the decoded Δ, encoded once."""
    codec = codec_named(codec_name)
    total = torch.zeros(NUMEL)
    for update in updates:
        payload = torch.frombuffer(bytearray(update.delta), dtype=torch.uint8)
        codec.decode_add(payload, total, weight=1 / len(updates))
    mean = torch.zeros(codec.num_bytes(NUMEL), dtype=torch.uint8)
    codec.encode(total, mean)
    return memoryview(mean.numpy().tobytes())


def group_round(replicas: list[Replica], codec: str) -> memoryview:
    updates = [replica.pack(round=0, tokens=100) for replica in replicas]
    mean = group_mean(updates, codec)
    for replica in replicas:
        assert replica.apply([], group_mean=mean).kind == "averaged"
    return mean


def test_fp32_mean_gives_the_step_of_all_pairs() -> None:
    config = ReplicaConfig(outer=DILOCO, admission=None, delta_codec="fp32", slow_codec="fp32")
    by_mean, by_pairs = swarm(3, config), swarm(3, config)
    for round_ in range(3):
        for number in range(3):
            train(by_mean[number], 10 * round_ + number)
            train(by_pairs[number], 10 * round_ + number)
        group_round(by_mean, "fp32")
        exchange(by_pairs)
    for one, other in zip(by_mean, by_pairs, strict=True):
        torch.testing.assert_close(one.phi, other.phi, rtol=0, atol=1e-7)


@pytest.mark.parametrize("codec", ["bf16", "q8", "q4", "e3m0"])
def test_lossy_mean_leaves_all_replicas_bit_identical(codec: str) -> None:
    replicas = swarm(4, ReplicaConfig(outer=DILOCO, admission=None, delta_codec=codec))
    for round_ in range(4):
        for number, replica in enumerate(replicas):
            train(replica, 10 * round_ + number)
        group_round(replicas, codec)
    assert all(torch.equal(replica.phi, replicas[0].phi) for replica in replicas)
    assert all(torch.equal(replica.theta, replica.phi) for replica in replicas)


def test_what_our_encoding_lost_is_kept() -> None:
    replica = swarm(1, ReplicaConfig(outer=DILOCO, admission=None, delta_codec="q4"))[0]
    progress = train(replica, 7)
    sent = torch.zeros(NUMEL)
    update = replica.pack(round=0, tokens=100)
    codec_named("q4").decode(torch.frombuffer(bytearray(update.delta), dtype=torch.uint8), sent)
    replica.apply([], group_mean=memoryview(bytearray(update.delta)))
    torch.testing.assert_close(sent + replica.residual, progress, rtol=0, atol=1e-6)


def test_partner_beside_a_group_mean_pulls_with_its_slow_weights_only() -> None:
    config = ReplicaConfig(outer=replace(DILOCO, gamma=0.5), admission=None, delta_codec="fp32", slow_codec="fp32")
    first, second = swarm(2, config, equal=False)
    gap = float((first.phi - second.phi).norm())
    updates = [replica.pack(round=0, tokens=100) for replica in (first, second)]
    mean = group_mean(updates, "fp32")
    came = [replace(received(update, number), delta=memoryview(b"")) for number, update in enumerate(updates)]
    first.apply([came[1]], group_mean=mean)
    second.apply([came[0]], group_mean=mean)
    assert float((first.phi - second.phi).norm()) == pytest.approx(0.5 * gap, rel=1e-5)


def test_next_round_forgets_the_mean() -> None:
    first = swarm(1, ReplicaConfig(outer=DILOCO, admission=None, delta_codec="fp32"))[0]
    alone = swarm(1, ReplicaConfig(outer=DILOCO, admission=None, delta_codec="fp32"))[0]
    for replica in (first, alone):
        train(replica, 1)
        update = replica.pack(round=0, tokens=1)
        replica.apply([], group_mean=memoryview(bytearray(update.delta)))
        train(replica, 2)
        replica.pack(round=1, tokens=1)
    assert first.apply([]).kind == "solo"
    alone.apply([])
    assert torch.equal(first.phi, alone.phi)


def test_mean_of_another_length_is_refused_and_changes_nothing() -> None:
    replica = swarm(1, ReplicaConfig(outer=DILOCO, admission=None))[0]
    train(replica, 1)
    replica.pack(round=0, tokens=1)
    before = replica.phi.clone()
    with pytest.raises(ProtocolError):
        replica.apply([], group_mean=memoryview(b"short"))
    assert torch.equal(replica.phi, before)


def test_update_with_a_delta_beside_a_group_mean_is_refused() -> None:
    replica = swarm(1, ReplicaConfig(outer=replace(DILOCO, gamma=0.5), admission=None, delta_codec="fp32"))[0]
    update = replica.pack(round=0, tokens=1)
    partner: RemoteUpdate = received(update, 5)
    outcome = replica.apply([partner], group_mean=memoryview(bytearray(update.delta)))
    assert outcome.verdicts[partner.peer].kind == "refused"
