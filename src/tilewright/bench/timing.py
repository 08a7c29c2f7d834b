"""How long a call takes, by two protocols that are always reported together.

``single``
    One launch at a time on a cold cache. Before each call a buffer larger than the device's last-level cache is
    overwritten; device events stand around the call. The buffer is overwritten as often as it takes to keep the device
    busy until the host has enqueued the call, so that the host's work is no part of the time. What is part of it: two
    events around a kernel that does nothing already lie about 3 us apart. That floor is measured in each run
    (``empty_us``) and recorded, never subtracted. The flush leaves modified lines in the cache, whose way to memory
    falls into the call; the copy that results are compared with pays for them as well.

``stream``
    Back-to-back launches from a device graph, which is how a model runs. The launches go round a number of copies of
    the inputs, each with its own outputs, which together are at least four times as large as the cache (and at least
    three), so each launch finds a cold cache here too. The time is that of a whole replay, divided by its launches.
    Where a provider cannot be captured, its launches are enqueued one by one and the record says so and why.

Both report the median and the 10, 25, 75 and 90 % quantiles. On a CPU the same is done with a wall clock.

What a device can do is taken from its own ``copy_``: bytes read and written, by the same two protocols, in the same
run. A result's share is its rate over the copy's rate by the same protocol.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tilewright.bench.environment import explain_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    Call = Callable[[], Any]

COLD_FACTOR = 4
"""How many times the cache the rotating sets are together."""

LEAST_SETS = 3
MOST_SETS = 1024
"""Bounds on the rotating sets. At the upper one a launch of under 240 KB may find some of its inputs in the cache."""

MOST_LAUNCHES = 2048
"""Bound on the launches of one stream sample."""

MOST_FLUSHES = 64
"""Bound on how often the cache is flushed before one call to hide the host's work."""

ASSUMED_CACHE = 32 * 2**20
"""Last-level cache in bytes of a device that does not say; on a CPU, also the most that is believed: a virtual
machine reports the cache of the whole socket, of which it has a part."""


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        single: samples of the single-launch protocol.
        stream: samples of the stream protocol.
        stream_us: least time that one stream sample shall take, so that its start and end do not count.
        copy_bytes: size of the buffer whose copy tells the device's bandwidth; twice as many bytes move.
        host_calls: calls timed in one repeat of the host's time per call.
        host_repeats: repeats, of which the fastest counts.
    """

    single: int
    stream: int
    stream_us: float
    copy_bytes: int
    host_calls: int
    host_repeats: int


DEVICE_FULL = Effort(single=100, stream=30, stream_us=2000.0, copy_bytes=2**30, host_calls=100, host_repeats=10)
DEVICE_QUICK = Effort(single=30, stream=10, stream_us=1000.0, copy_bytes=2**30, host_calls=100, host_repeats=3)
HOST_FULL = Effort(single=20, stream=10, stream_us=2000.0, copy_bytes=2**28, host_calls=50, host_repeats=5)
HOST_QUICK = Effort(single=5, stream=3, stream_us=0.0, copy_bytes=2**26, host_calls=30, host_repeats=3)


@dataclass(frozen=True)
class Timing:
    """Time per call by one protocol.

    Attributes:
        method: ``"events"`` and ``"graph"`` on a device, ``"launches"`` where no graph could be captured,
            ``"wall clock"`` on a CPU.
        median_us, q10_us, q25_us, q75_us, q90_us: microseconds per call.
        samples: how many samples they are drawn from.
        calls: calls in one sample.
        note: anything a reader should know, such as why no graph could be captured.
    """

    method: str
    median_us: float
    q10_us: float
    q25_us: float
    q75_us: float
    q90_us: float
    samples: int
    calls: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record in JSON's types."""
        return asdict(self)


def summarise(samples_us: Sequence[float], *, method: str, calls: int, note: str = "") -> Timing:
    """Median and quantiles of samples, each in microseconds per call.

    Example:
        >>> summarise([1.0, 2.0, 3.0], method="events", calls=1).median_us
        2.0
    """
    q10, q25, q75, q90 = (quantile(samples_us, part) for part in (0.10, 0.25, 0.75, 0.90))
    return Timing(method, statistics.median(samples_us), q10, q25, q75, q90, len(samples_us), calls, note)


