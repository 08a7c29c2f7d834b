"""Calls that may skip torch's dispatcher, and the plans they run.

A registered operator costs 4 us a call in the dispatcher and, with a registered backward, up to 80 us in its Python
wrapper. A call on plain tensors that nobody watches needs neither: the public functions run their plan directly and
wire their backward by a ``torch.autograd.Function``. Under ``torch.compile``, in a dispatch mode, under functorch, in
a trace or while torch's profiler records, they go through the registered operator.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.autograd import forward_ad

from tilewright.dispatch.launch import ALIGNMENT
from tilewright.errors import ImplementationError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

P = TypeVar("P")

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
# Private to torch; where a release lacks one, every call takes the registered operator, which is always right.
_profiler_enabled: Any = getattr(torch.autograd, "_profiler_enabled", None)
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_functorch_level: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_tracing_state: Any = getattr(torch._C, "_get_tracing_state", None)
_CAN_TELL = None not in (_profiler_enabled, _dispatch_modes, _functorch_level, _tracing_state)


def unobserved(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether a call on these tensors may skip torch's dispatcher."""
    if _is_compiling():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if not _CAN_TELL:
        return False
    if _dispatch_modes() or _functorch_level() is not None or _profiler_enabled() or _tracing_state() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator would cost a third more
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


def _refuse_tangents(tensors: Iterable[torch.Tensor | None]) -> None:
    """The registered operators would drop a forward-mode derivative without a word."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ImplementationError("an argument has a forward-mode derivative, which no implementation computes")


def metadata(tensors: Iterable[torch.Tensor | None]) -> Hashable:
    """All that a plan may depend on in these tensors."""
    return tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNMENT) for t in tensors]
    )


def record(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its Python wrapper, whose concern is functorch: not for calls that are observed."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


class PlanCache(Generic[P]):
    """Plans, one for each combination of metadata and options, the oldest dropped when there are too many.

    A plan holds no tensor, so keeping one costs little; the bound keeps a server that sees endless shapes small.
    """

    def __init__(self, size: int = 4096) -> None:
        self._plans: dict[Hashable, P] = {}
        self._size = size
        self._growing = Lock()

    def get(self, key: Hashable) -> P | None:
        """The plan of ``key``, if there is one."""
        return self._plans.get(key)

    def put(self, key: Hashable, plan: P) -> P:
        """Keep a plan, and return it."""
        with self._growing:
            if len(self._plans) >= self._size:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan
        return plan

    def __len__(self) -> int:
        return len(self._plans)
