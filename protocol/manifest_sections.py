"""The sections of the manifest, each with its own checks; averaging has a file of its own, protocol/sync_spec.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from protocol.manifest_section import Hash, Section

__all__ = ["DataSpec", "InitialStateSpec", "InnerSpec", "ModelSpec", "PipelineSpec", "SafetySpec", "TokenizerSpec"]


class ModelSpec(Section):
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
        return self.smallest_stage(1)

    def smallest_stage(self, num_stages: int) -> int:
        """Number of trained parameters of the smallest of so many stages, which are divided as in model/stage.py."""
        head_dim = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size * head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        ends = [self.num_layers * stage // num_stages for stage in range(num_stages + 1)]
        first, *others = (layer * (end - begin) for begin, end in pairwise(ends))
        return min([embeddings + first + self.hidden_size, *others])


class TokenizerSpec(Section):
    """The tokenizer every peer uses."""

    blob: Hash
    """Merkle root of the tokenizer's `tokenizer.json` bytes."""


class DataSpec(Section):
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


class InnerSpec(Section):
    """Local training between two exchanges."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw: torch's fused fp32 AdamW; adamw8bit: bitsandbytes' 8-bit states (2 bytes per parameter instead of 8); muon: Muon for
    the matrices of the layers (4 bytes per parameter), AdamW for the rest."""
    lr: float = Field(gt=0.0, le=1.0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Muon's decay of the mean gradient."""
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


class SafetySpec(Section):
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


class PipelineSpec(Section):
    """Splitting a model that is larger than a peer (docs/PIPELINE.md)."""

    stages: int = Field(default=1, ge=1, le=64)
    """Number of pipeline stages; with 1 every peer trains a whole replica."""
    skip_ratio: float = Field(default=0.25, ge=0.0, le=0.5)
    """Share of the stages that a microbatch skips."""
    codec: Literal["fp32", "bf16", "q8"] = "bf16"
    """Format of activations and their gradients between stages."""
    microbatch_sequences: int = Field(default=4, ge=1, le=1024)
    """Sequences per microbatch."""
    microbatches: int = Field(default=6, ge=1, le=1024)
    """Microbatches that a peer of stage 0 starts per iteration."""
    slots: int = Field(default=6, ge=1, le=1024)
    """Microbatches that a peer holds between forward and backward pass."""
    hop_timeout_s: float = Field(default=30.0, gt=0.0, le=3600.0)
    """Time for one peer to take a microbatch over, its queue and its work included."""
    iteration_timeout_s: float = Field(default=120.0, gt=0.0, le=86_400.0)
    """No iteration takes longer; what has not come back by then does not count."""

    @property
    def path_length(self) -> int:
        """Stages that a microbatch visits; at least two of several."""
        return max(min(self.stages, 2), self.stages - round(self.stages * self.skip_ratio))


class InitialStateSpec(Section):
    """The state every first peer starts from."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights."""
    sha256: Hash
    """SHA-256 of the initial weights (see model/initial.py)."""
