"""Where torch runs: one worker thread, so that the network loop never waits for arithmetic.

`ThreadCompute` is the real one. `VirtualCompute` runs the same calls inline and lets a fixed virtual time pass for each, so
that swarms of real trainers can run on the memory transport's virtual clock, independent of this machine's speed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["Compute", "ThreadCompute", "VirtualCompute"]

NICENESS = 10
LEAST_PRIORITY = 19
"""For what runs aside: training comes first."""
ASIDE_TIMEOUT_S = 120.0

P = ParamSpec("P")
T = TypeVar("T")


class Compute(ABC):
    """Runs blocking functions one after another, never two at once, but for what runs beside or aside."""

    @abstractmethod
    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` and return what it returns. Cancelling the await does not stop a call that has started."""

    async def timed(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
        """Like `run`, and how many seconds the function itself took, waiting for its turn not included."""
        started_s = asyncio.get_running_loop().time()
        result = await self.run(function, *args, **kwargs)
        return result, asyncio.get_running_loop().time() - started_s

    async def run_beside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of a few milliseconds that does not wait for the call in progress; of these, too, never two at once."""
        return await self.run(function, *args, **kwargs)

    async def run_aside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a long function that must hold up neither the loop nor `run`. Everything about it must be picklable.

        Raises:
            TimeoutError: it took longer than ASIDE_TIMEOUT_S.
            ChildProcessError: its process was ended by somebody else.
        """
        return function(*args, **kwargs)

    @abstractmethod
    def close(self) -> None:
        """Let the call in progress finish, then take no more."""


class ThreadCompute(Compute):
    """One thread of its own, at low priority, so that the owner's programs and our own network come first."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute", initializer=_yield_to_others)
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside", initializer=_yield_to_others)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    async def timed(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
        return await self.run(_with_seconds, function, *args, **kwargs)

    async def run_beside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._beside, lambda: function(*args, **kwargs))

    async def run_aside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        # Neither a pool nor an executor: this can be ended in the middle of a call, and needs no semaphores, which a killed peer
        # would leave to somebody else to clean up.
        context = get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work_aside, args=(sender, function, args, kwargs), daemon=True)
        given_up = threading.Event()
        working = asyncio.ensure_future(asyncio.to_thread(_result_of, process, receiver, sender, given_up))
        try:
            async with asyncio.timeout(ASIDE_TIMEOUT_S):
                result, error = await asyncio.shield(working)
        finally:
            given_up.set()
            if process.pid is not None:
                process.kill()
        if error is not None:
            raise error
        return cast(T, result)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._beside.shutdown(wait=True, cancel_futures=True)


class VirtualCompute(Compute):
    """Inline, each call taking `seconds_per_call` of the loop's (virtual) time."""

    def __init__(self, *, seconds_per_call: float) -> None:
        self._seconds = seconds_per_call

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        result = function(*args, **kwargs)
        await asyncio.sleep(self._seconds)
        return result

    def close(self) -> None:
        pass


def _with_seconds(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    started_s = time.perf_counter()
    return function(*args, **kwargs), time.perf_counter() - started_s


def _yield_to_others() -> None:
    """Lower this thread's priority. Only Linux can do that to a single thread; torch's own threads inherit it."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _result_of(
    process: SpawnProcess, receiver: Connection, sender: Connection, given_up: threading.Event
) -> tuple[Any, BaseException | None]:
    """Start a process and wait for what it sends: a result, or the error instead."""
    with receiver:
        with sender:
            process.start()
        if given_up.is_set():  # while it started
            process.kill()
        try:
            found: tuple[Any, BaseException | None] = receiver.recv()
        except EOFError:
            found = None, ChildProcessError("a process ended without a result")
        process.join()
    return found


def _work_aside(sender: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """What the process does. It does not outlive its peer, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the peer's to answer
    os.nice(LEAST_PRIORITY)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    found: tuple[Any, BaseException | None]
    try:
        found = function(*args, **kwargs), None
    except Exception as error:  # raised again where the result is waited for
        found = None, error
    sender.send(found)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
