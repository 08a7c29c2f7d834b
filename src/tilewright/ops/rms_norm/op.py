"""The registered operators of RMSNorm, their fakes and their backward.

``rms_norm`` and ``add_rms_norm`` share one backward, the operator ``rms_norm_backward``. Its own backward goes through
the plain PyTorch of ``reference.py``, so that gradients of gradients need nothing more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.dispatch import Described, Implementation, select, serves_anywhere, serves_where_triton_runs
from tilewright.dispatch.eager import PlanCache, metadata
from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.rms_norm import reference
from tilewright.ops.rms_norm.call import GradInputs, Inputs, Options, Planner, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.ops.rms_norm.call import RmsNormCall, Runner, Tensors

    Optional = torch.Tensor | None
    Gradients = tuple[Optional, Optional, Optional]

_BACKWARD = "rms_norm_backward"


def _load_reference() -> Planner:
    return Planner(_plan_reference, _plan_reference_backward)


def _plan_reference(call: RmsNormCall, inputs: Inputs, outputs: Tensors) -> Runner:
    def run(tensors: Tensors) -> None:
        x, residual, weight, *outputs = tensors
        assert x is not None
        _write(reference.rms_norm(call, Inputs(x, residual, weight)), outputs)

    return run


def _plan_reference_backward(call: RmsNormCall, inputs: GradInputs, outputs: Tensors) -> Runner:
    def run(tensors: Tensors) -> None:
        grad, grad_stored, z, residual, weight, *outputs = tensors
        assert grad is not None
        assert z is not None
        grad_z, grad_weight = _reference_backward(call, GradInputs(grad, grad_stored, z, residual, weight))
        _write((grad_z, grad_z, grad_weight), outputs)

    return run


def _write(results: Sequence[torch.Tensor | None], outputs: Sequence[torch.Tensor | None]) -> None:
    """Round results into the outputs that there are."""
    for result, output in zip(results, outputs, strict=True):
        if output is not None:
            assert result is not None
            output.copy_(result)


def _reference_backward(call: RmsNormCall, inputs: GradInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of what the norm was taken of and of the weight, neither rounded."""
    z = inputs.z.to(call.compute_dtype)
    if inputs.residual is not None:
        z = z + inputs.residual.to(call.compute_dtype)
    return reference.rms_norm_backward(call, inputs.grad, inputs.grad_stored, z, inputs.weight)


def _load_triton() -> Planner:
    from tilewright.ops.rms_norm.kernels import PLANNER

    return PLANNER


IMPLEMENTATIONS = (
    Implementation("triton", _load_triton, serves_where_triton_runs),
    Implementation("reference", _load_reference, serves_anywhere),
)

_PLANS: PlanCache[Runner] = PlanCache()


def _plan_nothing(call: RmsNormCall, inputs: Any, outputs: Tensors) -> Runner:
    """On the meta device there is nothing to compute."""
    return lambda tensors: None


_NOTHING = Planner(_plan_nothing, _plan_nothing)


def described(inputs: Inputs, options: Options, impl: str | None, operation: str) -> Described:
    """The validated call as selection sees it."""
    call = describe(inputs, options, operation)
    return Described(inputs.x.device, call.dtypes, call, impl)


def _planner(call: RmsNormCall, device: torch.device, impl: str | None, operation: str) -> Planner:
    if device.type == "meta":
        return _NOTHING
    planner: Planner = select(operation, IMPLEMENTATIONS, Described(device, call.dtypes, call, impl))
    return planner


