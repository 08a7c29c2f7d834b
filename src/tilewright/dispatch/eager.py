"""Calls that may skip torch's dispatcher, and the plans they run.

A registered operator costs 4 us a call in the dispatcher and, with a registered backward, up to 80 us in its Python
wrapper. A call on plain tensors that nobody watches needs neither: the public functions run their plan directly and
wire their backward by a ``torch.autograd.Function``. Under ``torch.compile``, in a dispatch mode, under functorch, in
a trace or while torch's profiler records, they go through the registered operator.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from tilewright.dispatch.launch import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

P = TypeVar("P")

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_profiler_enabled = torch.autograd._profiler_enabled
# Private to torch; where a release lacks one, every call takes the registered operator, which is always right.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_functorch_level = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_tracing_state = getattr(torch._C, "_get_tracing_state", None)


def unobserved(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a call on these tensors may skip torch's dispatcher."""
    if _is_compiling() or _dispatch_modes is None or _functorch_level is None or _tracing_state is None:
        return False
    if _dispatch_modes() or _functorch_level() is not None or _profiler_enabled() or _tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or tensor.is_meta):
            return False
    return True


def metadata(tensor: torch.Tensor | None) -> Hashable:
    """All of a tensor that a plan may depend on."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % ALIGNMENT


class PlanCache(Generic[P]):
    """Plans, one for each combination of metadata and options, the oldest dropped when there are too many.

    A plan holds no tensor, so keeping one costs little; the bound keeps a server that sees endless shapes small.
    """

    def __init__(self, size: int = 4096) -> None:
        self._plans: dict[Hashable, P] = {}
        self._size = size
        self._growing = Lock()

    def get(self, key: Hashable, make: Callable[[], P]) -> P:
        """The plan of ``key``, made at first use. An error in making it is not kept."""
        plan = self._plans.get(key)
        if plan is None:
            plan = make()
            with self._growing:
                if len(self._plans) >= self._size:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
        return plan

    def __len__(self) -> int:
        return len(self._plans)
