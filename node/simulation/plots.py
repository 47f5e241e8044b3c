"""A simulation's result as plots. They need matplotlib, see node/plotting.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.simulation.staged_plots import staged_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_plots"]

_SIZE_INCHES = (7.0, 4.5)


def write_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what `node.simulation.run.simulate` returns, each plot as PNG and SVG.

    Returns:
        The files, the same bytes for the same result and version of matplotlib.
    """
    from matplotlib import rc_context

    files: list[Path] = []
    # What is between two of them would be mathematics to matplotlib.
    result = result | {"name": result["name"].replace("$", r"\$")}
    plots = staged_figures(result) if "stages" in result else _figures(result)
    for name, figure in plots.items():
        with rc_context({"svg.hashsalt": "llm-node"}):
            for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], metadata=metadata)
    return files


def _figures(result: dict[str, Any]) -> dict[str, Figure]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = result["by_round"]
    title = f"{result['name']}: {result['peers']} peers, {result['algorithm']}"
    spread = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = spread.subplots()
    axes.plot(columns["round"], columns["spread"], marker=".", label="replica spread (RMS)")
    axes.plot(columns["round"], columns["replica_loss"], marker=".", label="loss of a replica")
    axes.plot(columns["round"], columns["mean_loss"], marker=".", label="loss of the replicas' mean")
    axes.set(title=title, xlabel="round", ylabel="size of the optimum = 1", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    spread.legend(loc="outside lower center", ncols=3)
    plots = {"rounds": spread}
    if result["exchange_cdf_s"]:
        times = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = times.subplots()
        shares = [index / (len(result["exchange_cdf_s"]) - 1) for index in range(len(result["exchange_cdf_s"]))]
        axes.plot(result["exchange_cdf_s"], shares)
        axes.set(title=title, xlabel="seconds from the search's start to the commit", ylabel="share of exchanges")
        axes.grid(alpha=0.3)
        plots["exchanges"] = times
    return plots
