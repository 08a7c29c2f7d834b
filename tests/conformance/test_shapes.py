"""Operations that make, reshape and move tiles without arithmetic."""

from itertools import permutations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, DTYPES, assert_equal, needs, random_bits

INT32 = DTYPES["int32"]


def ramp(*shape):
    """Every element is its own index, so that nothing can move unseen."""
    return np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)


def on_device(array):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def empty(*shape, dtype=torch.int32):
    return torch.full(shape, -1, device=DEVICE).to(dtype)


@triton.jit
def aranges(out_ptr):
    tl.store(out_ptr + tl.arange(0, 16), tl.arange(0, 16))
    tl.store(out_ptr + 16 + tl.arange(0, 8), tl.arange(24, 32))
    tl.store(out_ptr + 24 + tl.arange(0, 1), tl.arange(5, 6))


@triton.jit
def filled(out_ptr, value, DTYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(at, tl.zeros((M, N), dtype=DTYPE))
    tl.store(at + M * N, tl.full((M, N), 3, dtype=DTYPE))
    tl.store(at + 2 * M * N, tl.full((M, N), value, dtype=DTYPE))
    tl.store(at + 3 * M * N, tl.zeros_like(tl.full((M, N), value, dtype=DTYPE)))
    tl.store(at + 4 * M * N, tl.full((1, 1), value, dtype=DTYPE))


def test_arange():
    out = empty(25)
    aranges[(1,)](out)
    expected = [*range(16), *range(24, 32), 5]
    assert_equal(out, torch.tensor(expected, dtype=torch.int32))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64", "float16", "float32", "float64"])
def test_full_and_zeros(dtype):
    dtype = DTYPES[dtype]
    out = empty(5, 4, 8, dtype=dtype.torch)
    filled[(1,)](out, 11, DTYPE=dtype.triton, M=4, N=8)
    expected = np.broadcast_to(np.array([0, 3, 11, 0, 11])[:, None, None], (5, 4, 8))
    assert_equal(out, torch.tensor(expected).to(dtype.torch))


@triton.jit
def broadcasts(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M))
    y = tl.load(y_ptr + tl.arange(0, N))
    size: tl.constexpr = M * N
    at = out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(at, tl.broadcast_to(x[:, None], (M, N)))
    tl.store(at + size, tl.broadcast_to(y[None, :], [M, N]))
    tl.store(at + 2 * size, tl.expand_dims(x, 1).broadcast_to(M, N))
    a, b = tl.broadcast(x[:, None], y[None, :])
    tl.store(at + 3 * size, a)
    tl.store(at + 4 * size, b)
    tl.store(at + 5 * size, tl.broadcast_to(tl.load(x_ptr), (M, N)))
    tl.store(at + 6 * size, x[:, None] * N + y[None, :])


@pytest.mark.parametrize("shape", [(1, 16), (8, 4), (32, 1)])
def test_broadcasts(shape):
    m, n = shape
    x, y = ramp(m) + 7, ramp(n) + 100
    out = empty(7, m, n)
    broadcasts[(1,)](on_device(x), on_device(y), out, M=m, N=n)
    rows, columns = np.broadcast_to(x[:, None], shape), np.broadcast_to(y[None, :], shape)
    expected = [rows, columns, rows, rows, columns, np.full(shape, x[0]), rows * n + columns]
    assert_equal(out, np.stack(expected).astype(np.int32))


@triton.jit
def expanded(x_ptr, out_ptr, WHICH: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if WHICH == 0:
        y = tl.expand_dims(x, 0)
    elif WHICH == 1:
        y = tl.expand_dims(x, -1)
    elif WHICH == 2:
        y = tl.expand_dims(x, (0, 2))
    elif WHICH == 3:
        y = x[None, :, None]
    else:
        y = x[:, None].expand_dims(0)
    tl.static_assert(y.numel == N)
    # A store broadcasts the value over three dimensions, which shows where the new axes are.
    if len(y.shape) == 2:
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    else:
        at = (tl.arange(0, 4)[:, None, None] * N + tl.arange(0, N)[None, :, None]) * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(out_ptr + at, y)


@pytest.mark.parametrize("which", range(5))
def test_expand_dims(which):
    x = ramp(16) * 3
    shape = (16, 16) if which < 2 else (4, 16, 4)
    axes = [0, -1, (0, 2), (0, 2), (0, 2)][which]
    out = empty(*shape)
    expanded[(1,)](on_device(x), out, WHICH=which, N=16)
    assert_equal(out, np.ascontiguousarray(np.broadcast_to(np.expand_dims(x, axes), shape)))


@triton.jit
def reshaped(x_ptr, out_ptr, METHOD: tl.constexpr, N: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    y = x.reshape(A, B, C) if METHOD else tl.reshape(x, (A, B, C))
    a, b, c = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    tl.store(out_ptr + (c * B + b) * A + a, y)
    tl.store(out_ptr + N + tl.arange(0, N), tl.ravel(y))
    z = tl.reshape(y, [B, A * C])
    tl.store(out_ptr + 2 * N + tl.arange(0, B)[None, :] * (A * C) + tl.arange(0, A * C)[:, None], tl.trans(z))


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 8), (1, 16, 4), (8, 8, 1)])
def test_reshape_is_row_major(shape, method):
    a, b, c = shape
    x = ramp(a * b * c)
    out = empty(3, x.size)
    reshaped[(1,)](on_device(x), out, METHOD=method, N=x.size, A=a, B=b, C=c)
    assert_equal(out, np.stack([x.reshape(shape).transpose(2, 1, 0).ravel(), x, x]))


