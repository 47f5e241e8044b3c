"""Bounds on msgpack bytes, checked before anything decodes them.

msgpack's decoder recurses in C and allocates what a header claims; a few hundred nested extension values in one small DHT
record are enough to crash a process that decodes them. So `scan` walks the bytes first: one loop with an explicit stack, linear in
the input, that builds nothing but the sets of keys of the maps it is in. A stranger's bytes reach a decoder only afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ProtocolError

__all__ = ["scan"]

_LEAF, _TEXT, _ARRAY, _MAP, _EXT, _NEVER = range(6)
_HAVE_BYTES = (_LEAF, _TEXT, _EXT)

_LONG_FORMS: dict[int, tuple[int, int, int]] = {
    # first byte: (kind, bytes of the length field, bytes of payload when there is no length field)
    0xC0: (_LEAF, 0, 0), 0xC1: (_NEVER, 0, 0), 0xC2: (_LEAF, 0, 0), 0xC3: (_LEAF, 0, 0),
    0xC4: (_LEAF, 1, 0), 0xC5: (_LEAF, 2, 0), 0xC6: (_LEAF, 4, 0),
    0xC7: (_EXT, 1, 0), 0xC8: (_EXT, 2, 0), 0xC9: (_EXT, 4, 0),
    0xCA: (_LEAF, 0, 4), 0xCB: (_LEAF, 0, 8),
    0xCC: (_LEAF, 0, 1), 0xCD: (_LEAF, 0, 2), 0xCE: (_LEAF, 0, 4), 0xCF: (_LEAF, 0, 8),
    0xD0: (_LEAF, 0, 1), 0xD1: (_LEAF, 0, 2), 0xD2: (_LEAF, 0, 4), 0xD3: (_LEAF, 0, 8),
    0xD4: (_EXT, 0, 1), 0xD5: (_EXT, 0, 2), 0xD6: (_EXT, 0, 4), 0xD7: (_EXT, 0, 8), 0xD8: (_EXT, 0, 16),
    0xD9: (_TEXT, 1, 0), 0xDA: (_TEXT, 2, 0), 0xDB: (_TEXT, 4, 0),
    0xDC: (_ARRAY, 2, 0), 0xDD: (_ARRAY, 4, 0),
    0xDE: (_MAP, 2, 0), 0xDF: (_MAP, 4, 0),
}  # fmt: skip


def _first_byte_form(byte: int) -> tuple[int, int, int]:
    if byte < 0x80 or byte >= 0xE0:
        return _LEAF, 0, 0
    if byte < 0x90:
        return _MAP, 0, byte & 0x0F
    if byte < 0xA0:
        return _ARRAY, 0, byte & 0x0F
    if byte < 0xC0:
        return _TEXT, 0, byte & 0x1F
    return _LONG_FORMS[byte]


_FORMS = tuple(_first_byte_form(byte) for byte in range(256))
"""Per first byte: kind, bytes of the length field, and the length or count where the first byte tells it."""


@dataclass(slots=True)
class _Open:
    """A container that the scanner is inside of; the whole input is one too."""

    num_left: int
    """Values still to come; a map counts its keys and its values."""
    end: int
    """No value in it may pass this position."""
    is_exact: bool = False
    """Whether its values must fill it up to `end` (the input, an extension's payload)."""
    keys: set[bytes] | None = None
    """Keys of a map so far; None for anything else."""


def scan(data: bytes, *, max_depth: int, max_items: int, allowed_ext: frozenset[int]) -> None:
    """Check that `data` is exactly one msgpack value within bounds, without decoding it.

    An allowed extension must itself hold exactly one value, which counts as one level deeper. Map keys must be strings, and no
    map may have one twice.

    Args:
        data: any bytes, already bounded in length by the caller.
        max_depth: most containers around a value, extensions included.
        max_items: most entries of one array or map.
        allowed_ext: extension type codes to look into; all others are refused.

    Raises:
        ProtocolError: anything else.
    """
    outer: list[_Open] = []
    top = _Open(1, len(data), is_exact=True)
    position = 0
    while True:
        if not top.num_left:
            if top.is_exact and position != top.end:
                raise _bad("bytes left over after a value")
            if not outer:
                return
            top = outer.pop()
            continue
        top.num_left -= 1
        kind, start, size = _read_head(data, position, top.end)
        if top.keys is not None and top.num_left & 1:
            if kind != _TEXT:
                raise _bad("a map key is not a string")
            _add_key(top.keys, data[start : start + size])
        if kind <= _TEXT:
            position = start + size
            continue
        if len(outer) >= max_depth:
            raise _bad("nested too deeply")
        outer.append(top)
        if kind == _EXT:
            if int.from_bytes(data[start - 1 : start], signed=True) not in allowed_ext:
                raise _bad("extension type not allowed")
            top = _Open(1, start + size, is_exact=True)
        elif size > max_items:
            raise _bad("too many entries")
        else:
            top = _Open(size, top.end) if kind == _ARRAY else _Open(2 * size, top.end, keys=set())
        position = start


def _bad(reason: str) -> ProtocolError:
    return ProtocolError(f"bad msgpack: {reason}")


def _read_head(data: bytes, position: int, end: int) -> tuple[int, int, int]:
    """Kind of the value at `position`, where its content starts, and its bytes (entries for an array or map)."""
    if position >= end:
        raise _bad("ends early")
    kind, length_bytes, size = _FORMS[data[position]]
    start = position + 1
    if length_bytes:
        size = int.from_bytes(data[start : start + length_bytes])  # where it is cut off, `start` passes `end`
        start += length_bytes
    if kind == _EXT:
        start += 1  # the type code
    elif kind == _NEVER:
        raise _bad("a byte that never starts a value")
    if start > end or (size > end - start and kind in _HAVE_BYTES):
        raise _bad("ends early")
    return kind, start, size


def _add_key(keys: set[bytes], key: bytes) -> None:
    if key in keys:
        raise _bad("a map has the same key twice")
    keys.add(key)
