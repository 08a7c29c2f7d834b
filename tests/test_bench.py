"""The benchmark's harness, on a family of its own: scaling a matrix. No test looks at how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tilewright.bench import environment, plots, records, report, runner, timing
from tilewright.bench.gate import Gate
from tilewright.bench.providers import (
    CopyProvider,
    Formulation,
    FunctionProvider,
    Prepared,
    Suite,
    evaluate,
    register,
    suite,
    twins,
)
from tilewright.errors import (
    ArgumentError,
    BenchmarkError,
    ImplementationError,
    MissingDependencyError,
    UnknownNameError,
)
from tilewright.ops.contract import Arguments, Direction, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tilewright.bench.providers import Provider, Task

CACHE = 2**16
EFFORT = timing.Effort(single=4, stream=3, stream_us=0.0, copy_bytes=2**16, host_calls=3, host_repeats=2)


def scale(x: torch.Tensor, factor: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * factor + shift).to(x.dtype)


@dataclass(frozen=True)
class Rows:
    sweep: str
    value: int
    columns: int = 64
    function: str = "scale"

    @property
    def name(self) -> str:
        return f"rows {self.value} columns {self.columns}"

    @property
    def parameters(self) -> Mapping[str, int | str | bool]:
        return {"rows": self.value, "columns": self.columns}

    def arguments(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Arguments:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.value, self.columns, generator=generator, device=device).to(dtype)
        return Arguments((x, torch.rand(self.columns, generator=generator, device=device) + 0.5), {"shift": 0.25})

    def bytes_moved(self, dtype: torch.dtype, direction: Direction) -> int:
        return 2 * self.value * self.columns * dtype.itemsize

    def flops(self, direction: Direction) -> int:
        return 2 * self.value * self.columns


FAMILY = Family(
    name="scaling",
    summary="x * factor + shift",
    functions=("scale",),
    operators=(),
    dtypes=(torch.bfloat16, torch.float32),
    layouts=(),
    cases=(),
    invalid_cases=(),
    workloads=(Rows("rows", 4), Rows("rows", 16), Rows("rows", 64), Rows("wide rows", 8, columns=512)),
)


def wrong(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
    return scale(x, factor, shift=shift) * 1.05


def unwritten(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
    y = torch.full_like(x, torch.nan)
    y[:-1] = scale(x, factor, shift=shift)[:-1]
    return y


def half_precise(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
    return x * factor.to(x.dtype) + shift


ROUNDED = Formulation(
    "arithmetic in x's dtype",
    evaluate=lambda task: evaluate(half_precise, task),
    truth=lambda task: evaluate(scale, task.in_double()),
    less_precise="rounds twice",
)


def failing(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
    raise ValueError("cannot open /home/someone/secret/thing.so")


def interrupting(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
    raise KeyboardInterrupt


def refusing(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
    raise ImplementationError("scale: not on this device")


def providers() -> tuple[Provider, ...]:
    def provider(name: str, function: Callable[..., Any], **options: Any) -> FunctionProvider:
        return FunctionProvider(name, f"{name}, for a test", lambda task: function, **options)

    return (
        provider("good", scale),
        provider("rounded", half_precise, formulation=lambda task: ROUNDED),
        provider("wrong", wrong),
        provider("unwritten", unwritten),
        provider("failing", failing),
        provider("refusing", refusing),
        provider("interrupting", interrupting),
        provider("picky", scale, refuses=lambda task: "too many rows" if task.args[0].shape[0] > 16 else None),
        provider("absent", scale, missing=lambda device: "not installed"),
        CopyProvider(),
    )


def scaling_suite() -> Suite:
    return Suite(
        family=FAMILY,
        formulation=Formulation("fp32 arithmetic", lambda task: evaluate(scale, task)),
        wrt=lambda workload, arguments: (0,),
        providers=providers(),
        on_request=frozenset({"interrupting"}),
    )


@pytest.fixture(autouse=True)
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is known, and measured with few samples and a small cache."""
    from tilewright.bench import providers as module

    monkeypatch.setattr(module, "_REGISTERED", {})
    monkeypatch.setattr(timing, "make_timer", lambda device, quick: timing.HostTimer(EFFORT, cache_bytes=CACHE))
    register("scaling", scaling_suite)


