"""What came out of a demo: how far the replicas are apart, and whether others can load the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from node.artifacts import load_trained
from node.home import Home

__all__ = ["compare_with_transformers", "relative_spread", "replica_spread"]


def replica_spread(homes: list[Path]) -> float:
    """Root mean square distance of the replicas' slow weights from their mean, relative to the weights' own RMS."""
    flats = [
        torch.cat([p.detach().reshape(-1) for p in load_trained(Home.at(home), None).model.parameters()])
        for home in homes
    ]
    return relative_spread(flats)


def relative_spread(flats: list[Tensor]) -> float:
    """Spread of replicas given as flat fp32 tensors [P] (see `replica_spread`); 0 for a single one."""
    stacked = torch.stack(flats)
    mean = stacked.mean(dim=0)
    return round(float((stacked - mean).pow(2).mean().sqrt() / mean.pow(2).mean().sqrt()), 5)


def compare_with_transformers(exported: Path, home: Path, prompt: str) -> dict[str, Any]:
    """Load the exported folder with transformers, if it is installed, and compare logits with ours."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return {"transformers_max_delta": None}
    ours = load_trained(Home.at(home), None)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokens = torch.tensor([ours.tokenizer.encode(prompt * 4)])
    with torch.no_grad():
        delta = (ours.model(tokens) - theirs(tokens).logits).abs().max()
    return {"transformers_max_delta": float(delta)}
