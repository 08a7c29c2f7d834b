"""One point of the test grid of FP8 quantisation: a call on random data, and how its results are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tilewright.numerics import compare, compare_codes, disagreement
from tilewright.ops.contract import Arguments
from tilewright.ops.quant_fp8 import reference
from tilewright.ops.quant_fp8.call import EMITS, Inputs, Options, describe, rope_inputs
from tilewright.ops.quant_fp8.format import QuantFormat, checked
from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rms_norm.reference import rms_norm
from tilewright.ops.rope import call as rope
from tilewright.ops.rope.reference import rotate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

QUANT, NORM, ADD, SILU, ROPE, DEQUANT = FUNCTIONS = (
    "quant_fp8",
    "rms_norm_quant_fp8",
    "add_rms_norm_quant_fp8",
    "silu_mul_quant_fp8",
    "rope_quant_fp8",
    "dequant_fp8",
)
_FIELDS = ("group_size", "scale_format", "scale_layout", "dtype", "policy")
_DEFAULT = QuantFormat()


@dataclass(frozen=True)
class QuantCase:
    """One valid call of the test grid.

    Attributes:
        lead: the leading dimensions.
        n_cols: the length of a row of values.
        format: the first format.
        also: the further ones.
        static: a scale is given.
        emit: what is quantised is returned too.
        strides: how ``x`` lies in memory: ``"contiguous"``, ``"sliced"`` (part of wider rows), ``"heads"`` (part of
            more heads), ``"permuted"`` (the first two dimensions swapped), ``"expanded"`` (one for the whole first
            dimension), or ``"spread"`` (columns two apart).
        values: what the numbers are: ``"normal"``, ``"zeros"`` among them, ``"tiny"`` (denormal numbers too),
            ``"huge"``, ``"wide"`` (many magnitudes), ``"inf"`` or ``"nan"``.
        weight: the dtype of the norm's weight: ``"input"``, ``"float32"``, or ``"none"``.
        residual: that of the residual, ``"input"`` or ``"float32"``.
        norm: keywords of the norm.
        rope: keywords of the rotation, and two of the test's own: ``table``, ``"half"`` or ``"full"``, and
            ``positions``, ``"counted"``, ``"shared"`` or ``"batched"``; of given ones some lie before the table.
        dtypes: of ``x``; of the result of ``dequant_fp8``.
    """

    id: str
    function: str = QUANT
    lead: tuple[int, ...] = (3,)
    n_cols: int = 300
    format: QuantFormat = _DEFAULT
    also: tuple[QuantFormat, ...] = ()
    static: bool = False
    emit: bool = False
    strides: str = "contiguous"
    values: str = "normal"
    weight: str = "input"
    residual: str = "input"
    norm: tuple[tuple[str, Any], ...] = ()
    rope: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)

    @property
    def has_gradients(self) -> bool:
        """False: FP8 codes have none."""
        return False

    def arguments(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """The call on random data."""
        generator = torch.Generator().manual_seed(seed)
        if self.function == DEQUANT:
            return self._dequant_arguments(device, dtype, generator)
        args = [self._x(dtype, generator).to(device)]
        if self.function == ADD:
            args.append(self._x(torch.float32 if self.residual == "float32" else dtype, generator).to(device))
        kwargs: dict[str, Any] = dict(self.norm)
        if self.function in (NORM, ADD) and self.weight != "none":
            weight = torch.randn(self.n_cols, generator=generator, dtype=torch.float64)
            args.append(weight.to(device, torch.float32 if self.weight == "float32" else dtype))
        if self.function == ROPE:
            table, given = self._table(dtype, generator)
            args += [each.to(device) for each in table]
            kwargs |= {
                name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in given.items()
            }
        kwargs |= _changed(self.format)
        if self.static:
            kwargs["scale"] = torch.full((1,), 0.0123, device=device)
        if self.also:
            kwargs["also"] = self.also
        if self.emit:
            kwargs[EMITS[self.function]] = True
        return Arguments(tuple(args), kwargs)

    def judge(
        self,
        arguments: Arguments,
        results: tuple[torch.Tensor, ...],
        references: tuple[torch.Tensor, ...],
        implementation: str,
    ) -> str:
        """Held against the definition.

        Scales of a tensor as it is are those of the reference, bit for bit, and its codes follow the policy for codes.
        A fusion is held against its parts by the same implementation, bit for bit, and the norm or the activation
        against the truth. Where it is quantised before it is rounded there are no such parts: scales and dequantised
        values then are numbers like others, their truth being what is quantised in float64, and the reference's own
        error is that of its codes.
        """
        if self.function == DEQUANT:
            values, scales = arguments.args
            ones = torch.ones(values.shape, device=values.device).to(values.dtype)
            size = self.format.group_size
            truth = values.double() * reference.dequantised(ones, scales, size, torch.float32).double()
            return disagreement("result", results, references, [truth])
        if self.function == QUANT:
            (values, scales), (expected, expected_scales) = results, references
            if not same_bits(scales, expected_scales):
                return "the scales are not the reference's"
            return compare_codes(values, expected)
        wrong, y = self._judge_source(arguments, results, implementation)
        if wrong:
            return wrong
        for index, f in enumerate(self._formats(arguments.args[0].device)):
            pair, expected_pair = self._pair(results, index), self._pair(references, index)
            if f.arithmetic.round_input:
                wrong = _judge_parts(f, y, arguments.kwargs.get("scale"), pair, implementation)
            else:
                wrong = _judge_unrounded(f, pair, expected_pair, self._source(arguments, torch.float64))
            if wrong:
                return f"format {index}: {wrong}"
        return ""

    def comparable(self, arguments: Arguments, implementation: str) -> Arguments:
        """The call itself."""
        return arguments

    def truth_arguments(self, arguments: Arguments) -> Arguments:
        """The call itself: a policy's arithmetic is float32, and its truth are codes."""
        return arguments

    def definition(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """The results by ``reference.py`` alone, in the order of the public function's."""
        if self.function == DEQUANT:
            values, scales = arguments.args
            size = arguments.kwargs.get("group_size", 128)
            return (reference.dequantised(values, scales, size, arguments.kwargs["dtype"]),)
        inputs = inputs_of(self.function, *arguments)
        given = norm.Options(**dict(self.norm))
        options = Options((self.format, *self.also), self.emit, given, rope.Options(**self._rope))
        results = reference.quantised(describe(inputs, options, self.function), inputs)
        if inputs.scale is not None:
            return (results[0], inputs.scale, *results[1:])
        n = 2 * len(options.formats)
        return (*results[:2], *results[n:], *results[2:n])

    def differentiable(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def summed_rows(self, arguments: Arguments) -> tuple[int, ...]:
        """None."""
        return ()

    def _formats(self, device: torch.device) -> tuple[QuantFormat, ...]:
        return tuple(checked(f, device, self.function) for f in (self.format, *self.also))

    def _pair(self, results: Sequence[torch.Tensor], index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and scales of a format in a public function's flat results."""
        at = 0 if index == 0 else 2 * index + self.emit + (self.function == ADD)
        return results[at], results[at + 1]

    def _source(self, arguments: Arguments, dtype: torch.dtype) -> torch.Tensor:
        """What is quantised, by the definition in the dtype of ``x``, or its truth in float64."""
        inputs = inputs_of(self.function, *arguments)
        if dtype == torch.float64:
            wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
            inputs = Inputs(*wide)  # type: ignore[arg-type]
        if self.function == ROPE:
            rotated = torch.empty_like(inputs.x)
            given = rope_inputs(inputs)
            rotate(rope.describe(given, 0, rope.Options(**self._rope)), given, 0, (rotated, None))
            return rotated
        if self.function != SILU:
            normed = norm.Inputs(*inputs[:3])
            return rms_norm(norm.describe(normed, norm.Options(**dict(self.norm))), normed)[0]
        if dtype == torch.float64:
            gate, up = inputs.x.chunk(2, -1)
            return gate / (1 + torch.exp(-gate)) * up
        call = describe(inputs, Options((QuantFormat(),)), SILU)
        return reference.source(call, inputs)[0].to(dtype)

    def _judge_source(
        self, arguments: Arguments, results: tuple[torch.Tensor, ...], implementation: str
    ) -> tuple[str, torch.Tensor]:
        """Why what is quantised, or the stored sum, is wrong; and what is quantised, as the implementation has it."""
        import tilewright

        (args, kwargs), public = arguments, getattr(tilewright, self.function)
        emitting = public(*args, **kwargs | {EMITS[self.function]: True}, impl=implementation)
        y = emitting[3 if self.function == ADD else 2]
        own = [t for t in emitting[:-1] if t is not None and (t is not y or self.emit)]
        shared = [*own, *(t for pair in emitting.also for t in pair)]
        if len(shared) != len(results) or not all(map(same_bits, shared, results)):
            return "the results depend on whether what is quantised is returned", y
        truth, same_dtype = self._source(arguments, torch.float64), self._source(arguments, y.dtype)
        wrong = disagreement("what is quantised:", [y], [same_dtype], [truth])
        if not wrong and self.function == ROPE:
            given = {name: each for name, each in kwargs.items() if name in (*self._rope, "position_ids")}
            return "" if same_bits(y, tilewright.rope(*args, **given, impl=implementation)) else "not rope's bits", y
        if not wrong and self.function != SILU:
            plain = tilewright.add_rms_norm if self.function == ADD else tilewright.rms_norm
            expected = plain(*args, **dict(self.norm), impl=implementation)
            pairs: list[tuple[Any, Any]] = (
                [(y, expected)] if self.function == NORM else [(y, expected[0]), (emitting.residual, expected[1])]
            )
            if not all(same_bits(*pair) for pair in pairs):
                wrong = f"the norm or the sum is not that of {plain.__name__}"
        return wrong, y

    @property
    def _rope(self) -> dict[str, Any]:
        """The keywords of the rotation that are the function's."""
        return {name: given for name, given in self.rope if name not in ("table", "positions")}

    def _table(
        self, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Cosines and sines, and the keywords of the rotation."""
        given = dict(self.rope)
        axes = rope.LAYOUTS[given.get("layout", "bshd")]
        tokens, batch = self.lead[axes.token], 1 if axes.batch is None else self.lead[axes.batch]
        width = given.get("rotary_dim", self.n_cols) // (1 if given.get("table") == "full" else 2)
        angles = torch.randn(tokens + 3, width, generator=generator, dtype=torch.float64)
        kwargs: dict[str, Any] = dict(self._rope)
        sizes = {"shared": (tokens,), "batched": (batch, tokens)}.get(given.get("positions", "counted"))
        if sizes is not None:
            kwargs["position_ids"] = torch.randint(-1, tokens + 3, sizes, generator=generator)
        table = dtype if given.get("numerics") == "hf" else torch.float32
        return (angles.cos().to(table), angles.sin().to(table)), kwargs

    def _x(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        shape = (*self.lead, self.n_cols * (2 if self.function == SILU else 1))

        def random(*shape: int) -> torch.Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return self._edited(x, dtype, generator).to(dtype)

        if self.strides == "sliced":
            return random(*shape[:-1], shape[-1] + 24)[..., 8:-16]
        if self.strides == "heads":
            return random(*shape[:-2], shape[-2] + 3, shape[-1])[..., 1:-2, :]
        if self.strides == "permuted":
            return random(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        if self.strides == "expanded":
            return random(1, *shape[1:]).expand(shape)
        if self.strides == "spread":
            return random(*shape[:-1], 2 * shape[-1])[..., ::2]
        return random(*shape)

    def _edited(self, x: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        info = torch.finfo(dtype)
        half = x[..., : self.n_cols]  # of a gate and its factor, the gate alone: products may not overflow
        if self.values == "zeros":
            x[..., :140], x[:1] = 0, 0
        elif self.values == "tiny":
            x *= info.smallest_normal
        elif self.values == "huge":
            half *= info.max / 16
        elif self.values == "wide":
            half *= torch.exp2(torch.randint(-9, 9, half.shape, generator=generator))
        elif self.values == "inf":
            x[..., 3], x[:1, ..., 5] = float("inf"), -float("inf")
        elif self.values == "nan":
            x[:1, ..., 3] = float("nan")
        return x

    def _dequant_arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        x = self._x(torch.float32, generator)
        scale = torch.full((), 0.0123) if self.static else None
        inputs = Inputs(x, scale=scale)
        pair = reference.quantised(describe(inputs, Options((self.format,)), QUANT), inputs)
        values, scales = pair if scale is None else (pair[0], scale)
        if self.strides == "sliced":
            values = torch.cat((values, values), -1)[..., : self.n_cols]
        kwargs = {"dtype": dtype}
        given = {} if self.format.group_size == _DEFAULT.group_size else {"group_size": self.format.group_size}
        strided = torch.empty_strided(scales.shape, scales.stride(), dtype=scales.dtype, device=device).copy_(scales)
        return Arguments((values.to(device), strided), kwargs | given)


def inputs_of(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """The tensors of a call of a public function by name."""
    x, *rest = args
    if function == ROPE:
        cos, sin = rest
        return Inputs(x, None, None, kwargs.get("scale"), cos, sin, kwargs.get("position_ids"))
    residual = rest.pop(0) if function == ADD else None
    return Inputs(x, residual, rest[0] if rest else None, kwargs.get("scale"))


def _changed(f: QuantFormat) -> dict[str, Any]:
    """The keywords that describe a format, where they differ from their defaults."""
    return {field: getattr(f, field) for field in _FIELDS if getattr(f, field) != getattr(_DEFAULT, field)}


def _judge_parts(
    f: QuantFormat, y: torch.Tensor, scale: Any, pair: tuple[torch.Tensor, torch.Tensor], implementation: str
) -> str:
    """Why a fusion's quantisation is not the one of what it quantises."""
    import tilewright

    expected = tilewright.quant_fp8(y, **_changed(f), scale=scale, impl=implementation)
    for name, got, wanted in zip(expected._fields, pair, expected, strict=True):
        if not same_bits(got, wanted):
            return f"the {name} are not those of quant_fp8"
    return ""


def _judge_unrounded(
    f: QuantFormat,
    pair: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    truth: torch.Tensor,
) -> str:
    """Why a quantisation of what was never rounded is wrong."""
    scales = pair[1]
    if f.rounds_up or scales.numel() == 1:  # a last bit would have to straddle a power of two
        if not same_bits(scales, expected[1]):
            return "the scales are not the reference's"
    elif not (agreement := compare(scales, expected[1], reference.scales(f, truth))).ok:
        return f"scales: {agreement}"
    wide, same = (reference.dequantised(*each, f.group_size, torch.float32) for each in (pair, expected))
    agreement = compare(wide, same, truth)
    return compare_codes(pair[0], expected[0]) if agreement.ok else f"dequantised: {agreement}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits; a NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    bits = [t.contiguous().view(integer) for t in (a, b)]
    if a.is_floating_point():
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            return False
        bits = [t.masked_fill(nan, 0) for t in bits]
    return torch.equal(*bits)
