"""An implementation of an operation, as data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tilewright.platforms import DeviceFacts


@dataclass(frozen=True)
class Supported:
    """The implementation can serve the call.

    Attributes:
        note: what is worth knowing about how, such as ``"one kernel launch"``.
        on_request: detection passes the implementation over; it serves only a caller who names it.
    """

    note: str = ""
    on_request: bool = False


@dataclass(frozen=True)
class Unsupported:
    """The implementation cannot serve the call, and why."""

    reason: str


Verdict = Supported | Unsupported


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation family.

    Attributes:
        name: ``"reference"``, ``"triton"``, ...
        load: imports what the implementation needs, at its first use, and returns its planner: a function from a
            validated call to a function that runs it. What planner and call are is the family's affair.
        supports: ``(device, dtypes, shape) -> Supported | Unsupported``, a pure function. It may read only its
            arguments; whether a package is installed shows when ``load`` runs.
    """

    name: str
    load: Callable[[], Any]
    supports: Callable[[DeviceFacts, tuple[torch.dtype, ...], Any], Verdict]
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def planner(self) -> tuple[Any, str | None]:
        """The planner, or None and the reason why it cannot be loaded. The outcome is kept."""
        if not self._loaded:
            try:
                self._loaded.update(planner=self.load(), reason=None)
            except Exception as error:  # a broken optional package may raise anything
                reason = f"cannot be loaded: {type(error).__name__}: {error}"
                self._loaded.update(planner=None, reason=reason)
        return self._loaded["planner"], self._loaded["reason"]

    def warn_of_failure(self, operation: str, reason: str, served_by: str) -> None:
        """Say once that another implementation serves because this one cannot be loaded."""
        if self._loaded.setdefault("warned", False):
            return
        self._loaded["warned"] = True
        warnings.warn(
            f"tilewright: {operation}: implementation '{self.name}' {reason}; '{served_by}' serves instead",
            RuntimeWarning,
            stacklevel=2,
        )


def serves_anywhere(device: DeviceFacts, dtypes: tuple[torch.dtype, ...], shape: Any) -> Verdict:
    """``supports`` of a definition in plain PyTorch."""
    return Supported("plain PyTorch, runs on every device")


def serves_where_triton_runs(device: DeviceFacts, dtypes: tuple[torch.dtype, ...], shape: Any) -> Verdict:
    """``supports`` of Triton kernels that ask for nothing else."""
    return triton_verdict(device)


def triton_verdict(device: DeviceFacts) -> Verdict:
    """Whether a Triton kernel can run on this device at all."""
    if device.triton == "compiled":
        return Supported(device.triton_note or "compiled for this device")
    if device.triton == "interpreted":
        note = device.triton_note or "Triton's interpreter (TRITON_INTERPRET=1), slow and for tests"
        return Supported(note, on_request=True)
    return Unsupported(device.triton_note or f"Triton has no target for {device.kind} here")
