"""Microbatches through real stages: exact when all goes well, in as few journeys as can be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from model.stage import run_path
from node.pipeline.handover import Handover, StageTerms
from node.pipeline.messages import NOTICE_PROTOCOL, TASK_PROTOCOL, Notice, Reply, Task
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import read_bulk, read_message, write_message
from tests.node.pipeline.stages import (
    FORWARD,
    PER_MICROBATCH,
    RUN,
    Pipeline,
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
            task = Task(
                run=RUN,
                iteration=0,
                microbatch=1,
                kind="backward",
                path=[*pipeline.path(0, 1)],
                position=1,
                payload_bytes=PAYLOAD_BYTES,
            )
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
