"""The run manifest: everything that must be the same for all peers of a run, signed by its organiser.

The organiser writes TOML (`llm-node init` makes it). It is validated strictly, then canonicalised: JSON with sorted keys, no
spaces, every field present with its value. The run id is the SHA-256 of those canonical bytes, and the organiser's
Ed25519 key signs them. Nothing that a peer receives later may contradict the manifest: message sizes, shapes and
rounds are computed from it, never read from the wire.

Every field's description is shown by `llm-node init --help`, so documentation and validation can not drift apart.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from protocol.errors import UserError
from protocol.ids import BlobId, PeerId, RunId
from protocol.manifest_section import Name, Section
from protocol.manifest_sections import (
    DataSpec,
    InitialStateSpec,
    InnerSpec,
    ModelSpec,
    PipelineSpec,
    SafetySpec,
    TokenizerSpec,
)
from protocol.sync_spec import FRAGMENT_BLOCK, SyncSpec, gamma_bound

__all__ = [
    "DataSpec",
    "InitialStateSpec",
    "InnerSpec",
    "Manifest",
    "ModelSpec",
    "PipelineSpec",
    "SafetySpec",
    "SyncSpec",
    "TokenizerSpec",
    "describe_fields",
    "gamma_bound",
]


class Manifest(Section):
    """A validated run manifest."""

    format: Literal[1] = 1
    """Version of this file format."""
    name: Name
    """Name of the run: lower-case letters, digits, - and _, at most 64."""
    organiser: str = Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")
    """Peer id whose key signs the manifest."""
    model: ModelSpec
    tokenizer: TokenizerSpec
    data: DataSpec
    inner: InnerSpec
    sync: SyncSpec = SyncSpec()
    safety: SafetySpec = SafetySpec()
    pipeline: PipelineSpec = PipelineSpec()
    initial_state: InitialStateSpec

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.inner.sequence_tokens > self.model.max_sequence_tokens:
            raise ValueError("inner.sequence_tokens must not exceed model.max_sequence_tokens")
        if self.data.heldout_tokens <= self.inner.sequence_tokens:
            raise ValueError("data.heldout_tokens must exceed inner.sequence_tokens")
        if self.pipeline.stages > self.model.num_layers:
            raise ValueError(
                f"pipeline.stages {self.pipeline.stages} is more than the model's {self.model.num_layers} layers; lower it"
            )
        num_parameters = self.model.smallest_stage(self.pipeline.stages)  # every stage is averaged by itself
        if num_parameters <= (self.sync.fragments - 1) * FRAGMENT_BLOCK:
            raise ValueError(
                f"sync.fragments {self.sync.fragments} is too many for {num_parameters} parameters"
                f"{' of the smallest stage' if self.pipeline.stages > 1 else ''}, "
                f"of which a fragment takes blocks of {FRAGMENT_BLOCK}; lower sync.fragments"
            )
        return self

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Parse and validate the organiser's file.

        Raises:
            UserError: not TOML, a duplicate or unknown key, a wrong type or an impossible value; one line naming the field.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except ValidationError as error:
            raise UserError(_first_problem(error)) from None
        except RecursionError:
            raise UserError("manifest is not valid TOML: nested too deeply; remove the nesting") from None
        except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
            raise UserError(_printable(f"manifest is not valid TOML: {error}; mend that line")) from None

    @classmethod
    def from_canonical(cls, data: bytes) -> Self:
        """Parse canonical bytes; they must be exactly what `canonical` would produce.

        Raises:
            UserError: anything else.
        """
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise UserError(_first_problem(error)) from None
        if manifest.canonical() != data:
            raise UserError("manifest is not in canonical form; its publisher must re-sign it")
        return manifest

    def canonical(self) -> bytes:
        """The one byte string that stands for this manifest."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        ).encode()

    def to_toml(self) -> str:
        """A TOML file that `from_toml` reads back to an equal manifest, each field with its description as a comment."""
        return _toml_of(self)

    @property
    def run_id(self) -> RunId:
        """SHA-256 of the canonical form, in hexadecimal."""
        return RunId(hashlib.sha256(self.canonical()).hexdigest())

    @property
    def organiser_peer(self) -> PeerId:
        """The organiser's id, typed."""
        return PeerId(self.organiser)

    @property
    def tokenizer_blob(self) -> BlobId:
        """The tokenizer's blob id, typed."""
        return BlobId(self.tokenizer.blob)


def describe_fields() -> str:
    """Every field of the manifest with its default and meaning, as Markdown."""
    lines = ["**What the manifest holds** (set with `--set section.field=value`):"]
    for name, field in Manifest.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines.append(f"**[{name}]** {(section.__doc__ or '').strip()}")
            lines += [_describe(key, sub) for key, sub in section.model_fields.items()]
        else:
            lines.append(_describe(name, field))
    return "\n\n".join(lines)


def _describe(name: str, field: FieldInfo) -> str:
    default = "" if field.is_required() or field.default is None else f" [{field.default}]"
    return f"`{name}`{default}: {' '.join((field.description or '').split())}"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "manifest"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown key; remove it or check its spelling"
    more = error.error_count() - 1
    return _printable(f"manifest: {where}: {message}") + (f" (and {more} more problems)" if more else "")


def _printable(text: str) -> str:
    """`text` in at most 300 characters, all printable: an unknown key may hold line breaks or terminal commands."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return text if len(text) <= 300 else text[:299] + "…"


def _toml_of(manifest: Manifest) -> str:
    lines = [
        "# Manifest of an llm-node run. Change what you like before publishing; afterwards it is signed and fixed."
    ]
    sections: list[str] = []
    for name, field in type(manifest).model_fields.items():
        value = getattr(manifest, name)
        if isinstance(value, Section):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            sections += ["", f"# {summary}", f"[{name}]"]
            for key, sub in type(value).model_fields.items():
                sections += _toml_line(key, getattr(value, key), sub.description)
        else:
            lines += _toml_line(name, value, field.description)
    return "\n".join(lines + sections) + "\n"


def _toml_line(key: str, value: object, description: str | None) -> list[str]:
    if value is None:
        return []
    comment = [f"# {' '.join((description or '').split())}"] if description else []
    return [*comment, f"{key} = {json.dumps(value)}"]
