"""Measuring an operation family: every workload of its spec, in both directions, by every provider.

For each workload: random inputs, as many copies of them as keep the cache cold, the truth; then each provider is
prepared, judged, and only if it is right timed by both protocols. A provider that is missing, cannot do a task, fails
or is wrong is recorded with its reason. The records are written when the run is complete, or not at all.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch

from tilewright.bench import environment, records, report, timing
from tilewright.bench.gate import Gate
from tilewright.bench.providers import Task, suite
from tilewright.errors import (
    ArgumentError,
    BenchmarkError,
    ImplementationError,
    MissingDependencyError,
    UnknownNameError,
)
from tilewright.ops.contract import Direction
from tilewright.optional import require
from tilewright.platforms import usable_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from tilewright.bench.fusion import Layer, Stack
    from tilewright.bench.providers import Prepared, Provider, Suite
    from tilewright.bench.timing import Timer
    from tilewright.ops.contract import Workload

_Named = TypeVar("_Named", bound="Workload | Layer | Stack")

DEFAULT_OUTPUT = Path("bench-results")

CPU_MAX_BYTES = 64 * 2**20
"""Traffic of the largest workload that is measured on a CPU unasked."""

CPU_QUICK_PER_SWEEP = 1
"""Workloads of each sweep, the largest, that a quick run on a CPU measures: each costs four compilations."""

GRADS_SEED = 0
"""Of the gradients that a backward is given: each run measures, and judges, the same numbers."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class BenchResult:
    """What a run found.

    Attributes:
        path: the file of records.
        records: the records in it.
        figures: the plots that were drawn from it.
    """

    path: Path
    records: tuple[dict[str, Any], ...]
    figures: tuple[Path, ...]

    @property
    def wrong(self) -> tuple[dict[str, Any], ...]:
        """The records of providers whose results were wrong."""
        return tuple(record for record in self.records if record.get("status") == "wrong")

    @property
    def interrupted(self) -> bool:
        """Whether the run was interrupted, so that measurements are missing."""
        return bool(self.records[0].get("interrupted"))


@dataclass(frozen=True)
class Plan:
    """What is measured, settled before anything is measured."""

    suite: Suite
    device: torch.device
    dtype: torch.dtype
    providers: tuple[Provider, ...]
    directions: tuple[Direction, ...]
    workloads: tuple[Workload, ...]
    quick: bool

    @property
    def steps(self) -> int:
        """Measurements of the run."""
        return len(self.providers) * len(self.directions) * len(self.workloads)


