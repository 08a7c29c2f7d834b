"""Other libraries' kernels, measured where they are installed and never required.

Each is called the way its own users call it, on the memory layout that it likes best. What a library needs besides
(tables in another form, views in another order) is made outside of the timing.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from tilewright.bench.providers import Formulation, FunctionProvider, by_reference, peer_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.bench.providers import Task

LIGER = "liger_kernel.ops.rope"
FLASH_ATTENTION = "flash_attn.layers.rotary"
TRANSFORMER_ENGINE = "transformer_engine.pytorch.attention.rope"


def rope_providers(
    hugging_face: Formulation, only_bshd: Callable[[Task], str | None]
) -> tuple[FunctionProvider, FunctionProvider, FunctionProvider]:
    """The peers that compute rotary embedding.

    Args:
        hugging_face: what a peer with tables and arithmetic in x's dtype is judged against.
        only_bshd: why a task is not in the layout that they are all called in.
    """
    return (
        FunctionProvider(
            "liger",
            "Liger Kernel's Triton kernel, q and k in place, half-width use of full-width tables in x's dtype",
            _liger,
            translate=_liger_task,
            results=lambda tensors: tuple(tensor.transpose(1, 2) for tensor in tensors[:2]),
            formulation=lambda task: hugging_face,
            missing=peer_missing(LIGER, "LigerRopeFunction"),
            refuses=lambda task: only_bshd(task) or _liger_refuses(task),
        ),
        FunctionProvider(
            "flash_attn",
            "flash-attention's Triton kernel, one launch each for q and k",
            _flash_attention,
            translate=_flash_attention_task,
            formulation=_flash_attention_formulation,
            missing=peer_missing(FLASH_ATTENTION, "apply_rotary_emb"),
            refuses=only_bshd,
        ),
        FunctionProvider(
            "transformer_engine",
            "TransformerEngine's fused kernel, angles instead of tables, one launch each for q and k",
            _transformer_engine,
            translate=_angles_task,
            formulation=lambda task: ANGLES,
            missing=peer_missing(TRANSFORMER_ENGINE, "apply_rotary_pos_emb"),
            refuses=only_bshd,
        ),
    )


def _liger(task: Task) -> Callable[..., Any]:
    function = import_module(LIGER).LigerRopeFunction

    def rotate(*args: torch.Tensor, **_options: Any) -> Any:
        return function.apply(*args)[:2]  # newer versions return the tables as well

    return rotate


def _liger_refuses(task: Task) -> str | None:
    if task.function != "rope_qk":
        return "takes q and k together, not one tensor"
    if task.kwargs.get("interleaved"):
        return "has no interleaved pairs"
    if task.args[0].shape[-1] != 2 * task.args[-2].shape[-1]:
        return "has no partial rotation"
    return None


def _liger_task(task: Task) -> Task:
    """Views [batch, heads, tokens, head_dim] of copies in the memory order that the kernel wants. It overwrites them,
    and the gradients as well, so both must be its own.
    """
    own = task.twin()
    *tensors, cos, sin = own.args

    def view(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().transpose(1, 2).requires_grad_(tensor.requires_grad)

    n_tokens = tensors[0].shape[1]
    tables = [torch.cat((rows, rows), -1).unsqueeze(0) for rows in (t[:n_tokens].to(own.dtype) for t in (cos, sin))]
    return replace(own, args=(*map(view, tensors), *tables), grads=tuple(map(view, own.grads)))


def _flash_attention(task: Task) -> Callable[..., Any]:
    function = import_module(FLASH_ATTENTION).apply_rotary_emb

    def rotate(*args: torch.Tensor, interleaved: bool = False, **_options: Any) -> Any:
        *tensors, cos, sin = args
        return tuple(function(x, cos, sin, interleaved) for x in tensors)

    return rotate


def _flash_attention_task(task: Task) -> Task:
    """The task itself, or with tables in x's dtype for the versions that take no others."""
    return task if _flash_attention_takes_fp32_tables(task) else rounded_tables(task)


def rounded_tables(task: Task) -> Task:
    """The task with tables rounded to x's dtype."""
    *tensors, cos, sin = task.args
    return replace(task, args=(*tensors, cos.to(task.dtype), sin.to(task.dtype)))


def _flash_attention_takes_fp32_tables(task: Task) -> bool:
    if task.dtype == torch.float32:
        return True
    device = task.args[0].device
    x = torch.ones(1, 1, 1, 32, dtype=task.dtype, device=device)
    table = torch.ones(1, 16, device=device)
    try:
        import_module(FLASH_ATTENTION).apply_rotary_emb(x, table, table)
    except AssertionError:  # "Input and cos/sin must have the same dtype"
        return False
    return True


def _flash_attention_formulation(task: Task) -> Formulation | None:
    return None if task.args[-1].dtype == torch.float32 else ROUNDED_TABLES


def _with_fp32_tables(task: Task) -> Task:
    *tensors, cos, sin = task.args
    return replace(task, args=(*tensors, cos.float(), sin.float()))


ROUNDED_TABLES = Formulation(
    "tables in x's dtype, fp32 arithmetic, one rounding",
    evaluate=lambda task: by_reference(_with_fp32_tables(rounded_tables(task))),
    truth=lambda task: by_reference(rounded_tables(task).in_double()),
    less_precise="tables rounded to x's dtype; judged against the definition on rounded tables",
)


def _transformer_engine(task: Task) -> Callable[..., Any]:
    function = import_module(TRANSFORMER_ENGINE).apply_rotary_pos_emb

    def rotate(*args: torch.Tensor, interleaved: bool = False, **_options: Any) -> Any:
        *tensors, angles = args
        return tuple(function(x, angles, tensor_format="bshd", interleaved=interleaved, fused=True) for x in tensors)

    return rotate


def _angles(task: Task) -> torch.Tensor:
    """The angles of the tables in fp32, [tokens, pairs], with what a table's scaling factor would add left out."""
    *tensors, cos, sin = task.args
    n_tokens = tensors[0].shape[1]
    return torch.atan2(sin[:n_tokens].double(), cos[:n_tokens].double()).float()


def _angles_task(task: Task) -> Task:
    """The task with full-width fp32 angles [tokens, 1, 1, head_dim] in place of tables."""
    angles = _angles(task)
    wide = angles.repeat_interleave(2, dim=-1) if task.kwargs.get("interleaved") else torch.cat((angles, angles), -1)
    return replace(task, args=(*task.args[:-2], wide[:, None, None, :].contiguous()))


def _with_angles_as_tables(task: Task, double: bool) -> Task:
    angles = _angles(task).double() if double else _angles(task)
    task = task.in_double() if double else task
    return replace(task, args=(*task.args[:-2], torch.cos(angles), torch.sin(angles)))


ANGLES = Formulation(
    "fp32 angles, fp32 arithmetic, one rounding",
    evaluate=lambda task: by_reference(_with_angles_as_tables(task, double=False)),
    truth=lambda task: by_reference(_with_angles_as_tables(task, double=True)),
)
