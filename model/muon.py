"""Muon for the matrices of the layers, AdamW for the rest: one optimizer to whoever trains, saves or restores.

Muon (Jordan et al. 2024, torch.optim.Muon) orthogonalises the momentum of each matrix, so that all its directions move alike. Its
steps are scaled to the root mean square of AdamW's (arXiv 2502.16982), so that one learning rate and weight decay do for both. It
keeps one fp32 value per weight instead of two. Embedding, head and norms are not for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonWithAdamW"]


class MuonWithAdamW(Optimizer):
    """Both, over the same groups and the same state.

    Args:
        matrices: for Muon, [m, n] each.
        groups: for AdamW, as it takes them.
        lr, weight_decay: of Muon's group; AdamW's groups say their own decay.
        betas: of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(groups, lr=lr, betas=betas, fused=True)
        self._parts: tuple[Muon, AdamW] = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": lr})
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "the gradients are there already"
        for part in self._parts:
            part.step()  # type: ignore[no-untyped-call]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let both work on our groups and our state, which torch replaces when it loads."""
        muon, adamw = self._parts
        muon.param_groups, adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        muon.state = adamw.state = self.state
