"""Entry point of the `llm-node` command: turns what users can mend into one line, and nothing else.

Exit codes: 0 done, 1 bad input or machine (one line on standard error), 2 bad usage (from the option parser), 130 interrupted.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    if sys.version_info < (3, 11):  # noqa: UP036  # reached when the source tree is run without being installed
        sys.exit(f"llm-node: needs Python 3.11 or newer, this is {sys.version.split()[0]}; run it with a newer Python")
    try:
        from node.cli import app
        from protocol.errors import LlmNodeError
    except ModuleNotFoundError as error:
        sys.exit(f"llm-node: the package {error.name} is missing; install it with: python -m pip install llm-node")
    try:
        app()
    except LlmNodeError as error:
        sys.exit(f"llm-node: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        sys.exit(
            f"llm-node: the package {error.name} is missing or has no build for this platform; "
            "install it with: python -m pip install --force-reinstall llm-node"
        )
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
