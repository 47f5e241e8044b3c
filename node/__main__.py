"""Entry point of the `llm-node` command: turns what users can mend into one line, and nothing else.

Exit codes: 0 done, 1 bad input or machine (one line on standard error), 2 bad usage (from the option parser), 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    if sys.version_info < (3, 11):  # noqa: UP036  # reached when the source tree is run without being installed
        sys.exit(f"llm-node: needs Python 3.11 or newer, this is {sys.version.split()[0]}; run it with a newer Python")
    try:
        from model.errors import CheckpointError, DataError
        from node.cli import app
        from protocol.errors import LlmNodeError
    except ImportError as error:
        sys.exit(_missing(error))
    warnings = _Warnings()
    logging.lastResort = warnings  # for commands that install no handler of their own
    try:
        app()
    except (LlmNodeError, DataError, CheckpointError) as error:
        warnings.lines.clear()  # the error says it all
        sys.exit(f"llm-node: {_one_line(error)}")
    except ImportError as error:
        sys.exit(_missing(error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stderr.writelines(f"llm-node: warning: {line}\n" for line in warnings.lines)


class _Warnings(logging.StreamHandler[TextIO]):
    """Keeps what was logged as a warning until the command is done, so that it never comes between the command's output."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        from node.events import describe_record

        self.lines.append(describe_record(record))


def _missing(error: ImportError) -> str:
    """What to do about a package that is absent, or that is there but was not built for this machine."""
    what = f"the package {(error.name or 'of some import').partition('.')[0]}"
    if isinstance(error, ModuleNotFoundError):
        return f"llm-node: {what} is missing; install it with: python -m pip install --force-reinstall llm-node"
    return (
        f"llm-node: {what} cannot be loaded on this machine ({_one_line(error)}); "
        "install it with: python -m pip install --force-reinstall llm-node"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
