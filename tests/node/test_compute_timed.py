"""What `timed` counts: the function's own time, and not its wait for the call before it."""

from __future__ import annotations

import asyncio
import time

import pytest

from node.compute import ThreadCompute, VirtualCompute
from node.progress import Progress
from protocol.ids import RunId
from protocol.transport import Traffic
from protocol.virtual_time import run_virtual
from tests.protocol.samples import RUN, identity


async def test_a_wait_for_the_thread_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock moves only where a function says so, so the test is about which moments are compared.
    now_s = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    def work(seconds: float) -> str:
        now_s[0] += seconds
        return f"{seconds}"

    compute = ThreadCompute()
    try:
        results = await asyncio.gather(*(compute.timed(work, seconds) for seconds in (2.0, 0.5)))
    finally:
        compute.close()
    assert results == [("2.0", 2.0), ("0.5", 0.5)]


def test_in_virtual_time_it_is_the_virtual_time() -> None:
    result, seconds = run_virtual(VirtualCompute(seconds_per_call=0.3).timed(lambda: 7))
    assert result == 7
    assert seconds == pytest.approx(0.3)


def test_the_training_share_is_that_of_the_wall_time() -> None:
    own = Progress(run=RunId(RUN), peer=identity(1).peer_id, name="", inner_steps=10, traffic=Traffic())
    shares = [own.training_share]
    own.count_step(loss=5.0, tokens=1, seconds=2.0, now_s=102.0)
    shares.append(own.training_share)
    own.count_step(loss=5.0, tokens=1, seconds=1.0, now_s=104.0)
    assert [*shares, own.training_share] == [None, 1.0, 0.75]
