"""When an iteration ends, who decides that, and what becomes of the microbatches under way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from node.compute import VirtualCompute
from node.pipeline.iterations import Iterations
from node.pipeline.ledger import MicrobatchLostError
from node.pipeline.messages import NOTICE_PROTOCOL, Notice
from protocol.ids import PeerId
from protocol.memory import MemoryTransport
from protocol.virtual_time import run_virtual
from protocol.wire import write_message
from tests.node.pipeline.stages import (
    BACKWARD,
    FORWARD,
    RUN,
    Pipeline,
    StagePeer,
    microbatches,
    train_all,
)


@pytest.mark.parametrize(("stage", "what"), [(0, "_run_loss"), (1, BACKWARD), (1, "commit"), (0, BACKWARD)])
def test_an_iteration_may_end_while_a_pass_waits_for_the_processor(stage: int, what: str) -> None:
    async def story() -> None:
        async with Pipeline(3) as pipeline:
            pipeline.at(stage).compute.stalls[what] = 5.0
            training = asyncio.create_task(train_all(pipeline, [pipeline.path(0, 1, 2)]))
            await pipeline.at(stage).compute.begins(what)
            for each in pipeline.peers:
                each.server.next_iteration()
                each.worker.clear()
            assert isinstance((await training)[0], MicrobatchLostError)
            await asyncio.sleep(100.0)
            assert [pipeline.counted(each) for each in range(3)] == [0] * 3
            assert [bugs(each) for each in pipeline.peers] == [0] * 3

    run_virtual(story())


@pytest.mark.parametrize(("stage", "what"), [(1, "commit"), (2, FORWARD)])
def test_whoever_drops_a_microbatch_that_it_has_taken_tells_the_origin(stage: int, what: str) -> None:
    """The second stage has told the one before, or after, not to wait, and then ends its iteration before all others."""

    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            pipeline.at(stage).compute.stalls[what] = 8.0
            training = asyncio.create_task(train_all(pipeline, [pipeline.path(0, 1, 2)]))
            await pipeline.at(stage).compute.begins(what)
            await asyncio.sleep(1.0)
            pipeline.at(1).server.next_iteration()
            assert isinstance((await training)[0], MicrobatchLostError)
            assert asyncio.get_running_loop().time() < 12.0
            assert [pipeline.counted(each) for each in (0, 1)] == [0, 0]

    run_virtual(story())


def bugs(each: StagePeer) -> int:
    """Handlers that have ended by an error of ours."""
    assert isinstance(each.transport, MemoryTransport)
    return each.transport.incoming.num_bugs


def test_an_iteration_ends_for_all_when_every_origin_says_so() -> None:
    async def story() -> None:
        async with Pipeline(2, replicas=2) as pipeline:
            origins = [pipeline.at(0, 0), pipeline.at(0, 1)]
            paths = [[origin.peer, pipeline.at(1).peer] for origin in origins]
            everybody = [each.peer for each in pipeline.peers]
            waiting = asyncio.create_task(pipeline.at(1).server.wait_for_end(lambda: [path[0] for path in paths]))
            await train_all(pipeline, paths)
            await origins[0].server.origin.announce_end(everybody)
            await asyncio.sleep(1.0)
            assert not waiting.done()
            await origins[1].server.origin.announce_end(everybody)
            await asyncio.wait_for(waiting, 1.0)

    run_virtual(story())


def test_an_origin_that_has_left_the_swarm_is_not_waited_for() -> None:
    async def story() -> None:
        async with Pipeline(2, replicas=2) as pipeline:
            server, origins = pipeline.at(1).server, {pipeline.at(0, 0).peer, pipeline.at(0, 1).peer}
            waiting = asyncio.create_task(server.wait_for_end(lambda: sorted(origins)))
            server.note_end(pipeline.at(0, 0).peer, 0)
            await asyncio.sleep(1.0)
            assert not waiting.done()
            origins.add(pipeline.at(1, 1).peer)  # a new one, whom nobody knew when the iteration began
            origins.remove(pipeline.at(0, 1).peer)  # the directory does not show it any more
            server.look_again()
            assert await asyncio.wait_for(waiting, 1.0) is True

    run_virtual(story())


def test_tasks_of_another_iteration_wait_or_are_refused() -> None:
    async def story() -> None:
        async with Pipeline(2) as pipeline:
            origin, other = pipeline.at(0), pipeline.at(1)
            origin.server.next_iteration()  # ahead: its microbatch waits at the other's door
            training = asyncio.create_task(train_all(pipeline, [pipeline.path(0, 1)]))
            await asyncio.sleep(2.0)
            assert not training.done()
            other.server.next_iteration()
            assert isinstance((await training)[0], float)
            other.server.next_iteration()  # now the origin is behind
            server = pipeline.at(0).server
            with pytest.raises(MicrobatchLostError):
                await server.origin.train(microbatches(1)[0], path=pipeline.path(0, 1))

    run_virtual(story())


def test_an_iteration_that_is_over_leaves_nothing_behind() -> None:
    async def story() -> None:
        async with Pipeline(3, slots=2) as pipeline:
            pipeline.at(2).compute.stalls[FORWARD] = 1000.0
            training = asyncio.create_task(train_all(pipeline, [pipeline.path(0, 1, 2)] * 4))
            await asyncio.sleep(3.0)
            for each in pipeline.peers:
                each.server.next_iteration()
                each.worker.clear()
            losses = await training
            assert all(isinstance(loss, MicrobatchLostError) for loss in losses)
            await asyncio.sleep(2000.0)
            losses = await train_all(pipeline, [pipeline.path(0, 1, 2)] * 4)
            assert all(isinstance(loss, float) for loss in losses)
            assert all(not each.worker.visits for each in pipeline.peers)

    run_virtual(story())


def test_strangers_can_not_name_a_microbatch() -> None:
    """Its number is drawn at random: who guesses is told nothing, and cancels nothing."""

    async def story() -> None:
        async with Pipeline(3) as pipeline:
            origin, liar = pipeline.at(0), pipeline.at(2)
            pipeline.at(1).compute.stalls[FORWARD] = 2.0
            training = asyncio.create_task(train_all(pipeline, [pipeline.path(0, 1)] * 2))
            await asyncio.sleep(1.0)
            for number in range(20):
                async with await liar.transport.open(origin.peer, NOTICE_PROTOCOL) as stream:
                    await write_message(stream, Notice(run=RUN, iteration=0, kind="lost", microbatch=number))
            losses = await training
            assert all(isinstance(loss, float) for loss in losses)

    run_virtual(story())


@pytest.mark.parametrize("lead", [2, 10**9])
def test_a_single_origin_does_not_decide_which_iteration_it_is(lead: int) -> None:
    async def story() -> None:
        async with Pipeline(2, replicas=3) as pipeline:
            server, liar = pipeline.at(1).server, pipeline.at(0)
            async with await liar.transport.open(pipeline.at(1).peer, NOTICE_PROTOCOL) as stream:
                await write_message(stream, Notice(run=RUN, iteration=lead, kind="end"))
            await asyncio.sleep(1.0)
            server.note_end(pipeline.at(0, 1).peer, 0)
            server.next_iteration()
            assert server.iteration == 1

    run_virtual(story())


@pytest.mark.parametrize(("lead", "next_one"), [(1024, 1025), (1025, 1)])
def test_who_is_alone_in_stage_0_is_believed_within_bounds(lead: int, next_one: int) -> None:
    """It gives out every microbatch anyway. The second one ends that."""

    async def story() -> None:
        async with Pipeline(2, replicas=2) as pipeline:
            server, (alone, second) = pipeline.at(1).server, (pipeline.at(0), pipeline.at(0, 1))
            server.note_end(alone.peer, lead)
            server.next_iteration()
            assert server.iteration == next_one
            server.note_end(second.peer, server.iteration)
            server.note_end(alone.peer, server.iteration + 1000)
            server.next_iteration()
            assert server.iteration == next_one + 1

    run_virtual(story())


def test_a_frozen_peer_goes_on_where_most_origins_are() -> None:
    async def story() -> None:
        async with Pipeline(2, replicas=3) as pipeline:
            server = pipeline.at(1).server
            waiting = asyncio.create_task(
                server.wait_for_end(lambda: [pipeline.at(0, number).peer for number in range(3)])
            )
            await asyncio.sleep(1.0)
            for number, iteration in enumerate((7, 8)):
                server.note_end(pipeline.at(0, number).peer, iteration)
            assert await asyncio.wait_for(waiting, 1.0) is False
            server.next_iteration()
            assert server.iteration == 8

    run_virtual(story())


def test_the_inner_step_is_not_counted_as_a_part_of_the_pipeline() -> None:
    """What the planner compares with its simulation has no step in it: a slow one would pass for slow links."""

    async def wait_for_end(*_: object) -> bool:
        await asyncio.sleep(2.0)
        return True

    def nothing(*_: object, **__: object) -> int:
        return 0

    server: Any = SimpleNamespace(
        iteration=3, wait_for_end=wait_for_end, close_iteration=nothing, next_iteration=nothing
    )
    stages: Any = SimpleNamespace(begin_iteration=nothing, holders=lambda stage: [])
    trainer: Any = SimpleNamespace(stage=1, step=nothing)

    async def story() -> None:
        stats = await Iterations(
            peer=PeerId("us"),
            server=server,
            trainer=trainer,
            compute=VirtualCompute(seconds_per_call=30.0),
            stages=stages,
            choose_paths=lambda iteration, count: [],
            timeout_s=60.0,
        ).run()
        assert stats.is_complete
        assert stats.ended_s == pytest.approx(2.0)
        assert asyncio.get_running_loop().time() > 30.0

    run_virtual(story())
