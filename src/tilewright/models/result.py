"""What the demo found out: the data behind its table, its report and its JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from tilewright.models.decoder import DecoderConfig
    from tilewright.models.parts import Served
    from tilewright.numerics import Agreement

LAST_STEPS = 20
"""Over how many of the last steps a training loss is averaged; each batch differs from the next."""


@dataclass(frozen=True)
class Measured:
    """One training and what came of it.

    Attributes:
        name: the parts it used, for people.
        dtype: what it computed in, such as ``"float32"``.
        device: where it ran.
        losses: nats per byte, one per step.
        validation_loss: nats per byte over text it never saw.
        step_seconds: the median step.
        tokens_per_second: bytes learnt from in a second, at the median step.
        peak_bytes: the most device memory allocated while training; None on a CPU.
        served: who computed each part.
        sample: text it wrote behind the prompt; None if it was not asked for any.
    """

    name: str
    dtype: str
    device: str
    losses: tuple[float, ...] = field(repr=False)
    validation_loss: float
    step_seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    served: tuple[Served, ...]
    sample: str | None = field(repr=False)

    @property
    def last_loss(self) -> float:
        """The mean training loss of the last steps."""
        last = self.losses[-LAST_STEPS:]
        return sum(last) / len(last)


@dataclass(frozen=True)
class Fp8Loss:
    """The trained decoder again, the linear layers of its blocks computed from FP8.

    Attributes:
        scale_format: of the scales, such as ``"ue8m0"``.
        validation_loss: nats per byte over the text of :attr:`Measured.validation_loss`.
    """

    scale_format: str
    validation_loss: float


@dataclass(frozen=True)
class CompiledLoss:
    """The same again, its blocks written step by step and fused by the compiler.

    Attributes:
        scale_format: of the scales.
        validation_loss: nats per byte over the text of :attr:`Measured.validation_loss`.
        counts: how many times each rule fused, in all graphs.
        report: what became of every candidate, as text.
    """

    scale_format: str
    validation_loss: float
    counts: dict[str, int]
    report: str = field(repr=False)


@dataclass(frozen=True)
class NpuText:
    """A text that the decoder continued through kernels for NPUs, run on a CPU.

    Attributes:
        kernels: which kernels attended.
        kernel_calls: how often one was run.
        agrees: whether the text is, byte for byte, what the decoder's own attention gives.
        sample: what follows the prompt.
    """

    kernels: str
    kernel_calls: int
    agrees: bool
    sample: str


@dataclass(frozen=True)
class Comparison:
    """The same decoder trained three times, and how far the curves agree.

    Attributes:
        agrees: whether both curves agree within the numerics policy.
        agreement: how far.
        budget: the error that the policy allows tilewright's curve, one per step.
        plain: the training with plain PyTorch parts.
        tilewright: the training with tilewright's parts.
        truth: the training with plain PyTorch parts in float64, which both are held against.
        config: the decoder's sizes.
        n_parameters: how many weights the decoder has.
        tokens_per_step: bytes predicted in a step.
    """

    agrees: bool
    agreement: Agreement
    budget: tuple[float, ...] = field(repr=False)
    plain: Measured
    tilewright: Measured
    truth: Measured
    config: DecoderConfig
    n_parameters: int
    tokens_per_step: int

    @property
    def trainings(self) -> tuple[Measured, Measured, Measured]:
        """Plain, tilewright, truth."""
        return self.plain, self.tilewright, self.truth

    @property
    def steps(self) -> int:
        """How many steps each training made."""
        return len(self.plain.losses)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        steps = "the only step" if self.steps == 1 else f"all {self.steps} steps"
        if self.agrees:
            return f"The loss curves{self._with} agree within the numerics policy, over {steps}."
        return f"The loss curves{self._with} DISAGREE: the numerics policy, held against {steps}, is broken."

    @property
    def _with(self) -> str:
        return " with hyper-connections" if self.config.hc_mult > 1 else ""

    def to_json(self) -> dict[str, Any]:
        """The result in JSON's types; a number that is not finite becomes None."""
        plain: dict[str, Any] = _jsonable(asdict(self))
        for name, training in zip(("plain", "tilewright", "truth"), self.trainings, strict=True):
            plain[name]["last_loss"] = _jsonable(training.last_loss)
            plain[name]["served"] = [served._asdict() for served in training.served]
        return plain | {"steps": self.steps, "verdict": self.verdict}