def normalise(
    inputs: Sequence[torch.Tensor | None], options: tuple[Any, ...], impl: str | None, operation: str = "rms_norm"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise by the implementation that selection names; everything that real tensors go through.

    Written to cost little: where a plan is at hand, named tuples stay plain ones and nothing is validated again.

    Args:
        inputs: the tensors of :class:`Inputs`, in its order.
        options: the options of :class:`Options`, in its order.
        impl: the implementation asked for.
        operation: the public function, for messages.

    Returns:
        The norm, and the stored sum, None without a residual.
    """
    x: Any
    x, residual, _ = inputs
    outputs = (torch.empty_like(x), None if residual is None else torch.empty_like(residual))
    try:
        key = (options, impl, metadata(inputs))
        run = _PLANS.get(key)
    except (TypeError, RuntimeError):
        # No valid option is without a hash, no valid tensor without memory: this says what is wrong.
        describe(Inputs._make(inputs), Options._make(options), operation)
        raise
    if run is None:
        given = Inputs._make(inputs)
        call = describe(given, Options._make(options), operation)
        run = _PLANS.put(key, _planner(call, x.device, impl, operation).forward(call, given, outputs))
    run((*inputs, *outputs))
    return outputs


def normalise_backward(
    inputs: Sequence[torch.Tensor | None],
    options: tuple[Any, ...],
    dtype: torch.dtype,
    weight_grad: bool,
    impl: str | None,
) -> list[torch.Tensor]:
    """The gradients, by the implementation that selection names.

    Args:
        inputs: the tensors of :class:`GradInputs`, in its order.
        options: the forward's, in the order of :class:`Options`.
        dtype: that of ``x``.
        weight_grad: whether the gradient of the weight is wanted.
        impl: the implementation asked for.

    Returns:
        The gradient of what the norm was taken of in ``dtype``; the same in the residual's dtype, if that is another;
        the gradient of the weight, if it is wanted.
    """
    try:
        key = (options, impl, metadata(inputs), dtype, weight_grad)
        run = _PLANS.get(key)
    except (TypeError, RuntimeError):
        _describe_backward(GradInputs._make(inputs), Options._make(options), dtype, weight_grad)
        raise
    if run is None:
        given = GradInputs._make(inputs)
        call = _describe_backward(given, Options._make(options), dtype, weight_grad)
        outputs = _gradients_like(inputs, dtype, weight_grad)
        run = _PLANS.put(key, _planner(call, given.z.device, impl, _BACKWARD).backward(call, given, outputs))
    else:
        outputs = _gradients_like(inputs, dtype, weight_grad)
    run((*inputs, *outputs))
    return [output for output in outputs if output is not None]


def _gradients_like(inputs: Sequence[torch.Tensor | None], dtype: torch.dtype, weight_grad: bool) -> Gradients:
    """Memory for the gradients of ``z``, of a residual of another dtype, and of the weight."""
    z: Any
    _, _, z, residual, weight = inputs
    stream = z if residual is None else residual
    grad_residual = None if stream.dtype == dtype else torch.empty_like(stream)
    return torch.empty_like(z, dtype=dtype), grad_residual, torch.empty_like(weight) if weight_grad else None  # type: ignore[arg-type]


def _describe_backward(inputs: GradInputs, options: Options, dtype: torch.dtype, weight_grad: bool) -> RmsNormCall:
    """The forward call that gradients are asked of, after the tensors that it did not have are judged."""
    grad, grad_stored, z, residual, weight = inputs
    stream = residual
    if stream is None and (grad_stored is not None or z.dtype != dtype):
        stream = z
    # To validation, `grad` is `x`: it has its shape and dtype.
    call = describe(Inputs(grad, stream, weight), options, _BACKWARD)
    if residual is not None and options.residual_rounding == "rounded":
        raise ArgumentError(_BACKWARD, "residual", "is not needed: the norm was taken of the stored sum")
    if residual is None and stream is not None and options.residual_rounding == "exact":
        raise ArgumentError(_BACKWARD, "residual", "is needed: the norm was not taken of the stored sum")
    if weight_grad and weight is None:
        raise ArgumentError(_BACKWARD, "weight_grad", "is asked for, but there is no weight")
    if grad.dtype != dtype:
        raise DTypeError(_BACKWARD, "grad", f"got {grad.dtype}; expected {dtype}")
    stored = z if stream is None else stream
    for name, tensor, like in (("z", z, grad if stream is residual else stored), ("grad_stored", grad_stored, stored)):
        if tensor is None:
            continue
        if tensor.dtype != like.dtype:
            raise DTypeError(_BACKWARD, name, f"got {tensor.dtype}; expected {like.dtype}")
        if tensor.shape != grad.shape or tensor.device != grad.device or tensor.layout != torch.strided:
            raise ArgumentError(_BACKWARD, name, f"differs from 'grad', {tuple(grad.shape)} on {grad.device}")
    return call


def remember(
    ctx: Any, given: tuple[Inputs, tuple[Any, ...], str | None], y: torch.Tensor, stored: torch.Tensor | None
) -> None:
    """Save what a backward needs, and no more: where the norm was taken of the stored sum, neither summand."""
    (x, residual, weight), options, impl = given
    *_, rounding = options
    kept = rounding == "rounded"
    ctx.save_for_backward(x if stored is None or not kept else stored, None if kept else residual, weight)
    of_residual = (None, None) if stored is None else (stored.dtype, stored.stride())
    ctx.rest = (options, impl, y.dtype, y.stride(), *of_residual)
    ctx.set_materialize_grads(False)


def propagate(
    ctx: Any, grad: torch.Tensor | None, grad_stored: torch.Tensor | None, run: Callable[..., list[torch.Tensor]]
) -> Gradients:
    """The gradients of ``x``, the residual and the weight from what :func:`remember` saved.

    Args:
        ctx: holds it.
        grad: of the norm, None where it was not used.
        grad_stored: of the stored sum, likewise.
        run: :func:`normalise_backward`, or the same by the registered operator.
    """
    z, residual, weight = ctx.saved_tensors
    options, impl, dtype, strides, residual_dtype, residual_strides = ctx.rest
    needs = ctx.needs_input_grad
    weight_grad = grad is not None and needs[1 if residual_dtype is None else 2]
    if grad is not None:
        results = run((grad, grad_stored, z, residual, weight), options, dtype, weight_grad, impl)
    elif grad_stored is not None:  # the norm was not used
        results = [grad_stored.to(dtype), grad_stored]
    else:
        return None, None, None
    grad_x = _restrided(results[0], strides) if needs[0] else None
    grad_residual = None
    if residual_dtype is not None and needs[1]:
        grad_residual = _restrided(results[0 if residual_dtype == dtype else 1], residual_strides)
    return grad_x, grad_residual, results[-1] if weight_grad else None


def _restrided(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor with these strides: itself, or a copy."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


_LIBRARY: Any = torch.library.Library("tilewright", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPTIONS = "float eps=1e-6, float weight_offset=0.0, str cast='before_weight'"
_ROUNDING = "str residual_rounding='rounded'"
_LIBRARY.define(f"rms_norm(Tensor x, Tensor? weight=None, {_OPTIONS}, str? impl=None) -> Tensor")
_LIBRARY.define(
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, {_OPTIONS}, {_ROUNDING}, str? impl=None) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"{_BACKWARD}(Tensor grad, Tensor? grad_stored, Tensor z, Tensor? residual, Tensor? weight, float eps, "
    "float weight_offset, str cast, str residual_rounding, ScalarType dtype, bool weight_grad, str? impl=None) "
    "-> Tensor[]"
)


def run_registered(
    inputs: Sequence[torch.Tensor | None], options: tuple[Any, ...], impl: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise by the registered operators."""
    x, residual, weight = inputs
    if residual is None:
        return torch.ops.tilewright.rms_norm(x, weight, *options[:3], impl), None
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.tilewright.add_rms_norm(x, residual, weight, *options, impl)
    return result


def run_registered_backward(
    inputs: Sequence[torch.Tensor | None],
    options: tuple[Any, ...],
    dtype: torch.dtype,
    weight_grad: bool,
    impl: str | None,
) -> list[torch.Tensor]:
    """As :func:`normalise_backward`, by the registered operator."""
    results: list[torch.Tensor] = torch.ops.tilewright.rms_norm_backward(*inputs, *options, dtype, weight_grad, impl)
    return results


# Torch leaves trailing arguments out where they have their default value.


def _given(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "before_weight",
    impl: str | None = None,
) -> tuple[Inputs, Options, str | None]:
    return Inputs(x, None, weight), Options(eps, weight_offset, cast), impl


def _given_sum(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "before_weight",
    residual_rounding: str = "rounded",
    impl: str | None = None,
) -> tuple[Inputs, Options, str | None]:
    return Inputs(x, residual, weight), Options(eps, weight_offset, cast, residual_rounding), impl


def _rms_norm(*args: Any) -> torch.Tensor:
    return normalise(*_given(*args))[0]


def _add_rms_norm(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return normalise(*_given_sum(*args), "add_rms_norm")


def _rms_norm_backward(*args: Any) -> list[torch.Tensor]:
    inputs, options, dtype, weight_grad, impl = _given_gradients(*args)
    return normalise_backward(inputs, options, dtype, weight_grad, impl)


def _given_gradients(*args: Any) -> tuple[GradInputs, Options, torch.dtype, bool, str | None]:
    dtype, weight_grad, impl = (*args[9:], None)[:3]
    return GradInputs(*args[:5]), Options(*args[5:9]), dtype, weight_grad, impl


def _fake_rms_norm(*args: Any) -> torch.Tensor:
    inputs, options, _ = _given(*args)
    describe(inputs, options)
    return torch.empty_like(inputs.x)


def _fake_add_rms_norm(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, options, _ = _given_sum(*args)
    describe(inputs, options, "add_rms_norm")
    assert inputs.residual is not None
    return torch.empty_like(inputs.x), torch.empty_like(inputs.residual)


def _fake_backward(*args: Any) -> list[torch.Tensor]:
    inputs, options, dtype, weight_grad, _ = _given_gradients(*args)
    _describe_backward(inputs, options, dtype, weight_grad)
    return [output for output in _gradients_like(inputs, dtype, weight_grad) if output is not None]


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    remember(ctx, _given(*inputs), output, None)


def _setup_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    remember(ctx, _given_sum(*inputs), *output)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, options, dtype, weight_grad, _ = _given_gradients(*inputs)
    ctx.save_for_backward(*tensors)
    ctx.rest = (options, dtype, weight_grad)


def _backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
    grad_x, _, grad_weight = propagate(ctx, grad, None, run_registered_backward)
    return grad_x, grad_weight, *(None,) * 4


def _backward_of_sum(ctx: Any, grad: torch.Tensor | None, grad_stored: torch.Tensor | None) -> tuple[Any, ...]:
    return *propagate(ctx, grad, grad_stored, run_registered_backward), *(None,) * 5


def _second_backward(ctx: Any, grads: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Through the definition's backward, by autograd."""
    options, dtype, weight_grad = ctx.rest
    wanted = ctx.needs_input_grad[:5]
    with torch.enable_grad():
        # Aliases: of each input the partial derivative is asked, not that through another input made of it.
        inputs = GradInputs(*(t.view_as(t) if wants else t for t, wants in zip(ctx.saved_tensors, wanted, strict=True)))
        call = _describe_backward(inputs, options, dtype, weight_grad)
        grad_z, grad_weight = _reference_backward(call, inputs)
        results = [grad_z.to(dtype)]
        if call.residual_dtype not in (None, dtype):
            results.append(grad_z.to(call.residual_dtype))
        if weight_grad:
            assert inputs.weight is not None
            assert grad_weight is not None
            results.append(grad_weight.to(inputs.weight.dtype))
    leaves = [t for t, wants in zip(inputs, wanted, strict=True) if wants]
    found = iter(
        torch.autograd.grad(results, leaves, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)  # type: ignore[arg-type]
    )
    return *(next(found) if wants else None for wants in wanted), *(None,) * (len(ctx.needs_input_grad) - 5)


for _name, _run, _fake, _setup, _gradient in (
    ("rms_norm", _rms_norm, _fake_rms_norm, _setup_rms_norm, _backward),
    ("add_rms_norm", _add_rms_norm, _fake_add_rms_norm, _setup_add_rms_norm, _backward_of_sum),
    (_BACKWARD, _rms_norm_backward, _fake_backward, _setup_backward, _second_backward),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tilewright::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"tilewright::{_name}", _gradient, setup_context=_setup, lib=_LIBRARY)