@triton.jit
def viewed(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 64))
    y = x.view(4, 16)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :], y)
    z = tl.reshape(x, (8, 8), can_reorder=True)
    tl.store(out_ptr + 64 + tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8)[None, :], z)


@pytest.mark.filterwarnings("ignore:view is deprecated", "ignore:.*can_reorder=True. is deprecated")
def test_a_view_holds_the_same_elements():
    x = ramp(64)
    out = empty(2, 64)
    viewed[(1,)](on_device(x), out)
    assert_equal(out.sort(dim=1).values, np.stack([x, x]))  # their order is left open


@triton.jit
def store_3d(out_ptr, x):
    a: tl.constexpr = x.shape[0]
    b: tl.constexpr = x.shape[1]
    c: tl.constexpr = x.shape[2]
    i, j, k = tl.arange(0, a)[:, None, None], tl.arange(0, b)[None, :, None], tl.arange(0, c)[None, None, :]
    tl.store(out_ptr + (i * b + j) * c + k, x)


@triton.jit
def load_3d(x_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    i, j, k = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    return tl.load(x_ptr + (i * B + j) * C + k)


@triton.jit
def load_4d(x_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    at = tl.arange(0, A)[:, None, None, None] * B + tl.arange(0, B)[None, :, None, None]
    at = (at * C + tl.arange(0, C)[None, None, :, None]) * D + tl.arange(0, D)[None, None, None, :]
    return tl.load(x_ptr + at)


@triton.jit
def permute_3d(
    x_ptr, out_ptr, METHOD: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    x = load_3d(x_ptr, A, B, C)
    if METHOD == 0:
        y = tl.permute(x, (P, Q, R))
    elif METHOD == 1:
        y = tl.trans(x, P, Q, R)
    else:
        y = x.permute(P, Q, R)
    store_3d(out_ptr, y)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("method", [0, 1, 2])
def test_every_permutation_of_3_axes(order, method):
    x = ramp(2, 8, 4)
    expected = np.ascontiguousarray(x.transpose(order))
    out = empty(*expected.shape)
    permute_3d[(1,)](on_device(x), out, method, *order, *x.shape)
    assert_equal(out, expected)


@triton.jit
def permute_4d(
    x_ptr, out_ptr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    y = tl.permute(load_4d(x_ptr, A, B, C, D), (P, Q, R, S))
    flat: tl.constexpr = A * B * C * D
    tl.store(out_ptr + tl.arange(0, flat), tl.reshape(y, (flat,)))


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_permutation_of_4_axes(order):
    x = ramp(2, 4, 1, 8)
    out = empty(x.size)
    permute_4d[(1,)](on_device(x), out, *order, *x.shape)
    assert_equal(out, np.ascontiguousarray(x.transpose(order)).ravel())


@triton.jit
def transpose(x_ptr, out_ptr, WHICH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if WHICH == 0:
        y = tl.trans(x)
    elif WHICH == 1:
        y = x.T
    else:
        y = x.trans(1, 0)
    tl.store(out_ptr + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], y)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float64", "bool"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_transpose(which, dtype):
    x = random_bits(DTYPES[dtype], (16, 4))
    out = torch.zeros(4, 16, dtype=x.dtype, device=DEVICE)
    transpose[(1,)](x, out, WHICH=which, M=16, N=4)
    assert_equal(out, x.T.contiguous())


@triton.jit
def joined(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    store_3d(out_ptr, tl.join(x, y))
    pairs = out_ptr + 2 * M * N + tl.arange(0, M)[:, None] * (2 * N) + tl.arange(0, 2 * N)[None, :]
    tl.store(pairs, tl.interleave(x, y))
    row = tl.load(y_ptr + tl.arange(0, N))
    store_3d(out_ptr + 4 * M * N, tl.join(x, row[None, :]))


def test_join_and_interleave():
    x, y = ramp(8, 4), ramp(8, 4) + 100
    out = empty(3, 8, 4, 2)
    joined[(1,)](on_device(x), on_device(y), out, M=8, N=4)
    pair = np.stack([x, y], axis=-1)
    assert_equal(out, np.stack([pair, pair, np.stack([x, np.broadcast_to(y[0], (8, 4))], axis=-1)]))


@triton.jit
def join_and_split_again(x_ptr, out_ptr, N: tl.constexpr):
    first, second = tl.split(load_3d(x_ptr, 4, N, 2))
    at = tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, second)
    tl.store(out_ptr + 4 * N + at, first)
    a, b = tl.split(tl.join(second, first * 2))
    tl.store(out_ptr + 8 * N + at, a - b)
    one, two = tl.split(tl.load(x_ptr + 6 + tl.arange(0, 2)))  # scalars
    tl.store(out_ptr + 12 * N, one * 1000 + two)
    pair = tl.join(one, two)
    tl.store(out_ptr + 12 * N + 1 + tl.arange(0, 2), pair)
    left, right = tl.split(tl.reshape(tl.load(x_ptr + tl.arange(0, 8)), (2, 2, 2)))
    _, last = tl.split(right)
    tl.store(out_ptr + 12 * N + 3 + tl.arange(0, 2), last)
    tl.store(out_ptr + 12 * N + 5 + tl.arange(0, 4), tl.reshape(left, (4,)))


def test_split_undoes_join():
    x = ramp(4, 8, 2) + 1
    out = empty(12 * 8 + 9)
    join_and_split_again[(1,)](on_device(x), out, N=8)
    first, second = x[..., 0].ravel(), x[..., 1].ravel()
    tail = [7 * 1000 + 8, 7, 8, 4, 8, 1, 3, 5, 7]
    expected = np.concatenate([second, first, second - 2 * first, tail]).astype(np.int32)
    assert_equal(out, expected)


@triton.jit
def concatenated(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    both = tl.cat(tl.load(x_ptr + i), tl.load(y_ptr + i), can_reorder=True)
    tl.store(out_ptr + tl.arange(0, 2 * N), both)


@pytest.mark.filterwarnings("ignore:.*can_reorder=True. is deprecated")
@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_cat_holds_the_elements_of_both(dtype):
    x, y = (torch.arange(32) + k for k in (0, 50))
    out = empty(64, dtype=DTYPES[dtype].torch)
    concatenated[(1,)](x.to(out.dtype).to(DEVICE), y.to(out.dtype).to(DEVICE), out, N=32)
    assert_equal(out.sort().values, torch.cat([x, y]).to(out.dtype))  # their order is left open


@triton.jit
def concatenated_along(x_ptr, y_ptr, out_ptr, DIM: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    both = tl.cat(tl.load(x_ptr + at), tl.load(y_ptr + at), dim=DIM)
    m: tl.constexpr = both.shape[0]
    n: tl.constexpr = both.shape[1]
    tl.store(out_ptr + tl.arange(0, m)[:, None] * n + tl.arange(0, n)[None, :], both)


@needs("3.7")
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat_along_a_dimension_keeps_the_order(dim):
    x, y = ramp(4, 8), ramp(4, 8) + 100
    expected = np.concatenate([x, y], axis=dim)
    out = empty(*expected.shape)
    concatenated_along[(1,)](on_device(x), on_device(y), out, DIM=dim)
    assert_equal(out, expected)


@triton.jit
def gather_2d(x_ptr, index_ptr, out_ptr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if AXIS == 0:
        at = tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :]
    else:
        at = tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + at, tl.gather(x, tl.load(index_ptr + at), AXIS))


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("picked", [4, 16, 32])
def test_gather_along_each_axis(axis, picked, dtype):
    x = random_bits(DTYPES[dtype], (8, 16))
    shape = (picked, 16) if axis == 0 else (8, picked)
    index = np.random.default_rng(5).integers(0, x.shape[axis], shape)
    out = torch.zeros(shape, dtype=x.dtype, device=DEVICE)
    gather_2d[(1,)](x, on_device(index.astype(np.int32)), out, AXIS=axis, M=8, N=16, K=picked)
    assert_equal(out, torch.gather(x.cpu(), axis, torch.from_numpy(index)))


@triton.jit
def gather_1d(x_ptr, index_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, K), tl.gather(x, tl.load(index_ptr + tl.arange(0, K)), 0))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_gather_of_a_vector(index):
    x = random_bits(DTYPES["float32"], 64)
    where = torch.from_numpy(np.random.default_rng(6).integers(0, 64, 128))
    out = torch.zeros(128, dtype=torch.float32, device=DEVICE)
    gather_1d[(1,)](x, where.to(index).to(DEVICE), out, N=64, K=128)
    assert_equal(out, x[where.to(DEVICE)])


@triton.jit
def squeezed(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    y = tl.unsqueeze(tl.unsqueeze(x, 0), 2)
    store_3d(out_ptr, y)
    z = tl.squeeze(tl.squeeze(y, 2), 0)
    tl.store(out_ptr + N + tl.arange(0, N), z)


@needs("tl.squeeze")
def test_squeeze_and_unsqueeze():
    x = ramp(16)
    out = empty(2, 16)
    squeezed[(1,)](on_device(x), out, N=16)
    assert_equal(out, np.stack([x, x]))


@triton.jit
def flipped(x_ptr, out_ptr, DIM: tl.constexpr):
    store_3d(out_ptr, tl.flip(load_3d(x_ptr, 2, 8, 4), DIM))


@pytest.mark.parametrize("dtype", ["int32", "float16", "int64"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_flip(dim, dtype):
    x = random_bits(DTYPES[dtype], (2, 8, 4))
    out = torch.zeros_like(x)
    flipped[(1,)](x, out, DIM=dim)
    assert_equal(out, x.flip(dim))


@triton.jit
def swizzled(out_ptr, m, n, GROUP: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    a, b = tl.swizzle2d(i, j, m, n, GROUP)
    tl.store(out_ptr + (i * n + j) * 2, a)
    tl.store(out_ptr + (i * n + j) * 2 + 1, b)


@pytest.mark.parametrize(("m", "n", "group"), [(4, 4, 2), (5, 3, 2), (7, 4, 3), (3, 5, 8)])
def test_swizzle2d(m, n, group):
    out = empty(m, n, 2)
    swizzled[(m, n)](out, m, n, GROUP=group)
    # Groups of rows one after another, each group column by column.
    order = [(i, j) for g in range(0, m, group) for j in range(n) for i in range(g, min(g + group, m))]
    assert_equal(out, np.array(order, dtype=np.int32).reshape(m, n, 2))


@triton.jit
def rotate_half(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
    rotated = tl.reshape(tl.permute(tl.join(-right, left), (0, 2, 1)), (M, N))
    tl.store(out_ptr + at, rotated)
    even, odd = tl.split(tl.reshape(x, (M, N // 2, 2)))
    tl.store(out_ptr + M * N + at, tl.interleave(-odd, even))
    tl.store(out_ptr + 2 * M * N + at, x + rotated)


def test_halves_and_pairs_rotate():
    x = ramp(4, 16) + 1
    out = empty(3, 4, 16)
    rotate_half[(1,)](on_device(x), out, M=4, N=16)
    halves = np.concatenate([-x[:, 8:], x[:, :8]], axis=1)
    pairs = np.stack([-x[:, 1::2], x[:, ::2]], axis=-1).reshape(4, 16)
    assert_equal(out, np.stack([halves, pairs, x + halves]))


@triton.jit
def composed(x_ptr, out_ptr):
    x = load_4d(x_ptr, 2, 4, 8, 2)
    y = tl.permute(x, (2, 0, 3, 1))
    z = tl.reshape(y, (16, 8))
    w = tl.join(z, tl.reshape(tl.trans(z), (16, 8)))  # 16, 8, 2
    v = tl.reshape(tl.permute(w, (2, 1, 0)), (4, 64))
    a = tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + a, v)
    column = tl.sum(v, axis=0)
    tl.store(out_ptr + 256 + a, v + column[None, :])
    u = tl.reshape(v[None, :, :] + tl.reshape(column, (1, 1, 64)), (256,))
    tl.store(out_ptr + 512 + tl.arange(0, 256), u - tl.reshape(v, (256,)))
    tl.store(out_ptr + 768 + tl.arange(0, 128), tl.reshape(z, (128,)))


def test_compositions_used_several_times():
    x = ramp(2, 4, 8, 2)
    out = empty(896)
    composed[(1,)](on_device(x), out)
    z = x.transpose(2, 0, 3, 1).reshape(16, 8)
    w = np.stack([z, z.T.reshape(16, 8)], axis=-1)
    v = w.transpose(2, 1, 0).reshape(4, 64)
    column = v.sum(axis=0)
    expected = [v, v + column, np.broadcast_to(column, (4, 64)), z]
    assert_equal(out, np.concatenate([e.ravel() for e in expected]).astype(np.int32))
