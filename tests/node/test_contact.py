"""When the owner hears that the swarm is gone, and that it is back."""

from __future__ import annotations

from node.contact import PATIENCE_S, Contact
from node.events import EventLog

BEAT_S = 3.0


class Story:
    """Heartbeats, and the events that come of them."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.now_s = 0.0
        log = EventLog()
        log.listen(lambda event, fields: self.heard.append(event))
        self.contact = Contact(log)

    def beats(self, seconds: float, problem: str | None, num_peers: int) -> list[str]:
        """What is heard during `seconds` of the same."""
        before = len(self.heard)
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.contact.note(problem, num_peers=num_peers, now_s=self.now_s)
            self.now_s += BEAT_S
        return self.heard[before:]


def test_short_trouble_is_not_worth_a_word() -> None:
    story = Story()
    for _ in range(10):
        story.beats(PATIENCE_S - BEAT_S, "down", 2)
        story.beats(BEAT_S, None, 2)
    assert story.heard == []


def test_lasting_trouble_is_told_once_and_its_end_once() -> None:
    story = Story()
    assert story.beats(60.0, None, 2) == []
    assert story.beats(10 * PATIENCE_S, "down", 2) == ["swarm_unreachable"]
    assert story.beats(60.0, None, 2) == ["swarm_reachable"]


def test_the_first_peer_is_not_alone() -> None:
    story = Story()
    assert story.beats(1000.0, None, 0) == []


def test_the_last_peer_is() -> None:
    story = Story()
    story.beats(BEAT_S, None, 1)
    assert story.beats(10 * PATIENCE_S, None, 0) == ["alone"]
    assert story.beats(60.0, None, 1) == ["company"]


def test_a_cut_cable_gives_one_warning_at_a_time() -> None:
    story = Story()
    story.beats(60.0, None, 3)
    assert story.beats(60.0, "down", 3) == ["swarm_unreachable"]
    assert story.beats(60.0, "down", 0) == [], "the others' records lapse; that is no news"
    assert story.beats(60.0, None, 3) == ["swarm_reachable"]
