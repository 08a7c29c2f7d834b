"""What a wrapper hands to its kernel, followed through the wrapper's body without running it.

A wrapper casts, aligns and collects the tensors that its operator gets, allocates the outputs, and hands all of them to
``warmup``, often through functions of the module. Tensors are followed through names, tuples, lists, ``map`` and calls
of the module's own functions. What cannot be followed is unknown, written ``None``, and no rule speaks about it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tilewright.npu.check.values import (
    Definition,
    Function,
    Given,
    Kernel,
    Made,
    Many,
    Scope,
    Sizes,
    Value,
    all_joined,
    concatenated,
    joined,
)
from tilewright.npu.module import of_language

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tilewright.npu.module import KernelModule

ALIGN = "align_tensor_last_dim_to_64"
_DEEPEST_CALL = 8
_ALLOCATORS = frozenset(
    f"torch.{name}{like}" for name in ("empty", "zeros", "ones", "full") for like in ("", "_like")
) | {"torch.empty_strided"}
_NEW = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"})
_SAME_TENSOR = {
    "bfloat16",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "flatten",
    "float",
    "half",
    "int",
    "permute",
    "repeat",
    "reshape",
    "squeeze",
    "to",
    "transpose",
    "unsqueeze",
    "view",
}
"""Methods of a tensor whose result is the same data in another form."""

_SAME_DATA = frozenset({"T", "mT", "data"})


@dataclass(frozen=True)
class Warmup:
    """A kernel that is compiled.

    Attributes:
        kernel: its name.
        tensors: what its tensors are, in their order; None if that is not known of all of them.
    """

    kernel: str
    tensors: tuple[Given | Made, ...] | None


def warmups(module: KernelModule, functions: Mapping[str, Definition], wrapper: Definition) -> list[Warmup]:
    """The kernels of a module that a wrapper compiles, with what it hands to each.

    Args:
        module: the module.
        functions: its functions by name, kernels aside.
        wrapper: the one to follow.
    """
    tracer = _Tracer(module, functions)
    tracer.run(Function(wrapper), [], {each.arg: Given(each.arg) for each in parameters(wrapper)})
    return tracer.found


def parameters(function: Definition | ast.Lambda) -> list[ast.arg]:
    """The parameters of a function that have names of their own."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def is_constexpr(parameter: ast.arg) -> bool:
    """Whether a parameter of a kernel is a ``tl.constexpr``."""
    match parameter.annotation:
        case ast.Attribute(attr=name) | ast.Name(id=name) | ast.Constant(value=str(name)):
            return name.rpartition(".")[2] == "constexpr"
    return False


