"""Calls in a kernel: of the language, of other kernels, of Python."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from tilewright.npu import language
from tilewright.npu.front import arithmetic
from tilewright.npu.front.scope import PYTHON
from tilewright.npu.front.values import (
    FLOAT,
    UNDECIDED,
    UNKNOWN,
    Argument,
    Block,
    Flag,
    Foreign,
    Function,
    Index,
    Method,
    Runtime,
    Tensor,
)
from tilewright.npu.language.core import Builtin, constexpr, dtype
from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.npu.front.interpreter import Interpreter

_MAX_DEPTH = 32
_PROGRAM_ID = {"program_id", "num_programs"}
_LIKE_OPERANDS = {
    "cast", "clamp", "cumprod", "cumsum", "div_rn", "flip", "fma", "max_constancy", "max_contiguous", "multiple_of",
    "softmax", "sort", "sqrt_rn", "umulhi", "zeros_like",
}  # fmt: skip
"""Functions that nothing supports, and that give a tensor of their operands' shape."""

_ON_DEVICE = Tensor | Index | Flag | Runtime | Block | Argument


def call(k: Interpreter, node: ast.Call) -> Any:
    """The value of a call."""
    callee = k.evaluate(node.func)
    given = arguments(k, node)
    result = UNKNOWN if given is None else _called(k, node, callee, *given)
    if result is UNKNOWN:
        k.leave_out(node)
    return result


