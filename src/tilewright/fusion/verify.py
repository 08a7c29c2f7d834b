"""Running a replacement beside what it replaces, on random tensors of the graph's shapes, before it is put in."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from tilewright.fusion.graph import hint, needed, value
from tilewright.numerics import difference, is_fp8

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Graph, Node

_DIVISIONS = (torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar)


def disagreement(graph: Graph, built: Mapping[Node, Node], *, differs: bool = False) -> str:
    """Why a replacement's results are not those of what it replaces; empty if they are.

    What counts as equal is said by :func:`tilewright.numerics.difference`.

    Args:
        graph: with both in it.
        built: for each node that is to be replaced, the one that takes its place.
        differs: whether the replacement is known to round elsewhere; then numbers may be off by a few roundings of the
            largest.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    inner = _between(built)
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        known: dict[Node, Any] = {}
        for node in graph.nodes:
            if node.op == "output" or (node not in inner and not any(user in inner for user in node.users)):
                continue
            known[node] = _run(node, known) if node in inner else _random(node, len(known))
        for old, new in built.items():
            why = difference(known[new], known[old], differs=differs)
            if why:
                return f"run beside what it replaces, {old.name} differs: {why}"
    return ""


def _between(built: Mapping[Node, Node]) -> set[Node]:
    """The nodes that only one of the two ways needs."""
    either = set(needed(built)) ^ set(needed(built.values()))
    return {node for node in either if node.op == "call_function"}


def _run(node: Node, known: Mapping[Node, Any]) -> Any:
    spread: Any = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
    args, kwargs = spread
    if node.target is operator.getitem:
        return operator.getitem(*args)
    if node.target in _DIVISIONS and isinstance(args[1], float | int) and args[0].dtype == torch.float32:
        # On a GPU PyTorch would multiply by the number's rounded reciprocal; the graph asks for a division.
        return torch.div(args[0], torch.tensor(args[1], dtype=torch.float32, device=args[0].device))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _random(node: Node, seed: int) -> Any:
    """Something like what a node holds, in its layout: floats of a normal distribution, few different integers."""
    held = value(node)
    if not isinstance(held, torch.Tensor):
        return hint(held) if isinstance(held, torch.SymInt) else held
    whole, strides = [hint(size) for size in held.shape], [hint(size) for size in held.stride()]
    sizes = [1 if stride == 0 else size for size, stride in zip(whole, strides, strict=True)]  # what is expanded
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty_strided(sizes, strides, dtype=held.dtype, device=held.device)
    if held.dtype.is_floating_point or held.dtype.is_complex:
        wide = torch.complex64 if held.dtype.is_complex else torch.float32
        given = torch.randn(sizes, generator=generator, dtype=wide)
        if held.dim() == 0 or held.numel() == 1:
            given = given.abs() + 0.5 if not held.dtype.is_complex else given  # a scale
    else:
        given = torch.randint(0, 2, sizes, generator=generator)
    if is_fp8(held.dtype):
        return given.to(held.device).to(held.dtype).expand(whole)
    return made.copy_(given.to(held.dtype)).expand(whole)
