"""Scenario files: what is read, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.simulation.links import read_matrix
from node.simulation.scenario import load_scenario
from protocol.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "docs" / "scenarios").glob("*.toml"))
SMALL = "[swarm]\npeers = 4\nrounds = 2\n"


def write(folder: Path, text: str, name: str = "scenario.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        load_scenario(write(folder, text))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_sound(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.name == path.stem
    if scenario.links.matrix:
        assert read_matrix(path.parent / scenario.links.matrix)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_the_sync_section_is_the_manifest_s(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, SMALL + '[sync]\nalgorithm = "diloco"\ninner_steps = 7\n'))
    assert scenario.sync.inner_steps == 7
    assert scenario.sync.group == "all"
    assert scenario.safety is None


def test_a_run_that_ends_earlier_ends_the_simulation(tmp_path: Path) -> None:
    assert load_scenario(write(tmp_path, SMALL + "[sync]\ntotal_rounds = 1\n")).num_rounds == 1
    assert load_scenario(write(tmp_path, SMALL + "[sync]\ntotal_rounds = 9\n")).num_rounds == 2


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("rounds =", "not valid TOML"),
        ("deep = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[swarm]\npeers = 4\n", "swarm.rounds: is missing; add it"),
        (SMALL + "colour = 1\n", "swarm.colour: unknown key"),
        (SMALL + '"a\\nb" = 1\n', "unknown key"),
        ("[swarm]\npeers = 4.5\nrounds = 2\n", "swarm.peers"),
        ("[swarm]\npeers = 99999999\nrounds = 2\n", "less than or equal to 16384; change it"),
        ("[swarm]\npeers = 4096\nrounds = 2\nparameters = 1000000\n", "than fits in memory; lower one of them"),
        (SMALL + "[links]\nlatency_s = inf\n", "links.latency_s"),
        (SMALL + "[links]\nexchange_loss = 1.5\n", "links.exchange_loss"),
        (SMALL + '[links]\nmatrix = "a\\u0000b"\n', "links.matrix"),
        (SMALL + '[links]\nmatrix = "a\\nb"\n', "links.matrix"),
        (SMALL + "[training]\nlr = 1e-20\n", "training.lr"),
        (SMALL + "[training]\nstep_s = 1e-320\n", "training.step_s"),
        ("[swarm]\npeers = 4\nrounds = 2\nheartbeat_s = 1e-300\n", "swarm.heartbeat_s"),
        (SMALL + "[sync]\nalpha = 0.9\n", "replicas would drift apart"),
        (SMALL + "[sync]\nfragments = 4\n", "raise it"),
        (SMALL + "[model]\npreset = '1b'\n", "set pipeline.stages above 1"),
        (SMALL + "[pipeline]\nstages = 4\n[model]\npreset = '50m'\nsequence_tokens = 4096\n", "lower it"),
        (SMALL + "[pipeline]\nstages = 4\n[sync]\nfragments = 4\n", "raise it"),
        ("[swarm]\npeers = 32\nrounds = 2\n[pipeline]\nstages = 32\n", "more than the 22 layers of model.preset 1b"),
        (
            "[swarm]\npeers = 4\nrounds = 2\nparameters = 300000\n[pipeline]\nstages = 4\n[model]\npreset = '1m'\n"
            "sequence_tokens = 64\n[sync]\nfragments = 64\n",
            "too many for the smallest of 4 stages",
        ),
        (
            SMALL + "[[links.classes]]\nshare = 0.5\nup_bytes_per_s = 1.0\ndown_bytes_per_s = 1.0\n",
            "make 0.5 instead of 1",
        ),
        ("[swarm]\npeers = 100\nrounds = 2\n[sync]\nalgorithm = 'diloco'\n", "set sync.group to pair"),
    ],
)
def test_bad_scenarios_are_refused_in_one_line(tmp_path: Path, text: str, telling: str) -> None:
    assert telling in refusal(tmp_path, text)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    """Editors and spreadsheets on Windows write one."""
    assert load_scenario(write(tmp_path, "\ufeff" + SMALL)).swarm.peers == 4
    assert read_matrix(write(tmp_path, "\ufefffrom,to,latency_ms,mbit_per_s\na,b,10,8\n", "m"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the path of a scenario file"):
        load_scenario(tmp_path / "nothing.toml")


class TestMatrix:
    def test_directions_and_sites_that_are_left_out_are_filled_in(self, tmp_path: Path) -> None:
        path = write(
            tmp_path, "from,to,latency_ms,mbit_per_s\na,b,10,8\nb,c,20,16\na,c,30,4\nc,a,35,2\nb,b,1,80\n", "m"
        )
        sites = read_matrix(path)
        assert sites["b", "a"] == sites["a", "b"] == (0.01, 1e6)
        assert (sites["a", "c"], sites["c", "a"]) == ((0.03, 0.5e6), (0.035, 0.25e6))
        assert sites["b", "b"] == (0.001, 1e7)
        assert sites["a", "a"] == (0.01, 1e6), "the best of a's links"
        assert len(sites) == 9

    @pytest.mark.parametrize(
        ("text", "telling"),
        [
            ("", "first line must be"),
            ("a,b,10,8\n", "first line must be"),
            ("from,to,latency_ms,mbit_per_s\n", "holds no link"),
            ("from,to,latency_ms,mbit_per_s\na,b,10\n", "line 2"),
            ("from,to,latency_ms,mbit_per_s\na,b,10,8\na,a,x,8\n", "line 3"),
            ("from,to,latency_ms,mbit_per_s\na,b,-1,8\n", "line 2"),
            ("from,to,latency_ms,mbit_per_s\na,b,nan,8\n", "line 2"),
            ("from,to,latency_ms,mbit_per_s\na,b,1e300,8\n", "line 2"),
            ("from,to,latency_ms,mbit_per_s\na,b,1,0\n", "line 2"),
            ("from,to,latency_ms,mbit_per_s\na,b,1,8\nc,c,1,8\n", "between 'a' and 'c' is missing"),
        ],
    )
    def test_bad_tables_are_refused_in_one_line(self, tmp_path: Path, text: str, telling: str) -> None:
        with pytest.raises(UserError, match=telling) as caught:
            read_matrix(write(tmp_path, text, "m.csv"))
        assert "\n" not in str(caught.value)

    def test_a_missing_table(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"check links\.matrix"):
            read_matrix(tmp_path / "nothing.csv")
