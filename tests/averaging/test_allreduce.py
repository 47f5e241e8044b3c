"""The group all-reduce among honest peers, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
import torch

from averaging.codec import DELTA_CODECS, codec_named
from averaging.outer import OuterConfig, outer_step
from protocol.memory import LinkSpec, MemoryNetwork
from protocol.virtual_time import run_virtual
from tests.averaging.group_members import NUMEL, decoded, delta_of, encoded_update, open_members

MESSAGE_BYTES = 700, 480
"""Most bytes of messages per link and direction: a constant, and per member (ballot and echo)."""


@pytest.mark.parametrize("num_peers", [2, 3, 5, 8])
@pytest.mark.parametrize("codec", DELTA_CODECS)
def test_everybody_gets_the_same_bytes_of_the_mean(num_peers: int, codec: str) -> None:
    async def main() -> None:
        async with open_members(num_peers, codec=codec) as members:
            results = await members.reduce_each()
            assert {result.outcome for result in results} == {"averaged"}
            assert len({bytes(result.mean or b"") for result in results}) == 1
            for index, result in enumerate(results):
                assert set(result.peers) == set(members.ids) - {members.ids[index]}
                assert (result.tokens, dict(result.missing), dict(result.own_parts)) == (1000 * num_peers, {}, {})
            plain = sum((members.sent(index) for index in range(num_peers)), torch.zeros(NUMEL)) / num_peers
            again = decoded(encoded_update(plain, members.codec).delta, members.codec)
            mean = decoded(results[0].mean, members.codec)
            # A sum in another order may round to the next code here and there.
            assert float((mean - again).norm()) <= (1e-6 if codec == "fp32" else 0.02) * float(again.norm())
            assert not any(averager.violations for averager in members.averagers)

    run_virtual(main())


@pytest.mark.parametrize("num_peers", [2, 5, 8])
def test_bytes_and_steps_on_the_wire(num_peers: int) -> None:
    async def main() -> None:
        async with open_members(num_peers) as members:
            results = await members.reduce_each()
            part = -(-members.codec.num_bytes(NUMEL) // num_peers) + 2 * 258
            per_link = 2 * part + MESSAGE_BYTES[0] + num_peers * MESSAGE_BYTES[1]
            for transport in members.transports:
                assert transport.traffic.sent_bytes <= (num_peers - 1) * per_link
                assert transport.traffic.sent_bytes >= 2 * (num_peers - 1) / num_peers * 0.9 * NUMEL
            assert max(result.seconds for result in results) == pytest.approx(0.08), (
                "eight messages, one after the other"
            )

    run_virtual(main())


def test_nobody_and_one_alone() -> None:
    async def main() -> None:
        async with open_members(1) as members:
            [result] = await members.reduce_each()
            assert (result.outcome, result.mean, result.peers, result.tokens) == ("alone", None, (), 1000)
            assert result.seconds == 0.0

    run_virtual(main())


def test_tokens_weigh_and_claims_are_capped() -> None:
    async def main() -> None:
        async with open_members(3, codec="fp32") as members:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(members.reduce(index, tokens=tokens))
                    for index, tokens in enumerate([1000, 3000, 10**12])
                ]
            mean = decoded(tasks[0].result().mean, members.codec)
            weights = [1000, 3000, 4 * 3000]
            want = sum((w * members.sent(i) for i, w in enumerate(weights)), torch.zeros(NUMEL)) / sum(weights)
            assert torch.allclose(mean, want, atol=1e-7)

    run_virtual(main())


@pytest.mark.parametrize("ratios", [(1, 8), (1, 30), (1, 1, 16, 16), (1, 16, 16)])
def test_fast_peers_are_heard_by_slow_ones(ratios: tuple[int, ...]) -> None:
    """Half of the group has made far less progress: the fast ones' means are shortened, not refused, and nobody is blamed."""

    async def main() -> None:
        async with open_members(len(ratios)) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(members.reduce(index, delta=delta_of(index) / ratio, tokens=48_000 // ratio))
                    for index, ratio in enumerate(ratios)
                ]
            assert [task.result().outcome for task in tasks] == ["averaged"] * len(ratios)
            assert len({bytes(task.result().mean or b"") for task in tasks}) == 1
            assert not any(averager.violations for averager in members.averagers)

    run_virtual(main())


def test_round_after_round_with_phases_and_a_late_comer() -> None:
    async def main() -> None:
        async with open_members(4, numel=2000) as members:

            async def life(index: int) -> list[bytes]:
                means = []
                for round in range(5):
                    await asyncio.sleep(3.0 + index)
                    result = await members.reduce(index, round=round)
                    assert result.outcome == "averaged", result
                    means.append(bytes(result.mean or b""))
                return means

            async with asyncio.TaskGroup() as group:
                lives = [group.create_task(life(index)) for index in range(4)]
            assert all(other.result() == lives[0].result() for other in lives[1:])
            assert len(set(lives[0].result())) == 5

    run_virtual(main())


def test_diloco_with_the_group_mean_keeps_replicas_identical() -> None:
    """Four rounds of outer steps, each peer training towards its own target: φ is the same everywhere, bit for bit."""
    numel, num_peers, outer = 3000, 4, OuterConfig(algorithm="diloco", alpha=0.9, beta=0.7, gamma=0.0)

    async def main() -> None:
        async with open_members(num_peers, codec="q4", numel=numel) as members:
            phis = [torch.zeros(numel) for _ in range(num_peers)]
            momenta = [torch.zeros(numel) for _ in range(num_peers)]
            residuals = [torch.zeros(numel) for _ in range(num_peers)]
            targets = [delta_of(index, 0, numel) for index in range(num_peers)]
            centre = sum(targets, torch.zeros(numel)) / num_peers
            for round in range(12):
                totals = [0.3 * (targets[i] - phis[i]) + residuals[i] for i in range(num_peers)]
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(members.reduce(i, round=round, delta=totals[i])) for i in range(num_peers)
                    ]
                for i, task in enumerate(tasks):
                    residuals[i] = totals[i] - decoded(
                        encoded_update(totals[i], members.codec).delta, members.codec, numel
                    )
                    mean = decoded(task.result().mean, members.codec, numel)
                    outer_step(phis[i], momenta[i], mean, None, outer)
                assert all(torch.equal(phi, phis[0]) for phi in phis[1:])
            # Heavy momentum swings: twelve rounds end well inside the start's distance, and nothing has blown up.
            assert float((phis[0] - centre).norm()) < 0.5 * float(centre.norm())

    run_virtual(main())


