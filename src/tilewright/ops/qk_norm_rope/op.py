"""The registered operator, its fake and its backward.

The backward is made of existing operators: the transposed rotation of both gradients, then ``rms_norm_backward`` for
each. Both are differentiable again, so gradients of gradients need nothing more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.dispatch import Described, Implementation, select, serves_anywhere, serves_where_triton_runs
from tilewright.dispatch.eager import PlanCache, metadata
from tilewright.ops.qk_norm_rope.call import (
    OPERATION,
    Inputs,
    Options,
    check_call,
    describe,
    norm_options,
    rope_inputs,
    rope_options,
)
from tilewright.ops.rms_norm import op as norm
from tilewright.ops.rope import op as rope
from tilewright.ops.rope.call import refuse_table_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.ops.qk_norm_rope.call import Outputs, Planner, QkNormRopeCall, Runner, Tensors

    Gradients = tuple[torch.Tensor | None, ...]


def _load_reference() -> Planner:
    from tilewright.ops.qk_norm_rope.reference import qk_norm_rope

    def plan(call: QkNormRopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
        def run(tensors: Tensors, offset: int) -> None:
            *inputs, q_out, k_out = tensors
            assert q_out is not None
            assert k_out is not None
            qk_norm_rope(call, Inputs._make(inputs), offset, (q_out, k_out))

        return run

    return plan


def _load_triton() -> Planner:
    from tilewright.ops.qk_norm_rope.kernels import plan

    return plan


IMPLEMENTATIONS = (
    Implementation("triton", _load_triton, serves_where_triton_runs),
    Implementation("reference", _load_reference, serves_anywhere),
)


class _Plan(NamedTuple):
    """All that calls of equal metadata share.

    Attributes:
        call: the valid call.
        run: computes it.
        has_values: values in index tensors may have to be checked.
        last_offset: the largest number that may be added to the positions unchecked.
    """

    call: QkNormRopeCall
    run: Runner
    has_values: bool
    last_offset: int


_PLANS: PlanCache[_Plan] = PlanCache()


def described(inputs: Inputs, offset: int, options: Options, impl: str | None) -> Described:
    """The validated call as selection sees it."""
    call = describe(inputs, offset, options)
    check_call(call, inputs, offset)
    return Described(inputs.q.device, call.dtypes, call, impl)


def normalise_and_rotate(
    inputs: Sequence[torch.Tensor | None], offset: int, options: tuple[Any, ...], impl: str | None
) -> Outputs:
    """Both steps by the implementation that selection names; everything that real tensors go through.

    Written to cost little: where a plan is at hand, named tuples stay plain ones and nothing is validated again.

    Args:
        inputs: the tensors of :class:`Inputs`, in its order.
        offset: added to every position that is counted rather than given.
        options: the options of :class:`Options`, in its order.
        impl: the implementation asked for.
    """
    q: Any
    k: Any
    q, k, *_ = inputs
    outputs = (torch.empty_like(q), torch.empty_like(k))
    try:
        key = (options, impl, metadata(inputs))
        plan = _PLANS.get(key)
    except (TypeError, RuntimeError):
        # No valid option is without a hash, no valid tensor without memory: this says what is wrong.
        describe(Inputs._make(inputs), offset, Options._make(options))
        raise
    if plan is None:
        plan = _PLANS.put(key, _make_plan(Inputs._make(inputs), offset, Options._make(options), impl, outputs))
    if plan.has_values or offset > plan.last_offset:
        check_call(plan.call, inputs, offset)
    plan.run((*inputs, *outputs), offset)
    return outputs


def _make_plan(inputs: Inputs, offset: int, options: Options, impl: str | None, outputs: Outputs) -> _Plan:
    seen = described(inputs, offset, options, impl)
    call: QkNormRopeCall = seen.shape
    planner: Planner = _plan_nothing if inputs.q.is_meta else select(OPERATION, IMPLEMENTATIONS, seen)
    has_values = any(tensor is not None for tensor in inputs[6:])
    return _Plan(call, planner(call, inputs, outputs), has_values, call.rotation.last_offset)


def _plan_nothing(call: QkNormRopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
    """On the meta device there is nothing to compute."""
    return lambda tensors, offset: None


def remember(
    ctx: Any, given: tuple[Sequence[torch.Tensor | None], int, tuple[Any, ...], str | None], outputs: Outputs
) -> None:
    """Save what a backward needs: what was given."""
    inputs, offset, options, impl = given
    ctx.save_for_backward(*inputs)
    ctx.rest = (offset, options, impl, tuple(tuple(y.stride()) for y in outputs))


def propagate(
    ctx: Any,
    grads: tuple[torch.Tensor, torch.Tensor],
    rotate: Callable[..., Any],
    normalise_backward: Callable[..., list[torch.Tensor]],
) -> Gradients:
    """The gradients of ``q``, ``k`` and both weights from what :func:`remember` saved.

    Args:
        ctx: holds it.
        grads: of both results.
        rotate: :func:`tilewright.ops.rope.op.run_registered`, or the same without the dispatcher.
        normalise_backward: :func:`tilewright.ops.rms_norm.op.run_registered_backward`, likewise.
    """
    inputs = Inputs._make(ctx.saved_tensors)
    offset, options, impl, strides = ctx.rest
    turned = rope_inputs(inputs)._replace(q=grads[0], k=grads[1])
    back = rotate(turned, offset, rope_options(options).transposed(), impl, strides)
    of_streams: list[torch.Tensor | None] = [None, None]
    of_weights: list[torch.Tensor | None] = [None, None]
    for index, (grad, x, weight) in enumerate(zip(back, inputs[:2], inputs[2:4], strict=True)):
        wanted, weight_wanted = ctx.needs_input_grad[index], ctx.needs_input_grad[2 + index]
        if wanted or weight_wanted:
            given = (grad, None, x, None, weight)
            results = normalise_backward(given, norm_options(options), x.dtype, weight_wanted, impl)
            of_streams[index] = results[0] if wanted else None
            of_weights[index] = results[1] if weight_wanted else None
    return *of_streams, *of_weights


_LIBRARY: Any = torch.library.Library("tilewright", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    f"{OPERATION}(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor? sin=None, "
    "Tensor? position_ids=None, Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, float eps=1e-6, "
    "float weight_offset=0.0, str cast='before_weight', str layout='bshd', bool interleaved=False, "
    "int? rotary_dim=None, int rotary_offset=0, int[]? context_parallel=None, int[]? mrope_section=None, "
    "bool mrope_interleaved=False, str? impl=None) -> (Tensor, Tensor)"
)


def run_registered(
    inputs: Sequence[torch.Tensor | None], offset: int, options: tuple[Any, ...], impl: str | None
) -> Outputs:
    """Both steps by the registered operator."""
    result: Outputs = torch.ops.tilewright.qk_norm_rope(*inputs, offset, *options, impl)
    return result


def _given(*args: Any) -> tuple[Inputs, int, Options, str | None]:
    """Read the operator's arguments.

    Torch leaves trailing arguments out where they have their default value, and hands lists where options are tuples.
    """
    defaults = (None, None, None, None, 0, *Options(), None)
    full = (*args, *defaults[len(args) - 5 :])
    n_inputs = len(Inputs._fields)
    options = (tuple(value) if isinstance(value, list) else value for value in full[n_inputs + 1 : -1])
    return Inputs._make(full[:n_inputs]), full[n_inputs], Options._make(options), full[-1]


def _qk_norm_rope(*args: Any) -> Outputs:
    return normalise_and_rotate(*_given(*args))


def _fake(*args: Any) -> Outputs:
    inputs, offset, options, _ = _given(*args)
    describe(inputs, offset, options)
    return torch.empty_like(inputs.q), torch.empty_like(inputs.k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    given = _given(*inputs)
    refuse_table_gradients(rope_inputs(given[0]), OPERATION)
    remember(ctx, given, output)
    ctx.n_inputs = len(inputs)


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    found = propagate(ctx, grads, rope.run_registered, norm.run_registered_backward)  # type: ignore[arg-type]
    return *found, *(None,) * (ctx.n_inputs - len(found))


_LIBRARY.impl(OPERATION, _qk_norm_rope, "CompositeExplicitAutograd")
torch.library.register_fake(f"tilewright::{OPERATION}", _fake, lib=_LIBRARY)
torch.library.register_autograd(f"tilewright::{OPERATION}", _backward, setup_context=_setup_context, lib=_LIBRARY)
