"""What the checker found, as text for people, as JSON for programs, as SARIF for what shows findings beside code."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tilewright import __version__
from tilewright.npu.diagnostics import PREFIX
from tilewright.npu.profiles import profile
from tilewright.npu.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tilewright.npu.check import Report
    from tilewright.npu.diagnostics import Diagnostic
    from tilewright.npu.rules import Rule
    from tilewright.npu.source import SourceFile, Span

JSON_VERSION = 1
_SARIF_VERSION = "2.1.0"
_SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_SARIF_LEVELS = {"error": "error", "warning": "warning", "off": "none"}


def render_text(diagnostics: Iterable[Diagnostic], sources: dict[str, SourceFile]) -> str:
    """Findings as text: each with its line of source, carets under what is meant, and what to write instead.

    Args:
        diagnostics: the findings.
        sources: the files by path; without its file, a finding is one line.
    """
    return "\n".join(_entry(each, sources.get(each.span.file)) for each in diagnostics)


def _entry(found: Diagnostic, source: SourceFile | None) -> str:
    line = source.line(found.span.line) if source is not None else ""
    if source is None or not line.strip():
        return str(found)
    span = source.first_line_of(found.span)
    before, meant = line[: span.column - 1], line[span.column - 1 : span.end_column - 1]
    carets = "^" * max(sum(map(_width, meant)), 1)
    hint = f"  hint: {found.hint}" if found.hint else ""
    return "\n".join(
        (
            f"{found.span}: {found.severity}[{PREFIX}{found.code}] {found.message}",
            f"{found.span.line:5} | {line.rstrip()}",
            f"{'':5} | {''.join(map(_blank, before))}{carets}{hint}",
        )
    )


def _width(character: str) -> int:
    """How many columns a terminal gives a character."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _blank(character: str) -> str:
    """Space as wide as a character. A tab stays one, as nobody knows how wide it is shown."""
    return "\t" if character == "\t" else " " * _width(character)


def to_json(report: Report) -> dict[str, Any]:
    """A report as what ``json`` can write.

    Args:
        report: what the checker found.

    Returns:
        ``version`` of this form, ``tilewright`` that of the library, ``profile``, ``files``, ``diagnostics`` with
        ``code``, ``severity``, ``message``, ``hint``, ``file``, ``line``, ``column``, ``end_line`` and ``end_column``,
        all counted from 1 and the end behind what is meant, and ``counts`` of ``files``, ``errors``, ``warnings`` and
        ``ignored``.
    """
    return {
        "version": JSON_VERSION,
        "tilewright": __version__,
        "profile": report.profile,
        "files": list(report.sources),
        "diagnostics": [
            {
                "code": f"{PREFIX}{found.code}",
                "severity": found.severity,
                "message": found.message,
                "hint": found.hint,
                "file": found.span.file,
                "line": found.span.line,
                "column": found.span.column,
                "end_line": found.span.end_line,
                "end_column": found.span.end_column,
            }
            for found in report.diagnostics
        ],
        "counts": {
            "files": len(report.sources),
            "errors": len(report.errors),
            "warnings": len(report.warnings),
            "ignored": report.ignored,
        },
    }


def to_sarif(report: Report) -> dict[str, Any]:
    """A report in the Static Analysis Results Interchange Format, version 2.1.0, as what ``json`` can write.

    Files under the working directory are named relative to it, others by ``file:`` URIs.

    Args:
        report: what the checker found.
    """
    indices = {rule.code: index for index, rule in enumerate(RULES)}
    driver = {
        "name": "tilewright npu check",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_sarif_rule(each, report.profile) for each in RULES],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True}],
        "columnKind": "unicodeCodePoints",
        "artifacts": [{"location": {"uri": _uri(path)}, "sourceLanguage": "python"} for path in report.sources],
        "results": [_sarif_result(each, indices[each.code]) for each in report.diagnostics],
        "properties": {"profile": report.profile, "ignored": report.ignored},
    }
    return {"$schema": _SARIF_SCHEMA, "version": _SARIF_VERSION, "runs": [run]}


def _sarif_rule(rule: Rule, profile_name: str) -> dict[str, Any]:
    chosen = profile(profile_name)
    severity = chosen.severity(rule.code)
    reason = chosen.severities[rule.code][1] if rule.code in chosen.severities else rule.why
    return {
        "id": f"{PREFIX}{rule.code}",
        "name": rule.code,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.summary},
        "help": {"text": f"{rule.summary}\n\nWhy: {reason}. Ignore it in a line with: # npu: ignore[{rule.code}]"},
        "defaultConfiguration": {"level": _SARIF_LEVELS[severity], "enabled": severity != "off"},
    }


def _sarif_result(found: Diagnostic, index: int) -> dict[str, Any]:
    hint = f"\nhint: {found.hint}" if found.hint else ""
    place: dict[str, Any] = {"artifactLocation": {"uri": _uri(found.span.file)}}
    if found.span.line:
        place["region"] = _region(found.span)
    return {
        "ruleId": f"{PREFIX}{found.code}",
        "ruleIndex": index,
        "level": _SARIF_LEVELS[found.severity],
        "message": {"text": found.message + hint},
        "locations": [{"physicalLocation": place}],
    }


def _region(span: Span) -> dict[str, int]:
    return {
        "startLine": span.line,
        "startColumn": span.column,
        "endLine": span.end_line,
        "endColumn": span.end_column,
    }


def _uri(path: str) -> str:
    here, place = Path.cwd(), Path(os.path.abspath(path))
    return quote(place.relative_to(here).as_posix()) if place.is_relative_to(here) else place.as_uri()
