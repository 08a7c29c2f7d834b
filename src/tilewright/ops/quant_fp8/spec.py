"""The contract of FP8 quantisation as data: test grid, invalid calls, workloads, bytes and flops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.contract import Arguments, Family, InvalidCase
from tilewright.ops.quant_fp8.call import EMITS, INPUT_DTYPES
from tilewright.ops.quant_fp8.cases import ADD, DEQUANT, FUNCTIONS, NORM, QUANT, ROPE, SILU, QuantCase
from tilewright.ops.quant_fp8.format import POLICIES, SCALE_LAYOUTS, QuantFormat, QuantPolicy
from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rope.table import rope_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tilewright.ops.contract import Direction

    _Build = Callable[[torch.device], Arguments]

_MAIN = (torch.bfloat16, torch.float32)
_SHORT = {QUANT: "quant", NORM: "norm", ADD: "add", SILU: "silu", ROPE: "rope"}
_HEADS = 64
"""Of a token, in a workload of a rotation: as DeepSeek-V3.2's indexer has, which rotates half of each."""
_DEFAULT = QuantFormat()
_PACKED = QuantFormat(scale_format="ue8m0_packed", scale_layout="tma_aligned")
_MX = QuantFormat(group_size=32, scale_format="ue8m0")
_UNROUNDED = QuantPolicy(round_input=False)
_ENOUGH: Mapping[str, Any] = {"lead": (9,), "n_cols": 1300}
"""Where last bits differ, a code at a tie may: of so many elements a few."""


def _formats_grid() -> list[QuantCase]:
    """Groups, formats, layouts, dtypes, policies."""
    cases = [
        QuantCase(f"{size or 'token'}-{kind}-{layout}", format=QuantFormat(size, kind, layout), lead=(5,))
        for size in (128, 64, 32, None)
        for kind in ("fp32", "ue8m0", "ue8m0_fp32", "ue8m0_packed")
        for layout in SCALE_LAYOUTS
        if kind != "ue8m0_packed" or layout == "tma_aligned"
    ]
    cases += [
        QuantCase(f"policy-{name}-{kind}-{size or 'token'}", format=QuantFormat(size, kind, policy=name), values=values)
        for name in POLICIES
        for kind, size, values in (("fp32", 128, "wide"), ("ue8m0", 128, "zeros"), ("fp32", None, "tiny"))
    ]
    own = {
        "reciprocal": QuantPolicy(apply="reciprocal"),
        "maximum-100": QuantPolicy(maximum=100.0),
        "floors": QuantPolicy(amax_floor=0.5, scale_floor=0.002, ue8m0_floor=0.003),
    }
    cases += [
        QuantCase(f"own-{name}-{kind}", format=QuantFormat(64, kind, policy=policy), lead=(2, 3), dtypes=_MAIN)
        for name, policy in own.items()
        for kind in ("fp32", "ue8m0_fp32")
    ]
    e5m2 = [
        QuantFormat(size, kind, dtype=torch.float8_e5m2)
        for size, kind in ((128, "fp32"), (None, "fp32"), (32, "ue8m0"))
    ]
    cases += [QuantCase(f"e5m2-{f.scale_format}-{f.group_size}", format=f, values="wide", dtypes=_MAIN) for f in e5m2]
    return cases


