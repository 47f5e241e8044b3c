"""Every error this project raises on purpose, in one tree.

    LlmNodeError
    ├── UserError            our user's input or machine is at fault; `str()` is one line: cause, then remedy
    ├── ProtocolError        a remote peer broke the rules; counted against `peer`
    └── TransportError       the network failed; nobody is to blame
        ├── PeerUnreachableError   no connection, or the peer does not speak the protocol
        ├── StreamClosedError      the other side went away in the middle
        └── DeadlineError          our deadline passed first

A local bug is none of these: it stays an AssertionError, TypeError and so on, and is never caught below a task root.
Third-party errors are mapped onto this tree at one seam per library (protocol/libp2p.py for hivemind).
"""

from __future__ import annotations

from protocol.ids import PeerId

__all__ = [
    "DeadlineError",
    "LlmNodeError",
    "PeerUnreachableError",
    "ProtocolError",
    "StreamClosedError",
    "TransportError",
    "UserError",
    "first_leaf",
]


class LlmNodeError(Exception):
    """Root of the tree."""


class UserError(LlmNodeError, ValueError):
    """Bad input, configuration or local machine state. The message is shown alone on one line, without a traceback."""


class ProtocolError(LlmNodeError):
    """A remote peer sent something that the protocol forbids.

    Args:
        reason: what was wrong, short, never containing unescaped remote text.
        peer: who sent it, when known at the place of detection.
    """

    def __init__(self, reason: str, *, peer: PeerId | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.peer = peer


class TransportError(LlmNodeError):
    """The network failed."""


class PeerUnreachableError(TransportError):
    """No connection could be made, or the peer has no handler for the protocol asked for."""


class StreamClosedError(TransportError):
    """The stream ended or was reset before everything expected had arrived."""


class DeadlineError(TransportError):
    """Our own deadline for the operation passed."""


def first_leaf(error: BaseException) -> BaseException:
    """Of errors that came out of a task's parents as groups of groups, the first one; any other is returned as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