def bench(folder: Path, **options: Any) -> runner.BenchResult:
    return runner.run("scaling", **{"device": "cpu", "output": folder, "quiet": True, "quick": False, **options})


def found(result: runner.BenchResult, provider: str, direction: str = "forward") -> list[dict[str, Any]]:
    return [
        record
        for record in records.results(result.records)
        if record["provider"] == provider and record["direction"] == direction
    ]


# The environment


def in_subprocess(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("raised", ["ImportError", "OSError", "RuntimeError"])
def test_environment_works_where_torch_and_triton_cannot_be_imported(raised: str) -> None:
    record = in_subprocess(f"""
        import json, sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "triton"):
                    raise {raised}("libexample.so.1: cannot open /opt/broken/stack/lib")

        sys.meta_path.insert(0, Blocker())
        from tilewright.bench import environment
        record = environment.collect()
        record["text"] = environment.format(record)
        print(json.dumps(record))
    """)
    assert record["torch"]["version"]["error"].startswith(f"{raised}: libexample.so.1")
    assert record["triton"]["version"]["error"].startswith(raised)
    assert "error" in record["devices"]
    assert record["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert record["tilewright"]["version"]
    assert "/opt/broken" not in json.dumps(record)
    assert "not available" in record["text"]


def test_environment_is_imported_without_torch() -> None:
    assert (
        in_subprocess("""
        import json, sys
        from tilewright.bench import environment
        print(json.dumps(sorted({"torch", "triton"} & set(sys.modules))))
    """)
        == []
    )


def test_environment_tells_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/someone/cache/triton")
    monkeypatch.setenv("TILEWRIGHT_CHECK_DEVICE_VALUES", "1")
    monkeypatch.setenv("UNRELATED_SECRET", "hush")
    record = environment.collect()
    assert record["torch"]["version"] == torch.__version__
    assert record["environment"]["TILEWRIGHT_CHECK_DEVICE_VALUES"] == "1"
    assert record["environment"]["TRITON_CACHE_DIR"] == ".../triton"
    text = json.dumps(record) + environment.format(record)
    assert torch.__version__ in environment.format(record)
    assert "someone" not in text
    assert "hush" not in text
    assert str(Path(__file__).parent.parent) not in text


# The gate


def test_wrong_provider_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    single = timing.HostTimer.single

    def count(self: timing.HostTimer, calls: Sequence[Callable[[], Any]]) -> timing.Timing:
        timed.append(len(calls))
        return single(self, calls)

    monkeypatch.setattr(timing.HostTimer, "single", count)
    result = bench(tmp_path, providers=["wrong"], directions=["forward"], workloads=["rows 16"])
    n_own = 3  # copy bandwidth at start and end, and the empty kernel
    assert len(timed) == n_own
    (record,) = found(result, "wrong")
    assert record["status"] == "wrong"
    assert "DISAGREES" in record["reason"]
    assert "single" not in record
    assert "stream" not in record
    assert record in result.wrong
    bench(tmp_path, providers=["good"], directions=["forward"], workloads=["rows 16"])
    assert len(timed) == 2 * n_own + 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gate(direction: Direction) -> None:
    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], direction, torch.bfloat16, torch.device("cpu"))
    gate = Gate(chosen, task)
    verdicts = {
        provider.name: gate.judge(provider.prepare([task]))
        for provider in chosen.chosen(["good", "rounded", "wrong", "unwritten", "copy"])
    }
    assert {name for name, verdict in verdicts.items() if verdict.ok} >= {"good", "rounded", "copy"}
    assert not verdicts["wrong"].ok
    if direction == "forward":
        assert not verdicts["unwritten"].ok
    assert verdicts["rounded"].less_precise == "rounds twice"
    assert verdicts["good"].worst <= 1.0 < verdicts["wrong"].worst


