"""Who computes an operation: implementations as data, their selection, and the record that explains it."""

from tilewright.dispatch.implementation import (
    Implementation,
    Supported,
    Unsupported,
    Verdict,
    serves_anywhere,
    serves_where_triton_runs,
    triton_verdict,
)
from tilewright.dispatch.selection import Candidate, Described, Explanation, Operation, asked_for, select, use

__all__ = [
    "Candidate",
    "Described",
    "Explanation",
    "Implementation",
    "Operation",
    "Supported",
    "Unsupported",
    "Verdict",
    "asked_for",
    "select",
    "serves_anywhere",
    "serves_where_triton_runs",
    "triton_verdict",
    "use",
]
