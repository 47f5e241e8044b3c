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
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from protocol.errors import UserError
from protocol.ids import BlobId, PeerId, RunId

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


def gamma_bound(alpha: float) -> float:
    """Upper bound of γ for mean-square consensus under independent random pairs: 2(1 − α²).

    The NoLoCo paper's Eq. 74 states another bound, under which replicas diverge (measured at α = 0.9, γ = 0.7).
    """
    return 2.0 * (1.0 - alpha * alpha)


Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSpec(_Section):
    """Shape of the Llama-style decoder; maps one to one onto Hugging Face's LlamaConfig."""

    vocab_size: int = Field(ge=258, le=262_144)
    """Number of tokens, equal to the tokenizer's."""
    hidden_size: int = Field(ge=16, le=16_384)
    """Width of the residual stream; divisible by num_heads."""
    intermediate_size: int = Field(ge=16, le=65_536)
    """Width of the SwiGLU feed-forward layer."""
    num_layers: int = Field(ge=1, le=256)
    """Number of decoder layers."""
    num_heads: int = Field(ge=1, le=256)
    """Number of query heads."""
    num_kv_heads: int = Field(ge=1, le=256)
    """Number of key/value heads (grouped-query attention); divides num_heads."""
    max_sequence_tokens: int = Field(default=2048, ge=16, le=131_072)
    """Longest context the model is made for, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=1.0, le=1e8)
    """Base of the rotary position embedding."""
    norm_eps: float = Field(default=1e-5, gt=0.0, le=1e-2)
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output head shares the embedding matrix."""

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if (self.hidden_size // self.num_heads) % 2:
            raise ValueError("hidden_size / num_heads must be even, since rotary embedding turns pairs")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters (tied embeddings counted once)."""
        head_dim = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size * head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


class TokenizerSpec(_Section):
    """The tokenizer every peer uses."""

    blob: Hash
    """Merkle root of the tokenizer's `tokenizer.json` bytes."""


class DataSpec(_Section):
    """What the model is trained on."""

    kind: Literal["files", "stdlib", "local"]
    """files: the organiser's folder; stdlib: Python's own sources; both as shards that peers fetch from each other.
    local: each volunteer's own files, which never leave their machine."""
    index: Hash | None = None
    """Merkle root of the shard index (shard roots and token counts); absent exactly when kind is local."""
    heldout: Hash
    """Merkle root of the held-out tokens on which every peer measures the validation loss."""
    heldout_tokens: int = Field(ge=17, le=4_194_304)
    """Number of held-out tokens."""
    train_tokens: int = Field(ge=0, lt=2**63)
    """Number of training tokens in all shards; 0 when kind is local."""

    @model_validator(mode="after")
    def _index_fits_kind(self) -> Self:
        if (self.index is None) != (self.kind == "local"):
            raise ValueError("data.index must be given for kind files or stdlib, and left out for kind local")
        return self


class InnerSpec(_Section):
    """Local training between two exchanges."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw: torch's fused fp32 AdamW; adamw8bit: bitsandbytes' 8-bit states (2 bytes per parameter instead of 8)."""
    lr: float = Field(gt=0.0, le=1.0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0.0, le=1.0)
    """Decoupled weight decay, applied to matrices and not to norms."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this global L2 norm."""
    warmup_steps: int = Field(default=50, ge=0, le=1_000_000_000)
    """Steps over which the learning rate rises from zero."""
    sequence_tokens: int = Field(ge=16, le=131_072)
    """Tokens per training sequence."""
    min_sequences: int = Field(default=1, ge=1, le=65_536)
    """Fewest sequences a peer takes per step, however slow it is."""
    max_sequences: int = Field(default=64, ge=1, le=65_536)
    """Most sequences a peer takes per step, however fast it is."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.min_sequences > self.max_sequences:
            raise ValueError("inner.min_sequences must not exceed inner.max_sequences")
        return self


class SyncSpec(_Section):
    """How peers average (shared mathematics in averaging/outer.py)."""

    algorithm: Literal["local", "pair-average", "noloco", "diloco"] = "noloco"
    """local: never; pair-average: mean of two peers' weights; noloco: gossip with momentum; diloco: everyone, Nesterov."""
    inner_steps: int = Field(default=50, ge=1, le=10_000)
    """Inner steps per round, after which it has one exchange; a peer that is ahead of the others takes more of them."""
    total_rounds: int = Field(default=0, ge=0, le=1_000_000_000)
    """Rounds after which the run ends; 0 for a run without end."""
    decay_rounds: int = Field(default=0, ge=0, le=1_000_000_000)
    """The last rounds of a finite run, over which the learning rate falls linearly to a tenth."""
    round_target_s: float = Field(default=60.0, ge=1.0, le=86_400.0)
    """Seconds a round should last; each peer picks its sequences per step accordingly."""
    alpha: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Outer momentum α."""
    beta: float = Field(default=0.7, gt=0.0, le=2.0)
    """Outer learning rate β on the mean Δ."""
    gamma: float = Field(default=0.7, ge=0.0)
    """Consensus strength γ on the difference of slow weights; 0 < γ < 2(1 − α²) for noloco."""
    overlap: bool = True
    """Whether an exchange runs under the next round's inner steps instead of stopping them."""
    delta_codec: Literal["fp32", "bf16", "q8"] = "q8"
    """Format of Δ on the wire; lossy ones carry error feedback."""
    slow_codec: Literal["fp32", "bf16"] = "bf16"
    """Format of φ (or θ for pair-average) on the wire."""
    exchange_timeout_s: float = Field(default=60.0, ge=1.0, le=3600.0)
    """Deadline of one exchange, from the first proposal to the commit; afterwards the peer steps alone."""
    max_lag_rounds: int = Field(default=1, ge=0, le=8)
    """Largest difference of round numbers between two partners."""
    snapshot_rounds: int = Field(default=4, ge=1, le=1000)
    """Every so many rounds one peer, chosen by lot, publishes its state for joiners, and a few others keep copies."""

    @model_validator(mode="after")
    def _gamma_converges(self) -> Self:
        bound = gamma_bound(self.alpha)
        if self.algorithm == "noloco" and not 0.0 < self.gamma < bound:
            raise ValueError(
                f"sync.gamma {self.gamma} is outside 0 < γ < 2(1 − α²) = {bound:.3f}: replicas would drift apart; "
                "lower gamma or alpha"
            )
        if self.algorithm == "diloco" and not self.gamma < 2.0:
            raise ValueError(f"sync.gamma {self.gamma} must be below 2 for diloco; lower gamma")
        if self.decay_rounds > self.total_rounds:
            raise ValueError("sync.decay_rounds must not exceed sync.total_rounds")
        return self


class SafetySpec(_Section):
    """Bounds on what strangers can do (averaging/admission.py)."""

    history: int = Field(default=16, ge=1, le=256)
    """Number of accepted distances whose median bounds the next one."""
    clip_factor: float = Field(default=3.0, gt=0.0, le=100.0)
    """Cap of the bound, in norms of the peer's own Δ."""
    reject_factor: float = Field(default=3.0, ge=1.0, le=100.0)
    """Beyond this many bounds a partner's update is refused instead of clipped."""
    newcomer_weight: float = Field(default=0.25, gt=0.0, le=1.0)
    """Weight of a partner never met before; it ramps to 1."""
    newcomer_exchanges: int = Field(default=10, ge=1, le=1000)
    """Accepted exchanges over which a newcomer's weight ramps to 1."""


class PipelineSpec(_Section):
    """Splitting a model that is larger than a peer."""

    stages: int = Field(default=1, ge=1, le=1)
    """Number of pipeline stages; this version trains whole replicas, so it must be 1."""


class InitialStateSpec(_Section):
    """The state every first peer starts from."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights."""
    sha256: Hash
    """SHA-256 of the initial weights (see model/initial.py)."""


class Manifest(_Section):
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
        if isinstance(section, type) and issubclass(section, _Section):
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
        if isinstance(value, _Section):
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
