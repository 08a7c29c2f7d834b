"""The file that the vendor's compiler reads: a kernel, the functions and constants it uses, and its operator's wrapper.

That compiler runs a module of kernels again alone: it copies the module's text, adds empty tensors and a call of
``<kernel>_wrapper`` behind it, and compiles what the wrapper hands to ``warmup``. So the module stands alone, the
kernel has the operator's name, and the operator takes the kernel's tensors in their order, without the outputs.

On the device nothing but the kernel is run, so the operator is declared to change nothing in place, and the wrapper
writes nothing back: where this file runs on a CPU, a cache of 16 bits stays as it was, as what the kernel changes is
the wrapper's float32 copy.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import math
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from tilewright.errors import ArgumentError
from tilewright.npu import language, triton
from tilewright.npu.check.host import NAMESPACE
from tilewright.npu.front.values import UNKNOWN, Foreign, Function
from tilewright.npu.kernel import Kernel
from tilewright.npu.language import rblib
from tilewright.npu.language.core import Builtin, constexpr

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tilewright.npu.operator import Operator

Jitted: TypeAlias = Kernel | Function
"""A function under ``@jit``, loaded or read."""

_WIDTH = 100
_LANGUAGE = "rebel.triton.language"
_RBLIB = f"{_LANGUAGE}.extra.rbln.libdevice"
_HOMES = {"tl": _LANGUAGE, "rblib": _RBLIB}
_MODULES = ((triton, "rebel.triton"), (language, _LANGUAGE), (rblib, _RBLIB))
_IMPORTS = {
    "torch": "import torch",
    "triton": "from rebel import triton",
    "tl": "from rebel.triton import language as tl",
    "rblib": f"from {_RBLIB.rpartition('.')[0]} import libdevice as rblib",
    "register_fake": "from torch.library import register_fake, triton_op",
    "triton_op": "from torch.library import register_fake, triton_op",
}
_CAST = {"in", "inout", "scalar", "unused"}


def device_module(operator: Operator) -> str:
    """The text of a Python module by which the vendor's compiler compiles an operator's kernel.

    It needs ``torch`` and ``rebel`` only. The functions that the kernel uses are copied with it from whatever files
    they stand in. So are the values of constants, each as a ``tl.constexpr``: the compiler takes no other globals.

    Args:
        operator: what :func:`tilewright.npu.register` made of a kernel.

    Raises:
        ArgumentError: the kernel uses something that no other file can have, or two things of one name, or the
            operator has no output.
    """
    return _Module(operator).text()


def kernel_compile(operator: Operator, tensors: Mapping[str, torch.Tensor]) -> str:
    """The script that the vendor's compiler makes of :func:`device_module` for tensors of given shapes.

    Args:
        operator: what :func:`tilewright.npu.register` made of a kernel.
        tensors: a tensor for each argument of the operator, of which shape and dtype are read.

    Raises:
        ArgumentError: an argument is missing, or :func:`device_module` raises it.
    """
    if missing := [name for name in operator.inputs if name not in tensors]:
        raise ArgumentError(operator.name, missing[0], f"is missing; there are {', '.join(tensors) or 'none'}")
    arguments = [f"arg{index} = {_empty(tensors[name])}" for index, name in enumerate(operator.inputs)]
    names = "".join(f"arg{index}, " for index in range(len(arguments)))
    script = "\n".join([*arguments, f"{operator.name}_wrapper({names})"])
    return f"{device_module(operator)}\n\n{script}\n"


def functions_of(operator: Operator) -> tuple[Jitted, ...]:
    """The functions under ``@jit`` that an operator's kernel uses, directly or by others, and the kernel, last."""
    return tuple(_Module(operator).functions.values())


def _empty(tensor: torch.Tensor) -> str:
    sizes = [str(size) for size in tensor.shape] or ["()"]
    dtype = [] if tensor.dtype == torch.float32 else [f"dtype={tensor.dtype}"]
    return f"torch.empty({''.join(f'{part}, ' for part in (*sizes, *dtype))})"


