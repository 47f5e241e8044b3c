"""`llm-node demo`: a whole swarm on one machine, shown as a user would run it.

With the libp2p transport it types the real commands (`init`, `bootstrap`, several `join`, `generate`, `export`), each in its
own process, and reads their events. With the memory transport (node/simulation/demo.py) the same peers run in one process in
virtual time, so that the result does not depend on how many peers share this machine's cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from node.demo_settings import DEMO_HELDOUT_TOKENS, DEMO_MAX_CHARS, DEMO_MODEL, DEMO_SETTINGS, DemoOptions, settings_for
from protocol.errors import UserError

__all__ = ["run_demo", "show_result"]

PROMPT = "import os\n\n\ndef read_"
START_TIMEOUT_S = 90.0
ROUND_PATIENCE = 4.0
"""A demo is given up when it takes this many times its planned time."""


@dataclass
class Child:
    """One process of the swarm and the latest it said."""

    name: str
    process: subprocess.Popen[str]
    latest: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)
    averaged: int = 0


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run the demo and return its result (the fields of the JSON line).

    Raises:
        UserError: a process of the swarm failed; its own message is passed on.
    """
    folder = options.folder.absolute()
    if folder.exists() and not (folder / ".llm-node-demo").exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a former demo's folder; name another with --dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".llm-node-demo").touch()
    if options.memory:
        from node.simulation.demo import run_simulated_demo

        console = Console(stderr=True)
        console.print(
            f"Training {options.peers} peer{'s' * (options.peers > 1)} in one process, in virtual time; about a minute each …"
        )
        result = run_simulated_demo(options, folder)
        show_result(console, result)
        return result
    return _Swarm(options, folder).run()


