"""The file that describes a simulated swarm: how many peers, how fast, on which links, how unlucky, and how they average.

    [swarm]     size, rounds, seed          [links]   latency, bandwidth, losses
    [training]  speeds and the toy problem  [churn]   who comes and goes
    [model]     what is split into stages, where [pipeline] asks for more than one
    [sync], [safety] and [pipeline] are the run manifest's sections, word for word.

Every field's description is its documentation. Whatever is wrong is said in one line before anything is simulated.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model.config import PRESETS
from protocol.errors import UserError
from protocol.manifest import ModelSpec, PipelineSpec, SafetySpec, SyncSpec
from protocol.sync_spec import FRAGMENT_BLOCK

__all__ = [
    "MAX_PEERS",
    "ChurnSection",
    "LineClass",
    "LinksSection",
    "ModelSection",
    "Scenario",
    "SwarmSection",
    "TrainingSection",
    "load_scenario",
]

MAX_PEERS = 16_384
MAX_GROUP_PEERS = 64
"""Largest swarm in which everybody exchanges with everybody: each pair of peers has a stream of its own."""
MAX_NUMBERS = 1 << 26
"""Largest product of peers and parameters: a peer holds a dozen vectors, so this is about 3 GiB."""


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SwarmSection(_Section):
    """The swarm."""

    peers: int = Field(ge=1, le=MAX_PEERS)
    """Peers at the start."""
    rounds: int = Field(ge=1, le=100_000)
    """Rounds to simulate; fewer if the run's own total_rounds is smaller."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything that is drawn at random."""
    parameters: int = Field(default=256, ge=1, le=1 << 20)
    """Size of the toy model. Bytes on the wire follow from it and the codecs."""
    heartbeat_s: float = Field(default=3.0, ge=0.1, le=30.0)
    """Seconds between two records of a peer and two looks at the directory; the node's own value is 3. Larger is faster."""


class TrainingSection(_Section):
    """Speeds, and the toy problem that stands in for training (see node/simulation/quadratic.py)."""

    step_s: float = Field(default=1.0, ge=1e-6, le=86_400.0)
    """Mean seconds of an inner step."""
    peer_ratio: float = Field(default=0.0, ge=0.0, le=10.0)
    """Standard deviation over mean of the peers' speeds, log-normal, drawn once per peer."""
    round_ratio: float = Field(default=0.0, ge=0.0, le=10.0)
    """The same from round to round of one peer."""
    slow_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of peers that are slower by slow_factor."""
    slow_factor: float = Field(default=4.0, ge=1.0, le=1000.0)
    """Factor on the step time of slow peers."""
    lr: float = Field(default=0.02, ge=1e-9, lt=1.0)
    """Inner learning rate η."""
    noise: float = Field(default=1.0, ge=0.0, le=1000.0)
    """Standard deviation ν of the gradient noise, in units of the optimum's size."""
    data_spread: float = Field(default=0.3, ge=0.0, le=1000.0)
    """Distance h of a peer's own optimum from the common one, in the same units."""


class ModelSection(_Section):
    """What the stages are parts of: how long a pass takes, and how many bytes travel. Peers differ by [training]'s ratios."""

    preset: str = "1b"
    """Shape of the model, as for `llm-node init --model`."""
    sequence_tokens: int = Field(default=1024, ge=16, le=131_072)
    """Tokens per sequence."""
    forward_s: float = Field(default=1.0, gt=0.0, le=86_400.0)
    """Mean seconds of a forward pass of one microbatch through one stage."""
    backward_multiplier: float = Field(default=3.0, gt=0.0, le=100.0)
    """Backward pass over forward pass. It runs the forward pass again, so it is about three of them."""
    loss_multiplier: float = Field(default=1.0, ge=0.0, le=100.0)
    """Head and loss, there and back, over a forward pass."""

    @field_validator("preset")
    @classmethod
    def _is_known(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"no model preset {preset!a}; choose one of {', '.join(PRESETS)}")
        return preset


class LineClass(_Section):
    """One kind of line that peers have; a link is as fast as the slower of its sender's uplink and its receiver's downlink."""

    share: float = Field(gt=0.0, le=1.0)
    """Share of the peers that have it."""
    up_bytes_per_s: float = Field(gt=0.0, le=1e12)
    """Bandwidth of what such a peer sends, to each other peer."""
    down_bytes_per_s: float = Field(gt=0.0, le=1e12)
    """Bandwidth of what it receives, from each."""
    latency_s: float = Field(default=0.0, ge=0.0, le=60.0)
    """What it adds to a link's latency, one way."""


class LinksSection(_Section):
    """What the peers' links are like."""

    latency_s: float = Field(default=0.05, ge=0.0, le=60.0)
    """Mean one-way latency."""
    latency_pair_ratio: float = Field(default=0.0, ge=0.0, le=10.0)
    """Standard deviation over mean of the latency between pairs of peers, log-normal, drawn once per pair."""
    latency_message_ratio: float = Field(default=0.0, ge=0.0, le=10.0)
    """The same from message to message of one pair."""
    bytes_per_s: float = Field(default=1e6, gt=0.0, le=1e12)
    """Mean bandwidth of a pair, each way."""
    bytes_per_s_ratio: float = Field(default=0.0, ge=0.0, le=10.0)
    """Standard deviation over mean of the bandwidth between pairs, log-normal, drawn once per pair and direction."""
    matrix: str | None = None
    """CSV file of measured links with the columns from,to,latency_ms,mbit_per_s, beside the scenario. Names are sites; peers
    are spread over them in turn. It replaces latency_s and bytes_per_s and the ratios between pairs."""
    classes: list[LineClass] = []
    """Kinds of lines, drawn once per peer; they replace bytes_per_s. Every link has its bandwidth to itself."""
    exchange_loss: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of exchanges whose stream breaks after both sides have agreed on them, so that both step alone."""
    write_loss: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability, per message, that its stream breaks, whatever it carries; proposals are then made again."""

    @field_validator("matrix")
    @classmethod
    def _is_a_name(cls, matrix: str | None) -> str | None:
        if matrix is not None and not matrix.isprintable():
            raise ValueError(f"{matrix!a} is no file name; choose another")
        return matrix

    @model_validator(mode="after")
    def _classes_are_whole(self) -> Self:
        total = sum(each.share for each in self.classes)
        if self.classes and self.matrix is not None:
            raise ValueError("links.classes and links.matrix exclude each other; remove one")
        if self.classes and abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares of links.classes make {total:g} instead of 1; change one")
        return self


