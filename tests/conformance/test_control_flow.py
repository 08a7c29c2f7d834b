"""Loops and branches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, DTYPES, assert_equal, random

INT32 = DTYPES["int32"]


def numbers(n=32, seed=0):
    return (random(INT32, n, seed) % 1000).abs()


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


# ---- for ----


@triton.jit
def fibonacci(x_ptr, y_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    b = tl.load(y_ptr + i)
    trips = 0
    for _ in range(steps):
        a, b = b, a + b
        trips += 1
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + BLOCK + i, b)
    tl.store(out_ptr + 2 * BLOCK + i, i * 0 + trips)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 20])
def test_for_carries_swapped_tiles(steps):
    x, y = numbers(seed=0), numbers(seed=1)
    out = zeros(3, 32)
    fibonacci[(1,)](x, y, out, steps, BLOCK=32)
    a, b = x.cpu(), y.cpu()
    for _ in range(steps):
        a, b = b, a + b
    assert_equal(out, torch.stack([a, b, torch.full_like(a, steps)]))


@triton.jit
def rotate_three(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    b = a * 2
    c = a * 3
    first_a = a
    for k in range(steps):
        a, b, c = c + k, a, b
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + BLOCK + i, b)
    tl.store(out_ptr + 2 * BLOCK + i, c)
    tl.store(out_ptr + 3 * BLOCK + i, first_a)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
def test_for_rotates_three_tiles(steps):
    x = numbers()
    out = zeros(4, 32)
    rotate_three[(1,)](x, out, steps, BLOCK=32)
    a, b, c = x.cpu(), x.cpu() * 2, x.cpu() * 3
    for k in range(steps):
        a, b, c = c + k, a, b
    assert_equal(out, torch.stack([a, b, c, x.cpu()]))


@triton.jit
def runtime_bounds(out_ptr, start, stop, STEP: tl.constexpr):
    count = 0
    total = 0
    last = -99
    for k in range(start, stop, STEP):
        count += 1
        total += k * count
        last = k
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, total)
    tl.store(out_ptr + 2, last)


@pytest.mark.parametrize("step", [1, 3, -1, -4])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (-5, 6), (10, 0), (7, -8), (3, 3), (0, 1), (-1, 0)])
def test_for_bounds_known_at_run_time(start, stop, step):
    out = zeros(3)
    runtime_bounds[(1,)](out, start, stop, STEP=step)
    trips = list(range(start, stop, step))
    expected = [len(trips), sum(k * (n + 1) for n, k in enumerate(trips)), trips[-1] if trips else -99]
    assert_equal(out, torch.tensor(expected, dtype=torch.int32))


@triton.jit
def runtime_step(out_ptr, stop, step):
    total = 0
    for k in range(0, stop, step):
        total = total * 2 + k
    tl.store(out_ptr, total)


@pytest.mark.parametrize(("stop", "step"), [(10, 1), (10, 3), (10, 100), (0, 5)])
def test_for_step_known_at_run_time(stop, step):
    out = zeros(1)
    runtime_step[(1,)](out, stop, step)
    total = 0
    for k in range(0, stop, step):
        total = total * 2 + k
    assert_equal(out, torch.tensor([total], dtype=torch.int32))


@triton.jit
def bounds_from_memory(starts_ptr, x_ptr, out_ptr):
    row = tl.program_id(0)
    total = 0
    for k in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        total += tl.load(x_ptr + k)
    tl.store(out_ptr + row, total)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_for_bounds_loaded_from_memory(dtype):
    starts = torch.tensor([0, 3, 3, 20, 32], dtype=dtype, device=DEVICE)
    x, out = numbers(), zeros(4)
    bounds_from_memory[(4,)](starts, x, out)
    assert_equal(out, torch.stack([x[a:b].sum() for a, b in pairwise(starts.tolist())]).int())


@triton.jit
def carried_pointers(x_ptr, out_ptr, rows, stride, BLOCK: tl.constexpr):
    x_ptrs = x_ptr + tl.arange(0, BLOCK)
    out_ptrs = out_ptr + (rows - 1) * BLOCK + tl.arange(0, BLOCK)
    row_ptr = x_ptr
    for _ in range(rows):
        tl.store(out_ptrs, tl.load(x_ptrs) + tl.load(row_ptr))
        x_ptrs += stride
        row_ptr += stride
        out_ptrs -= BLOCK


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_for_carries_pointers(rows):
    x = numbers(8 * 20).reshape(8, 20)
    out = zeros(max(rows, 1), 16)
    carried_pointers[(1,)](x, out, rows, 20, BLOCK=16)
    expected = (x[:rows, :16] + x[:rows, :1]).flip(0)
    assert_equal(out[:rows], expected)


@triton.jit
def nested(x_ptr, out_ptr, rows, columns):
    total = 0
    high = -1
    for i in range(rows):
        row_total = 0
        for j in range(i, columns):
            value = tl.load(x_ptr + i * columns + j)
            row_total += value
            high = tl.maximum(high, value * (j - i))
        for j in range(0, i, 2):
            row_total -= j
        total = total * 3 + row_total
        tl.store(out_ptr + 2 + i, row_total)
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, high)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 4), (6, 3)])
def test_nested_for(rows, columns):
    x, out = numbers(), zeros(8)
    nested[(1,)](x, out, rows, columns)
    grid, total, high, row_totals = x.cpu().numpy()[: rows * columns].reshape(rows, columns), 0, -1, []
    for i in range(rows):
        row_totals.append(int(grid[i, i:].sum()) - sum(range(0, i, 2)))
        high = max([high, *(int(grid[i, j]) * (j - i) for j in range(i, columns))])
        total = total * 3 + row_totals[-1]
    assert_equal(out, np.array([total, high, *row_totals, *[0] * (6 - rows)]).astype(np.int32))


@triton.jit
def pipelined(x_ptr, out_ptr, n, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, n, BLOCK, num_stages=STAGES):
        acc = acc * 3 + tl.load(x_ptr + start + i, mask=start + i < n, other=1)
    tl.store(out_ptr + i, acc)
    for k in tl.range(4, loop_unroll_factor=2):
        tl.store(out_ptr + BLOCK + k, k * k)
    for k in tl.range(2, 5, num_stages=STAGES):
        tl.store(out_ptr + BLOCK + 4 + k - 2, acc.to(tl.int32).sum() + k)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("n", [0, 5, 16, 100])
def test_tl_range(n, stages):
    x, out = numbers(100), zeros(16 + 4 + 3)
    pipelined[(1,)](x, out, n, STAGES=stages, BLOCK=16)
    padded = np.pad(x.cpu().numpy()[:n], (0, -n % 16), constant_values=1).reshape(-1, 16)
    acc = np.zeros(16, dtype=np.int32)
    for row in padded:
        acc = acc * 3 + row
    expected = [*acc, 0, 1, 4, 9, *(acc.sum() + k for k in (2, 3, 4))]
    assert_equal(out, np.array(expected).astype(np.int32))


@triton.jit
def unrolled(x_ptr, out_ptr, TRIPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    for k in tl.static_range(TRIPS):
        if k % 2 == 0:  # noqa: SIM108 -- known at compile time, branch by branch
            x = x + k
        else:
            x = x * k
    for k in tl.static_range(3, 0, -1):
        x = x * 2 - k
    for k in tl.static_range(2, 12, 5):
        tl.store(out_ptr + k * BLOCK + i, x + k)
    tl.store(out_ptr + i, x)


@pytest.mark.parametrize("trips", [0, 1, 4])
def test_static_range(trips):
    x, out = numbers(16), zeros(8, 16)
    unrolled[(1,)](x, out, TRIPS=trips, BLOCK=16)
    value, expected = x.cpu(), torch.zeros(8, 16, dtype=torch.int32)
    for k in range(trips):
        value = value * k if k % 2 else value + k
    for k in (3, 2, 1):
        value = value * 2 - k
    expected[0], expected[2], expected[7] = value, value + 2, value + 7
    assert_equal(out, expected)


# ---- while ----


@triton.jit
def collatz(x_ptr, out_ptr):
    value = tl.load(x_ptr + tl.program_id(0))
    steps = 0
    while value != 1:
        if value % 2 == 0:  # noqa: SIM108 -- a branch, as the other tests have ternaries
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(out_ptr + tl.program_id(0), steps)


def test_while_with_scalar_state():
    x = torch.arange(1, 20, dtype=torch.int32, device=DEVICE)
    out = zeros(19)
    collatz[(19,)](x, out)

    def steps(value):
        count = 0
        while value != 1:
            value, count = (3 * value + 1 if value % 2 else value // 2), count + 1
        return count

    assert_equal(out, torch.tensor([steps(k) for k in range(1, 20)], dtype=torch.int32))


@triton.jit
def greatest_common_divisor(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    b = tl.load(y_ptr + i)
    while tl.max(b, axis=0) > 0:
        safe = tl.where(b == 0, 1, b)
        a, b = tl.where(b == 0, a, b), tl.where(b == 0, 0, a % safe)
    tl.store(out_ptr + i, a)


def test_while_with_tile_state():
    x, y = numbers(64, 0), numbers(64, 1)
    x[3], y[5], y[40:] = 0, 0, 0
    out = zeros(64)
    greatest_common_divisor[(2,)](x, y, out, BLOCK=32)
    assert_equal(out, torch.gcd(x, y))


@triton.jit
def nested_while(out_ptr, n):
    i = 0
    total = 0
    while i < n:
        j = i
        while j > 0:
            total += j
            j -= 2
        for k in range(i):
            total += k * n
        i += 1
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, i)


@pytest.mark.parametrize("n", [0, 1, 9])
def test_nested_while(n):
    out = zeros(2)
    nested_while[(1,)](out, n)
    total = sum(sum(range(i, 0, -2)) + n * sum(range(i)) for i in range(n))
    assert_equal(out, torch.tensor([total, n], dtype=torch.int32))


@triton.jit
def binary_search(sorted_ptr, wanted_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    wanted = tl.load(wanted_ptr + i)
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + n
    size = n
    while size > 0:
        middle = (low + high) // 2
        inside = low < high
        smaller = (tl.load(sorted_ptr + middle, mask=inside, other=0) < wanted) & inside
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(inside & ~smaller, middle, high)
        size = size // 2
    tl.store(out_ptr + i, low)


@pytest.mark.parametrize("n", [1, 30, 100])
def test_while_with_gathers(n):
    ordered = numbers(n).sort().values
    wanted, out = numbers(64, 1), zeros(64)
    binary_search[(1,)](ordered, wanted, out, n, BLOCK=64)
    assert_equal(out, torch.searchsorted(ordered.cpu(), wanted.cpu()).int())


# ---- if ----


@triton.jit
def branches(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    scale = 1
    if row == 0:
        y = x + 1
        scale = 10
    elif row < n:
        y = x * 2
        if row == 2:
            y = y + 1000
            scale = 20
    else:
        y = -x
    if row == 1:
        tl.store(out_ptr + row * BLOCK + i, y * scale + 5, mask=i < 4)
    else:
        tl.store(out_ptr + row * BLOCK + i, y * scale)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_branches_with_tile_results(n):
    x, out = numbers(16), zeros(5, 16)
    branches[(5,)](x, out, n, BLOCK=16)
    x = x.cpu()
    expected = torch.zeros(5, 16, dtype=torch.int32)
    for row in range(5):
        y, scale = (x + 1, 10) if row == 0 else (x * 2, 1) if row < n else (-x, 1)
        if 0 < row < n and row == 2:
            y, scale = y + 1000, 20
        if row == 1:
            expected[row, :4] = (y * scale + 5)[:4]
        else:
            expected[row] = y * scale
    assert_equal(out, expected)


@triton.jit
def early_return(flags_ptr, out_ptr, n):
    row = tl.program_id(0)
    if row >= n:
        return
    tl.store(out_ptr + row, 1)
    if tl.load(flags_ptr + row) == 0:
        return
    tl.store(out_ptr + row, 2)


def test_early_return():
    flags = torch.tensor([0, 1, 1, 0, 5, 1], dtype=torch.int32, device=DEVICE)
    out = zeros(8)
    early_return[(8,)](flags, out, 6)
    assert_equal(out, torch.tensor([1, 2, 2, 1, 2, 2, 0, 0], dtype=torch.int32))


@triton.jit
def conditions(x_ptr, y_ptr, out_ptr, flag):
    row = tl.program_id(0)
    x, y = tl.load(x_ptr + row), tl.load(y_ptr + row)
    result = 0
    if x > 0 and y > 0:
        result += 1
    if x > 0 or y > 0:
        result += 2
    if not (x > y):
        result += 4
    if (x > 0) & (y < 100) | (x == y):
        result += 8
    if flag:
        result += 16
    result += 32 if x > y else 64
    bigger = x if x > y else y
    tl.store(out_ptr + row, result + 128 * bigger)


@pytest.mark.parametrize("flag", [True, False])
def test_conditions_on_loaded_scalars(flag):
    pairs = [(0, 0), (1, 0), (0, 1), (5, 3), (3, 5), (-1, -2), (7, 200), (200, 7), (-4, 4)]
    x, y = (torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in zip(*pairs, strict=True))
    out = zeros(len(pairs))
    conditions[(len(pairs),)](x, y, out, int(flag))

    def expected(a, b):
        result = 1 * (a > 0 and b > 0) + 2 * (a > 0 or b > 0) + 4 * (not a > b)
        result += 8 * ((a > 0 and b < 100) or a == b) + 16 * flag + (32 if a > b else 64)
        return result + 128 * max(a, b)

    assert_equal(out, torch.tensor([expected(a, b) for a, b in pairs], dtype=torch.int32))


@triton.jit
def branch_in_loop(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    best = tl.load(x_ptr + i)
    at = tl.zeros((BLOCK,), tl.int32)
    changes = 0
    for row in range(1, n):
        x = tl.load(x_ptr + row * BLOCK + i)
        if tl.sum(x) > tl.sum(best):
            best = x
            at = at * 0 + row
            changes += 1
        elif row % 3 == 0:
            changes -= 1
    tl.store(out_ptr + i, best)
    tl.store(out_ptr + BLOCK + i, at)
    tl.store(out_ptr + 2 * BLOCK, changes)


@pytest.mark.parametrize("n", [1, 2, 12])
def test_branches_update_what_a_loop_carries(n):
    x, out = numbers(12 * 16).reshape(12, 16), zeros(33)
    branch_in_loop[(1,)](x, out, n, BLOCK=16)
    rows, best, changes = x.cpu().numpy(), 0, 0
    for row in range(1, n):
        if rows[row].sum() > rows[best].sum():
            best, changes = row, changes + 1
        elif row % 3 == 0:
            changes -= 1
    assert_equal(out, np.concatenate([rows[best], [best] * 16, [changes]]).astype(np.int32))


@triton.jit
def constant_branches(x_ptr, out_ptr, MODE: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if MODE == "double":
        y = x * 2
    elif MODE == "wide":
        y = x.to(tl.int64) << 20  # another dtype than the other branch
    else:
        y = -x
    if BIAS is not None:
        y = y + BIAS
    tl.store(out_ptr + i, y)


@pytest.mark.parametrize("bias", [None, 0, 7])
@pytest.mark.parametrize("mode", ["double", "wide", "other"])
def test_branches_on_constants_are_taken_at_compile_time(mode, bias):
    x, out = numbers(16), zeros(16, dtype=torch.int64)
    constant_branches[(1,)](x, out, MODE=mode, BIAS=bias, BLOCK=16)
    y = {"double": x.long() * 2, "wide": x.long() << 20, "other": -x.long()}[mode]
    assert_equal(out, y + (bias or 0))


@triton.jit
def newton(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    root = x
    moving = tl.full((BLOCK,), 1, tl.int1)
    while tl.sum(moving.to(tl.int32)) > 0:
        closer = (root + x // root) // 2
        moving = closer < root
        root = tl.where(moving, closer, root)
    tl.store(out_ptr + i, root)


def test_while_until_every_lane_has_finished():
    x = torch.arange(1, 65, dtype=torch.int32, device=DEVICE) ** 2 * 3 + 1
    out = zeros(64)
    newton[(1,)](x, out, BLOCK=64)
    assert_equal(out, x.cpu().double().sqrt().floor().int())


@triton.jit
def boolean_state(x_ptr, out_ptr, n):
    found = False
    at = -1
    for k in range(n):
        hit = tl.load(x_ptr + k) % 7 == 0
        at = k if hit and not found else at
        found = found | hit
    tl.store(out_ptr, at)
    tl.store(out_ptr + 1, found)


@pytest.mark.parametrize("n", [0, 3, 32])
def test_boolean_state(n):
    x, out = numbers(32), zeros(2)
    x[:2] = 1
    boolean_state[(1,)](x, out, n)
    hits = [k for k in range(n) if int(x[k]) % 7 == 0]
    assert_equal(out, torch.tensor([hits[0] if hits else -1, bool(hits)], dtype=torch.int32))