def test_fragments_of_different_lengths() -> None:
    numels = {0: 4096, 1: 3000}

    async def main() -> None:
        async with open_members(3) as members:
            for averager in members.averagers:
                averager._numel = lambda round: numels[round % 2]
            for round in range(2):
                members.numel = numels[round % 2]
                results = await members.reduce_each(round=round)
                assert {result.outcome for result in results} == {"averaged"}
                assert len(results[0].mean or b"") == codec_named("q8").num_bytes(numels[round % 2])

    run_virtual(main())


def test_a_delta_that_is_not_finite_is_not_sent() -> None:
    async def main() -> None:
        async with open_members(2) as members:
            bad = delta_of(0)
            bad[3] = float("nan")
            with pytest.raises(FloatingPointError):
                await members.reduce(0, delta=bad)
            results = await members.reduce_each(round=6)
            assert {result.outcome for result in results} == {"averaged"}

    run_virtual(main())


def test_a_slow_link_is_waited_for_when_there_is_time() -> None:
    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
        async with open_members(3, network=network) as members:
            for other in (0, 1):
                network.set_link(members.ids[2], members.ids[other], LinkSpec(latency_s=0.1, bytes_per_s=2000.0))
            results = await members.reduce_each()
            assert {result.outcome for result in results} == {"averaged"}
            assert len({bytes(result.mean or b"") for result in results}) == 1
            part_bytes = members.codec.num_bytes(NUMEL) / 3
            assert 2 * part_bytes / 2000 < results[0].seconds < 2 * part_bytes / 2000 + 5.0

    run_virtual(main())
