"""The swarm that the tests of a file share, and how they tell what they measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from tests.net.swarm import Swarm

__all__: list[str] = []


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Processes of one run; see `Swarm` for how to share it. One per file, so that none trains while others are tested."""
    with Swarm(tmp_path_factory.mktemp("swarm")) as swarm:
        yield swarm


@pytest.fixture
def measured(
    record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> Callable[[str, float], None]:
    """Call it with what took how many seconds: printed, and kept in a JUnit report."""

    def tell(what: str, seconds: float) -> None:
        record_property(what, round(seconds, 2))
        with capsys.disabled():
            sys.stdout.write(f"\n{what}: {seconds:.2f} s ")

    return tell
