"""Who broke the rules how often."""

from __future__ import annotations

from protocol.ids import PeerId
from protocol.violations import MAX_OFFENDERS, Violations


def test_every_violation_counts() -> None:
    violations = Violations()
    assert not violations
    for peer in ("a", "b", "a"):
        violations.blame(PeerId(peer))
    assert violations == {"a": 2, "b": 1}
    assert violations[PeerId("c")] == 0


def test_strangers_without_number_are_forgotten_and_a_steady_offender_is_not() -> None:
    violations, steady = Violations(), PeerId("steady")
    for number in range(MAX_OFFENDERS + 10):
        violations.blame(PeerId(f"stranger-{number}"))
        violations.blame(steady)
    assert len(violations) == MAX_OFFENDERS
    assert violations[PeerId("stranger-0")] == 0
    assert violations[steady] == MAX_OFFENDERS + 10