def quantile(samples: Sequence[float], part: float) -> float:
    """The ``part`` quantile, interpolated linearly.

    Example:
        >>> quantile([0.0, 10.0], 0.25)
        2.5
    """
    ordered = sorted(samples)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def set_count(bytes_per_call: int, cache_bytes: int) -> int:
    """How many copies of the inputs a stream of calls goes round.

    Example:
        >>> set_count(50 * 2**20, 50 * 2**20), set_count(2**30, 50 * 2**20)
        (4, 3)
    """
    return min(MOST_SETS, max(LEAST_SETS, math.ceil(COLD_FACTOR * cache_bytes / max(1, bytes_per_call))))


def gb_per_s(n_bytes: int, microseconds: float) -> float:
    """Gigabytes (1e9 bytes) per second.

    Example:
        >>> gb_per_s(4_000_000, 1000.0)
        4.0
    """
    return n_bytes / microseconds / 1e3 if microseconds > 0 else math.inf


class Timer(Protocol):
    """Measures calls on one device. Everything it measures is made and called within :meth:`scope`."""

    @property
    def device(self) -> torch.device:
        """The device."""

    @property
    def cache_bytes(self) -> int:
        """Its last-level cache."""

    @property
    def effort(self) -> Effort:
        """How thoroughly it measures."""

    def scope(self) -> AbstractContextManager[None]:
        """Where tensors are made and calls are run."""

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""

    def single(self, calls: Sequence[Call]) -> Timing:
        """Time per call, one at a time on a cold cache."""

    def stream(self, calls: Sequence[Call], *, graphs: bool = True) -> Timing:
        """Time per call, back to back, going round ``calls``; in a graph where ``graphs`` and the device allow it."""

    def peak_memory(self, call: Call) -> int | None:
        """Bytes that a call needs above what is allocated before it, results included; None if nobody counts."""

    def host_us(self, call: Call) -> float:
        """Time on the host per call, launched back to back without waiting: the least of the repeats' medians."""


def make_timer(device: torch.device, quick: bool) -> Timer:
    """The timer for ``device``."""
    if device.type == "cpu":
        return HostTimer(HOST_QUICK if quick else HOST_FULL)
    return DeviceTimer(device, DEVICE_QUICK if quick else DEVICE_FULL)


class HostTimer:
    """Times calls on the CPU with a wall clock.

    Args:
        effort: how thoroughly to measure.
        clock: seconds, as ``time.perf_counter`` gives them.
        cache_bytes: the last-level cache; None to ask the machine.
    """

    def __init__(
        self, effort: Effort, clock: Callable[[], float] = time.perf_counter, cache_bytes: int | None = None
    ) -> None:
        self.device = torch.device("cpu")
        self.effort = effort
        self.cache_bytes = _host_cache_bytes() if cache_bytes is None else cache_bytes
        self._clock = clock
        self._flush = torch.empty(2 * self.cache_bytes, dtype=torch.uint8)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Nothing to enter."""
        yield

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def single(self, calls: Sequence[Call]) -> Timing:
        """Time per call, one at a time on a cold cache."""
        for call in calls[:LEAST_SETS]:
            call()
        samples = []
        for index in range(self.effort.single):
            self._flush.fill_(index % 256)
            start = self._clock()
            result = calls[index % len(calls)]()
            samples.append((self._clock() - start) * 1e6)
            del result  # giving memory back is not part of the call
        return summarise(samples, method="wall clock", calls=1)

    def stream(self, calls: Sequence[Call], *, graphs: bool = True) -> Timing:
        """Time per call, back to back, going round ``calls``; in a graph where ``graphs`` and the device allow it."""
        kept: list[Any] = [None] * len(calls)
        once = _wall_us(self._clock, calls, kept, 1)
        rounds = max(1, math.ceil(self.effort.stream_us / once)) if once > 0 else 1
        rounds = max(1, min(rounds, MOST_LAUNCHES // len(calls)))
        n_calls = rounds * len(calls)
        samples = [_wall_us(self._clock, calls, kept, rounds) / n_calls for _ in range(self.effort.stream)]
        return summarise(samples, method="wall clock", calls=n_calls)

    def peak_memory(self, call: Call) -> int | None:
        """None: nobody counts on a CPU."""
        return None

    def host_us(self, call: Call) -> float:
        """Time per call, launched back to back: the least of the repeats' medians."""
        return _host_us(self, self._clock, call)


