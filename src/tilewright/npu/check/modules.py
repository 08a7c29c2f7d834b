"""The rules that can be seen by reading a file: how a module of kernels registers, compiles and names them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from tilewright.npu.check.host import NAMESPACE, Host, Operator
from tilewright.npu.check.names import check_self_contained
from tilewright.npu.check.scripts import check_main_guard
from tilewright.npu.check.trace import parameters
from tilewright.npu.check.values import Definition, Given, Made

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tilewright.npu.diagnostics import Diagnostics
    from tilewright.npu.module import KernelModule
    from tilewright.npu.source import Span


def check_module(module: KernelModule, diagnostics: Diagnostics) -> None:
    """Hold a module of kernels against every rule that needs nothing but its text.

    Args:
        module: the module; one without a kernel breaks no rule.
        diagnostics: where findings go.
    """
    if not module.kernels:
        return
    host = Host(module)
    for operator in host.operators:
        _check_operator(host, operator, diagnostics)
    _check_grids(module, diagnostics)
    check_self_contained(host, diagnostics)
    check_main_guard(host, diagnostics)
    _check_own_names(host, diagnostics)


def check_kernel_names(modules: Iterable[KernelModule], diagnostics: Diagnostics) -> None:
    """Report each kernel that has the name of a kernel in a module before its own.

    Args:
        modules: the modules, in the order in which they were named; each may have been checked by itself before.
        diagnostics: where findings go.
    """
    earlier: dict[str, Span] = {}
    for module in modules:
        own = _first_of_each_name(module)
        for name in own.keys() & earlier.keys():
            _report_name(module, own[name], name, f"{earlier[name].file}:{earlier[name].line}", diagnostics)
        earlier = {**own, **earlier}


def _check_own_names(host: Host, diagnostics: Diagnostics) -> None:
    first = _first_of_each_name(host.module)
    for kernel in _kernels(host.module):
        span = host.name_span(kernel)
        if span != first[kernel.name]:
            _report_name(host.module, span, kernel.name, f"line {first[kernel.name].line}", diagnostics)


def _first_of_each_name(module: KernelModule) -> dict[str, Span]:
    found: dict[str, Span] = {}
    for kernel in _kernels(module):
        found.setdefault(kernel.name, Host(module).name_span(kernel))
    return found


def _report_name(module: KernelModule, span: Span, name: str, place: str, diagnostics: Diagnostics) -> None:
    message = f"kernel '{name}' has the name of the kernel at {place}: the compiler's cache mixes them up"
    diagnostics.report("SAME_KERNEL_NAME", module.source, span, message, "give it a name of its own")


def _kernels(module: KernelModule) -> Iterator[ast.FunctionDef]:
    """The kernels of a module in the order of the source, all of one name as well; functions of kernels are none."""
    found = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and node.name in module.kernels
        if any(_ends_with(module, each, "jit") for each in node.decorator_list)
    ]
    called = {
        call.func.id
        for kernel in found
        for call in ast.walk(kernel)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    yield from sorted((each for each in found if each.name not in called), key=lambda each: each.lineno)


def _ends_with(module: KernelModule, decorator: ast.expr, name: str) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return module.dotted(target).rpartition(".")[2] == name


# Operators


def _check_operator(host: Host, operator: Operator, diagnostics: Diagnostics) -> None:
    _check_namespace(host, operator, diagnostics)
    kernel, wrapper = host.kernel_of(operator), host.wrapper_of(operator)
    if not kernel:
        return
    if operator.short_name == kernel and f"{kernel}_wrapper" not in host.names | host.functions.keys():
        diagnostics.report(
            "WRAPPER_NAME",
            host.module.source,
            host.name_span(operator.function),
            f"the compiler calls '{kernel}_wrapper' to compile kernel '{kernel}', and the module has no function of "
            "that name",
            f"def {kernel}_wrapper(...)",
        )
    _check_order(host, operator, kernel, wrapper, diagnostics)
    _check_outputs(host, kernel, wrapper, diagnostics)


def _check_namespace(host: Host, operator: Operator, diagnostics: Diagnostics) -> None:
    compiled = {each.kernel for each in host.compiled(host.wrapper_of(operator))}
    is_kernel = operator.short_name in host.module.kernels
    if not operator.name or not (compiled or is_kernel):
        return
    if operator.namespace != NAMESPACE:
        message = f"operator '{operator.name}' is not in the namespace {NAMESPACE}, where the compiler looks for it"
    elif not is_kernel:
        message = f"operator '{operator.name}' has the name of no kernel of the module"
    elif compiled and operator.short_name not in compiled:
        others = ", ".join(f"'{each}'" for each in sorted(compiled))
        message = f"operator '{operator.name}' has the name of one kernel and compiles another: {others}"
    else:
        return
    right = {operator.short_name} & compiled or compiled or {operator.short_name}
    hint = f'"{NAMESPACE}::{right.pop()}"' if len(right) == 1 else ""
    span = host.module.source.span(operator.node)
    diagnostics.report("NAMESPACE", host.module.source, span, message, hint)


def _check_order(host: Host, operator: Operator, kernel: str, wrapper: Definition, diagnostics: Diagnostics) -> None:
    source = host.module.source
    for compiled in host.compiled(wrapper):
        if compiled.kernel != kernel or compiled.tensors is None:
            continue
        taken = [each.name for each in compiled.tensors if isinstance(each, Given)]
        given = _tensor_parameters(wrapper)
        if any(each.annotation is None and each.arg not in taken for each in given):
            return  # it may be a number as well as a tensor
        wrong = _first_difference([each.arg for each in given], taken)
        if wrong is None or not {each.arg for each in given}.issuperset(taken):
            continue
        span = source.span(given[wrong]) if wrong < len(given) else host.name_span(wrapper)
        right = ", ".join(_order_for(given, taken))
        message = (
            f"besides its outputs, kernel '{kernel}' takes {_spoken(taken)}, but '{wrapper.name}' has "
            f"{_spoken([each.arg for each in given])}; they are matched by position"
        )
        diagnostics.report("ARG_ORDER", source, span, message, f"order the tensors: {right}")
        return
    if wrapper is operator.function:
        return
    wanted = [each.arg for each in _tensor_parameters(wrapper)]
    given = _tensor_parameters(operator.function)
    if sorted(each.arg for each in given) != sorted(wanted):
        return  # names of their own: nothing can be said about their order
    for parameter, name in zip(given, wanted, strict=True):
        if parameter.arg != name:
            message = (
                f"operator '{operator.name}' has {_spoken([each.arg for each in given])}, but '{wrapper.name}', which "
                f"is called with its arguments, has {_spoken(wanted)}"
            )
            hint = f"order the tensors: {', '.join(wanted)}"
            diagnostics.report("ARG_ORDER", source, source.span(parameter), message, hint)
            return


def _tensor_parameters(function: Definition) -> list[ast.arg]:
    """The parameters that are tensors by their annotations, or that have none."""
    return [
        each for each in parameters(function) if each.annotation is None or "Tensor" in ast.unparse(each.annotation)
    ]


def _first_difference(given: Sequence[str], taken: Sequence[str]) -> int | None:
    """Where the tensors of an operator cease to be those of its kernel; None: nowhere.

    A parameter that the kernel takes nothing of may have a tensor that stands before it in its place, as a dummy.
    """
    for index, (name, tensor) in enumerate(zip(given, taken, strict=False)):
        if name != tensor and (name in taken or tensor not in taken[:index]):
            return index
    return None if len(given) == len(taken) else min(len(given), len(taken))


def _order_for(given: Sequence[ast.arg], taken: Sequence[str]) -> list[str]:
    """The parameters in the order in which a kernel takes them."""
    dummies = [each.arg for each in given if each.arg not in taken]
    order: list[str] = []
    for name in taken:
        if name not in order:
            order.append(name)
        elif dummies:
            order.append(dummies.pop(0))
    return order


def _check_outputs(host: Host, kernel: str, wrapper: Definition, diagnostics: Diagnostics) -> None:
    source = host.module.source
    for compiled in host.compiled(wrapper):
        for made in compiled.tensors or ():
            if compiled.kernel == kernel and isinstance(made, Made) and made.aligned:
                diagnostics.report(
                    "OUT_ALIGN",
                    source,
                    source.span(made.node),
                    "the output is allocated with the sizes of a tensor that was aligned to 64: it gets the padding",
                    "allocate it before align_tensor_last_dim_to_64",
                )


# Launches


def _check_grids(module: KernelModule, diagnostics: Diagnostics) -> None:
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Subscript(value=ast.Name(id=name)) if name in module.kernels:
                message = f"kernel '{name}' is launched; on the device it is compiled, and the graph calls it"
                hint = f"{name}.warmup(..., grid=(1,)) in '{name}_wrapper'"
                diagnostics.report("GRID", module.source, module.source.span(node.func), message, hint)
            case ast.Attribute(attr="warmup"):
                for keyword in node.keywords:
                    if keyword.arg == "grid" and (programs := _programs(module, keyword.value)) is not None:
                        message = f"a grid of {programs} programs; the device runs one"
                        span = module.source.span(keyword.value)
                        diagnostics.report("GRID", module.source, span, message, "grid=(1,)")


def _programs(module: KernelModule, grid: ast.expr) -> str | None:
    """How many programs a grid has, where that is written out and is not one."""
    if isinstance(grid, ast.Lambda):
        grid = grid.body
    if isinstance(grid, ast.Name):
        grid = module.assignments.get(grid.id, grid)
    sizes = grid.elts if isinstance(grid, ast.Tuple | ast.List) else [grid]
    literal = [each.value for each in sizes if isinstance(each, ast.Constant) and isinstance(each.value, int)]
    if all(each == 1 for each in literal):
        return None
    return " x ".join(ast.unparse(each) for each in sizes)


def _spoken(names: Sequence[str]) -> str:
    return f"({', '.join(names)})"
