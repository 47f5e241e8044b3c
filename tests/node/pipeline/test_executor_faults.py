"""Peers that die, stand still, lie or are cut off: a microbatch goes around them and counts once, or is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from model.stage import run_path
from node.pipeline.ledger import MicrobatchLostError
from node.pipeline.messages import TASK_PROTOCOL, Reply, Task
from protocol.errors import StreamClosedError
from protocol.ids import PeerId
from protocol.memory import LinkSpec
from protocol.virtual_time import run_virtual
from protocol.wire import read_message, write_bulk, write_message
from tests.node.pipeline.stages import (
    BACKWARD,
    CONFIG,
    FORWARD,
    PER_MICROBATCH,
    RUN,
    SEQUENCES,
    TOKENS,
    Pipeline,
    microbatches,
    train_all,
)


@pytest.mark.parametrize("what", [FORWARD, BACKWARD])
@pytest.mark.parametrize("how", ["crash", "freeze"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_dead_or_frozen_peer_is_replaced_and_counts_once(what: str, how: str, stage: int) -> None:
    """The peer dies, or stands still for a minute, in the middle of a pass: a replica does it again."""

    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            victim = pipeline.at(stage)
            victim.compute.stalls[what] = 60.0
            paths = [pipeline.path(0, 1, 2)] * 3
            training = asyncio.create_task(train_all(pipeline, paths))
            if how == "crash":
                await victim.compute.begins(what)
                pipeline.network.crash(victim.peer)
            losses = await training
            assert asyncio.get_running_loop().time() < 50.0
            assert all(isinstance(loss, float) for loss in losses), losses
            await asyncio.sleep(100.0)  # the frozen one wakes up, and finds that its work is not wanted
            assert [pipeline.counted(each) for each in range(3)] == [3 * PER_MICROBATCH] * 3
            assert pipeline.at(stage, 1).worker.num_tokens > 0

    run_virtual(story())


def test_nobody_is_blamed_for_an_input_that_is_gone() -> None:
    """Neither who has forgotten it nor who asks for the backward pass: the iteration may have ended for one of them."""

    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            holder, replica = pipeline.at(2), pipeline.at(1, 1)
            path: list[str] = [pipeline.at(0).peer, replica.peer, holder.peer]
            payload_bytes = SEQUENCES * TOKENS * CONFIG.hidden_size * 4
            task = Task(
                run=RUN, iteration=0, microbatch=1, kind="again", path=path, position=1, payload_bytes=payload_bytes
            )
            async with await holder.transport.open(replica.peer, TASK_PROTOCOL) as stream:
                await write_message(stream, task)
                await write_bulk(stream, bytes(payload_bytes))
                assert (await read_message(stream, Reply)).ok
                with pytest.raises(StreamClosedError):
                    await read_message(stream, Reply)
            assert not any(each.violations for each in pipeline.peers)

    run_virtual(story())


def test_what_a_peer_counted_before_it_died_is_not_done_again() -> None:
    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            (loss,) = await train_all(pipeline, [pipeline.path(0, 1, 2)])
            pipeline.network.crash(pipeline.at(2).peer)
            assert isinstance(loss, float)
            (other,) = await train_all_again(pipeline)
            assert isinstance(other, float)
            assert [pipeline.counted(stage) for stage in range(3)] == [2 * PER_MICROBATCH] * 3

    async def train_all_again(pipeline: Pipeline) -> list[Any]:
        server = pipeline.at(0).server
        return [await server.origin.train(microbatches(1)[0], path=pipeline.path(0, 1, 2))]

    run_virtual(story())


@pytest.mark.parametrize("may_skip", [True, False])
def test_a_stage_without_replicas_is_left_out_or_the_microbatch_is_lost(may_skip: bool) -> None:
    async def story() -> None:
        async with Pipeline(4, may_skip=may_skip) as pipeline:
            pipeline.network.crash(pipeline.at(2).peer)
            (loss,) = await train_all(pipeline, [pipeline.path(0, 1, 2, 3)])
            if not may_skip:
                assert isinstance(loss, MicrobatchLostError)
                assert [pipeline.counted(stage) for stage in range(4)] == [0] * 4
                return
            stages = [pipeline.at(stage).worker.stage for stage in (0, 1, 3)]
            assert loss == pytest.approx(run_path(stages, microbatches(1)[0]).item(), abs=1e-6)

    run_virtual(story())


def test_when_nobody_is_left_in_backward_the_microbatch_is_lost_soon() -> None:
    async def story() -> None:
        async with Pipeline(3) as pipeline:
            victim = pipeline.at(1)
            victim.compute.stalls[BACKWARD] = 60.0
            training = asyncio.create_task(train_all(pipeline, [pipeline.path(0, 1, 2)]))
            await victim.compute.begins(BACKWARD)
            pipeline.network.crash(victim.peer)
            (loss,) = await training
            assert isinstance(loss, MicrobatchLostError)
            assert asyncio.get_running_loop().time() < 10.0
            assert [pipeline.counted(stage) for stage in (0, 2)] == [0, PER_MICROBATCH]

    run_virtual(story())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_nobody_honest_sends_are_refused_and_counted(value: float) -> None:
    async def story() -> None:
        async with Pipeline(3) as pipeline:
            liar = pipeline.at(1)
            with torch.no_grad():
                liar.worker.stage.get_parameter("model.layers.2.mlp.down_proj.weight").fill_(value)
            (loss,) = await train_all(pipeline, [pipeline.path(0, 1, 2)])
            assert isinstance(loss, MicrobatchLostError)
            accusers = [each for each in pipeline.peers if each.violations[liar.peer]]
            assert accusers
            assert all(
                bool(torch.isfinite(p.grad).all())
                for p in pipeline.at(2).worker.stage.parameters()
                if p.grad is not None
            )

    run_virtual(story())


@pytest.mark.parametrize("num_bytes", [1, 1 << 30])
def test_a_wrong_shape_is_refused_and_counted(num_bytes: int) -> None:
    async def story() -> None:
        async with Pipeline(2) as pipeline:
            liar, other = pipeline.at(0), pipeline.at(1)
            task = Task(
                run=RUN,
                iteration=0,
                microbatch=1,
                kind="forward",
                path=[*pipeline.path(0, 1)],
                position=1,
                payload_bytes=num_bytes,
            )
            async with await liar.transport.open(other.peer, TASK_PROTOCOL) as stream:
                await write_message(stream, task)
                with pytest.raises(StreamClosedError):
                    await read_message(stream, Reply)
            assert other.violations[liar.peer] == 1
            assert pipeline.counted(1) == 0

    run_virtual(story())


def test_a_cut_link_is_gone_around() -> None:
    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            a, b = pipeline.at(1).peer, pipeline.at(2).peer
            link = pipeline.network.default_link
            pipeline.network.set_link(a, b, type(link)(loss=1.0))
            losses = await train_all(pipeline, [pipeline.path(0, 1, 2)] * 2)
            assert all(isinstance(loss, float) for loss in losses)
            assert [pipeline.counted(stage) for stage in range(3)] == [2 * PER_MICROBATCH] * 3

    run_virtual(story())


def cut(pipeline: Pipeline, one: PeerId, other: PeerId) -> None:
    """Nothing passes between two peers any more, and neither is told."""
    pipeline.network.set_link(one, other, LinkSpec(loss=1.0))


def test_whoever_waits_for_a_late_peer_is_not_given_up_for_it() -> None:
    """The second stage waits as long for the third as the first waits for the second; it says that it is at it."""

    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            for each in pipeline.peers:
                if each is not pipeline.at(2):  # which is an iteration behind
                    each.server.next_iteration()
            (loss,) = await train_all(pipeline, [pipeline.path(0, 1, 2)])
            assert isinstance(loss, float)
            visited = [pipeline.at(stage, number).worker.num_tokens > 0 for stage in (1, 2) for number in (0, 1)]
            assert visited == [True, False, False, True]

    run_virtual(story())


def test_who_cannot_pass_it_on_leaves_it_to_the_holder() -> None:
    async def story() -> None:
        async with Pipeline(3, replicas=2, may_skip=False) as pipeline:
            for number in (0, 1):
                cut(pipeline, pipeline.at(1).peer, pipeline.at(2, number).peer)
            (loss,) = await train_all(pipeline, [pipeline.path(0, 1, 2)])
            assert isinstance(loss, float), loss
            assert pipeline.at(1, 1).worker.num_tokens == PER_MICROBATCH
            assert [pipeline.counted(stage) for stage in range(3)] == [PER_MICROBATCH] * 3

    run_virtual(story())


def test_what_has_come_back_another_way_is_not_tried_further() -> None:
    """A slow peer is given up, and is faster in the end than the one that was asked instead."""

    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            pipeline.at(1, 0).compute.stalls[FORWARD] = 5.5
            pipeline.at(1, 1).compute.stalls[FORWARD] = 1000.0
            (loss,) = await train_all(pipeline, [pipeline.path(0, 1, 2)])
            assert isinstance(loss, float), loss
            assert asyncio.get_running_loop().time() < 9.0
            assert [pipeline.counted(stage) for stage in range(3)] == [PER_MICROBATCH] * 3

    run_virtual(story())


def test_whoever_was_waited_for_in_vain_is_asked_last_for_a_while() -> None:
    async def story() -> None:
        async with Pipeline(2, replicas=2) as pipeline:
            origin, silent, other = pipeline.at(0), pipeline.at(1), pipeline.at(1, 1)
            path, loop = pipeline.path(0, 1), asyncio.get_running_loop()
            silent.compute.stalls[FORWARD] = 8.0
            seconds = []
            for _ in range(3):
                started_s = loop.time()
                await origin.server.origin.train(microbatches(1)[0], path=path)
                seconds.append(loop.time() - started_s)
            assert seconds[0] > 5.0
            assert max(seconds[1:]) < 1.5
            assert other.worker.num_tokens == 3 * PER_MICROBATCH
            await asyncio.sleep(25.0)
            await origin.server.origin.train(microbatches(1)[0], path=path)
            assert silent.worker.num_tokens == PER_MICROBATCH

    run_virtual(story())