@dataclass(frozen=True)
class DemoResult(Comparison):
    """Everything that the demo found out: a comparison, and what there is besides.

    Attributes:
        hyper: the comparison of the same decoder with hyper-connections.
        fp8: what the decoder trained with tilewright's parts loses when it is evaluated from FP8.
        compiled: the same through the compiler; None if it was not asked for.
        npu: what it continues the prompt with through kernels for NPUs; None if it was not asked for.
        corpus: the text's name.
        seed: drew weights, batches and samples.
        prompt: what the samples begin with.
        environment: versions and hardware.
        seconds: how long everything took.
        report: where the report lies; None if there is none.
    """

    hyper: Comparison
    fp8: tuple[Fp8Loss, ...]
    compiled: CompiledLoss | None
    npu: NpuText | None
    corpus: str
    seed: int
    prompt: str
    environment: dict[str, str]
    seconds: float
    report: Path | None

    @property
    def all_agree(self) -> bool:
        """Whether the curves of both comparisons agree, and the text that NPU kernels gave."""
        return self.agrees and self.hyper.agrees and (self.npu is None or self.npu.agrees)

    @property
    def fp8_lines(self) -> tuple[str, ...]:
        """What FP8 costs, a line for each scale format."""
        before = self.tilewright.validation_loss
        return tuple(
            f"FP8 linear layers, {fp8.scale_format} scales: validation loss {before:.4f} -> {fp8.validation_loss:.4f} "
            f"({100 * (fp8.validation_loss / before - 1):+.2f} %)"
            for fp8 in self.fp8
        )

    @property
    def compiled_line(self) -> str:
        """What graph fusion did and what the loss is, in a line; empty if it was not asked for."""
        if self.compiled is None:
            return ""
        fused = ", ".join(f"{number} {rule}" for rule, number in self.compiled.counts.items())
        return (
            f"The same written step by step and compiled, {self.compiled.scale_format} scales: "
            f"validation loss {self.compiled.validation_loss:.4f}; fused: {fused or 'nothing'}"
        )

    @property
    def npu_line(self) -> str:
        """How the text through NPU kernels compares, in a line; empty if it was not asked for."""
        if self.npu is None:
            return ""
        same = "the same text as" if self.npu.agrees else "ANOTHER TEXT THAN"
        return (
            f"Decoded through {self.npu.kernels}, kernels for an NPU, on a CPU ({self.npu.kernel_calls} calls): "
            f"{same} by the decoder's own attention"
        )

    def to_json(self) -> dict[str, Any]:
        """As :meth:`Comparison.to_json`."""
        return super().to_json() | {"hyper": self.hyper.to_json(), "all_agree": self.all_agree}


class Row(NamedTuple):
    """A training as a line of a table."""

    name: str
    dtype: str
    step_time: str
    tokens_per_second: str
    last_loss: str
    validation_loss: str
    peak_memory: str
    served_by: str


TABLE_HEADS = Row(
    "parts",
    "computes in",
    "step time",
    "tokens/s",
    f"loss, last {LAST_STEPS} steps",
    "validation loss",
    "peak memory",
    "served by",
)
"""What stands over the columns of :func:`table_rows`."""


def table_rows(result: Comparison) -> list[Row]:
    """The trainings as lines of a table, for the terminal and for the report."""
    return [
        Row(
            training.name,
            training.dtype,
            f"{training.step_seconds * 1e3:.1f} ms",
            f"{training.tokens_per_second:,.0f}",
            f"{training.last_loss:.4f}",
            f"{training.validation_loss:.4f}",
            "not measured" if training.peak_bytes is None else f"{training.peak_bytes / 2**20:,.0f} MiB",
            ", ".join(f"{served.operation}: {served.implementation}" for served in training.served),
        )
        for training in result.trainings
    ]


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