class _Module:
    """What stands in a device module.

    Attributes:
        operator: what it is for.
        imports: the lines that import something, by the name that each gives.
        constants: the lines that define constants, by name.
        functions: the functions under ``@jit``, by name, each behind those that it uses.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.imports = dict(_IMPORTS)
        self.constants: dict[str, str] = {}
        self.functions: dict[str, Jitted] = {}
        self._check()
        self._collect(operator.name, operator.kernel)

    def _check(self) -> None:
        operator = self.operator
        if not operator.name.isidentifier() or keyword.iskeyword(operator.name):
            self._refuse("name", f"'{operator.name}' is no name for a function of Python")
        if not operator.outputs:
            self._refuse(
                "outputs", "the compiler leaves out an operator that returns nothing; give the kernel an output"
            )
        arguments = operator.kernel.node.args
        if arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
            self._refuse("kernel", "the compiler hands a kernel its arguments by position")
        used = {"torch", "rblib", "warmup", operator.name}
        for name in operator.kernel.arg_names:
            if name in used:
                self._refuse(name, "the wrapper has this name for something else; rename the kernel's parameter")

    def _refuse(self, argument: str, message: str) -> NoReturn:
        raise ArgumentError(self.operator.name, argument, f"no device file can be written: {message}")

    # What the kernel uses

    def _collect(self, name: str, function: Jitted) -> None:
        """Note a function and, before it, everything that it uses."""
        if name in self.functions:
            if _place(self.functions[name]) != _place(function):
                self._twice(name)
            return
        self._claim(name, may_be_kernel=function is self.operator.kernel)
        self.functions[name] = function
        for used in _global_names(function.node):
            self._note(used, function)
        self.functions[name] = self.functions.pop(name)

    def _note(self, name: str, function: Jitted) -> None:
        """Note what a global name of a function stands for."""
        try:
            value = function.scope.lookup(name)
        except NameError:
            if not hasattr(builtins, name):
                self._refuse(name, f"'{function.node.name}' uses it, and its module does not have it")
            return
        if isinstance(value, Kernel | Function):
            self._collect(name, value)
        elif (literal := _literal(value)) is not None:
            self._line(self.constants, name, f"{name} = tl.constexpr({literal})")
        elif value is not getattr(builtins, name, None):
            home, own = _home(value) or self._unknown(name, value, function)
            line = f"from {home} import {own}" if home else f"import {own}"
            self._line(self.imports, name, line if own == name else f"{line} as {name}")

    def _unknown(self, name: str, value: Any, function: Jitted) -> NoReturn:
        what = value.dotted if isinstance(value, Foreign) else f"of type {type(value).__name__}"
        what = "nothing that its file alone tells" if value is UNKNOWN else what
        message = f"'{function.node.name}' uses it, and it is {what}; a kernel uses numbers, strings, tuples of them"
        self._refuse(name, f"{message}, functions under @jit, and the language")

    def _line(self, lines: dict[str, str], name: str, line: str) -> None:
        if lines.get(name) != line:
            self._claim(name)
            lines[name] = line

    def _claim(self, name: str, *, may_be_kernel: bool = False) -> None:
        """Make sure that a name is free."""
        own = {f"{self.operator.name}_wrapper", "warmup", "_"} | (set() if may_be_kernel else {self.operator.name})
        if name in own | self.imports.keys() | self.constants.keys() | self.functions.keys():
            self._twice(name)

    def _twice(self, name: str) -> NoReturn:
        self._refuse(name, "two things have this name, in the modules that are put together here or in what is added")

    # What is written

    def text(self) -> str:
        """The module's text."""
        file = Path(self.operator.kernel.module.source.path).name
        head = (
            f"\"\"\"Kernel '{self.operator.name}' for Rebellions' compiler, which runs this module again alone.\n\n"
            f'Written by tilewright from {file}: change that file, and write this one again.\n"""\n\n'
        )
        imports = dict.fromkeys(sorted(self.imports.values(), key=lambda line: line.startswith("from torch")))
        parts = [head + "\n".join(imports)]
        parts += ["\n".join(self.constants.values())] if self.constants else []
        parts += [f"@triton.jit\n{_definition(each, name)}" for name, each in self.functions.items()]
        return "\n\n\n".join([*parts, self._warmup(), self._wrapper(), self._fake()]) + "\n"

    def _warmup(self) -> str:
        layout = ":".join(str(each) for each in self.operator.host_layout)
        options = f', host_layout="{layout}"' if layout else ""
        lines = [
            "def warmup(func, *args):",
            f"kernel = func.warmup(*args, grid=(1,){options})",
            "rblib.write_rtosa(kernel, args)",
            "return kernel",
        ]
        return "\n    ".join(lines)

    def _wrapper(self) -> str:
        operator = self.operator
        taken = set(operator.kernel.arg_names)
        likes = list(dict.fromkeys(operator.outputs.values()))
        *dtypes, params = _unused(taken, [*(f"{like}_dtype" for like in likes), "params"])
        dtype_of = dict(zip(likes, dtypes, strict=True))
        cast = [each.name for each in operator.tensors if each.role in _CAST and each.name not in operator.outputs]
        lines = [
            f'@triton_op("{NAMESPACE}::{operator.name}", mutates_args=())',
            self._signature(f"{operator.name}_wrapper"),
        ]
        body = [f"{name} = {like}.dtype" for like, name in dtype_of.items()]
        body += [f"{name} = {name}.to(torch.float32)" for name in cast]
        body += [f"{name} = {self._allocation(name)}" for name in operator.outputs]
        body += [f"{name} = rblib.align_tensor_last_dim_to_64({name})" for name in operator.aligned]
        body += [f"{name} = {expression}" for name, expression in operator.constexprs.items()]
        body += [_bracketed(f"{params} = [", operator.kernel.arg_names, "]", indent=4)]
        body += [f"warmup({operator.name}, *{params})"]
        body += [f"return {', '.join(f'{name}.to({dtype_of[like]})' for name, like in operator.outputs.items())}"]
        return "\n".join([*lines, *(f"    {line}" for line in body)])

    def _fake(self) -> str:
        results = ", ".join(self._allocation(name) for name in self.operator.outputs)
        return f'@register_fake("{NAMESPACE}::{self.operator.name}")\n{self._signature("_")}\n    return {results}'

    def _allocation(self, output: str) -> str:
        like = self.operator.outputs[output]
        shape = self.operator.output_shapes.get(output)
        return f"torch.empty_like({like})" if shape is None else f"{like}.new_empty({_tuple(shape)})"

    def _signature(self, name: str) -> str:
        count = len(self.operator.outputs)
        result = "torch.Tensor" if count == 1 else f"tuple[{', '.join(['torch.Tensor'] * count)}]"
        given = [f"{each}: torch.Tensor" for each in self.operator.inputs]
        return _bracketed(f"def {name}(", given, f") -> {result}:", indent=0)


