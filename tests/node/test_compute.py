"""Where torch runs."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from node.compute import NICENESS, ThreadCompute, VirtualCompute
from protocol.virtual_time import run_virtual


async def test_calls_run_one_after_another_on_one_thread_beside_the_loop() -> None:
    compute = ThreadCompute()
    running = 0
    threads = set()

    def work(number: int, *, twice: bool) -> int:
        nonlocal running
        running += 1
        assert running == 1
        threads.add(threading.get_ident())
        time.sleep(0.001)
        running -= 1
        return 2 * number if twice else number

    results = await asyncio.gather(*(compute.run(work, number, twice=True) for number in range(20)))
    assert results == [2 * number for number in range(20)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    compute.close()


async def test_errors_come_back_to_the_caller() -> None:
    compute = ThreadCompute()
    with pytest.raises(ZeroDivisionError):
        await compute.run(lambda: 1 // 0)
    assert await compute.run(lambda: 1) == 1, "and the next call works"
    compute.close()


async def test_cancelling_does_not_break_the_call_in_progress() -> None:
    compute = ThreadCompute()
    begun, proceed = threading.Event(), threading.Event()
    ended = []

    def work() -> None:
        begun.set()
        proceed.wait(10)
        ended.append(True)

    task = asyncio.create_task(compute.run(work))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    proceed.set()
    await asyncio.to_thread(compute.close)
    assert ended == [True], "close waits for it"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority per thread")
async def test_the_thread_yields_to_everything_else() -> None:
    compute = ThreadCompute()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    other = await compute.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert other >= min(19, max(own, NICENESS))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    compute.close()


def test_virtual_calls_take_virtual_time() -> None:
    async def story() -> float:
        compute = VirtualCompute(seconds_per_call=100.0)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert await compute.run(lambda: "done") == "done"
        compute.close()
        return loop.time() - began_s

    assert run_virtual(story()) == pytest.approx(100.0)


async def test_what_runs_aside_has_a_process_of_its_own_and_ends_with_its_caller() -> None:
    compute = ThreadCompute()
    there = await compute.run_aside(os.getpid)
    assert there != os.getpid()
    with pytest.raises(ZeroDivisionError):
        await compute.run_aside(divmod, 1, 0)
    slow = asyncio.create_task(compute.run_aside(time.sleep, 3600))
    children = multiprocessing.active_children
    while not children():  # noqa: ASYNC110 - a process has no event to wait for
        await asyncio.sleep(0.01)
    (child,) = children()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    # Not child.join: the thread that started the process waits for it, too, and only one of two is told that it ended.
    assert multiprocessing.connection.wait([child.sentinel], timeout=30) == [child.sentinel]
    compute.close()


async def test_an_aside_process_that_somebody_ends_is_an_error() -> None:
    compute = ThreadCompute()
    with pytest.raises(ChildProcessError):
        await compute.run_aside(os._exit, 1)
    compute.close()


def test_what_runs_aside_does_not_outlive_a_killed_peer() -> None:
    """Nor does it say anything: its terminal is somebody else's by then."""
    aside = "import time; print('begun', flush=True); time.sleep(3600)"
    peer = f"import asyncio, node.compute as c; asyncio.run(c.ThreadCompute().run_aside(exec, {aside!r}))"
    with subprocess.Popen([sys.executable, "-c", peer], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=30) == (b"", b""), "whoever lives still holds the pipes"


def test_ctrl_c_at_a_terminal_says_nothing_in_what_runs_aside() -> None:
    """A terminal tells every process of its group; what runs aside leaves the answer to its peer."""
    aside = "import time; print('begun', flush=True); time.sleep(3600)"
    peer = (
        "import asyncio, signal, node.compute as c; signal.signal(signal.SIGINT, lambda *_: None); "
        f"asyncio.run(c.ThreadCompute().run_aside(exec, {aside!r}))"
    )
    command = [sys.executable, "-c", peer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        os.killpg(process.pid, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=30) == (b"", b"")


async def test_what_runs_beside_does_not_wait_for_the_call_in_progress() -> None:
    compute = ThreadCompute()
    may_end, has_begun = threading.Event(), threading.Event()

    def long() -> None:
        has_begun.set()
        assert may_end.wait(10.0)

    running = asyncio.create_task(compute.run(long))
    await asyncio.to_thread(has_begun.wait)
    assert await compute.run_beside(lambda: 7) == 7
    assert not running.done()
    may_end.set()
    await running
    compute.close()
