"""What the conformance tests share: where they run, dtypes with the values at their edges, and exact comparison.

The tests say what a device does with Triton's language. They run unchanged on CPU tensors through the compiled CPU
target, in Triton's own interpreter (``TRITON_INTERPRET=1``) and on a GPU.
"""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version

DEVICE = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
ON_GPU = DEVICE != "cpu"


@dataclass(frozen=True)
class Dtype:
    """One element type, under its name in Triton."""

    name: str
    torch: torch.dtype
    triton: tl.dtype
    bits: int
    kind: str  # "bool", "int", "uint" or "float"
    mantissa: int = 0  # bits after the binary point of a float
    min_exponent: int = 0  # of the smallest normal float: 2 ** min_exponent

    def __str__(self) -> str:
        return self.name

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_signed(self) -> bool:
        return self.kind in ("int", "float")

    @property
    def min(self) -> int | float:
        """The smallest finite value."""
        if self.is_float:
            return torch.finfo(self.torch).min
        return 0 if self.kind != "int" else -(2 ** (self.bits - 1))

    @property
    def max(self) -> int | float:
        """The largest finite value."""
        if self.is_float:
            return torch.finfo(self.torch).max
        return 2 ** (self.bits - (self.kind == "int")) - 1


BOOL = Dtype("bool", torch.bool, tl.int1, 1, "bool")
SIGNED = tuple(Dtype(f"int{n}", getattr(torch, f"int{n}"), getattr(tl, f"int{n}"), n, "int") for n in (8, 16, 32, 64))
UNSIGNED = tuple(
    Dtype(f"uint{n}", getattr(torch, f"uint{n}"), getattr(tl, f"uint{n}"), n, "uint") for n in (8, 16, 32, 64)
)
INTEGERS = SIGNED + UNSIGNED
FLOATS = (
    Dtype("float16", torch.float16, tl.float16, 16, "float", 10, -14),
    Dtype("bfloat16", torch.bfloat16, tl.bfloat16, 16, "float", 7, -126),
    Dtype("float32", torch.float32, tl.float32, 32, "float", 23, -126),
    Dtype("float64", torch.float64, tl.float64, 64, "float", 52, -1022),
)
FLOAT8 = (
    Dtype("float8e4nv", torch.float8_e4m3fn, tl.float8e4nv, 8, "float", 3, -6),
    Dtype("float8e5", torch.float8_e5m2, tl.float8e5, 8, "float", 2, -14),
)
DTYPES = {d.name: d for d in (BOOL, *INTEGERS, *FLOATS, *FLOAT8)}
BY_TORCH = {d.torch: d for d in DTYPES.values()}
BY_TRITON = {d.triton: d for d in DTYPES.values()}

_BITS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}  # signed, because torch indexes those fully


def interpreted() -> bool:
    """Triton's own interpreter runs the kernels."""
    return triton.knobs.runtime.interpret if hasattr(triton, "knobs") else os.environ.get("TRITON_INTERPRET") == "1"


def interpreter_gap(reason: str) -> pytest.MarkDecorator:
    """Mark a test or a ``pytest.param`` that Triton's own interpreter gets wrong or does not know."""
    return pytest.mark.skipif(interpreted(), reason=f"Triton's interpreter: {reason}")


def skip_if_interpreted(reason: str) -> None:
    """The same inside a test."""
    if interpreted():
        pytest.skip(f"Triton's interpreter: {reason}")


def gpu_differs(reason: str) -> pytest.MarkDecorator:
    """Mark a case whose expectation holds on the CPU target and not on a GPU, and say why."""
    return pytest.mark.skipif(ON_GPU, reason=f"GPU: {reason}")


def since(version: str) -> bool:
    """Whether the installed Triton is as new as that."""
    return Version(triton.__version__).release >= Version(version).release


