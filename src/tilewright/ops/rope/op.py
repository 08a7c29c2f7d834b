"""The registered operators of rotary embedding, their fakes and their backward.

``rope`` and ``rope_qk`` return new tensors, ``rope_`` and ``rope_qk_`` write into their arguments. The backward of a
rotation is the same operator with ``transpose`` flipped, so gradients of gradients need nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.dispatch import Described, Implementation, select, serves_anywhere, serves_where_triton_runs
from tilewright.dispatch.eager import PlanCache, metadata
from tilewright.errors import ArgumentError
from tilewright.ops.rope.call import (
    Inputs,
    Options,
    check_call,
    check_inplace,
    check_writable,
    describe,
    refuse_table_gradients,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.ops.rope.call import Outputs, Planner, RopeCall, Runner

    Strides = tuple[int, ...] | None


def _load_reference() -> Planner:
    from tilewright.ops.rope.reference import rotate

    def plan(call: RopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
        def run(tensors: tuple[torch.Tensor | None, ...], offset: int) -> None:
            *inputs, q_out, k_out = tensors
            assert q_out is not None
            rotate(call, Inputs._make(inputs), offset, (q_out, k_out))

        return run

    return plan


def _load_triton() -> Planner:
    from tilewright.ops.rope.kernels import plan

    return plan


IMPLEMENTATIONS = (
    Implementation("triton", _load_triton, serves_where_triton_runs),
    Implementation("reference", _load_reference, serves_anywhere),
)


@dataclass(frozen=True)
class _Plan:
    """All that calls of equal metadata share.

    Attributes:
        call: the valid call.
        run: computes it.
        has_values: values in index tensors may have to be checked.
        last_offset: the largest number that may be added to the positions unchecked.
    """

    call: RopeCall
    run: Runner
    has_values: bool
    last_offset: int


_PLANS: PlanCache[_Plan] = PlanCache()


def described(
    inputs: Inputs, offset: int, options: Options, impl: str | None, operation: str, *, inplace: bool = False
) -> Described:
    """The validated call as selection sees it."""
    call = describe(inputs, offset, options, operation)
    check_call(call, inputs, offset, operation)
    if inplace:
        check_inplace(inputs, operation)
    return Described(inputs.q.device, (call.dtype, call.table_dtype), call, impl)


def rotate(
    inputs: Sequence[torch.Tensor | None],
    offset: int,
    options: tuple[Any, ...],
    impl: str | None,
    *,
    inplace: bool = False,
    strides: tuple[Strides, Strides] | None = None,
    operation: str = "rope",
) -> Outputs:
    """Rotate by the implementation that selection names; everything that real tensors go through.

    Written to cost little: where a plan is at hand, named tuples stay plain ones and nothing is validated again.

    Args:
        inputs: the tensors of :class:`Inputs`, in its order.
        offset: added to every position that is counted rather than given.
        options: the options of :class:`Options`, in its order.
        impl: the implementation asked for.
        inplace: write into ``q`` and ``k`` and return them.
        strides: of the results, where they should differ from what ``torch.empty_like`` gives.
        operation: the public function, for messages.
    """
    q: Any = inputs[0]
    k = inputs[1]
    if inplace:
        check_writable(inputs, options[0], operation)
        outputs: Outputs = (q, k)
    elif strides is None:
        outputs = (torch.empty_like(q), None if k is None else torch.empty_like(k))
    else:
        outputs = (_empty(q, strides[0]), None if k is None else _empty(k, strides[1]))
    try:
        key = (options, impl, inplace, strides, metadata(inputs))
        plan = _PLANS.get(key)
    except (TypeError, RuntimeError):
        # No valid option is without a hash, no valid tensor without memory: this says what is wrong.
        describe(Inputs._make(inputs), offset, Options._make(options), operation)
        raise
    if plan is None:
        made = _make_plan(Inputs._make(inputs), offset, Options._make(options), impl, outputs, operation)
        plan = _PLANS.put(key, made)
    if plan.has_values or offset > plan.last_offset:
        check_call(plan.call, Inputs._make(inputs), offset, operation)
    plan.run((*inputs, *outputs), offset)
    if inplace:
        for written in (q, k):
            if written is not None and not written.is_inference():
                torch.autograd.graph.increment_version(written)
    return outputs


def _make_plan(
    inputs: Inputs, offset: int, options: Options, impl: str | None, outputs: Outputs, operation: str
) -> _Plan:
    seen = described(inputs, offset, options, impl, operation, inplace=outputs[0] is inputs.q)
    call: RopeCall = seen.shape
    planner: Planner = _plan_nothing if inputs.q.is_meta else select(operation, IMPLEMENTATIONS, seen)
    has_values = any(tensor is not None for tensor in inputs[4:])
    return _Plan(call, planner(call, inputs, outputs), has_values, call.last_offset)


def _plan_nothing(call: RopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
    """On the meta device there is nothing to compute."""
    return lambda tensors, offset: None


def _empty(x: torch.Tensor, strides: Strides) -> torch.Tensor:
    if strides is None:
        return torch.empty_like(x)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


_LIBRARY: Any = torch.library.Library("tilewright", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAIL = (
    "Tensor cos, Tensor? sin, Tensor? position_ids=None, Tensor? offsets=None, Tensor? cu_seqlens=None, "
    "SymInt offset=0, str layout='bshd', bool interleaved=False, int? rotary_dim=None, int rotary_offset=0, "
    "int[]? context_parallel=None, int[]? mrope_section=None, bool mrope_interleaved=False, bool inverse=False, "
    "bool transpose=False, str numerics='exact', str? impl=None"
)
_N_TAIL = _TAIL.count(",") + 1
_LIBRARY.define(f"rope(Tensor x, {_TAIL}, SymInt[]? strides=None) -> Tensor")
_LIBRARY.define(
    f"rope_qk(Tensor q, Tensor k, {_TAIL}, SymInt[]? q_strides=None, SymInt[]? k_strides=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(f"rope_(Tensor(a!) x, {_TAIL}) -> ()")
_LIBRARY.define(f"rope_qk_(Tensor(a!) q, Tensor(b!) k, {_TAIL}) -> ()")


def tail(
    inputs: Sequence[torch.Tensor | None], offset: int, options: tuple[Any, ...], impl: str | None
) -> tuple[Any, ...]:
    """The operators' arguments after the rotated tensors."""
    return (*inputs[2:], offset, *options, impl)


