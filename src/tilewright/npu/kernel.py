"""``@jit``: a function whose source is a kernel, and its compilation for tensors of given shapes."""

from __future__ import annotations

import ast
import functools
import inspect
import os
from functools import cached_property
from types import CodeType
from typing import TYPE_CHECKING, Any, NoReturn, overload

from tilewright.errors import ArgumentError, NpuLanguageError
from tilewright.npu.language.core import constexpr
from tilewright.npu.module import KernelModule
from tilewright.npu.source import SourceFile
from tilewright.optional import require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.npu.front.scope import Scope
    from tilewright.npu.program import Program


class Kernel:
    """A kernel's source, and what its names stand for.

    Attributes:
        name: its name.
        module: the file that it stands in.
        node: its definition in that file.
        scope: what the names of its module stand for.
    """

    name: str
    module: KernelModule
    node: ast.FunctionDef
    scope: Scope

    @property
    def arg_names(self) -> list[str]:
        """The names of its parameters."""
        from tilewright.npu.front import parameters

        return [each.arg for each in parameters(self.node)]


class FileKernel(Kernel):
    """A kernel of a file that is read, and not run: names stand for what the file's text tells."""

    def __init__(self, path: str, name: str) -> None:
        """Read a file.

        Raises:
            ArgumentError: the file cannot be read, is not Python, or has no such kernel.
        """
        from tilewright.npu.front import FileScope

        try:
            source = SourceFile.read(path)
            self.module = KernelModule(source, source.parse())
        except (OSError, UnicodeDecodeError, SyntaxError) as error:
            raise ArgumentError("npu", "file", f"{path}: {error}") from error
        kernels = self.module.kernels
        if name not in kernels:
            there = ", ".join(kernels) or "none"
            raise ArgumentError("npu", "kernel", f"{path} has no kernel '{name}'; there are: {there}")
        self.name, self.node = name, kernels[name]
        self.scope = FileScope(self.module, nested=self.node not in self.module.tree.body)


class JitFunction(Kernel):
    """A kernel that is loaded. It is never called: :meth:`warmup` compiles it, and what that gives can be run.

    Attributes:
        fn: the function as Python knows it.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.name = fn.__name__
        self._loaded = _state(fn.__code__.co_filename)
        functools.update_wrapper(self, fn)

    @cached_property
    def module(self) -> KernelModule:  # type: ignore[override]
        """The file that the kernel stands in.

        Raises:
            NpuLanguageError: its source is not at hand.
        """
        path = self.fn.__code__.co_filename
        try:
            source = SourceFile.read(path)
            return KernelModule(source, source.parse())
        except (OSError, UnicodeDecodeError) as error:
            message = f"kernel '{self.name}': its source is needed, and {path} cannot be read"
            raise NpuLanguageError(f"{message}; kernels stand in files") from error
        except SyntaxError as error:
            message = f"{path} has changed since it was loaded: line {error.lineno} is no Python any more"
            raise NpuLanguageError(f"{message}; load it again") from error

    @cached_property
    def node(self) -> ast.FunctionDef:  # type: ignore[override]
        """Its definition in that file.

        Raises:
            NpuLanguageError: the file has changed since it was loaded.
        """
        first = self.fn.__code__.co_firstlineno
        source = self.module.source
        changed = self._loaded != _state(source.path) and not _has_code(source, self.fn.__code__)
        for node in ast.walk(self.module.tree):
            if isinstance(node, ast.FunctionDef) and node.name == self.name and not changed:
                lines = {node.lineno, *(each.lineno for each in node.decorator_list)}
                if first in lines:
                    return node
        message = f"{source.path} has changed since it was loaded: kernel '{self.name}' at line {first} is another one"
        raise NpuLanguageError(f"{message}; load it again")

    @cached_property
    def scope(self) -> Scope:  # type: ignore[override]
        """What the names of its module stand for."""
        from tilewright.npu.front import LiveScope

        return LiveScope(self.module, self.fn)  # type: ignore[arg-type]

    def warmup(
        self,
        *args: Any,
        grid: int | Sequence[int] | Callable[..., Any] = (1,),
        host_layout: str | Sequence[int] | None = None,
        compute_dtype: str | None = None,
        profile: str | None = None,
        **kwargs: Any,
    ) -> Program:
        """Compile the kernel for tensors of these shapes and these constexprs.

        Args:
            args: the kernel's arguments in their order: tensors (their values are not read; meta tensors will do) and
                the values of constexprs.
            grid: ``(1,)``; the device runs one program.
            host_layout: which arguments stay in the host's layout, by their position among the arguments without the
                outputs: ``"1:2:3"`` or ``[1, 2, 3]``.
            compute_dtype: what the device's arithmetic is rounded to (default: as the profile says).
            profile: the compiler's release (default: the newest one that hardware was seen with).
            kwargs: arguments by name.

        Returns:
            The program; :meth:`Program.run` runs it on a CPU.

        Raises:
            NpuKernelError: the kernel breaks rules of the profile; all of them are in the message.
            ArgumentError: an argument is missing, or is nothing that a kernel can take.
        """
        require("xdsl", f"compiling kernel '{self.name}'", extra="npu")
        from tilewright.npu import shim
        from tilewright.npu.compile import compile_kernel

        given = self.bind(*args, **kwargs)
        options = {} if profile is None else {"profile": profile}
        program = compile_kernel(
            self, given, grid=grid, host_layout=host_layout, compute_dtype=compute_dtype, **options
        )
        shim.warmed_up(program, given)
        return program

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by name; constexprs as plain values.

        Raises:
            ArgumentError: there are too many, or too few.
        """
        try:
            bound = inspect.signature(self.fn).bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(self.name, "args", f"{error}; it takes {', '.join(self.arg_names)}") from error
        bound.apply_defaults()
        return {name: each.value if isinstance(each, constexpr) else each for name, each in bound.arguments.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise NpuLanguageError(f"kernel '{self.name}' cannot be called; compile it: {self.name}.warmup(..., grid=(1,))")

    def __getitem__(self, grid: Any) -> NoReturn:
        message = (
            f"kernel '{self.name}' is not launched on a grid: the device runs one program; use warmup(...).run(...)"
        )
        raise NpuLanguageError(message)

    def __repr__(self) -> str:
        return f"<kernel {self.name} of {self.fn.__module__}>"


def _state(path: str) -> tuple[int, int] | None:
    """What tells whether a file was written since; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _has_code(source: SourceFile, code: CodeType) -> bool:
    """Whether a file still has the function that was loaded."""
    waiting = [compile(source.text, source.path, "exec", dont_inherit=True)]
    while waiting:
        for each in waiting.pop().co_consts:
            if isinstance(each, CodeType):
                waiting.append(each)
                if each.co_firstlineno == code.co_firstlineno and each == code:
                    return True
    return False


@overload
def jit(fn: Callable[..., Any]) -> JitFunction: ...


@overload
def jit(fn: None = None, **options: Any) -> Callable[[Callable[..., Any]], JitFunction]: ...


def jit(
    fn: Callable[..., Any] | None = None, **options: Any
) -> JitFunction | Callable[[Callable[..., Any]], JitFunction]:
    """Make a function a kernel. The options of Triton's decorator are taken, and mean nothing here."""
    return JitFunction if fn is None else JitFunction(fn)
