"""Building the program of a kernel: operations of the dialect, each with its place in the source."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    FunctionType,
    IntegerType,
    MemRefType,
    ModuleOp,
    bf16,
    f16,
    f32,
    f64,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region

from tilewright.npu.ir.text import encoded, location_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xdsl.ir import Attribute, Operation, SSAValue

    from tilewright.npu.language.core import dtype
    from tilewright.npu.source import Span

_NUMBERED = re.compile(r"_\d+")
_FLOATS = {"fp64": f64, "fp32": f32, "fp16": f16, "bf16": bf16}


def element_type(of: dtype) -> Attribute:
    """A dtype as MLIR has it."""
    return _FLOATS[of.name] if of.name in _FLOATS else IntegerType(of.bits)


class Builder:
    """Collects operations in the order of the program.

    Attributes:
        arguments: the function's arguments.
    """

    def __init__(self, tensors: Sequence[tuple[str, tuple[int, ...], dtype]]) -> None:
        types = [MemRefType(element_type(dtype), list(shape)) for _, shape, dtype in tensors]
        self._body = self._block = Block(arg_types=types)
        self._types = types
        for argument, (name, _, _) in zip(self._body.args, tensors, strict=True):
            self.name(argument, name)
        self.arguments: list[SSAValue] = list(self._body.args)

    def add(self, operation: Operation, span: Span) -> Operation:
        """Append an operation that stands at ``span`` in the source. The file is named without its folder.

        So a program's text is the same wherever it was compiled.
        """
        operation.location = location_of(replace(span, file=Path(span.file).name))
        self._block.add_op(operation)
        return operation

    @staticmethod
    def name(value: SSAValue, name: str) -> None:
        """Name a value in the program's text as the source does. MLIR has names of ASCII only, and numbers them."""
        if value.name_hint is None and name.isascii() and not _NUMBERED.fullmatch(name):
            value.name_hint = name

    @contextmanager
    def region(self) -> Iterator[Region]:
        """A region that what is added meanwhile goes into."""
        outer, self._block = self._block, Block()
        try:
            yield Region(self._block)
        finally:
            self._block = outer

    def finish(
        self, name: str, span: Span, attributes: dict[str, Attribute], arguments: Sequence[dict[str, Attribute]]
    ) -> ModuleOp:
        """The program, with attributes of the function and of its arguments."""
        self.add(ReturnOp(), span)
        function = FuncOp(
            encoded(name),
            FunctionType.from_lists(self._types, []),
            Region(self._body),
            arg_attrs=ArrayAttr([DictionaryAttr(each) for each in arguments]),
        )
        function.location = location_of(replace(span, file=Path(span.file).name))
        function.attributes.update(attributes)
        return ModuleOp([function])
