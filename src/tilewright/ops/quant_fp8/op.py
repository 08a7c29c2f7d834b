"""The registered operators of FP8 quantisation and their fakes. None has a backward: gradients are refused.

The formats of a call travel as text (:func:`tilewright.ops.quant_fp8.format.encoded`), which is all that an operator's
schema can hold of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.dispatch import Described, Implementation, Unsupported, select, serves_anywhere, triton_verdict
from tilewright.dispatch.eager import PlanCache, metadata
from tilewright.errors import ArgumentError
from tilewright.ops.quant_fp8.call import Inputs, Options, describe, empty_results, rope_inputs
from tilewright.ops.quant_fp8.dequant_call import DequantInputs, describe_dequant
from tilewright.ops.quant_fp8.format import DTYPES, QuantFormat, decoded
from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rope import call as rope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tilewright.dispatch import Verdict
    from tilewright.ops.quant_fp8.call import QuantCall
    from tilewright.ops.quant_fp8.dequant_call import DequantCall
    from tilewright.platforms import DeviceFacts

    Tensors = tuple[torch.Tensor | None, ...]
    Runner = Callable[[Tensors], None]
    """Computes: takes the inputs, then the outputs, in their order."""
    Planner = Callable[[QuantCall, Inputs, Sequence[torch.Tensor]], Runner]
    DequantPlanner = Callable[[DequantCall, DequantInputs, Sequence[torch.Tensor]], Runner]


def _load_reference() -> Planner:
    from tilewright.ops.quant_fp8.reference import quantised

    def plan(call: QuantCall, inputs: Inputs, outputs: Sequence[torch.Tensor]) -> Runner:
        n_inputs = len(inputs)

        def run(tensors: Tensors) -> None:
            results = quantised(call, Inputs._make(tensors[:n_inputs]))
            _copy(results, tensors[n_inputs:])

        return run

    return plan


def _load_reference_dequant() -> DequantPlanner:
    from tilewright.ops.quant_fp8.reference import dequantised

    def plan(call: DequantCall, inputs: DequantInputs, outputs: Sequence[torch.Tensor]) -> Runner:
        def run(tensors: Tensors) -> None:
            values, scales, *written = tensors
            assert values is not None
            assert scales is not None
            _copy([dequantised(values, scales, call.group_size, call.dtype)], written)

        return run

    return plan


def _copy(results: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor | None]) -> None:
    for result, output in zip(results, outputs, strict=True):
        assert output is not None
        output.copy_(result)


def _load_triton() -> Planner:
    from tilewright.ops.quant_fp8.kernels import plan

    return plan


def _load_triton_dequant() -> DequantPlanner:
    from tilewright.ops.quant_fp8.kernels_dequant import plan

    return plan


def _triton_supports(device: DeviceFacts, dtypes: tuple[torch.dtype, ...], shape: Any) -> Verdict:
    missing = [name for name, dtype in DTYPES.items() if dtype in dtypes and name not in device.fp8_formats]
    if missing:
        return Unsupported(f"Triton does not convert to {', '.join(missing)} on {device}")
    return triton_verdict(device)


IMPLEMENTATIONS = (
    Implementation("triton", _load_triton, _triton_supports),
    Implementation("reference", _load_reference, serves_anywhere),
)
DEQUANT_IMPLEMENTATIONS = (
    Implementation("triton", _load_triton_dequant, _triton_supports),
    Implementation("reference", _load_reference_dequant, serves_anywhere),
)


class _Result(NamedTuple):
    """The memory of one result.

    Attributes:
        size: its shape.
        stride: its strides.
        dtype: its dtype.
        is_zeroed: whether bytes that nobody writes are to be zero.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_zeroed: bool


class _Plan(NamedTuple):
    """All that calls of equal metadata share: what computes them, what their results are, and whose values differ.

    Attributes:
        run: computes.
        results: their memory.
        turned: the call of a rotation by given positions, which are looked at in each call.
    """

    run: Runner
    results: tuple[_Result, ...]
    turned: rope.RopeCall | None = None


_PLANS: PlanCache[_Plan] = PlanCache()
_DEQUANT_PLANS: PlanCache[Runner] = PlanCache()


