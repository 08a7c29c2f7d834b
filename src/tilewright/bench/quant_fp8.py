"""Who quantises to FP8, alone or behind another operation, for the benchmark, and how codes are judged.

What is quantised is ``y``, whose truth ``t`` is computed in float64. Results are right if

- scales lie between those of ``|t| - slack`` and ``|t| + slack``, where ``slack`` is what ``y`` may be off;
- dequantised values lie within half a step of the code, at the truth, and ``slack``;
- what else is returned agrees by :func:`tilewright.numerics.compare`;
- and, for who does the arithmetic of the definition, :func:`tilewright.numerics.compare_codes` finds the codes right
  wherever scales are bit-equal, which those of all but a few groups must be.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from tilewright.bench import norm_peers, rms_norm, rope
from tilewright.bench.providers import (
    CopyProvider,
    Formulation,
    FunctionProvider,
    Provider,
    Suite,
    by_reference,
    no_kernels,
    not_chosen,
    public_function,
    records_gradients,
)
from tilewright.numerics import EQUAL_CODES, REFERENCE_ERRORS, compare_codes, disagreement
from tilewright.ops.quant_fp8 import reference
from tilewright.ops.quant_fp8.call import EMITS, Options, describe
from tilewright.ops.quant_fp8.cases import ADD, NORM, QUANT, ROPE, SILU, inputs_of
from tilewright.ops.quant_fp8.format import QuantFormat, checked
from tilewright.ops.rms_norm.call import Options as NormOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Arguments, Workload

_FIRST = {NORM: "rms_norm", ADD: "add_rms_norm", ROPE: "rope"}
_FIELDS = ("group_size", "scale_format", "scale_layout", "dtype", "policy")


def suite() -> Suite:
    """Everything that the benchmark of ``quant_fp8`` needs."""
    from tilewright.ops import family

    providers: tuple[Provider, ...] = (
        FunctionProvider(
            "triton",
            "tilewright's Triton kernel",
            partial(public_function, "triton"),
            formulation=lambda task: SAME_ARITHMETIC,
            missing=no_kernels,
            refuses=partial(not_chosen, "triton"),
        ),
        FunctionProvider(
            "two_kernels",
            "tilewright's Triton kernels one after the other: norm or rotation, then one quantisation for each format",
            two_kernels,
            formulation=lambda task: SAME_ARITHMETIC,
            missing=no_kernels,
            refuses=_not_two_kernels,
        ),
        FunctionProvider(
            "eager", "plain PyTorch, exact division", plain, results=with_exponents, refuses=_only_whole_groups
        ),
        FunctionProvider(
            "compile",
            "torch.compile(dynamic=False) of plain PyTorch in one graph",
            plain,
            results=with_exponents,
            compiled=True,
            refuses=_only_whole_groups,
        ),
        FunctionProvider(
            "reference",
            "tilewright's definition",
            partial(public_function, "reference"),
            formulation=lambda task: SAME_ARITHMETIC,
        ),
        *norm_peers.quant_providers(BLOCK, RECIPROCAL),
        CopyProvider(),
    )
    return Suite(
        family=family("quant_fp8"),
        formulation=DEFINITION,
        wrt=_wrt,
        providers=providers,
        on_request=frozenset({"reference"}),
        no_gradients="FP8 codes have no gradients",
    )


def _wrt(workload: Workload, arguments: Arguments) -> tuple[int, ...]:
    """The tensors that a caller might want gradients of: a task that does is refused."""
    return tuple(range(len(arguments.args)))


# Providers


def formats_of(task: Task) -> tuple[QuantFormat, ...]:
    """Every format of a task, with its dtype filled in."""
    first = QuantFormat(**{name: task.kwargs[name] for name in _FIELDS if name in task.kwargs})
    device = task.args[0].device
    return tuple(checked(f, device, task.function) for f in (first, *task.kwargs.get("also", ())))


def plain(task: Task) -> Callable[..., Any]:
    """A norm, an activation or a rotation and its quantisation in plain PyTorch, as vLLM does without kernels.

    The function gives exponents as uint8, which :func:`with_exponents` takes for what they are: not everything that
    compiles knows ``float8_e8m0fnu``.
    """
    function, formats, emit = task.function, formats_of(task), _emits(task)

    def run(*args: torch.Tensor, scale: torch.Tensor | None = None, **_options: Any) -> Tensors:
        rest: Tensors = ()
        if function in (NORM, ADD):
            y, *stored = rms_norm.plain(*args)
            rest = tuple(stored)
        elif function == SILU:
            gate, up = args[0].chunk(2, dim=-1)
            y = F.silu(gate) * up
        elif function == ROPE:
            (y,) = rope.plain(*args)
        else:
            (y,) = args
        pairs = [t for f in formats for t in (_quantised(f, y) if scale is None else (_encoded(f, y, scale), scale))]
        return (*pairs[:2], *rest, *((y,) if emit else ()), *pairs[2:])

    return run


def with_exponents(results: Tensors) -> Tensors:
    """Exponents as numbers of their own dtype, where there are any."""
    return tuple(t.view(torch.float8_e8m0fnu) if t.dtype == torch.uint8 else t for t in results)


def _quantised(f: QuantFormat, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert f.dtype is not None
    groups = y.float().reshape(*y.shape[:-1], -1, y.shape[-1] if f.group_size is None else f.group_size)
    maximum = torch.full(
        (), f.arithmetic.maximum_of(f.dtype), device=y.device
    )  # divided by, not multiplied with 1 / it
    scale = (groups.abs().amax(-1, keepdim=True) / maximum).clamp(min=f.arithmetic.scale_floor)
    if f.rounds_up:
        scale = reference.rounded_up(scale)
    values = _encoded(f, groups, scale).flatten(-2)
    scale = scale.squeeze(-1)
    if f.scale_format == "fp32":
        return values, scale
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    if not f.is_packed:
        return values, exponents
    words = F.pad(exponents, (0, -exponents.shape[-1] % 4)).view(torch.int32)
    n_rows = words.shape[0]
    columns = F.pad(words, (0, 0, 0, -n_rows % 4)).mT.contiguous()  # each padded to 16 bytes
    return values, columns.mT[:n_rows]


def _encoded(f: QuantFormat, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert f.dtype is not None
    maximum = f.arithmetic.maximum_of(f.dtype)
    return (y.float() / scale).clamp(-maximum, maximum).to(f.dtype)


def _only_whole_groups(task: Task) -> str | None:
    n_cols = task.args[0].shape[-1] // (2 if task.function == SILU else 1)
    for f in formats_of(task):
        if f.group_size is not None and n_cols % f.group_size:
            return f"written for rows of whole groups of {f.group_size}"
        if f.policy != "exact":
            return "written for the policy 'exact'"
        if f.scale_format == "ue8m0_fp32" or f.scale_layout != ("tma_aligned" if f.is_packed else "row"):
            return f"written for other scales than {f.scale_format} by {f.scale_layout}"
    return None


def two_kernels(task: Task) -> Callable[..., Any]:
    """The norm or the rotation, and then one quantisation for each format, each a launch of its own."""
    import tilewright

    emit, summed = _emits(task), task.function == ADD
    first: Callable[..., Any] = getattr(tilewright, _FIRST[task.function])
    each = [{name: getattr(f, name) for name in _FIELDS} for f in formats_of(task)]

    def run(*args: torch.Tensor, scale: torch.Tensor | None = None, **_options: Any) -> Any:
        made = first(*args, impl="triton")
        y, *stored = made if summed else (made,)
        pairs = [tilewright.quant_fp8(y, scale=scale, impl="triton", **options) for options in each]
        return (*pairs[0], *stored, *((y,) if emit else ()), *pairs[1:])

    return run


def _not_two_kernels(task: Task) -> str | None:
    if task.function not in _FIRST:
        return "only a norm or a rotation and its quantisation are two kernels of ours"
    return not_chosen("triton", task)


# What is true


class Parts(NamedTuple):
    """The results of a task.

    Attributes:
        pairs: values and scales of each format.
        rest: the stored sum and what is emitted, if there are such.
    """

    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    rest: Tensors


def parts_of(task: Task, results: Tensors) -> Parts:
    """Flat results in the public functions' order, taken apart."""
    n_formats, n_rest = len(formats_of(task)), _emits(task) + (task.function == ADD)
    flat = (*results[:2], *results[2 + n_rest :])
    return Parts(tuple((flat[2 * i], flat[2 * i + 1]) for i in range(n_formats)), results[2 : 2 + n_rest])


