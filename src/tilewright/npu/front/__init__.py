"""From a kernel's source to its program, or to what is wrong with it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import IntegerAttr, StringAttr

from tilewright.errors import ArgumentError, NpuKernelError
from tilewright.npu.front.builder import Builder
from tilewright.npu.front.calls import defaults
from tilewright.npu.front.interpreter import Interpreter, constant
from tilewright.npu.front.paths import Choices, NoSuchWay, ways
from tilewright.npu.front.scope import FileScope, LiveScope, Scope
from tilewright.npu.front.special import FLASH_HINT
from tilewright.npu.front.values import UNKNOWN, Argument, TensorSpec
from tilewright.npu.ir.dialect import integers
from tilewright.npu.ir.text import NAME, encoded
from tilewright.npu.module import constexpr_names, parameters
from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xdsl.dialects.builtin import ModuleOp
    from xdsl.ir import Attribute

    from tilewright.npu.diagnostics import Diagnostics
    from tilewright.npu.module import KernelModule
    from tilewright.npu.shapes import Shape

__all__ = [
    "FileScope",
    "LiveScope",
    "Parameter",
    "TensorSpec",
    "build",
    "check_kernels",
    "constexpr_names",
    "interface",
    "parameters",
]


def check_kernels(module: KernelModule, diagnostics: Diagnostics) -> None:
    """Interpret every kernel of a module with symbols for its sizes, and report which rules it breaks.

    A function that kernels of the module call is interpreted where they call it.
    """
    top = {id(node) for node in module.tree.body}
    called = _called(module)
    done: set[int] = set()
    for function in sorted(module.functions, key=lambda each: (each.name in called, each.lineno)):
        if id(function) not in done:
            helper = function.name in called or _gives_a_value(function)
            scope = FileScope(module, nested=id(function) not in top)
            done |= _interpret(function, scope, diagnostics, {}, helper=helper)[1]


def _called(module: KernelModule) -> set[str]:
    """The names of kernels that other kernels of the module call."""
    return {
        node.func.id
        for function in module.functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id != function.name
    } & module.kernels.keys()


def _gives_a_value(function: ast.FunctionDef) -> bool:
    """Whether a function returns something, as kernels never do."""
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))


@dataclass(frozen=True)
class Parameter:
    """A tensor that a kernel takes, as far as that can be told without sizes.

    Attributes:
        name: the parameter.
        role: what it is to the kernel, see :func:`role`.
        shape: the shape that the kernel's block pointers give it, in its constexprs; None if it has none.
    """

    name: str
    role: str
    shape: Shape | None


def interface(
    function: ast.FunctionDef, scope: Scope, diagnostics: Diagnostics, known: Mapping[str, Any] | None = None
) -> list[Parameter]:
    """Interpret a kernel with symbols for its sizes.

    Args:
        function: the kernel's definition.
        scope: what the names of its module stand for.
        diagnostics: takes what is found.
        known: constexprs that have values.

    Returns:
        Its tensors in their order.
    """
    arguments, _ = _interpret(function, scope, diagnostics, known or {})
    return [Parameter(name, role(argument.uses), argument.seen_shape) for name, argument in arguments.items()]


def _interpret(
    function: ast.FunctionDef, scope: Scope, diagnostics: Diagnostics, known: Mapping[str, Any], helper: bool = False
) -> tuple[dict[str, Argument], set[int]]:
    """Interpret a function with symbols. What a helper is given besides constexprs may be anything.

    Returns:
        Its tensors by name, and the functions that it calls.
    """
    constexprs = constexpr_names(function)
    given: dict[str, Any] = {}
    for each in parameters(function):
        given[each.arg] = UNKNOWN if helper else Argument(each.arg, None, each)
        if each.arg in constexprs:
            given[each.arg] = Symbolic.atom(each.arg)
    given.update(known)
    inlined: set[int] = set()

    def interpret(choices: Choices) -> bool:
        """Interpret it on one way; whether there is one."""
        k = Interpreter(scope, diagnostics, choices=choices)
        k.names, k.sizes = dict(given), set(constexprs)
        try:
            k.call_body(function)
        except NoSuchWay:
            return False
        finally:
            inlined.update(k.inlined)
        return True

    gone = [interpret(choices) for choices in ways()]  # all of them
    if not any(gone):
        interpret(Choices(open=False))
    return {name: value for name, value in given.items() if isinstance(value, Argument)}, inlined


def build(
    function: ast.FunctionDef,
    scope: Scope,
    tensors: Mapping[str, TensorSpec],
    constexprs: Mapping[str, Any],
    diagnostics: Diagnostics,
    *,
    name: str | None = None,
) -> ModuleOp | None:
    """The program of a kernel for tensors of these shapes and these constexprs.

    Args:
        function: the kernel's definition.
        scope: what the names of its module stand for.
        tensors: shape and dtype of every parameter that is a tensor.
        constexprs: the values of the others.
        diagnostics: takes what is found.
        name: the program's (default: the kernel's).

    Returns:
        The program; None if there is an error.

    Raises:
        NpuKernelError: there is none, and still something is not known: a name that only running the module would
            tell, or what breaks a rule that a comment ignores.
    """
    constexprs = _with_defaults(function, scope, tensors, constexprs)
    names = [each.arg for each in parameters(function) if each.arg in tensors]
    builder = Builder([(each, tensors[each].shape, tensors[each].dtype) for each in names])
    k = Interpreter(scope, diagnostics, builder)
    k.sizes = constexpr_names(function)
    for each in parameters(function):
        k.names[each.arg] = constexprs.get(each.arg)
        if each.arg in tensors:
            value = builder.arguments[names.index(each.arg)]
            k.names[each.arg] = Argument(each.arg, tensors[each.arg], each, value)
            if not tensors[each.arg].contiguous:
                message = f"'{each.arg}' is not contiguous; the device ignores strides"
                k.report("NONCONTIG_INPUT", each, message, "tensor.contiguous() where the kernel is called")
        elif each.arg not in constexpr_names(function):
            message = f"'{each.arg}' is a number; the device takes tensors, and constexprs"
            k.report("SCALAR_PARAM", each, message, f"{each.arg}: tl.constexpr, or a 0-d tensor")
    known = _arguments(k, function)
    k.call_body(function)
    if k.flash_tiles and not k.recomputes and not diagnostics.errors:
        message = "flash attention over a single partition: there is nothing to put together"
        k.report("PARTITION_DIV", k.flash_tiles[0], message, FLASH_HINT)
    _tell_partitions(k)
    if diagnostics.errors:
        return None
    if k.incomplete:
        message = f"'{function.name}' cannot be compiled: something in this is not known, or an ignored error"
        first = k.incomplete[0]
        raise NpuKernelError(f"{k.span(first)}: {message}\n    {k.line(first).strip()}", diagnostics.all)
    attributes = [_argument_attributes(known[each], tensors[each]) for each in names]
    return builder.finish(name or function.name, k.span(function), {}, attributes)


def _with_defaults(
    function: ast.FunctionDef, scope: Scope, tensors: Mapping[str, TensorSpec], constexprs: Mapping[str, Any]
) -> dict[str, Any]:
    """The constexprs with the defaults of those that are not given.

    Raises:
        ArgumentError: an argument is missing.
    """
    found = dict(constexprs)
    for name, default in defaults(function.args):
        if name not in found and name not in tensors:
            found[name] = constant(default, scope)
    if missing := [each.arg for each in parameters(function) if each.arg not in found and each.arg not in tensors]:
        raise ArgumentError(function.name, missing[0], "is missing")
    return found


def _arguments(k: Interpreter, function: ast.FunctionDef) -> dict[str, Argument]:
    given = {each.arg: k.names[each.arg] for each in parameters(function)}
    return {name: value for name, value in given.items() if isinstance(value, Argument)}


def _argument_attributes(argument: Argument, spec: TensorSpec) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        NAME: StringAttr(encoded(argument.name)),
        "npu.role": StringAttr(role(argument.uses)),
    }
    seen = argument.seen_shape
    if seen is not None and seen != spec.shape and all(isinstance(size, int) for size in seen):
        attributes["npu.seen_shape"] = integers([int(size) for size in seen])  # type: ignore[arg-type]
    return attributes


def role(uses: set[str]) -> str:
    """What a tensor is to a kernel: ``"in"``, ``"out"``, ``"inout"``, ``"index"``, ``"scalar"`` or ``"unused"``."""
    if "store" in uses:
        return "inout" if "load" in uses else "out"
    return next(
        (kind for use, kind in (("load", "in"), ("index", "index"), ("scalar", "scalar")) if use in uses), "unused"
    )


def _tell_partitions(k: Interpreter) -> None:
    """Write into the program how many rows the partitions have that may be skipped."""
    for node, index, operation in k.skips:
        rows = index.maximum if index.maximum != -1 else index.rows
        if isinstance(rows, int):
            operation.properties["partition_size"] = IntegerAttr(rows, 64)
        else:
            message = "how many rows the partition has is not known"
            k.report("DYN_USE", node, message, "rblib.to_dynamic_index(block_pointer, PARTITION_SIZE)")