def _global_names(node: ast.FunctionDef) -> list[str]:
    """The names that a function takes from around it, in their order."""
    outside: list[ast.AST] = [node.args, *([node.returns] if node.returns else [])]
    bound = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    bound |= {each.id for each in _names(node.body) if isinstance(each.ctx, ast.Store)}
    found = [each.id for each in _names(outside)]
    found += [each.id for each in _names(node.body) if each.id not in bound]
    return list(dict.fromkeys(found))


def _names(nodes: Sequence[ast.AST]) -> Iterator[ast.Name]:
    return (each for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name))


def _place(function: Jitted) -> tuple[str, int]:
    return function.module.source.path, function.node.lineno


def _literal(value: Any) -> str | None:
    """A constant as Python; None for anything else."""
    if isinstance(value, constexpr):
        return _literal(value.value)
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if not isinstance(value, tuple | list):
        return None
    items = [_literal(each) for each in value]
    return None if None in items else _tuple([str(item) for item in items])


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _home(value: Any) -> tuple[str, str] | None:
    """Where the vendor's modules have what a value of the language is here: the module, and its name there."""
    if value is torch or value == Foreign("torch"):
        return "", "torch"
    if isinstance(value, Builtin):
        return _HOMES[value.namespace], value.name
    for module, path in _MODULES:
        if value is module:
            before, _, name = path.rpartition(".")
            return before, name
    for module, path in _MODULES:
        for name, member in vars(module).items():
            if member is value and not name.startswith("_"):
                return path, name
    return None


def _definition(function: Jitted, name: str) -> str:
    """A function as it stands in its file, without decorators, under a name."""
    node = function.node
    lines = function.module.source.lines[node.lineno - 1 : node.end_lineno]
    text = textwrap.dedent("\n".join(lines)) if node.col_offset else "\n".join(lines)
    return re.sub(rf"\bdef(\s+){re.escape(node.name)}\b", rf"def\g<1>{name}", text, count=1)


def _unused(taken: set[str], wanted: Sequence[str]) -> list[str]:
    """Names that are not taken, as near to what is wanted as can be."""
    found: list[str] = []
    for name in wanted:
        free = name
        while free in taken or free in found:
            free += "_"
        found.append(free)
    return found


def _bracketed(head: str, items: Sequence[str], tail: str, *, indent: int) -> str:
    """Items between brackets: in one line, or one in each where that were too long."""
    line = f"{head}{', '.join(items)}{tail}"
    if len(line) + indent <= _WIDTH:
        return line
    space = " " * indent
    return "\n".join([head, *(f"{space}    {item}," for item in items), f"{space}{tail}"])
