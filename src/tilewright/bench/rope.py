"""Who computes rotary embedding, for the benchmark."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tilewright.bench import peers
from tilewright.bench.providers import (
    CopyProvider,
    Formulation,
    FunctionProvider,
    Provider,
    Suite,
    by_reference,
    evaluate,
    no_kernels,
    not_chosen,
    public_function,
)

if TYPE_CHECKING:
    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Arguments, Workload


def suite() -> Suite:
    """Everything that the benchmark of ``rope`` needs."""
    from tilewright.ops import family

    providers: tuple[Provider, ...] = (
        FunctionProvider(
            "triton",
            "tilewright's Triton kernel",
            partial(public_function, "triton"),
            missing=no_kernels,
            refuses=partial(not_chosen, "triton"),
        ),
        FunctionProvider(
            "triton_hf",
            "tilewright's Triton kernel on half-width tables in x's dtype, the precision of Hugging Face's",
            partial(public_function, "triton"),
            translate=peers.rounded_tables,
            formulation=lambda task: peers.ROUNDED_TABLES,
            missing=no_kernels,
            refuses=partial(not_chosen, "triton"),
        ),
        FunctionProvider("eager", "plain PyTorch, fp32 tables", lambda task: plain, refuses=_only_bshd),
        FunctionProvider(
            "compile",
            "torch.compile(dynamic=False) of plain PyTorch, fp32 tables",
            lambda task: plain,
            compiled=True,
            refuses=_only_bshd,
        ),
        FunctionProvider(
            "compile_hf",
            "torch.compile(dynamic=False) of the Hugging Face formulation: full-width tables in x's dtype",
            lambda task: hugging_face,
            translate=hugging_face_task,
            formulation=lambda task: HUGGING_FACE,
            compiled=True,
            refuses=_only_bshd,
        ),
        FunctionProvider("reference", "tilewright's definition", partial(public_function, "reference")),
        *peers.rope_providers(HUGGING_FACE, _only_bshd),
        CopyProvider(),
    )
    return Suite(
        family=family("rope"),
        formulation=Formulation("fp32 tables, fp32 arithmetic, one rounding", by_reference),
        wrt=_wrt,
        providers=providers,
        on_request=frozenset({"reference"}),
    )


def plain(*args: torch.Tensor, layout: str = "bshd", interleaved: bool = False) -> Tensors:
    """Rotary embedding as one writes it in PyTorch: fp32 tables, so fp32 arithmetic, and one rounding at the end.

    Args:
        *args: one or more tensors [batch, tokens, heads, head_dim], then the fp32 tables ``cos`` and ``sin``
            [positions, pairs]. Lanes past twice the number of pairs pass through.
        layout: for the signature; ``"bshd"``.
        interleaved: whether pairs are neighbours or halves.
    """
    *tensors, cos, sin = args
    return tuple(_plain_one(x, cos, sin, interleaved) for x in tensors)


def _plain_one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    n_tokens, pairs = x.shape[1], cos.shape[-1]
    cos, sin = cos[:n_tokens, None, :], sin[:n_tokens, None, :]  # [tokens, 1, pairs]
    turning, passing = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        x1, x2 = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        x1, x2 = turning[..., :pairs], turning[..., pairs:]
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    turned = turned.to(x.dtype)
    return torch.cat((turned, passing), dim=-1) if passing.shape[-1] else turned


def hugging_face(*args: torch.Tensor, interleaved: bool = False, **_options: Any) -> Tensors:
    """Rotary embedding as in Hugging Face's models: ``x * cos + rotated(x) * sin``, all of it in x's dtype.

    Args:
        *args: one or more tensors [batch, tokens, heads, head_dim], then ``cos`` and ``sin`` expanded to the full
            width, [1, tokens, head_dim], in x's dtype.
        interleaved: whether pairs are neighbours or halves.
    """
    *tensors, cos, sin = args
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [1, tokens, 1, head_dim]
    return tuple(x * cos + _quarter_turn(x, interleaved) * sin for x in tensors)


def _quarter_turn(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def hugging_face_task(task: Task) -> Task:
    """The task with tables as :func:`hugging_face` takes them: expanded, and rounded to the workload's dtype."""
    *tensors, cos, sin = task.args
    n_tokens = tensors[0].shape[1]
    tables = []
    for table in (cos, sin):
        rows = table[:n_tokens].to(task.dtype)
        wide = rows.repeat_interleave(2, dim=-1) if task.kwargs.get("interleaved") else torch.cat((rows, rows), dim=-1)
        tables.append(wide.unsqueeze(0))
    return replace(task, args=(*tensors, *tables))


HUGGING_FACE = Formulation(
    "tables and arithmetic in x's dtype",
    evaluate=lambda task: evaluate(hugging_face, hugging_face_task(task)),
    truth=lambda task: evaluate(hugging_face, hugging_face_task(task).in_double()),
    less_precise="tables rounded to x's dtype; judged against eager PyTorch with the same roundings",
)


def _wrt(workload: Workload, arguments: Arguments) -> tuple[int, ...]:
    return tuple(range(len(arguments.args) - 2))  # everything but the tables


def _only_bshd(task: Task) -> str | None:
    layout = task.kwargs.get("layout", "bshd")
    if layout != "bshd":
        return f"written for layout 'bshd', not '{layout}'"
    if task.args[0].shape[-1] < 2 * task.args[-2].shape[-1]:
        return "written for tables of half the head's width at most"
    return None
