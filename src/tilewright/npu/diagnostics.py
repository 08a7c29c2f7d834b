"""What the checker says: diagnostics with stable codes, collected rather than raised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from tilewright.errors import NpuKernelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tilewright.npu.profiles import Profile
    from tilewright.npu.source import SourceFile, Span

Severity: TypeAlias = Literal["error", "warning", "off"]

PREFIX = "NPU-"
_IGNORE = re.compile(r"#.*?\bnpu:\s*ignore\b(?!-)\s*(?:\[(?P<codes>[^\]]*)\])?")


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    Attributes:
        code: stable name of the rule, such as ``"KEEP_DIMS"``; printed as ``NPU-KEEP_DIMS``.
        severity: ``"error"`` or ``"warning"``, by the profile.
        message: what is wrong, in one sentence.
        span: where.
        hint: what to write instead; "" if there is nothing to suggest.
        profile: name of the profile that was asked.
    """

    code: str
    severity: Severity
    message: str
    span: Span
    hint: str = ""
    profile: str = ""

    def __str__(self) -> str:
        hint = f"; hint: {self.hint}" if self.hint else ""
        return f"{self.span}: {self.severity}[{PREFIX}{self.code}] {self.message}{hint}"


class Diagnostics:
    """Collects what is found in files, each finding once, and drops what a line's comment ignores.

    A finding is ignored where a line of it has the comment ``# npu: ignore[CODE, CODE]``, or its first or last line
    ``# npu: ignore`` for all codes.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.sources: dict[str, SourceFile] = {}
        self._ignored: set[tuple[str, Span]] = set()
        self._found: dict[tuple[str, Span], Diagnostic] = {}

    def report(self, code: str, source: SourceFile, span: Span, message: str, hint: str = "") -> None:
        """Note a finding, with the severity that the profile gives its rule."""
        self.sources.setdefault(source.path, source)
        severity = self.profile.severity(code)
        if severity == "off" or (code, span) in self._found:
            return
        if _ignores(source, span, code):
            self._ignored.add((code, span))
            return
        self._found[code, span] = Diagnostic(code, severity, message, span, hint, self.profile.name)

    @property
    def ignored(self) -> int:
        """How many findings a comment ignores."""
        return len(self._ignored)

    @property
    def all(self) -> tuple[Diagnostic, ...]:
        """Every finding in the order of the source."""
        return tuple(sorted(self._found.values(), key=lambda each: (each.span, each.code)))

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """The errors among them."""
        return tuple(each for each in self.all if each.severity == "error")

    def raise_errors(self, what: str) -> None:
        """Raise all findings together if there is an error among them.

        Raises:
            NpuKernelError: there is one.
        """
        if self.errors:
            raise NpuKernelError(failure(what, self.all, self.sources), self.all)


def failure(what: str, found: Iterable[Diagnostic], sources: dict[str, SourceFile]) -> str:
    """The text of an error: how many findings, then each with its line."""
    from tilewright.npu.check.render import render_text

    found = tuple(found)
    count = sum(each.severity == "error" for each in found)
    return f"{what}: {count} error{'s'[: count != 1]}\n{render_text(found, sources)}"


def _ignores(source: SourceFile, span: Span, code: str) -> bool:
    for number in range(span.line, span.end_line + 1):
        match = _IGNORE.search(source.line(number))
        if match is None:
            continue
        codes = match.group("codes")
        if codes is None:
            if number in {span.line, span.end_line}:
                return True
        elif code in {each.strip().removeprefix(PREFIX) for each in codes.split(",")}:
            return True
    return False