def run(
    family: str,
    *,
    device: str | torch.device | None = None,
    dtype: str = "bfloat16",
    providers: Sequence[str] | None = None,
    directions: Sequence[str] = ("forward", "backward"),
    workloads: Sequence[str] | None = None,
    output: Path | str = DEFAULT_OUTPUT,
    quick: bool | None = None,
    max_bytes: int | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> BenchResult:
    """Measure an operation family and write down what was found.

    A run that is interrupted (``KeyboardInterrupt``) writes down what it has measured by then, and says so.

    Args:
        family: its name, such as ``"rope"``.
        device: where; by default the accelerator, or the CPU if there is none.
        dtype: name of the workloads' dtype.
        providers: names of those to measure; by default all but those that are measured only on request.
        directions: ``"forward"``, ``"backward"`` or both. A family without gradients is measured forward only.
        workloads: parts of workloads' names; a workload with any of them in its name is measured. By default all.
        output: folder of the records and plots, or a file that ends in ``.jsonl``, beside which the plots go.
        quick: fewer samples, and on a CPU fewer workloads; by default on a CPU.
        max_bytes: leave out workloads that move more bytes; by default 64 MiB on a CPU if no workloads are named.
        console: where progress and table go; by default the terminal.
        quiet: print nothing, and do without ``rich``.

    Raises:
        ArgumentError: an argument has a value that cannot be, such as backward alone for a family without gradients.
        UnknownNameError: no family, provider or workload has this name.
        MissingDependencyError: ``rich`` is missing, and ``quiet`` does not say to do without.
        BenchmarkError: no workload is left to measure, or a provider has broken the device. Nothing is written then.
    """
    if not quiet:
        console = console or _console()
    plan = _plan(family, device, dtype, providers, directions, workloads, quick, max_bytes)
    timer = timing.make_timer(plan.device, plan.quick)
    with timer.scope(), _progress(None if quiet else console, plan) as advance:
        found = _measure_all(plan, timer, advance)
    dtype_name = str(plan.dtype).removeprefix("torch.")
    path = records.path_of(output, plan.suite.family.name, device_name(plan.device), dtype_name)
    records.write(path, found)
    written = records.read(path)
    figures, note = _draw(path)
    if console is not None and not quiet:
        report.show(written, console)
        for line in (f"records: {path}", *(f"figure:  {figure}" for figure in figures), note):
            if line:
                console.print(line, soft_wrap=True, highlight=False, markup=False)
    return BenchResult(path, tuple(written), figures)


def _plan(
    family: str,
    device: str | torch.device | None,
    dtype: str,
    providers: Sequence[str] | None,
    directions: Sequence[str],
    workloads: Sequence[str] | None,
    quick: bool | None,
    max_bytes: int | None,
) -> Plan:
    chosen = suite(family)
    where = usable_device(device, "bench")
    quick = where.type == "cpu" if quick is None else quick
    element = getattr(torch, dtype, None)
    if not isinstance(element, torch.dtype) or element not in chosen.family.dtypes:
        known = ", ".join(str(known).removeprefix("torch.") for known in chosen.family.dtypes)
        raise ArgumentError("bench", "dtype", f"came '{dtype}', expected one of {known}")
    ways = _directions(chosen, directions)
    wanted = by_name(family, chosen.family.workloads, workloads)
    if max_bytes is None and where.type == "cpu" and workloads is None:
        max_bytes = CPU_MAX_BYTES
    fitting = tuple(w for w in wanted if max_bytes is None or _most_bytes(w, element, ways) <= max_bytes)
    if not fitting:
        least = min((_most_bytes(workload, element, ways) for workload in wanted), default=0)
        raise BenchmarkError(
            f"bench {family}: no workload is left to measure: the smallest moves {least} bytes, "
            f"max_bytes is {max_bytes}; allow more"
        )
    if quick and where.type == "cpu" and workloads is None:
        fitting = _largest_of_each_sweep(fitting, element, ways)
    return Plan(chosen, where, element, chosen.chosen(providers), ways, fitting, quick)


def _directions(suite: Suite, directions: Sequence[str]) -> tuple[Direction, ...]:
    """The directions that are measured: those asked for that the family has."""
    if not directions or any(direction not in DIRECTIONS for direction in directions):
        raise ArgumentError("bench", "directions", f"came {tuple(directions)}, expected some of {DIRECTIONS}")
    there: tuple[Direction, ...] = ("forward",) if suite.no_gradients else DIRECTIONS
    ways = tuple(direction for direction in there if direction in directions)
    if not ways:
        why = f"{suite.family.name} has no backward: {suite.no_gradients}; measure forward"
        raise ArgumentError("bench", "directions", f"came {tuple(directions)}, but {why}")
    return ways


def by_name(family: str, workloads: tuple[_Named, ...], names: Sequence[str] | None) -> tuple[_Named, ...]:
    """The workloads of these names, or for a name that none has, those with it in theirs."""
    if names is None:
        return workloads
    wanted: set[str] = set()
    known = [workload.name for workload in workloads]
    for name in names:
        meant = [name] if name in known else [each for each in known if name in each]
        if not meant:
            there_are = ", ".join(known)
            raise UnknownNameError(f"bench {family}: no workload has '{name}' in its name; there are: {there_are}")
        wanted.update(meant)
    return tuple(workload for workload in workloads if workload.name in wanted)


def _most_bytes(workload: Workload, dtype: torch.dtype, directions: Sequence[Direction]) -> int:
    return max(workload.bytes_moved(dtype, direction) for direction in directions)


def _largest_of_each_sweep(
    workloads: tuple[Workload, ...], dtype: torch.dtype, directions: Sequence[Direction]
) -> tuple[Workload, ...]:
    kept: set[str] = set()
    for sweep in dict.fromkeys(workload.sweep for workload in workloads):
        members = [workload for workload in workloads if workload.sweep == sweep]
        members.sort(key=lambda workload: _most_bytes(workload, dtype, directions))
        kept.update(workload.name for workload in members[-CPU_QUICK_PER_SWEEP:])
    return tuple(workload for workload in workloads if workload.name in kept)


def _measure_all(plan: Plan, timer: Timer, advance: Callable[[str, int], None]) -> list[dict[str, Any]]:
    """Every record of the run, the run's own first."""
    advance("copy bandwidth", 0)
    floor = timing.empty(timer)
    before = timing.bandwidth(timer)
    missing = {provider.name: _why_missing(provider, timer.device) for provider in plan.providers}
    present = [provider for provider in plan.providers if missing[provider.name] is None]
    measured: list[dict[str, Any]] = []
    hosts: list[dict[str, Any]] = []
    after, interrupted = before, False
    try:
        for workload in plan.workloads:
            for direction in plan.directions:
                advance(f"{workload.name}, {direction}", len(plan.providers) - len(present))
                for record in _measure_workload(plan, timer, workload, direction, present):
                    measured.append(record)
                    advance(f"{workload.name}, {direction}", 1)
        if "forward" in plan.directions:
            advance("time on the host", 0)
            hosts = _measure_hosts(plan, timer, [provider for provider in present if provider.eager])
        advance("copy bandwidth", 0)
        after = timing.bandwidth(timer)
    except KeyboardInterrupt:
        if not measured:
            raise
        interrupted = True
    copy = {"start": before, "end": after}
    # The higher of the two: what the chip has shown it can do, so that no share is flattered by a slow copy.
    used = {
        protocol: max(copy[when][protocol]["gb_per_s"] for when in ("start", "end"))
        for protocol in ("single", "stream")
    }
    for record in measured:
        _add_rates(record, used)
    first = {
        "record": "run",
        "format": records.FORMAT,
        "family": plan.suite.family.name,
        "device": device_name(timer.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quick": plan.quick,
        "interrupted": interrupted,
        "cache_bytes": timer.cache_bytes,
        "copy": copy,
        "copy_gb_per_s": used,
        "empty_us": floor,
        "providers": {
            provider.name: {"description": provider.description, "missing": missing[provider.name]}
            for provider in plan.providers
        },
        "environment": environment.collect(),
    }
    return [first, *measured, *hosts]


def _why_missing(provider: Provider, device: torch.device) -> str | None:
    try:
        return provider.available(device)
    except Exception as error:  # a broken package may raise anything
        return environment.explain_failure(error)


def _measure_workload(
    plan: Plan,
    timer: Timer,
    workload: Workload,
    direction: Direction,
    providers: Sequence[Provider],
) -> Iterator[dict[str, Any]]:
    n_bytes = workload.bytes_moved(plan.dtype, direction)
    n_sets = timing.set_count(n_bytes, timer.cache_bytes)
    first = make_task(plan.suite, workload, direction, plan.dtype, timer.device)
    tasks = [first, *(first.twin() for _ in range(n_sets - 1))]
    gate = Gate(plan.suite, first)
    for provider in providers:
        record = {
            "record": "result",
            "family": plan.suite.family.name,
            "sweep": workload.sweep,
            "value": workload.value,
            "workload": workload.name,
            "parameters": dict(workload.parameters),
            "function": workload.function,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "direction": direction,
            "provider": provider.name,
            "bytes": n_bytes,
            "flops": workload.flops(direction),
            "sets": n_sets,
            "cold": n_sets * n_bytes >= timing.COLD_FACTOR * timer.cache_bytes,
        }
        measured = record | _measure(provider, tasks, gate, timer)
        _give_memory_back(timer)
        yield measured


def _measure(provider: Provider, tasks: Sequence[Task], gate: Gate, timer: Timer) -> dict[str, Any]:
    """What is measured of one provider, or why nothing is."""

    def times(prepared: Prepared) -> dict[str, Any]:
        return {
            "single": timer.single(prepared.calls).to_json(),
            "stream": timer.stream(prepared.calls).to_json(),
            "peak_bytes": timer.peak_memory(prepared.calls[0]),
        }

    return _guarded(provider, tasks, gate, timer, times)


def _guarded(
    provider: Provider,
    tasks: Sequence[Task],
    gate: Gate,
    timer: Timer,
    measure: Callable[[Prepared], dict[str, Any]],
) -> dict[str, Any]:
    """Prepare, judge, and only then measure. Whatever goes wrong becomes the provider's record."""
    try:
        reason = provider.accepts(tasks[0])
        if reason is not None:
            return {"status": "unsupported", "reason": reason}
        prepared = provider.prepare(tasks)
        verdict = gate.judge(prepared)
        if not verdict.ok:
            return {"status": "wrong", "reason": verdict.reason, "gate": verdict.to_json()}
        return {"status": "ok", "reason": "", "gate": verdict.to_json(), **measure(prepared)}
    except ImplementationError as error:
        return {"status": "unsupported", "reason": environment.explain_failure(error)}
    except Exception as error:  # a provider may raise anything
        try:
            timer.synchronize()
        except RuntimeError as broken:
            raise BenchmarkError(
                f"bench: provider '{provider.name}' has broken the device, nothing after it can be measured; "
                f"leave it out with providers=: {environment.explain_failure(broken)}"
            ) from error
        return {"status": "failed", "reason": environment.explain_failure(error)}


def _measure_hosts(plan: Plan, timer: Timer, providers: Sequence[Provider]) -> list[dict[str, Any]]:
    """Time on the host of each provider's forward on the smallest workload, without and with gradients."""
    workload = min(plan.suite.family.workloads, key=lambda w: w.bytes_moved(plan.dtype, "forward"))
    found = []
    tasks = {
        key: make_task(plan.suite, workload, "forward", plan.dtype, timer.device, gradients=key == "host_grad_us")
        for key in ("host_us", "host_grad_us")
    }
    for provider in providers:
        record: dict[str, Any] = {
            "record": "host",
            "family": plan.suite.family.name,
            "workload": workload.name,
            "function": workload.function,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "provider": provider.name,
        }
        for key, task in tasks.items():

            def host(prepared: Prepared, key: str = key) -> dict[str, Any]:
                return {key: timer.host_us(prepared.calls[0])}

            measured = _guarded(provider, [task], Gate(plan.suite, task), timer, host)
            record |= measured
            if measured["status"] != "ok":
                break
        found.append(record)
    return found


def make_task(
    suite: Suite,
    workload: Workload,
    direction: Direction,
    dtype: torch.dtype,
    device: torch.device,
    gradients: bool = False,
) -> Task:
    """The task of a workload, on random data.

    Args:
        suite: the family's suite.
        workload: what is called.
        direction: what is measured.
        dtype: the workload's dtype.
        device: where.
        gradients: whether a forward has inputs that require gradients. Those of a backward always do.
    """
    arguments = workload.arguments(device, dtype)
    wrt = suite.wrt(workload, arguments)
    wanted = gradients or direction == "backward"
    args = tuple(
        value.detach().requires_grad_() if wanted and place in wrt else value
        for place, value in enumerate(arguments.args)
    )
    grads: tuple[torch.Tensor, ...] = ()
    n_bytes = workload.bytes_moved(dtype, direction)
    task = Task(workload.function, "forward", args, dict(arguments.kwargs), wrt, grads, dtype, n_bytes)
    if direction == "backward":
        results = suite.formulation.evaluate(task)
        generator = torch.Generator(device).manual_seed(GRADS_SEED)
        grads = tuple(torch.randn(r.shape, generator=generator, device=device).to(r.dtype) for r in results)
        task = Task(workload.function, direction, args, dict(arguments.kwargs), wrt, grads, dtype, n_bytes)
    return task


def _add_rates(record: dict[str, Any], copy_gb_per_s: dict[str, float]) -> None:
    for protocol, reached in copy_gb_per_s.items():
        if protocol in record:
            rate = timing.gb_per_s(record["bytes"], record[protocol]["median_us"])
            record[protocol] |= {"gb_per_s": rate, "share": rate / reached}


def _give_memory_back(timer: Timer) -> None:
    if timer.device.type != "cpu":
        torch.get_device_module(timer.device).empty_cache()


def device_name(device: torch.device) -> str:
    """The name of a device, as records and their files have it."""
    from tilewright.platforms import facts

    return environment.cpu_model() if device.type == "cpu" else facts(device).name or str(facts(device))


def _draw(path: Path) -> tuple[tuple[Path, ...], str]:
    """The plots, or none and why."""
    from tilewright.bench import plots

    try:
        return plots.draw(path, path.parent), ""
    except MissingDependencyError as error:
        return (), f"no figures: {error}"


def _console() -> Console:
    require("rich.console", "tilewright bench (unless quiet)")
    from rich.console import Console

    return Console()


@contextmanager
def _progress(console: Console | None, plan: Plan) -> Iterator[Callable[[str, int], None]]:
    """A function that says what is being done and how many steps are done."""
    if console is None:
        yield lambda what, steps: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"bench {plan.suite.family.name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=plan.steps)
        yield lambda what, steps: progress.update(bar, description=what, advance=steps)
