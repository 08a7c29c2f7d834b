"""The text of a program: MLIR in its generic form, with the location of every operation.

Any MLIR reads it that allows unregistered dialects; :func:`parse_program` reads it back, and printing that gives the
same text.
"""

from __future__ import annotations

import re
from io import StringIO
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from xdsl.context import Context
from xdsl.dialects.arith import Arith, ConstantOp
from xdsl.dialects.builtin import (
    Builtin,
    DenseIntOrFPElementsAttr,
    FileLineColLoc,
    IntAttr,
    LocationAttr,
    ModuleOp,
    StringAttr,
    UnknownLoc,
)
from xdsl.dialects.func import Func, FuncOp, ReturnOp
from xdsl.dialects.scf import IfOp, Scf, YieldOp
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import DiagnosticException, ParseError, VerifyException

from tilewright.errors import NpuProgramError
from tilewright.npu.ir.dialect import OPERATIONS, Npu
from tilewright.npu.source import Span

if TYPE_CHECKING:
    from xdsl.ir import Operation

NAME = "npu.name"
"""The attribute of an argument that has the parameter's name: names in the text are ASCII, and MLIR numbers them."""

_HEXADECIMAL = re.compile(r"dense<\[?0x[0-9A-Fa-f]{8}(?:, 0x[0-9A-Fa-f]{8})*\]?>")
_ALIAS = re.compile(r"^#loc\d* = .*\n", re.MULTILINE)
_KINDS: tuple[type[Operation], ...] = (ModuleOp, FuncOp, ReturnOp, IfOp, YieldOp, ConstantOp, *OPERATIONS)
"""All that a program consists of."""


def context() -> Context:
    """The dialects that a program may have."""
    made = Context()
    for dialect in (Builtin, Func, Scf, Arith, Npu):
        made.load_dialect(dialect)
    return made


def print_program(module: ModuleOp, *, locations: bool = True, readable: bool = False) -> str:
    """The text of a program.

    Args:
        module: the program.
        locations: with the place in the source of every operation.
        readable: in the short form of its operations, which only this library reads.
    """
    stream = StringIO()
    Printer(stream, print_debuginfo=locations, print_generic_format=not readable).print_op(module)
    return stream.getvalue() + "\n"


def parse_program(text: str, name: str = "<program>") -> ModuleOp:
    """Read a program, and verify it.

    Raises:
        NpuProgramError: it is not MLIR, has operations that no program has, or their operands do not fit.
    """
    names = "".join(_ALIAS.findall(text))  # MLIR writes names for places at the end, and xdsl wants them before
    try:
        module = Parser(context(), names + _HEXADECIMAL.sub(_as_bytes, _ALIAS.sub("", text)), name).parse_module()
    except (ParseError, DiagnosticException, VerifyException) as error:
        raise NpuProgramError(f"{name}: {error}") from error
    verify_program(module, name)
    for operation in module.walk():
        if not isinstance(operation, _KINDS):
            raise NpuProgramError(f"{name}: there is no operation {operation.name} in a program")
        if isinstance(operation, ConstantOp) and not isinstance(operation.value, DenseIntOrFPElementsAttr):
            raise NpuProgramError(f"{name}: a constant of type {operation.result.type}, expected a tensor")
    return module


def _as_bytes(found: re.Match[str]) -> str:
    """Floats by their bits, written as bytes: xdsl takes the bits in ``dense<0xFF800000>`` for an integer."""
    numbers = re.findall(r"0x(\w{8})", found[0])
    return f'dense<"0x{"".join(bytes.fromhex(each)[::-1].hex() for each in numbers)}">'


def verify_program(module: ModuleOp, name: str = "<program>") -> None:
    """Make sure that a program is well-formed.

    Raises:
        NpuProgramError: it is not.
    """
    try:
        module.verify()
    except (VerifyException, DiagnosticException) as error:
        raise NpuProgramError(f"{name}: {error}") from error
    kernel_of(module)


def kernel_of(module: ModuleOp) -> FuncOp:
    """The function of a program: there is one.

    Raises:
        NpuProgramError: there is none, or there are several.
    """
    functions = [op for op in module.ops if isinstance(op, FuncOp)]
    if len(functions) != 1 or not functions[0].body.blocks:
        raise NpuProgramError(f"a program has one function with a body; this one has {len(functions)} functions")
    return functions[0]


def kernel_name(module: ModuleOp) -> str:
    """The name of a program's kernel, as its source has it."""
    return unquote(kernel_of(module).sym_name.data)


def argument_names(module: ModuleOp) -> list[str]:
    """The names of a program's arguments, as its source has them; "" for one that has none."""
    attributes = kernel_of(module).arg_attrs
    names = [each.data.get(NAME) for each in attributes.data] if attributes is not None else []
    return [unquote(each.data) if isinstance(each, StringAttr) else "" for each in names]


def location_of(span: Span) -> LocationAttr:
    """A place in the source as MLIR has it. The end of the place is lost."""
    if not span.line:
        return UnknownLoc()
    return FileLineColLoc(StringAttr(encoded(span.file)), IntAttr(span.line), IntAttr(span.column))


def span_of(location: LocationAttr) -> Span:
    """The place in the source that a location names; an unknown one if it names none."""
    if isinstance(location, FileLineColLoc):
        line, column = location.line.data, location.column.data
        return Span(unquote(location.filename.data), line, column, line, column + 1)
    return Span()


def encoded(name: str) -> str:
    """A name of a file or a kernel, in which what text in quotes cannot have is written as in a URL."""
    return quote(name, safe=" !#$&'()*+,-./:;<=>?@[]^_`{|}~")
