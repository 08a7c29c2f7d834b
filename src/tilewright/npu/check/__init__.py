"""The checker: everything that is wrong with kernels for an NPU, found at once, before any compiler sees them.

:func:`check_files` reads files of kernels without importing them. Each rule of :mod:`tilewright.npu.rules` that can be
decided from the text is; how hard a finding is depends on the profile. :mod:`tilewright.npu.check.render` writes what
was found as text, as JSON and as SARIF.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.errors import ArgumentError
from tilewright.npu.diagnostics import Diagnostic, Diagnostics
from tilewright.npu.module import KernelModule
from tilewright.npu.profiles import DEFAULT_PROFILE
from tilewright.npu.profiles import profile as profile_of
from tilewright.npu.source import SourceFile, Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Report", "check_file", "check_files"]

_MAY_HAVE_KERNEL = re.compile(r"^\s*@.*\bjit\b", re.MULTILINE)
_NOT_SEARCHED = ("__pycache__", "node_modules")


@dataclass(frozen=True)
class Report:
    """What the checker found.

    Attributes:
        diagnostics: every finding, in the order of files and lines.
        sources: the files that were checked, by path.
        ignored: how many findings a comment in the source ignored.
        profile: name of the profile that was asked.
    """

    diagnostics: tuple[Diagnostic, ...]
    sources: dict[str, SourceFile]
    ignored: int
    profile: str

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """The findings that are errors."""
        return tuple(each for each in self.diagnostics if each.severity == "error")

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        """The findings that are warnings."""
        return tuple(each for each in self.diagnostics if each.severity == "warning")

    def __str__(self) -> str:
        from tilewright.npu.check.render import render_text

        return render_text(self.diagnostics, self.sources)


def check_file(path: str | os.PathLike[str], profile: str = DEFAULT_PROFILE) -> Report:
    """Check a file of kernels, or every such file of a folder; see :func:`check_files`."""
    return check_files([path], profile)


def check_files(paths: Iterable[str | os.PathLike[str]], profile: str = DEFAULT_PROFILE) -> Report:
    """Check files of kernels together.

    A file without a kernel has no findings; one that is not Python has the finding ``SYNTAX``. Nothing is imported.

    Args:
        paths: files, and folders, in which every ``*.py`` with a kernel is checked.
        profile: name of the profile: which release of which compiler the kernels are for.

    Raises:
        ArgumentError: there is no such file or folder, or a file cannot be read as text.
        UnknownNameError: there is no such profile.
    """
    from tilewright.npu.check.modules import check_kernel_names, check_module
    from tilewright.npu.front import check_kernels

    diagnostics = Diagnostics(profile_of(profile))
    sources: dict[str, SourceFile] = {}
    modules = []
    for path in _files(paths):
        source = sources[path] = _read(path)
        try:
            module = KernelModule(source, source.parse())
        except SyntaxError as error:
            diagnostics.report("SYNTAX", source, _span(error, source), f"this is not Python: {error.msg}")
            continue
        if module.kernels:
            check_module(module, diagnostics)
            check_kernels(module, diagnostics)
            modules.append(module)
    check_kernel_names(modules, diagnostics)
    return Report(diagnostics.all, sources, diagnostics.ignored, profile)


def _files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The files of paths, each once."""
    seen: set[Path] = set()
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise ArgumentError("npu check", "FILE", f"there is no file or folder '{path}'")
        for file in _with_kernels(path) if path.is_dir() else (path,):
            if (place := file.resolve()) not in seen:
                seen.add(place)
                yield str(file)


def _with_kernels(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _NOT_SEARCHED and not (here / name / "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            if name.endswith(".py") and (here / name).is_file() and _may_have_kernel(here / name):
                yield here / name


def _may_have_kernel(path: Path) -> bool:
    """Whether a file of a folder is worth reading; what is no text has no kernel, and is no reason to stop."""
    try:
        return _MAY_HAVE_KERNEL.search(path.read_bytes().decode(errors="replace")) is not None
    except OSError as error:
        raise ArgumentError("npu check", "FILE", f"'{path}' cannot be read: {error}") from error


def _read(path: str) -> SourceFile:
    try:
        return SourceFile.read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("npu check", "FILE", f"'{path}' cannot be read: {error}") from error


def _span(error: SyntaxError, source: SourceFile) -> Span:
    """Where Python found that a file is not Python: at the latest at the end of its last line."""
    lines = max(len(source.lines), 1)
    line = min(error.lineno or 1, lines)
    column = min(error.offset or 1, len(source.line(line)) + 1) if line == error.lineno else 1
    column = max(column, 1)
    end_line, end_column = error.end_lineno or line, error.end_offset or 0
    if end_line != line or end_column <= column:
        end_line, end_column = line, column + 1
    return Span(source.path, line, column, end_line, end_column)