def run_registered(
    inputs: Sequence[torch.Tensor | None],
    offset: int,
    options: tuple[Any, ...],
    impl: str | None,
    strides: tuple[Strides, Strides] = (None, None),
) -> Outputs:
    """Rotate by the registered operators, into new tensors."""
    q, k = inputs[:2]
    rest = tail(inputs, offset, options, impl)
    if k is None:
        return torch.ops.tilewright.rope(q, *rest, strides[0]), None
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.tilewright.rope_qk(q, k, *rest, *strides)
    return result


class _Given(NamedTuple):
    """What an operator was given."""

    inputs: Inputs
    offset: int
    options: Options
    impl: str | None
    strides: tuple[Strides, Strides]


def _given(q: torch.Tensor, k: torch.Tensor | None, rest: Sequence[Any]) -> _Given:
    """Read an operator's arguments after the rotated tensors.

    Torch leaves trailing arguments out where they have their default value, and hands lists where options are tuples.
    """
    defaults = (None, None, None, None, None, 0, *Options(), None, None, None)
    full = (*rest, *defaults[len(rest) :])
    cos, sin, position_ids, offsets, cu_seqlens, offset, *options, impl = full[:_N_TAIL]
    strides = full[_N_TAIL : _N_TAIL + 2]
    return _Given(
        Inputs(q, k, cos, sin, position_ids, offsets, cu_seqlens),
        offset,
        Options._make(map(_tuple, options)),
        impl,
        (_tuple(strides[0]), _tuple(strides[1])),
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, torch.Size)) else value


def _rope(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    inputs, offset, options, impl, strides = _given(x, None, rest)
    return rotate(inputs, offset, options, impl, strides=strides)[0]


def _rope_qk(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Outputs:
    inputs, offset, options, impl, strides = _given(q, k, rest)
    return rotate(inputs, offset, options, impl, strides=strides, operation="rope_qk")


def _rope_inplace(x: torch.Tensor, *rest: Any) -> None:
    inputs, offset, options, impl, _ = _given(x, None, rest)
    rotate(inputs, offset, options, impl, inplace=True)


def _rope_qk_inplace(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    inputs, offset, options, impl, _ = _given(q, k, rest)
    rotate(inputs, offset, options, impl, inplace=True, operation="rope_qk")


def _fake_rope(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    inputs, offset, options, _, strides = _given(x, None, rest)
    describe(inputs, offset, options)
    return _empty(x, strides[0])


def _fake_rope_qk(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Outputs:
    inputs, offset, options, _, strides = _given(q, k, rest)
    describe(inputs, offset, options, "rope_qk")
    return _empty(q, strides[0]), _empty(k, strides[1])


def _fake_inplace(x: torch.Tensor, *rest: Any) -> None:
    inputs, offset, options, _, _ = _given(x, None, rest)
    describe(inputs, offset, options)


def _fake_qk_inplace(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    inputs, offset, options, _, _ = _given(q, k, rest)
    describe(inputs, offset, options, "rope_qk")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    outputs = (output,) if isinstance(output, torch.Tensor) else output
    q, k = (*inputs[: len(outputs)], None)[:2]
    given = _given(q, k, inputs[len(outputs) :])
    refuse_table_gradients(given.inputs, "rope" if k is None else "rope_qk")
    ctx.save_for_backward(*given.inputs[2:])
    ctx.rest = (given.offset, given.options.transposed(), given.impl)
    ctx.n_inputs = len(inputs)
    ctx.strides = tuple(tuple(y.stride()) for y in outputs)


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    grad_q, grad_k = (*grads, None)[:2]
    offset, options, impl = ctx.rest
    strides = (ctx.strides[0], ctx.strides[-1])
    results = run_registered((grad_q, grad_k, *ctx.saved_tensors), offset, options, impl, strides)
    return (*results[: len(grads)], *(None,) * (ctx.n_inputs - len(grads)))


def _no_gradient(operator: Any) -> Callable[..., None]:
    """The in-place operators' autograd kernel: nothing to record, or a clear refusal."""

    def run(x: torch.Tensor, *rest: Any) -> None:
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in (x, *rest)):
            raise ArgumentError(
                "rope", "x", "needs a gradient; the in-place operator has none: call tilewright.rope(..., inplace=True)"
            )
        with torch._C._AutoDispatchBelowAutograd():
            operator()(x, *rest)

    return run


for _name, _run, _fake in (
    ("rope", _rope, _fake_rope),
    ("rope_qk", _rope_qk, _fake_rope_qk),
    ("rope_", _rope_inplace, _fake_inplace),
    ("rope_qk_", _rope_qk_inplace, _fake_qk_inplace),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tilewright::{_name}", _fake, lib=_LIBRARY)
for _name in ("rope", "rope_qk"):
    torch.library.register_autograd(f"tilewright::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY)
_LIBRARY.impl("rope_", _no_gradient(lambda: torch.ops.tilewright.rope_.default), "Autograd")
_LIBRARY.impl("rope_qk_", _no_gradient(lambda: torch.ops.tilewright.rope_qk_.default), "Autograd")
