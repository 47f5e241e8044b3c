"""The virtual clock: jumps, order, threads, deadlocks."""

from __future__ import annotations

import asyncio
import time

import pytest

from protocol.virtual_time import DeadlockError, run_virtual


def test_an_hour_passes_in_no_time() -> None:
    async def sleep_an_hour() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    started_s = time.monotonic()
    assert run_virtual(sleep_an_hour()) == pytest.approx(3600)
    assert time.monotonic() - started_s < 1.0


def test_timers_fire_in_order_and_time_stands_still_between_them() -> None:
    async def collect() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        log: list[tuple[str, float]] = []

        async def note(name: str, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            log.append((name, loop.time()))

        async with asyncio.TaskGroup() as group:
            for name, delay_s in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
                group.create_task(note(name, delay_s))
        return log

    assert run_virtual(collect()) == [("a", 1.0), ("b", 2.0), ("c", 3.0)]


def test_timeouts_use_virtual_time() -> None:
    async def wait() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(600):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(wait()) == pytest.approx(600)


def test_a_deadlock_is_reported_instead_of_hanging() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="all tasks wait"):
        run_virtual(wait_for_ever())


def test_a_thread_takes_no_virtual_time_and_is_no_deadlock() -> None:
    async def work() -> tuple[int, float]:
        result = await asyncio.to_thread(sum, range(200_000))
        return result, asyncio.get_running_loop().time()

    assert run_virtual(work()) == (sum(range(200_000)), 0.0)


def test_time_stands_still_for_a_thread_while_timers_are_set() -> None:
    async def work() -> float:
        loop = asyncio.get_running_loop()
        ticker = loop.create_task(asyncio.sleep(100))
        await asyncio.to_thread(time.sleep, 0.01)
        after_s = loop.time()
        await ticker
        return after_s

    assert run_virtual(work()) == 0.0


def test_an_exception_comes_through() -> None:
    async def fail() -> None:
        await asyncio.sleep(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_virtual(fail())


def test_many_small_steps_do_not_stall_on_rounding() -> None:
    async def tick() -> float:
        for _ in range(5000):
            await asyncio.sleep(0.1)
        return asyncio.get_running_loop().time()

    assert run_virtual(tick()) == pytest.approx(500.0, abs=1e-3)
