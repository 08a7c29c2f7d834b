"""Who computes an operation: implementations as data, their selection, and the record that explains it."""

from tilewright.dispatch.implementation import Implementation, Supported, Unsupported, Verdict, triton_verdict
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
    "triton_verdict",
    "use",
]