def _shapes_grid() -> list[QuantCase]:
    """Shapes, strides, values, of every source."""
    every = INPUT_DTYPES
    cases = [
        QuantCase(f"cols-{n}-{name}", lead=(2,) if n > 9999 else (3,), n_cols=n, format=f)
        for n in (1, 7, 31, 128, 130, 1536, 4096 + 64, 7168, 20000)
        for name, f in (("group", QuantFormat()), ("token", QuantFormat(None)), ("packed", _PACKED))
    ]
    for function in (NORM, ADD, SILU):
        cases += [QuantCase(f"{function}-cols-{n}", function, n_cols=n) for n in (1, 7, 130, 1536, 4096 + 64, 7168)]
        cases.append(QuantCase(f"{function}-cols-20000", function, lead=(2,), n_cols=20000, format=QuantFormat(None)))
    for function in (QUANT, NORM, ADD, SILU):
        leads = ((), (0,), (1,), (70,), (3, 5), (2, 0, 3), (2, 3, 4))
        cases += [
            QuantCase(f"{function}-lead-{'x'.join(map(str, lead))}-{name}", function, lead=lead, n_cols=160, format=f)
            for lead in leads
            for name, f in (("column", QuantFormat(scale_layout="column")), ("packed", _PACKED))
        ]
        strided = {"sliced": (5,), "heads": (2, 3, 4), "permuted": (2, 3, 4), "expanded": (3, 2), "spread": (5,)}
        emit = function != QUANT
        cases += [
            QuantCase(f"{function}-{strides}", function, lead=lead, n_cols=144, strides=strides, emit=emit)
            for strides, lead in strided.items()
        ]
        cases += [
            QuantCase(f"{function}-{values}-{name}", function, values=values, format=f, dtypes=every)
            for values in ("zeros", "tiny", "huge", "wide", "inf", "nan")
            for name, f in (("fp32", QuantFormat()), ("ue8m0", QuantFormat(None, "ue8m0")))
        ]
    return cases


def _fusions_grid() -> list[QuantCase]:
    """Static scales, several formats, the norm's options."""
    cases = [
        QuantCase(f"{function}-static-{name}", function, static=True, format=f, emit=emit, dtypes=INPUT_DTYPES)
        for function in (QUANT, NORM, ADD, SILU)
        for name, f, emit in (
            ("exact", QuantFormat(), False),
            ("reciprocal", QuantFormat(policy="vllm_native_per_token", dtype=torch.float8_e5m2), function != QUANT),
        )
    ]
    two, three = (_MX,), (_PACKED, QuantFormat(None, scale_layout="column", dtype=torch.float8_e5m2))
    for function in (NORM, ADD, SILU):
        cases += [
            QuantCase(f"{function}-two", function, also=two, lead=(5,), dtypes=_MAIN),
            QuantCase(f"{function}-two-emit", function, also=two, lead=(5,), emit=True, dtypes=INPUT_DTYPES),
            QuantCase(f"{function}-three", function, also=three, lead=(2, 3), emit=True),
            QuantCase(f"{function}-three-tiles", function, also=three, lead=(9,), n_cols=4096 + 64),
        ]
        cases += [
            QuantCase(f"{function}-{name}", function, format=QuantFormat(policy=name), dtypes=_MAIN, **_ENOUGH)
            for name in POLICIES
        ]
        unrounded = (QuantFormat(32, "ue8m0", policy=_UNROUNDED), QuantFormat(None, policy=_UNROUNDED))
        cases += [
            QuantCase(
                f"{function}-unrounded-{f.group_size}", function, format=f, also=(_DEFAULT,), emit=emit, **_ENOUGH
            )
            for f, emit in zip(unrounded, (True, False), strict=True)
        ]
    cases.append(QuantCase("static-unrounded", NORM, static=True, format=QuantFormat(policy=_UNROUNDED), **_ENOUGH))
    for function in (NORM, ADD):
        cases += [
            QuantCase(f"{function}-weight-{weight}-{cast}", function, weight=weight, norm=(("cast", cast),), emit=True)
            for weight in ("input", "float32", "none")
            for cast in norm.CASTS
        ]
        gemma = (("eps", 1e-5), ("weight_offset", 1.0), ("cast", "after_weight"))
        cases.append(QuantCase(f"{function}-gemma", function, norm=gemma, dtypes=INPUT_DTYPES))
    cases += [
        QuantCase(
            f"residual-{residual}-{how}", ADD, residual=residual, norm=(("residual_rounding", how),), dtypes=_MAIN
        )
        for residual in ("input", "float32")
        for how in norm.ROUNDINGS
    ]
    return cases


