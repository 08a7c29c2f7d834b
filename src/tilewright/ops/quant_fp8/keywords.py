"""Formats from the keywords of the public functions, and as the text that the registered operators take.

What Dynamo traces here is written so that a graph holds for its formats alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from tilewright.errors import DTypeError
from tilewright.ops.quant_fp8.format import QuantFormat, QuantPolicy, checked, encoded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = ParamSpec("P")
R = TypeVar("R")
_POLICY_FIELDS = tuple(QuantPolicy.__dataclass_fields__)


def _called_by_dynamo(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that Dynamo calls instead of tracing it, guarding on its arguments.

    ``torch.compiler.assume_constant_result`` sets the same mark, but imports Dynamo, and with it Triton, to do so.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@lru_cache(maxsize=256, typed=True)
def _preset(group_size: Any, scale_format: Any, scale_layout: Any, dtype: Any, policy: str) -> QuantFormat:
    return QuantFormat(group_size, scale_format, scale_layout, dtype, policy)


def format_of(group_size: Any, scale_format: Any, scale_layout: Any, dtype: Any, policy: Any) -> QuantFormat:
    """The format that keywords describe, of any values: it is judged where calls are.

    Those of a policy that is no preset are not kept: fields of it that are equal need not be of the same type.
    """
    if type(policy) is str and not torch.compiler.is_compiling():
        try:
            return _preset(group_size, scale_format, scale_layout, dtype, policy)
        except TypeError:  # something without a hash, which will be refused
            pass
    return QuantFormat(group_size, scale_format, scale_layout, dtype, policy)


def formats_of(first: QuantFormat, also: Sequence[QuantFormat], operation: str) -> tuple[QuantFormat, ...]:
    """Every format of a call, not judged yet.

    Raises:
        DTypeError: ``also`` is no list or tuple.
    """
    if not isinstance(also, list | tuple):
        _refuse_type(operation, type(also).__name__, "a list or tuple of QuantFormat")
    return (first, *also)


@_called_by_dynamo
def _refuse_type(operation: str, given: str, expected: str) -> None:
    """Refuse ``also``. Dynamo cannot trace an error's constructor."""
    raise DTypeError(operation, "also", f"got {given}; expected {expected}")


def texts_of(formats: Sequence[Any], device: str, operation: str) -> list[str]:
    """The formats of a call on ``device`` as the operators take them, judged."""
    texts = []
    for index, f in enumerate(formats):
        if not isinstance(f, QuantFormat):
            _refuse_type(operation, type(f).__name__, "QuantFormat")
        own = f.policy
        policy = [getattr(own, field) for field in _POLICY_FIELDS] if isinstance(own, QuantPolicy) else [own]
        fields = [f.group_size, f.scale_format, f.scale_layout, f.dtype, *policy]
        texts.append(_text(operation, "also" if index else "", device, *[_constant(value) for value in fields]))
    return texts


def _constant(value: Any) -> Any:
    """The value itself. Dynamo settles numbers that it would leave open when they are compared and when they are keys.

    Formats decide which kernel runs, so a graph holds for one of them.
    """
    if value is None or isinstance(value, torch.dtype):
        return value
    if value != 0:
        pass
    return next(iter({value: None}))


@_called_by_dynamo
def _text(
    operation: str, name: str, device: str, group_size: Any, scale_format: Any, scale_layout: Any, dtype: Any,
    *policy: Any,
) -> str:  # fmt: skip
    """A format as the operators take it."""
    own = policy[0] if len(policy) == 1 else QuantPolicy(*policy)
    given = QuantFormat(group_size, scale_format, scale_layout, dtype, own)
    return encoded(checked(given, torch.device(device), operation, name))
