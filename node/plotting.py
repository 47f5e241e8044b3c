"""Whether plots can be made: they need matplotlib, which comes with the extra `simulate`. Whatever plots imports it only then."""

from __future__ import annotations

import importlib.util

from protocol.errors import UserError

__all__ = ["check_plotting"]


def check_plotting(option: str) -> None:
    """Make sure, before a long computation, that plots can be made after it.

    Args:
        option: that asks for them.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"plots need matplotlib; install it with: pip install 'llm-node[simulate]', or leave out {option}"
        )
