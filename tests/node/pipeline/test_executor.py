"""Microbatches through real stages: exact when all goes well, and counted at most once when it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from model.stage import run_path
from node.pipeline.handover import Handover, StageTerms
from node.pipeline.ledger import MicrobatchLostError
from node.pipeline.messages import NOTICE_PROTOCOL, TASK_PROTOCOL, Notice, Reply, Task
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryTransport
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import read_bulk, read_message, write_message
from tests.node.pipeline.stages import (
    PER_MICROBATCH,
    RUN,
    Pipeline,
    StagePeer,
    gradients,
    microbatches,
    train_all,
    whole_gradients,
)

PAYLOAD_BYTES = 64


@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_without_skips_it_is_the_unsplit_model(num_stages: int) -> None:
    async def story() -> None:
        async with Pipeline(num_stages) as pipeline:
            losses = await train_all(pipeline, [pipeline.path(*range(num_stages))] * 5)
            expected_loss, expected = whole_gradients(5)
            assert sum(losses) / 5 == pytest.approx(expected_loss, abs=1e-5)  # type: ignore[arg-type]
            found = gradients(pipeline)
            assert found.keys() == expected.keys()
            assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5

    run_virtual(story())


@pytest.mark.parametrize(("codec", "tolerance"), [("bf16", 0.02), ("q8", 0.04)])
def test_quantised_activations_stay_within_their_tolerance(codec: str, tolerance: float) -> None:
    async def story() -> None:
        async with Pipeline(4, codec=codec) as pipeline:
            await train_all(pipeline, [pipeline.path(0, 1, 2, 3)] * 3)
            _, expected = whole_gradients(3)
            found = gradients(pipeline)
            error = sum(float((found[name] - expected[name]).square().sum()) for name in expected) ** 0.5
            size = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
            assert 0.0 < error / size < tolerance

    run_virtual(story())


@pytest.mark.parametrize("stages", [(0, 2), (0, 2, 1), (0, 1, 3)])
def test_stages_may_be_skipped_and_change_places(stages: tuple[int, ...]) -> None:
    async def story() -> None:
        async with Pipeline(4) as pipeline:
            (loss,) = await train_all(pipeline, [pipeline.path(*stages)])
            expected = run_path([pipeline.at(stage).worker.stage for stage in stages], microbatches(1)[0])
            assert loss == pytest.approx(expected.item(), abs=1e-6)
            assert [pipeline.counted(stage) > 0 for stage in range(4)] == [stage in stages for stage in range(4)]

    run_virtual(story())


def test_what_others_wait_for_is_not_behind_a_pass() -> None:
    """A gradient is at the turnstile before the pass in progress ends; who is asked whether one counts answers at once."""
    beside = set()

    async def story() -> None:
        async with Pipeline(2) as pipeline:
            for each in pipeline.peers:

                async def run(function: Any, *args: Any, compute: Any = each.compute) -> Any:
                    beside.add((compute, function.__name__))
                    return await compute.run(function, *args)

                each.compute.run_beside = run  # type: ignore[method-assign,assignment]
            await train_all(pipeline, [pipeline.path(0, 1)] * 2)
            computes = [each.compute for each in pipeline.peers]
            assert beside == {(compute, name) for compute in computes for name in ("decode", "commit")}

    run_virtual(story())


def test_each_hop_takes_one_way_and_the_last_answer_a_round_trip() -> None:
    """Nobody asks before activations or gradients are on their way."""

    async def story(latency_s: float) -> float:
        async with Pipeline(3, latency_s=latency_s, hop_timeout_s=100.0) as pipeline:
            await train_all(pipeline, [pipeline.path(0, 1, 2)])
            return asyncio.get_running_loop().time()

    ways = run_virtual(story(2.0)) - run_virtual(story(1.0))
    opening = 2  # on the memory network
    assert ways == pytest.approx(6 * (opening + 1) + 2)


def test_the_holder_does_not_close_before_its_last_answer_is_read() -> None:
    """p2pd may reset a stream that is closed right after a write, and the answer is lost."""
    is_open: list[bool] = []

    async def serve(stream: Stream) -> None:
        task = await read_message(stream, Task)
        await read_bulk(stream, PAYLOAD_BYTES)
        await write_message(stream, Reply(ok=True))
        if task.kind == "backward":
            await write_message(stream, Reply(ok=True))
            assert (await read_message(stream, Reply)).ok
            try:
                async with asyncio.timeout(1.0):
                    await stream.read_exactly(1)
            except TimeoutError:
                is_open.append(True)

    async def story() -> None:
        async with Pipeline(2) as pipeline:
            origin, other = pipeline.at(0), pipeline.at(1)
            other.transport.handle(TASK_PROTOCOL, serve)
            terms = StageTerms(run=RUN, peer=origin.peer, payload_bytes=PAYLOAD_BYTES, slots=1)
            handover = Handover(terms, origin.transport, pipeline, lambda task, reason: None)
            counts = asyncio.get_running_loop().create_future()
            counts.set_result(True)
            task = Task(run=RUN, iteration=0, microbatch=1, kind="backward", path=[*pipeline.path(0, 1)], position=1)
            assert await handover.backward(task, memoryview(bytes(PAYLOAD_BYTES)), counts)
            await asyncio.sleep(2.0)

    run_virtual(story())
    assert is_open == [True]


def test_a_notice_is_read_before_its_stream_is_closed() -> None:
    """The last one of an iteration says that it has ended: who does not hear it waits until the next look at the directory."""
    is_open: list[bool] = []

    async def serve(stream: Stream) -> None:
        await read_message(stream, Notice)
        try:
            async with asyncio.timeout(1.0):
                await stream.read_exactly(1)
        except TimeoutError:
            is_open.append(True)

    async def story() -> float:
        async with Pipeline(2) as pipeline:
            loop, other = asyncio.get_running_loop(), pipeline.at(1)
            other.transport.handle(NOTICE_PROTOCOL, serve)
            told_s = loop.time()
            await pipeline.at(0).server.origin.announce_end([other.peer])
            return loop.time() - told_s

    assert run_virtual(story()) < 1.5, "and no longer"
    assert is_open == [True]


def test_fewer_slots_take_longer_and_nothing_is_lost() -> None:
    async def story(slots: int) -> float:
        async with Pipeline(3, slots=slots, waiting=0) as pipeline:
            losses = await train_all(pipeline, [pipeline.path(0, 1, 2)] * 3)
            assert all(isinstance(loss, float) for loss in losses)
            assert [pipeline.counted(stage) for stage in range(3)] == [3 * PER_MICROBATCH] * 3, (
                "busy is no reason to skip"
            )
            return asyncio.get_running_loop().time()

    with_one, with_three = run_virtual(story(1)), run_virtual(story(3))
    assert with_one > 1.5 * with_three


FORWARD, BACKWARD = "_run_forward", "_run_backward"


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


def test_an_origin_takes_no_more_than_its_share() -> None:
    async def story() -> None:
        async with Pipeline(3, slots=4, waiting=4, per_origin=2) as pipeline:
            pipeline.at(1).compute.stalls[FORWARD] = 3.0
            losses = await train_all(pipeline, [pipeline.path(0, 1, 2)] * 4)
            # What the second stage does not take goes around it.
            assert all(isinstance(loss, float) for loss in losses)
            assert pipeline.counted(1) == 2 * PER_MICROBATCH
            assert pipeline.counted(2) == 4 * PER_MICROBATCH

    run_virtual(story())