def described(inputs: Inputs, options: Options, impl: str | None, operation: str) -> Described:
    """The validated call as selection sees it."""
    call = describe(inputs, options, operation)
    return Described(inputs.x.device, call.dtypes, call, impl)


def described_dequant(inputs: DequantInputs, group_size: int | None, dtype: torch.dtype, impl: str | None) -> Described:
    """The validated call of ``dequant_fp8`` as selection sees it."""
    call = describe_dequant(inputs, group_size, dtype)
    return Described(inputs.values.device, call.dtypes, call, impl)


def options_of(options: Sequence[Any]) -> Options:
    """Plain nested tuples, as :func:`quantise` takes them, by name."""
    formats, emit, normed, turned = options
    return Options(formats, emit, norm.Options._make(normed), rope.Options._make(turned))


def quantise(
    operation: str, inputs: Sequence[torch.Tensor | None], options: tuple[Any, ...], impl: str | None
) -> list[torch.Tensor]:
    """Quantise by the implementation that selection names; everything that real tensors go through.

    Written to cost little: where a plan is at hand, named tuples stay plain ones and nothing is validated again.

    Args:
        operation: the public function.
        inputs: the tensors of :class:`Inputs`, in its order.
        options: those of :class:`Options`, in its order.
        impl: the implementation asked for.

    Returns:
        Every result, in the order of ``reference.quantised``.
    """
    try:
        key = (operation, options, impl, metadata(inputs))
        plan = _PLANS.get(key)
    except (TypeError, RuntimeError):
        # No valid option is without a hash, no valid tensor without memory: this says what is wrong.
        describe(Inputs._make(inputs), options_of(options), operation)
        raise
    if plan is None:
        plan = _PLANS.put(key, _make_plan(Inputs._make(inputs), options_of(options), impl, operation))
    if plan.turned is not None:
        rope.check_call(plan.turned, rope_inputs(Inputs._make(inputs)), 0, operation)
    x: Any = inputs[0]
    device = x.device
    results = []
    for size, stride, dtype, is_zeroed in plan.results:
        result = torch.empty_strided(size, stride, dtype=dtype, device=device)
        results.append(result.zero_() if is_zeroed else result)
    plan.run((*inputs, *results))
    return results


def _make_plan(inputs: Inputs, options: Options, impl: str | None, operation: str) -> _Plan:
    seen = described(inputs, options, impl, operation)
    call: QuantCall = seen.shape
    planner: Planner = _plan_nothing if inputs.x.is_meta else select(operation, IMPLEMENTATIONS, seen)
    outputs = empty_results(call, inputs)
    has_padding = any(f.is_packed and f.groups(call.n_cols) % 4 for f in call.formats)
    results = tuple(
        _Result(tuple(r.shape), r.stride(), r.dtype, has_padding and r.dtype == torch.int32) for r in outputs
    )
    turned = None if inputs.position_ids is None or inputs.x.is_meta else call.rope
    return _Plan(planner(call, inputs, outputs), results, turned)


def _plan_nothing(call: Any, inputs: Any, outputs: Any) -> Runner:
    """On the meta device there is nothing to compute."""
    return lambda tensors: None


def dequantise(
    values: torch.Tensor, scales: torch.Tensor, group_size: int | None, dtype: torch.dtype, impl: str | None
) -> torch.Tensor:
    """The reverse of :func:`quantise`; everything that real tensors go through."""
    inputs = (values, scales)
    try:
        key = (group_size, dtype, impl, metadata(inputs))
        run = _DEQUANT_PLANS.get(key)
    except (TypeError, RuntimeError):
        describe_dequant(DequantInputs(*inputs), group_size, dtype)
        raise
    if run is None:
        seen = described_dequant(DequantInputs(*inputs), group_size, dtype, impl)
        planner: DequantPlanner = (
            _plan_nothing if values.is_meta else select("dequant_fp8", DEQUANT_IMPLEMENTATIONS, seen)
        )
        planned = planner(seen.shape, DequantInputs(*inputs), [_empty_like(values, dtype)])
        run = _DEQUANT_PLANS.put(key, planned)
    result = _empty_like(values, dtype)
    run((values, scales, result))
    return result


