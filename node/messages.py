"""Events in words: what the owner of a node is told, and how urgently.

Each event that a person may care about has one sentence here, so that the live view, plain output and the bootstrap node say the
same. A warning about a lasting condition (the disk is full, the swarm is gone) stands until the event that ends it; the live
view keeps it on the screen that long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bootstrap.document import printable
from node.quantities import count, duration

__all__ = ["ENDED_BY", "Message", "describe", "topic"]

Fields = Mapping[str, Any]
Level = Literal["detail", "info", "warning"]

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""Run and blob ids, which are shown by their first digits."""

ENDED_BY = {
    "checkpoint_saved": "checkpoint_failed",
    "disk_recovered": "disk_error",
    "swarm_reachable": "swarm_unreachable",
    "company": "alone",
    "training": "waiting_for_data",
    "state_adopted": "waiting_for_state",
}
"""Which event ends which lasting warning."""


@dataclass(frozen=True, slots=True)
class Message:
    """One event for a person.

    Attributes:
        text: one printable line.
        level: detail (of interest when nothing else is shown), info, or warning (something to mend or to know).
    """

    text: str
    level: Level


def describe(event: str, fields: Fields) -> Message | None:
    """The event in words; None for one that is only for programs."""
    if event == "log" and fields["level"] in ("error", "critical"):
        return Message(printable(fields["text"]), "warning")
    if event not in _SENTENCES:
        return None
    level, sentence = _SENTENCES[event]
    text = sentence(fields) if callable(sentence) else sentence.format(**fields)
    return Message(printable(_HASH.sub(r"\1…", " ".join(text.split()))), level)


def topic(event: str, fields: Fields) -> str:
    """What a lasting warning is about; a newer one about the same replaces it."""
    return f"{event} {fields['path']}" if "path" in fields else event


def _exchange(fields: Fields) -> str:
    return f"Round {fields['round']}: {_outcome(fields)}"


def _outcome(fields: Fields) -> str:
    partner = "" if fields["partner"] is None else f"…{fields['partner'][-8:]}"
    return {
        "averaged": f"averaged with {partner} in {fields['seconds']:.1f} s",
        "clipped": f"averaged with {partner} in {fields['seconds']:.1f} s, its update clipped",
        "refused": f"refused the update of {partner}: it is out of bounds",
        "alone": "no partner was free",
        "timeout": f"{partner or 'the partner'} did not finish in time; goes on without it",
        "lost": f"{partner or 'the partner'} vanished; goes on without it",
    }[fields["outcome"]]


def _group(fields: Fields) -> str:
    if fields["outcome"] == "alone":
        return f"Round {fields['round']}: no group came together; stepped alone"
    missing = f"; {len(fields['missing'])} missing" if fields["missing"] else ""
    partial = f"; {count(fields['own_numel'])} values are our own, their mean was lost" if fields["own_numel"] else ""
    return f"Round {fields['round']}: mean of {fields['members']} peers in {fields['seconds']:.1f} s{missing}{partial}"


def _shard_unavailable(fields: Fields) -> str:
    instead = "reading one that is here instead" if fields.get("fallback", True) else "waiting for a peer that has it"
    return f"Data shard {fields['shard']}… cannot be had ({fields['reason']}); {instead}"


def _swarm(fields: Fields) -> str:
    parts = [f"{fields['training']} of {fields['peers']} peers training", f"round {fields['round']}"]
    if fields["val_loss"] is not None:
        parts.append(f"held-out loss {fields['val_loss']:.3f}")
    return " · ".join([*parts, f"{count(fields['tokens_per_s'])} tokens/s"])


def _meeting(fields: Fields) -> str:
    near = "" if fields["distance"] is None else f"; relative distance {fields['distance']:.1g}"
    return f"Final averaging: {_outcome(fields)}{near}"


def _consolidated(fields: Fields) -> str:
    outcome = (
        "All peers hold one model" if fields["agreed"] else "The final averaging ended before all models were the same"
    )
    near = "" if fields["distance"] is None else f", within {fields['distance']:.1g} of the last partner's"
    whose = "" if fields["agreed"] else "; the saved checkpoint is this peer's own model"
    return f"{outcome}{near}{_loss(fields)}{whose}"


def _loss(fields: Fields) -> str:
    return "" if fields["loss"] is None else f"; held-out loss {fields['loss']:.3f}"


