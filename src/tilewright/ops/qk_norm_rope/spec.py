"""The contract as data: test grid, invalid calls, workloads, bytes and flops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.contract import Arguments, Family, InvalidCase
from tilewright.ops.qk_norm_rope.call import OPERATION, Inputs, Options, describe
from tilewright.ops.qk_norm_rope.reference import qk_norm_rope
from tilewright.ops.rope.call import DTYPES, LAYOUTS
from tilewright.ops.rope.spec import RopeCase, RopeWorkload

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.ops.contract import Direction

    Weight = torch.dtype | str | None

_HALF = (torch.bfloat16,)
_FULL = (torch.float32,)


@dataclass(frozen=True)
class QkNormRopeCase(RopeCase):
    """One valid call of the test grid: a rotation with norms before it.

    Attributes:
        q_weight: dtype of the weight, ``"same"`` for that of ``q``, None for no weight.
        k_weight: likewise, of ``k``.
        eps: added to the mean of squares.
        weight_offset: added to the weights.
        cast: where the norm is rounded.
        angles: the table holds angles.
    """

    function: str = OPERATION
    q_weight: Weight = "same"
    k_weight: Weight = "same"
    eps: float = 1e-6
    weight_offset: float = 0.0
    cast: str = "before_weight"
    angles: bool = False

    def arguments(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """The call on random data."""
        rotation = replace(self, function="rope_from_angles" if self.angles else "rope_qk")
        args, kwargs = RopeCase.arguments(rotation, device, dtype, seed)
        q, *rest = args
        generator = torch.Generator().manual_seed(seed + 1)
        k = self._x(self.kv_heads, device, dtype, generator) if self.angles else rest.pop(0)
        weights = [self._weight(weight, device, dtype, generator) for weight in (self.q_weight, self.k_weight)]
        defaults = QkNormRopeCase("")
        for name in ("eps", "weight_offset", "cast"):
            if getattr(self, name) != getattr(defaults, name):
                kwargs[name] = getattr(self, name)
        return Arguments((q, k, *weights, *rest), kwargs)

    def truth_arguments(self, arguments: Arguments) -> Arguments:
        """The call in float64."""
        return Arguments(tuple(None if t is None else t.double() for t in arguments.args), arguments.kwargs)

    def definition(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Both results, by ``reference.py`` alone."""
        given = dict(arguments.kwargs)
        offsets = given.pop("offsets", 0)
        tensor = offsets if isinstance(offsets, torch.Tensor) else None
        tables = arguments.args[4:] if len(arguments.args) == 6 else (*arguments.args[4:], None)
        positions = (given.pop("position_ids", None), tensor, given.pop("cu_seqlens", None))
        inputs = Inputs._make((*arguments.args[:4], *tables, *positions))
        offset = 0 if tensor is not None else offsets
        call = describe(inputs, offset, Options(**given))
        outputs = (torch.empty_like(inputs.q), torch.empty_like(inputs.k))
        qk_norm_rope(call, inputs, offset, outputs)
        return outputs

    def differentiable(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """``q``, ``k`` and the weights that there are."""
        return tuple(t for t in arguments.args[:4] if t is not None)

    def summed_rows(self, arguments: Arguments) -> tuple[int, ...]:
        """One each, but for the weights, whose gradients sum over all tokens and heads."""
        q, k, *weights = arguments.args[:4]
        streams = zip((q, k), weights, strict=True)
        rows = [max(1, math.prod(x.shape[:-1])) for x, weight in streams if weight is not None]
        return (1, 1, *rows)

    def _weight(
        self, weight: Weight, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> torch.Tensor | None:
        if weight is None:
            return None
        around = torch.randn(self.head_dim, generator=generator, dtype=torch.float64) + 1 - self.weight_offset
        return around.to(device, weight if isinstance(weight, torch.dtype) and dtype != torch.float64 else dtype)


def _grid() -> tuple[QkNormRopeCase, ...]:
    case = QkNormRopeCase
    layouts = [
        case("small", batch=1, seqlen=3, heads=2, head_dim=8, positions="offset", dtypes=DTYPES),
        *(
            case(f"{layout}-{pairs}", layout=layout, interleaved=pairs == "interleaved")
            for layout in LAYOUTS
            for pairs in ("half", "interleaved")
        ),
    ]
    norms = [
        case("no-weights", q_weight=None, k_weight=None),
        case("q-weight-alone", k_weight=None),
        case("k-weight-alone-float32", q_weight=None, k_weight=torch.float32, dtypes=_HALF),
        case("weights-float32", q_weight=torch.float32, k_weight=torch.float32, dtypes=(*_HALF, torch.float16)),
        case("weights-of-two-dtypes", q_weight=torch.float16, k_weight=torch.bfloat16, dtypes=_HALF),
        case("after-weight", cast="after_weight"),
        case("offset-after-weight", weight_offset=1.0, cast="after_weight", interleaved=True),
        case("offset-before-weight", weight_offset=1.0, q_weight=torch.float32, dtypes=_HALF),
        case("eps", eps=0.5),
    ]
    positions = [
        case("bshd-offsets", positions="offsets"),
        case("sbhd-position_ids", layout="sbhd", positions="position_ids"),
        case("bhsd-position_ids-int32", layout="bhsd", positions="position_ids_int32", interleaved=True),
        case("thd-cu_seqlens", layout="thd", positions="cu_seqlens", seqlen=9, kv_heads=2),
        case("thd-cu_seqlens-offsets", layout="thd", positions="cu_seqlens_offsets", seqlen=9, dtypes=_FULL),
        case("mrope", positions="mrope", dtypes=_HALF),
        case("mrope_interleaved", positions="mrope_interleaved", head_dim=24, dtypes=_FULL),
        case("context_parallel", context_parallel=(1, 2), dtypes=_FULL),
    ]
    features = [
        case("partial-start", rotary_dim=8),
        case("partial-end", head_dim=24, rotary_dim=8, rotary_offset=16, dtypes=_FULL),
        case("partial-middle-interleaved", head_dim=80, rotary_dim=20, rotary_offset=6, interleaved=True),
        case("partial-no-weights", rotary_dim=8, rotary_offset=4, q_weight=None, k_weight=None, dtypes=_HALF),
        case("one-pair", head_dim=2),
        case("full-table", table="full", dtypes=_FULL),
        case("table-strided", table="strided", dtypes=_HALF),
        case("table-input-dtype", table_in_input_dtype=True, dtypes=_HALF),
        case("angles", angles=True, table="full", interleaved=True, dtypes=_FULL),
    ]
    strides = [
        case(
            f"{strides}-{layout}",
            layout=layout,
            strides=strides,
            kv_heads=2,
            interleaved=layout == "bhsd",
            dtypes=dtypes,
        )
        for strides in ("sliced", "spread", "permuted", "expanded")
        for layout, dtypes in (("bshd", _FULL), ("bhsd", _HALF))
    ]
    sizes = [
        case("head_dim-512", head_dim=512, seqlen=2, batch=1),
        case("head_dim-96-interleaved", head_dim=96, interleaved=True, dtypes=_HALF),
        case("heads-uneven", heads=13, kv_heads=5, head_dim=64, seqlen=3),
        case("many-tokens", seqlen=67, heads=1, head_dim=8, layout="bhsd", positions_in_table=70, dtypes=_FULL),
        case("decode", seqlen=1, batch=5, heads=8, kv_heads=2, head_dim=128, positions="offsets", dtypes=_HALF),
        case("empty-batch", batch=0, dtypes=_FULL),
        case("empty-sequence", seqlen=0, positions_in_table=0, dtypes=_FULL),
        case("empty-heads", kv_heads=0, dtypes=_FULL),
        case("empty-packed", layout="thd", seqlen=0, positions="cu_seqlens_none", dtypes=_FULL),
    ]
    return (*layouts, *norms, *positions, *features, *strides, *sizes)


def _invalid() -> tuple[InvalidCase, ...]:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")

    def wrong(
        id: str, error: type[ArgumentError], argument: str, *, case: dict[str, Any] | None = None, **changes: Any
    ) -> InvalidCase:
        """A valid call of ``case`` with the arguments in ``changes`` put in; functions among them get the device."""

        def build(device: torch.device) -> Arguments:
            args, kwargs = QkNormRopeCase("", **(case or {})).arguments(device, torch.float32)
            given = {name: value(device) if callable(value) else value for name, value in changes.items()}
            args = tuple(given.pop(name, value) for name, value in zip(names, args, strict=True))
            return Arguments(args, kwargs | given)

        return InvalidCase(id, OPERATION, build, error, argument)

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.ones(shape, dtype=dtype, device=device)

    def integers(*values: int) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.tensor(values, device=device)

    def elsewhere(*shape: int) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.ones(shape, device="meta")

    packed = {"layout": "thd"}
    return (
        wrong("no-q", DTypeError, "q", q=None),
        wrong("no-k", DTypeError, "k", k=None),
        wrong("no-cos", DTypeError, "cos", cos=None),
        wrong("list-q", DTypeError, "q", q=[[1.0] * 8]),
        wrong("rank-3", ArgumentError, "q", q=tensor(2, 6, 16)),
        wrong("integer-input", DTypeError, "q", q=tensor(2, 6, 3, 16, dtype=torch.int32)),
        wrong("odd-head_dim", ArgumentError, "q", q=tensor(2, 6, 3, 15)),
        wrong("k-dtype", DTypeError, "k", k=tensor(2, 6, 1, 16, dtype=torch.float16)),
        wrong("k-length", ArgumentError, "k", k=tensor(2, 5, 1, 16)),
        wrong("k-elsewhere", ArgumentError, "k", k=elsewhere(2, 6, 1, 16)),
        wrong("q_weight-shape", ArgumentError, "q_weight", q_weight=tensor(8)),
        wrong("k_weight-rank", ArgumentError, "k_weight", k_weight=tensor(1, 16)),
        wrong("q_weight-list", DTypeError, "q_weight", q_weight=[1.0] * 16),
        wrong("k_weight-float64", DTypeError, "k_weight", k_weight=tensor(16, dtype=torch.float64)),
        wrong("k_weight-elsewhere", ArgumentError, "k_weight", k_weight=elsewhere(16)),
        wrong("offset-without-weight", ArgumentError, "weight_offset", k_weight=None, weight_offset=1.0),
        wrong("eps-zero", ArgumentError, "eps", eps=0.0),
        wrong("eps-string", DTypeError, "eps", eps="1e-6"),
        wrong("cast-unknown", ArgumentError, "cast", cast="never"),
        wrong("cast-list", DTypeError, "cast", cast=["before_weight"]),
        wrong("table-rank", ArgumentError, "cos", cos=tensor(2, 64, 8)),
        wrong("table-dtype", DTypeError, "cos", cos=tensor(64, 8, dtype=torch.float16)),
        wrong("tables-differ", ArgumentError, "sin", sin=tensor(63, 8)),
        wrong("table-short", ArgumentError, "cos", case={"positions_in_table": 5}),
        wrong("table-short-offset", ArgumentError, "cos", case={"positions_in_table": 8}, offsets=3),
        wrong("angles-short", ArgumentError, "cos", case={"positions_in_table": 5}, sin=None),
        wrong("table-elsewhere", ArgumentError, "cos", cos=elsewhere(64, 8), sin=elsewhere(64, 8)),
        wrong("rotary_offset", ArgumentError, "rotary_offset", rotary_offset=2),
        wrong("rotary_dim-float", DTypeError, "rotary_dim", rotary_dim=16.0),
        wrong("layout", ArgumentError, "layout", layout="bdhs"),
        wrong("layout-list", DTypeError, "layout", layout=["bshd"]),
        wrong("interleaved-string", DTypeError, "interleaved", interleaved="False"),
        wrong("position_ids-shape", ArgumentError, "position_ids", position_ids=integers(1, 2, 3)),
        wrong("position_ids-past-table", ArgumentError, "position_ids", position_ids=integers(0, 1, 2, 3, 4, 64)),
        wrong("offsets-float", DTypeError, "offsets", offsets=1.5),
        wrong("offsets-past-table", ArgumentError, "cos", offsets=integers(0, 59)),
        wrong("cu_seqlens-layout", ArgumentError, "cu_seqlens", cu_seqlens=integers(0, 6)),
        wrong("cu_seqlens-descends", ArgumentError, "cu_seqlens", case=packed, cu_seqlens=integers(0, 4, 3, 6)),
        wrong("mrope-no-rows", ArgumentError, "mrope_section", mrope_section=(4, 2, 2)),
        wrong("parallel-rank", ArgumentError, "context_parallel", context_parallel=(2, 2)),
    )


@dataclass(frozen=True)
class QkNormRopeWorkload(RopeWorkload):
    """One shape of the benchmark, with a weight for each of ``q`` and ``k``."""

    @property
    def function(self) -> str:
        """The one that there is."""
        return OPERATION

    def arguments(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random data, generated on the device."""
        (q, k, *tables), kwargs = super().arguments(device, dtype, seed)
        generator = torch.Generator(device).manual_seed(seed + 1)
        weights = (1 + torch.randn((2, self.head_dim), generator=generator, device=device) / 8).to(dtype).unbind()
        return Arguments((q, k, *weights, *tables), kwargs)

    def bytes_moved(self, dtype: torch.dtype, direction: Direction) -> int:
        """Forward each stream is read and written once, backward two are read for each written; tables and weights."""
        elements = self.batch * self.seqlen * (self.heads + self.kv_heads) * self.head_dim
        forward = super().bytes_moved(dtype, direction) + 2 * self.head_dim * dtype.itemsize
        return forward if direction == "forward" else forward + (elements + 2 * self.head_dim) * dtype.itemsize

    def flops(self, direction: Direction) -> int:
        """Those of the rotation, and of the norm for each element four forward and nine backward, as RMSNorm counts."""
        elements = self.batch * self.seqlen * (self.heads + self.kv_heads) * self.head_dim
        return super().flops(direction) + {"forward": 4, "backward": 9}[direction] * elements


def _workloads() -> tuple[QkNormRopeWorkload, ...]:
    workload = QkNormRopeWorkload
    sequence = [workload("sequence length", s, 1, s, 32, 128, 8) for s in (512, 2048, 8192, 32768)]
    heads = [workload("head count", h, 2, 8192, h, 128, 8) for h in (16, 64)]
    decode = [workload("decode batch", b, b, 1, 32, 128, 8) for b in (1, 32, 256)]
    interleaved = [workload("interleaved", 8192, 1, 8192, 32, 128, 8, interleaved=True)]
    return (*sequence, *heads, *decode, *interleaved)


FAMILY = Family(
    name=OPERATION,
    summary="RMSNorm of each head of q and k, then rotary embedding, forward and backward",
    functions=(OPERATION,),
    operators=(OPERATION,),
    dtypes=DTYPES,
    layouts=tuple(LAYOUTS),
    cases=_grid(),
    invalid_cases=_invalid(),
    workloads=_workloads(),
)
