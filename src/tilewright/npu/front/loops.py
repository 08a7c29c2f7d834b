"""Loops of a kernel: unrolled; where the end is not known, a first step and any later one."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from tilewright.npu import language
from tilewright.npu.front import calls
from tilewright.npu.front.values import (
    UNDECIDED,
    UNKNOWN,
    Argument,
    Block,
    Flag,
    Index,
    Return,
    Runtime,
    Tensor,
)
from tilewright.npu.language.core import Builtin
from tilewright.npu.symbols import UNBOUNDED, Symbolic, lower_bound

if TYPE_CHECKING:
    from tilewright.npu.front.interpreter import Interpreter

MAX_UNROLLED = 65536
"""How many steps the loops of a kernel may have together."""

_MANY = 256
"""How many steps a loop may have that is unrolled where nothing is built."""


def loop(k: Interpreter, node: ast.For) -> None:
    """Interpret a ``for``."""
    values = _iterated(k, node)
    if values is None:
        once(k, node)
        return
    for value in values:
        k.steps += 1
        if k.steps > MAX_UNROLLED:
            message = f"the loops of a kernel can have {MAX_UNROLLED} steps together, as they are unrolled"
            if k.steps == MAX_UNROLLED + 1:
                k.report("RANGE", node.iter, message)
            k.leave_out(node)
            break
        k.assign(node.target, value)
        k.run(node.body)
    k.run(node.orelse)


def once(k: Interpreter, node: ast.For | ast.While) -> None:
    """Interpret a loop that cannot be unrolled for what can be found in it."""
    if isinstance(node, ast.For):
        for each in ast.walk(node.target):
            if isinstance(each, ast.Name):
                k.names[each.id] = _later(k, each.id, node.iter, UNBOUNDED)
    with k.unbuilt(node):
        try:
            k.run(node.body)
        except Return as end:
            k.returned.append(end.value)
        k.forget(node)
        k.run(node.orelse)


def _iterated(k: Interpreter, node: ast.For) -> list[Any] | None:
    """The values of a loop's variable; None if they cannot be known."""
    call = node.iter
    callee = k.evaluate(call.func) if isinstance(call, ast.Call) else None
    kind = callee.name if isinstance(callee, Builtin) else "range" if callee is range else ""
    if not isinstance(call, ast.Call) or kind not in {"static_range", "range"}:
        if callee is not UNKNOWN:
            k.report("RANGE", node.iter, "a loop that is not tl.static_range", "for i in tl.static_range(...):")
        if callee is None and isinstance(values := k.evaluate(call), tuple):
            return list(values)
        return None
    if kind == "range":
        name = ast.unparse(call.func)
        arguments = ", ".join(ast.unparse(each) for each in call.args)
        k.report("RANGE", call, f"{name} is a loop of the device", f"tl.static_range({arguments})")
    function = callee if isinstance(callee, Builtin) else language.FUNCTIONS["static_range"]
    bounds = calls.bound(k, call, function)
    if bounds is None:
        return None
    first, second, step = bounds["arg1"], bounds["arg2"], bounds["step"]
    start, stop = (0, first) if second is None else (first, second)
    step = 1 if step is None else step
    for each in (start, stop, step):
        if isinstance(each, Tensor | Index | Argument | Block | Flag | Runtime):
            k.report("RANGE", call, "the bounds of a loop are constexprs", "a tl.constexpr parameter as the bound")
            return None
        if each in (UNKNOWN, UNDECIDED):
            return None
        if not isinstance(each, int | Symbolic):
            k.report("RANGE", call, "the bounds of a loop are integers", "// instead of /")
            return None
    return _counted(k, node, call, start, stop, step)


def _counted(k: Interpreter, node: ast.For, call: ast.Call, start: Any, stop: Any, step: Any) -> list[Any] | None:
    if step == 0:
        k.report("RANGE", call, "a step of 0")
        return None
    if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
        values = range(start, stop, step)
        if values[MAX_UNROLLED:]:  # there may be more than len() can count
            k.report("RANGE", call, f"a loop of more than {MAX_UNROLLED} steps, which cannot be unrolled")
            return None
        if k.builder is not None or len(values) <= _MANY:
            return list(values)
    bound = UNBOUNDED
    if lower_bound(step) > 0:
        bound = lower_bound(start) + lower_bound(step)
    elif lower_bound(-step) > 0:
        bound = lower_bound(stop) + 1
    name = node.target.id if isinstance(node.target, ast.Name) else "i"
    return [start, _later(k, name, call, bound)]


def _later(k: Interpreter, name: str, node: ast.expr, least: float) -> Symbolic:
    """Any value of a loop's variable but the first one."""
    name = f"{name}@{node.lineno}"
    count = k.loops[name] = k.loops.get(name, 0) + 1
    return Symbolic.atom(name if count == 1 else f"{name}#{count}", least)
