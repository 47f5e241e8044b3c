"""From an address to a run: which addresses are tried, what is remembered, and what is refused before anything is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from node.home import Home
from node.join import _find_manifest, _known_addresses, _remember_run, check_device, check_memory
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.publication import MANIFEST_PROTOCOL, SignedManifest, publish_manifest
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import write_frame
from tests.node.runs import ORGANISER
from tests.node.swarm import neighbourhood

Run = tuple[SignedManifest, BlobStore]


def remembered(home: Home, run: Run, via: tuple[str, ...], *met: str) -> Path:
    folder = _remember_run(home, run[0], via)
    (folder / "peers.json").write_text(json.dumps(met))
    return folder


def test_without_an_address_the_peers_of_the_latest_run_are_tried(tmp_path: Path, run: Run) -> None:
    home = Home.at(tmp_path)
    assert _known_addresses(home, ()) == ()
    remembered(home, run, ("first",), "met-1", "met-2")
    assert _known_addresses(home, ()) == ("met-1", "met-2", "first")


def test_a_known_address_brings_its_runs_peers_and_an_unknown_one_does_not(tmp_path: Path, run: Run) -> None:
    home = Home.at(tmp_path)
    remembered(home, run, ("first",), "met")
    assert _known_addresses(home, ("first",)) == ("first", "met")
    assert _known_addresses(home, ("another run's",)) == ("another run's",)


def test_addresses_are_remembered_over_sessions(tmp_path: Path, run: Run) -> None:
    home = Home.at(tmp_path)
    for number in range(40):
        folder = _remember_run(home, run[0], (f"address-{number}",))
    via = json.loads((folder / "via.json").read_text())
    assert len(via) == 32
    assert via[0] == "address-39", "the newest stay"
    before = (folder / "via.json").stat().st_mtime_ns
    _remember_run(home, run[0], ("address-39",))
    assert (folder / "via.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("garbage", ["", "{", "7", '{"a": 1}', "[1, null, {}]", "\0"])
def test_garbage_in_the_caches_is_passed_over(tmp_path: Path, run: Run, garbage: str) -> None:
    home = Home.at(tmp_path)
    folder = remembered(home, run, ("first",))
    for name in ("peers.json", "via.json"):
        (folder / name).write_text(garbage)
    assert _known_addresses(home, ()) == ()
    assert _known_addresses(home, ("first",)) == ("first",)


# ---- the manifest


def test_the_manifest_comes_from_the_first_peer_that_answers(tmp_path: Path, run: Run) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            addresses = tuple([(await node.transport.addresses())[0] for node in nodes[1:]])
            nodes[0].transport.network.crash(nodes[1].peer)
            publish_manifest(nodes[2].transport, run[0])
            home = Home.at(tmp_path / "home")
            remembered(home, run, addresses[:1], addresses[1])
            assert await _find_manifest(nodes[0].transport, home, addresses[:1], addresses) == run[0]

    run_virtual(story())


def test_nobody_answers(tmp_path: Path, run: Run) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            (address,) = await nodes[1].transport.addresses()
            nodes[0].transport.network.crash(nodes[1].peer)
            home = Home.at(tmp_path / "home")
            with pytest.raises(UserError, match=r"no peer answers at .*; check the address"):
                await _find_manifest(nodes[0].transport, home, (address,), (address,))
            with pytest.raises(UserError, match="--peer ADDRESS"):
                await _find_manifest(nodes[0].transport, home, (), ())
            _remember_run(home, run[0], (address,))
            again = await _find_manifest(nodes[0].transport, home, (), (address,))
            assert again == run[0], "a run that was joined before goes on alone"

    run_virtual(story())


@pytest.mark.parametrize("lie", ["another run", "garbage"])
def test_who_was_met_in_a_run_can_neither_lead_into_another_nor_keep_us_out(tmp_path: Path, run: Run, lie: str) -> None:
    """A swarm is open, so anybody's address may be in the cache."""
    other = SignedManifest.sign(run[0].manifest.model_copy(update={"name": "other"}), ORGANISER)

    async def lie_to(stream: Stream) -> None:
        await write_frame(stream, b"no manifest")

    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            addresses = tuple([(await node.transport.addresses())[0] for node in nodes[1:]])
            if lie == "garbage":
                nodes[1].transport.handle(MANIFEST_PROTOCOL, lie_to)
            else:
                publish_manifest(nodes[1].transport, other)
            publish_manifest(nodes[2].transport, run[0])
            home = Home.at(tmp_path / "home")
            remembered(home, run, ("/ip4/10.0.0.9/tcp/9",), *addresses)
            assert await _find_manifest(nodes[0].transport, home, (), addresses) == run[0]
            if lie == "another run":
                found = await _find_manifest(nodes[0].transport, home, addresses[:1], addresses)
                assert found == other, "the owner says so"

    run_virtual(story())


# ---- the machine


def test_a_model_that_does_not_fit_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(run[0])
    large = run[0].manifest.model.model_copy(update={"num_layers": 200, "hidden_size": 16_000})
    huge = SignedManifest.sign(run[0].manifest.model_copy(update={"model": large}), ORGANISER)
    with pytest.raises(UserError, match=r"needs about [0-9.]+ GiB of memory and [0-9.]+ GiB are free"):
        check_memory(huge)

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(UserError, match="close other programs"):
        check_memory(run[0])


@pytest.mark.parametrize("device", ["", "tpu", "cuda:77", "cpu:"])
def test_a_device_that_is_not_here(device: Any) -> None:
    check_device("cpu")
    with pytest.raises(UserError, match="cannot train on --device") as caught:
        check_device(device)
    assert "\n" not in str(caught.value)