class DeviceTimer:
    """Times calls on an accelerator with its events and graphs, all on one stream of its own.

    A backward runs on the stream of its forward, and a graph is captured on one stream: so there is only this one.
    """

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._module = torch.get_device_module(device)
        index = self._module.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self.effort = effort
        properties = self._module.get_device_properties(index)
        self.cache_bytes = int(getattr(properties, "L2_cache_size", 0) or ASSUMED_CACHE)
        self._stream = self._module.Stream(device=self.device)
        with self.scope():
            self._flush = torch.empty(max(2 * self.cache_bytes, 2**27), dtype=torch.uint8, device=self.device)
            self._flush_us = self._time_of_flush()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """On the device and on the timer's stream."""
        with self._module.device(self.device), self._module.stream(self._stream):
            yield

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        self._module.synchronize(self.device)

    def single(self, calls: Sequence[Call]) -> Timing:
        """Time per call, one at a time on a cold cache."""
        for call in calls[:LEAST_SETS]:
            call()
        self.synchronize()
        flushes = self._flushes(calls)
        pairs = []
        for index in range(self.effort.single):
            for _ in range(flushes):
                self._flush.fill_(index % 256)
            start, end = self._events()
            start.record()
            calls[index % len(calls)]()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return summarise([start.elapsed_time(end) * 1e3 for start, end in pairs], method="events", calls=1)

    def stream(self, calls: Sequence[Call], *, graphs: bool = True) -> Timing:
        """Time per call, back to back, going round ``calls``; in a graph where ``graphs`` and the device allow it."""
        kept: list[Any] = [None] * len(calls)
        _go_round(calls, kept, 1)  # compiles and loads whatever is still to be compiled and loaded
        once = self._elapsed_us(lambda: _go_round(calls, kept, 1))
        rounds = max(1, min(math.ceil(self.effort.stream_us / once), MOST_LAUNCHES // len(calls)))
        n_calls = rounds * len(calls)
        kept[:] = [None] * len(calls)
        graph, failure = self._capture(calls, rounds) if graphs else (None, "")
        if graph is None:
            replay: Call = lambda: _go_round(calls, kept, rounds)  # noqa: E731
        else:
            replay = graph.replay
        for _ in range(2):
            replay()
        pairs = []
        for _ in range(self.effort.stream):
            start, end = self._events()
            start.record()
            replay()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        samples = [start.elapsed_time(end) * 1e3 / n_calls for start, end in pairs]
        method = "launches" if graph is None else "graph"
        return summarise(samples, method=method, calls=n_calls, note=failure)

    def peak_memory(self, call: Call) -> int | None:
        """Bytes that a call needs above what is allocated before it, results included."""
        if not hasattr(self._module, "reset_peak_memory_stats"):
            return None
        self.synchronize()
        self._module.reset_peak_memory_stats(self.device)
        before = self._module.memory_allocated(self.device)
        result = call()
        self.synchronize()
        peak = int(self._module.max_memory_allocated(self.device)) - int(before)
        del result
        return peak

    def host_us(self, call: Call) -> float:
        """Time on the host per call, launched back to back without waiting: the least of the repeats' medians."""
        return _host_us(self, time.perf_counter, call)

    def _events(self) -> tuple[Any, Any]:
        return self._module.Event(enable_timing=True), self._module.Event(enable_timing=True)

    def _elapsed_us(self, call: Call) -> float:
        start, end = self._events()
        start.record()
        call()
        end.record()
        self.synchronize()
        return max(1e-3, float(start.elapsed_time(end)) * 1e3)

    def _time_of_flush(self) -> float:
        self._flush.fill_(1)
        return statistics.median(self._elapsed_us(lambda: self._flush.fill_(1)) for _ in range(5))

    def _flushes(self, calls: Sequence[Call]) -> int:
        """How many flushes keep the device busy for twice the time in which the host enqueues a call."""
        host = []
        for index in range(5):
            begin = time.perf_counter()
            calls[index % len(calls)]()
            host.append((time.perf_counter() - begin) * 1e6)
            self.synchronize()
        return max(1, min(MOST_FLUSHES, math.ceil(2 * statistics.median(host) / self._flush_us)))

    def _capture(self, calls: Sequence[Call], rounds: int) -> tuple[Any, str]:
        """A graph of ``rounds`` times all calls, or None and why there is none."""
        kind = getattr(self._module, f"{self.device.type.upper()}Graph", None)
        capture = getattr(self._module, "graph", None)
        if kind is None or capture is None:
            return None, "this device has no graphs"
        kept: list[Any] = [None] * len(calls)
        graph = kind()
        try:
            with capture(graph, stream=self._stream):
                _go_round(calls, kept, rounds)
        except Exception as error:  # whatever a provider does that cannot be captured
            del kept
            self.synchronize()
            return None, f"no graph could be captured: {explain_failure(error)}"
        return graph, ""


def bandwidth(timer: Timer) -> dict[str, Any]:
    """The rate of a large ``copy_`` within the device's memory, bytes read and written, by both protocols.

    Not in a graph: there a large copy becomes a node for the copy engines, which reach two thirds of the rate that
    kernels do, and a share of that would flatter.
    """
    size = timer.effort.copy_bytes
    seed = torch.randint(0, 256, (size,), dtype=torch.uint8, device=timer.device)
    pairs = [(seed if index == 0 else seed.clone(), torch.empty_like(seed)) for index in range(LEAST_SETS)]
    calls = [_copy_call(source, target) for source, target in pairs]
    single, stream = timer.single(calls), timer.stream(calls, graphs=False)
    return {
        "bytes": 2 * size,
        "single": {**single.to_json(), "gb_per_s": gb_per_s(2 * size, single.median_us)},
        "stream": {**stream.to_json(), "gb_per_s": gb_per_s(2 * size, stream.median_us)},
    }


def empty(timer: Timer) -> dict[str, float]:
    """Microseconds by both protocols of a kernel that writes one element: the floor under every time."""
    element = torch.ones(1, device=timer.device)
    calls: list[Call] = [lambda: element.fill_(1.0)] * LEAST_SETS
    return {"single": timer.single(calls).median_us, "stream": timer.stream(calls).median_us}


def _copy_call(source: torch.Tensor, target: torch.Tensor) -> Call:
    return lambda: target.copy_(source)


def _go_round(calls: Sequence[Call], kept: list[Any], rounds: int) -> None:
    """Call each in turn. A result stays in ``kept`` until its call comes round again: so results lie apart."""
    for _ in range(rounds):
        for index, call in enumerate(calls):
            kept[index] = None
            kept[index] = call()


def _wall_us(clock: Callable[[], float], calls: Sequence[Call], kept: list[Any], rounds: int) -> float:
    start = clock()
    _go_round(calls, kept, rounds)
    return (clock() - start) * 1e6


def _host_us(timer: Timer, clock: Callable[[], float], call: Call) -> float:
    for _ in range(10):
        call()
    medians = []
    for _ in range(timer.effort.host_repeats):
        timer.synchronize()
        samples = []
        for _ in range(timer.effort.host_calls):
            start = clock()
            call()
            samples.append((clock() - start) * 1e6)
        medians.append(statistics.median(samples))
    timer.synchronize()
    return min(medians)


def _host_cache_bytes() -> int:
    from pathlib import Path

    largest = 0
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = level.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        largest = max(largest, int(text.rstrip("KMG")) * unit)
    return min(largest, ASSUMED_CACHE) if largest else ASSUMED_CACHE