def _rope_grid() -> list[QuantCase]:
    """Rotations: layouts, tables, positions, which features, and what the other sources have."""

    def case(name: str, lead: tuple[int, ...] = (2, 3, 4), n_cols: int = 64, **changes: Any) -> QuantCase:
        keywords = tuple(changes.pop("rope", {}).items())
        return QuantCase(f"rope-{name}", ROPE, lead=lead, n_cols=n_cols, rope=keywords, **changes)

    every = INPUT_DTYPES
    cases = [
        case(f"{layout}-{positions}", lead, rope={"layout": layout, "positions": positions}, dtypes=_MAIN)
        for layout, lead in (("bshd", (2, 3, 4)), ("sbhd", (3, 2, 4)), ("bhsd", (2, 4, 3)), ("thd", (5, 4)))
        for positions in ("counted", "shared", "batched")
        if layout != "thd" or positions != "batched"
    ]
    cases += [
        case(f"{table}-{'pairs' if interleaved else 'halves'}-{start}-of-{n}", n_cols=n, dtypes=_MAIN,
             rope={"table": table, "interleaved": interleaved, "rotary_dim": 32, "rotary_offset": start})
        for table in ("half", "full")
        for interleaved in (False, True)
        for start, n in ((0, 32), (0, 128), (5, 72), (6, 72), (96, 128))
    ]  # fmt: skip
    cases += [
        case(f"longest-{table}-pairs-{start}", (1, 2, 3), 512, format=QuantFormat(size), dtypes=every,
             rope={"table": table, "interleaved": True, "rotary_dim": 320, "rotary_offset": start})
        for table, start, size in (("half", 64, 128), ("half", 101, None), ("full", 90, 64), ("full", 0, None))
    ]  # fmt: skip
    cases += [case(f"hf-{table}", rope={"numerics": "hf", "table": table}, dtypes=every) for table in ("half", "full")]
    cases += [
        case("small", (1, 2, 1), 2, dtypes=every),
        case("longest", (1, 2, 3), 512, rope={"rotary_dim": 64, "rotary_offset": 448}, dtypes=every),
        case("token", format=QuantFormat(None), dtypes=every),
        case("packed", n_cols=320, format=_PACKED, emit=True),
        case("column", format=QuantFormat(32, scale_layout="column"), emit=True),
        case("mx", format=_MX),
        case("two", also=(_MX,), emit=True, dtypes=_MAIN),
        case("three", also=(_PACKED, QuantFormat(None, scale_layout="column", dtype=torch.float8_e5m2)), emit=True),
        case("static", static=True, emit=True, dtypes=every),
        case("unrounded", (2, 9, 12), 96, format=QuantFormat(32, policy=_UNROUNDED)),
        case("no-tokens", (2, 0, 4)),
        case("no-heads", (2, 3, 0)),
    ]
    cases += [
        case(strides, strides=strides, emit=True) for strides in ("sliced", "heads", "permuted", "expanded", "spread")
    ]
    cases += [case(values, values=values, dtypes=every) for values in ("zeros", "tiny", "wide", "inf", "nan")]
    return cases


def _dequant_grid() -> list[QuantCase]:
    every = INPUT_DTYPES
    formats = {
        "128": QuantFormat(), "64": QuantFormat(64), "token": QuantFormat(None), "mx": _MX, "packed": _PACKED,
        "packed-token": replace(_PACKED, group_size=None), "packed-32": replace(_PACKED, group_size=32),
        "column": QuantFormat(32, "ue8m0_fp32", "column"), "tma": QuantFormat(64, scale_layout="tma_aligned"),
        "e5m2": QuantFormat(dtype=torch.float8_e5m2), "e5m2-mx": replace(_MX, dtype=torch.float8_e5m2),
    }  # fmt: skip
    cases = [
        QuantCase(f"dequant-{name}", DEQUANT, lead=(5,), format=f, values="wide", dtypes=every)
        for name, f in formats.items()
    ]
    cases += [
        QuantCase(f"dequant-cols-{n}-{name}", DEQUANT, n_cols=n, format=f)
        for n in (1, 31, 130, 4096 + 64, 7168)
        for name, f in (("group", QuantFormat()), ("packed", _PACKED))
    ]
    cases += [
        QuantCase(f"dequant-lead-{'x'.join(map(str, lead))}", DEQUANT, lead=lead, format=_PACKED)
        for lead in ((), (0,), (1,), (70,), (2, 3, 4))
    ]
    cases += [
        QuantCase("dequant-one-scale", DEQUANT, static=True, dtypes=every),
        QuantCase("dequant-sliced", DEQUANT, strides="sliced"),
        *(QuantCase(f"dequant-{values}", DEQUANT, values=values, dtypes=every) for values in ("zeros", "tiny", "nan")),
    ]
    return cases