class _Swarm:
    """The processes of one demo."""

    def __init__(self, options: DemoOptions, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._console = Console(stderr=True)
        self._events: queue.Queue[tuple[Child, dict[str, Any] | None]] = queue.Queue()
        self._children: list[Child] = []

    def run(self) -> dict[str, Any]:
        """Start everything, watch it to the end, and inspect what came out."""
        started = time.monotonic()
        with self._ending_all_children():
            self._command("init", *self._init_arguments())
            address = self._start_bootstrap()
            started_swarm = time.monotonic()
            peers = [self._start_peer(number, address) for number in range(1, self._options.peers + 1)]
            self._watch(peers)
            seconds = time.monotonic() - started_swarm
            result = self._result(peers, seconds)
            home = f"--home={self._folder / 'peer-1'}"
            exported = self._folder / "exported"
            self._console.print(self._command("export", str(exported), home).strip(), highlight=False)
            sample = self._command("generate", PROMPT, "--max-tokens=80", home)
            self._console.print("[bold]A sample of the trained model[/bold]")
            self._console.print(sample.strip(), markup=False, highlight=False)
        # Imported only now: a coordinator of processes needs no torch while they run.
        from node.demo_check import compare_with_transformers, replica_spread

        result["replica_spread"] = replica_spread([self._folder / f"peer-{n + 1}" for n in range(len(peers))])
        result["checkpoint"] = str(exported)
        result |= compare_with_transformers(exported, self._folder / "peer-1", PROMPT)
        result["total_seconds"] = round(time.monotonic() - started, 1)
        show_result(self._console, result)
        return result

    # ---- processes

    def _init_arguments(self) -> list[str]:
        arguments = [str(self._folder / "run.toml"), "--name=demo", f"--model={DEMO_MODEL}", "--data=stdlib"]
        arguments += [f"--seed={self._options.seed}", f"--max-chars={DEMO_MAX_CHARS}"]
        arguments += [f"--heldout-tokens={DEMO_HELDOUT_TOKENS}", f"--home={self._folder / 'bootstrap'}"]
        return arguments + [f"--set={key}={json.dumps(value)}" for key, value in settings_for(self._options).items()]

    def _command(self, *arguments: str) -> str:
        """Run one command to its end and return what it printed."""
        self._console.print(f"[dim]$ llm-node {' '.join(_short(a) for a in arguments[:3])} …[/dim]", highlight=False)
        done = subprocess.run(
            [*_llm_node(), *arguments], capture_output=True, text=True, check=False, env=_environment()
        )
        if done.returncode:
            raise UserError(f"`llm-node {arguments[0]}` failed: {_last_line(done.stderr)}")
        return done.stdout

    def _start(self, name: str, *arguments: str) -> Child:
        self._console.print(f"[dim]$ llm-node {' '.join(_short(a) for a in arguments[:3])} …[/dim]", highlight=False)
        log = (self._folder / f"{name}.err").open("w")
        process = subprocess.Popen(
            [*_llm_node(), *arguments, "--events", f"--name={name}", f"--home={self._folder / name}"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(),
        )
        log.close()
        child = Child(name, process)
        self._children.append(child)
        threading.Thread(target=self._read, args=(child,), daemon=True).start()
        return child

    def _read(self, child: Child) -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            with contextlib.suppress(ValueError):
                self._events.put((child, json.loads(line)))
        self._events.put((child, None))

    def _start_bootstrap(self) -> str:
        child = self._start(
            "bootstrap",
            "bootstrap",
            str(self._folder / "run.toml"),
            "--listen=/ip4/127.0.0.1/tcp/0",
            "--http=127.0.0.1:0",
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "serving" not in child.latest:
            self._take_event(deadline, patience=f"the bootstrap node did not start within {START_TIMEOUT_S:.0f} s")
        page = child.latest.get("web_page", {}).get("url")
        self._console.print(f"Status page while the demo runs: [bold]{page}[/bold]")
        return str(child.latest["serving"]["addresses"][0])

    def _start_peer(self, number: int, address: str) -> Child:
        return self._start(f"peer-{number}", "join", "--peer", address, "--threads=1", "--listen=/ip4/127.0.0.1/tcp/0")

    @contextlib.contextmanager
    def _ending_all_children(self) -> Iterator[None]:
        """Whatever happens, no process of the demo outlives it."""
        try:
            yield
        finally:
            for child in self._children:
                if child.process.poll() is None:
                    child.process.send_signal(signal.SIGTERM)
            for child in self._children:
                try:
                    child.process.wait(10)
                except subprocess.TimeoutExpired:
                    child.process.kill()
                    child.process.wait()

    # ---- watching

    def _watch(self, peers: list[Child]) -> None:
        planned_s = self._options.rounds * float(str(DEMO_SETTINGS["sync.round_target_s"]))
        deadline = time.monotonic() + START_TIMEOUT_S + ROUND_PATIENCE * planned_s
        with Live(_swarm_table(peers), console=self._console, refresh_per_second=2) as live:
            while not all("summary" in peer.latest for peer in peers):
                self._take_event(deadline, patience="the demo takes far longer than planned; is the machine very busy?")
                live.update(_swarm_table(peers))

    def _take_event(self, deadline: float, *, patience: str) -> None:
        try:
            child, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise UserError(patience) from None
        if event is None:
            if "summary" not in child.latest:
                child.process.wait()
                said = _last_line((self._folder / f"{child.name}.err").read_text())
                raise UserError(f"{child.name} stopped early: {said}")
            return
        child.latest[event["event"]] = event
        if event["event"] == "validation":
            child.validation.append(event["loss"])
        elif event["event"] == "exchange" and event["outcome"] in ("averaged", "clipped"):
            child.averaged += 1

    def _result(self, peers: list[Child], seconds: float) -> dict[str, Any]:
        summaries = [peer.latest["summary"] for peer in peers]
        return {
            "val_loss_start": _mean([peer.validation[0] for peer in peers]),
            "val_loss_end": _mean([peer.validation[-1] for peer in peers]),
            "peers": len(peers),
            "rounds": min(summary["rounds"] for summary in summaries),
            "exchanges_ok": sum(summary["exchanges_ok"] for summary in summaries),
            "exchanges_failed": sum(summary["exchanges_failed"] for summary in summaries),
            "exchanges_ok_min_peer": min(summary["exchanges_ok"] for summary in summaries),
            "bytes_sent": sum(summary["sent_bytes"] for summary in summaries),
            "tokens": sum(summary["tokens"] for summary in summaries),
            "seconds": round(seconds, 1),
            "time_to_first_step_s": round(max(s["time_to_first_step_s"] for s in summaries), 2),
        }


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The outcome in one sentence."""
    fall = 100 * (1 - result["val_loss_end"] / result["val_loss_start"])
    console.print(
        f"[bold]Held-out loss {result['val_loss_start']:.3f} → {result['val_loss_end']:.3f}[/bold] (−{fall:.0f} %) with "
        f"{result['peers']} peer{'s' * (result['peers'] > 1)}, {result['exchanges_ok']} exchanges, {result['tokens']:,} tokens, "
        f"{result['bytes_sent'] / 1e6:.0f} MB sent, {result['seconds']:.0f} s. Exported to {result['checkpoint']}.",
        highlight=False,
    )


def _swarm_table(peers: list[Child]) -> Table:
    table = Table("peer", "round", "step", "loss", "held-out", "exchanges", "last exchange")
    for peer in peers:
        step, last = peer.latest.get("step", {}), peer.latest.get("exchange", {})
        held = f"{peer.validation[0]:.3f} → {peer.validation[-1]:.3f}" if peer.validation else "–"
        state = "done" if "summary" in peer.latest else str(step.get("round", "starting"))
        outcome = f"{last['outcome']} in {last['seconds']:.1f} s" if last else "–"
        table.add_row(
            peer.name, state, str(step.get("step", "")), str(step.get("loss", "")), held, str(peer.averaged), outcome
        )
    return table


def _llm_node() -> list[str]:
    return [sys.executable, "-m", "node"]


def _environment() -> dict[str, str]:
    # Each child works with one thread, so that several of them share the machine's cores.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _short(argument: str) -> str:
    return argument if len(argument) < 60 else argument[:24] + "…" + argument[-12:]


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("llm-node: ") if lines else "no message"


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)