def test_gate_rejects_another_dtype_and_another_shape() -> None:
    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], "forward", torch.bfloat16, torch.device("cpu"))
    (exact,) = chosen.formulation.evaluate(task)
    for results in ((exact.float(),), (exact[:-1],), (exact, exact), ()):
        prepared = Prepared(calls=(lambda: None,), results=lambda returned, results=results: results)
        assert not Gate(chosen, task).judge(prepared).ok
    assert Gate(chosen, task).judge(Prepared(calls=(lambda: None,), results=lambda returned: (exact,))).ok


def test_given_outputs_are_poisoned() -> None:
    """A provider that writes nothing must not pass on the strength of what lay in its output before."""
    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], "forward", torch.bfloat16, torch.device("cpu"))
    (exact,) = chosen.formulation.evaluate(task)
    output = exact.clone()
    lazy = Prepared(calls=(lambda: output,), results=lambda returned: (returned,), outputs=(output,))
    assert not Gate(chosen, task).judge(lazy).ok
    assert Gate(chosen, task).judge(replace(lazy, calls=(lambda: output.copy_(exact),))).ok


def test_data_is_random_and_backward_has_gradients() -> None:
    task = runner.make_task(suite("scaling"), FAMILY.workloads[1], "backward", torch.bfloat16, torch.device("cpu"))
    assert task.args[0].requires_grad
    assert not task.args[1].requires_grad
    for tensor in (task.args[0].detach(), *task.grads):
        assert tensor.unique().numel() > 100
        assert tensor.dtype == torch.bfloat16


# Timing


class TickingClock:
    """Each look at it costs one millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def test_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once a call, every sample takes 1 ms, whatever the machine does."""
    timer = timing.HostTimer(EFFORT, clock=TickingClock(), cache_bytes=CACHE)
    monkeypatch.setattr(timing, "make_timer", lambda device, quick: timer)
    result = bench(tmp_path, providers=["good"], directions=["forward"], workloads=["rows 64"])
    (record,) = found(result, "good")
    n_bytes = 2 * 64 * 64 * 2
    assert record["bytes"] == n_bytes
    assert record["single"]["median_us"] == pytest.approx(1000.0)
    assert record["single"]["gb_per_s"] == pytest.approx(n_bytes / 1e-3 / 1e9)
    copy = result.records[0]["copy_gb_per_s"]
    copied = 2 * EFFORT.copy_bytes
    assert copy["single"] == pytest.approx(copied / 1e-3 / 1e9)
    assert record["single"]["share"] == pytest.approx(n_bytes / copied)
    # A stream sample is one millisecond for a whole round of calls.
    assert record["stream"]["calls"] == record["sets"]
    assert record["stream"]["median_us"] == pytest.approx(1000.0 / record["sets"])
    assert copy["stream"] == pytest.approx(copied / (1e-3 / timing.LEAST_SETS) / 1e9)
    assert record["stream"]["share"] == pytest.approx(n_bytes * record["sets"] / (copied * timing.LEAST_SETS))


def test_copy_bandwidth_is_the_higher_of_start_and_end(tmp_path: Path) -> None:
    first = bench(tmp_path, providers=["copy"], directions=["forward"], workloads=["rows 64"]).records[0]
    for protocol in ("single", "stream"):
        both = [first["copy"][when][protocol]["gb_per_s"] for when in ("start", "end")]
        assert first["copy_gb_per_s"][protocol] == max(both)
        assert first["empty_us"][protocol] > 0


def test_sets_cover_the_cache_four_times() -> None:
    cache = 50 * 2**20
    for n_bytes in (2**19, 10**6, 2**24, cache, 2**28, 2**32):
        n_sets = timing.set_count(n_bytes, cache)
        assert n_sets >= 3
        assert n_sets * n_bytes >= 4 * cache
        assert n_sets == 3 or (n_sets - 1) * n_bytes < 4 * cache  # and no more memory than that takes
    assert timing.set_count(64, cache) == timing.MOST_SETS