def truth_of(task: Task) -> Tensors:
    """What is quantised in float64, once for each format, then the truth of the stored sum and of what is emitted."""
    y, rest = _source_in_double(task), []
    if task.function == ADD:
        rest.append(task.args[0].double() + task.args[1].double())
    return (*(y for _ in formats_of(task)), *rest, *((y,) if _emits(task) else ()))


def numbers_of(task: Task, results: Tensors) -> Tensors:
    """The results as numbers, in the order of :func:`truth_of`."""
    parts = parts_of(task, results)
    wide = [
        values.double() * _spread(f, _scales(f, scales, values), values)
        for f, (values, scales) in zip(formats_of(task), parts.pairs, strict=True)
    ]
    return (*wide, *parts.rest)


def formulation(name: str, *, same_arithmetic: bool = False, policy: str = "exact", **rounding: str) -> Formulation:
    """Quantisation by this policy, behind a norm with these rounding points.

    Args:
        name: of the formulation.
        same_arithmetic: whether results come by the definition's own arithmetic, so that codes can be compared.
        policy: name of the policy of :class:`tilewright.QuantFormat`.
        **rounding: ``cast`` and ``residual_rounding``, of a norm.
    """

    def change(task: Task) -> Task:
        if rounding and task.function in (NORM, ADD):
            task = rms_norm.with_options(task, **rounding)
        return task if policy == "exact" else replace(task, kwargs=task.kwargs | {"policy": policy})

    def evaluate(task: Task) -> Tensors:
        return () if records_gradients(task) else by_reference(change(task))  # which nobody is measured on

    def judges(task: Task, results: Tensors, expected: Tensors, truth: Tensors) -> str:
        wrong = _judge_codes(task, results, expected) if same_arithmetic else ""
        return wrong or judge(change(task), results, expected, truth)

    return Formulation(name, evaluate, lambda task: truth_of(change(task)), judges=judges, numbers=numbers_of)


