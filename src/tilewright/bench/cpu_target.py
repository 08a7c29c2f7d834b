"""The benchmark of the compiled CPU target: plain Triton kernels on CPU tensors against torch and the interpreter.

Every result is held against float64 before it is timed. The contestants of a workload take turns, one sample each a
round, so that whatever else the machine does falls on all of them; the ratios are of medians, and of the best samples
beside them.

Triton's interpreter takes minutes at the full size. It is measured in a process of its own on a part of the rows,
tokens or heads, which are all alike, and its time is multiplied; the record says by how much.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import tilewright
from tilewright import settings
from tilewright.bench import environment, records, timing
from tilewright.bench.cpu_workloads import INTERPRETER, kernels, random, workloads
from tilewright.bench.environment import explain_failure
from tilewright.errors import BenchmarkError
from tilewright.numerics import compare
from tilewright.optional import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from tilewright.bench.cpu_workloads import Claim, Contest, Workload

    Record = dict[str, Any]

SAMPLE_US = 5000.0
"""Least time of one sample: shorter calls are repeated until they take so long."""

BUILD_SECONDS = 0.5
LAUNCH_US = {"jit launch": 30.0, "dispatch": 40.0}
CHILD_SECONDS = 1800


def judge(contest: Contest, dtype: torch.dtype) -> Iterator[tuple[str, Record]]:
    """Run each contestant once and say by name whether it is right: a record's status, reason and gate.

    Whatever goes wrong is told, and the next one runs.
    """
    reference = contest.definition(contest.result_dtype or dtype)
    truth = contest.definition(torch.float64)
    for name, contestant in contest.contestants.items():
        try:
            result = contestant.result()
            if contestant.judged:
                agreement = compare(result, reference, truth, reduced=contest.reduced)
                gate = {"worst": agreement.worst, "error": agreement.error}
                found = {"status": "ok" if agreement.ok else "wrong", "reason": "" if agreement.ok else str(agreement)}
                yield name, found | {"gate": gate}
            else:
                yield name, {"status": "ok", "reason": "", "gate": {"skipped": "another result is computed"}}
        except Exception as error:  # a contestant may raise anything
            yield name, {"status": "failed", "reason": explain_failure(error)}


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, sample_us: float = SAMPLE_US) -> dict[str, Record]:
    """Time calls in turn: one sample each a round.

    Args:
        calls: by name; each has run before.
        rounds: samples of each.
        sample_us: least time of a sample, which a short call fills by being repeated.
    """
    repeats = {name: max(1, int(sample_us / max(_seconds(call, 1) * 1e6, 1.0))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_seconds(call, repeats[name]) * 1e6)
    return {
        name: {
            **timing.summarise(taken, method="wall clock, in turn", calls=repeats[name]).to_json(),
            "best_us": min(taken),
        }
        for name, taken in samples.items()
    }


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call. Giving the last result back is no part of it."""
    result = None
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    taken = time.perf_counter() - start
    del result
    return taken / repeats


def measure_workload(workload: Workload, rounds: int) -> list[Record]:
    """The records of a workload's contestants. What is not right is not timed."""
    contest = workload.build(workload.size, workload.dtype)
    found = {name: _head(workload, name) | verdict for name, verdict in judge(contest, workload.dtype)}
    timed = {name: contest.contestants[name].call for name, record in found.items() if record["status"] == "ok"}
    for name, times in interleaved(timed, rounds).items():
        found[name]["time"] = times
    return list(found.values())


