"""The demo: one decoder, trained with plain PyTorch parts and with tilewright's, and the truth in float64 beside them.

Both learn a real text from the same weights and the same batches. Their loss curves must agree within the numerics
policy; what they cost is measured; who served each operation is explained. The decoder trained with tilewright's parts
is evaluated once more, its linear layers computed from FP8. At the end the same comparison is made, over fewer steps,
of a decoder with hyper-connections.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from tilewright.errors import ArgumentError
from tilewright.models import report
from tilewright.models.decoder import Decoder, DecoderConfig, generate
from tilewright.models.fp8 import SCALE_FORMATS, compiled_validation_loss, fp8_validation_loss
from tilewright.models.parts import Parts
from tilewright.models.result import Comparison, CompiledLoss, DemoResult, Fp8Loss, Measured, NpuText
from tilewright.models.text import decode, encode, load_corpus
from tilewright.models.training import Recipe, computing_in, train, validation_loss
from tilewright.numerics import compare_curves, curve_budget
from tilewright.optional import require
from tilewright.platforms import amd, cpu, facts, nvidia, usable_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from tilewright.models.text import Corpus
    from tilewright.models.training import TrainingRun

Follow: TypeAlias = "Callable[[str, int, int, float], None]"
"""Takes a training's label, the steps made, all its steps, and its loss."""

PROMPT = b"Alice was "
"""What both samples begin with."""


@dataclass(frozen=True)
class Scale:
    """How large a demo is.

    Attributes:
        config: the decoder's sizes.
        recipe: how it is trained.
        steps: for how long.
        dtype: what the two compared trainings compute in: float32 or bfloat16.
        sample_bytes: how much text each of them writes.
        hc_mult: how many streams the hyper-connections keep.
        hyper_steps: how long the decoder with hyper-connections is trained; no longer than the other.
    """

    config: DecoderConfig
    recipe: Recipe
    steps: int
    dtype: torch.dtype
    sample_bytes: int = 400
    hc_mult: int = 4
    hyper_steps: int = 40


# Curves can only be compared while a rounding error stays one. Above a learning rate, which falls as the model grows,
# training multiplies every difference at each step until two correct runs part; both scales stay well below it.
SMALL = Scale(
    DecoderConfig(layers=2, width=128, heads=4, kv_heads=2, head_dim=32, ffn_width=352, context=128),
    Recipe(batch=8, learning_rate=1e-3, warmup=100),
    steps=400,
    dtype=torch.float32,
)
"""For a CPU of two cores."""

LARGE = Scale(
    DecoderConfig(layers=8, width=768, heads=12, kv_heads=4, head_dim=64, ffn_width=2048, context=256),
    Recipe(batch=16, learning_rate=4e-4, warmup=100),
    steps=300,
    dtype=torch.bfloat16,
    sample_bytes=600,
)
"""For a GPU that computes in float64 at a useful rate."""


def run(
    *,
    device: torch.device | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    output: str | Path | None = "report.html",
    json_output: bool = False,
    console: Console | None = None,
    quiet: bool = False,
    scale: Scale | None = None,
    compile: bool = False,
    npu: bool = False,
) -> DemoResult:
    """Train three times, compare, do so again with hyper-connections, and report.

    Args:
        device: where to train; if None the GPU if there is one, else the CPU.
        steps: how long to train; if None as long as ``scale`` says.
        seed: draws weights, batches and samples.
        output: the HTML report to write; None writes none.
        json_output: print the result as one JSON document and nothing else; progress goes to standard error.
        console: where to print; standard output if None.
        quiet: show no progress and print no table. ``json_output`` still prints its document.
        compile: also evaluate a decoder whose FP8 blocks are written step by step, with ``tilewright.compile``, and
            report what it fused.
        npu: also continue the prompt through kernels for NPUs, run on the CPU, and compare byte for byte.
        scale: how large the demo is; if None :data:`LARGE` on NVIDIA and AMD GPUs and :data:`SMALL` elsewhere.

    Returns:
        Everything measured; ``all_agree`` is the verdict.

    Raises:
        ArgumentError: an argument cannot be honoured, for example because ``output`` lies in no existing folder.
        MissingDependencyError: rich or matplotlib is needed and missing.
    """
    began = time.perf_counter()
    where = usable_device(device, "demo")
    scale = scale or (LARGE if facts(where).kind in (nvidia.KIND, amd.KIND) else SMALL)
    steps = scale.steps if steps is None else steps
    _check(scale, steps, seed, output)
    if npu:
        require("xdsl", "tilewright demo --npu", extra="npu")
    if not quiet:
        require("rich", "tilewright demo")
    trainings = _Trainings(scale, load_corpus(), seed)
    with _progress(console, json_output, quiet) as follow:
        curves, trained = trainings.comparison(scale.config, steps, where, follow, samples=True)
        fp8 = tuple(
            Fp8Loss(scale_format, fp8_validation_loss(trained, trainings.corpus, scale_format))
            for scale_format in SCALE_FORMATS
        )
        compiled = _compiled(trained, trainings.corpus) if compile else None
        npu_text = _through_npu_kernels(trained, scale) if npu else None
        streams = replace(scale.config, hc_mult=scale.hc_mult)
        hyper, _ = trainings.comparison(streams, min(steps, scale.hyper_steps), where, follow)
    result = DemoResult(
        **{field.name: getattr(curves, field.name) for field in fields(curves)},
        hyper=hyper,
        fp8=fp8,
        compiled=compiled,
        npu=npu_text,
        corpus=trainings.corpus.name,
        seed=seed,
        prompt=PROMPT.decode(),
        environment=environment(where),
        seconds=time.perf_counter() - began,
        report=None if output is None else Path(output),
    )
    if output is not None:
        report.write(result, output)
    if json_output:
        print(json.dumps(result.to_json()), file=console.file if console else sys.stdout)
    elif not quiet:
        from tilewright.models import terminal

        terminal.show(result, _console(console, json_output))
    return result


