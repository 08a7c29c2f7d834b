"""Which implementation serves a call, and the record that says why.

The choice is a pure function of operation, device family, dtypes and shape class. It is asked for in this order: the
``impl=`` argument, ``with tilewright.use(...)``, detection. A choice that was asked for and cannot be honoured raises.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tilewright.dispatch.implementation import Supported, Unsupported
from tilewright.errors import ImplementationError, UnknownNameError
from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from tilewright.dispatch.implementation import Implementation
    from tilewright.platforms import DeviceFacts


class _Override(threading.local):
    """The implementation that ``use`` asks for in this thread. Dynamo can guard on an attribute of such an object."""

    name: str | None = None


_OVERRIDE = _Override()


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Ask for one implementation for every operation called in this block, in this thread.

    An ``impl=`` argument takes precedence. Blocks nest. The backward of a call made in the block is served by the same
    implementation, wherever it runs.

    Args:
        implementation: its name, such as ``"reference"``.

    Example:
        >>> import torch, tilewright
        >>> with tilewright.use("reference"):
        ...     y = tilewright.rope(torch.ones(1, 2, 1, 4), torch.ones(2, 2), torch.zeros(2, 2))
    """
    before = _OVERRIDE.name
    _OVERRIDE.name = implementation
    try:
        yield
    finally:
        _OVERRIDE.name = before


def override() -> str | None:
    """What :func:`use` asks for in this thread."""
    return _OVERRIDE.name


class Described(NamedTuple):
    """A call as selection sees it."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shape: Any
    requested: str | None


@dataclass(frozen=True)
class Candidate:
    """What was decided about one implementation."""

    name: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Which implementation serves a call, which do not, and why. ``print`` it.

    Attributes:
        operation: the public function's name.
        device: the device family, architecture and product.
        dtypes: the dtypes that the choice depends on.
        shape: the shape class that the choice depends on.
        requested: the implementation that was asked for, and how; None for detection.
        chosen: the implementation that serves; None if the one asked for cannot, and then the call raises.
        reason: why, in a sentence.
        candidates: every implementation, in order of preference.
    """

    operation: str
    device: str
    dtypes: tuple[str, ...]
    shape: str
    requested: str | None
    chosen: str | None
    reason: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.operation} on {self.device}, {', '.join(self.dtypes)}, {self.shape}",
            f"  served by: {self.chosen or 'nothing: the call raises'} ({self.reason})",
        ]
        width = max(len(candidate.name) for candidate in self.candidates)
        for candidate in self.candidates:
            mark = "*" if candidate.chosen else " "
            lines.append(f"  {mark} {candidate.name:<{width}}  {candidate.reason}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The record in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class Operation:
    """A public function as dispatch knows it.

    Attributes:
        name: the public function's name.
        describe: takes the function's arguments, validates them, and says what selection needs.
        implementations: in order of preference.
    """

    name: str
    describe: Callable[..., Described]
    implementations: tuple[Implementation, ...]

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Explain the choice for this call, without making it."""
        explanation, _ = self._decide(self.describe(*args, **kwargs))
        return explanation

    def select(self, described: Described) -> tuple[str, Any]:
        """The chosen implementation's name and its planner.

        Raises:
            UnknownNameError: no implementation has the name that was asked for.
            ImplementationError: the one that was asked for cannot serve the call, or none can.
        """
        explanation, planner = self._decide(described)
        if explanation.chosen is None:
            raise ImplementationError(f"{self.name}: {explanation.reason}\n{explanation}")
        return explanation.chosen, planner

    def _decide(self, described: Described) -> tuple[Explanation, Any]:
        asked = described.requested if described.requested is not None else override()
        how = "impl=" if described.requested is not None else "use()"
        known = [implementation.name for implementation in self.implementations]
        if asked is not None and asked not in known:
            raise UnknownNameError(
                f"{self.name}: no implementation is called '{asked}' (asked for by {how}); there are: {', '.join(known)}"
            )
        device = facts(described.device)
        chosen: Implementation | None = None
        planner: Any = None
        reasons: dict[str, str] = {}
        failed: list[tuple[Implementation, str]] = []
        for implementation in self.implementations:
            if asked is not None and implementation.name != asked:
                verdict = implementation.supports(device, described.dtypes, described.shape)
                reasons[implementation.name] = _unasked(verdict, asked)
                continue
            if chosen is not None:
                verdict = implementation.supports(device, described.dtypes, described.shape)
                reasons[implementation.name] = _second(verdict, chosen.name)
                continue
            candidate, reason = self._consider(implementation, device, described, asked is not None)
            reasons[implementation.name] = reason
            if candidate is not None:
                chosen, planner = implementation, candidate
            elif reason.startswith("cannot be loaded"):
                failed.append((implementation, reason))
        if chosen is not None:
            for implementation, reason in failed:
                implementation.warn_of_failure(self.name, reason, chosen.name)
        return self._record(described, device, asked, how, chosen, reasons), planner

    @staticmethod
    def _consider(
        implementation: Implementation, device: DeviceFacts, described: Described, asked: bool
    ) -> tuple[Any, str]:
        """The planner and what to note, or None and why not."""
        verdict = implementation.supports(device, described.dtypes, described.shape)
        if isinstance(verdict, Unsupported):
            return None, verdict.reason
        if verdict.on_request and not asked:
            return None, f"only on request: {verdict.note}"
        planner, failure = implementation.planner()
        if failure is not None:
            return None, failure
        return planner, verdict.note or "supports this call"

    def _record(
        self,
        described: Described,
        device: DeviceFacts,
        asked: str | None,
        how: str,
        chosen: Implementation | None,
        reasons: dict[str, str],
    ) -> Explanation:
        if chosen is None:
            reason = f"'{asked}' was asked for by {how} but {reasons[asked]}" if asked else "no implementation can"
        elif asked is not None:
            reason = f"asked for by {how}; {reasons[chosen.name]}"
        else:
            before = [f"{name}: {why}" for name, why in reasons.items() if name != chosen.name]
            before = before[: [i.name for i in self.implementations].index(chosen.name)]
            reason = "; ".join([reasons[chosen.name], *before])
        return Explanation(
            operation=self.name,
            device=str(device),
            dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in described.dtypes),
            shape=str(described.shape),
            requested=f"{asked} ({how})" if asked else None,
            chosen=chosen.name if chosen else None,
            reason=reason,
            candidates=tuple(
                Candidate(implementation.name, implementation is chosen, reasons[implementation.name])
                for implementation in self.implementations
            ),
        )


def _unasked(verdict: Supported | Unsupported, asked: str) -> str:
    return verdict.reason if isinstance(verdict, Unsupported) else f"supports such a call, but '{asked}' was asked for"


def _second(verdict: Supported | Unsupported, chosen: str) -> str:
    return verdict.reason if isinstance(verdict, Unsupported) else f"supports such a call, but '{chosen}' comes first"
