"""The one door through which hivemind comes in.

Importing hivemind writes to the log, warns about torch's deprecated parts, renames a log level for the whole process and
installs a log handler. Here all that is undone, so that it behaves like a library: its messages go to the logger
`hivemind`, below which only errors are shown, and to the handlers that the program chose.

Two things are replaced: hivemind's msgpack loader (see `bounded_loads`), and nothing else.
"""

from __future__ import annotations

import logging
import warnings

from protocol.errors import ProtocolError
from protocol.wire import scan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivemind.dht.crypto import DHTRecord
    from hivemind.dht.node import DHTNode
    from hivemind.dht.protocol import DHTProtocol
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.dht.traverse import traverse_dht
    from hivemind.dht.validation import RecordValidatorBase
    from hivemind.p2p import P2P, PeerID
    from hivemind.p2p.p2p_daemon import P2PD_FILENAME
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient, DaemonConnector
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, read_pbmsg_safe, write_pbmsg
    from hivemind.proto import dht_pb2, p2pd_pb2
    from hivemind.utils.logging import use_hivemind_log_handler
    from hivemind.utils.multiaddr import Multiaddr
    from hivemind.utils.multiaddr.exceptions import Error as MultiaddrError
    from hivemind.utils.serializer import MSGPackSerializer
    from hivemind.utils.timed_storage import ValueWithExpiration

import hivemind.hivemind_cli as binaries  # after the block above: only then is it silent

__all__ = [
    "DHTID",
    "P2P",
    "P2PD_FILENAME",
    "ControlClient",
    "DHTNode",
    "DHTProtocol",
    "DHTRecord",
    "DaemonConnector",
    "DictionaryDHTValue",
    "MSGPackSerializer",
    "Multiaddr",
    "MultiaddrError",
    "P2PDaemonError",
    "PeerID",
    "RecordValidatorBase",
    "ValueWithExpiration",
    "binaries",
    "dht_pb2",
    "p2pd_pb2",
    "read_pbmsg_safe",
    "traverse_dht",
    "write_pbmsg",
]

logging.addLevelName(logging.WARNING, "WARNING")
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.ERROR)  # its warnings are tracebacks that any stranger can provoke

_MAX_LOAD_BYTES = 2 << 20
_MAX_DEPTH = 6
_MAX_ITEMS = 4096
_DICTIONARY_EXT = 0x50
_TUPLE_EXT = 0x40

_unbounded_loads = MSGPackSerializer.loads


def bounded_loads(buf: bytes) -> object:
    """Decode msgpack from a stranger, after a scan of its size, depth and counts.

    hivemind's own loader recurses in C into ext types: 300 nested ones (1.5 kB) overflow the stack and kill the process.

    Raises:
        ProtocolError: out of bounds, or not msgpack.
    """
    if len(buf) > _MAX_LOAD_BYTES:
        raise ProtocolError(f"a DHT message of {len(buf)} bytes exceeds {_MAX_LOAD_BYTES}")
    scan(buf, max_depth=_MAX_DEPTH, max_items=_MAX_ITEMS, allowed_ext=frozenset((_DICTIONARY_EXT, _TUPLE_EXT)))
    return _unbounded_loads(buf)


MSGPackSerializer.loads = staticmethod(bounded_loads)