def test_stream_goes_round_all_sets_and_keeps_results_apart() -> None:
    order: list[int] = []

    def call(index: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            order.append(index)
            return torch.empty(1024)

        return run

    kept: list[Any] = [None] * 5
    timing._go_round([call(index) for index in range(5)], kept, 3)
    assert order == [0, 1, 2, 3, 4] * 3
    assert len({tensor.data_ptr() for tensor in kept}) == 5


def test_too_small_for_a_cold_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_SETS", 4)
    result = bench(tmp_path, providers=["good"], directions=["forward"])
    cold = {record["workload"]: record["cold"] for record in found(result, "good")}
    assert not cold["rows 4 columns 64"]
    assert f"{result.records[1]['workload']}: too small for a cold cache" in report.to_markdown(result.path)


class FakeDevice:
    """A device module on the CPU, whose work costs nothing and whose events are apart by what was launched between."""

    def __init__(self, capture_fails: bool = False) -> None:
        self.launches = 0
        self.replays = 0
        self.streams: list[Any] = []
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                assert outer.streams  # never on the default stream
                self.at = outer.launches

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) * 1e-3

        class CPUGraph:
            def replay(self) -> None:
                outer.replays += 1
                outer.launches += self.captured

        @contextmanager
        def graph(made: Any, stream: Any) -> Iterator[None]:
            assert stream is outer.streams[-1]
            before = outer.launches
            yield
            if capture_fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            made.captured, outer.launches = outer.launches - before, before

        self.Event, self.CPUGraph, self.graph = Event, CPUGraph, graph

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(L2_cache_size=CACHE)

    def Stream(self, device: torch.device) -> Any:
        return object()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    def synchronize(self, device: torch.device) -> None:
        pass

    def call(self) -> None:
        self.launches += 2  # an operation of two kernels


@pytest.mark.parametrize("capture_fails", [False, True])
def test_device_protocols(monkeypatch: pytest.MonkeyPatch, capture_fails: bool) -> None:
    device = FakeDevice(capture_fails)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    effort = replace(EFFORT, stream_us=100.0)
    timer = timing.DeviceTimer(torch.device("cpu", 0), effort)
    assert timer.cache_bytes == CACHE
    with timer.scope():
        single = timer.single([device.call] * 3)
        stream = timer.stream([device.call] * 5)
    assert (single.method, single.samples, single.median_us) == ("events", effort.single, 2.0)
    assert stream.samples == effort.stream
    assert stream.median_us == pytest.approx(2.0)
    assert stream.calls == 50  # ten times round five calls of two microseconds
    if capture_fails:
        assert stream.method == "launches"
        assert "operation not permitted" in stream.note
        assert device.replays == 0
    else:
        assert (stream.method, stream.note) == ("graph", "")
        assert device.replays == effort.stream + 2
    assert timer.peak_memory(device.call) is None  # this device does not count memory


def test_quantiles() -> None:
    samples = [float(value) for value in range(101)]
    timed = timing.summarise(samples[::-1], method="events", calls=1)
    assert (timed.q10_us, timed.q25_us, timed.median_us, timed.q75_us, timed.q90_us) == (10, 25, 50, 75, 90)


def test_twins_keep_strides_and_sharing() -> None:
    packed = torch.randn(4, 6)
    left, right = packed[:, :2], packed[:, 2:]
    row = torch.randn(1, 6).expand(4, 6)
    a, b, c, rest = twins((left, right, row, "option"))
    for twin, original in ((a, left), (b, right), (c, row)):
        assert torch.equal(twin, original)
        assert twin.stride() == original.stride()
        assert twin.data_ptr() != original.data_ptr()
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert rest == "option"


# Records


def test_records_round_trip(tmp_path: Path) -> None:
    result = bench(tmp_path, workloads=["rows 16"], providers=["good", "rounded", "absent", "picky", "failing"])
    assert list(result.records) == records.read(result.path)
    assert [json.loads(line) for line in result.path.read_text().splitlines()] == list(result.records)
    first = result.records[0]
    assert first["record"] == "run"
    assert first["environment"]["torch"]["version"] == torch.__version__
    assert first["providers"]["absent"]["missing"] == "not installed"
    assert len(records.results(result.records)) == 2 * 4  # the absent one has none
    assert {record["provider"] for record in records.hosts(result.records)} == {"good", "rounded", "picky", "failing"}
    good = next(record for record in records.hosts(result.records) if record["provider"] == "good")
    assert good["host_us"] > 0
    assert good["host_grad_us"] > 0


