"""What a run leaves behind: a model to sample from, and a folder that `transformers` loads.

Both start from the newest checkpoint of a run in this home. The slow weights are used: they are what the swarm averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from averaging.flatten import FlatParameters
from model.checkpoint import load_newest
from model.errors import CheckpointError, DataError
from model.export import export_huggingface
from model.generate import generate
from model.stage import stage_layers
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from node.home import Home, kept_manifest
from node.pipeline.archive import assemble
from node.training_state import model_config
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.manifest import Manifest

__all__ = ["TrainedModel", "load_run", "load_stages", "load_trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model with the tokenizer it was trained with."""

    manifest: Manifest
    model: Transformer
    tokenizer: Tokenizer
    tokenizer_json: bytes
    round: int

    def sample(self, prompt: str, *, max_tokens: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:
        """Yield text pieces that continue `prompt`; pieces end at character boundaries."""
        tokens = self.tokenizer.encode(prompt) or [self.tokenizer.eot_id]
        shown = ""
        produced: list[int] = []
        for token in generate(
            self.model, tokens, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        ):
            if token == self.tokenizer.eot_id:
                if produced:
                    return
                continue  # the prompt was a whole document to the model: what it writes next is still a sample
            produced.append(token)
            text = self.tokenizer.decode(produced)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text

    def omit_stages(self, stages: Iterable[int]) -> None:
        """Compute without some stages from now on, as a pipeline does whose peers are gone.

        Raises:
            UserError: the run has no such stage, or it is stage 0, which holds embedding and head.
        """
        num_stages = self.manifest.pipeline.stages
        wrong = [stage for stage in stages if not 0 < stage < num_stages]
        if wrong:
            possible = f"choose from 1 to {num_stages - 1}" if num_stages > 1 else "the run has only one"
            raise UserError(f"cannot skip stage {wrong[0]} of {self.manifest.name}; {possible}")
        parts = stage_layers(self.model.config.num_layers, num_stages)
        self.model.model.omitted = frozenset(layer for stage in stages for layer in parts[stage])

    def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder.

        Raises:
            UserError: the folder cannot be written.
        """
        weights: dict[str, Tensor] = dict(self.model.named_parameters())
        try:
            export_huggingface(
                folder, config=model_config(self.manifest), weights=weights, tokenizer=self.tokenizer_json
            )
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder") from None


def load_run(home: Home, run: str | None) -> tuple[Manifest, Path]:
    """The manifest and folder of a run in this home: the one whose id or name is `run`, or the latest.

    Raises:
        UserError: there is none, or more than one fits.
    """
    fitting: list[tuple[Manifest, Path]] = []
    damaged: list[UserError] = []
    for folder in home.runs():
        try:
            manifest = kept_manifest(folder).manifest
        except UserError as error:
            damaged.append(error)
            continue
        if run is None or manifest.name == run or manifest.run_id.startswith(run):
            fitting.append((manifest, folder))
    if len({manifest.run_id for manifest, _ in fitting}) > 1 and run is not None:
        ids = ", ".join(manifest.run_id[:12] for manifest, _ in fitting)
        raise UserError(f"several runs fit {run!r}; name one of {ids} with --run")
    if fitting:
        return fitting[-1]
    if damaged:
        raise damaged[-1]
    named = "" if run is None else f" {run!r}"
    raise UserError(f"no run{named} in {home.root}; join one first, or name its home with --home")


def load_trained(home: Home, run: str | None) -> TrainedModel:
    """The newest model of a run.

    Raises:
        UserError: no such run, no checkpoint yet, or none that is whole.
    """
    manifest, folder = load_run(home, run)
    if manifest.pipeline.stages > 1:
        return load_stages(manifest, folder, BlobStore(home.blobs))
    try:
        loaded = load_newest(folder / "checkpoints")
        if loaded is None:
            raise UserError(f"run {manifest.name} has no checkpoint yet; train at least one round")
        tokenizer_json = BlobStore(home.blobs).read(manifest.tokenizer_blob)
        tokenizer = Tokenizer(tokenizer_json)
    except (CheckpointError, DataError) as error:
        raise UserError(str(error)) from None
    model = Transformer(model_config(manifest))
    flat = FlatParameters(model)
    with torch.no_grad():
        phi = loaded.tensors.get("replica.phi")
        if phi is None or phi.shape != flat.theta.shape:
            raise UserError(f"the checkpoint in {folder} does not fit run {manifest.name}; move it away and join again")
        flat.theta.copy_(phi)
    model.eval()
    return TrainedModel(
        manifest=manifest,
        model=model,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        round=int(loaded.meta["round"]),
    )


def load_stages(manifest: Manifest, folder: Path, store: BlobStore) -> TrainedModel:
    """The model of a pipelined run, from an archive of its stages."""
    weights, round = assemble(manifest, folder, store)
    try:
        tokenizer_json = store.read(manifest.tokenizer_blob)
        tokenizer = Tokenizer(tokenizer_json)
    except DataError as error:
        raise UserError(str(error)) from None
    model = Transformer(model_config(manifest))
    model.load_state_dict(weights)
    model.eval()
    return TrainedModel(manifest=manifest, model=model, tokenizer=tokenizer, tokenizer_json=tokenizer_json, round=round)