def _grid() -> tuple[QuantCase, ...]:
    rows = [function for function in FUNCTIONS if function != ROPE]
    first = [QuantCase(f"{function}-small", function, n_cols=40, dtypes=INPUT_DTYPES) for function in rows]
    return (*first, *_formats_grid(), *_shapes_grid(), *_fusions_grid(), *_rope_grid(), *_dequant_grid())


def _invalid() -> tuple[InvalidCase, ...]:
    names = {
        QUANT: ("x",),
        NORM: ("x", "weight"),
        ADD: ("x", "residual", "weight"),
        SILU: ("x",),
        ROPE: ("x", "cos", "sin"),
    }

    def call(function: str = QUANT, **changes: Any) -> _Build:
        """A valid call with the arguments in ``changes`` put in; functions among them get the device."""

        def build(device: torch.device) -> Arguments:
            shape: dict[str, Any] = {"lead": (1, 3, 2), "n_cols": 64} if function == ROPE else {}
            args, kwargs = QuantCase("", function, **shape).arguments(device, torch.float32)
            given = {name: value(device) if callable(value) else value for name, value in changes.items()}
            order = names.get(function, ("values", "scales"))
            args = tuple(given.pop(name, value) for name, value in zip(order, args, strict=True))
            return Arguments(args, kwargs | given)

        return build

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.ones(shape, device=device).to(dtype)

    def sparse(*shape: int) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.ones(shape, device=device).to_sparse()

    def recorded(*shape: int) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.ones(shape, device=device, requires_grad=True)

    def away(device: torch.device) -> torch.Tensor:
        return torch.ones(1, device="meta")

    def policy(**fields: Any) -> QuantPolicy:
        return QuantPolicy(**fields)

    fp8 = torch.float8_e4m3fn
    wrong: Mapping[str, tuple[tuple[str, type[ArgumentError], str, Mapping[str, Any]], ...]] = {
        QUANT: (
            ("no-x", DTypeError, "x", {"x": None}),
            ("list-x", DTypeError, "x", {"x": [1.0]}),
            ("integer-x", DTypeError, "x", {"x": tensor(3, 8, dtype=torch.int32)}),
            ("double-x", DTypeError, "x", {"x": tensor(3, 8, dtype=torch.float64)}),
            ("fp8-x", DTypeError, "x", {"x": tensor(3, 8, dtype=fp8)}),
            ("scalar-x", ArgumentError, "x", {"x": tensor()}),
            ("no-columns", ArgumentError, "x", {"x": tensor(3, 0)}),
            ("long-row", ArgumentError, "x", {"x": tensor(1, norm.MAX_COLS + 1)}),
            ("sparse-x", ArgumentError, "x", {"x": sparse(3, 8)}),
            ("gradient-x", ArgumentError, "x", {"x": recorded(3, 8)}),
            ("group_size", ArgumentError, "group_size", {"group_size": 100}),
            ("group_size-float", DTypeError, "group_size", {"group_size": 128.0}),
            ("group_size-bool", DTypeError, "group_size", {"group_size": True}),
            ("group_size-list", DTypeError, "group_size", {"group_size": [128]}),
            ("scale_format", ArgumentError, "scale_format", {"scale_format": "fp16"}),
            ("scale_format-list", ArgumentError, "scale_format", {"scale_format": ["fp32"]}),
            ("scale_layout", ArgumentError, "scale_layout", {"scale_layout": "diagonal"}),
            ("packed-row", ArgumentError, "scale_layout", {"scale_format": "ue8m0_packed"}),
            ("dtype", DTypeError, "dtype", {"dtype": torch.int8}),
            ("dtype-string", DTypeError, "dtype", {"dtype": "e4m3fn"}),
            ("policy", ArgumentError, "policy", {"policy": "sloppy"}),
            ("policy-type", DTypeError, "policy", {"policy": {"apply": "divide"}}),
            ("policy-apply", ArgumentError, "policy", {"policy": policy(apply="multiply")}),
            ("policy-round_input", ArgumentError, "policy", {"policy": policy(round_input=1)}),
            ("policy-negative", ArgumentError, "policy", {"policy": policy(amax_floor=-1.0)}),
            ("policy-nan", ArgumentError, "policy", {"policy": policy(ue8m0_floor=float("nan"))}),
            ("policy-list", ArgumentError, "policy", {"policy": policy(maximum=[448.0])}),
            ("policy-no-floor", ArgumentError, "policy", {"policy": policy(scale_floor=0.0)}),
            ("policy-large", ArgumentError, "policy", {"policy": policy(maximum=449.0)}),
            ("policy-small", ArgumentError, "policy", {"policy": policy(maximum=1.0)}),
            ("scale-float", DTypeError, "scale", {"scale": 1.0}),
            ("scale-dtype", DTypeError, "scale", {"scale": tensor(1, dtype=torch.bfloat16)}),
            ("scale-shape", ArgumentError, "scale", {"scale": tensor(2)}),
            ("scale-elsewhere", ArgumentError, "scale", {"scale": away}),
            ("scale-sparse", ArgumentError, "scale", {"scale": sparse(1)}),
            ("scale-gradient", ArgumentError, "scale", {"scale": recorded(1)}),
            ("scale-and-group_size", ArgumentError, "group_size", {"scale": tensor(1), "group_size": 64}),
            ("scale-and-format", ArgumentError, "scale_format", {"scale": tensor(1), "scale_format": "ue8m0"}),
            ("scale-and-layout", ArgumentError, "scale_layout", {"scale": tensor(1), "scale_layout": "column"}),
        ),
        NORM: (
            ("no-x", DTypeError, "x", {"x": None}),
            ("weight-shape", ArgumentError, "weight", {"weight": tensor(299)}),
            ("weight-dtype", DTypeError, "weight", {"weight": tensor(300, dtype=torch.int32)}),
            ("weight-list", DTypeError, "weight", {"weight": [1.0]}),
            ("weight-gradient", ArgumentError, "weight", {"weight": recorded(300)}),
            ("eps", ArgumentError, "eps", {"eps": 0.0}),
            ("eps-string", DTypeError, "eps", {"eps": "small"}),
            ("weight_offset", ArgumentError, "weight_offset", {"weight_offset": 1.0, "weight": None}),
            ("cast", ArgumentError, "cast", {"cast": "never"}),
            ("return_norm", DTypeError, "return_norm", {"return_norm": 1}),
            ("also-format", DTypeError, "also", {"also": QuantFormat()}),
            ("also-string", DTypeError, "also", {"also": ("ue8m0",)}),
            ("also-wrong", ArgumentError, "also", {"also": (QuantFormat(100),)}),
            ("also-many", ArgumentError, "also", {"also": (QuantFormat(),) * 3}),
            ("also-static", ArgumentError, "also", {"also": (QuantFormat(),), "scale": tensor(1)}),
        ),
        ADD: (
            ("no-residual", DTypeError, "residual", {"residual": None}),
            ("residual-shape", ArgumentError, "residual", {"residual": tensor(300)}),
            ("residual-dtype", DTypeError, "residual", {"residual": tensor(3, 300, dtype=torch.bfloat16)}),
            ("residual-gradient", ArgumentError, "residual", {"residual": recorded(3, 300)}),
            ("residual_rounding", ArgumentError, "residual_rounding", {"residual_rounding": "up"}),
        ),
        SILU: (
            ("odd", ArgumentError, "x", {"x": tensor(3, 7)}),
            ("return_activation", DTypeError, "return_activation", {"return_activation": None}),
        ),
        ROPE: (
            ("rank", ArgumentError, "x", {"x": tensor(3, 64)}),
            ("odd", ArgumentError, "x", {"x": tensor(1, 3, 2, 63)}),
            ("double-x", DTypeError, "x", {"x": tensor(1, 3, 2, 64, dtype=torch.float64)}),
            ("no-cos", DTypeError, "cos", {"cos": None}),
            ("narrow", ArgumentError, "cos", {"cos": tensor(6, 20), "sin": tensor(6, 20), "rotary_dim": 64}),
            ("short", ArgumentError, "cos", {"cos": tensor(2, 32), "sin": tensor(2, 32)}),
            ("sin-shape", ArgumentError, "sin", {"sin": tensor(6, 31)}),
            ("cos-gradient", ArgumentError, "cos", {"cos": recorded(6, 32)}),
            ("layout", ArgumentError, "layout", {"layout": "hsbd"}),
            ("numerics", ArgumentError, "numerics", {"numerics": "fast"}),
            ("interleaved", DTypeError, "interleaved", {"interleaved": 1}),
            ("rotary_offset", ArgumentError, "rotary_offset", {"rotary_offset": 2}),
            ("position_ids", DTypeError, "position_ids", {"position_ids": tensor(3)}),
            ("positions", ArgumentError, "position_ids", {"position_ids": tensor(5, dtype=torch.int64)}),
            ("return_rotated", DTypeError, "return_rotated", {"return_rotated": None}),
        ),
        DEQUANT: (
            ("no-values", DTypeError, "values", {"values": None}),
            ("values-dtype", DTypeError, "values", {"values": tensor(3, 300)}),
            ("values-scalar", ArgumentError, "values", {"values": tensor(dtype=fp8)}),
            ("no-scales", DTypeError, "scales", {"scales": None}),
            ("scales-dtype", DTypeError, "scales", {"scales": tensor(3, 3, dtype=torch.float16)}),
            ("scales-shape", ArgumentError, "scales", {"scales": tensor(3, 4)}),
            ("scales-packed", ArgumentError, "scales", {"scales": tensor(3, 3, dtype=torch.int32)}),
            ("scales-elsewhere", ArgumentError, "scales", {"scales": away}),
            ("scales-sparse", ArgumentError, "scales", {"scales": sparse(3, 3)}),
            ("scales-gradient", ArgumentError, "scales", {"scales": recorded(3, 3)}),
            ("group_size", ArgumentError, "group_size", {"group_size": 16}),
            ("group_size-float", DTypeError, "group_size", {"group_size": 128.0}),
            ("dtype", DTypeError, "dtype", {"dtype": torch.float64}),
        ),
    }
    return tuple(
        InvalidCase(f"{function}-{name}", function, call(function, **changes), error, argument)
        for function, cases in wrong.items()
        for name, error, argument, changes in cases
    )