def test_failures_are_listed_and_the_others_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, workloads=["rows 64"], providers=["failing", "refusing", "picky", "good"])
    for direction in ("forward", "backward"):
        status = {p: found(result, p, direction)[0] for p in ("failing", "refusing", "picky", "good")}
        assert status["failing"]["status"] == "failed"
        assert status["failing"]["reason"] == "ValueError: cannot open .../thing.so"
        assert status["refusing"]["status"] == "unsupported"
        assert status["picky"] | {"status": "unsupported", "reason": "too many rows"} == status["picky"]
        assert status["good"]["status"] == "ok"


def test_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "out", workloads=["rows 16"], providers=["good", "interrupting"])
    assert not list(tmp_path.rglob("*"))


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records.write(path, [{"record": "run", "format": records.FORMAT, "worst": float("inf")}])
    before = path.read_text()
    assert records.read(path)[0]["worst"] is None  # JSON has no infinity

    def broken() -> Iterator[dict[str, Any]]:
        yield {"record": "run", "format": records.FORMAT}
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        records.write(path, broken())
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "{}\n", "not json\n", '{"record": "result"}\n', '{"record": "run", "format": 0}\n']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=r"other\.jsonl"):
        records.read(path)


# Reports and plots


def test_markdown(tmp_path: Path) -> None:
    result = bench(tmp_path, providers=["good", "rounded", "wrong", "absent", "copy"])
    text = report.to_markdown(result.path)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    sections = text.split("### ")[1:-1]
    assert [section.splitlines()[0] for section in sections] == ["rows", "wide rows"]
    for section in sections:
        widths = {line.count("|") for line in section.splitlines() if line.startswith("|")}
        assert len(widths) == 1
    assert sum("**good**" in line for line in tables) == len(FAMILY.workloads)  # alone in doing the whole job rightly
    assert sum("| ~rounded |" in line for line in tables) == len(FAMILY.workloads)
    assert all("wrong" in line.split("|")[3] for line in tables if line.split("|")[2].strip() == "wrong")
    assert "absent is not measured: not installed" in text
    assert "wrong is wrong and was not timed" in text
    assert f"torch {torch.__version__}" in text


def test_fastest_is_neither_copy_nor_less_precise() -> None:
    def record(provider: str, median: float, status: str = "ok", less_precise: str = "") -> dict[str, Any]:
        gate = {"less_precise": less_precise}
        return {"provider": provider, "status": status, "gate": gate, "stream": {"median_us": median}}

    measured = [
        record("copy", 1.0),
        record("rounded", 2.0, less_precise="rounds twice"),
        {"provider": "wrong", "status": "wrong"},
        record("slow", 4.0),
        record("fast", 3.0),
    ]
    leader = records.best(measured)
    assert leader is not None
    assert leader["provider"] == "fast"
    assert records.best(measured[:3]) is None


def test_terminal_output(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(record=True, width=120, file=open(tmp_path / "terminal", "w"))  # noqa: SIM115
    result = bench(tmp_path / "out", providers=["good", "wrong", "copy"], quiet=False, console=console)
    console.file.close()
    text = console.export_text()
    for workload in FAMILY.workloads:
        assert workload.name in text
    assert "wrong is wrong and was not timed" in text
    assert result.path.name in text


def test_plots(tmp_path: Path) -> None:
    result = bench(tmp_path / "run", providers=["good", "rounded", "wrong", "copy"])
    assert {figure.name for figure in result.figures} >= {f"{result.path.stem}-rows.png"}
    figures = plots.draw(result.path, tmp_path / "figures")
    assert len(figures) == 2 * len(plots.FORMATS)
    assert all(figure.stat().st_size > 1000 for figure in figures)
    members = [record for record in records.results(result.records) if record["status"] == "ok"]
    drawn = plots._figure(result.records[0], "rows", [record for record in members if record["sweep"] == "rows"])
    assert [panel.get_title() for panel in drawn.axes] == ["forward", "backward"]
    for panel in drawn.axes:
        assert panel.get_ylim()[0] == 0.0
        lines = {line.get_label(): line for line in panel.get_lines() if not line.get_label().startswith("_")}
        assert set(lines) == {"good", "~rounded", "copy"}
        assert list(lines["good"].get_xdata()) == [4, 16, 64]
        assert list(lines["good"].get_ydata()) == [
            record["stream"]["share"]
            for record in members
            if (record["sweep"], record["provider"], record["direction"]) == ("rows", "good", panel.get_title())
        ]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingDependencyError, match="rich"):
        bench(tmp_path, quiet=False)
    result = bench(tmp_path, providers=["good"], workloads=["rows 16"])  # quiet needs neither
    assert not result.figures
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        plots.draw(result.path, tmp_path)