DEFINITION = formulation("the definition's roundings, within the step of a code")
SAME_ARITHMETIC = formulation("the definition's arithmetic, code for code", same_arithmetic=True)
BLOCK = formulation(
    "norm of the exact sum, rounded after the weight, times a reciprocal, within the step of a code",
    policy="deep_gemm",
    cast="after_weight",
    residual_rounding="exact",
)
RECIPROCAL = formulation("times a reciprocal, within the step of a code", policy="deep_gemm")


# How results are judged


def judge(task: Task, results: Tensors, expected: Tensors, truth: Tensors) -> str:
    """Why results are wrong, whatever the order of their sums and the roundings in between; empty if they are right.

    Args:
        task: the call.
        results: what is judged.
        expected: the definition's results.
        truth: by :func:`truth_of`.
    """
    formats, y = formats_of(task), truth[0]
    parts, plain_parts = parts_of(task, results), parts_of(task, expected)
    room = slack(task, y)
    for index, (f, (values, scales)) in enumerate(zip(formats, parts.pairs, strict=True)):
        wide = _scales(f, scales, values)
        given = task.kwargs.get("scale")
        if given is None:
            wrong = wrong_scales(f, wide, y, room)
        else:
            wrong = "" if torch.equal(scales, given) else "the scale is not the given one"
        wrong = wrong or wrong_values(f, values, _spread(f, wide, values), y, room)
        if wrong:
            return f"format {index}: {wrong}"
    return disagreement("result", parts.rest, plain_parts.rest, truth[len(formats) :])