def arguments(k: Interpreter, node: ast.Call) -> tuple[list[Any], dict[str, Any]] | None:
    """What a call passes, by position and by name; None if that cannot be known."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    known = True
    for each in node.args:
        if isinstance(each, ast.Starred):
            several = k.evaluate(each.value)
            if isinstance(several, tuple):
                args += several
                continue
            known = False
            if several is not UNKNOWN:
                k.report("SYNTAX", each, "what is spread over arguments is a tuple")
        else:
            args.append(k.evaluate(each))
    for keyword in node.keywords:
        value = k.evaluate(keyword.value)
        if keyword.arg is None:
            known = False
            k.report("SYNTAX", keyword.value, "arguments are given one by one")
        else:
            kwargs[keyword.arg] = value
    return (args, kwargs) if known else None


def bound(k: Interpreter, node: ast.Call, function: Builtin) -> dict[str, Any] | None:
    """What a call of the language gives each parameter; None, and a report, if that does not fit."""
    given = arguments(k, node)
    if given is None or function.signature is None:
        return None
    try:
        found = function.signature.bind(*given[0], **given[1])
    except TypeError as error:
        k.report("SYNTAX", node, f"{function}: {error}")
        return None
    found.apply_defaults()
    return found.arguments


def _called(k: Interpreter, node: ast.Call, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    from tilewright.npu.kernel import JitFunction

    match callee:
        case _ if callee is UNKNOWN or isinstance(callee, Symbolic):  # a constexpr may be a function
            return UNKNOWN
        case Builtin():
            return builtin(k, node, callee, args, kwargs)
        case Method(receiver=receiver, name=name):
            return _method(k, node, receiver, name, args, kwargs)
        case Function():
            return _inline(k, node, callee, args, kwargs)
        case JitFunction():
            return _inline(k, node, Function(callee.module, callee.node, callee.scope), args, kwargs)
        case dtype():
            return _converted(k, node, callee, args) if len(args) == 1 and not kwargs else UNKNOWN
        case type() if callee is constexpr:
            return args[0] if args else UNKNOWN
        case Foreign(dotted=dotted):
            k.report("SYNTAX", node, f"{dotted} cannot be called in a kernel")
            return UNKNOWN
    return _python(k, node, callee, args, kwargs)


def _converted(k: Interpreter, node: ast.Call, to: dtype, args: list[Any]) -> Any:
    """``tl.float32(value)``."""
    from tilewright.npu.front import operations

    (value,) = args
    if isinstance(value, _ON_DEVICE):
        return operations.cast(k, node, value, to)
    if isinstance(value, int | float):
        return float(value) if to.is_floating() else int(value)
    if isinstance(value, Symbolic) or value is FLOAT:
        return FLOAT if to.is_floating() else value if isinstance(value, Symbolic) else UNKNOWN
    if value is not UNKNOWN:
        k.report("SYNTAX", node, f"{ast.unparse(node.args[0])} is no number")
    return UNKNOWN


def _python(k: Interpreter, node: ast.Call, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A function of Python, or of ``triton`` itself, of values that are known."""
    from tilewright.npu import triton

    known = {id(each): name for name, each in PYTHON.items()}
    if id(callee) not in known and callee not in (triton.cdiv, triton.next_power_of_2):
        k.report("SYNTAX", node, f"{ast.unparse(node.func)} cannot be called in a kernel")
        return UNKNOWN
    name = known.get(id(callee), "")
    values = (*args, *kwargs.values())
    if any(value in (UNKNOWN, UNDECIDED) for value in values):
        return UNKNOWN
    if any(isinstance(value, _ON_DEVICE) for value in values):
        hint = {"max": "tl.maximum", "min": "tl.minimum", "abs": "tl.abs"}.get(name, "")
        k.report("SYNTAX", node, f"{ast.unparse(node.func)} is Python's, and takes constexprs", hint)
        return UNKNOWN
    if any(isinstance(value, Symbolic) or value is FLOAT for value in values):
        if name == "float" or (FLOAT in values and name in {"abs", "max", "min"}):
            return FLOAT
        if name == "bool":
            return k.truth(node, args[0]) if len(args) == 1 else UNKNOWN
        if name == "int" and len(args) == 1 and isinstance(args[0], Symbolic):
            return args[0]
        if FLOAT in values:
            return UNKNOWN
    try:
        result = callee(*args, **kwargs)
    except (TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
        if not any(isinstance(value, Symbolic) for value in values):
            k.report("SYNTAX", node, f"{ast.unparse(node)}: {error}")
        return UNKNOWN
    return tuple(result) if isinstance(result, list | range) else result


def _method(k: Interpreter, node: ast.Call, receiver: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if name in {"to", "cast"}:
        from tilewright.npu.front import operations

        try:
            return operations.cast(k, node, receiver, *args, **kwargs)
        except TypeError:
            k.report("SYNTAX", node, f"'{name}' takes a dtype")
            return UNKNOWN
    function = language.FUNCTIONS.get(name)
    if isinstance(receiver, Tensor) and function is not None:
        return builtin(k, node, function, [receiver, *args], kwargs)
    where = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else "this"
    k.report("UNSUPPORTED_OP", node, f"'{name}' is no method of {where}")
    return UNKNOWN


def builtin(k: Interpreter, node: ast.expr, function: Builtin, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The value of a function of the language."""
    from tilewright.npu.front import memory, operations, special

    if function.signature is None:
        _refuse(k, node, function)
        return arithmetic.guessed(node, *args) if function.name in _LIKE_OPERANDS else UNKNOWN
    try:
        found = function.signature.bind(*args, **kwargs)
    except TypeError as error:
        k.report("SYNTAX", node, f"{function}: {error}")
        return UNKNOWN
    found.apply_defaults()
    handlers: dict[str, Callable[..., Any]] = special.HANDLERS if function.namespace == "rblib" else memory.HANDLERS
    if function.namespace == "tl":
        operations.judge(k, node, function)
    with k.judging(*args, *kwargs.values()):
        result = handlers[function.name](k, node, *found.args, **found.kwargs)
    if not _is_complete(result):
        k.leave_out(node)
    return result


def _refuse(k: Interpreter, node: ast.expr, function: Builtin) -> None:
    if function.name in _PROGRAM_ID:
        message = f"{function} has no meaning: the device runs one program, over all of the tensors"
        k.report("PROGRAM_ID", node, message, "tl.static_range over the blocks")
    else:
        k.report("UNSUPPORTED_OP", node, f"{function} is not supported by any release")


def _inline(k: Interpreter, node: ast.Call, function: Function, args: list[Any], kwargs: dict[str, Any]) -> Any:
    given = _parameters(function, args, kwargs)
    if given is None:
        shown = ast.unparse(function.node.args)
        k.report("SYNTAX", node, f"the arguments are not those of {function.node.name}({shown})")
        return UNKNOWN
    if k.depth >= _MAX_DEPTH or function.node.name in k.endless:
        if k.depth >= _MAX_DEPTH:
            k.endless.add(function.node.name)
            k.report("SYNTAX", node, f"calls of {function.node.name} are nested more than {_MAX_DEPTH} deep")
        return UNKNOWN
    with k.frame(function, given):
        return k.call_body(function.node)


def _parameters(function: Function, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a call of a kernel gives each of its parameters; None if that does not fit."""
    from tilewright.npu.front.interpreter import constant

    takes = function.node.args
    positional = [each.arg for each in (*takes.posonlyargs, *takes.args)]
    names = [*positional, *(each.arg for each in takes.kwonlyargs)]
    if takes.vararg or takes.kwarg or len(args) > len(positional) or set(kwargs) & set(positional[: len(args)]):
        return None
    given = dict(zip(positional, args, strict=False)) | kwargs
    for name, default in defaults(takes):
        if name not in given:
            given[name] = constant(default, function.scope)
    return given if set(given) == set(names) else None


def defaults(takes: ast.arguments) -> list[tuple[str, ast.expr]]:
    """The parameters that have defaults, and these."""
    positional = [*takes.posonlyargs, *takes.args]
    tail = positional[len(positional) - len(takes.defaults) :]
    pairs = [(each.arg, value) for each, value in zip(tail, takes.defaults, strict=True)]
    named = zip(takes.kwonlyargs, takes.kw_defaults, strict=True)
    return pairs + [(each.arg, value) for each, value in named if value is not None]


def _is_complete(result: Any) -> bool:
    """Whether what a function gave is in the program."""
    if isinstance(result, tuple):
        return all(_is_complete(each) for each in result)
    return result is not UNKNOWN and (not isinstance(result, Tensor | Index | Flag) or result.value is not None)
