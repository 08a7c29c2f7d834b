"""The demo on the terminal: a progress bar while it trains, then its table and its samples."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.columns import Columns
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tilewright.models.result import TABLE_HEADS, table_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import TaskID

    from tilewright.models.result import Comparison, DemoResult

SAMPLE_LINES = 12
"""How many lines of a sample are shown here; the report has all of it."""


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int, float], None]]:
    """Show the trainings as they go.

    Yields:
        A function to call with a training's label, the steps made, all its steps, and its loss.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, expand=True, refresh_per_second=4) as bars:

        def follow(label: str, step: int, steps: int, loss: float) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=steps, loss="")
            bars.update(tasks[label], completed=step, loss=f"loss {loss:.3f}" if step else "")

        yield follow


def show(result: DemoResult, console: Console) -> None:
    """Print what came out."""
    console.print()
    console.print(_trainings(result))
    console.print(_trainings(result.hyper))
    console.print(_served(result))
    console.print(_samples(result))
    for curves in (result, result.hyper):
        console.print(Text(curves.verdict, style="bold green" if curves.agrees else "bold red"))
        console.print(Text(f"Against the truth, the same training in float64: tilewright {curves.agreement}."))
    for line in result.fp8_lines:
        console.print(Text(line))
    if result.npu is not None:
        console.print(Text(result.npu_line))
        console.print(Text(result.prompt + result.npu.sample), soft_wrap=True)
    if result.compiled is not None:
        console.print(Text(result.compiled_line))
        console.print(Text(result.compiled.report), soft_wrap=True)
    written = f" Report: {result.report}" if result.report else ""
    console.print(Text(f"{result.seconds:.0f} s on {result.environment['device']}.{written}"), soft_wrap=True)


def _trainings(result: Comparison) -> Table:
    config = result.config
    streams = f", {config.hc_mult} residual streams" if config.hc_mult > 1 else ""
    title = (
        f"A decoder of {result.n_parameters:,} weights ({config.layers} layers, width {config.width}{streams}) "
        f"learns {result.tokens_per_step} bytes a step, {result.steps} steps"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    columns = [column for column in range(len(TABLE_HEADS) - 1) if column != _PEAK or _has_peak(result)]
    for column in columns:
        table.add_column(TABLE_HEADS[column], justify="left" if column < _FIRST_NUMBER else "right")
    for row in table_rows(result):
        table.add_row(*(Text(row[column]) for column in columns))
    return table


_FIRST_NUMBER = TABLE_HEADS._fields.index("step_time")
_PEAK = TABLE_HEADS._fields.index("peak_memory")


def _has_peak(result: Comparison) -> bool:
    return any(training.peak_bytes is not None for training in result.trainings)


def _served(result: DemoResult) -> Table:
    table = Table(title="Who computed what, and why", box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("operation", "parts", "served by", "why"):
        table.add_column(head)
    rows = [
        (served.operation, training.name, served.implementation, served.reason)
        for training in (result.plain, result.tilewright, result.hyper.plain, result.hyper.tilewright)
        for served in training.served
    ]
    for row in dict.fromkeys(rows):  # with hyper-connections some parts are the same
        table.add_row(*map(Text, row))
    return table


def _samples(result: DemoResult) -> Columns:
    panels = []
    for training in (result.plain, result.tilewright):
        lines = (result.prompt + (training.sample or "")).expandtabs(4).splitlines()[:SAMPLE_LINES]
        panels.append(Panel(Text("\n".join(lines)), title=f"written with {training.name}", width=72))
    return Columns(panels)
