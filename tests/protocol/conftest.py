"""What every transport promises is checked on both: the in-process one and the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.protocol.worlds import World


@pytest.fixture(params=["memory", pytest.param("libp2p", marks=pytest.mark.net)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        yield World(request.param, tmp_path, stack)
    assert asyncio.all_tasks() - before <= {asyncio.current_task()}, "a task was left behind"
