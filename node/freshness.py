"""Whether the state that this peer trains from is too old to be averaged with, and what tells so.

A joiner starts from the last snapshot for which there are votes, a returning peer from its own checkpoint, and either may be many
rounds old. The others then refuse what it sends (averaging/admission.py), or cannot read it, and neither mends by itself
for a long time: a refused peer is not pulled nearer by them. So a state that was just taken is on trial for some rounds. A peer

- wants a newer state if its own was more than FRESH_ROUNDS old when it was taken, or once it has been refused, and says so in its
  record: the others publish a snapshot before its time (node/snapshots.py);
- takes that as soon as there are votes for it, but only once it has been refused, by what the others' records tell of it or by what
  it saw itself, since a state in a run that moves slowly may be old and good, and a download is dear;
- is content, and its trial over, when two of the others averaged with it last, and fewer refused it.

What one liar can do with that: claim to have refused us, which costs a download of a state for which the usual votes are needed,
until more of the others have averaged with us; or claim to have averaged with us, which one refusal outweighs. Beyond the trial
nobody's word counts, only the distance to several (averaging/admission.py, `is_astray`).
"""

from __future__ import annotations

from collections.abc import Mapping

from node.progress import Progress
from node.snapshots import FRESH_ROUNDS
from protocol.ids import PeerId
from protocol.records import PeerRecord

__all__ = ["TRIAL_ROUNDS", "Freshness"]

SETTLING_PARTNERS = 2
"""One that averaged with us may be a liar, or have met us on a good day."""
TRIAL_ROUNDS = 16
"""A trial, and with it the wish, ends after so many rounds, whatever came of it: who meets nobody would else wish for ever."""


class Freshness:
    """The age of one trainer's state; keeps `progress.wants_state`.

    Args:
        progress: of this peer; its notes tell what became of the exchanges.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._state_round = self._since = 0
        self._is_on_trial = False

    def took(self, *, state_round: int, at_round: int, swarm_round: int | None) -> None:
        """A state was taken.

        Args:
            state_round: rounds of training in it.
            at_round: the first round that is trained from it.
            swarm_round: the round that the others are in; None if there are none.
        """
        self._state_round, self._since, self._is_on_trial = state_round, at_round, True
        self._progress.wants_state = (swarm_round or 0) - state_round > FRESH_ROUNDS

    @property
    def wanted_round(self) -> int:
        """The oldest state that is worth fetching instead of the one taken."""
        return self._state_round + FRESH_ROUNDS + 1

    def is_refused(self, others: Mapping[PeerId, PeerRecord]) -> bool:
        """After a round: whether the state does not pass its trial, so that a newer one should be fetched.

        Args:
            others: the live trainers' records.
        """
        if not self._is_on_trial:
            return False
        progress = self._progress
        own = [note.outcome for note in progress.recent if note.partner is not None and note.round >= self._since]
        told = [fate for record in others.values() if (fate := self._fate(record)) is not None]
        refusals = told.count("refused") + (own[-1:] == ["refused"])
        accepted = sum(fate in ("averaged", "clipped") for fate in told)
        is_settled = accepted >= SETTLING_PARTNERS and accepted > refusals
        if is_settled or progress.round >= self._since + TRIAL_ROUNDS:
            self._is_on_trial = progress.wants_state = False
            return False
        progress.wants_state = progress.wants_state or refusals > 0
        return refusals > 0

    def _fate(self, record: PeerRecord) -> str | None:
        """What became of the newest exchange with us that the record tells of; None if there was none with this state."""
        own = self._progress.peer
        found = [note.outcome for note in record.recent if note.partner == own and note.round >= self._since]
        return found[-1] if found else None