@dataclass(frozen=True)
class QuantWorkload:
    """One shape of the benchmark.

    Attributes:
        n_rows: how many rows; of a rotation as many tokens as they are in heads.
        n_cols: the length of a row of values; rows of ``x`` are twice as long for the gated SiLU.
        formats: one for each quantisation.
        static: a scale is given.
        emit: what is quantised is returned too.
    """

    sweep: str
    value: int
    function: str
    n_rows: int
    n_cols: int
    formats: tuple[QuantFormat, ...] = (_DEFAULT,)
    static: bool = False
    emit: bool = False

    @property
    def name(self) -> str:
        """Such as ``"norm m8192 n7168 1x128"``."""
        return f"{_SHORT[self.function]} m{self.n_rows} n{self.n_cols} {self._shown}"

    @property
    def _shown(self) -> str:
        if self.static:
            return "static"
        shown = []
        for f in self.formats:
            kind = "" if f.scale_format == "fp32" else f" {f.scale_format}"
            shown.append(("token" if f.group_size is None else f"1x{f.group_size}") + kind)
        return " + ".join([*shown, *((EMITS[self.function].removeprefix("return_"),) if self.emit else ())])

    @property
    def parameters(self) -> Mapping[str, int | str | bool]:
        """The shape and the formats."""
        return {"n_rows": self.n_rows, "n_cols": self.n_cols, "formats": self._shown, "emit": self.emit}

    @property
    def _tokens(self) -> int:
        return self.n_rows // _HEADS

    def arguments(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random data, generated on the device."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        args = [random(self.n_rows, self.n_cols * (2 if self.function == SILU else 1))]
        if self.function == ROPE:
            args = [args[0].view(1, self._tokens, _HEADS, self.n_cols)]
            args += rope_table(self.n_cols // 2, self._tokens, device=device)
        if self.function == ADD:
            args.append(random(self.n_rows, self.n_cols))
        if self.function in (NORM, ADD):
            args.append(random(self.n_cols))
        first, *also = self.formats
        names = ("group_size", "scale_format", "scale_layout")
        kwargs: dict[str, Any] = {} if self.static else {name: getattr(first, name) for name in names}
        if self.static:
            kwargs["scale"] = torch.full((1,), 1.0 / 64, device=device)
        if also:
            kwargs["also"] = tuple(also)
        if self.emit:
            kwargs[EMITS[self.function]] = True
        return Arguments(tuple(args), kwargs)

    def bytes_moved(self, dtype: torch.dtype, direction: Direction) -> int:
        """Each input read once, each output written once: values of a byte, scales, and what else is returned."""
        elements = self.n_rows * self.n_cols
        moved = elements * dtype.itemsize * (2 if self.function == SILU else 1)
        if self.function == ADD:
            moved += 2 * elements * dtype.itemsize  # the residual read, the sum written
        if self.function in (NORM, ADD):
            moved += self.n_cols * dtype.itemsize
        if self.function == ROPE:
            moved += self._tokens * self.n_cols // 2 * torch.float32.itemsize
        if self.emit:
            moved += elements * dtype.itemsize
        for f in self.formats:
            groups = f.groups(self.n_cols)
            words = -(-groups // 4) if f.is_packed else groups
            size = 1 if f.scale_format == "ue8m0" else torch.float32.itemsize
            moved += elements + (torch.float32.itemsize if self.static else self.n_rows * words * size)
        return moved

    def flops(self, direction: Direction) -> int:
        """For each element five for each format (magnitude, maximum, quotient, two bounds).

        The norm takes four more (square, sum, two products), the residual one, the gated SiLU five, the rotation three
        for each element that is rotated (two products, a sum).
        """
        rotated = self.n_rows * self.n_cols // 2 if self.function == ROPE else 0
        extra = {QUANT: 0, NORM: 4, ADD: 5, SILU: 5, ROPE: 0}
        return self.n_rows * self.n_cols * (5 * len(self.formats) + extra[self.function]) + 3 * rotated


def _workloads() -> tuple[QuantWorkload, ...]:
    two = (QuantFormat(), _MX)
    token = QuantFormat(None)
    shapes = ((8192, 1536), (8192, 4096), (16384, 16384))
    return (
        *(QuantWorkload("rows", m, NORM, m, 7168) for m in (64, 1024, 8192, 32768)),
        *(QuantWorkload("row length", n, NORM, m, n) for m, n in shapes),
        *(QuantWorkload("residual", m, ADD, m, 7168) for m in (64, 8192, 32768)),
        QuantWorkload("two formats", 8192, NORM, 8192, 7168, two, emit=True),
        *(QuantWorkload("quant alone", m, QUANT, m, 7168) for m in (8192, 32768)),
        *(QuantWorkload("quant alone", 8192, QUANT, 8192, 7168, (f,)) for f in (token, _PACKED)),
        *(QuantWorkload("silu", n, SILU, 8192, n) for n in (4096, 18432 // 2)),
        QuantWorkload("static", 8192, NORM, 8192, 7168, static=True),
        *(QuantWorkload("rope", tokens, ROPE, _HEADS * tokens, 128) for tokens in (64, 1024, 8192)),
    )


FAMILY = Family(
    name="quant_fp8",
    summary="quantisation to FP8, alone or fused with RMSNorm, gated SiLU or rope",
    functions=FUNCTIONS,
    operators=FUNCTIONS,
    dtypes=INPUT_DTYPES,
    layouts=SCALE_LAYOUTS,
    cases=_grid(),
    invalid_cases=_invalid(),
    workloads=_workloads(),
)
