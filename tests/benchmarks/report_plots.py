"""Plots of the results as SVG files. The only module here that imports matplotlib, and only when it draws.

White ground and dark colours, so that a dark page shows them as well; narrow, so that a phone shows letters at reading size.
No date, version or random id is written: the same result gives the same bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.benchmarks.report_run import BenchmarkError
from tests.benchmarks.report_tables import middle, pick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "require_matplotlib"]

WIDTH_IN = 4.8
COLOURS = ("#0050a0", "#b84a00", "#00694a", "#8a1c7c", "#444444", "#a07800", "#0090b0", "#c00030")
MARKS = "osD^vPX"  # not as many as colours, so that every pair is new
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "llm-node",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
}


class Picture(NamedTuple):
    """One drawing: file name without ending, description for those who do not see it, panels from top to bottom."""

    stem: str
    text: str
    panels: list[Any]  # of Bars or Curves


Row = tuple[str, float, list[float], bool]
"""Label, middle, single values, whether it is ours."""


Point = tuple[float, float, float]
"""x, y, standard deviation of y."""


class Bars(NamedTuple):
    """Lying bars, ours in colour."""

    title: str
    unit: str
    rows: list[Row]

    @property
    def is_empty(self) -> bool:
        return not self.rows


class Curves(NamedTuple):
    """Lines by label, and levels that hold for every x."""

    title: str
    axes: tuple[str, str]
    lines: dict[str, list[Point]]
    levels: dict[str, float]
    logarithmic: str = ""  # "x", "y", "xy" or neither

    @property
    def is_empty(self) -> bool:
        return not self.lines


def require_matplotlib() -> None:
    """Raises:
    BenchmarkError: It is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("the plots need matplotlib, which is not installed: pip install matplotlib")


