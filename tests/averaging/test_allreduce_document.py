"""docs/PROTOCOL.md tells the all-reduce's messages as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from averaging.allreduce import PROTOCOL
from averaging.allreduce_ledger import MEAN_DOMAIN
from averaging.allreduce_messages import Ballot, Echo, Hello, Mean, Part, Want
from protocol.wire import Message

TEXT = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text()


def test_stream_and_signature_domain_are_named() -> None:
    assert f"| `{PROTOCOL}` |" in TEXT
    assert f": `{PROTOCOL}`" in TEXT
    assert TEXT.count(f"`{MEAN_DOMAIN}`") == 2


@pytest.mark.parametrize("message", [Hello, Ballot, Part, Mean, Echo, Want])
def test_fields_are_there_in_the_order_of_the_statement(message: type[Message]) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {message.__name__} |"))
    places = [row.index(f"`{field}`") for field in message.model_fields]
    assert places == sorted(places)
