"""Results as Markdown: one way to show any nested result, and one line that sums up each known benchmark.

A result is a tree. A dict of plain values (numbers, texts, lists, statistics) is a row, a dict of rows is a table, and what lies
deeper gets a heading of its own. So a benchmark may gain fields and settings without a change here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["arranged", "cell", "headline", "machine_line", "markdown_table", "middle", "pick", "render_tables"]

STATISTICS = {"median", "mean", "std", "spread", "min", "max", "lowest", "highest", "n", "values"}
MAX_LISTED = 4  # longer lists are shown by median and range
MAX_COLUMNS = 9  # wider tables are turned on their side: a phone scrolls down more easily than sideways


def pick(tree: Any, *path: str) -> Any:
    """The value at `path`, or None where the result lacks it."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def middle(value: Any) -> float | None:
    """The number that stands for a value: itself, its median or mean, or None where there is none."""
    if isinstance(value, Mapping):
        value = value.get("median", value.get("mean"))
    if isinstance(value, list):
        value = statistics.median(value) if value and all(isinstance(item, int | float) for item in value) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def cell(value: Any) -> str:
    """One table cell: a number with four digits, a text, a list, or statistics as `middle (spread)`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and 1000 <= abs(value) < 1e15):
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return _statistics_cell(value)
    if isinstance(value, list):
        return _list_cell(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _statistics_cell(value: Mapping[str, Any]) -> str:
    middle = cell(value.get("median", value.get("mean")))
    spread = value.get("spread", value.get("std"))
    if spread is None:
        spread = [value[key] for key in ("min", "lowest", "highest", "max") if key in value]
    if not spread:
        return middle
    return f"{middle} ({'–'.join(map(cell, spread)) if isinstance(spread, list) else '± ' + cell(spread)})"


def _list_cell(values: list[Any]) -> str:
    if len(values) <= MAX_LISTED and not any(isinstance(item, list | Mapping) for item in values):
        return ", ".join(map(cell, values)) or "–"
    if not all(isinstance(item, int | float) for item in values):
        return f"{len(values)} values"
    return f"{cell(statistics.median(values))} ({cell(min(values))}–{cell(max(values))}, {len(values)} values)"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of finished cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_tables(result: Mapping[str, Any]) -> list[str]:
    """Markdown blocks that show all of `result`, in its own order: plain values, then tables, then what lies deeper."""
    return list(_blocks(result, title=""))


def arranged(name: str, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result as its tables are to show it: as it is, but for a benchmark whose tables say more in another order."""
    return ARRANGED[name](result) if name in ARRANGED else result


def _blocks(tree: Mapping[str, Any], *, title: str) -> Iterator[str]:
    branches = {str(key): _branch(value) for key, value in tree.items()}
    plain = {key: value for key, value in branches.items() if _is_plain(value)}
    rows = {key: value for key, value in branches.items() if key not in plain and all(map(_is_plain, value.values()))}
    groups = _alike(rows)
    if plain or len(rows) > 1:  # beside others, a row like none of them needs no table of its own
        for name, row in [item for group in groups if len(group) == 1 for item in group.items()]:
            plain |= {f"{name}, {key}": value for key, value in row.items()}
        groups = [group for group in groups if len(group) > 1]
    if title and (plain or rows):
        yield f"**{title}**"
    if plain:
        yield markdown_table(["field", "value"], [[_words(key), cell(value)] for key, value in plain.items()])
    yield from map(_rows_table, groups)
    for key, value in branches.items():
        if key not in plain and key not in rows:
            yield from _blocks(value, title=f"{title}, {_words(key)}" if title else _words(key))


