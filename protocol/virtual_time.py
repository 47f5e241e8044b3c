"""An asyncio event loop whose clock jumps to the next timer as soon as nothing is left to do.

A simulated hour then costs only the work done in it, every run of the same program is the same, and no test sleeps. The
selector is the single place where an event loop waits, so the whole trick is a selector that advances the clock by the
time it was asked to wait. A loop that waits for ever with nothing under way is a deadlock, and is reported as one
instead of hanging.

Work handed to threads (`asyncio.to_thread`) takes no virtual time: the clock stands still until it is done. Sockets and
child processes have a clock of their own and do not belong here.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

__all__ = ["DeadlockError", "VirtualTimeLoop", "run_virtual"]

T = TypeVar("T")


class DeadlockError(RuntimeError):
    """Every task waits for another and no timer is set: the program would have hung."""


class _JumpingSelector(selectors.SelectSelector):
    """Polls for real events, and where it should have waited, moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_thread_jobs = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self.num_thread_jobs:
            return super().select(None)
        if timeout is None:
            raise DeadlockError("all tasks wait for each other and no timer is set")
        self.now_s += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector event loop with virtual time, which starts at zero."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now_s

    def run_in_executor(  # type: ignore[override]  # typeshed's variadic generics say the same with a TypeVarTuple
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run `func(*args)` in a thread; virtual time stands still meanwhile."""
        future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        self._jumping.num_thread_jobs += 1
        future.add_done_callback(self._thread_job_ended)
        return future

    async def shutdown_default_executor(self) -> None:
        """Wait for the threads, in real time."""
        self._jumping.num_thread_jobs += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._jumping.num_thread_jobs -= 1

    def _thread_job_ended(self, future: asyncio.Future[Any]) -> None:
        self._jumping.num_thread_jobs -= 1


def run_virtual(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` to its end on a new `VirtualTimeLoop`, like `asyncio.run`, and return its result.

    Raises:
        DeadlockError: nothing can ever happen again, yet `coro` has not ended.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coro)
