"""How the rows of tensors of one shape lie in memory: what kernels that work along the last dimension need to know."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Rows(NamedTuple):
    """Rows as ``outer x inner`` of them.

    Attributes:
        outer: rows along the outer axis.
        inner: rows along the inner axis; 1 where one stride is enough for all rows.
        strides: the two strides of each tensor, in elements, as ``(outer, inner)``.
    """

    outer: int
    inner: int
    strides: tuple[tuple[int, int], ...]

    def strides_of(self, tensors: Iterable[torch.Tensor | None]) -> tuple[tuple[int, int], ...]:
        """The strides of the same tensors in the same order, zeros for each None in between."""
        found = iter(self.strides)
        return tuple((0, 0) if t is None else next(found) for t in tensors)


def alignment(strides: Sequence[int]) -> int:
    """What the beginnings of all rows are multiples of, in elements: a power of two up to 16."""
    return math.gcd(*strides, 16)


def rows(tensors: Sequence[torch.Tensor], *, any_order: bool = False) -> Rows | None:
    """The rows of tensors that agree in all dimensions but the last.

    Args:
        tensors: at least one, each with at least one dimension.
        any_order: rows may be counted in the first tensor's order in memory instead of that of its dimensions.

    Returns:
        None where a tensor's columns do not lie next to each other, or its rows need more than two strides.
    """
    first = tensors[0]
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in tensors):
        return None
    axes = [d for d in range(first.dim() - 1) if first.shape[d] != 1]
    if any_order:
        axes.sort(key=first.stride, reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []  # (size, stride of each tensor), outermost first
    for d in axes:
        size, strides = first.shape[d], tuple(x.stride(d) for x in tensors)
        if merged and all(o == s * size for o, s in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        return None
    if len(merged) < 2:
        outer, strides = merged[0] if merged else (1, (0,) * len(tensors))
        return Rows(outer, 1, tuple((stride, 0) for stride in strides))
    (outer, outer_strides), (inner, inner_strides) = merged
    return Rows(outer, inner, tuple(zip(outer_strides, inner_strides, strict=True)))


def contiguous_twin(
    plan: Callable[..., Any], call: Any, inputs: Any, outputs: Any, written: Sequence[int] | None = None
) -> Callable[..., None]:
    """Plan a call on contiguous copies of tensors whose rows a kernel cannot walk.

    Args:
        plan: the planner, a function of ``(call, inputs, outputs)``.
        call: what it plans.
        inputs: a named tuple of tensors, None where there is none.
        outputs: likewise.
        written: places of the outputs that are written by ``copy_``, as the kernel cannot walk them either; by default
            all.
    """
    n_inputs = len(inputs)

    def dense(tensors: Any) -> list[torch.Tensor | None]:
        return [t if t is None else t.contiguous() for t in tensors]

    def fresh(tensors: Any) -> list[torch.Tensor | None]:
        return [
            t
            if t is None or (written is not None and place not in written)
            else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for place, t in enumerate(tensors)
        ]

    run = plan(call, type(inputs)(*dense(inputs)), fresh(outputs))

    def copied(tensors: Sequence[torch.Tensor | None], *scalars: int) -> None:
        outputs = tensors[n_inputs:]
        results = fresh(outputs)
        run((*dense(tensors[:n_inputs]), *results), *scalars)
        for output, result in zip(outputs, results, strict=True):
            if output is not None and result is not None and output is not result:
                output.copy_(result)

    return copied