def _empty_like(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous memory for a result of ``dequant_fp8``."""
    return torch.empty(values.shape, dtype=dtype, device=values.device)


def refuse_gradients(operation: str, names: Iterable[str], tensors: Iterable[Any]) -> None:
    """Where a gradient would be recorded, say that there is none.

    Raises:
        ArgumentError: grad mode is on and one of the tensors requires a gradient.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in zip(names, tensors, strict=False):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            message = f"requires a gradient, but {operation} has no backward; detach it or use torch.no_grad()"
            raise ArgumentError(operation, name, message)


_LIBRARY: Any = torch.library.Library("tilewright", "FRAGMENT")  # type: ignore[no-untyped-call]
_NORM = "float eps, float weight_offset, str cast"
_LIBRARY.define("quant_fp8(Tensor x, Tensor? scale, str[] formats, str? impl=None) -> Tensor[]")
_LIBRARY.define(
    f"rms_norm_quant_fp8(Tensor x, Tensor? weight, Tensor? scale, str[] formats, bool emit, {_NORM}, str? impl=None)"
    " -> Tensor[]"
)
_LIBRARY.define(
    "add_rms_norm_quant_fp8(Tensor x, Tensor residual, Tensor? weight, Tensor? scale, str[] formats, bool emit, "
    f"{_NORM}, str residual_rounding, str? impl=None) -> Tensor[]"
)
_LIBRARY.define("silu_mul_quant_fp8(Tensor x, Tensor? scale, str[] formats, bool emit, str? impl=None) -> Tensor[]")
_LIBRARY.define(
    "rope_quant_fp8(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids, Tensor? scale, str[] formats, bool emit, "
    "str layout, bool interleaved, int? rotary_dim, int rotary_offset, str numerics, str? impl=None) -> Tensor[]"
)
_LIBRARY.define(
    "dequant_fp8(Tensor values, Tensor scales, int? group_size, ScalarType dtype, str? impl=None) -> Tensor"
)


def run_registered(
    operation: str,
    inputs: Sequence[torch.Tensor | None],
    texts: list[str],
    options: Sequence[Any],
    impl: str | None,
) -> list[torch.Tensor]:
    """Quantise by the registered operators.

    Args:
        operation: the public function, and the operator.
        inputs: the tensors of :class:`Inputs`, in its order.
        texts: the formats, encoded.
        options: the options of :class:`Options`, in its order.
        impl: the implementation asked for.
    """
    x, residual, weight, scale, *table = inputs
    _, emit, (eps, weight_offset, cast, residual_rounding), turned = options
    operators = torch.ops.tilewright
    results: list[torch.Tensor]
    if operation == "quant_fp8":
        results = operators.quant_fp8(x, scale, texts, impl)
    elif operation == "silu_mul_quant_fp8":
        results = operators.silu_mul_quant_fp8(x, scale, texts, emit, impl)
    elif operation == "rope_quant_fp8":
        results = operators.rope_quant_fp8(x, *table, scale, texts, emit, *turned[:4], turned[-1], impl)
    elif operation == "rms_norm_quant_fp8":
        results = operators.rms_norm_quant_fp8(x, weight, scale, texts, emit, eps, weight_offset, cast, impl)
    else:
        results = operators.add_rms_norm_quant_fp8(
            x, residual, weight, scale, texts, emit, eps, weight_offset, cast, residual_rounding, impl
        )
    return results


_decoded = lru_cache(maxsize=256)(decoded)


def _formats(texts: Sequence[str], operation: str) -> tuple[QuantFormat, ...]:
    try:
        return tuple([_decoded(text) for text in texts])
    except (ValueError, AttributeError) as error:
        raise ArgumentError(operation, "formats", f"got {texts}, which format.encoded did not write") from error


_PLAIN = (norm.Options(), rope.Options())


class _Given(NamedTuple):
    """What an operator was given."""

    inputs: Inputs
    options: tuple[Any, ...]
    impl: str | None


def _given_quant(x: Any, scale: Any, formats: Any, impl: Any = None) -> _Given:
    return _Given(Inputs(x, scale=scale), (_formats(formats, "quant_fp8"), False, *_PLAIN), impl)


def _given_norm(
    x: Any, weight: Any, scale: Any, formats: Any, emit: Any, eps: Any, offset: Any, cast: Any, impl: Any = None
) -> _Given:
    inputs = Inputs(x, None, weight, scale)
    normed = norm.Options(eps, offset, cast)
    return _Given(inputs, (_formats(formats, "rms_norm_quant_fp8"), emit, normed, rope.Options()), impl)


def _given_add(
    x: Any, residual: Any, weight: Any, scale: Any, formats: Any, emit: Any, eps: Any, offset: Any, cast: Any,
    rounding: Any, impl: Any = None,
) -> _Given:  # fmt: skip
    normed = norm.Options(eps, offset, cast, rounding)
    options = (_formats(formats, "add_rms_norm_quant_fp8"), emit, normed, rope.Options())
    return _Given(Inputs(x, residual, weight, scale), options, impl)


def _given_silu(x: Any, scale: Any, formats: Any, emit: Any, impl: Any = None) -> _Given:
    return _Given(Inputs(x, scale=scale), (_formats(formats, "silu_mul_quant_fp8"), emit, *_PLAIN), impl)


def _given_rope(
    x: Any, cos: Any, sin: Any, position_ids: Any, scale: Any, formats: Any, emit: Any, layout: Any, interleaved: Any,
    rotary_dim: Any, rotary_offset: Any, numerics: Any, impl: Any = None,
) -> _Given:  # fmt: skip
    turned = rope.Options(layout, interleaved, rotary_dim, rotary_offset, numerics=numerics)
    inputs = Inputs(x, None, None, scale, cos, sin, position_ids)
    return _Given(inputs, (_formats(formats, "rope_quant_fp8"), emit, norm.Options(), turned), impl)


def _run(operation: str, read: Callable[..., _Given]) -> Callable[..., list[torch.Tensor]]:
    def run(*args: Any) -> list[torch.Tensor]:
        inputs, options, impl = read(*args)
        return quantise(operation, inputs, options, impl)

    return run


def _fake(operation: str, read: Callable[..., _Given]) -> Callable[..., list[torch.Tensor]]:
    def fake(*args: Any) -> list[torch.Tensor]:
        inputs, options, _ = read(*args)
        return empty_results(describe(inputs, options_of(options), operation), inputs)

    return fake


def _dequant(
    values: torch.Tensor, scales: torch.Tensor, group_size: int | None, dtype: torch.dtype, impl: str | None = None
) -> torch.Tensor:
    return dequantise(values, scales, group_size, dtype, impl)


def _fake_dequant(
    values: torch.Tensor, scales: torch.Tensor, group_size: int | None, dtype: torch.dtype, impl: str | None = None
) -> torch.Tensor:
    describe_dequant(DequantInputs(values, scales), group_size, dtype)
    return _empty_like(values, dtype)


def _no_gradient(operation: str) -> Callable[..., Any]:
    """The operators' autograd kernel: nothing to record, or a clear refusal."""
    operator = getattr(torch.ops.tilewright, operation).default
    names = [argument.name for argument in operator._schema.arguments]

    def run(*args: Any) -> Any:
        refuse_gradients(operation, names, args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return run


for _name, _read in (
    ("quant_fp8", _given_quant),
    ("rms_norm_quant_fp8", _given_norm),
    ("add_rms_norm_quant_fp8", _given_add),
    ("silu_mul_quant_fp8", _given_silu),
    ("rope_quant_fp8", _given_rope),
):
    _LIBRARY.impl(_name, _run(_name, _read), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tilewright::{_name}", _fake(_name, _read), lib=_LIBRARY)
    _LIBRARY.impl(_name, _no_gradient(_name), "Autograd")
_LIBRARY.impl("dequant_fp8", _dequant, "CompositeExplicitAutograd")
torch.library.register_fake("tilewright::dequant_fp8", _fake_dequant, lib=_LIBRARY)
_LIBRARY.impl("dequant_fp8", _no_gradient("dequant_fp8"), "Autograd")
