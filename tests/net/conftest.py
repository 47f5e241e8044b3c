"""The swarm that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.net.swarm import Swarm

__all__: list[str] = []


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Processes of one run; see `Swarm` for how to share it."""
    with Swarm(tmp_path_factory.mktemp("swarm")) as swarm:
        yield swarm
