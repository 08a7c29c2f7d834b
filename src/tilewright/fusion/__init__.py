"""Graph fusion under ``torch.compile`` that says what it did: rules over a producer and all of its consumers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.fusion.api import FusionWarning, compile, options, report_of
    from tilewright.fusion.found import Found, NearMiss
    from tilewright.fusion.recognise import add_adapter, remove_adapter
    from tilewright.fusion.report import Decision, FusionReport, GraphReport
    from tilewright.fusion.rules import RULES

_HOME = {
    "Decision": "report",
    "Found": "found",
    "FusionReport": "report",
    "FusionWarning": "api",
    "GraphReport": "report",
    "NearMiss": "found",
    "RULES": "rules",
    "add_adapter": "recognise",
    "compile": "api",
    "options": "api",
    "remove_adapter": "recognise",
    "report_of": "api",
}

__all__ = [
    "RULES",
    "Decision",
    "Found",
    "FusionReport",
    "FusionWarning",
    "GraphReport",
    "NearMiss",
    "add_adapter",
    "compile",
    "options",
    "remove_adapter",
    "report_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tilewright.fusion' has no attribute '{name}'")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