def _compiled(trained: TrainingRun, corpus: Corpus) -> CompiledLoss:
    scale_format = SCALE_FORMATS[0]
    loss, fusion = compiled_validation_loss(trained, corpus, scale_format)
    return CompiledLoss(scale_format, loss, fusion.counts, str(fusion))


def _through_npu_kernels(trained: TrainingRun, scale: Scale) -> NpuText:
    from tilewright.models.npu import KERNELS, decode_through_kernels

    model = Decoder(scale.config, Parts.plain())
    model.load_state_dict(trained.model.state_dict())
    decoded = decode_through_kernels(model, encode(PROMPT), scale.sample_bytes)
    return NpuText(KERNELS[0], decoded.kernel_calls, decoded.agrees, decode(decoded.text[len(PROMPT) :]))


class _Trainings:
    """What all trainings of a demo share."""

    def __init__(self, scale: Scale, corpus: Corpus, seed: int) -> None:
        self.scale = scale
        self.corpus = corpus
        self.seed = seed

    def comparison(
        self, config: DecoderConfig, steps: int, where: torch.device, follow: Follow, *, samples: bool = False
    ) -> tuple[Comparison, TrainingRun]:
        """Train a decoder three times and compare the curves; also the training with tilewright's parts itself."""
        dtype = self.scale.dtype
        plain, run_plain = self.one(config, Parts.plain(), steps, where, dtype, follow, sample=samples)
        tilewright, run_tilewright = self.one(config, Parts.tilewright(), steps, where, dtype, follow, sample=samples)
        truth, _ = self.one(config, Parts.plain(), steps, _truth_device(where), torch.float64, follow)
        agreement = compare_curves(tilewright.losses, plain.losses, truth.losses, dtype=dtype)
        comparison = Comparison(
            agrees=agreement.ok,
            agreement=agreement,
            budget=curve_budget(plain.losses, truth.losses, dtype=dtype),
            plain=plain,
            tilewright=tilewright,
            truth=truth,
            config=config,
            n_parameters=run_plain.model.n_parameters,
            tokens_per_step=run_plain.tokens_per_step,
        )
        return comparison, run_tilewright

    def one(
        self,
        config: DecoderConfig,
        parts: Parts,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        follow: Follow,
        *,
        sample: bool = False,
    ) -> tuple[Measured, TrainingRun]:
        """Train, validate and, if it is asked for, write a sample."""
        dtype_name = str(dtype).removeprefix("torch.")
        label = f"{parts.name}, {dtype_name}" + (f", {config.hc_mult} streams" if config.hc_mult > 1 else "")
        watched, notes = parts.observed()
        follow(label, 0, steps, float("nan"))
        trained = train(
            config,
            watched,
            self.corpus,
            steps=steps,
            seed=self.seed,
            device=device,
            dtype=dtype,
            recipe=self.scale.recipe,
            on_step=lambda step, loss: follow(label, step, steps, loss),
        )
        text = None
        if sample:
            with computing_in(dtype, device):
                written = generate(trained.model, encode(PROMPT), self.scale.sample_bytes, seed=self.seed)
            text = decode(written[len(PROMPT) :])
        measured = Measured(
            name=parts.name,
            dtype=dtype_name,
            device=str(device),
            losses=trained.losses,
            validation_loss=validation_loss(trained, self.corpus),
            step_seconds=trained.median_step_seconds,
            tokens_per_second=trained.tokens_per_second,
            peak_bytes=trained.peak_bytes,
            served=tuple(notes.values()),
            sample=text,
        )
        return measured, trained


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers depend on: versions and hardware, for people."""
    about = facts(device)
    hardware = about.name or f"{about.arch}, {torch.backends.cpu.get_cpu_capability()}, {about.n_units} cores"
    if device.type == cpu.KIND:
        hardware += f", {torch.get_num_threads()} threads"
    return {
        "tilewright": _version("tilewright"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device} ({hardware})",
    }


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _truth_device(device: torch.device) -> torch.device:
    """Where float64 can be computed: not every accelerator has it."""
    return device if facts(device).kind in (nvidia.KIND, amd.KIND) else torch.device(cpu.KIND)


def _check(scale: Scale, steps: int, seed: int, output: str | Path | None) -> None:
    # Before the training, so that nobody waits minutes for an error.
    if scale.dtype == torch.float64:
        raise ArgumentError(
            "demo", "scale", "got dtype float64, which is not quantised to FP8; expected float32 or bfloat16"
        )
    if steps < 1:
        raise ArgumentError("demo", "steps", f"got {steps}, expected 1 or more")
    if not 0 <= seed < 2**63:
        raise ArgumentError("demo", "seed", f"got {seed}, expected a number from 0 below 2**63")
    if output is not None:
        report.check_output(output)
        require("matplotlib", "the report of tilewright demo")


def _progress(console: Console | None, json_output: bool, quiet: bool) -> AbstractContextManager[Follow]:
    if quiet:
        return nullcontext(lambda label, step, steps, loss: None)
    from tilewright.models import terminal

    return terminal.progress(_console(console, json_output))


def _console(console: Console | None, json_output: bool) -> Console:
    """Where people read: standard error where standard output carries JSON."""
    from rich.console import Console

    return Console(stderr=True) if json_output else console or Console()
