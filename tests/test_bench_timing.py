"""How the benchmark's harness takes times, on clocks and devices that say what they are told to."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench_helpers import CACHE, EFFORT, bench, found
from tilewright.bench import report, timing
from tilewright.bench.providers import twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("scaling_family")


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
