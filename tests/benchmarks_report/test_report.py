"""The benchmark report: what is shown for each shape of result, and that rendering twice changes nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.manifest import SyncSpec
from tests.benchmarks import report, report_plots, report_run, stored_runs
from tests.benchmarks.convergence import METHODS
from tests.benchmarks.convergence_cell import Cell, cell_key, sync_spec
from tests.benchmarks.report_run import BenchmarkError, load_result, run_benchmark
from tests.benchmarks.report_tables import arranged, cell, headline, render_tables

Json = dict[str, Any]

METHOD = {
    "loss_mean": 2.5,
    "loss_std": 0.02,
    "averaged_mean": 2.4,
    "spread_mean": 0.1,
    "bytes_per_peer": 4_000_000,
    "seeds": [1, 2, 3],
}
PARTIAL = {
    "loss": 3.5,
    "perplexity_ratio": 1.0,
    "compute_saved": 0.0,
    "seeds": [0, 1],
    "omitted": [{"count": count, "loss": 3.5 + count, "loss_std": 0.1} for count in range(3)],
}
SYNC = {
    "ours": {
        "pair-average q8": {"seconds": {"median": 0.5, "lowest": 0.4, "highest": 0.8}, "bytes": 25_000_000},
        "pair-average fp32": {"seconds": {"median": 2.0, "lowest": 1.9, "highest": 2.2}, "bytes": 100_000_000},
    },
    "hivemind": {"float16": {"seconds": {"median": 2.5, "lowest": 2.0, "highest": 3.0}, "matchmaking_s": 1.5}},
    "raw_stream_MBps": {"both_ways": {"median": 500.0, "lowest": 450.0, "highest": 510.0}},
    "copy_GBps": 8.5,
    "fraction_of_raw_stream": {"whole": 0.72, "transfer": 0.9},
    "speedup_vs_hivemind_best": {"ours": "pair-average q8", "hivemind": "float16", "seconds": 5.0},
}
RESULTS: dict[str, Json] = {
    "swarm": {
        "single": {"peers": 1, "val_loss_end": [4.1, 4.2], "mean": 4.15, "std": 0.05},
        "swarm": {"peers": 3, "val_loss_end": [3.8, 3.9], "mean": 3.85, "std": 0.05},
        "gain": 0.3,
        "seeds_won": 2,
    },
    "sync": {"25": SYNC, "100": SYNC},
    "utilisation": {
        "utilisation": {
            "step_s": 1.5,
            "ours_overlap": {"share": [0.98, 0.99], "median": 0.985, "spread": 0.01, "rounds": [12, 12]},
            "hivemind_blocking": {"median": 0.6, "spread": 0.1, "per_peer": {"a": 0.5, "b": 0.7}, "rounds": 9},
        }
    },
    "convergence": {
        "convergence": {
            "4": {
                "synchronous": METHOD | {"loss_mean": 2.1, "bytes_per_peer": None},
                "local": METHOD | {"loss_mean": 2.9, "bytes_per_peer": 0},
                "default": METHOD,
                "diloco": METHOD | {"loss_mean": 2.45, "bytes_per_peer": 9_000_000},
            }
        },
        "steps": 2000,
        "attempts": [{"name": "larger step", "loss": 2.6, "bytes_per_peer": 4_000_000, "note": "worse | noisier"}],
    },
    "partial": {
        "full": PARTIAL,
        "skip 25 %": PARTIAL | {"loss": 3.6, "perplexity_ratio": 1.105, "compute_saved": 0.238},
    },
    "codecs": {
        "q8": {"bytes_per_parameter": 1.0078, "error_gaussian": 0.006, "encode_GBps": 3.5, "decode_GBps": 5.0},
        "q8 compiled": {"bytes_per_parameter": 1.0078, "error_gaussian": 0.006, "encode_GBps": 9.5, "decode_GBps": 9.0},
        "fp32": {"bytes_per_parameter": 4.0, "error_gaussian": 0.0, "encode_GBps": 12.5, "decode_GBps": 12.0},
        "hivemind Float16": {
            "bytes_per_parameter": 2.0,
            "error_gaussian": 0.0002,
            "encode_GBps": 1.5,
            "decode_GBps": 2.0,
        },
    },
    "scale": {
        "round_time": {"0.5": {"16": {"pair_s": 0.1, "tree_s": 0.4}, "1024": {"pair_s": 0.1, "tree_s": 2.0}}},
        "spread": {"0.0": [1.0, 0.5, 0.01], "0.3": [1.0, 0.6, 0.3]},
        "parameters": 64,
    },
    "novel": {"per_size": {"10": {"seconds": 1.25}, "20": {"seconds": 2.5}}, "peers": 4},
}


def stored(result: Json) -> Json:
    """A result as `make bench` stores it."""
    machine = {"cpu": "A CPU", "cores": 2, "memory_GiB": 24, "os": "An OS", "python": "3.11.7", "torch": "2.13"}
    fields = {
        "date": "2025-11-21T15:00:00+00:00",
        "commit": "abc",
        "command": "python -m x --json",
        "wall_s": 61.5,
        "load_before": 0.1,
    }
    return {**fields, "machine": machine, "result": result}


def docs_with(folder: Path, names: list[str], *, frame: str = "# Benchmarks\n") -> Path:
    """A docs folder with the results of `names`."""
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks.md").write_text(frame, encoding="utf-8")
    for name in names:
        (folder / "benchmarks" / f"{name}.json").write_text(json.dumps(stored(RESULTS[name])), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        ({"median": 2.0, "spread": [1.5, 2.5]}, "2 (1.5–2.5)"),
        ({"mean": 2.0, "std": 0.25}, "2 (± 0.25)"),
        ({"median": 3, "lowest": 1, "highest": 9}, "3 (1–9)"),
        ([1, 2], "1, 2"),
        ([5, 1, 2, 3, 4], "3 (1–5, 5 values)"),
        ("a|b", "a\\|b"),
    ],
)
def test_cell(value: Any, text: str) -> None:
    assert cell(value) == text


def test_tables_show_rows_with_different_fields_and_deeper_levels() -> None:
    text = "\n\n".join(render_tables(RESULTS["sync"]))
    assert "**25, ours**" in text
    assert "| pair-average q8 | 0.5 (0.4–0.8) | 25,000,000 |" in text
    assert "| raw stream MBps, both ways | 500 (450–510) |" in text
    assert text.count("| copy GBps | 8.5 |") == 2


def test_rows_without_a_common_column_do_not_share_a_table() -> None:
    rows = {"a": {"x": 1, "y": 2}, "b": {"y": 3}, "c": {"z": 4}}
    assert render_tables(rows) == [
        "| field | value |\n| --- | --- |\n| c, z | 4 |",
        "|  | x | y |\n| --- | --- | --- |\n| a | 1 | 2 |\n| b | – | 3 |",
    ]


def test_a_list_of_records_becomes_a_table_by_name() -> None:
    text = "\n\n".join(render_tables(RESULTS["convergence"]))
    assert "| larger step | 2.6 | 4,000,000 | worse \\| noisier |" in text
    assert "**convergence, 4**" in text


def test_a_wide_table_is_turned() -> None:
    wide = {"one": {f"field_{index}": index for index in range(12)}, "two": {"field_3": 30}}
    (text,) = render_tables({"rows": wide})[1:]
    assert text.splitlines()[0] == "|  | one | two |"
    assert "| field 3 | 3 | 30 |" in text


def test_headlines_survive_missing_fields() -> None:
    for name, result in RESULTS.items():
        assert headline(name, result)
        assert headline(name, {}) == "measured, see below"
    assert "5×" in headline("sync", RESULTS["sync"])
    assert "98.5%" in headline("utilisation", RESULTS["utilisation"])
    assert headline("partial", RESULTS["partial"]) == "skip 25 %: perplexity +10.5%, compute -24%"


def test_page_keeps_the_frame_and_names_what_is_missing(tmp_path: Path) -> None:
    frame = "# B\n<!-- begin summary -->\n<!-- end summary -->\nby hand\n<!-- begin sync -->\nold\n<!-- end sync -->\n"
    docs = docs_with(tmp_path, ["novel"], frame=frame)
    report.update_docs(docs)
    page = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert "by hand" in page
    assert "old" not in page
    assert "*Not run.* `make bench NAMES=sync` runs it." in page
    assert "| [sync](#sync) | not run | – |" in page
    assert "## novel" in page
    assert "A CPU, 2 cores, 24 GiB, An OS, Python 3.11.7, torch 2.13" in page


def test_rendering_twice_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    docs = docs_with(tmp_path, ["convergence", "novel", "utilisation"])
    report.update_docs(docs)
    first = {path: path.read_bytes() for path in docs.rglob("*.*")}
    plots = [path.name for path in first if path.suffix == ".svg"]
    assert sorted(plots) == ["convergence-4.svg", "utilisation.svg"]
    assert all(f"](benchmarks/{name})" in first[docs / "benchmarks.md"].decode() for name in plots)
    report.update_docs(docs)
    assert {path: path.read_bytes() for path in docs.rglob("*.*")} == first


def test_convergence_shows_the_free_and_the_synchronous_as_levels() -> None:
    (picture,) = report_plots.PICTURES["convergence"](RESULTS["convergence"])
    (panel,) = picture.panels
    assert panel.levels == {"synchronous": 2.1, "local": 2.9}
    assert panel.lines == {"default": [(4.0, 2.5, 0.02)], "diloco": [(9.0, 2.45, 0.02)]}


def test_loss_by_omitted_stages_stands_side_by_side() -> None:
    text = "\n\n".join(render_tables(arranged("partial", RESULTS["partial"])))
    assert "| skip 25 % | 3.6 | 1.105 | 0.238 | 0, 1 |" in text
    assert "|  | full | skip 25 % |" in text
    assert "| 2 omitted | 5.5 (± 0.1) | 5.5 (± 0.1) |" in text
    (picture,) = report_plots.PICTURES["partial"](RESULTS["partial"])
    assert picture.panels[0].lines["full"] == [(0.0, 3.5, 0.1), (1.0, 4.5, 0.1), (2.0, 5.5, 0.1)]


def test_bars_hold_middle_and_single_values() -> None:
    (picture,) = report_plots.PICTURES["utilisation"](RESULTS["utilisation"])
    assert picture.panels[0].rows[1] == ("hivemind blocking", 0.6, [0.5, 0.7], False)
    (picture,) = report_plots.PICTURES["sync"](RESULTS["sync"])
    assert [panel.rows[2] for panel in picture.panels] == [("hivemind float16", 2.5, [2.0, 3.0], False)] * 2


def test_curves_come_from_tables_by_number_and_from_lists() -> None:
    times, spread, nothing = report_plots.PICTURES["scale"](RESULTS["scale"])
    assert [(panel.title, panel.logarithmic) for panel in times.panels] == [("round time, 0.5", "x")]
    assert times.panels[0].lines["tree s"] == [(16.0, 0.4, 0.0), (1024.0, 2.0, 0.0)]
    assert spread.panels[0].lines["0.3"] == [(1.0, 1.0, 0.0), (2.0, 0.6, 0.0), (3.0, 0.3, 0.0)]
    assert spread.panels[0].logarithmic == "y"
    assert not nothing.panels


@pytest.mark.parametrize("name", sorted(report_plots.PICTURES))
def test_plots_survive_missing_fields(name: str) -> None:
    assert all(panel.is_empty for picture in report_plots.PICTURES[name]({}) for panel in picture.panels)


def test_without_matplotlib_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchmarkError, match="pip install"):
        report_plots.require_matplotlib()


def test_a_benchmark_is_stored_with_machine_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tests" / "benchmarks"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "quick.py").write_text("import sys\nprint('busy')\nprint('{\"options\": ' + str(len(sys.argv)) + '}')\n")
    (package / "silent.py").write_text("print('no result')\n")
    (package / "broken.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    run_benchmark("quick", tmp_path, options="--size 4")
    document = load_result(tmp_path / "quick.json")
    assert document["result"] == {"options": 4}
    assert document["command"] == "python -m tests.benchmarks.quick --json --size 4"
    assert document["commit"] == "unknown"
    assert document["machine"]["cores"] >= 1
    with pytest.raises(BenchmarkError, match="silent did not end"):
        run_benchmark("silent", tmp_path)
    with pytest.raises(BenchmarkError, match="exit status 3"):
        run_benchmark("broken", tmp_path)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "sync.json").write_text("{", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"sync\.json"):
        load_result(tmp_path / "sync.json")


def test_every_benchmark_has_its_frame_in_the_page() -> None:
    page = (report.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert "swarm" in report.benchmark_names()
    for name in report.benchmark_names():
        assert f"<!-- begin {name} -->" in page
    assert set(report_run.FIELDS) == set(stored({}))


def test_the_default_of_the_convergence_table_is_the_product_s() -> None:
    assert sync_spec(METHODS["default"]) == SyncSpec()


def test_a_stored_run_counts_only_with_the_same_settings() -> None:
    cell = METHODS["default"]
    same = replace(cell, sync={})
    assert cell_key(same) == cell_key(cell)
    assert cell_key(replace(cell, sync={"inner_steps": 36})) != cell_key(cell)


def test_a_new_setting_does_not_orphan_the_stored_runs() -> None:
    """Runs of hours are found again by keys made of all settings, those that came later included."""
    lines = stored_runs.stored(report.DOCS / "benchmarks" / "convergence_runs.jsonl")
    assert len(lines) > 20
    assert all(cell_key(Cell(**line["cell"])) == key for key, line in lines.items())
    sparse = {"algorithm": "pair-average", "fragments": 4}
    keys = {cell_key(replace(METHODS["default"], sync=sparse | more)) for more in ({}, {"fragment_choice": "random"})}
    assert len(keys) == 2
