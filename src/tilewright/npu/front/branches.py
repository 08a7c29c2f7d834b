"""``if`` in a kernel: decided while it is compiled, or a region of the program that the device may skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdsl.dialects.scf import IfOp, YieldOp

from tilewright.npu.front.values import DYN_IF_HINT, UNDECIDED, UNKNOWN, Flag, Index, Origin, Tensor, Undefined

if TYPE_CHECKING:
    import ast

    from xdsl.ir import Region, SSAValue

    from tilewright.npu.front.interpreter import Interpreter


def conditional(k: Interpreter, node: ast.If) -> None:
    """Interpret an ``if``."""
    condition = k.evaluate(node.test)
    if isinstance(condition, Flag):
        if not condition.compared or not condition.negated:
            k.report("DYN_IF", node.test, "a partition is skipped in one form only", DYN_IF_HINT)
        _run_time(k, node, condition)
        return
    truth = k.truth(node.test, condition)
    if truth is UNDECIDED:
        _either(k, node)
    else:
        k.run(node.body if truth else node.orelse)


def _either(k: Interpreter, node: ast.If) -> None:
    """Interpret both branches, each from the same names, and keep what they agree about."""
    builder, k.builder = k.builder, None
    before = dict(k.names)
    k.run(node.body)
    after, k.names = k.names, dict(before)
    k.run(node.orelse)
    k.builder = builder
    for name in after.keys() | k.names.keys():
        k.names[name] = _common(node, after.get(name, UNKNOWN), k.names.get(name, UNKNOWN))


def _common(node: ast.If, first: Any, second: Any) -> Any:
    """What a name stands for behind two branches of which either may be taken: what rules can say of both values."""
    if first is second:
        return first
    if isinstance(first, Index) and isinstance(second, Index):
        return first  # all that counts is that it was read from a table
    if _can_be_yielded([first, second]):
        return Tensor(first.shape, first.dtype, Origin("if", node, (first, second)))
    return UNKNOWN


def _run_time(k: Interpreter, node: ast.If, condition: Flag) -> None:
    before = dict(k.names)
    bodies = (node.orelse, node.body) if condition.negated else (node.body, node.orelse)
    regions: list[Region | None] = []
    ends: list[dict[str, Any]] = []
    for body in bodies:
        k.names = dict(before)
        if k.builder is None:
            k.run(body)
            regions.append(None)
        else:
            with k.builder.region() as region:
                k.run(body)
            regions.append(region)
        ends.append(k.names)
    k.names = dict(before)
    changed = [name for name in before if any(end.get(name) is not before[name] for end in ends)]
    yielded = [name for name in changed if _can_be_yielded([end[name] for end in ends])]
    why = "depends on whether the partition is skipped, and is no tensor of one shape that is defined before"
    for name in set(changed) | (set().union(*ends) - before.keys()):
        if any(end.get(name) is UNKNOWN for end in ends):
            k.names[name] = UNKNOWN
        else:
            k.names[name] = Undefined(why)
    _yield(k, node, condition, regions, yielded, ends)


def _can_be_yielded(values: list[Any]) -> bool:
    """Whether a program can choose between the values that a name has on two paths."""
    first, second = values
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.shape == second.shape and first.dtype == second.dtype


def _yield(
    k: Interpreter,
    node: ast.If,
    condition: Flag,
    regions: list[Region | None],
    names: list[str],
    ends: list[dict[str, Any]],
) -> None:
    """Join the two branches: the names that either changes get what the branch taken gives."""
    values: list[SSAValue | None] = [None] * len(names)
    source = k.scope.module.source
    complete = condition.value is not None and all(end[name].value is not None for end in ends for name in names)
    if k.builder is not None and complete:
        types = [ends[0][name].value.type for name in names]
        for region, end in zip(regions, ends, strict=True):
            assert region is not None
            region.block.add_op(YieldOp(*(end[name].value for name in names)))
        made = k.builder.add(IfOp(condition.value, types, *regions), source.span(node))  # type: ignore[arg-type]
        values = list(made.results)
    for name, value in zip(names, values, strict=True):
        if value is not None:
            value.name_hint = name
        ended = ends[0][name]
        k.names[name] = Tensor(ended.shape, ended.dtype, Origin("if", node, tuple(end[name] for end in ends)), value)