def _head(workload: Workload, provider: str) -> Record:
    return {
        "record": "result",
        "family": "cpu",
        "workload": workload.name,
        "dtype": _name(workload.dtype),
        "provider": provider,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _interpret(quick: bool) -> None:
    """In a process with the interpreter on: print the records of what it is measured on."""
    found = []
    for workload in workloads(quick):
        if not workload.interpreted:
            continue
        contest = workload.build(workload.interpreted, workload.dtype)
        only = replace(contest, contestants={INTERPRETER: contest.contestants["triton"]})
        record = _head(workload, INTERPRETER) | dict(judge(only, workload.dtype))[INTERPRETER]
        if record["status"] == "ok":
            times = interleaved({INTERPRETER: only.contestants[INTERPRETER].call}, 3)[INTERPRETER]
            factor = workload.size / workload.interpreted
            scaled = {name: value * factor if name.endswith("_us") else value for name, value in times.items()}
            note = f"measured on {workload.interpreted} of {workload.size}, times {factor:g}"
            record |= {"time": scaled | {"note": note}, "scaled_by": factor}
        found.append(record)
    sys.stdout.write(json.dumps(found) + "\n")


def stage_seconds(compiled: Any) -> dict[str, float]:
    """What the target says of how long each of its own steps took; empty if it says nothing.

    Args:
        compiled: a compiled kernel, whose ``metadata`` has attributes or is a mapping.

    Example:
        >>> stage_seconds(SimpleNamespace(metadata={"build_seconds": {"emit": 0.01, "gcc": 0.2}}))
        {'emit': 0.01, 'gcc': 0.2}
    """
    metadata = compiled.metadata
    told = metadata.get("build_seconds") if isinstance(metadata, dict) else getattr(metadata, "build_seconds", None)
    return {str(step): float(seconds) for step, seconds in dict(told or {}).items()}


def _build(quick: bool) -> None:
    """In a process with an empty cache: compile each workload's kernels and print how long that took."""
    from triton import knobs

    seen: list[Record] = []

    def listen(*, src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
        stages = {stage: microseconds / 1e6 for stage, microseconds in times.lowering_stages}
        front_end = times.ir_initialization / 1e6 + stages.pop("ttir", 0.0)
        seen.append(
            {
                "kernel": metadata.get("name") or getattr(src, "name", "?"),
                "cache_hit": cache_hit,
                "front_end_s": front_end,
                "target_s": sum(stages.values()),
                "stages_s": stages,
                "steps_s": stage_seconds(SimpleNamespace(metadata=metadata)),
                "store_s": times.store_results / 1e6,
                "total_s": times.total / 1e6,
                "executor": metadata.get("executor"),
            }
        )

    found: list[Record] = []
    try:
        kernels().store_kernel[(1,)](torch.zeros(1), 1.0)  # what a process pays once is no part of a kernel's time
    except Exception as error:  # the workloads below tell the same of themselves
        sys.stderr.write(f"{explain_failure(error)}\n")
    knobs.compilation.listener = listen
    for workload in workloads(quick):
        seen.clear()
        contest = workload.build(workload.size, workload.dtype)  # a smaller one would be specialised otherwise
        for name, contestant in contest.contestants.items():
            if not name.startswith("triton") or (name == "triton" and "triton out" in contest.contestants):
                continue
            head = _head(workload, name) | {"record": "build"}
            try:
                contestant.call()
                found.extend(head | {"status": "ok", "reason": ""} | record for record in seen)
            except Exception as error:  # whatever a compiler raises
                found.append(head | {"status": "failed", "reason": explain_failure(error)})
            seen.clear()
    sys.stdout.write(json.dumps(found) + "\n")


def _child(function: str, quick: bool, what: Record, **variables: str) -> list[Record]:
    """Run a function of this module in a process of its own and read the records that it prints."""
    program = f"from tilewright.bench import cpu_target; cpu_target.{function}({quick})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return [what | {"status": "failed", "reason": environment.scrub(last)}]
        printed: list[Record] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return [what | {"status": "failed", "reason": explain_failure(error)}]
    return printed


def _launches(rounds: int) -> list[Record]:
    """What a small launch costs: through the JIT, and through the library's dispatch; an operator of torch beside."""
    plain = kernels()
    one, x, y = torch.zeros(1), random(64, dtype=torch.float32), random(64, dtype=torch.float32, seed=1)
    out = torch.empty_like(x)
    tokens = random(1, 1, 2, 64, dtype=torch.float32)
    cos, sin = tilewright.rope_table(64, 8)
    contest: dict[str, tuple[Callable[[], Any], Callable[[], bool]]] = {
        "jit launch": (lambda: plain.store_kernel[(1,)](one, 3.0), lambda: bool(one == 3)),
        "jit add": (lambda: plain.add(x, y, out=out), lambda: torch.equal(out, x + y)),
        "dispatch": (
            lambda: tilewright.rope(tokens, cos, sin, impl="triton"),
            lambda: (
                compare(
                    tilewright.rope(tokens, cos, sin, impl="triton"),
                    tilewright.rope(tokens, cos, sin, impl="reference"),
                    tilewright.rope(tokens.double(), cos, sin, impl="reference"),
                ).ok
            ),
        ),
        "torch.add": (lambda: torch.add(x, y, out=out), lambda: torch.equal(out, x + y)),
    }
    found: dict[str, Record] = {}
    with torch.inference_mode():
        for name, (call, right) in contest.items():
            found[name] = {"record": "launch", "family": "cpu", "provider": name, "status": "ok", "reason": ""}
            try:
                out.fill_(torch.nan)
                call()
                if not right():
                    found[name] |= {"status": "wrong", "reason": "the result differs"}
            except Exception as error:  # whatever a target raises
                found[name] |= {"status": "failed", "reason": explain_failure(error)}
        calls = {name: call for name, (call, _) in contest.items() if found[name]["status"] == "ok"}
        for name, times in interleaved(calls, rounds).items():
            found[name]["time"] = times
    return list(found.values())


def ratios(measured: Sequence[Record], claims: Mapping[tuple[str, str], tuple[Claim, ...]]) -> list[Record]:
    """Our times against the rivals': how many times as long a rival takes.

    Args:
        measured: records of contestants.
        claims: by workload and dtype.

    Example:
        >>> from tilewright.bench.cpu_workloads import Claim
        >>> head = {"record": "result", "workload": "add", "dtype": "float32", "status": "ok"}
        >>> ours = head | {"provider": "triton", "time": {"median_us": 2.0, "best_us": 1.0}}
        >>> rival = head | {"provider": "torch", "time": {"median_us": 3.0, "best_us": 2.0}}
        >>> found = ratios([ours, rival], {("add", "float32"): (Claim("triton", "torch", 2.0),)})[0]
        >>> found["ratio"], found["ratio_best"], found["met"]
        (1.5, 2.0, False)
    """
    by = {(r["workload"], r["dtype"], r["provider"]): r for r in measured if r["record"] == "result"}
    found = []
    for (workload, dtype), wanted in claims.items():
        for claim in wanted:
            ours, rival = (by.get((workload, dtype, name), {}) for name in (claim.ours, claim.rival))
            record: Record = {
                "record": "ratio",
                "family": "cpu",
                "workload": workload,
                "dtype": dtype,
                "ours": claim.ours,
                "rival": claim.rival,
                "least": claim.least,
                "ratio": None,
                "ratio_best": None,
                "met": None if claim.least is None else False,
            }
            if "time" in ours and "time" in rival:
                ratio = rival["time"]["median_us"] / ours["time"]["median_us"]
                best = rival["time"]["best_us"] / ours["time"]["best_us"]
                met = None if claim.least is None else ratio >= claim.least
                record |= {"ratio": ratio, "ratio_best": best, "met": met}
            found.append(record)
    return found


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation, whatever its size.

    Otherwise large results come from the system, whose page faults take several times as long as a kernel, and fall on
    one contestant or another by where its blocks happen to lie.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        for option in (trim_threshold, mmap_threshold):
            mallopt(option, 1 << 30)


def measure(quick: bool, say: Callable[[str], None] = lambda what: None) -> list[Record]:
    """Every record of a run, the run's own first."""
    _keep_freed_memory()
    rounds = 5 if quick else 15
    chosen = workloads(quick)
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        run = {
            "record": "run",
            "format": records.FORMAT,
            "family": "cpu",
            "device": environment.cpu_model(),
            "quick": quick,
            "target": _target(),
            "environment": environment.collect(),
        }
        found: list[Record] = []
        say("launches")
        found += _launches(rounds)
        for workload in chosen:
            say(f"{workload.name}, {_name(workload.dtype)}")
            found += measure_workload(workload, rounds)
    finally:
        torch.set_num_threads(threads)
    say("Triton's interpreter")
    missing = {"family": "cpu", "workload": "all", "dtype": "float32", "provider": INTERPRETER}
    found += _child("_interpret", quick, {"record": "result", **missing}, TRITON_INTERPRET="1")
    say("builds")
    with tempfile.TemporaryDirectory() as cache:
        found += _child(
            "_build", quick, {"record": "build", "family": "cpu", "workload": "all"}, TRITON_CACHE_DIR=cache
        )
    claims = {(workload.name, _name(workload.dtype)): workload.claims for workload in chosen}
    return [run, *found, *ratios(found, claims)]


def _target() -> str:
    """The active Triton target, or why there is none."""
    try:
        from triton.runtime import driver

        return str(driver.active.get_current_target())
    except Exception as error:  # no driver, or several
        return explain_failure(error)


def main(
    output: Path | str | None = None, quick: bool = False, console: Console | None = None, json_output: bool = False
) -> int:
    """Measure the compiled CPU target, write the records and print them.

    Args:
        output: a folder, or a file that ends in ``.jsonl``; by default the folder ``bench-results``.
        quick: fewer samples and workloads.
        console: where the tables go; by default the terminal.
        json_output: print the records as JSON instead, and do without ``rich``.

    Returns:
        0 if everything could be measured and was right, else 1. A target that is missed is shown and is no failure.

    Raises:
        BenchmarkError: Triton's interpreter is on, so that nothing would be compiled.
        MissingDependencyError: Triton is missing, or ``rich``, and ``json_output`` does not do without.
    """
    if settings.triton_interpret():
        raise BenchmarkError("bench cpu: Triton's interpreter is on, so nothing is compiled; unset TRITON_INTERPRET")
    require("triton", "tilewright bench cpu")
    if json_output:
        found = measure(quick)
        _write(output, found)
        print(json.dumps(found))
    else:
        require("rich.console", "tilewright bench cpu without --json")
        from rich.console import Console

        console = Console() if console is None else console
        with console.status("bench cpu") as status:
            found = measure(quick, lambda what: status.update(f"bench cpu: {what}"))
        path = _write(output, found)
        show(found, console)
        console.print(f"records: {path}", soft_wrap=True, highlight=False, markup=False)
    return int(any(record.get("status", "ok") != "ok" for record in found))


def _write(output: Path | str | None, found: list[Record]) -> Path:
    path = records.path_of("bench-results" if output is None else output, "cpu", found[0]["device"])
    records.write(path, found)
    return path


def show(found: Sequence[Record], console: Console) -> None:
    """Print the records of a run: the ratios and what is asked of them, what a kernel costs besides, what failed."""
    from rich.markup import escape
    from rich.table import Table

    run = found[0]
    threads = run["environment"]["torch"]["threads"]
    console.print(escape(f"{run['device']}, {threads} threads; Triton target: {run['target']}"), highlight=False)
    by = {(r["workload"], r["dtype"], r["provider"]): r.get("time") for r in found if r["record"] == "result"}
    table = Table(title="Compiled Triton on the CPU, milliseconds (median, best): rival's time over ours")
    for head in ("workload", "dtype", "ours", "rival", "ours ms", "rival ms", "ratio", "of best", "asked", ""):
        table.add_column(head, justify="left" if head in {"workload", "dtype", "ours", "rival", ""} else "right")
    for record in (r for r in found if r["record"] == "ratio"):
        where = record["workload"], record["dtype"]
        times = (_ms(by.get((*where, record[side]))) for side in ("ours", "rival"))
        asked = "" if record["least"] is None else f">= {record['least']:g}"
        values = (_ratio(record[name]) for name in ("ratio", "ratio_best"))
        table.add_row(*where, record["ours"], record["rival"], *times, *values, asked, _verdict(record["met"]))
    console.print(table)

    table = Table(title="What a kernel costs besides")
    for head in ("what", "value", "asked", ""):
        table.add_column(head, justify="right" if head in {"value", "asked"} else "left")
    for record in (r for r in found if r["record"] == "launch"):
        most, time_us = LAUNCH_US.get(record["provider"]), record.get("time")
        met = None if most is None else time_us is not None and time_us["best_us"] <= most
        value = "-" if time_us is None else f"{time_us['best_us']:.1f} us (median {time_us['median_us']:.1f})"
        table.add_row(record["provider"], value, "" if most is None else f"<= {most:g} us", _verdict(met))
    for record in (r for r in found if r["record"] == "build" and r["status"] == "ok"):
        value = f"{record['target_s']:.3f} s + Triton's {record['front_end_s']:.3f} s"
        what = f"build {record['kernel']}, {record['workload']}, {record['dtype']}"
        table.add_row(what, value, f"<= {BUILD_SECONDS:g} s", _verdict(record["target_s"] <= BUILD_SECONDS))
    console.print(table)
    troubles: dict[tuple[str, str, str], list[str]] = {}
    for record in (r for r in found if r.get("status", "ok") != "ok"):
        what = " ".join(str(record[name]) for name in ("workload", "dtype", "provider") if name in record)
        troubles.setdefault((record["record"], record["status"], record["reason"]), []).append(what)
    for (kind, status, reason), whats in troubles.items():
        line = f"{status.upper()} ({kind}): {reason}: {'; '.join(whats)}"
        console.print(escape(line), style="bold red", highlight=False, soft_wrap=True)


def _ms(times: Record | None) -> str:
    return "-" if times is None else f"{times['median_us'] / 1e3:.2f} ({times['best_us'] / 1e3:.2f})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _verdict(met: bool | None) -> str:
    return "" if met is None else "[green]met[/green]" if met else "[bold red]missed[/bold red]"
