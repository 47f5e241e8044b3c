"""The result of a simulated pipeline as plots: time and fate of microbatches by iteration, peers over time, work by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["staged_figures"]

_SIZE_INCHES = (7.0, 4.5)


def staged_figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Plots by name; needs matplotlib."""
    title = f"{result['name']}: {result['peers']} peers, {result['path_length']} of {result['stages']} stages"
    return {
        "iterations": _iterations(result["by_iteration"], title),
        "peers": _peers(result["by_iteration"], title),
        "stages": _stages(result["by_stage"], title),
    }


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=_SIZE_INCHES, layout="constrained")


def _iterations(columns: dict[str, list[Any]], title: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    times, fates = figure.subplots(2, 1, sharex=True)
    numbers = columns["iteration"]
    times.plot(numbers, columns["median_s"], marker=".")
    times.set(title=title, ylabel="median seconds", ylim=(0.0, None))
    straight = [all_ - rerouted for all_, rerouted in zip(columns["returned"], columns["rerouted"], strict=True)]
    below = [0] * len(numbers)
    for label, heights in (("returned", straight), ("rerouted", columns["rerouted"]), ("lost", columns["lost"])):
        fates.bar(numbers, heights, bottom=below, width=1.0, label=label)
        below = [height + more for height, more in zip(below, heights, strict=True)]
    fates.set(xlabel="iteration", ylabel="microbatches", ylim=(0.0, None))
    fates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (times, fates):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _peers(columns: dict[str, list[Any]], title: str) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    if columns["peers"]:
        stages = list(zip(*columns["peers"], strict=True))
        labels = [f"stage {stage}" for stage in range(len(stages))]
        axes.stackplot(columns["ended_s"], *stages, labels=labels, step="post")
        figure.legend(loc="outside lower center", ncols=4)
    axes.set(title=title, xlabel="virtual seconds", ylabel="peers, stage upon stage", ylim=(0.0, None))
    axes.grid(alpha=0.3)
    return figure


def _stages(columns: dict[str, list[Any]], title: str) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    axes.bar([str(stage) for stage in columns["stage"]], [100.0 * share for share in columns["utilisation"]])
    axes.set(title=title, xlabel="stage", ylabel="busy, % of its peers' time")
    axes.grid(alpha=0.3, axis="y")
    return figure