def draw(name: str, result: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Write the plots of one result into `folder`; (file name, description) of each. A benchmark unknown here has none."""
    drawn = PICTURES[name](result) if name in PICTURES else ()
    filled = [picture._replace(panels=[panel for panel in picture.panels if not panel.is_empty]) for picture in drawn]
    pictures = [picture for picture in filled if picture.panels]
    for picture in pictures:
        _save(picture, folder / f"{picture.stem}.svg")
    return [(f"{picture.stem}.svg", picture.text) for picture in pictures]


def _save(picture: Picture, path: Path) -> None:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        heights = [_height_in(panel) for panel in picture.panels]
        figure = Figure(figsize=(WIDTH_IN, sum(heights)))
        all_axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel in zip(all_axes, picture.panels, strict=True):
            axes.set_title(panel.title, loc="left")
            (_fill_bars if isinstance(panel, Bars) else _fill_curves)(axes, panel)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _height_in(panel: Bars | Curves) -> float:
    return (
        0.9 + 0.27 * len(panel.rows) if isinstance(panel, Bars) else 3.2 + 0.1 * (len(panel.lines) + len(panel.levels))
    )


def _fill_bars(axes: Axes, panel: Bars) -> None:
    for place, (_, length, values, is_ours) in enumerate(panel.rows):
        axes.barh(place, length, color=COLOURS[0] if is_ours else "#9a9a9a")
        axes.plot(values, [place] * len(values), "o", color="white", markeredgecolor="black", markersize=4)
        axes.annotate(f"{length:.3g}", (max([length, *values]), place), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(panel.rows)), [label for label, *_ in panel.rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.25, y=0.02)
    axes.locator_params(axis="x", nbins=6, prune="upper")
    axes.set_xlabel(panel.unit)


def _fill_curves(axes: Axes, panel: Curves) -> None:
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    for place, (label, points) in enumerate(panel.lines.items()):
        x, y, error = zip(*sorted(points), strict=True)
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        axes.errorbar(x, y, yerr=error, label=label, markersize=5, capsize=3, color=colour, marker=mark)
    for place, (label, level) in enumerate(panel.levels.items()):
        axes.axhline(level, label=label, color="black", linestyle=("--", ":", "-.")[place % 3])
    axes.set_xlabel(panel.axes[0])
    axes.set_ylabel(panel.axes[1])
    for letter in panel.logarithmic:
        getattr(axes, f"set_{letter}scale")("log")
        axis = axes.xaxis if letter == "x" else axes.yaxis
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(LogFormatter())
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9, frameon=False)


def _sync(result: Mapping[str, Any]) -> Iterator[Picture]:
    panels = []
    for size, measured in result.items():
        theirs = {f"hivemind {name}": entry for name, entry in (pick(measured, "hivemind") or {}).items()}
        rows: list[Row] = []
        for name, entry in ((pick(measured, "ours") or {}) | theirs).items():
            seconds = pick(entry, "seconds")
            ends = [end for key in ("lowest", "highest") if (end := pick(seconds, key)) is not None]
            rows.append((name, middle(seconds) or 0.0, ends, not _is_theirs(name)))
        panels.append(Bars(f"One exchange of {size} M parameters", "seconds, dots: lowest and highest", rows))
    yield Picture("sync", "Seconds of one exchange by codec, ours and hivemind's", panels)


def _codecs(result: Mapping[str, Any]) -> Iterator[Picture]:
    panels = []
    for way in ("encode", "decode"):
        rates = {name: middle(pick(row, f"{way}_GBps")) for name, row in result.items()}
        rows: list[Row] = [(name, rate, [], not _is_theirs(name)) for name, rate in rates.items() if rate is not None]
        panels.append(Bars(way, "GB/s", rows))
    yield Picture("codecs-speed", "Encoding and decoding rate of each codec", panels)
    lines = {
        name: [(row["bytes_per_parameter"], 100 * row["error_gaussian"], 0.0)]
        for name, row in result.items()
        if pick(row, "error_gaussian") and "compiled" not in name  # the same bytes; an exact codec has no error to show
    }
    axes = ("bytes per parameter", "relative error, %")
    yield Picture(
        "codecs-error", "Error against size of each codec", [Curves("Error on a Gaussian", axes, lines, {}, "xy")]
    )


def _is_theirs(name: str) -> bool:
    return name.startswith(("hivemind", "bitsandbytes"))


def _utilisation(result: Mapping[str, Any]) -> Iterator[Picture]:
    rows: list[Row] = []
    for name, entry in (pick(result, "utilisation") or result).items():
        peers = pick(entry, "share") or pick(entry, "per_peer") or []
        dots = map(middle, peers.values() if isinstance(peers, Mapping) else peers)
        if (share := middle(pick(entry, "median"))) is not None:
            label = name.replace("_", " ")
            rows.append((label, share, [dot for dot in dots if dot is not None], name.startswith("ours")))
    panel = Bars("Time spent in inner steps, dots: peers", "share of wall time", rows)
    yield Picture("utilisation", "Share of wall time in inner steps", [panel])


def _convergence(result: Mapping[str, Any]) -> Iterator[Picture]:
    axes = ("sent per peer, MB", "held-out loss, nats per token")
    for count, methods in (pick(result, "convergence") or {}).items():
        lines, levels = {}, {}
        for name, entry in methods.items():
            loss, sent = middle(pick(entry, "loss_mean")), middle(pick(entry, "bytes_per_peer"))
            if loss is None:
                continue
            if name.startswith("synchronous") or not sent:  # a logarithmic axis has no place for nothing
                levels[name] = loss
            else:
                lines[name] = [(sent / 1e6, loss, middle(pick(entry, "loss_std")) or 0.0)]
        panel = Curves(f"{count} peers, bars: standard deviation over seeds", axes, lines, levels, "x")
        yield Picture(f"convergence-{count}", f"Loss against bytes per peer, {count} peers", [panel])


def _scale(result: Mapping[str, Any]) -> Iterator[Picture]:
    for part, tree in result.items():
        panels = [Curves(title, ("", ""), lines, {}, _wide_axes(lines)) for title, lines in _curves(tree, part)]
        yield Picture(f"scale-{part}".replace("_", "-"), part.replace("_", " "), panels)


def _curves(tree: Any, title: str) -> Iterator[tuple[str, dict[str, list[Point]]]]:
    """Every place in `tree` with series of numbers: lists, or dicts whose keys are numbers."""
    if not isinstance(tree, Mapping):
        return
    by_number = {float(key): value for key, value in tree.items() if _is_number(key)}
    columns = dict.fromkeys(name for row in by_number.values() if isinstance(row, Mapping) for name in row)
    if columns and len(by_number) == len(tree):  # a table by number: its columns are the series
        series = {name: {x: pick(row, name) for x, row in by_number.items()} for name in columns}
    else:
        series = {name: dict(enumerate(each, 1)) if isinstance(each, list) else each for name, each in tree.items()}
    lines = {name.replace("_", " "): points for name, each in series.items() if len(points := _points(each)) > 1}
    if lines:
        yield title.replace("_", " "), lines
    for key, value in () if lines else tree.items():
        yield from _curves(value, f"{title}, {key}")


def _points(series: Any) -> list[Point]:
    items = series.items() if isinstance(series, Mapping) else ()
    return [
        (float(x), y, 0.0)
        for x, value in items
        if _is_number(x) and not isinstance(value, list) and (y := middle(value)) is not None
    ]


def _is_number(key: Any) -> bool:
    return str(key).replace(".", "", 1).isdigit()


def _wide_axes(lines: Mapping[str, list[Point]]) -> str:
    """The axes whose values lie so far apart that only a logarithmic one shows them."""
    points = [point for line in lines.values() for point in line]
    ends = {letter: (min(p[i] for p in points), max(p[i] for p in points)) for i, letter in enumerate("xy")}
    return "".join(letter for letter, (low, high) in ends.items() if 0 < 30 * low < high)


def _schedule(result: Mapping[str, Any]) -> Iterator[Picture]:
    panels = []
    for name, case in result.items():
        fields = {
            "iteration_s": "ours",
            "bound_s": "bound",
            "reference_s": "SkipPipe",
            "full_pipeline_s": "full pipeline",
        }
        rows: list[Row] = [
            (label, seconds, [], key == "iteration_s")
            for key, label in fields.items()
            if (seconds := middle(pick(case, key))) is not None
        ]
        panels.append(Bars(name.replace("_", " "), "seconds per iteration", rows))
    yield Picture(
        "schedule", "Seconds per iteration by case: ours, the bound, SkipPipe's planner, and no stage skipped", panels
    )


def _partial(result: Mapping[str, Any]) -> Iterator[Picture]:
    lines = {
        name: [(float(each["count"]), each["loss"], each["loss_std"]) for each in omitted]
        for name, entry in result.items()
        if (omitted := pick(entry, "omitted"))
    }
    panel = Curves("By way of training", ("stages omitted", "held-out loss, nats per token"), lines, {})
    yield Picture("partial", "Held-out loss when stages are omitted after training, by way of training", [panel])


def _pipeline(result: Mapping[str, Any]) -> Iterator[Picture]:
    panels = []
    for skipped, methods in result.items():
        rows: list[Row] = []
        for name, method in methods.items():
            if (seconds := middle(pick(method, "iteration_s"))) is not None:
                rows.append((name, seconds, pick(method, "quartiles_s") or [], name in ("ours", "live")))
                rows.append((f"{name}, predicted", pick(method, "predicted_s") or 0.0, [], False))
        panels.append(Bars(f"{skipped} of the stages skipped", "seconds per iteration, dots: quartiles", rows))
    yield Picture("pipeline", "Seconds per iteration between real processes, measured and predicted", panels)


PICTURES: dict[str, Callable[[Mapping[str, Any]], Iterator[Picture]]] = {
    "pipeline": _pipeline,
    "schedule": _schedule,
    "partial": _partial,
    "sync": _sync,
    "codecs": _codecs,
    "scale": _scale,
    "utilisation": _utilisation,
    "convergence": _convergence,
}
