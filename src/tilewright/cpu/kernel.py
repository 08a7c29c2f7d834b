"""A kernel between compilation and launch: its description, and the object that runs it."""

from __future__ import annotations

import ctypes
import json
import struct
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tilewright.cpu import build, reader
from tilewright.cpu.c_program import write_program
from tilewright.cpu.diagnostics import pointed
from tilewright.cpu.lowering import lower
from tilewright.cpu.types import BF16, F16, F64, I1, Pointer, Scalar, parse_type
from tilewright.errors import KernelAccessError, KernelAssertionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilewright.cpu import ttir
    from tilewright.cpu.loops import Program
    from tilewright.cpu.types import Type


def describe(text: str, executor: str, fuse_multiply_add: bool, checked: bool) -> dict[str, Any]:
    """A kernel as data that JSON holds.

    Args:
        text: generic Triton IR.
        executor: what will run it, ``"native"`` or ``"interpreter"``.
        fuse_multiply_add: whether a product and a sum may be rounded once.
        checked: whether every access is checked.

    Raises:
        UnsupportedKernelError: the kernel does what this target does not support.
        KernelBuildError: the C compiler rejects the native code.
    """
    module = reader.read(text)
    arguments = module.kernel.regions[0].blocks[0].arguments
    artifact: dict[str, Any] = {
        "name": module.kernel.attributes["sym_name"],
        "executor": executor,
        "fuse_multiply_add": fuse_multiply_add,
        "checked": checked,
        "types": [_mlir(argument.type) for argument in arguments],
        "ttir": text,
    }
    if executor == "native":
        program, make = lower(module, checked, fuse_multiply_add)
        artifact["written"] = [parameter.written for parameter in program.parameters]
        artifact["c"] = write_program(program, make, checked)
        build.shared_object(artifact["c"], artifact["name"], fuse_multiply_add)
    return artifact


def loop_program(text: str, aliased: bool = False) -> Program:
    """The loop program of generic Triton IR, for those who want to read it."""
    return lower(reader.read(text), aliased, fuse_multiply_add=True)[0]


def _mlir(type_: Type) -> str:
    if isinstance(type_, Pointer):
        return f"!tt.ptr<{_mlir(type_.pointee)}>"
    return str(type_)


