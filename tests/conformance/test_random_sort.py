"""Random numbers from Philox counters, and sorting networks."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, DTYPES, assert_close_ulps, assert_equal, random, random_bits

FLOAT32 = DTYPES["float32"]
SEEDS = [0, 1, 42, 2**31 - 1, 2**40 + 12345]


def philox(seed, offset, rounds=10, upper=(0, 0)):
    """Philox 4x32 of Salmon, Moraes, Dror and Shaw (SC 2011): the offset begins the counter, the key is the seed."""
    low = np.uint64(0xFFFFFFFF)
    offset = offset.astype(np.uint64)
    c = [offset & low, offset >> np.uint64(32), *(np.full_like(offset, word) for word in upper)]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(rounds):
        first, third = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (third >> np.uint64(32)) ^ c[1] ^ keys[0],
            third & low,
            (first >> np.uint64(32)) ^ c[3] ^ keys[1],
            first & low,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c).astype(np.uint32)


def uniform(words):
    """Triton's float in [0, 1): magnitudes of the signed words, times a little less than 2**-31."""
    signed = words.view(np.int32)
    return np.where(signed < 0, -signed - 1, signed).astype(np.float32) * np.float32(4.6566127342e-10)


def test_philox_has_the_published_values():
    # The known-answer test of the paper's own library for a counter and key of zeros.
    assert philox(0, np.zeros(1, np.int64))[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@triton.jit
def words(seed, offset_ptr, out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    offset = tl.load(offset_ptr + i)
    a, b, c, d = tl.randint4x(seed, offset, ROUNDS)
    tl.store(out_ptr + i, tl.randint(seed, offset, ROUNDS))
    tl.store(out_ptr + BLOCK + i, a)
    tl.store(out_ptr + 2 * BLOCK + i, b)
    tl.store(out_ptr + 3 * BLOCK + i, c)
    tl.store(out_ptr + 4 * BLOCK + i, d)


@pytest.mark.parametrize("rounds", [10, 6])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_random_integers_are_philox(seed, wide, rounds):
    offset = np.arange(64, dtype=np.int64) * 3
    if wide:
        offset = offset * 2**33 + 17
    given = torch.from_numpy(offset if wide else offset.astype(np.int32)).to(DEVICE)
    out = torch.zeros(5, 64, dtype=torch.uint32, device=DEVICE)
    words[(1,)](seed, given, out, ROUNDS=rounds, BLOCK=64)
    expected = philox(seed, offset, rounds)
    assert_equal(out, np.concatenate([expected[:1], expected]))


@triton.jit
def whole_counter(seed, out_ptr, first, second, third, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    zero = i * 0
    a, b, c, d = tl.philox(seed, i, zero + first, zero + second, zero + third)
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + BLOCK + i, b)
    tl.store(out_ptr + 2 * BLOCK + i, c)
    tl.store(out_ptr + 3 * BLOCK + i, d)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_all_words_of_the_counter_count():
    out = torch.zeros(4, 32, dtype=torch.uint32, device=DEVICE)
    whole_counter[(1,)](7, out, 11, 2**31 - 1, 13, BLOCK=32)
    assert_equal(out, philox(7, np.arange(32, dtype=np.int64) + (11 << 32), upper=(2**31 - 1, 13)))


@triton.jit
def floats(seed, uniform_ptr, normal_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(uniform_ptr + i, tl.rand(seed, i), mask=mask)
    a, b, c, d = tl.rand4x(seed, i)
    tl.store(uniform_ptr + n + i, a, mask=mask)
    tl.store(uniform_ptr + 2 * n + i, b, mask=mask)
    tl.store(uniform_ptr + 3 * n + i, c, mask=mask)
    tl.store(uniform_ptr + 4 * n + i, d, mask=mask)
    tl.store(normal_ptr + i, tl.randn(seed, i), mask=mask)
    a, b, c, d = tl.randn4x(seed, i)
    tl.store(normal_ptr + n + i, a, mask=mask)
    tl.store(normal_ptr + 2 * n + i, b, mask=mask)
    tl.store(normal_ptr + 3 * n + i, c, mask=mask)
    tl.store(normal_ptr + 4 * n + i, d, mask=mask)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_random_floats(seed):
    n = 1000
    uniforms = torch.zeros(5, n, dtype=torch.float32, device=DEVICE)
    normals = torch.zeros(5, n, dtype=torch.float32, device=DEVICE)
    floats[(4,)](seed, uniforms, normals, n, BLOCK=256)
    u = uniform(philox(seed, np.arange(n)))
    assert_equal(uniforms, np.concatenate([u[:1], u]))
    assert bool(((uniforms >= 0) & (uniforms < 1)).all())
    # Box and Muller's transform of the exact uniforms; float32 enters through the clamp and the angle.
    wide = u.astype(np.float64)
    radius = np.sqrt(-2 * np.log(np.maximum(wide[[0, 2]], 1e-7)))
    angle = 2 * np.pi * wide[[1, 3]]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(4, n)
    # Three roundings in the angle (up to 2 pi), and log, sqrt, cos and the product to a few units each.
    unit, slack = 2.0**-24, np.repeat(radius, 2, axis=0)
    near_one = np.repeat(np.abs(np.log(np.maximum(wide[[0, 2]], 1e-7))), 2, axis=0)  # where log loses digits on a GPU
    absolute = slack * (2 * 2 * np.pi + 8) * unit + 2 * unit / np.sqrt(2 * np.maximum(near_one, unit))
    assert_close_ulps(normals[1:], pairs, FLOAT32, 0, absolute=absolute)
    assert_equal(normals[0], normals[1])


@triton.jit
def dropout(x_ptr, out_ptr, kept_ptr, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    keep = tl.rand(seed, i) > p
    tl.store(out_ptr + i, tl.where(keep, x * 2.0, 0.0), mask=i < n)
    tl.store(kept_ptr + i, keep, mask=i < n)


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_dropout_does_not_depend_on_the_tiling(block):
    n = 500
    x, kept = random(FLOAT32, n), torch.zeros(n, dtype=torch.bool, device=DEVICE)
    out = torch.empty_like(x)
    dropout[(triton.cdiv(n, block),)](x, out, kept, n, 0.5, 123, BLOCK=block)
    keep = torch.from_numpy(uniform(philox(123, np.arange(n))[:1])[0] > 0.5)
    assert_equal(kept, keep)
    assert_equal(out, torch.where(keep, x.cpu() * 2, torch.zeros(n)))


# ---- sorting ----


@triton.jit
def sort_rows(x_ptr, out_ptr, DESCENDING: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.sort(tl.load(x_ptr + at), dim=1, descending=DESCENDING))


@triton.jit
def sort_vector(x_ptr, out_ptr, DESCENDING: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.sort(tl.load(x_ptr + i), descending=DESCENDING))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (4, 16), (16, 2)])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "float16", "float32", "float64"])
def test_sort_rows(dtype, shape, descending):
    dtype = DTYPES[dtype]
    x = random(dtype, shape) if dtype.is_float else random_bits(dtype, shape)
    x[0, 1] = x[0, 0]  # a tie
    if dtype.is_float:
        x[-1, 0], x[-1, 1] = float("inf"), float("-inf")
    out = torch.zeros_like(x)
    sort_rows[(1,)](x, out, DESCENDING=descending, M=shape[0], N=shape[1])
    expected = np.sort(x.cpu().numpy(), axis=1)
    assert_equal(out, np.ascontiguousarray(expected[:, ::-1] if descending else expected))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n", [2, 8, 128])