def needs(feature: str) -> pytest.MarkDecorator:
    """Skip where the installed Triton is older than a version ("3.7") or lacks a name ("tl.topk")."""
    if feature[0].isdigit():
        missing = not since(feature)
    else:
        parts = feature.split(".")
        found = {"tl": tl, "triton": triton}[parts[0]]
        for part in parts[1:]:
            found = getattr(found, part, None)
        missing = found is None
    return pytest.mark.skipif(missing, reason=f"Triton {triton.__version__} has no {feature}")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns as signed integers."""
    return tensor if tensor.dtype == torch.bool else tensor.view(_BITS[8 * tensor.element_size()])


def from_bits(patterns: torch.Tensor | np.ndarray | list[int], dtype: Dtype) -> torch.Tensor:
    """The values with these bit patterns (integers of any sign and size; the low bits count), on the CPU."""
    if isinstance(patterns, list):
        patterns = np.array([p % 2**64 for p in patterns], dtype=np.uint64)
    patterns = np.asarray(patterns)
    unsigned = patterns.astype(np.dtype(f"u{max(dtype.bits, 8) // 8}"), casting="unsafe")
    return torch.from_numpy(unsigned).view(dtype.torch) if dtype.kind != "bool" else torch.from_numpy(patterns != 0)


def all_values(dtype: Dtype, device: str = DEVICE) -> torch.Tensor:
    """Every value of a dtype of at most 16 bits."""
    return from_bits(np.arange(2**dtype.bits), dtype).to(device)


def edge_values(dtype: Dtype, device: str = DEVICE) -> torch.Tensor:
    """The values where arithmetic goes wrong first."""
    if dtype.kind == "bool":
        values = torch.tensor([False, True])
    elif dtype.is_float:
        values = _edge_floats(dtype)
    else:
        powers = [2**k + near for k in range(dtype.bits) for near in (-1, 0, 1)]
        wanted = {0, 3, 5, 7, 10, 100, *powers, *(-p for p in powers), dtype.min, dtype.max, dtype.max - 1}
        values = from_bits([v for v in sorted(wanted) if dtype.min <= v <= dtype.max], dtype)
    return values.to(device)


def _edge_floats(dtype: Dtype) -> torch.Tensor:
    sign, one = 1 << (dtype.bits - 1), int(bits(torch.ones(1).to(dtype.torch)))
    largest = int(bits(torch.tensor([dtype.max], dtype=torch.float64).to(dtype.torch)))
    normal = 1 << dtype.mantissa  # the smallest normal; below it the denormals
    patterns = {0, 1, 2, 3, normal // 2, normal - 1, normal, normal + 1, one - 1, one, one + 1, largest - 1, largest}
    patterns |= {normal * k for k in range(1, largest // normal, max(1, largest // normal // 12))}  # powers of two
    numbers = [
        0.1,
        0.25,
        1 / 3,
        0.5,
        0.75,
        1.5,
        2,
        2.5,
        3,
        3.5,
        4.5,
        5.5,
        7,
        10,
        100.5,
        127,
        128,
        255,
        256,
        448,
        3.14159,
    ]
    exact = torch.tensor(numbers, dtype=torch.float64).to(dtype.torch)
    patterns |= {int(p) for p in bits(exact)}
    infinity_and_nan = {"float8e4nv": {0x7F}}.get(dtype.name, {largest + 1, largest + 1 + normal // 2})
    positive = sorted(patterns | infinity_and_nan)
    return from_bits(positive + [p | sign for p in positive], dtype)


def random(dtype: Dtype, shape: int | tuple[int, ...], seed: int = 0, device: str = DEVICE) -> torch.Tensor:
    """Standard normal floats; integers and booleans over their whole range."""
    if not dtype.is_float:
        return random_bits(dtype, shape, seed, device)
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return torch.as_tensor(drawn).to(dtype.torch).to(device)


def random_bits(dtype: Dtype, shape: int | tuple[int, ...], seed: int = 0, device: str = DEVICE) -> torch.Tensor:
    """Uniform bit patterns: floats of every magnitude, NaN and infinity among them."""
    rng = np.random.default_rng(seed)
    high = 1 if dtype.kind == "bool" else 2**64 - 1
    return from_bits(rng.integers(0, high, shape, dtype=np.uint64, endpoint=True), dtype).to(device)


def is_nan(tensor: torch.Tensor) -> torch.Tensor:
    """Also for float8 and integers."""
    if not tensor.dtype.is_floating_point:
        return torch.zeros_like(tensor, dtype=torch.bool)
    return tensor.float().isnan() if tensor.element_size() == 1 else tensor.isnan()


def assert_equal(actual: torch.Tensor, expected: torch.Tensor | np.ndarray, *inputs: torch.Tensor) -> None:
    """The same dtype, shape and bits, where any NaN equals any NaN and the two zeros differ.

    ``inputs`` of the same shape are shown beside the elements that differ.
    """
    expected = torch.as_tensor(expected)
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    same = (bits(actual) == bits(expected)) | (is_nan(actual) & is_nan(expected))
    _report(~same, actual, expected, inputs, "")


def ulp(expected: np.ndarray, dtype: Dtype) -> np.ndarray:
    """The distance between neighbouring floats of ``dtype`` at ``expected``."""
    _, exponent = np.frexp(np.where(np.isfinite(expected), expected, 1))
    return np.ldexp(np.ones_like(expected), np.maximum(exponent - 1, dtype.min_exponent) - dtype.mantissa)


def assert_close_ulps(
    actual: torch.Tensor,
    expected: torch.Tensor | np.ndarray,
    dtype: Dtype,
    ulps: float | np.ndarray,
    *inputs: torch.Tensor,
    absolute: float | np.ndarray = 0.0,
) -> None:
    """Within ``ulps`` units in the last place of ``dtype`` at ``expected`` (float64 or longer), plus ``absolute``.

    NaN must be NaN and an expected infinity that infinity; a finite value past the range may also come as the infinity.
    """
    expected = expected.cpu().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    assert actual.dtype == dtype.torch, f"dtype {actual.dtype}, expected {dtype.torch}"
    assert tuple(actual.shape) == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    actual = actual.detach().cpu().contiguous()
    wide = np.longdouble if expected.dtype == np.longdouble else np.float64
    got, want = actual.double().numpy().astype(wide), expected.astype(wide)
    unit = ulp(np.clip(want, dtype.min, dtype.max), dtype).astype(wide)
    with np.errstate(over="ignore"):  # float64 in itself
        past = wide(dtype.max) + ulp(np.array([dtype.max], dtype=wide), dtype)[0]  # where the next float would be
    near = np.abs(np.where(np.isinf(got), np.copysign(past, got), got) - np.clip(np.nan_to_num(want), -past, past))
    exact_case = np.isnan(want) | np.isinf(want)
    same = (np.isnan(got) & np.isnan(want)) | (got == want)
    fine = np.where(exact_case, same, ~np.isnan(got) & (near <= ulps * unit + absolute))
    worst = float(np.max(np.where(exact_case | np.isnan(near), 0, near / unit), initial=0))
    with np.errstate(over="ignore"):  # a longer float past the range
        shown = torch.as_tensor(want.astype(np.float64))
    _report(torch.from_numpy(~np.atleast_1d(fine)), actual, shown, inputs, f"; worst {worst:.3g} ulps")


def _report(
    wrong: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...], note: str
) -> None:
    """Fail with the first elements that differ."""
    if not wrong.any():
        return
    where = wrong.reshape(-1).nonzero()[:8, 0].tolist()
    given = [i.detach().cpu().expand(actual.shape).reshape(-1) for i in inputs]
    lines = [
        f"  [{k}] got {_show(actual.reshape(-1)[k])}, expected {_show(expected.reshape(-1)[k])}"
        + (f", from {', '.join(_show(g[k]) for g in given)}" if given else "")
        for k in where
    ]
    pytest.fail(f"{int(wrong.sum())} of {wrong.numel()} differ{note}\n" + "\n".join(lines), pytrace=True)


def _show(value: torch.Tensor) -> str:
    if not value.dtype.is_floating_point:
        return str(value.item())
    pattern = int(bits(value.reshape(1))) % (1 << 8 * value.element_size())
    return f"{value.double().item()!r} (0x{pattern:0{2 * value.element_size()}x})"