# Arguments


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'scalling'.*scaling"):
        runner.run("scalling", device="cpu", output=tmp_path, quiet=True)
    with pytest.raises(UnknownNameError, match=r"'best'.*good"):
        bench(tmp_path, providers=["good", "best"])
    with pytest.raises(UnknownNameError, match=r"'rows 5'.*rows 4"):
        bench(tmp_path, workloads=["rows 5"])
    for argument, value in (
        ("dtype", "float16"),
        ("dtype", "nonsense"),
        ("directions", ["sideways"]),
        ("directions", []),
    ):
        with pytest.raises(ArgumentError) as caught:
            bench(tmp_path, **{argument: value})
        assert caught.value.argument == argument
    with pytest.raises(ArgumentError) as caught:
        bench(tmp_path, device="nowhere")
    assert caught.value.argument == "device"
    with pytest.raises(ArgumentError, match="device"):
        bench(tmp_path, device="meta")
    assert not list(tmp_path.iterdir())


def test_max_bytes(tmp_path: Path) -> None:
    small = FAMILY.workloads[1].bytes_moved(torch.bfloat16, "forward")
    result = bench(tmp_path, providers=["good"], max_bytes=small)
    assert {record["workload"] for record in found(result, "good")} == {"rows 4 columns 64", "rows 16 columns 64"}
    with pytest.raises(BenchmarkError, match="no workload is left"):
        bench(tmp_path, max_bytes=1)


def test_quick_run_measures_the_largest_of_each_sweep(tmp_path: Path) -> None:
    result = bench(tmp_path, providers=["good"], quick=True)
    assert [record["workload"] for record in found(result, "good")] == ["rows 64 columns 64", "rows 8 columns 512"]


def test_output_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.jsonl"
    assert bench(path, providers=["good"], workloads=["rows 16"]).path == path
    assert path.exists()


def test_broken_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: timing.HostTimer) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing.HostTimer, "synchronize", broken)
    with pytest.raises(BenchmarkError, match="'failing' has broken the device"):
        bench(tmp_path, providers=["failing"], workloads=["rows 16"])
    assert not list(tmp_path.iterdir())


# Compilation


def test_compiled_provider_survives_many_shapes_and_repeated_backwards() -> None:
    """More shapes than Dynamo recompiles for, each with one graph, and a backward that runs more than once."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compile_ = torch.compile
    chosen = suite("scaling")
    provider = FunctionProvider("compile", "for a test", lambda task: scale, compiled=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
        for rows in range(2, 14):
            task: Task = runner.make_task(chosen, Rows("rows", rows), "backward", torch.float32, torch.device("cpu"))
            prepared = provider.prepare([task, task.twin()])
            verdict = Gate(chosen, task).judge(prepared)
            assert verdict.ok, verdict.reason
            for call in prepared.calls * 2:
                call()
    assert counter.frame_count == 12


def test_compiled_backward_runs_twice_over_one_graph() -> None:
    """The samples of a backward share one graph, here one that has saved an intermediate result."""

    def normalised(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * factor + shift

    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], "backward", torch.float32, torch.device("cpu"))
    compile_ = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
        prepared = FunctionProvider("compile", "for a test", lambda task: normalised, compiled=True).prepare([task])
    (first,) = prepared.results(prepared.calls[0]())
    (second,) = prepared.results(prepared.calls[0]())
    (expected,) = evaluate(normalised, task)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


# Rotary embedding: what peers are handed, and what they are judged against


class InPlaceRotation(torch.autograd.Function):
    """A peer that rotates q and k [batch, heads, tokens, head_dim] in place, in the tables' dtype."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.tables = cos, sin
        for x in (q, k):
            assert x.transpose(1, 2).is_contiguous()  # what its kernel wants
            InPlaceRotation.turn(x, cos, sin)
        return q.view_as(q), k.view_as(k), cos.view_as(cos), sin.view_as(sin)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, *_tables: Any) -> Any:
        cos, sin = ctx.tables
        for x in (dq, dk):
            InPlaceRotation.turn(x, cos, -sin)
        return dq, dk, None, None

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        x.data.copy_(x.data * cos[:, None] + turned * sin[:, None])