def test_sort_vectors(n, descending):
    x = random(DTYPES["int32"], n) % 50
    out = torch.zeros_like(x)
    sort_vector[(1,)](x, out, DESCENDING=descending, N=n)
    assert_equal(out, x.cpu().sort(descending=descending).values)


@triton.jit
def top_of_rows(x_ptr, out_ptr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out_ptr + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :], tl.topk(x, K, dim=1))


@pytest.mark.parametrize("k", [2, 8, 32])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_topk(dtype, k):
    dtype = DTYPES[dtype]
    x = random(dtype, (4, 32))
    out = torch.zeros(4, k, dtype=dtype.torch, device=DEVICE)
    top_of_rows[(1,)](x, out, K=k, M=4, N=32)
    assert_equal(out, x.cpu().sort(dim=1, descending=True).values[:, :k])


@triton.jit
def merge_halves(x_ptr, out_ptr, DESCENDING: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.standard.bitonic_merge(tl.load(x_ptr + i), descending=DESCENDING))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_bitonic_merge(dtype, descending):
    ordered = random(DTYPES[dtype], 64).sort().values
    bitonic = torch.cat([ordered[::2], ordered[1::2].flip(0)])  # up, then down
    out = torch.zeros_like(bitonic)
    merge_halves[(1,)](bitonic, out, DESCENDING=descending, N=64)
    assert_equal(out, ordered.flip(0) if descending else ordered)


@triton.jit
def argsort_by_keys(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    keys = (tl.load(x_ptr + i).to(tl.int64) << 32) | i.to(tl.int64)
    tl.store(out_ptr + i, (tl.sort(keys) & 0xFFFFFFFF).to(tl.int32))


def test_stable_argsort_by_packed_keys():
    x = random(DTYPES["int32"], 64) % 10
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    argsort_by_keys[(1,)](x, out, N=64)
    assert_equal(out, np.argsort(x.cpu().numpy(), kind="stable").astype(np.int32))
