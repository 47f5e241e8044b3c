"""Muon for the matrices of the layers, AdamW for the rest: one optimizer to whoever trains, saves or restores.

Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix, so that all its directions move alike. Its steps are scaled
to the root mean square of AdamW's (arXiv 2502.16982), so that one learning rate and weight decay do for both. It keeps one fp32
value per weight instead of two. Embedding, head and norms are not for it.

torch.optim.Muon computes in bfloat16 everywhere. On a processor without instructions for it that took 36 s instead of 0.17 s in
fp32 for one 768 × 2048 matrix, so the step is written out here; where bfloat16 is fast it is torch's, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

__all__ = ["MuonWithAdamW", "orthogonalised"]

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic, whose slope at zero is the steepest."""
NUM_STEPS = 5
ADAMW_RMS = 0.2
"""Root mean square of AdamW's steps, in learning rates."""
_LEAST_NORM = 1e-7


def orthogonalised(matrix: Tensor, *, dtype: torch.dtype) -> Tensor:
    """About U·Vᵀ of the matrix U·S·Vᵀ, [m, n]: its singular values come near to one (0.7 to 1.2, but for very small ones).

    Args:
        matrix: [m, n].
        dtype: to compute in; also the result's.
    """
    x = matrix.to(dtype, copy=True)
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=_LEAST_NORM))
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@functools.cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrices of it are multiplied by instructions made for that."""
    capabilities = torch.cpu.get_capabilities()
    is_fast = device.type != "cpu" or any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if is_fast else torch.float32


class MuonWithAdamW(Optimizer):
    """Both, over the same groups and the same state; the first group is Muon's.

    Args:
        matrices: for Muon, [m, n] each.
        groups: for AdamW, as it takes them.
        lr, weight_decay: of Muon's group; AdamW's groups say their own decay.
        momentum: Muon's decay of the mean gradient.
        betas: of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self._adamw = AdamW(groups, lr=lr, betas=betas, fused=True)
        muon = {"params": list(matrices), "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([muon, *self._adamw.param_groups], {"lr": lr})
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "the gradients are there already"
        group = self.param_groups[0]
        for matrix in group["params"]:
            if matrix.grad is not None:
                self._move(matrix, matrix.grad, group)
        self._adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _move(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[matrix], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        mean = state["momentum_buffer"]
        mean.lerp_(gradient, 1 - momentum)
        update = orthogonalised(gradient.lerp(mean, momentum), dtype=_fast_dtype(matrix.device))
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * ADAMW_RMS * max(matrix.shape) ** 0.5)

    def _share(self) -> None:
        """Let AdamW work on our groups and our state, which torch replaces when it loads."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