_SENTENCES: dict[str, tuple[Level, str | Callable[[Fields], str]]] = {
    # starting
    "connecting": ("info", "Connecting to the swarm"),
    "web_page": ("info", "Status page {url}"),
    "waiting_for_data": ("warning", "Waiting for the run's data: {reason}"),
    "listening": (
        "detail",
        lambda f: f"Others can join through {f['addresses'][0]}" if f["addresses"] else "Listening",
    ),
    "waiting_for_state": (
        "warning",
        "The swarm is at round {swarm_round}; waiting for a state that enough peers agree on",
    ),
    "measured": ("info", "Measured this machine: {sequences_per_step} sequences per step"),
    "resumed": (
        "info",
        lambda f: f"Goes on from its checkpoint: round {f['round']}, step {f['step']}, {count(f['tokens'])} tokens",
    ),
    "state_adopted": (
        "info",
        lambda f: (
            f"Took the swarm's state of round {f['round']} from {f['donors']} peer{'s' * (f['donors'] > 1)}{_loss(f)}"
        ),
    ),
    "initial_state": (
        "warning",
        "No state of the swarm is to be had yet; starts from the initial weights in round {round}",
    ),
    "stage": ("info", "Holds stage {stage} of {stages}, counted from 0"),
    "training": (
        "info",
        lambda f: (
            f"Training from round {f['round']} with {f['sequences']} sequences per "
            f"{'step' if f.get('stage') is None else 'microbatch'}"
        ),
    ),
    "leaving": ("info", "Leaving after the step and the write in progress; Ctrl-C again ends at once"),
    # rounds
    "validation": ("detail", "Round {round}: held-out loss {loss:.3f}"),
    "exchange": ("detail", _exchange),
    "group_round": ("detail", _group),
    "iteration": (
        "detail",
        lambda f: (
            f"Iteration {f['number']}: gradients of {f['tokens']} tokens; {f['returned']} microbatches came back, "
            f"{f['lost']} did not{'' if f['complete'] else '; it ended by its deadline'}"
        ),
    ),
    "hop_failed": (
        "detail",
        lambda f: f"…{f['peer'][-8:]} did not take microbatch {f['microbatch']} ({f['kind']}): {f['reason']}",
    ),
    "plan": (
        "detail",
        lambda f: (
            f"Follows plan {f['number']} by …{f['planner'][-8:]}; it expects {f['iteration_s']:.2f} s per iteration"
        ),
    ),
    "plan_refused": ("detail", "Does not follow plan {number}: {reason}"),
    "watcher_failed": ("warning", "Something went wrong beside training, which goes on: {reason}"),
    "moving": ("info", "Moves from stage {stage} to stage {to}, which needs it more"),
    "stage_rebuilt": (
        "info",
        lambda f: (
            f"Stage {f['stage']} had no peer left; goes on from "
            f"{'the mean of its neighbours' if f['source'] == 'neighbours' else 'a copy'} of round {f['round']}"
        ),
    ),
    "stage_lost": ("warning", "Nobody keeps a state of stage {stage}; it begins anew in round {round}"),
    "handing_over": ("info", "The run is over; stays {seconds:.0f} s, so that others can fetch stage {stage}"),
    "stage_archived": ("detail", "Keeps the state of stage {stage} after round {round}"),
    "round_skipped": ("detail", "Skips from round {own} to {swarm}, where the swarm is"),
    "snapshot_published": ("detail", "Published the state of round {round} for joiners"),
    "snapshot_kept": ("detail", "Keeps a copy of the state of round {round} for joiners"),
    "snapshot_unavailable": ("detail", "Could not copy the state of round {round}: {reason}"),
    "swarm": ("detail", _swarm),
    "consolidating": (
        "info",
        lambda f: (
            f"The last round is done; averages with {f['peers']} other peer{'s' * (f['peers'] > 1)} until all hold one model"
        ),
    ),
    "consolidation": ("detail", _meeting),
    "consolidated": ("info", _consolidated),
    # trouble
    "astray": ("warning", "Our weights are far from everybody's after round {round}; looks for the swarm's state"),
    "state_unavailable": ("detail", "Could not fetch the state of round {round}: {reason}"),
    "blob_damaged": ("warning", "{reason}; fetching it from the swarm"),
    "prefetch_failed": ("detail", "Could not fetch data shard {shard}… ahead of round {round}: {reason}"),
    "snapshot_failed": ("warning", "Could not keep the state of round {round} for joiners: {reason}. Training goes on"),
    "snapshot_refused": ("detail", "Refused to keep a peer's state of round {round}: {reason}"),
    "state_refused": ("warning", "Refused a state of round {round}: {reason}"),
    "shard_late": ("detail", "Data shard {shard}… is not here yet; reads another one meanwhile"),
    "shard_unavailable": ("warning", _shard_unavailable),
    "checkpoint_damaged": ("warning", "A damaged checkpoint was passed over, the one before it is used ({reason})"),
    "checkpoint_failed": ("warning", "Training goes on unsaved: {reason}"),
    "diverged": ("warning", "Round {round} diverged and was given up; training goes on from the slow weights"),
    "history_unusable": ("warning", "{reason}; until then the history for the status page is kept in memory only"),
    "disk_error": ("warning", "Cannot write {path}: {reason}; free some space. Training goes on"),
    "disk_recovered": ("info", "Writes {path} again"),
    "swarm_unreachable": (
        "warning",
        lambda f: f"The swarm has not been reachable for {duration(f['seconds'])} ({f['reason']}); goes on alone",
    ),
    "swarm_reachable": ("info", "The swarm is reachable again"),
    "alone": ("warning", "No other node of the run has been heard of for a while; training goes on alone"),
    "company": ("info", "Others are here again"),
}
