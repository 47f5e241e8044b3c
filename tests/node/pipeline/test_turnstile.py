"""Who is served next."""

from __future__ import annotations

import asyncio

from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.turnstile import Turnstile
from protocol.virtual_time import run_virtual


def served(slots: int, tasks: list[tuple[str, int, int]]) -> list[str]:
    """Names in the order of service; all wait while somebody else is served."""

    async def story() -> list[str]:
        turnstile, order = Turnstile(slots), list[str]()

        async def task(name: str, kind: int, priority: int) -> None:
            async with turnstile.turn(kind, priority):
                order.append(name)
                if kind == BACKWARD:
                    turnstile.give_back()
                await asyncio.sleep(1.0)

        async with asyncio.TaskGroup() as group:
            first = group.create_task(task("first", LOSS, 0))
            await asyncio.sleep(0.5)
            waiting = [group.create_task(task(*each)) for each in tasks]
            await asyncio.sleep(0.1)
            assert turnstile.num_waiting == len(tasks)
            await asyncio.sleep(100.0)
            for each in (first, *waiting):
                each.cancel()
        return order[1:]

    return run_virtual(story())


def test_backward_and_loss_go_first_then_priority_then_arrival() -> None:
    tasks = [("f2", FORWARD, 2), ("f1", FORWARD, 1), ("b5", BACKWARD, 5), ("l4", LOSS, 4), ("f1 later", FORWARD, 1)]
    assert served(9, tasks) == ["l4", "b5", "f1", "f1 later", "f2"]


def test_forward_passes_wait_for_slots_and_others_do_not() -> None:
    assert served(1, [("f0", FORWARD, 0), ("f1", FORWARD, 1), ("f2", FORWARD, 2)]) == ["f0"]
    assert served(1, [("f0", FORWARD, 0), ("f1", FORWARD, 1), ("b", BACKWARD, 9)]) == ["b", "f0", "f1"]
    assert served(0, [("f0", FORWARD, 0), ("l", LOSS, 1)]) == ["l"]


def test_whoever_is_cancelled_takes_nothing() -> None:
    async def story() -> None:
        turnstile = Turnstile(1)
        inside, done = asyncio.Event(), list[str]()

        async def task(name: str) -> None:
            async with turnstile.turn(FORWARD, 0):
                inside.set()
                await asyncio.sleep(1.0)
                done.append(name)

        first, second, third = (asyncio.create_task(task(name)) for name in "abc")
        await inside.wait()
        second.cancel()
        await first
        turnstile.give_back()
        await third
        assert done == ["a", "c"]
        assert turnstile.free_slots == 0

        # Admitted and cancelled at the same moment: the slot is back, and the next one is served.
        turnstile.give_back()
        async with turnstile.turn(LOSS, 0):
            fourth = asyncio.create_task(task("d"))
            await asyncio.sleep(0.1)
        fourth.cancel()
        await asyncio.wait((fourth,))
        assert turnstile.free_slots == 1
        await task("e")
        assert done[-1] == "e"

    run_virtual(story())
