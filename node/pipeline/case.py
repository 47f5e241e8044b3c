"""What a pipeline's planner is given: nodes, their speeds and slots, their links, and what a path has to look like.

A case is a JSON file, or is made from a live swarm's records. All times are seconds per microbatch. A node works at one task at
a time; `link_s[a][b]` is what the activations of one microbatch need from a to b when nothing else is sent. Where
`uplink_s` and `downlink_s` are given, what a node sends (receives) at once shares its line (node/pipeline/lines.py); without
them transfers do not slow each other down, as in the published cases (SkipPipe, arXiv 2502.19913).

The rules of a path are in node/pipeline/rules.py, what a plan costs in node/pipeline/replay.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protocol.errors import UserError

__all__ = ["Case", "load_case"]

MAX_NODES = 4096
MAX_STAGES = 64
LEAST_LINE_S = 1e-9
"""A line's reciprocal must stay far from infinity."""
MAX_FILE_BYTES = 256 << 20

Seconds = float
Matrix = tuple[tuple[Seconds, ...], ...]
Partition = tuple[tuple[int, ...], ...]


class Case(BaseModel):
    """One planning problem."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)

    name: str = Field(default="case", min_length=1, max_length=64)
    """Shown above tables and pictures."""
    num_nodes: int = Field(ge=1, le=MAX_NODES)
    """Nodes, called 0 … num_nodes − 1."""
    stage_sizes: tuple[int, ...] = Field(min_length=1, max_length=MAX_STAGES)
    """How many nodes hold each stage. Those of stage 0 hold the data, too: microbatches start there and have their loss there."""
    path_length: int = Field(ge=1)
    """Stages that a microbatch visits, stage 0 included; the number of stages for a full pipeline."""
    swaps: bool = True
    """Whether a microbatch may visit stages out of order, as far as the rules allow."""
    slots_per_node: tuple[int, ...]
    """Microbatches whose activations a node holds at once; one number stands for all nodes."""
    rounds: int = Field(ge=1, le=1000)
    """A node of stage 0 starts slots × rounds microbatches per iteration."""
    microbatches_per_node: int = Field(default=0, ge=0, le=100_000)
    """That instead, where the two do not go together; 0: slots × rounds."""
    max_visits: tuple[int, ...] = ()
    """Microbatches that may visit a node in one iteration; left out: as many as it would start."""
    forward_s: tuple[Seconds, ...]
    """Forward pass of one microbatch on each node."""
    backward_multiplier: float = Field(gt=0.0, le=100.0)
    """Backward pass over forward pass."""
    loss_multiplier: float = Field(ge=0.0, le=100.0)
    """Head and loss over the forward pass, at the node where the microbatch started."""
    gap_s: Seconds = Field(default=0.0, ge=0.0)
    """Fixed cost after a task, during which the node does nothing else."""
    gap_first_s: Seconds = Field(default=0.0, ge=0.0)
    """The same after a microbatch's first forward pass."""
    link_s: Matrix
    """From row to column."""
    uplink_s: tuple[Seconds, ...] = ()
    """What one microbatch's activations take of each node's uplink if they have it alone; empty: lines are not shared."""
    downlink_s: tuple[Seconds, ...] = ()
    """The same for the downlink."""
    closing_s: Seconds = Field(default=0.0, ge=0.0)
    """From the end of the last backward pass until all nodes have heard that the iteration is over."""
    spread: float = Field(default=0.0, ge=0.0, le=1.0)
    """Standard deviation of the logarithm of `link_s`, and twice that of a pass; 0: all take exactly what is said. Shared lines are
    as fast as they are, so a transfer bound by one is never faster than it."""
    partition: Partition | None = None
    """Nodes of each stage, where that is given and not to be planned."""

    @field_validator("slots_per_node", "max_visits", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        nodes, stages = self.num_nodes, len(self.stage_sizes)
        per_node = {name: getattr(self, name) for name in ("slots_per_node", "max_visits", "uplink_s", "downlink_s")}
        for name, values in per_node.items():
            if len(values) == 1 and nodes > 1:
                object.__setattr__(self, name, values * nodes)  # the model is frozen for everybody else
            elif len(values) not in (0, nodes):
                raise ValueError(f"{name} has {len(values)} entries for {nodes} nodes")
        if not self.slots_per_node or min(self.slots_per_node) < 1:
            raise ValueError("slots_per_node must be at least 1 for every node")
        if not self.max_visits:
            visits = tuple(self.starts(node) for node in range(nodes))
            object.__setattr__(self, "max_visits", visits)
        if min(self.max_visits) < 1:
            raise ValueError("max_visits must be at least 1 for every node")
        if len(self.uplink_s) != len(self.downlink_s):
            raise ValueError("uplink_s and downlink_s come together")
        if len(self.forward_s) != nodes or min(self.forward_s) <= 0.0:
            raise ValueError(f"forward_s must hold a positive number for each of the {nodes} nodes")
        if min(self.stage_sizes) < 1 or sum(self.stage_sizes) != nodes:
            raise ValueError(f"stage_sizes must be positive and add up to num_nodes, {nodes}")
        if self.path_length > stages:
            raise ValueError(f"path_length must not exceed the number of stages, {stages}")
        if len(self.link_s) != nodes or any(len(row) != nodes or min(row) < 0.0 for row in self.link_s):
            raise ValueError(f"link_s must be {nodes} rows of {nodes} numbers that are not negative")
        if any(0.0 < line < LEAST_LINE_S for line in (*self.uplink_s, *self.downlink_s)):
            raise ValueError(
                f"uplink_s and downlink_s below {LEAST_LINE_S} are no lines; use 0 for one that is never shared"
            )
        if min((0.0, *self.uplink_s, *self.downlink_s)) < 0.0:
            raise ValueError("uplink_s and downlink_s must not be negative")
        self._check_partition()
        return self

    def _check_partition(self) -> None:
        if self.partition is None:
            return
        if sorted(node for stage in self.partition for node in stage) != list(range(self.num_nodes)):
            raise ValueError("partition must hold every node once")
        if tuple(len(stage) for stage in self.partition) != self.stage_sizes:
            raise ValueError("partition must agree with stage_sizes")

    @property
    def num_stages(self) -> int:
        """Stages, called 0 … num_stages − 1."""
        return len(self.stage_sizes)

    @property
    def shares_lines(self) -> bool:
        """Whether a node's transfers slow each other down."""
        return bool(self.uplink_s)

    def starts(self, node: int) -> int:
        """Microbatches that a node of stage 0 starts in one iteration."""
        return self.microbatches_per_node or self.slots_per_node[node] * self.rounds

    def full_pipeline(self) -> Case:
        """The same nodes and microbatches with every stage on every path, in order.

        Nodes may be visited as often as that takes with visits spread evenly over a stage's nodes.
        """
        per_node = max(self.starts(node) for node in range(self.num_nodes))
        most = max(math.ceil(per_node * self.stage_sizes[0] / size) for size in self.stage_sizes)
        visits = tuple(max(own, most) for own in self.max_visits)
        return self.model_copy(update={"path_length": self.num_stages, "max_visits": visits})


def load_case(path: Path) -> Case:
    """Read a case file.

    Raises:
        UserError: it can not be read, is no JSON, or contradicts itself; one line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; a case is a few hundred kilobytes")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON; a case is an object with num_nodes, stage_sizes, link_s, …") from None
    try:
        return Case.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "case"
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where}: {reason}; correct it in the case file") from None
