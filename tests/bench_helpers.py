"""The family that the tests of the benchmark's harness measure, scaling a matrix, and ways to run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tilewright.bench import providers as registry
from tilewright.bench import records, runner, timing
from tilewright.bench.providers import CopyProvider, Formulation, FunctionProvider, Suite, evaluate, register
from tilewright.errors import ImplementationError
from tilewright.ops.contract import Arguments, Direction, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pytest

    from tilewright.bench.providers import Provider

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


def use_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is known, and measured with few samples and a small cache."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
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
