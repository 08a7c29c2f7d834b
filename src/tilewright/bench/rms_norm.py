"""Who computes RMSNorm, for the benchmark."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tilewright.bench import norm_peers
from tilewright.bench.providers import (
    CopyProvider,
    Formulation,
    FunctionProvider,
    Provider,
    Suite,
    by_reference,
    no_kernels,
    not_chosen,
    public_function,
)

if TYPE_CHECKING:
    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Arguments, Workload


def suite() -> Suite:
    """Everything that the benchmark of ``rms_norm`` needs."""
    from tilewright.ops import family

    providers: tuple[Provider, ...] = (
        FunctionProvider(
            "triton",
            "tilewright's Triton kernels",
            partial(public_function, "triton"),
            missing=no_kernels,
            refuses=partial(not_chosen, "triton"),
        ),
        FunctionProvider("eager", "plain PyTorch, rounded before the weight multiplies", lambda task: plain),
        FunctionProvider(
            "compile",
            "torch.compile(dynamic=False) of plain PyTorch, rounded before the weight multiplies",
            lambda task: plain,
            compiled=True,
        ),
        FunctionProvider(
            "torch",
            "torch.nn.functional.rms_norm, of the sum that PyTorch adds where there is a residual",
            lambda task: functional,
            formulation=lambda task: AFTER_WEIGHT,
        ),
        FunctionProvider("reference", "tilewright's definition", partial(public_function, "reference")),
        *norm_peers.norm_providers(AFTER_WEIGHT_EXACT_SUM),
        CopyProvider(),
    )
    return Suite(
        family=family("rms_norm"),
        formulation=BEFORE_WEIGHT,
        wrt=_wrt,
        providers=providers,
        on_request=frozenset({"reference", "flashinfer_pdl"}),
        reduced=reduced,
    )


def plain(*args: torch.Tensor, eps: float = norm_peers.EPS) -> Tensors:
    """RMSNorm as one writes it in PyTorch: fp32 arithmetic, rounded before the weight multiplies and after.

    Args:
        *args: ``x [rows, columns]``; the residual, which is added to it, if there is one; the weight [columns].
        eps: added to the mean of squares.
    """
    *summands, weight = args
    z = sum(summands[1:], start=summands[0])
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(z.dtype) * weight
    return (y,) if len(summands) == 1 else (y, z)


def functional(*args: torch.Tensor, eps: float = norm_peers.EPS) -> Tensors:
    """RMSNorm by PyTorch's own function.

    Args:
        *args: as for :func:`plain`.
        eps: added to the mean of squares.
    """
    *summands, weight = args
    z = sum(summands[1:], start=summands[0])
    y = F.rms_norm(z, weight.shape, weight, eps)
    return (y,) if len(summands) == 1 else (y, z)


def in_double(task: Task) -> Task:
    """The task in float64. A sum that is rounded before it is normalised is rounded here."""
    n_summands = 2
    if len(task.args) > n_summands and task.kwargs.get("residual_rounding", "rounded") == "rounded":
        x, residual, *rest = task.args
        wide = torch.promote_types(x.dtype, torch.float32)
        stored = (x.detach().to(wide) + residual.detach().to(wide)).to(residual.dtype)
        pair = torch.zeros_like(x).requires_grad_(x.requires_grad), stored.requires_grad_(residual.requires_grad)
        task = replace(task, args=(*pair, *rest))
    return task.in_double()


def with_options(task: Task, cast: str, residual_rounding: str) -> Task:
    """The task of a norm with other rounding points; the sum's only where there is a sum."""
    options: dict[str, Any] = {"cast": cast}
    if task.function.startswith("add_"):
        options["residual_rounding"] = residual_rounding
    return replace(task, kwargs=task.kwargs | options)


def formulation(name: str, cast: str, residual_rounding: str) -> Formulation:
    """RMSNorm with these rounding points, judged against the definition with the same.

    Args:
        name: of the formulation.
        cast: where the norm is rounded.
        residual_rounding: what it is taken of, where there is a residual.
    """
    change = partial(with_options, cast=cast, residual_rounding=residual_rounding)
    return Formulation(
        name,
        evaluate=lambda task: by_reference(change(task)),
        truth=lambda task: by_reference(in_double(change(task))),
    )


BEFORE_WEIGHT = formulation("rounded before the weight, norm of the rounded sum", "before_weight", "rounded")
AFTER_WEIGHT = formulation("rounded after the weight, norm of the rounded sum", "after_weight", "rounded")
AFTER_WEIGHT_EXACT_SUM = formulation("rounded after the weight, norm of the exact sum", "after_weight", "exact")


def reduced(task: Task) -> tuple[int, ...]:
    """How many rows each result sums over: one, but for the weight's gradient, which sums over all."""
    x, *_, weight = task.args
    if task.direction == "forward":
        return (1,) * (len(task.args) - 1)  # the norm, and the sum where there is a residual
    n_rows = x.numel() // weight.numel()
    return tuple(n_rows if task.args[place] is weight else 1 for place in task.wrt)


def _wrt(workload: Workload, arguments: Arguments) -> tuple[int, ...]:
    return tuple(range(len(arguments.args)))  # every tensor