def _alike(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """Rows that share columns, each set of them a table; a row like no other is a group of its own."""
    groups: list[dict[str, Mapping[str, Any]]] = []
    for name, row in rows.items():
        fitting = [group for group in groups if any(set(row) & set(other) for other in group.values())]
        if fitting:
            fitting[0][name] = row
        else:
            groups.append({name: row})
    return groups


def _branch(value: Any) -> Any:
    """A list of dicts is read as a dict of them, by their `name` or place."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {
            str(item.get("name", place)): {k: v for k, v in item.items() if k != "name"}
            for place, item in enumerate(value, 1)
        }
    return value


def _is_plain(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return not (isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value))
    return bool({"median", "mean"} & set(value)) and set(value) <= STATISTICS


def _rows_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if len(columns) > MAX_COLUMNS and len(columns) > len(rows):
        body = [[_words(column), *(cell(row.get(column)) for row in rows.values())] for column in columns]
        return markdown_table(["", *map(_words, rows)], body)
    body = [[_words(name), *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return markdown_table(["", *map(_words, columns)], body)


def _words(key: str) -> str:
    return key.replace("_", " ").replace("|", "\\|")


def machine_line(document: Mapping[str, Any]) -> str:
    """When, with what, and on what hardware a result was measured."""
    machine = document["machine"]
    return (
        f"*{document['date'][:16].replace('T', ' ')} UTC, commit {document['commit']}, {cell(document['wall_s'])} s, "
        f"`{document['command']}`. {machine['cpu']}, {machine['cores']} cores, {machine['memory_GiB']} GiB, {machine['os']}, "
        f"Python {machine['python']}, torch {machine['torch']}; load {document['load_before']} before the start.*"
    )


def headline(name: str, result: Mapping[str, Any]) -> str:
    """What came out, in one line; for a benchmark unknown here only that it ran."""
    parts = HEADLINES[name](result) if name in HEADLINES else ()
    return "; ".join(parts) or "measured, see below"


def _swarm(result: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(pick(result, "gain"), float):
        seeds = len(pick(result, "swarm", "val_loss_end") or [])
        yield f"together {cell(result['gain'])} nats per token better than alone, in {result.get('seeds_won')} of {seeds} seeds"


def _sync(result: Mapping[str, Any]) -> Iterator[str]:
    for size, measured in result.items():
        best, raw = pick(measured, "speedup_vs_hivemind_best"), pick(measured, "fraction_of_raw_stream", "whole")
        if not best:
            continue
        uncompressed = f", uncompressed {raw:.0%} of the raw stream" if raw else ""
        yield f"{size} M parameters: {best['ours']} {cell(best['seconds'])}× hivemind {best['hivemind']}{uncompressed}"


def _codecs(result: Mapping[str, Any]) -> Iterator[str]:
    sizes = {name: pick(row, "bytes_per_parameter") for name, row in result.items() if " " not in name}
    if known := ", ".join(f"{name} {cell(size)}" for name, size in sizes.items() if size is not None):
        yield f"bytes per parameter: {known}"


def _utilisation(result: Mapping[str, Any]) -> Iterator[str]:
    entries = pick(result, "utilisation") or result
    shares = {name: middle(pick(entry, "median")) for name, entry in entries.items()}
    yield from (f"{_words(name)} {share:.1%}" for name, share in shares.items() if share is not None)


def _convergence(result: Mapping[str, Any]) -> Iterator[str]:
    for count, methods in (pick(result, "convergence") or {}).items():
        losses = {name: middle(pick(methods, name, "loss_mean")) for name in ("synchronous", "default", "local")}
        known = ", ".join(f"{name} {cell(loss)}" for name, loss in losses.items() if loss is not None)
        yield f"{count} peers: {known}"


def _schedule(result: Mapping[str, Any]) -> Iterator[str]:
    for name, case in result.items():
        ours, full, reference = (pick(case, key) for key in ("iteration_s", "full_pipeline_s", "reference_s"))
        if ours and full:
            known = f", SkipPipe's planner {cell(reference)} s" if reference else ""
            yield f"{_words(name)} {cell(ours)} s, full pipeline {cell(full)} s{known}"


def _partial(result: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in result.items():
        ratio, saved = pick(entry, "perplexity_ratio"), pick(entry, "compute_saved")
        if ratio and saved:
            yield f"{name}: perplexity {ratio - 1:+.1%}, compute {-saved:+.0%}"


def _partial_tables(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row per method, then a row per number of omitted stages with all methods beside each other."""
    by_count: dict[str, dict[str, Any]] = {}
    for name, entry in result.items():
        for each in pick(entry, "omitted") or []:
            row = by_count.setdefault(f"{each['count']} omitted", {})
            row[name] = {"mean": each["loss"], "std": each["loss_std"]}
    methods = {name: {k: v for k, v in entry.items() if k != "omitted"} for name, entry in result.items()}
    return {"methods": methods, "loss": by_count}


ARRANGED: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {"partial": _partial_tables}


def _pipeline(result: Mapping[str, Any]) -> Iterator[str]:
    for skipped, methods in result.items():
        ours, full = (pick(methods, name, "iteration_s") for name in ("ours", "full"))
        if ours and full:
            less = pick(methods, "ours", "less_than_full") or 1.0 - ours / full
            yield f"{skipped} skipped {cell(ours)} s, full pipeline {cell(full)} s: {less:.0%} less"


HEADLINES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "codecs": _codecs,
    "convergence": _convergence,
    "partial": _partial,
    "pipeline": _pipeline,
    "schedule": _schedule,
    "swarm": _swarm,
    "sync": _sync,
    "utilisation": _utilisation,
}
