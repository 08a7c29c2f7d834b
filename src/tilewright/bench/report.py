"""The records of a run as tables, for the terminal and in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tilewright.bench.records import best, hosts, read, results, workloads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    Record = dict[str, Any]

PROTOCOLS = ("single", "stream")
PER_DIRECTION = ("single us", "of copy", "stream us", "GB/s", "of copy")


def to_markdown(path: Path | str) -> str:
    """The records of a run as Markdown: one table for each sweep, then what could not be measured.

    Raises:
        BenchmarkError: the file is not the record of a benchmark run.
    """
    records = read(Path(path))
    run, measured = records[0], results(records)
    directions = _directions(measured)
    parts = [" \n".join(header(run))]
    for sweep in dict.fromkeys(record["sweep"] for record in measured):
        members = [record for record in measured if record["sweep"] == sweep]
        heads = ["workload", "provider", *_heads(directions), "peak MiB"]
        aligned = [":--", ":--", *("--:" for _ in heads[2:])]
        lines = [f"### {sweep}", "", _line(heads), _line(aligned)]
        for name in workloads(members):
            for row in _rows(members, name, directions):
                provider = f"**{row.provider}**" if row.leads else row.provider
                lines.append(_line([name, provider, *row.full, row.peak]))
        parts.append("\n".join(lines))
    on_host = _host_rows(records)
    if on_host:
        lines = ["### Time on the host", "", _line(_HOST_HEADS), _line([":--", ":--", "--:", "--:"])]
        parts.append("\n".join([*lines, *(_line(row) for row in on_host)]))
    notes = _notes(run, measured)
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def show(records: Sequence[Record], console: Console) -> None:
    """Print the records of a run: one table, grouped by workload, the fastest marked."""
    from rich.markup import escape
    from rich.table import Table

    run, measured = records[0], results(records)
    directions = _directions(measured)
    for sentence in header(run):
        console.print(escape(sentence), highlight=False)
    table = Table(title=f"{run['family']}: median us per call, share of the copy's bandwidth")
    table.add_column("provider", no_wrap=True)
    for head in (*(f"{direction}\n{protocol}" for direction in directions for protocol in PROTOCOLS), "peak\nMiB"):
        table.add_column(head, justify="right", no_wrap=True)
    for name in workloads(measured):
        table.add_section()
        table.add_row(f"[bold]{escape(name)}[/bold]")
        for row in _rows(measured, name, directions):
            cells = [escape(cell) for cell in (row.provider, *row.short, row.peak)]
            table.add_row(*(f"[bold green]{cell}[/bold green]" if row.leads else cell for cell in cells))
    console.print(table)
    on_host = _host_rows(records)
    if on_host:
        table = Table(title="Time on the host")
        for head in _HOST_HEADS:
            table.add_column(head, justify="right" if head.endswith("us") else "left")
        for line in on_host:
            table.add_row(*(escape(cell) for cell in line))
        console.print(table)
    for note in _notes(run, measured):
        console.print(escape(f"- {note}"), highlight=False)


_HOST_HEADS = ("provider", "workload", "without gradients, us", "with gradients, us")


def _directions(measured: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["direction"] for record in measured))


def _heads(directions: Sequence[str]) -> list[str]:
    return [f"{direction} {head}" for direction in directions for head in PER_DIRECTION]


def header(run: Record) -> list[str]:
    """What a run measured on what, with which ceilings."""
    environment, copy = run["environment"], run["copy_gb_per_s"]
    versions = ", ".join(
        f"{name} {environment[name]['version']}"
        for name in ("torch", "triton", "python", "tilewright")
        if isinstance(environment.get(name, {}).get("version"), str)
    )
    return [
        f"{run['family']}, {run['dtype']}, on {run['device']}; {versions}.",
        f"copy: {copy['stream']:.0f} GB/s by stream, {copy['single']:.0f} GB/s by single launches.",
        f"Empty kernel: {run['empty_us']['single']:.1f} us single, {run['empty_us']['stream']:.1f} us in a stream.",
    ]


class _Row(NamedTuple):
    """What a table says of one provider on one workload.

    Attributes:
        provider: its name, with ``~`` before it if it does a less precise job.
        full: the cells of ``PER_DIRECTION`` for each direction.
        short: one cell for each direction and protocol: time and share.
        peak: MiB that a call needs.
        leads: whether it is the fastest in every direction.
    """

    provider: str
    full: list[str]
    short: list[str]
    peak: str
    leads: bool


def _rows(measured: Sequence[Record], workload: str, directions: Sequence[str]) -> list[_Row]:
    members = [record for record in measured if record["workload"] == workload]
    leaders = {direction: best([m for m in members if m["direction"] == direction]) for direction in directions}
    rows = []
    for provider in dict.fromkeys(record["provider"] for record in members):
        found = {record["direction"]: record for record in members if record["provider"] == provider}
        full, short = [], []
        for direction in directions:
            record = found.get(direction)
            mark = "*" if record is not None and record is leaders[direction] else ""
            full += _full_cells(record, mark)
            short += _short_cells(record, mark)
        peaks = [record["peak_bytes"] for record in found.values() if record.get("peak_bytes") is not None]
        loose = any((record.get("gate") or {}).get("less_precise") for record in found.values())
        rows.append(
            _Row(
                provider=f"~{provider}" if loose else provider,
                full=full,
                short=short,
                peak=f"{max(peaks) / 2**20:.1f}" if peaks else "-",
                leads=all(leaders[d] is not None and leaders[d] is found.get(d) for d in directions),
            )
        )
    return rows


def _full_cells(record: Record | None, mark: str) -> list[str]:
    if record is None or record["status"] != "ok":
        return ["-" if record is None else record["status"], *["-"] * (len(PER_DIRECTION) - 1)]
    single, stream = record["single"], record["stream"]
    rate = f"{stream['gb_per_s']:.0f}" if stream["gb_per_s"] >= 100 else f"{stream['gb_per_s']:.1f}"
    shares = f"{single['share']:.2f}", f"{stream['share']:.2f}"
    return [_time(single["median_us"]), shares[0], _time(stream["median_us"]) + mark, rate, shares[1]]


def _short_cells(record: Record | None, mark: str) -> list[str]:
    if record is None or record["status"] != "ok":
        return ["-" if record is None else record["status"], "-"]
    single, stream = record["single"], record["stream"]
    return [
        f"{_time(single['median_us'])} {single['share']:.2f}",
        f"{_time(stream['median_us'])}{mark} {stream['share']:.2f}",
    ]


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 1000 else f"{microseconds:.1f}"


def _host_rows(records: Sequence[Record]) -> list[list[str]]:
    rows = []
    for record in hosts(records):
        times = [f"{record[key]:.1f}" if key in record else record["status"] for key in ("host_us", "host_grad_us")]
        rows.append([record["provider"], f"{record['workload']}, {record['function']}", *times])
    return rows


def _notes(run: Record, measured: Sequence[Record]) -> list[str]:
    """What a reader of the table has to know besides."""
    notes = ["`*` marks the fastest by stream of those that do the whole job; `copy` moves as many bytes and no more."]
    for name, provider in run["providers"].items():
        if provider["missing"] is not None:
            notes.append(f"{name} is not measured: {provider['missing']}")
    for record in measured:
        gate = record.get("gate") or {}
        where = f"{record['workload']}, {record['direction']}"
        if record["status"] == "ok" and gate.get("less_precise"):
            notes.append(f"`~`: {record['provider']} does a less precise job: {gate['less_precise']}")
        elif record["status"] == "wrong":
            notes.append(f"{record['provider']} is wrong and was not timed ({where}): {record['reason']}")
        elif record["status"] in {"failed", "unsupported"}:
            notes.append(f"{record['provider']}: {record['status']}: {record['reason']}")
        if record["status"] == "ok" and record["stream"]["note"]:
            notes.append(f"{record['provider']} ({record['direction']}): {record['stream']['note']}")
        if not record["cold"]:
            notes.append(f"{record['workload']}: too small for a cold cache in a stream")
    return list(dict.fromkeys(notes))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