class _Tracer(ast.NodeVisitor):
    """Visiting an expression returns its value; of a statement, only what it does to names is kept."""

    def __init__(self, module: KernelModule, functions: Mapping[str, Definition]) -> None:
        self.module = module
        self.functions = functions
        self.found: list[Warmup] = []
        self.scope = Scope()
        self.returned: list[Value] = []
        self.active: list[ast.AST] = []

    def run(self, function: Function, given: Sequence[Value] | None, named: Mapping[str, Value]) -> Value:
        """Follow a call of a function; ``given`` is None where the arguments by position are not known."""
        node = function.node
        if node in self.active or len(self.active) >= _DEEPEST_CALL:
            return None
        outside, self.scope = self.scope, Scope(function.scope)
        returned, self.returned = self.returned, []
        self.active.append(node)
        self._bind_parameters(node.args, given, named)
        if isinstance(node, ast.Lambda):
            self.returned.append(self.visit(node.body))
        else:
            self._block(node.body)
        self.active.pop()
        self.scope, self.returned, result = outside, returned, all_joined(self.returned)
        return result

    def _bind_parameters(
        self, wanted: ast.arguments, given: Sequence[Value] | None, named: Mapping[str, Value]
    ) -> None:
        names = self.scope.names
        positional = [each.arg for each in (*wanted.posonlyargs, *wanted.args)]
        for parameter in (*positional, *(each.arg for each in wanted.kwonlyargs)):
            names[parameter] = named.get(parameter)
        if given is not None:
            names.update(zip(positional, given, strict=False))
        if wanted.vararg is not None:
            names[wanted.vararg.arg] = None if given is None else Many(tuple(given[len(positional) :]))
        if wanted.kwarg is not None:
            names[wanted.kwarg.arg] = None

    # Statements

    def _block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.visit(statement)

    def _branches(self, *bodies: Sequence[ast.stmt]) -> None:
        """Bodies of which one runs. A name that only one of them binds has its value wherever it has any."""
        before = self.scope.names
        after: dict[str, Value] = {}
        for body in bodies:
            self.scope.names = dict(before)
            self._block(body)
            for name, value in self.scope.names.items():
                after[name] = joined(after[name], value) if name in after else value
        self.scope.names = after

    def _repeated(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        changed = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and _is_changed(each, node)}
        self.scope.names.update(dict.fromkeys(changed))
        self._block(node.body)
        self.scope.names.update(dict.fromkeys(changed))
        self._block(node.orelse)

    def _bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.scope.names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            items = value.items if isinstance(value, Many) and len(value.items) == len(target.elts) else None
            if any(isinstance(each, ast.Starred) for each in target.elts):
                items = None
            for index, each in enumerate(target.elts):
                self._bind(each, items[index] if items else None)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, None)
        elif isinstance(target, ast.Subscript) and isinstance(self.visit(target.value), Many):
            self._bind(target.value, None)  # an item is another one now

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.visit(node.value)
        for target in node.targets:
            self._bind(target, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, self.visit(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        before, value = self.visit(node.target), self.visit(node.value)
        self._bind(node.target, concatenated(before, value))

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._bind(target, None)

    def visit_Return(self, node: ast.Return) -> None:
        self.returned.append(self.visit(node.value) if node.value is not None else None)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._branches(node.body, node.orelse)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        self._branches([], *(case.body for case in node.cases))

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._repeated(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self.visit(node.iter)
        self._repeated(node)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._repeated(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, None)
        self._block(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        self._branches([*node.body, *node.orelse], *(each.body for each in node.handlers))
        self._block(node.finalbody)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.names[node.name] = Function(node, self.scope)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.scope.names[node.name] = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.names[node.name] = None

    # Expressions

    def visit_Name(self, node: ast.Name) -> Value:
        if self.scope.has(node.id):
            return self.scope.get(node.id)
        if node.id in self.module.kernels:
            return Kernel(node.id)
        return Function(self.functions[node.id]) if node.id in self.functions else None

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value: Value = self.visit(node.value)
        self._bind(node.target, value)
        return value

    def visit_Lambda(self, node: ast.Lambda) -> Value:
        return Function(node, self.scope)

    def visit_Tuple(self, node: ast.Tuple) -> Value:
        return self._many(node.elts)

    def visit_List(self, node: ast.List) -> Value:
        return self._many(node.elts)

    def _many(self, nodes: Sequence[ast.expr]) -> Many | None:
        items: list[Value] = []
        known = True
        for node in nodes:
            if isinstance(node, ast.Starred):
                inner = self.visit(node.value)
                known = known and isinstance(inner, Many)
                items.extend(inner.items if isinstance(inner, Many) else ())
            else:
                items.append(self.visit(node))
        return Many(tuple(items)) if known else None

    def visit_IfExp(self, node: ast.IfExp) -> Value:
        self.visit(node.test)
        return joined(self.visit(node.body), self.visit(node.orelse))

    def visit_BinOp(self, node: ast.BinOp) -> Value:
        left, right = self.visit(node.left), self.visit(node.right)
        return concatenated(left, right) if isinstance(node.op, ast.Add) else None

    def visit_Attribute(self, node: ast.Attribute) -> Value:
        value: Value = self.visit(node.value)
        if isinstance(value, Given | Made):
            if node.attr == "shape":
                return Sizes(value.aligned, is_shape=True)
            if node.attr in _SAME_DATA:
                return value
        return None

    def visit_Subscript(self, node: ast.Subscript) -> Value:
        value: Value = self.visit(node.value)
        index = _number(node.slice)
        if isinstance(value, Given):
            return replace(value, aligned=False)  # a part of it, or the padding cut off
        if isinstance(value, Sizes) and value.is_shape and index == -1:
            return Sizes(value.aligned, is_shape=False)
        if isinstance(value, Many) and index is not None and -len(value.items) <= index < len(value.items):
            return value.items[index]
        return None

    def visit_ListComp(self, node: ast.ListComp) -> Value:
        return self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> Value:
        return self._comprehension(node)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> Value:
        first = node.generators[0]
        over = self.visit(first.iter)
        outside, self.scope = self.scope, Scope(self.scope)
        result: Value = None
        if isinstance(over, Many) and len(node.generators) == 1 and not first.ifs:
            items = []
            for item in over.items:
                self._bind(first.target, item)
                items.append(self.visit(node.elt))
            result = Many(tuple(items))
        else:
            for generator in node.generators:
                self._bind(generator.target, None)
            self.visit(node.elt)
        self.scope = outside
        return result

    def visit_Call(self, node: ast.Call) -> Value:
        given = self._many(node.args)
        named = {each.arg: self.visit(each.value) for each in node.keywords if each.arg is not None}
        arguments = None if given is None else given.items
        if isinstance(node.func, ast.Attribute):
            base: Value = self.visit(node.func.value)
            if node.func.attr == "warmup" and isinstance(base, Kernel):
                self._compiled(base, arguments, named)
                return None
            if isinstance(base, Given | Made | Many):
                return self._method(node, node.func, base, arguments, named)
        elif isinstance(function := self.visit(node.func), Function):
            return self.run(function, arguments, named)
        dotted = self.module.dotted(node.func)
        if dotted.rpartition(".")[2] == "warmup" and arguments and isinstance(arguments[0], Kernel):
            # The language's own form has a table of options behind the kernel.
            rest = arguments[2:] if of_language(dotted) else arguments[1:]
            self._compiled(arguments[0], rest, named)
            return None
        return self._of_library(node, dotted, arguments, named)

    def _of_library(
        self, node: ast.Call, dotted: str, arguments: Sequence[Value] | None, named: Mapping[str, Value]
    ) -> Value:
        first = arguments[0] if arguments else None
        if dotted.rpartition(".")[2] == ALIGN or dotted == "torch.nn.functional.pad":
            # What was padded by hand has the sizes that its author gave it.
            return replace(first, aligned=dotted != "torch.nn.functional.pad") if isinstance(first, Given) else None
        if dotted in _ALLOCATORS:
            return Made(node, _is_aligned(arguments, named))
        if dotted in ("list", "tuple"):
            return first if isinstance(first, Many) else None
        if dotted == "map" and arguments is not None and len(arguments) == 2 and isinstance(arguments[1], Many):
            return Many(tuple(self._applied(node, each) for each in arguments[1].items))
        return None

    def _applied(self, node: ast.Call, item: Value) -> Value:
        """What ``map`` makes of an item."""
        function: Value = self.visit(node.args[0])
        if isinstance(function, Function):
            return self.run(function, [item], {})
        return self._of_library(node, self.module.dotted(node.args[0]), [item], {})

    def _method(
        self,
        node: ast.Call,
        method: ast.Attribute,
        base: Given | Made | Many,
        arguments: Sequence[Value] | None,
        named: Mapping[str, Value],
    ) -> Value:
        name = method.attr
        if isinstance(base, Many):
            if name in ("index", "count", "copy"):
                return base if name == "copy" else None
            added: Value = None
            if arguments and name in ("append", "extend"):
                added = Many((arguments[0],)) if name == "append" else arguments[0]
            self._bind(method.value, concatenated(base, added))
            return None
        if name in _NEW:
            return Made(node, _is_aligned(arguments, named))
        if name == "size" and (not node.args or _number(node.args[0]) == -1):
            return Sizes(base.aligned, is_shape=not node.args)
        return base if name in _SAME_TENSOR else None

    def _compiled(self, kernel: Kernel, arguments: Sequence[Value] | None, named: Mapping[str, Value]) -> None:
        wanted = parameters(self.module.kernels[kernel.name])
        tensors: tuple[Given | Made, ...] | None = None
        if arguments is not None and len(arguments) <= len(wanted):
            given = {**named, **{each.arg: value for each, value in zip(wanted, arguments, strict=False)}}
            values = [given.get(each.arg) for each in wanted if not is_constexpr(each)]
            known = tuple(each for each in values if isinstance(each, Given | Made))
            tensors = known if len(known) == len(values) else None
        self.found.append(Warmup(kernel.name, tensors))


def _is_changed(name: ast.Name, loop: ast.AST) -> bool:
    """Whether a loop binds a name, or calls a method of it that may change a list."""
    if not isinstance(name.ctx, ast.Load):
        return True
    return any(
        isinstance(each, ast.Attribute) and each.value is name and each.attr in ("append", "extend", "insert", "pop")
        for each in ast.walk(loop)
    )


def _number(node: ast.expr) -> int | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, int) else None


def _is_aligned(arguments: Sequence[Value] | None, named: Mapping[str, Value]) -> bool:
    """Whether an allocation takes its last size from a tensor that may have been padded."""
    given = [*(arguments or ()), *(named[name] for name in ("input", "size") if name in named)]
    if not given:
        return False
    source = given[0]
    if isinstance(source, Many):
        source = source.items[-1] if source.items else None
    elif not isinstance(source, Given | Made) and not (isinstance(source, Sizes) and source.is_shape):
        source = given[-1]  # the sizes are arguments one by one
    return isinstance(source, Given | Made | Sizes) and source.aligned
