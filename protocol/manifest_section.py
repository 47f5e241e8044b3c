"""What all sections of the manifest have in common: strict, frozen, no unknown keys, every field with its description."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Hash", "Name", "Section"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """One table of the manifest."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
