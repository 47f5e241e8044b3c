"""A plan: which node holds which stage, which way every microbatch goes, and whom a node serves first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from protocol.errors import UserError

__all__ = ["Dispatch", "Microbatch", "Plan"]

Dispatch = Literal["fifo", "priority", "backward_first"]
"""How a free node picks among waiting tasks: by arrival; by priority, then arrival; or loss and backward passes before
forward passes, then by priority and arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One microbatch of an iteration.

    Args:
        path: the nodes that it visits.
        priority: lower goes first.
    """

    path: tuple[int, ...]
    priority: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One iteration.

    Args:
        partition: the nodes of every stage.
        microbatches: in no particular order.
        dispatch: how nodes choose.
    """

    partition: tuple[tuple[int, ...], ...]
    microbatches: tuple[Microbatch, ...]
    dispatch: Dispatch = "fifo"

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dictionaries, the format of PLAN.json."""
        return {
            "partition": [list(stage) for stage in self.partition],
            "microbatches": [{"path": list(each.path), "priority": each.priority} for each in self.microbatches],
            "dispatch": self.dispatch,
        }

    @classmethod
    def from_json(cls, document: Any) -> Plan:
        """Read what `to_json` wrote; whether it keeps to the rules is not checked.

        Raises:
            UserError: it is no plan.
        """
        try:
            partition = tuple(tuple(int(node) for node in stage) for stage in document["partition"])
            microbatches = tuple(
                Microbatch(path=tuple(int(node) for node in each["path"]), priority=float(each.get("priority", 0.0)))
                for each in document["microbatches"]
            )
            dispatch = document.get("dispatch", "fifo")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise UserError("not a plan: it needs a partition and microbatches with a path each") from None
        if dispatch not in ("fifo", "priority", "backward_first"):
            raise UserError("not a plan: dispatch must be fifo, priority or backward_first")
        return cls(partition=partition, microbatches=microbatches, dispatch=dispatch)
