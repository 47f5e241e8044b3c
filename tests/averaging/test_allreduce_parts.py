"""Cutting encoded vectors: a part decodes like the same slice of the whole, whatever the codec."""

from __future__ import annotations

import pytest
import torch

from averaging.allreduce_parts import Layout
from averaging.codec import DELTA_CODECS, codec_named
from tests.averaging.group_members import decoded, delta_of, encoded_update


@pytest.mark.parametrize("name", DELTA_CODECS)
@pytest.mark.parametrize("numel", [0, 1, 4096, 3 * 4096 + 5])
def test_a_part_is_the_payload_of_its_slice(name: str, numel: int) -> None:
    codec = codec_named(name)
    layout, payload = Layout.of(codec), encoded_update(delta_of(0, numel=numel), codec).delta
    whole, assembled = decoded(payload, codec, numel), memoryview(bytearray(len(payload)))
    for part in layout.cut(numel, 3):
        taken = b"".join(layout.gather(payload, numel, part))
        assert len(taken) == codec.num_bytes(part.stop - part.start) == layout.num_bytes(part.stop - part.start)
        assert torch.equal(decoded(memoryview(taken), codec, part.stop - part.start), whole[part])
        layout.scatter(taken, assembled, numel, part)
    assert assembled == payload


@pytest.mark.parametrize("num_parts", [1, 2, 7, 64])
def test_parts_cover_everything_once_and_are_even(num_parts: int) -> None:
    layout, numel = Layout(256, (2, 256)), 100 * 256 + 3
    parts = layout.cut(numel, num_parts)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop, len(parts)) == (0, numel, num_parts)
    assert all(part.start % 256 == 0 for part in parts)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 2 * 256


def test_more_parts_than_blocks_leaves_some_empty() -> None:
    parts = Layout(4096, (116,)).cut(5000, 8)
    assert sum(part.stop - part.start for part in parts) == 5000
    assert sum(part.stop == part.start for part in parts) == 6


def test_a_codec_without_a_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="can not be cut"):
        Layout.of(codec_named("lattice"))
