"""What graph fusion wins: a decoder layer in a device graph, compiled with fusion and without.

The layer, a dense one, is that of :mod:`tilewright.bench.decoder_layer`, written in the library's operators and in
plain PyTorch. All are compiled by Inductor with the same options; what is compared is the pass. Every result is held
against float64 before it is timed. The contestants of a workload take turns, several rounds in one run, each replaying
a graph that goes round several layers with weights of their own, so that none finds its weights in the cache.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright import numerics
from tilewright.bench import environment, fp8_linear, records, runner, timing
from tilewright.bench.decoder_layer import DecoderLayer, ExactParts, LayerInputs, Parts, PlainParts, Sizes, layer_inputs
from tilewright.optional import require
from tilewright.platforms import usable_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from tilewright.bench.decoder_layer import Results
    from tilewright.bench.timing import Timer
    from tilewright.fusion import FusionReport

    Record = dict[str, Any]

FORMS: dict[str, type[Parts]] = {"operators": Parts, "plain PyTorch": PlainParts}
"""In what the layer is written."""

_QUANTISED = {"add_rms_norm_quant": 2, "rms_norm_quant": 2, "silu_mul_quant": 1}
EXPECTED = {"operators": _QUANTISED | {"rope_quant": 2, "partial_rope": 1}, "plain PyTorch": _QUANTISED}
"""What fuses in a layer. In plain PyTorch, Inductor rotates queries and keys as it copies or quantises them anyway."""

ROUNDS = 3
LAYERS = timing.LEAST_SETS
_INPUTS = 1000  # the first seed of inputs, apart from those of weights

_WHOLE = Sizes()
_EIGHTH = replace(_WHOLE, heads=_WHOLE.heads // 8, ffn=_WHOLE.ffn // 8)
_SMALL = Sizes(
    hidden=1024, q_rank=256, kv_rank=256, heads=4, nope=64, rotated=32, value=64, index_heads=4, index=128, ffn=1024
)


class Layer(NamedTuple):
    """A workload.

    Attributes:
        name: unique.
        sizes: of the layer.
        tokens: in the sequence.
        least: the part of the time that fusion is to save; None if nothing is asked.
    """

    name: str
    sizes: Sizes
    tokens: int
    least: float | None


class Stack(NamedTuple):
    """Layers that are compiled together, to see which part of that the pass takes.

    Attributes:
        name: unique.
        sizes: of each layer.
        layers: how many.
        most: the part of the time that the pass may take.
    """

    name: str
    sizes: Sizes
    layers: int
    most: float


STACK = Stack("compilation of 32 layers", _SMALL, 32, 0.02)


def workloads(device: torch.device) -> tuple[Layer, ...]:
    """What is measured: the part of the layer that one of eight GPUs has, and the whole; on a CPU a small one."""
    if device.type == "cpu":
        return tuple(Layer(f"small, {_counted(tokens)}", _SMALL, tokens, None) for tokens in (1, 64))
    asked = {1: 0.05, 64: 0.05, 1024: 0.10}
    parts = {"one of eight GPUs": _EIGHTH, "one GPU": _WHOLE}
    return tuple(
        Layer(f"{part}, {_counted(tokens)}", sizes, tokens, least)
        for part, sizes in parts.items()
        for tokens, least in asked.items()
    )


def _counted(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


@dataclass
class Contestant:
    """A compiled layer.

    Attributes:
        form: in what it is written.
        fusion: whether fusion is on.
        calls: one for each set of weights and inputs.
        report: what fusion did.
        weight_bytes: of one layer.
    """

    form: str
    fusion: bool
    calls: tuple[Callable[[], Results], ...]
    report: FusionReport
    weight_bytes: int


def measure_workload(workload: Layer, timer: Timer) -> list[Record]:
    """The records of a workload: a result for each contestant, a ratio for each form. What is wrong is not timed."""
    contestants = list(_contestants(workload, timer.device))
    found = [_head(workload, c) | verdict for c, verdict in _judged(workload, contestants, timer.device)]
    timed = [(record, c) for record, c in zip(found, contestants, strict=True) if record["status"] == "ok"]
    rounds: dict[int, list[timing.Timing]] = {}
    for turn in range(ROUNDS):
        places = range(len(timed)) if turn % 2 == 0 else reversed(range(len(timed)))
        for place in places:
            rounds.setdefault(place, []).append(timer.stream(timed[place][1].calls))
    for place, (record, _) in enumerate(timed):
        medians = [each.median_us for each in rounds[place]]
        middle = next(each for each in rounds[place] if each.median_us == statistics.median_low(medians))
        cold = LAYERS * record["weight_bytes"] >= timing.COLD_FACTOR * timer.cache_bytes
        record |= {"stream": middle.to_json(), "rounds_us": medians, "cold": cold}
    return [*found, *ratios(workload, found)]


def measure_compilation(stack: Stack, device: torch.device) -> Iterator[Record]:
    """The records of a compilation with empty caches, in each form: what it takes, and the pass's part of that."""
    for form, parts in FORMS.items():
        for layers in (1, stack.layers):  # the first time is the process's own
            seconds, report = _compiled(stack._replace(layers=layers), parts, device)
        taken = sum(graph.seconds for graph in report.graphs)
        yield {
            "record": "compilation",
            "family": "fusion",
            "workload": stack.name,
            "form": form,
            "counts": report.counts,
            "seconds": seconds,
            "pass_seconds": taken,
            "share": taken / seconds,
            "most": stack.most,
            "met": taken <= stack.most * seconds,
        }


