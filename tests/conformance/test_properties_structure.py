"""Random shapes, strides, masks and chains of shape operations against torch and NumPy."""

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .harness import DEVICE, DTYPES, assert_equal, random_bits

# Derandomised, as a suite of conformance should say the same each time.
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
COMPILING = settings(PROPERTY, max_examples=25)  # where nearly every example is a kernel of its own


@triton.jit
def copy_tiles(x_ptr, out_ptr, m, n, x_m, x_n, out_m, out_n, low, high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    j = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (i < m) & (j < n)
    wanted = inside & (i * 3 + j >= low) & (i + j < high)
    x = tl.load(x_ptr + i * x_m + j * x_n, mask=wanted, other=77)
    tl.store(out_ptr + i * out_m + j * out_n, x, mask=inside & (j % 5 != 4))


@settings(PROPERTY, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    transposed=st.tuples(st.booleans(), st.booleans()),
    bounds=st.tuples(st.integers(-5, 60), st.integers(0, 90)),
    block=st.sampled_from([(1, 64), (8, 16), (32, 4)]),
    dtype=st.sampled_from(["uint8", "float16", "float32", "int64"]),
)
def test_copies_of_strided_masked_tiles(shape, steps, transposed, bounds, block, dtype):
    m, n = shape
    dtype = DTYPES[dtype]

    def strided(seed, flip):
        if flip:
            return random_bits(dtype, (n * steps[1], m * steps[0]), seed).T[:: steps[0], :: steps[1]]
        return random_bits(dtype, (m * steps[0], n * steps[1]), seed)[:: steps[0], :: steps[1]]

    x, out = strided(0, transposed[0]), strided(1, transposed[1])
    i, j = torch.arange(m, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)[None, :]
    wanted = (i * 3 + j >= bounds[0]) & (i + j < bounds[1])
    filled = torch.where(wanted, x, torch.full_like(x, 77))
    expected = torch.where(j % 5 != 4, filled, out)
    grid = (triton.cdiv(m, block[0]), triton.cdiv(n, block[1]))
    copy_tiles[grid](x, out, m, n, *x.stride(), *out.stride(), *bounds, BLOCK_M=block[0], BLOCK_N=block[1])
    assert_equal(out.contiguous(), expected.contiguous())


@triton.jit
def reduce_tile(
    x_ptr, out_ptr, SHAPE: tl.constexpr, AXIS: tl.constexpr, OP: tl.constexpr, KEEP: tl.constexpr, SIZE: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    x = tl.reshape(tl.load(x_ptr + tl.arange(0, SIZE)), SHAPE)
    if OP == 0:
        y = tl.sum(x, AXIS, keep_dims=KEEP)
    elif OP == 1:
        y = tl.max(x, AXIS, keep_dims=KEEP)
    elif OP == 2:
        y = tl.argmin(x, AXIS, keep_dims=KEEP)
    elif OP == 3:
        y = tl.xor_sum(x, AXIS, keep_dims=KEEP)
    else:
        y = tl.sum(tl.cumsum(x, AXIS) * 3, AXIS, keep_dims=KEEP)
    tl.store(out_ptr + tl.arange(0, OUT), tl.reshape(y, (OUT,)))


REDUCTIONS = [
    lambda x, axis: x.sum(axis),
    lambda x, axis: x.max(axis),
    lambda x, axis: x.argmin(axis),
    lambda x, axis: np.bitwise_xor.reduce(x, axis=axis),
    lambda x, axis: (x.cumsum(axis) * 3).sum(axis),
]


@st.composite
def shapes(draw, largest=7, most=4):
    """Shapes of powers of two, of at least two elements and at most 2 ** largest."""
    exponents = draw(st.lists(st.integers(0, 4), min_size=1, max_size=most))
    while sum(exponents) > largest:
        exponents[exponents.index(max(exponents))] -= 1
    if sum(exponents) == 0:
        exponents[0] = 1
    return tuple(2**e for e in exponents)


@COMPILING
@given(data=st.data(), shape=shapes(), op=st.integers(0, 4), keep=st.booleans(), seed=st.integers(0, 99))
def test_reductions_along_any_axis_of_any_shape(data, shape, op, keep, seed):
    if len(shape) == 1:
        shape = (2, *shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = np.random.default_rng(seed).integers(-50, 50, shape).astype(np.int32)
    expected = REDUCTIONS[op](x, axis).astype(np.int32).ravel()
    out = torch.zeros(expected.size, dtype=torch.int32, device=DEVICE)
    reduce_tile[(1,)](torch.from_numpy(x).to(DEVICE), out, shape, axis, op, keep, x.size, expected.size)
    assert_equal(out, expected)


@triton.jit
def step(x, OP: tl.constexpr, ARGUMENT: tl.constexpr):
    """One operation of a chain; the code says which and the argument how."""
    if OP == 0:
        y = tl.reshape(x, ARGUMENT)
    elif OP == 1:
        if len(x.shape) == 2:
            y = tl.permute(x, ARGUMENT[0], ARGUMENT[1])
        elif len(x.shape) == 3:
            y = tl.permute(x, ARGUMENT[0], ARGUMENT[1], ARGUMENT[2])
        else:
            y = tl.permute(x, ARGUMENT[0], ARGUMENT[1], ARGUMENT[2], ARGUMENT[3])
    elif OP == 2:
        y = tl.expand_dims(x, ARGUMENT)
    elif OP == 3:
        y = tl.broadcast_to(x, ARGUMENT)
    elif OP == 4:
        y = tl.join(x, -x)
    elif OP == 5:
        low, high = tl.split(x)
        y = low * 2 + high
    elif OP == 6:
        y = tl.flip(x, ARGUMENT)
    elif OP == 7:
        y = x + tl.sum(x, ARGUMENT, keep_dims=True)
    else:
        y = x
    return y


@triton.jit
def chain(
    x_ptr, out_ptr, SHAPE: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr, OP0: tl.constexpr, ARG0: tl.constexpr,
    OP1: tl.constexpr, ARG1: tl.constexpr, OP2: tl.constexpr, ARG2: tl.constexpr, OP3: tl.constexpr, ARG3: tl.constexpr,
    OP4: tl.constexpr, ARG4: tl.constexpr,
):  # fmt: skip
    x = tl.reshape(tl.load(x_ptr + tl.arange(0, SIZE)), SHAPE)
    y0 = step(x, OP0, ARG0)
    y1 = step(y0, OP1, ARG1)
    y2 = step(y1, OP2, ARG2)
    y3 = step(y2, OP3, ARG3)
    y4 = step(y3, OP4, ARG4)
    tl.store(out_ptr + tl.arange(0, OUT), tl.reshape(y4, (OUT,)))


def numpy_step(x, op, argument):
    """The same step in NumPy."""
    return [
        lambda: x.reshape(argument),
        lambda: x.transpose(argument),
        lambda: np.expand_dims(x, argument),
        lambda: np.broadcast_to(x, argument),
        lambda: np.stack([x, -x], axis=-1),
        lambda: x[..., 0] * 2 + x[..., 1],
        lambda: np.flip(x, argument),
        lambda: x + x.sum(argument, keepdims=True, dtype=np.int32),
        lambda: x,
    ][op]()


@st.composite
def chains(draw, length=5):
    """A start shape and five steps that fit, with their results in NumPy. Tiles keep two to four axes."""
    shape = draw(shapes(largest=6).filter(lambda s: len(s) > 1))
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) + 1
    y, steps = x, []
    for _ in range(length):
        choices = [0, 1, 6, 7]
        choices += [2] if y.ndim < 4 else []
        choices += [3] if 1 in y.shape and y.size <= 128 else []
        choices += [4] if y.ndim < 4 and y.size <= 128 else []
        choices += [5] if y.shape[-1] == 2 and y.ndim > 2 else []
        op = draw(st.sampled_from(choices))
        argument = 0
        if op == 0:
            total, argument = y.size, []
            for _ in range(draw(st.integers(1, 3))):
                argument.append(2 ** draw(st.integers(0, total.bit_length() - 1)))
                total //= argument[-1]
            argument = (*argument, total)
        elif op == 1:
            argument = tuple(draw(st.permutations(range(y.ndim))))
        elif op == 2:
            argument = draw(st.integers(0, y.ndim))
        elif op == 3:
            argument = tuple(2 if s == 1 else s for s in y.shape)
        elif op in (6, 7):
            argument = draw(st.integers(0, y.ndim - 1))
        if op == 3 and np.prod(argument) > 256:
            op, argument = 8, 0
        y = numpy_step(y, op, argument)
        steps += [op, argument]
    return x, steps, np.ascontiguousarray(y)


@COMPILING
@given(chains())
def test_chains_of_shape_operations(case):
    x, steps, expected = case
    out = torch.zeros(expected.size, dtype=torch.int32, device=DEVICE)
    chain[(1,)](torch.from_numpy(x).to(DEVICE), out, x.shape, x.size, expected.size, *steps)
    assert_equal(out, expected.ravel())


@triton.jit
def scatter_add(index_ptr, x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, mask=i < n, other=0)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(out_ptr + index, x, mask=i < n)


@settings(PROPERTY, max_examples=40)
@given(
    index=st.lists(st.integers(0, 20), min_size=1, max_size=150),
    block=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
)
def test_scattered_sums(index, block, seed):
    x = np.random.default_rng(seed).integers(-1000, 1000, len(index)).astype(np.int32)
    out = torch.zeros(21, dtype=torch.int32, device=DEVICE)
    given_index = torch.tensor(index, dtype=torch.int32, device=DEVICE)
    grid = (triton.cdiv(len(index), block),)
    scatter_add[grid](given_index, torch.from_numpy(x).to(DEVICE), out, len(index), BLOCK=block)
    expected = np.zeros(21, dtype=np.int32)
    np.add.at(expected, index, x)
    assert_equal(out, expected)
