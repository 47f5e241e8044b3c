"""What is drawn, at the widths that terminals have."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from node.compute import VirtualCompute
from node.events import EventLog
from node.peer import Peer, PeerOptions, Summary
from node.view import BootstrapView, JsonView, LiveView, PlainView, run_lines, summary_lines
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.publication import SignedManifest
from protocol.records import ExchangeNote, PeerRecord
from tests.node.runs import tiny_run
from tests.protocol.samples import identity, record

WIDTHS = (60, 80, 120, 200)
PARTNER = identity(5)


@pytest.fixture
def peer(run: tuple[SignedManifest, BlobStore], tmp_path: Path) -> Iterator[Peer]:
    """A peer that is not running; tests set its progress."""
    transport = MemoryTransport(MemoryNetwork(), identity(0).peer_id, validator=validate_entry)
    made = Peer(
        run[0],
        identity=identity(0),
        transport=transport,
        store=BlobStore(tmp_path / "blobs"),
        compute=VirtualCompute(seconds_per_call=0.0),
        events=EventLog(),
        folder=None,
        options=PeerOptions(),
    )
    yield made
    made.service._history.close()


def meet(peer: Peer, *names: str) -> None:
    """Let the directory hold training peers of these names."""
    for number, name in enumerate(names, start=5):
        own = identity(number)
        known: PeerRecord = record(own, name=name)
        peer.service.directory._alive[own.peer_id] = known


def train(peer: Peer, *, big: bool = False) -> None:
    """Put the peer into the middle of a round."""
    progress, traffic = peer.progress, peer.progress.traffic
    progress.state, progress.round, progress.sequences_per_step = "training", 12_345 if big else 7, 4
    progress.count_validation(5.6871, 0)
    progress.rounds_done = 3
    for _ in range(3):
        progress.count_step(loss=3.25, tokens=10**9 if big else 64, seconds=1.5, now_s=0.0)
    progress.count_validation(3.0123, 6)
    traffic.sent_bytes, traffic.received_bytes = (10**13, 10**12) if big else (1_234_567, 2_345_678)


def text(view: LiveView, peer: Peer, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    view._console = console
    console.print(view.draw(peer))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- the panel


def test_the_panel_shows_what_an_owner_asks_for(peer: Peer) -> None:
    train(peer)
    meet(peer, "alice", "bob")
    note = {"round": 6, "partner": PARTNER.peer_id, "outcome": "averaged", "seconds": 0.52}
    peer.progress.count_exchange(ExchangeNote.model_validate(note))
    drawn = "\n".join(text(LiveView(terminal()), peer, 80))
    total = peer.manifest.sync.total_rounds
    for expected in (
        f"7 of {total}",
        "3/5 steps · 3 s left",
        "3.250 training · 3.012 (from 5.687) held-out",
        "43 tokens/s · 4 sequences per step · 192 tokens contributed",
        "with 2 other peers · ↑ 1.23 MB  ↓ 2.35 MB",
        "1 averaged, 0 failed",
        f"round 6  averaged  with alice …{PARTNER.peer_id[-8:]}  0.5 s",
        "Ctrl-C leaves",
    ):
        assert expected in drawn


def test_the_panel_of_a_stage_says_which(peer: Peer) -> None:
    train(peer)
    peer.progress.stage, peer.progress.iteration = 0, 36
    drawn = "\n".join(text(LiveView(terminal()), peer, 80))
    assert "0 of 1, counted from 0 · iteration 36" in drawn
    assert "4 sequences per microbatch" in drawn


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("big", [False, True])
def test_no_line_is_wrapped(peer: Peer, width: int, big: bool) -> None:
    view = LiveView(terminal())
    train(peer, big=big)
    meet(peer, "\N{GRINNING FACE}" * 32)
    heights = set()
    for outcome in ("alone", "averaged", "timeout", "lost", "refused", "clipped"):
        partner = None if outcome == "alone" else PARTNER.peer_id
        fields = {"round": 12_345, "partner": partner, "outcome": outcome, "seconds": 123.4}
        peer.progress.count_exchange(ExchangeNote.model_validate(fields))
        lines = text(view, peer, width)
        heights.add(len(lines))
        assert all(len(line) <= width for line in lines)
    assert heights == {12}, "and the panel never jumps"


def test_a_name_is_text_and_not_markup(peer: Peer) -> None:
    train(peer)
    meet(peer, "[red]x[/red]\x1b[2J")
    note = {"round": 6, "partner": PARTNER.peer_id, "outcome": "averaged", "seconds": 0.5}
    peer.progress.count_exchange(ExchangeNote.model_validate(note))
    drawn = "\n".join(text(LiveView(terminal()), peer, 120))
    assert "with [red]x[/red]·[2J …" in drawn
    assert "\x1b[2J" not in drawn


def test_joining_and_being_alone(peer: Peer) -> None:
    assert "fetching data and state" in "\n".join(text(LiveView(terminal()), peer, 80))
    train(peer)
    assert "alone, no other peer is here" in "\n".join(text(LiveView(terminal()), peer, 80))
    meet(peer, "one")
    assert "with 1 other peer ·" in "\n".join(text(LiveView(terminal()), peer, 80))


# ---- warnings


def test_a_lasting_warning_stays_in_the_panel_until_it_is_over(peer: Peer) -> None:
    console = terminal()
    view = LiveView(console)
    train(peer)
    reason = "checkpoint 3 could not be written to /x: No space left on device; free some space"
    for _ in range(3):
        view("checkpoint_failed", {"reason": reason})
    assert written(console).count("warning: ") == 1, "it scrolls by once"
    assert f"! Training goes on unsaved: {reason}" in " ".join(text(view, peer, 120))
    view("checkpoint_saved", {"bytes": 1, "seconds": 0.1})
    lines = text(view, peer, 120)
    assert not any(line.startswith("!") for line in lines)
    assert any("saved" in line and "0 s ago" in line for line in lines)


def test_the_warning_is_yellow(peer: Peer) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard", legacy_windows=False)
    view = LiveView(console)
    view("disk_error", {"path": "/x/events.jsonl", "reason": "No space left on device"})
    console.print(view.draw(peer))
    scrolled, panel = (part for part in written(console).split("\x1b[33m") if "No space left" in part)
    assert scrolled.startswith("warning: Cannot write")
    assert panel.startswith("! Cannot write")


def test_each_file_has_its_own_warning(peer: Peer) -> None:
    view = LiveView(terminal())
    for path in ("/a", "/b"):
        view("disk_error", {"path": path, "reason": "full"})
    view("disk_recovered", {"path": "/a"})
    warnings = [line for line in text(view, peer, 80) if line.startswith("!")]
    assert len(warnings) == 1
    assert "/b" in warnings[0]


def test_details_do_not_scroll_by_in_a_terminal(peer: Peer) -> None:
    console = terminal()
    LiveView(console)("validation", {"round": 1, "loss": 3.0})
    assert written(console) == ""


def test_messages_wrap_between_words() -> None:
    console = terminal(40)
    LiveView(console)("state_refused", {"round": 1, "reason": "word " * 30})
    lines = written(console).splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith(" " * 9) for line in lines[1:])


# ---- elsewhere than in a terminal


def test_plain_output_is_one_line_per_event() -> None:
    console = plain()
    view = PlainView(console)
    view("connecting", {})
    view("step", {"round": 1, "step": 1, "loss": 3.0})
    view("validation", {"round": 1, "loss": 3.0})
    view("checkpoint_failed", {"reason": "a long reason " * 20})
    lines = written(console).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(" Round 1: held-out loss 3.000")
    assert " warning: Training goes on unsaved: " in lines[1]


def test_json_lines() -> None:
    console = plain()
    JsonView(console)("exchange", {"round": 1, "partner": None})
    line = json.loads(written(console))
    assert (line["event"], line["round"], line["partner"]) == ("exchange", 1, None)


SWARM = {"peers": 3, "training": 2, "round": 7, "val_loss": 3.21, "tokens_per_s": 12_345.0}


def test_the_bootstrap_node_says_where_to_join() -> None:
    console = plain()
    view = BootstrapView(console)
    address = f"/ip4/192.0.2.1/tcp/4001/p2p/{PARTNER.peer_id}"
    with view:
        view("web_page", {"url": "http://127.0.0.1:8080/"})
        view("serving", {"run": "ab" * 32, "name": "tiny", "addresses": [address]})
        view("swarm", SWARM)
        view("alone", {})
        view("disk_error", {"path": "/x", "reason": "full"})
    lines = written(console).splitlines()
    assert lines[0] == "Status page http://127.0.0.1:8080/"
    assert f"  llm-node join --peer {address}" in lines, "whole, so that it can be copied"
    assert lines[-2].endswith("2 of 3 peers training · round 7 · held-out loss 3.210 · 12.3k tokens/s")
    assert "warning: Cannot write /x" in lines[-1]


def test_in_a_terminal_the_swarm_is_one_line_that_is_redrawn() -> None:
    console = terminal()
    view = BootstrapView(console)
    with view:
        for round in range(5):
            view("swarm", SWARM | {"round": round})
    assert written(console).count("\n") == 1
    assert "round 4" in written(console)


# ---- the run, and the farewell


def test_the_run_in_three_lines(run: tuple[SignedManifest, BlobStore]) -> None:
    manifest = run[0].manifest
    lines = run_lines(manifest)
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == f"Run tiny, signed by {manifest.organiser}"
    assert lines[1].startswith("Model 18.9k parameters, 1 layer × 32; data files, 59.3k tokens")
    assert lines[2] == f"Training noloco, 5 steps per round of about 2 s, 4 rounds; run {manifest.run_id[:8]}"


def summary(**changes: object) -> Summary:
    fields: dict[str, object] = dict.fromkeys(Summary.__dataclass_fields__, 0) | {"stage": None}
    loss = {"val_loss_start": None, "val_loss_end": None, "time_to_first_step_s": None, "finished": False}
    return Summary(**(fields | loss | changes))  # type: ignore[arg-type]


def test_a_run_in_stages_says_so(tmp_path: Path) -> None:
    signed, _ = tiny_run(tmp_path, model__num_layers=4, pipeline__stages=4, pipeline__skip_ratio=0.25)
    lines = run_lines(signed.manifest)
    assert lines[2] == "Pipeline of 4 stages; a peer holds one, a microbatch visits 3"
    assert lines[3].startswith("Training noloco, 5 iterations per round, 4 rounds; run ")
    assert all(len(line) <= 80 for line in lines)


def test_the_farewell() -> None:
    lines = summary_lines(
        summary(tokens=250_880, rounds=49, exchanges_ok=12, exchanges_failed=1, sent_bytes=1_234_567, received_bytes=99)
    )
    assert lines[0] == (
        "Contributed 250,880 tokens in 49 rounds, with 12 exchanges, 1 failed; sent 1.23 MB, received 99 B."
    )
    assert lines[-1].startswith("Thank you.")
    assert len(lines) == 2, "no loss was measured"
    assert "5.500 → 3.250" in summary_lines(summary(val_loss_start=5.5, val_loss_end=3.25))[1]
    assert "`llm-node generate` samples" in summary_lines(summary(finished=True))[-1]
    of_a_stage = summary_lines(summary(finished=True, stage=2))[-1]
    assert "This home has stage 2; the whole model is in that of the bootstrap node" in of_a_stage
    assert "in 1 round, with 1 exchange," in summary_lines(summary(rounds=1, exchanges_ok=1))[0]