def slack(task: Task, truth: torch.Tensor) -> torch.Tensor:
    """How far what is quantised may be off the truth, element by element, before it is quantised.

    A norm's ``y = n * w`` comes of float32 arithmetic, ``n`` is rounded to the dtype of ``x``, and the product again; a
    gated SiLU is rounded at the same two places, a rotation once. With ``u = eps / 2`` a rounding is off by at most ``u
    / (1 + u)`` of the number, two of them together by less than ``2 u = eps``. Below the normal numbers a rounding is
    off by half a subnormal step instead, of ``n`` or of the product, which multiplies the former by ``w``. The
    arithmetic has the budget of the numerics policy, its reference's error being that of the definition without these
    roundings. The policy's one unit of float32 also covers a quotient by a scale, or a product with its reciprocal.
    Kernels that round in fewer places, or divide tensors as they are but not exactly, stay within the same.

    Args:
        task: the call.
        truth: what is quantised, in float64.
    """
    x, factor = task.args[0], task.args[-1]
    inputs = inputs_of(task.function, task.args, task.kwargs)
    kwargs = {name: task.kwargs[name] for name in NormOptions._fields if name in task.kwargs}
    call = describe(inputs, Options(formats_of(task), _emits(task), NormOptions(**kwargs)), task.function)
    arithmetic = reference.source(call, inputs, rounded=False)[0]
    error = (arithmetic.double() - truth).abs().max()
    rounding, single = torch.finfo(x.dtype), torch.finfo(torch.float32)
    subnormal_step = rounding.smallest_normal * rounding.eps * factor.abs().max().double().clamp(min=1.0)
    room: torch.Tensor = REFERENCE_ERRORS * error + (single.eps + rounding.eps) * truth.abs() + subnormal_step
    return room


def wrong_scales(f: QuantFormat, scales: torch.Tensor, truth: torch.Tensor, room: torch.Tensor) -> str:
    """Why scales are wrong; empty if they are right.

    A scale grows with every magnitude in its group, so it lies between the scales of the least and of the largest
    magnitudes that are allowed. In a ue8m0 format both are rounded up to powers of two, and mostly are the same one.

    Args:
        f: the format.
        scales: ``[..., groups]`` in float64.
        truth: what is quantised, in float64.
        room: how far it may be off.
    """
    own = replace(f, scale_format="fp32", scale_layout="row")
    least, largest = (reference.scales(own, each) for each in ((truth.abs() - room).clamp(min=0.0), truth.abs() + room))
    if f.rounds_up:
        floor = f.arithmetic.ue8m0_floor
        least, largest = (_power_above(bound.clamp(min=floor)) for bound in (least, largest))
        if not torch.equal(scales, _power_above(scales)):
            return "a scale is no power of two"
    outside = ~((scales >= least) & (scales <= largest))  # a NaN lies outside
    return f"{int(outside.sum())} of {outside.numel()} scales are not those of the truth" if outside.any() else ""


def wrong_values(
    f: QuantFormat, values: torch.Tensor, scale: torch.Tensor, truth: torch.Tensor, room: torch.Tensor
) -> str:
    """Why values are wrong; empty if they are right.

    The nearest code lies within half a step of ``y``, and clamping brings no two numbers farther apart. ``y`` may lie
    across a power of two from the truth, where steps change; but there the power itself is the nearest code of both.

    Args:
        f: the format.
        values: the codes.
        scale: in float64, by which each of them is multiplied back.
        truth: what is quantised, in float64.
        room: how far it may be off.
    """
    assert f.dtype is not None
    limit = (f.arithmetic.maximum_of(f.dtype) * scale).broadcast_to(truth.shape)
    target = truth.clamp(-limit, limit)
    error = (values.double() * scale - target).abs()
    allowed = scale * step_at(target / scale, f.dtype) / 2 + room
    outside = ~(error <= allowed)  # a NaN lies outside
    if not outside.any():
        return ""
    return f"{int(outside.sum())} of {outside.numel()} values are farther than half a step from the truth"


