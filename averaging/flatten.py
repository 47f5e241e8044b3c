"""All parameters of a module in ONE contiguous fp32 vector θ.

Averaging works on a flat vector: one codec call, one norm, one exchange, no loop over hundreds of small tensors. The
parameters are re-pointed to be views of θ, so the optimizer writes into θ without knowing it, and adding a correction to θ changes
the model at once. The obvious alternative, copying all parameters out and back each round, costs a second copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.memory import in_huge_pages

__all__ = ["FlatParameters"]


class FlatParameters:
    """Owns θ and the map from names to places in it.

    Parameters appear in `module.named_parameters()` order, tied ones once, without padding. Anything that gives a parameter
    new storage (`module.to(...)`, assigning `.data`) breaks the tie: move the module first, flatten afterwards.

    Args:
        module: its parameters must be fp32 and on one device; they are re-pointed in place.

    Raises:
        ValueError: no parameters, another dtype, or several devices.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        if not parameters:
            raise ValueError("module has no parameters")
        devices = {parameter.device for parameter in parameters.values()}
        if len(devices) > 1 or any(parameter.dtype != torch.float32 for parameter in parameters.values()):
            raise ValueError("parameters must be fp32 and on one device")
        self._parameters = parameters
        self.shapes: Mapping[str, torch.Size] = {name: parameter.shape for name, parameter in parameters.items()}
        self.offsets: dict[str, int] = {}
        numel = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = numel
            numel += math.prod(shape)
        self.theta = in_huge_pages(torch.empty(numel, device=devices.pop()))
        for name, view in self.views(self.theta).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of θ."""
        return tuple(self.shapes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name → view of any vector laid out like θ (φ, for instance).

        Args:
            flat: [P], contiguous.

        Raises:
            ValueError: `flat` has another length.
        """
        total = sum(math.prod(shape) for shape in self.shapes.values())
        if flat.shape != (total,):
            raise ValueError(f"expected a vector of {total} elements, got shape {tuple(flat.shape)}")
        return {
            name: flat[self.offsets[name] : self.offsets[name] + math.prod(shape)].view(shape)
            for name, shape in self.shapes.items()
        }

    def is_intact(self) -> bool:
        """Whether every parameter still lives in θ."""
        return all(
            self._parameters[name].data_ptr() == view.data_ptr() for name, view in self.views(self.theta).items()
        )
