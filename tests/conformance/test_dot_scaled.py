"""Products of tiles in microscaling formats: 4- and 8-bit floats with a power of two for each 32 elements along K.

The elements are those of the smallest format, so that every other one holds them too, and every sum is exact.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from conformance.harness import DEVICE, DTYPES, assert_equal, gpu_differs, interpreter_gap, random

pytestmark = interpreter_gap("does not know the operation")

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # by code; bit 3 is the sign
FORMATS = {
    "e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16,
    "fp16": torch.float16,
}  # fmt: skip
GROUP = 32
M, N, K = 16, 32, 128


@triton.jit
def scaled_product(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, A_SHAPE: tl.constexpr, B_SHAPE: tl.constexpr,
    A_ALONG_K: tl.constexpr, B_ALONG_K: tl.constexpr, A_SCALED: tl.constexpr, B_SCALED: tl.constexpr,
):  # fmt: skip
    a = tl.load(a_ptr + tl.arange(0, A_SHAPE[0])[:, None] * A_SHAPE[1] + tl.arange(0, A_SHAPE[1])[None, :])
    b = tl.load(b_ptr + tl.arange(0, B_SHAPE[0])[:, None] * B_SHAPE[1] + tl.arange(0, B_SHAPE[1])[None, :])
    group = tl.arange(0, K // 32)[None, :]
    a_scale = tl.load(a_scale_ptr + tl.arange(0, M)[:, None] * (K // 32) + group) if A_SCALED else None
    b_scale = tl.load(b_scale_ptr + tl.arange(0, N)[:, None] * (K // 32) + group) if B_SCALED else None
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.load(c_ptr + at)
    product = tl.dot_scaled(
        a, a_scale, A_FORMAT, b, b_scale, B_FORMAT, acc=acc, lhs_k_pack=A_ALONG_K, rhs_k_pack=B_ALONG_K
    )
    tl.store(out_ptr + at, product)


def codes(shape, seed):
    return np.random.default_rng(seed).integers(0, 16, shape, dtype=np.uint8)


def values(code):
    return np.where(code & 8, -1.0, 1.0) * E2M1[code & 7]


def stored(code, kind, axis):
    """The elements in a format; 4-bit ones lie in pairs along an axis, the first in the low bits."""
    if kind == "e2m1":
        even, odd = (np.take(code, range(first, code.shape[axis], 2), axis) for first in (0, 1))
        return torch.from_numpy(even | odd << 4).to(DEVICE)
    exact = torch.from_numpy(values(code)).to(FORMATS[kind])
    return (exact.view(torch.uint8) if exact.itemsize == 1 else exact).to(DEVICE)


def exponents(rows, seed, low=124, high=130):
    """Scales as they are stored: 127 means one."""
    drawn = np.random.default_rng(seed).integers(low, high, (rows, K // GROUP), dtype=np.uint8)
    return torch.from_numpy(drawn).to(DEVICE)


def powers(scale):
    """A scale for each element along K, in float64."""
    return np.repeat(np.exp2(scale.cpu().numpy().astype(np.float64) - 127), GROUP, axis=1)


def run(a, b, kinds, scales, packed=(True, True)):
    """The product and what is expected of it, from codes ``a [M, K]`` and ``b [K, N]``."""
    operands = stored(a, kinds[0], 1 if packed[0] else 0), stored(b, kinds[1], 0 if packed[1] else 1)
    c = random(DTYPES["int8"], (M, N), 9).float()
    out = torch.empty_like(c)
    scaled_product[(1,)](
        operands[0], scales[0], operands[1], scales[1], c, out, M, N, K, *kinds, *(tuple(o.shape) for o in operands),
        *packed, *(scale is not None for scale in scales),
    )  # fmt: skip
    left = values(a) * (1 if scales[0] is None else powers(scales[0]))
    right = values(b) * (1 if scales[1] is None else powers(scales[1]).T)
    return out, torch.from_numpy((left @ right + c.cpu().numpy()).astype(np.float32))


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_formats(first, second):
    """The elements are multiplied by their groups' scales; what is added to comes first."""
    scales = [exponents(rows, 3) if kind.startswith("e") else None for kind, rows in ((first, M), (second, N))]
    assert_equal(*run(codes((M, K), 1), codes((K, N), 2), (first, second), scales))


@pytest.mark.parametrize("scaled", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", ["e2m1", "e4m3"])
def test_an_operand_without_scales(kind, scaled):
    scales = [exponents(rows, 3) if wanted else None for rows, wanted in zip((M, N), scaled, strict=True)]
    assert_equal(*run(codes((M, K), 1), codes((K, N), 2), (kind, kind), scales))


@pytest.mark.parametrize("packed", [(True, False), (False, True), (False, False)])
def test_pairs_along_the_other_axis(packed):
    scales = [exponents(M, 3), exponents(N, 4)]
    assert_equal(*run(codes((M, K), 1), codes((K, N), 2), ("e2m1", "e2m1"), scales, packed))


def test_every_code_of_four_bits():
    """Each row of the left operand holds one code, once; the right one is one everywhere."""
    a = np.zeros((M, K), dtype=np.uint8)
    a[np.arange(16), np.arange(16) * 7] = np.arange(16)
    b = np.full((K, N), 2, dtype=np.uint8)
    out, expected = run(a, b, ("e2m1", "e2m1"), [None, None])
    assert_equal(out, expected)


@gpu_differs("flushes denormals")
def test_the_smallest_and_the_largest_scale():
    """2 ** -127, a denormal, against 2 ** 127."""
    a, b = codes((M, K), 1), codes((K, N), 2)
    low = torch.full((M, K // GROUP), 0, dtype=torch.uint8, device=DEVICE)
    high = torch.full((N, K // GROUP), 254, dtype=torch.uint8, device=DEVICE)
    b[E2M1[b & 7] > 1] = 2  # the largest scale leaves room for less than a factor of two
    assert_equal(*run(a, b, ("e2m1", "e2m1"), [low, high]))


def test_a_scale_that_is_no_number():
    scales = [exponents(M, 3), exponents(N, 4)]
    expected = run(codes((M, K), 1), codes((K, N), 2), ("e2m1", "e4m3"), scales)[1]
    scales[0][5, 2] = 255
    scales[1][7, 0] = 255
    with np.errstate(over="ignore"):  # 255 is not 2 ** 128
        out, _ = run(codes((M, K), 1), codes((K, N), 2), ("e2m1", "e4m3"), scales)
    expected[5] = expected[:, 7] = torch.nan
    assert_equal(out, expected)
