"""The `llm-node` command of a peer that fails in the middle of a pass, when and how its test says.

    python -m tests.net.faulty ORDERS python -m node join …

While the file ORDERS says `forward SIGKILL`, say, the next forward pass of a microbatch is computed and never told of: the process
sends itself that signal. The order is carried out once. To be started as the `prefix` of a `NodeProcess`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node.__main__ import main
from node.pipeline.worker import StageWorker

__all__ = ["give_order"]


def give_order(orders: Path, what: str, how: signal.Signals) -> None:
    """Tell a peer to fail in its next pass.

    Args:
        orders: the file it was started with.
        what: the pass: forward or backward.
        how: the signal it sends itself.
    """
    draft = orders.with_suffix(".draft")
    draft.write_text(f"{what} {how.name}")
    draft.replace(orders)


def _obeying(computed: Callable[..., Any], orders: Path) -> Callable[..., Any]:
    @functools.wraps(computed)
    def run(*args: Any) -> Any:
        result = computed(*args)
        if orders.exists():
            what, how = orders.read_text().split()
            if what == computed.__name__:
                orders.unlink()
                os.kill(os.getpid(), signal.Signals[how])
        return result

    return run


if __name__ == "__main__":
    orders = Path(sys.argv[1])
    for name in ("forward", "backward"):
        setattr(StageWorker, name, _obeying(getattr(StageWorker, name), orders))
    sys.argv = ["llm-node", *sys.argv[5:]]
    main()
