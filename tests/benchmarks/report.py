"""`make bench`: run the benchmarks, keep their results in docs/benchmarks/NAME.json, and write docs/benchmarks.md from them.

A module in this folder that takes `--json` is a benchmark. Its last line is one JSON object, which is stored with the date, commit,
command and machine. The page is a frame written by hand: only the text between `<!-- begin NAME -->` and `<!-- end NAME -->` is
replaced, so what a benchmark means stays beside its numbers. The same results give the same page and plots, byte for byte: a diff
of docs/ shows what was measured anew. Results live in the repository because a reader wants the numbers without hours of running.

    python -m tests.benchmarks.report                        render what is there
    python -m tests.benchmarks.report --run                  run every benchmark first
    python -m tests.benchmarks.report --run sync scale       run these first
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.report_plots import draw, require_matplotlib
from tests.benchmarks.report_run import BenchmarkError, load_result, run_benchmark
from tests.benchmarks.report_tables import arranged, headline, machine_line, markdown_table, render_tables

__all__ = ["benchmark_names", "main", "render_page", "update_docs"]

SOURCES = Path(__file__).parent
DOCS = SOURCES.parent.parent / "docs"
SUMMARY = "summary"
MARKED = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
NOT_RUN = "not run"


def benchmark_names(folder: Path = SOURCES) -> list[str]:
    """Names of the modules in `folder` that take `--json`, in alphabetical order; the report's own modules are none."""
    found = (path for path in folder.glob("[a-z]*.py") if not path.stem.startswith("report"))
    return sorted(path.stem for path in found if '"--json"' in path.read_text(encoding="utf-8"))


def render_page(
    frame: str, documents: Mapping[str, Mapping[str, Any]], plots: Mapping[str, list[tuple[str, str]]]
) -> str:
    """The page: `frame` with a fresh text between every pair of markers.

    Args:
        frame: The page as it is, or the frame written by hand. Results without markers get a section at the end.
        documents: Stored result by benchmark name, as `run_benchmark` returns it.
        plots: By name, (address relative to the page, description) of each picture.
    """
    names = [name for _, name, _ in MARKED.findall(frame) if name != SUMMARY]
    for name in sorted(set(documents) - set(names)):
        frame = f"{frame.rstrip()}\n\n## {name}\n\n<!-- begin {name} -->\n<!-- end {name} -->\n"
        names.append(name)

    def body(match: re.Match[str]) -> str:
        name = match[2]
        text = _summary(names, documents) if name == SUMMARY else _section(name, documents, plots)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return MARKED.sub(body, frame)


def _summary(names: list[str], documents: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name in names:
        document = documents.get(name)
        last = [headline(name, document["result"]), document["date"][:10]] if document else [NOT_RUN, "–"]
        rows.append([f"[{name}](#{name})", *last])
    return markdown_table(["benchmark", "result", "date"], rows)


def _section(name: str, documents: Mapping[str, Mapping[str, Any]], plots: Mapping[str, list[tuple[str, str]]]) -> str:
    if name not in documents:
        return f"*Not run.* `make bench NAMES={name}` runs it."
    pictures = [f"![{description}]({address})" for address, description in plots.get(name, [])]
    return "\n\n".join(
        [machine_line(documents[name]), *pictures, *render_tables(arranged(name, documents[name]["result"]))]
    )


def update_docs(docs: Path = DOCS) -> dict[str, str]:
    """Write `docs`/benchmarks.md and the plots from `docs`/benchmarks/*.json.

    Returns:
        One-line result by benchmark name.

    Raises:
        BenchmarkError: A stored result is not what `run_benchmark` writes; the text names the file.
    """
    folder, page = docs / "benchmarks", docs / "benchmarks.md"
    documents = {path.stem: load_result(path) for path in sorted(folder.glob("*.json"))}
    plots = {
        name: [(f"benchmarks/{file}", text) for file, text in draw(name, document["result"], folder)]
        for name, document in documents.items()
    }
    frame = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    page.write_text(render_page(frame, documents, plots), encoding="utf-8")
    return {name: headline(name, document["result"]) for name, document in documents.items()}


def main() -> int:
    """Run and render; 1 when a benchmark failed, whose older result then stays in the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--run", nargs="*", metavar="NAME", help="run these benchmarks first; without a name all of them"
    )
    parser.add_argument("--options", default="", help="further options for the benchmarks, in one string")
    arguments = parser.parse_args()
    names, failed = arguments.run or benchmark_names(), []
    if unknown := set(names) - set(benchmark_names()):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(benchmark_names())}")
    try:
        require_matplotlib()  # before hours of measuring, not after
        for name in names if arguments.run is not None else []:
            try:
                run_benchmark(name, DOCS / "benchmarks", options=arguments.options)
            except BenchmarkError as error:
                failed.append(str(error))
        for name, text in update_docs().items():
            print(f"{name}: {text}")
    except BenchmarkError as error:
        failed.append(str(error))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
