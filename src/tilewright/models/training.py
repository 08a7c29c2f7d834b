"""Training a decoder, so that two runs from one seed differ in nothing but parts and dtype."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.models.decoder import Decoder, DecoderConfig
from tilewright.models.text import batches, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tilewright.models.parts import Parts
    from tilewright.models.text import Corpus

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""The dtypes a training can compute in. bfloat16 means autocast over float32 weights."""


@dataclass(frozen=True)
class Recipe:
    """How a decoder is trained: AdamW, the learning rate rising linearly and then falling along a cosine to a tenth.

    Attributes:
        batch: windows of text in a step.
        learning_rate: its highest value.
        warmup: steps in which it rises, at most a third of all.
        weight_decay: of the matrices; norms have none.
        clip: the largest norm of the gradient.
    """

    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = min(self.warmup, steps // 3)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return self.learning_rate * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * progress)))


@dataclass(frozen=True)
class TrainingRun:
    """A finished training.

    Attributes:
        model: the trained decoder.
        dtype: what it computed in.
        losses: nats per byte, one per step, before that step's update.
        step_seconds: one per step: forward, backward and update, with the device synchronised around.
        tokens_per_step: bytes predicted in a step.
        peak_bytes: the most device memory allocated while training; None on a CPU.
    """

    model: Decoder = field(repr=False)
    dtype: torch.dtype
    losses: tuple[float, ...] = field(repr=False)
    step_seconds: tuple[float, ...] = field(repr=False)
    tokens_per_step: int
    peak_bytes: int | None

    @property
    def median_step_seconds(self) -> float:
        """The median step, the first tenth (two steps at least) left out as warm-up where there are more."""
        warmup = max(2, len(self.step_seconds) // 10)
        return statistics.median(self.step_seconds[warmup:] or self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Bytes learnt from in a second, at the median step."""
        return self.tokens_per_step / self.median_step_seconds


def train(
    config: DecoderConfig,
    parts: Parts,
    corpus: Corpus,
    *,
    steps: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    recipe: Recipe | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingRun:
    """Train a decoder from scratch. Weights and batches depend on ``seed``, never on ``parts``, device or dtype.

    Args:
        config: the decoder's sizes.
        parts: who computes its swappable parts.
        corpus: what it learns from.
        steps: how many batches it sees.
        seed: draws weights and batches.
        device: where it trains.
        dtype: float32; bfloat16, which means autocast over float32 weights; or float64.
        recipe: how it is trained; ``Recipe()`` if None.
        on_step: called behind each step with its number, from 1, and its loss. Its time is not measured.

    Raises:
        ArgumentError: ``steps`` is below 1, or the text is shorter than the context.
        DTypeError: ``dtype`` is none of the three.
    """
    if steps < 1:
        raise ArgumentError("train", "steps", f"got {steps}, expected 1 or more")
    if dtype not in DTYPES:
        raise DTypeError("train", "dtype", f"got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    recipe = recipe or Recipe()
    device = torch.device(device)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    model = Decoder(config, parts, seed=seed, device=device, dtype=weight_dtype)
    optimizer = _optimizer(model, recipe)
    data = batches(corpus.train, steps=steps, batch=recipe.batch, context=config.context, seed=seed)
    losses, step_seconds = [], []
    _forget_peak(device)
    for step, (inputs, targets) in enumerate(data):
        inputs, targets = inputs.to(device), targets.to(device)  # noqa: PLW2901
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, steps)
        synchronise(device)
        began = time.perf_counter()
        loss = _step(model, optimizer, inputs, targets, recipe, dtype)
        synchronise(device)
        step_seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        if on_step:
            on_step(step + 1, losses[-1])
    n_tokens = recipe.batch * config.context
    return TrainingRun(model, dtype, tuple(losses), tuple(step_seconds), n_tokens, _peak(device))


def _step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
) -> torch.Tensor:
    with computing_in(dtype, model.device):
        loss = model.loss(inputs, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _optimizer(model: Decoder, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups: Iterable[dict[str, object]] = (
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    )
    # On a CPU torch's default goes through the weights one operator at a time.
    fused = True if model.device.type == "cpu" else None
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a model computes in ``dtype``: autocast for bfloat16, nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.no_grad()
def validation_loss(run: TrainingRun, corpus: Corpus, *, batch: int = 16) -> float:
    """Nats per byte over the whole validation part, in the dtype of the training."""
    model = run.model
    total, n_bytes = 0.0, 0
    for inputs, targets in windows(corpus.validation, batch=batch, context=model.config.context):
        with computing_in(run.dtype, model.device):
            loss = model.loss(inputs.to(model.device), targets.to(model.device))
        total += loss.item() * targets.numel()
        n_bytes += targets.numel()
    return total / n_bytes


def synchronise(device: torch.device) -> None:
    """Wait for ``device``; a CPU is never waited for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