class ChurnSection(_Section):
    """Who comes and goes; Poisson processes in virtual time."""

    joins_per_hour: float = Field(default=0.0, ge=0.0, le=1e6)
    """Newcomers of the whole swarm."""
    join_s: float = Field(default=30.0, ge=0.0, le=86_400.0)
    """Seconds a newcomer needs to fetch the state; then it begins with a live peer's slow weights."""
    leaves_per_hour: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Rate, per peer, of leaving with a goodbye."""
    crashes_per_hour: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Rate, per peer, of vanishing without one."""


class Scenario(_Section):
    """A simulated swarm."""

    name: str = Field(default="scenario", min_length=1, max_length=64)
    """Shown above tables and plots."""
    swarm: SwarmSection
    training: TrainingSection = TrainingSection()
    links: LinksSection = LinksSection()
    churn: ChurnSection = ChurnSection()
    pipeline: PipelineSpec = PipelineSpec()
    model: ModelSection = ModelSection()
    sync: SyncSpec = SyncSpec()
    safety: SafetySpec | None = None
    """Bounds on partners' updates; left out, every finite update is taken, so that averaging is seen by itself."""

    @model_validator(mode="after")
    def _is_affordable(self) -> Self:
        if self.sync.group == "all" and self.swarm.peers > MAX_GROUP_PEERS:
            raise ValueError(
                f"sync.group all exchanges with every peer, which is simulated for at most {MAX_GROUP_PEERS} peers; "
                "lower swarm.peers or set sync.group to pair"
            )
        if self.swarm.peers * self.swarm.parameters > MAX_NUMBERS:
            raise ValueError(
                f"swarm.peers times swarm.parameters is {self.swarm.peers * self.swarm.parameters}, more than {MAX_NUMBERS} and "
                "than fits in memory; lower one of them"
            )
        if self.sync.fragments > math.ceil(self.swarm.parameters / FRAGMENT_BLOCK):
            raise ValueError(
                f"sync.fragments {self.sync.fragments} needs swarm.parameters above "
                f"{FRAGMENT_BLOCK * (self.sync.fragments - 1)}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _stages_are_possible(self) -> Self:
        stages = self.pipeline.stages
        if stages == 1:
            if "model" in self.model_fields_set:
                raise ValueError("section model is for pipelines; set pipeline.stages above 1, or remove it")
            return self
        if stages > self.swarm.peers:
            raise ValueError(
                f"pipeline.stages {stages} needs as many peers, and swarm.peers is {self.swarm.peers}; raise it, or lower stages"
            )
        shape = PRESETS[self.model.preset]
        if stages > shape.num_layers:
            raise ValueError(
                f"pipeline.stages {stages} is more than the {shape.num_layers} layers of model.preset {self.model.preset}; "
                "lower it, or choose a larger model"
            )
        spec = ModelSpec(**{name: getattr(shape, name) for name in ModelSpec.model_fields})
        if spec.smallest_stage(stages) <= (self.sync.fragments - 1) * FRAGMENT_BLOCK:
            raise ValueError(
                f"sync.fragments {self.sync.fragments} is too many for the smallest of {stages} stages of model.preset "
                f"{self.model.preset}; lower it"
            )
        if self.model.sequence_tokens > shape.max_sequence_tokens:
            raise ValueError(
                f"model.sequence_tokens must not exceed the {shape.max_sequence_tokens} of model.preset {self.model.preset}; "
                "lower it"
            )
        return self

    @property
    def is_staged(self) -> bool:
        """Whether the model is split."""
        return self.pipeline.stages > 1

    @property
    def num_rounds(self) -> int:
        """Rounds that are simulated."""
        total = self.sync.total_rounds
        return min(self.swarm.rounds, total) if total else self.swarm.rounds


def load_scenario(path: Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Read and check a scenario file.

    Args:
        path: the file.
        overrides: values to put in place of the file's, by dotted name (`swarm.peers`).

    Raises:
        UserError: it can not be read, is not TOML, or holds an unknown key, a wrong type or an impossible value; one line.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            old = fields.get(section)
            fields[section] = {**(old if isinstance(old, dict) else {}), key: value}
        return Scenario.model_validate(fields)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the path of a scenario file") from None
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None
    except RecursionError:
        raise UserError(f"{path} is not valid TOML: nested too deeply; remove the nesting") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"{path} is not valid TOML: {error}; mend that line") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown key; remove it or check its spelling"
    elif problem["type"] == "missing":
        message = "is missing; add it"
    elif problem["type"] != "value_error":
        message = f"{message}; change it"
    more = error.error_count() - 1
    text = f"scenario: {where}: {message}" if where else f"scenario: {message}"
    return repr(text)[1:-1][:300] + (f" (and {more} more problems)" if more else "")
