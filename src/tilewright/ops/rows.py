"""How the rows of tensors of one shape lie in memory: what kernels that work along the last dimension need to know."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


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

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.outer * self.inner


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
