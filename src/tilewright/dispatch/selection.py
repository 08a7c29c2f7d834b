"""Which implementation serves a call, and the record that says why.

The choice is a pure function of operation, device family, dtypes and shape class. It is asked for in this order: the
``impl=`` argument, ``with tilewright.use(...)``, detection. A choice that was asked for and cannot be honoured raises.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tilewright.dispatch.implementation import Unsupported
from tilewright.errors import DTypeError, ImplementationError, UnknownNameError
from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from tilewright.dispatch.implementation import Implementation


class _Override(threading.local):
    """The implementation that ``use`` asks for in this thread. Dynamo can guard on an attribute of such an object."""

    def __init__(self) -> None:
        self.name: str | None = None


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
    """A call as selection sees it: ``requested`` is the implementation asked for, ``how`` in what words, if known."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shape: Any
    requested: str | None
    how: str = ""


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
        return asdict(self) | {
            "dtypes": list(self.dtypes),
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }


@dataclass(frozen=True)
class Operation:
    """A public function that can be explained.

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
        return decide(self.name, self.implementations, asked_for(self.describe(*args, **kwargs))).explanation


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in.

    Raises:
        DTypeError: they do not fit the function's signature.
    """
    try:
        given = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise DTypeError("explain", function.__name__, str(error)) from error
    given.apply_defaults()
    return given.arguments


def asked_for(described: Described) -> Described:
    """The call with what ``use`` asks for, if its ``impl=`` argument does not say."""
    if described.requested is not None:
        return described._replace(how="impl=")
    return described._replace(requested=override(), how="use()")


def select(name: str, implementations: Sequence[Implementation], described: Described) -> Any:
    """The planner of the implementation that serves a call.

    Raises:
        UnknownNameError: no implementation has the name that was asked for.
        ImplementationError: the one that was asked for cannot serve the call, or none can.
    """
    decision = decide(name, implementations, described)
    explanation = decision.explanation
    if explanation.chosen is None:
        raise ImplementationError(f"{name}: {explanation.reason}\n{explanation}")
    for implementation, failure in decision.failed:
        implementation.warn_of_failure(name, failure, explanation.chosen)
    return decision.planner


class Decision(NamedTuple):
    """An explanation, the chosen one's planner (None if the call must raise), and what could not be loaded, and why."""

    explanation: Explanation
    planner: Any
    failed: list[tuple[Implementation, str]]


def decide(name: str, implementations: Sequence[Implementation], described: Described) -> Decision:
    """Choose, and say why."""
    asked, how = described.requested, f" by {described.how}" if described.how else ""
    known = [implementation.name for implementation in implementations]
    if asked is not None and asked not in known:
        there_are = f"there are: {', '.join(known)}"
        raise UnknownNameError(f"{name}: no implementation is called '{asked}' (asked for{how}); {there_are}")
    device = facts(described.device)
    chosen: Implementation | None = None
    planner: Any = None
    reasons: dict[str, str] = {}
    failed: list[tuple[Implementation, str]] = []
    for implementation in implementations:
        verdict = implementation.supports(device, described.dtypes, described.shape)
        if isinstance(verdict, Unsupported):
            reason = verdict.reason
        elif asked not in (None, implementation.name):
            reason = f"supports such a call, but '{asked}' was asked for"
        elif chosen is not None:
            reason = f"supports such a call, but '{chosen.name}' comes first"
        elif verdict.on_request and asked is None:
            reason = f"only on request: {verdict.note}"
        else:
            planner, failure = implementation.planner()
            if failure is None:
                chosen = implementation
                reason = verdict.note or "supports this call"
            else:
                failed.append((implementation, failure))
                reason = failure
        reasons[implementation.name] = reason
    explanation = Explanation(
        operation=name,
        device=str(device),
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in described.dtypes),
        shape=str(described.shape),
        requested=f"{asked} ({described.how or 'impl='})" if asked else None,
        chosen=chosen.name if chosen else None,
        reason=_summary(chosen, asked, how, reasons),
        candidates=tuple(Candidate(i.name, i is chosen, reasons[i.name]) for i in implementations),
    )
    return Decision(explanation, planner, failed)


def _summary(chosen: Implementation | None, asked: str | None, how: str, reasons: dict[str, str]) -> str:
    """The whole decision in a sentence."""
    if chosen is None:
        return f"'{asked}' was asked for{how} but {reasons[asked]}" if asked else "no implementation can serve it"
    if asked is not None:
        return f"asked for{how}; {reasons[chosen.name]}"
    names = list(reasons)
    passed_over = [f"{name}: {reasons[name]}" for name in names[: names.index(chosen.name)]]
    return "; ".join([reasons[chosen.name], *passed_over])