def rotate_by_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    from tilewright.bench.rope import plain

    assert x.dtype == cos.dtype, "Input and cos/sin must have the same dtype"
    return plain(x, cos.float(), sin.float(), interleaved=interleaved)[0]


def rotate_by_angles(
    x: torch.Tensor, freqs: torch.Tensor, *, tensor_format: str, interleaved: bool, fused: bool
) -> torch.Tensor:
    from tilewright.bench.rope import plain

    assert fused
    assert tensor_format == "bshd"
    assert freqs.shape == (x.shape[1], 1, 1, x.shape[3])
    half = freqs[:, 0, 0, ::2] if interleaved else freqs[:, 0, 0, : x.shape[3] // 2]
    return plain(x, half.cos(), half.sin(), interleaved=interleaved)[0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_providers_pass_the_gate(monkeypatch: pytest.MonkeyPatch, direction: Direction, interleaved: bool) -> None:
    from tilewright.bench import peers
    from tilewright.ops.rope.spec import RopeWorkload

    stubs = {
        peers.LIGER: SimpleNamespace(LigerRopeFunction=InPlaceRotation),
        peers.FLASH_ATTENTION: SimpleNamespace(apply_rotary_emb=rotate_by_tables),
        peers.TRANSFORMER_ENGINE: SimpleNamespace(apply_rotary_pos_emb=rotate_by_angles),
    }
    monkeypatch.setattr(peers, "import_module", stubs.__getitem__)
    chosen = suite("rope")
    workload = RopeWorkload("test", 1, 2, 33, 4, 32, kv_heads=2, interleaved=interleaved)
    task = runner.make_task(chosen, workload, direction, torch.bfloat16, torch.device("cpu"))
    assert len(task.wrt) == 2
    gate = Gate(chosen, task)
    before = [value.clone() for value in (*task.args, *task.grads)]
    for provider in chosen.providers:
        if provider.name in {"triton", "compile", "compile_hf"}:  # compiled ones are plain functions, as below
            continue
        if provider.name == "liger" and interleaved:
            assert provider.accepts(task) == "has no interleaved pairs"
            continue
        assert provider.accepts(task) is None
        verdict = gate.judge(provider.prepare([task, task.twin()]))
        assert verdict.ok, (provider.name, verdict.reason)
        assert bool(verdict.less_precise) == (provider.name in {"liger", "flash_attn", "triton_hf"}), provider.name
    for value, kept in zip((*task.args, *task.grads), before, strict=True):
        assert torch.equal(value, kept)  # nobody has written into the task


def test_less_precise_rope_is_told_apart() -> None:
    """Tables and arithmetic in x's dtype pass by their own roundings, and the record shows what they cost."""
    from tilewright.bench import rope
    from tilewright.ops.rope.spec import RopeWorkload

    chosen = suite("rope")
    workload = RopeWorkload("test", 1, 1, 128, 4, 64)
    task = runner.make_task(chosen, workload, "forward", torch.bfloat16, torch.device("cpu"))
    results = evaluate(rope.hugging_face, rope.hugging_face_task(task))
    own = Prepared(calls=(lambda: None,), results=lambda _: results, formulation=rope.HUGGING_FACE)
    gate = Gate(chosen, task)
    loose = gate.judge(own)
    full = gate.judge(replace(own, results=lambda _: evaluate(rope.plain, task), formulation=None))
    assert loose.ok
    assert full.ok
    assert (bool(loose.less_precise), bool(full.less_precise)) == (True, False)
    assert loose.rms_error > 1.2 * full.rms_error > 0.0
