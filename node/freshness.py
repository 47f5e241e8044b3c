"""Whether the state that this peer trains from is too old to be averaged with, and what tells so.

A joiner starts from the last snapshot for which there are votes, a returning peer from its own checkpoint, and either may be many
rounds old. The others then refuse what it sends (averaging/admission.py), or cannot read it, and neither mends by itself
for a long time: a refused peer is not pulled nearer by them. So a state from an earlier round is on trial for some rounds. A peer

- wants a newer state if its own was more than FRESH_ROUNDS old when it was taken, or once it has been refused, and says so in its
  record: the others publish a snapshot before its time (node/snapshots.py);
- takes that as soon as there are votes for it, but only once it has been refused, by what it saw itself or by what the records of
  those it met tell of it, since a state in a run that moves slowly may be old and good, and a download is dear;
- is content, and its trial over, when two of the others (or the only one) averaged with it last, and fewer refused it.

What a liar can do with that: claim to have refused us after we met, which costs a download of a state for which the usual votes are
needed and our optimizer's moments, MAX_REPLACED times at most after a start; or claim to have averaged with us, which one refusal
outweighs, but not two liars' claims. Beyond the trial nobody's word counts, only the distance to several (averaging/admission.py,
`is_astray`).
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
MAX_REPLACED = 2
"""States that one trial replaces at most."""
_GOOD = ("averaged", "clipped")


class Freshness:
    """The age of one trainer's state; keeps `progress.wants_state`.

    Args:
        progress: of this peer; its notes tell what became of the exchanges.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._state_round = self._since = self._ends_at = self._num_replaced = 0
        self._is_on_trial = False
        self._fates: dict[str, str] = {}
        """By partner since then: what became of the newest exchange, by its word and by ours."""

    def took(self, *, state_round: int, at_round: int, swarm_round: int | None) -> None:
        """A state was taken at the start.

        Args:
            state_round: rounds of training in it.
            at_round: the first round that is trained from it.
            swarm_round: the round that the others are in; None if there are none.
        """
        now = max(at_round, swarm_round or 0)  # a peer that is behind skips to the others' round after its first
        self._begin(state_round, at_round)
        self._is_on_trial, self._ends_at, self._num_replaced = now > state_round, now + TRIAL_ROUNDS, 0
        self._progress.wants_state = now - state_round > FRESH_ROUNDS

    def replaced(self, *, state_round: int, at_round: int) -> None:
        """A newer state took its place; arguments as of `took`. The trial, if it is not over, goes on and gets no longer."""
        self._begin(state_round, at_round)
        self._num_replaced += 1
        self._is_on_trial = self._is_on_trial and self._num_replaced < MAX_REPLACED
        self._progress.wants_state = False

    def _begin(self, state_round: int, at_round: int) -> None:
        self._state_round, self._since = state_round, at_round
        self._fates.clear()

    @property
    def wanted_round(self) -> int:
        """The oldest state that is worth fetching instead of the one taken."""
        return self._state_round + FRESH_ROUNDS + 1

    def after_round(self, others: Mapping[PeerId, PeerRecord]) -> bool:
        """Look at what became of the exchanges; whether the state does not pass its trial, so that a newer one should be fetched.

        Args:
            others: the live trainers' records.
        """
        if not self._is_on_trial:
            return False
        progress = self._progress
        self._note_fates(others)
        fates = list(self._fates.values())
        refusals, accepted = fates.count("refused"), sum(fate in _GOOD for fate in fates)
        is_settled = accepted >= min(SETTLING_PARTNERS, len(others)) and accepted > refusals
        if is_settled or progress.round >= self._ends_at:
            self._is_on_trial = progress.wants_state = False
            return False
        progress.wants_state = progress.wants_state or refusals > 0
        return refusals > 0

    def _note_fates(self, others: Mapping[PeerId, PeerRecord]) -> None:
        """Of every partner the newest: refused if we refused it, else what its record tells."""
        progress = self._progress
        own = {n.partner: n.outcome for n in progress.recent if n.partner is not None and n.round >= self._since}
        for partner, outcome in own.items():
            self._fates[partner] = "refused" if outcome == "refused" else self._fates.get(partner, "")
        for partner, record in others.items():
            if partner not in self._fates or own.get(partner) == "refused":
                continue
            for note in record.recent:
                if note.partner == progress.peer and self._since <= note.round <= progress.round + 1:
                    self._fates[partner] = note.outcome