def step_at(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of an FP8 dtype, in float64, where ``numbers`` lie."""
    info, numbers = torch.finfo(dtype), numbers.double()
    mantissa, _ = torch.frexp(numbers)  # from a half to one, so that the quotient is the power of two above, exactly
    above = torch.where(mantissa == 0, mantissa, numbers / mantissa)
    return (above / 2 * info.eps).clamp(min=info.smallest_normal * info.eps)


def _judge_codes(task: Task, results: Tensors, expected: Tensors) -> str:
    """Why codes are not those of the definition, where it is the same arithmetic that made them.

    A norm's order of summation is its own, which moves a float32 number by its last bits and seldom a rounding to 16
    bits. So a scale may differ in no larger a share of groups than a code may (in one group, however few there are),
    and in none of a tensor as it is. What is quantised in float32 has those last bits, and its scales too.
    """
    own_bits = task.dtype == torch.float32 and task.function != QUANT
    pairs = zip(formats_of(task), parts_of(task, results).pairs, parts_of(task, expected).pairs, strict=True)
    for index, (f, (values, scales), (wanted, wanted_scales)) in enumerate(pairs):
        same = _scales(f, scales, values) == _scales(f, wanted_scales, wanted)
        n_apart = int((~same).sum())
        allowed = 0 if task.function == QUANT else max(1, int((1 - EQUAL_CODES) * same.numel()))
        if n_apart > allowed and not own_bits:
            return f"format {index}: {n_apart} of {same.numel()} scales are not the definition's"
        where = _spread(f, same, values).broadcast_to(values.shape)
        codes = [each.view(torch.uint8)[where].view(each.dtype) for each in (values, wanted)]
        wrong = compare_codes(*codes)
        if wrong:
            return f"format {index}: {wrong}"
    return ""


def _scales(f: QuantFormat, scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scales of any format ``[..., groups]`` in float64; a given one has no dimensions."""
    if scales.numel() == 1 and values.dim() != scales.dim():
        return scales.double().reshape(())
    return reference.unpacked(scales, f.groups(values.shape[-1])).double()


def _spread(f: QuantFormat, scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What each group has, for each value or broadcast against the values."""
    return reference.spread(f, scale, values.shape[-1]) if scale.dim() else scale


def _power_above(scale: torch.Tensor) -> torch.Tensor:
    """``2^ceil(log2(scale))`` of positive float64 numbers, exactly; NaN of what is not finite."""
    mantissa, _ = torch.frexp(scale)
    return torch.where(mantissa == 0.5, scale, scale / mantissa)


def _source_in_double(task: Task) -> torch.Tensor:
    """What is quantised, in float64."""
    if task.function == QUANT:
        x: torch.Tensor = task.args[0].double()
        return x
    if task.function == SILU:
        gate, up = task.args[0].double().chunk(2, dim=-1)
        activation: torch.Tensor = gate / (1.0 + torch.exp(-gate)) * up
        return activation
    if task.function == ROPE:
        doubles = tuple(each.double() for each in task.args)
        return by_reference(replace(task, function="rope", args=doubles, kwargs={}))[0]
    summed = task.function == ADD
    kept = {name: task.kwargs[name] for name in NormOptions._fields if name in task.kwargs}
    norm = replace(task, function="add_rms_norm" if summed else "rms_norm", kwargs=kept)
    return by_reference(rms_norm.in_double(norm))[0]


def _emits(task: Task) -> bool:
    return bool(task.kwargs.get(EMITS.get(task.function, ""), False))
