"""``if`` in a kernel: decided while it is compiled, or a region of the program that the device may skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdsl.dialects.scf import IfOp, YieldOp

from tilewright.npu.front.values import (
    DYN_IF_HINT,
    FLOAT,
    UNDECIDED,
    UNKNOWN,
    Block,
    Flag,
    Index,
    Origin,
    Return,
    Tensor,
    Undefined,
    guess,
)
from tilewright.npu.symbols import UNBOUNDED, Symbolic

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
    """Interpret both branches, each from the same names, and keep what they agree about. Nothing of it is built."""
    before, ends = dict(k.names), []
    last: Return | None = None
    with k.unbuilt(node):
        for body in (node.body, node.orelse):
            k.names = dict(before)
            try:
                k.run(body)
            except Return as end:
                last = end
                k.returned.append(end.value)
            else:
                ends.append(k.names)
    if not ends:
        assert last is not None
        raise Return(last.node, k.returned.pop())
    k.names = ends[0]
    if len(ends) == 2:
        first, second = ends
        names = first.keys() | second.keys()
        k.names = {name: common(node, first.get(name, UNKNOWN), second.get(name, UNKNOWN)) for name in names}


def common(node: ast.AST, first: Any, second: Any) -> Any:
    """What a name stands for behind two paths of which either may be taken: what rules can say of both values."""
    if same(first, second):
        return first
    if isinstance(first, Index) and isinstance(second, Index):
        return first  # all that counts is that it was read from a table
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return tuple(common(node, x, y) for x, y in zip(first, second, strict=True))
    if isinstance(first, Block) and isinstance(second, Block):
        return _common_block(node, first, second)
    if _can_be_yielded([first, second]):
        guessed = first.guessed or second.guessed
        return Tensor(first.shape, first.dtype, Origin("if", node, (first, second)), None, guessed)
    if isinstance(first, float) and isinstance(second, float):
        return FLOAT
    return _guessed(node, first, second)


def _guessed(node: ast.AST, first: Any, second: Any) -> Any:
    """A tensor where it is one on one path, and nothing is known of the other."""
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Tensor) and other is UNKNOWN:
            return guess(Origin("if", node, (one,)), one.shape, one.dtype)
    return UNKNOWN


def same(first: Any, second: Any) -> bool:
    """Whether two values are one: the same object, or equal numbers, texts and tuples of such."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        return repr(first) == repr(second)
    return bool(first == second)


def _common_block(node: ast.AST, first: Block, second: Block) -> Any:
    """A block pointer that is at either of two places."""
    if first.base is not second.base or first.shape != second.shape or first.sizes != second.sizes:
        return UNKNOWN
    line = getattr(node, "lineno", 0)
    offsets = tuple(
        x if same(x, y) or (isinstance(x, Index) and isinstance(y, Index)) else Symbolic.atom(f"if@{line}", UNBOUNDED)
        for x, y in zip(first.offsets, second.offsets, strict=True)
    )
    return Block(first.base, first.shape, first.strides, offsets, first.sizes, first.order, first.node, first.made)


def _run_time(k: Interpreter, node: ast.If, condition: Flag) -> None:
    before = dict(k.names)
    bodies = (node.orelse, node.body) if condition.negated else (node.body, node.orelse)
    regions: list[Region | None] = []
    ends: list[dict[str, Any]] = []
    for body in bodies:
        k.names = dict(before)
        if k.builder is None:
            _body(k, body)
            regions.append(None)
        else:
            with k.builder.region() as region:
                _body(k, body)
            regions.append(region)
        ends.append(k.names)
    k.names = dict(before)
    yielded = []
    for name in sorted(set().union(*ends)):
        values = [end.get(name) for end in ends]
        if same(*values):
            k.names[name] = values[0]
        elif UNKNOWN in values:
            k.names[name] = _guessed(node, *values)
        elif _can_be_yielded(values):
            yielded.append(name)
        else:
            missing = any(name not in end for end in ends)
            why = "it has a value on one way only" if missing else "it is no tensor of one shape on both ways"
            k.names[name] = Undefined(f"depends on whether a partition is skipped: {why}")
    _yield(k, node, condition, regions, yielded, ends)


def _body(k: Interpreter, body: list[ast.stmt]) -> None:
    """Interpret what the device runs or does not run."""
    try:
        k.run(body)
    except Return as end:
        k.report("SYNTAX", end.node, "a kernel does not end inside of an if that the device decides")
        k.leave_out(end.node)


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
    complete = condition.value is not None and all(end[name].value is not None for end in ends for name in names)
    if k.builder is not None and complete:
        types = [ends[0][name].value.type for name in names]
        for region, end in zip(regions, ends, strict=True):
            assert region is not None
            region.block.add_op(YieldOp(*(end[name].value for name in names)))
        made = k.builder.add(IfOp(condition.value, types, *regions), k.span(node))  # type: ignore[arg-type]
        values = list(made.results)
    elif k.builder is not None:
        k.leave_out(node)
    for name, value in zip(names, values, strict=True):
        if value is not None:
            k.builder.name(value, name)  # type: ignore[union-attr]
        both = [end[name] for end in ends]
        k.names[name] = Tensor(
            both[0].shape,
            both[0].dtype,
            Origin("if", node, tuple(both)),
            value,
            any(each.guessed for each in both),
        )
