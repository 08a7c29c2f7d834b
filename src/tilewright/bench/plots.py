"""Plots of a run, drawn from its records: one figure for each sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.bench.records import read, results
from tilewright.optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = ("png", "svg")


def draw(records: Path | str, folder: Path | str) -> tuple[Path, ...]:
    """Draw one figure for each sweep of a run, each as PNG and as SVG.

    A figure has a panel for each direction: the share of the copy's bandwidth that each provider reaches in a stream
    of launches, against the swept value. The axis of shares begins at 0. ``~`` marks a less precise job.

    Args:
        records: the run's file of records.
        folder: where the figures go.

    Returns:
        The files.

    Raises:
        MissingDependencyError: ``matplotlib`` is missing.
        BenchmarkError: the file is not the record of a benchmark run.
    """
    path, target = Path(records), Path(folder)
    read_records = read(path)
    require("matplotlib", "the plots of tilewright bench")
    from matplotlib import rc_context

    run, measured = read_records[0], results(read_records)
    target.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context({"svg.hashsalt": "tilewright"}):  # equal records give equal files
        for sweep in dict.fromkeys(record["sweep"] for record in measured):
            members = [record for record in measured if record["sweep"] == sweep and record["status"] == "ok"]
            if not members:
                continue
            figure = _figure(run, sweep, members)
            for kind in FORMATS:
                file = target / f"{path.stem}-{re.sub(r'[^a-z0-9]+', '-', sweep.lower()).strip('-')}.{kind}"
                figure.savefig(file, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                files.append(file)
    return tuple(files)


def _figure(run: dict[str, Any], sweep: str, members: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(record["direction"] for record in members))
    figure = Figure(figsize=(5.2 * len(directions), 4.0), layout="constrained")
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    for panel, direction in zip(panels, directions, strict=True):
        _panel(panel, run, [record for record in members if record["direction"] == direction])
        panel.set_title(direction)
        panel.set_xlabel(sweep)
    panels[0].set_ylabel("share of copy bandwidth")
    panels[0].set_ylim(bottom=0.0)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    lines = {label: line for label, line in lines.items() if not label.startswith("_")}  # which the mark at 1.0 does
    panels[-1].legend(lines.values(), lines.keys(), fontsize="small", loc="best")
    copy = run["copy_gb_per_s"]["stream"]
    figure.suptitle(f"{run['family']}, {run['dtype']}, {run['device']} (copy: {copy:.0f} GB/s)", fontsize="medium")
    return figure


def _panel(panel: Any, run: dict[str, Any], members: Sequence[dict[str, Any]]) -> None:
    values = sorted({record["value"] for record in members})
    for index, provider in enumerate(run["providers"]):  # a provider keeps its colour in every panel
        own = [record for record in members if record["provider"] == provider]
        points = sorted((record["value"], record["stream"]["share"]) for record in own)
        if not points:
            continue
        label = f"~{provider}" if any(record["gate"]["less_precise"] for record in own) else provider
        style = {"color": "0.5", "linestyle": "--"} if provider == "copy" else {"color": f"C{index % 10}"}
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
    if values and values[0] > 0 and values[-1] > 4 * values[0]:
        panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:,}".replace(",", " ") for value in values], fontsize="small")
    panel.minorticks_off()
    panel.axhline(1.0, color="0.8", linewidth=0.8, zorder=0)
    panel.grid(axis="y", color="0.92")