class _Report(ctypes.Structure):
    """``tw_report`` of ``runtime.h``."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("site", ctypes.c_int32),
        ("program", ctypes.c_int32 * 3),
        ("element", ctypes.c_int32),
        ("address", ctypes.c_int64),
    )


_STRUCT_CODES = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "f64": "d"}


class Kernel:
    """A kernel that can be launched.

    Args:
        data: what :func:`describe` gave, as JSON.
    """

    def __init__(self, data: bytes) -> None:
        self._data: dict[str, Any] = json.loads(data)
        self.name: str = self._data["name"]
        self.types: list[Type] = [parse_type(text) for text in self._data["types"]]
        self.pointers = [k for k, type_ in enumerate(self.types) if isinstance(type_, Pointer)]
        written = self._data.get("written", [False] * len(self.types))
        others = [
            (w, [k for k in self.pointers if k != w and (k > w or not written[k])]) for w in self.pointers if written[w]
        ]
        self.may_overlap = [(w, rest) for w, rest in others if rest]
        """Which arguments' memory must not overlap for the faster code: a written one, and others."""
        self.native = self._data["executor"] == "native"
        self.checked: bool = self._data["checked"]
        codes = "".join(self._code(type_) for type_ in self.types)
        self.pack = struct.Struct(f"@{codes}").pack
        self.small = [k for k, type_ in enumerate(self.types) if type_ in (F16, BF16)]
        self.unsigned_limits = [
            (k, 1 << type_.bits)
            for k, type_ in enumerate(self.types)
            if isinstance(type_, Scalar) and type_.is_int and type_ != I1
        ]

    @staticmethod
    def _code(type_: Type) -> str:
        if isinstance(type_, Pointer):
            return "P"
        assert isinstance(type_, Scalar)
        return _STRUCT_CODES.get(type_.name, "d" if type_ == F64 else "f")

    @cached_property
    def direct(self) -> Any:
        """The native function for arguments whose memory does not overlap."""
        return self._function(self._data["c"])

    @cached_property
    def aliased(self) -> Any:
        """The native function for arguments whose memory may overlap. It is built when the first such launch comes."""
        if self.checked:
            return self.direct  # which takes nothing for granted
        program, make = lower(self.module, True, self._data["fuse_multiply_add"])
        return self._function(write_program(program, make, False))

    @cached_property
    def module(self) -> ttir.Module:
        """The kernel's Triton IR."""
        return reader.read(self._data["ttir"])

    def _function(self, source: str) -> Any:
        library = build.load(build.shared_object(source, self.name, self._data["fuse_multiply_add"]))
        function = library.tw_launch
        integer = ctypes.c_int32
        function.argtypes = [
            ctypes.c_char_p, integer, integer, integer, ctypes.POINTER(_Report), ctypes.c_void_p, integer,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        function.restype = None
        return function

    def run(
        self,
        grid: tuple[int, int, int],
        values: Sequence[Any],
        overlapping: bool,
        ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Run all programs of the grid.

        Args:
            grid: how many programs there are along each axis.
            values: the arguments; pointers as addresses.
            overlapping: whether memory that is written may overlap with other arguments'.
            ranges: where checked, the memory that each pointer may reach, as start and end.

        Raises:
            KernelAssertionError: a ``tl.device_assert`` failed.
            KernelAccessError: an access was out of bounds, where that is checked.
        """
        if min(grid) <= 0:
            return
        if not self.native:
            self._interpret(grid, values, ranges)
            return
        function = self.aliased if overlapping else self.direct
        try:
            packed = self.pack(*values)
        except struct.error:
            packed = self.pack(*self._signed(values))
        report = _Report()
        if not self._prints and not self.checked:
            function(packed, *grid, report, None, 0, None, None)
        else:
            self._run_with_extras(function, packed, grid, report, ranges)
        if report.kind:
            raise self._error(report, ranges)

    def _signed(self, values: Sequence[Any]) -> list[Any]:
        """Unsigned integers as the signed ones of the same bits."""
        found = list(values)
        for k, limit in self.unsigned_limits:
            found[k] = (int(found[k]) + limit // 2) % limit - limit // 2
        return found

    @cached_property
    def _prints(self) -> bool:
        return "open_memstream(" in self._data["c"]

    def _run_with_extras(
        self,
        function: Any,
        packed: bytes,
        grid: tuple[int, int, int],
        report: _Report,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        flat = [bound for pair in ranges for bound in pair]
        bounds = (ctypes.c_int64 * max(1, len(flat)))(*flat)
        text, size = ctypes.c_void_p(), ctypes.c_size_t()
        function(packed, *grid, report, bounds, len(ranges), ctypes.byref(text), ctypes.byref(size))
        if text.value:
            printed = ctypes.string_at(text.value, size.value).decode(errors="replace")
            libc_free(text)
            print(printed, end="", flush=True)

    def _interpret(self, grid: tuple[int, int, int], values: Sequence[Any], ranges: Sequence[tuple[int, int]]) -> None:
        from tilewright.cpu.interpreter import StorageCheck, interpret

        check = None
        if self.checked:
            inside = [(low, high - low) for low, high in ranges]
            check = StorageCheck(inside, lambda address: self._nearest(address, ranges))
        interpret(self.module, grid, values, check=check)

    def _error(self, report: _Report, ranges: Sequence[tuple[int, int]]) -> Exception:
        program, _ = lower(self.module, self.checked, self._data["fuse_multiply_add"])
        site = program.sites[report.site]
        where = f"in program ({', '.join(map(str, report.program))})"
        if report.kind == 1:
            message = self._assertion(site.location)
            return KernelAssertionError(pointed(site.location, f"assertion failed {where}: {message}"))
        place = self._nearest(report.address, ranges)
        message = f"access out of bounds {where}, element {report.element} of the tile: {place}"
        return KernelAccessError(pointed(site.location, message))

    def _assertion(self, location: ttir.Location) -> str:
        for function in self.module.functions.values():
            from tilewright.cpu.analysis import operations_of

            for operation in operations_of(function.regions[0]):
                if operation.name == "tt.assert" and operation.location == location:
                    return str(operation.attributes.get("message", ""))
        return ""

    def _nearest(self, address: int, ranges: Sequence[tuple[int, int]]) -> str:
        """Where an address lies, seen from the argument whose memory is closest."""
        arguments = self.module.kernel.regions[0].blocks[0].arguments
        _, k = min((max(low - address, address - high, 0), k) for k, (low, high) in enumerate(ranges))
        low, high = ranges[k]
        number = self.pointers[k]
        type_ = self.types[number]
        assert isinstance(type_, Pointer)
        size = type_.pointee.bytes if isinstance(type_.pointee, Scalar | Pointer) else 1
        index, n = (address - low) // size, (high - low) // size
        return f"index {index} of {arguments[number].name}'s storage, which has {n} elements"


def libc_free(pointer: ctypes.c_void_p) -> None:
    """Give back memory that native code allocated."""
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(pointer)