def _compiled(stack: Stack, parts: type[Parts], device: torch.device) -> tuple[float, FusionReport]:
    """How long compiling a stack takes, its first call included, and what was fused."""
    import tilewright

    def run(layers: Sequence[DecoderLayer], given: LayerInputs) -> list[Results]:
        results = []
        for layer in layers:
            results.append(layer(*given))
            given = given._replace(x=results[-1].y, residual=results[-1].residual)
        return results

    torch._dynamo.reset()
    layers = [DecoderLayer(stack.sizes, parts, device=device, seed=seed) for seed in range(stack.layers)]
    compiled = tilewright.compile(run, fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        compiled(layers, layer_inputs(stack.sizes, 4, device))
        return time.perf_counter() - start, compiled.fusion_report


def ratios(workload: Layer, measured: Sequence[Record]) -> Iterator[Record]:
    """For each form, which part of the time fusion saves; nothing where the two were not measured in the same way.

    Example:
        >>> layer = Layer("a layer", Sizes(), 1, 0.1)
        >>> off, on = ({"form": "plain", "fusion": on, "stream": {"median_us": 10.0 - 2 * on}} for on in (False, True))
        >>> [(record["saved"], record["met"]) for record in ratios(layer, [off, on])]
        [(0.2, True)]
    """
    times = {(record["form"], record["fusion"]): record.get("stream") for record in measured}
    for form in dict.fromkeys(form for form, _ in times):
        off, on = (times.get((form, fusion)) for fusion in (False, True))
        saved = None
        if off is not None and on is not None and off.get("method") == on.get("method"):
            saved = round(1 - on["median_us"] / off["median_us"], 4)
        met = None if workload.least is None else saved is not None and saved >= workload.least
        yield {
            "record": "ratio",
            "family": "fusion",
            "workload": workload.name,
            "form": form,
            "saved": saved,
            "least": workload.least,
            "met": met,
        }


def numbers(results: Results) -> tuple[torch.Tensor, ...]:
    """What of a layer's results is compared: FP8 values by what they stand for."""
    index = (fp8_linear.dequantised(results.index_q, results.index_q_scales),
             fp8_linear.dequantised(results.index_k, results.index_k_scales))  # fmt: skip
    return results.y, results.residual, results.index_weights, *(each.to(results.y.dtype) for each in index)


def _contestants(workload: Layer, device: torch.device) -> Iterator[Contestant]:
    import tilewright

    torch._dynamo.reset()
    inputs = [layer_inputs(workload.sizes, workload.tokens, device, seed=_INPUTS + seed) for seed in range(LAYERS)]
    for form, parts in FORMS.items():
        layers = [DecoderLayer(workload.sizes, parts, device=device, seed=seed) for seed in range(LAYERS)]
        for fusion in (False, True):

            def run(layer: DecoderLayer, given: LayerInputs) -> Results:
                result: Results = layer(*given)
                return result

            compiled = tilewright.compile(run, fusion=fusion, dynamic=False)
            calls = tuple(_call(compiled, layer, given) for layer, given in zip(layers, inputs, strict=True))
            n_bytes = sum(weight.numel() * weight.itemsize for weight in layers[0].parameters())
            yield Contestant(form, fusion, calls, compiled.fusion_report, n_bytes)


def _call(compiled: Callable[..., Results], layer: DecoderLayer, given: LayerInputs) -> Callable[[], Results]:
    return lambda: compiled(layer, given)


def _judged(
    workload: Layer, contestants: Sequence[Contestant], device: torch.device
) -> Iterator[tuple[Contestant, Record]]:
    """Run each contestant once and say whether it is right: a record's status, reason and gate.

    The gate allows for what quantisation does, twice over; so the record also has how far apart the results with fusion
    and without are, as a part of what quantisation does.
    """
    given = layer_inputs(workload.sizes, workload.tokens, device, seed=_INPUTS)
    reference = numbers(DecoderLayer(workload.sizes, PlainParts, device=device, seed=0)(*given))
    exact = DecoderLayer(workload.sizes, ExactParts, device=device, seed=0)
    truth = numbers(exact.to(torch.float64)(*(tensor.double() for tensor in given)))
    del exact
    unfused: tuple[torch.Tensor, ...] | None = None
    for contestant in contestants:
        wanted = EXPECTED[contestant.form] if contestant.fusion else {}
        try:
            results, *_ = [numbers(call()) for call in contestant.calls]  # each compiles, or finds what did
            agreements = [numerics.compare(*each) for each in zip(results, reference, truth, strict=True)]
            reason = next((f"result {place}: {each}" for place, each in enumerate(agreements) if not each.ok), "")
            gate = {"worst": max(each.worst for each in agreements)}
            if not contestant.fusion:
                unfused = results
            elif unfused is not None:
                gate["apart"] = max(map(_apart, results, unfused, truth))
            found = {"status": "wrong" if reason else "ok", "reason": reason, "gate": gate}
            if not reason and contestant.report.counts != wanted:
                found |= {"status": "unfused", "reason": f"fused {contestant.report.counts}, expected {wanted}"}
        except Exception as error:  # whatever a compiler raises
            found = {"status": "failed", "reason": environment.explain_failure(error)}
        report = contestant.report
        moved = [decision.bytes_moved for decision in report.decisions if decision.action == "fused"]
        told = {
            "counts": report.counts,
            "graphs": len(report.graphs),
            "refused": [
                str(replace(decision, source="")) for decision in report.decisions if decision.action != "fused"
            ],
            "bytes_saved": sum(before - after for before, after in moved),
        }
        yield contestant, found | {"report": told}


def _apart(result: torch.Tensor, other: torch.Tensor, truth: torch.Tensor) -> float:
    """How far two results are apart, over how far the second one is from the truth: by root mean squares."""
    difference, error = (pair[0].double() - pair[1].double() for pair in ((result, other), (other, truth)))
    return float(difference.square().mean().sqrt() / error.square().mean().sqrt().clamp(min=torch.finfo().tiny))


def _head(workload: Layer, contestant: Contestant) -> Record:
    return {
        "record": "result",
        "family": "fusion",
        "workload": workload.name,
        "parameters": {"tokens": workload.tokens, **asdict(workload.sizes)},
        "form": contestant.form,
        "fusion": contestant.fusion,
        "weight_bytes": contestant.weight_bytes,
    }


def measure(
    device: torch.device, quick: bool, names: Sequence[str] | None, say: Callable[[str], None] = lambda what: None
) -> list[Record]:
    """Every record of a run, the run's own first."""
    timer = timing.make_timer(device, quick)
    found: list[Record] = []
    there: tuple[Layer | Stack, ...] = (*workloads(device), STACK)
    with timer.scope(), torch.no_grad():
        say("copy bandwidth")
        copy = timing.bandwidth(timer)
        for workload in runner.by_name("fusion", there[:-1] if quick and names is None else there, names):
            say(workload.name)
            if isinstance(workload, Layer):
                found += measure_workload(workload, timer)
            else:
                found += measure_compilation(workload, device)
    run = {
        "record": "run",
        "format": records.FORMAT,
        "family": "fusion",
        "device": runner.device_name(device),
        "quick": quick,
        "copy": copy,
        "linear_layers": fp8_linear.choices(),
        "environment": environment.collect(),
    }
    return [run, *found]


def main(
    output: Path | str,
    *,
    device: str | None = None,
    workloads: Sequence[str] | None = None,
    quick: bool | None = None,
    console: Console | None = None,
    json_output: bool = False,
) -> int:
    """Measure what fusion wins, write the records and print them.

    Args:
        output: a folder, or a file that ends in ``.jsonl``.
        device: where; by default the accelerator, or the CPU if there is none.
        workloads: parts of workloads' names; by default all.
        quick: fewer samples, and unless it is named no compilation; by default on a CPU.
        console: where the tables go; by default the terminal.
        json_output: print the records as JSON instead, and do without ``rich``.

    Returns:
        0 if everything could be measured and was right, else 1. A target that is missed is shown and is no failure.

    Raises:
        UnknownNameError: no workload has this name.
        MissingDependencyError: ``rich`` is missing, and ``json_output`` does not do without.
    """
    where = usable_device(device, "bench")
    is_quick = where.type == "cpu" if quick is None else quick
    if json_output:
        found = measure(where, is_quick, workloads)
    else:
        require("rich.console", "tilewright bench fusion without --json")
        from rich.console import Console

        console = Console() if console is None else console
        with console.status("bench fusion") as status:
            found = measure(where, is_quick, workloads, lambda what: status.update(f"bench fusion: {what}"))
    path = records.path_of(output, "fusion", found[0]["device"], "bfloat16")
    records.write(path, found)
    found = records.read(path)  # in which every number is one
    if json_output:
        print(json.dumps(found))
    else:
        assert console is not None
        show(found, console)
        console.print(f"records: {path}", soft_wrap=True, highlight=False, markup=False)
    return int(any(record.get("status", "ok") != "ok" for record in found))


HEADS = ("layer", "written in", "off, us", "on, us", "saved", "asked")


def rows(found: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """The records as a table: a row for each workload and form, its cells as ``HEADS`` says."""
    times = {
        (record["workload"], record["form"], record["fusion"]): record.get("stream")
        for record in found
        if record["record"] == "result"
    }
    for record in found:
        if record["record"] == "ratio":
            each = (times.get((record["workload"], record["form"], fusion)) for fusion in (False, True))
            shown = ("-" if time is None else f"{time['median_us']:.1f}" for time in each)
            saved = "-" if record["saved"] is None else f"{100 * record['saved']:.1f} %"
            asked = "" if record["least"] is None else f"{100 * record['least']:.0f} %"
            yield record["workload"], record["form"], *shown, saved, asked


def told(record: Record) -> str:
    """A compilation in words.

    Example:
        >>> told({"seconds": 50.0, "pass_seconds": 0.5, "share": 0.01, "most": 0.02})
        '50.0 s, of which the pass 0.50 s, 1.0 % (asked: at most 2 %)'
    """
    share, most = (f"{100 * record[name]:.{digits}f} %" for name, digits in (("share", 1), ("most", 0)))
    return (
        f"{record['seconds']:.1f} s, of which the pass {record['pass_seconds']:.2f} s, {share} (asked: at most {most})"
    )


def show(found: Sequence[Record], console: Console) -> None:
    """Print the records of a run: the times, what fusion saved and what is asked of it, and what failed."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(found[0]['device'])}: a layer, with graph fusion off and on")
    for head in HEADS:
        table.add_column(head, justify="left" if head in HEADS[:2] else "right")
    for row in rows(found):
        table.add_row(*map(escape, row))
    console.print(table)
    for record in found:
        if record["record"] == "compilation":
            console.print(f"{record['workload']} in {record['form']}: {told(record)}", highlight=False, soft_wrap=True)
    for record in found:
        if record.get("status", "ok") != "ok":
            what = f"{record['workload']}, {record['form']}, fusion {'on' if record['fusion'] else 'off'}"
            line = f"{record['status'].upper()}: {what}: {record['reason']}"
            console.print(escape(line), style="bold red", highlight=False, soft_wrap=True)
