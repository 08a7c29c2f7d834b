"""Who computes the norms and the rotation of queries and keys, for the benchmark."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tilewright.bench import rms_norm, rope
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
    import torch

    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Arguments, Workload


def suite() -> Suite:
    """Everything that the benchmark of ``qk_norm_rope`` needs."""
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
            "three_kernels",
            "tilewright's Triton kernels one after the other: a norm for each of q and k, then the rotation of both",
            lambda task: three_kernels,
            missing=no_kernels,
            refuses=partial(not_chosen, "triton"),
        ),
        FunctionProvider("eager", "plain PyTorch, fp32 tables", lambda task: plain),
        FunctionProvider(
            "compile",
            "torch.compile(dynamic=False) of plain PyTorch, fp32 tables",
            lambda task: plain,
            compiled=True,
        ),
        FunctionProvider("reference", "tilewright's definition", partial(public_function, "reference")),
        CopyProvider(),
    )
    return Suite(
        family=family("qk_norm_rope"),
        formulation=Formulation("fp32 tables, fp32 arithmetic, the norm rounded before it is rotated", by_reference),
        wrt=_wrt,
        providers=providers,
        on_request=frozenset({"reference"}),
        reduced=reduced,
    )


def three_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    **options: Any,
) -> Tensors:
    """The steps, each a launch of its own."""
    import tilewright

    q = tilewright.rms_norm(q, q_weight, impl="triton")
    k = tilewright.rms_norm(k, k_weight, impl="triton")
    return tilewright.rope_qk(q, k, cos, sin, impl="triton", **options)


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    **options: Any,
) -> Tensors:
    """Both steps as one writes them in PyTorch; see those of ``rms_norm`` and ``rope``."""
    (q,), (k,) = rms_norm.plain(q, q_weight), rms_norm.plain(k, k_weight)
    return rope.plain(q, k, cos, sin, **options)


def reduced(task: Task) -> tuple[int, ...]:
    """How many rows each result sums over: one, but for the weights' gradients, which sum over all heads."""
    if task.direction == "forward":
        return 1, 1
    q, k = task.args[:2]
    return 1, 1, *(x.numel() // x.shape[-1] for x in (q, k))


def _wrt(workload: Workload, arguments: Arguments) -> tuple[int, ...]:
    return tuple(range(4))  # everything but the tables
