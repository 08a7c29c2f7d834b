"""The interpreter of the CPU target: tiles, and control flow that differs between programs."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cpu_interpreter_helpers import assert_rounded, launch
from tilewright.cpu import reader
from tilewright.cpu.interpreter import interpret

# Control flow that differs between programs


@triton.jit
def counted_loop_kernel(start_ptr, stop_ptr, step_ptr, out_ptr):
    pid = tl.program_id(0)
    total = 0
    last = -1
    for i in range(tl.load(start_ptr + pid), tl.load(stop_ptr + pid), tl.load(step_ptr + pid)):
        total += i * i
        last = i
    tl.store(out_ptr + 2 * pid, total)
    tl.store(out_ptr + 2 * pid + 1, last)


def test_loop_bounds_differ() -> None:
    bounds = [(0, 5, 1), (3, 3, 1), (7, 2, 1), (-4, 9, 3), (2, 12, 5), (0, 1, 100)]
    start, stop, step = (torch.tensor(column, dtype=torch.int32) for column in zip(*bounds, strict=True))
    out = torch.zeros(6, 2, dtype=torch.int32)
    launch(counted_loop_kernel, (6,), start, stop, step, out)
    assert out.tolist() == [[sum(i * i for i in range(*b)), [-1, *range(*b)][-1]] for b in bounds]


@triton.jit
def collatz_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid)
    steps = 0
    tile = tl.arange(0, BLOCK)
    while x != 1:
        if x % 2 == 0:
            x = x // 2
            tile += 1
        else:
            x = 3 * x + 1
            tile = tile * 2
        steps += 1
    tl.store(out_ptr + pid * (BLOCK + 1), steps)
    tl.store(out_ptr + pid * (BLOCK + 1) + 1 + tl.arange(0, BLOCK), tile)


def test_while_and_if_differ() -> None:
    numbers = [1, 2, 3, 6, 7, 12]
    out = torch.zeros(len(numbers), 5, dtype=torch.int32)
    launch(collatz_kernel, (len(numbers),), torch.tensor(numbers, dtype=torch.int32), out, BLOCK=4)
    for row, number in zip(out.tolist(), numbers, strict=True):
        steps, x, tile = 0, number, [0, 1, 2, 3]
        while x != 1:
            tile = [t + 1 if x % 2 == 0 else t * 2 for t in tile]
            x = x // 2 if x % 2 == 0 else 3 * x + 1
            steps += 1
        assert row == [steps, *tile]


@triton.jit
def early_return_kernel(x_ptr, out_ptr, n):
    pid = tl.program_id(0)
    if pid >= n:
        return
    x = tl.load(x_ptr + pid)
    if x < 0:
        tl.store(out_ptr + pid, -1)
        return
    tl.store(out_ptr + pid, x + 1)


def test_early_return() -> None:
    x = torch.tensor([3, -5, 0, -1, 9], dtype=torch.int32)
    out = torch.full((8,), 77, dtype=torch.int32)
    launch(early_return_kernel, (8,), x, out, 5)
    assert out.tolist() == [4, -1, 1, -1, 10, 77, 77, 77]


@triton.jit(noinline=True)
def clipped(x, limit):
    if x > limit:
        return limit
    return x


@triton.jit
def calling_kernel(x_ptr, out_ptr, limit):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid, clipped(tl.load(x_ptr + pid), limit) + clipped(pid, 2))


def test_functions_that_are_not_inlined() -> None:
    x, out = torch.tensor([1, 9, 4, 7], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    launch(calling_kernel, (4,), x, out, 5)
    assert out.tolist() == [min(v, 5) + min(k, 2) for k, v in enumerate(x.tolist())]


def test_blocks_that_branch_back() -> None:
    """A loop of branches, left after as many rounds as the program's id, and a function with two ends."""
    table, out = torch.tensor([10, 20, 30, 40], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    text = """
    "builtin.module"() ({
      "tt.func"() <{function_type = (i32) -> i32, sym_name = "f", sym_visibility = "private"}> ({
      ^bb0(%x: i32):
        %limit = "arith.constant"() <{value = 2 : i32}> : () -> i32 loc(unknown)
        %small = "arith.cmpi"(%x, %limit) <{predicate = 2 : i64}> : (i32, i32) -> i1 loc(unknown)
        "cf.cond_br"(%small)[^bb1, ^bb2] <{operandSegmentSizes = array<i32: 1, 0, 0>}> : (i1) -> () loc(unknown)
      ^bb1:
        "tt.return"(%limit) : (i32) -> () loc(unknown)
      ^bb2:
        "tt.return"(%x) : (i32) -> () loc(unknown)
      }) : () -> () loc(unknown)
      "tt.func"() <{function_type = (!tt.ptr<i32>) -> (), sym_name = "k", sym_visibility = "public"}> ({
      ^bb0(%p: !tt.ptr<i32>, %table: !tt.ptr<i32>):
        %pid = "tt.get_program_id"() <{axis = 0 : i32}> : () -> i32 loc(unknown)
        %one = "arith.constant"() <{value = 1 : i32}> : () -> i32 loc(unknown)
        %at = "tt.addptr"(%p, %pid) : (!tt.ptr<i32>, i32) -> !tt.ptr<i32> loc(unknown)
        %rounds = "tt.call"(%pid) <{callee = @f}> : (i32) -> i32 loc(unknown)
        "cf.br"(%rounds, %pid)[^bb1] : (i32, i32) -> () loc(unknown)
      ^bb1(%left: i32, %place: i32):
        %from = "tt.addptr"(%table, %place) : (!tt.ptr<i32>, i32) -> !tt.ptr<i32> loc(unknown)
        %seen = "tt.load"(%from) <{operandSegmentSizes = array<i32: 1, 0, 0>}> : (!tt.ptr<i32>) -> i32 loc(unknown)
        %more = "arith.cmpi"(%left, %one) <{predicate = 4 : i64}> : (i32, i32) -> i1 loc(unknown)
        "cf.cond_br"(%more)[^bb2, ^bb3] <{operandSegmentSizes = array<i32: 1, 0, 0>}> : (i1) -> () loc(unknown)
      ^bb2:
        %less = "arith.subi"(%left, %one) : (i32, i32) -> i32 loc(unknown)
        %back = "arith.subi"(%place, %one) : (i32, i32) -> i32 loc(unknown)
        "cf.br"(%less, %back)[^bb1] : (i32, i32) -> () loc(unknown)
      ^bb3:
        %sum = "arith.addi"(%seen, %rounds) : (i32, i32) -> i32 loc(unknown)
        "tt.store"(%at, %sum) : (!tt.ptr<i32>, i32) -> () loc(unknown)
        "tt.return"() : () -> () loc(unknown)
      }) : () -> () loc(unknown)
    }) : () -> () loc(unknown)
    """
    storage = torch.cat([torch.tensor([7], dtype=torch.int32), table])  # program 0 goes one back as well
    interpret(reader.read(text), (4, 1, 1), [out.data_ptr(), storage.data_ptr() + 4])
    rounds = [max(2, pid) for pid in range(4)]
    places = [pid - (r - 1) for pid, r in enumerate(rounds)]
    assert out.tolist() == [storage[1 + place].item() + r for place, r in zip(places, rounds, strict=True)]


@triton.jit
def scalar_choice(x, y):
    if x > 0:  # noqa: SIM108 (the branch is what is tested)
        z = x * y
    else:
        z = x - y
    return z, x


@triton.jit
def map_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    z, x = tl.map_elementwise(scalar_choice, tl.load(x_ptr + offsets), tl.load(y_ptr + offsets))
    tl.store(out_ptr + offsets, z)
    tl.store(out_ptr + BLOCK + offsets, x)


@triton.jit
def pair_swap(a, b):
    return b, a


@triton.jit
def pack_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    (swapped,) = tl.map_elementwise(pair_swap, tl.load(x_ptr + offsets), pack=2)
    tl.store(out_ptr + offsets, swapped)


@pytest.mark.skipif(not hasattr(tl, "map_elementwise"), reason="this Triton has no tl.map_elementwise")
def test_map_elementwise() -> None:
    x, y = torch.arange(-8, 8, dtype=torch.int32), torch.arange(16, dtype=torch.int32)
    out = torch.zeros(32, dtype=torch.int32)
    launch(map_kernel, (1,), x, y, out, BLOCK=16)
    assert out.tolist() == [a * b if a > 0 else a - b for a, b in zip(x.tolist(), y.tolist(), strict=True)] + x.tolist()
    launch(pack_kernel, (1,), x, out, BLOCK=16)
    assert out[:16].tolist() == x.reshape(8, 2).flip(1).reshape(-1).tolist()


# Tiles


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, where_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(sum_ptr + tl.arange(0, ROWS), tl.sum(x, 1))
    largest, where = tl.max(x, 0, return_indices=True)
    tl.store(max_ptr + tl.arange(0, COLUMNS), largest)
    tl.store(where_ptr + tl.arange(0, COLUMNS), where)


def test_reductions() -> None:
    x = torch.randint(-2, 3, (64, 32)).float()  # so few values that the largest is found more than once
    sums, largest, where = torch.zeros(64), torch.zeros(32), torch.zeros(32, dtype=torch.int32)
    launch(reduce_kernel, (1,), x, sums, largest, where, ROWS=64, COLUMNS=32)
    assert torch.equal(sums, x.sum(1))
    assert torch.equal(largest, x.amax(0))
    assert where.tolist() == np.argmax(x.numpy(), axis=0).tolist()


def test_sum_of_floats() -> None:
    x, sums, unused = torch.randn(8, 1024), torch.zeros(8), torch.zeros(1024)
    launch(reduce_kernel, (1,), x, sums, unused, torch.zeros(1024, dtype=torch.int32), ROWS=8, COLUMNS=1024)
    # Each number takes part in ten additions, as they are paired.
    assert_rounded(sums, x.double().sum(1), x.double().abs().sum(1), 10)


@triton.jit
def compose(a1, b1, a2, b2):
    """First x -> a1 x + b1, then x -> a2 x + b2: associative, and the order matters."""
    return a1 * a2, b1 * a2 + b2


@triton.jit
def compose_kernel(a_ptr, b_ptr, scan_ptr, total_ptr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    scanned, added = tl.associative_scan((a, b), 1, compose, reverse=REVERSE)
    tl.store(scan_ptr + offsets, scanned)
    tl.store(scan_ptr + ROWS * COLUMNS + offsets, added)
    product, added = tl.reduce((a, b), 1, compose)
    tl.store(total_ptr + tl.arange(0, ROWS), product)
    tl.store(total_ptr + ROWS + tl.arange(0, ROWS), added)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_and_reduce_with_any_function(reverse: bool) -> None:
    a, b = (torch.randint(-50, 50, (4, 16), dtype=torch.int64) for _ in range(2))
    scan, total = torch.zeros(2, 4, 16, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    launch(compose_kernel, (1,), a, b, scan, total, REVERSE=reverse, ROWS=4, COLUMNS=16)

    def steps(row_a: list[int], row_b: list[int]) -> list[tuple[int, int]]:
        found, product, added = [], 1, 0
        for x, y in zip(row_a, row_b, strict=True):
            product, added = product * x, added * x + y
            found.append(((product + 2**63) % 2**64 - 2**63, (added + 2**63) % 2**64 - 2**63))
        return found

    for row in range(4):
        forward = steps(a[row].tolist(), b[row].tolist())
        assert (total[0, row].item(), total[1, row].item()) == forward[-1]
        backward = steps(a[row].flip(0).tolist(), b[row].flip(0).tolist())[::-1]
        expected = backward if reverse else forward
        assert list(zip(scan[0, row].tolist(), scan[1, row].tolist(), strict=True)) == expected


@triton.jit
def shape_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets).reshape(4, 2, BLOCK // 8)
    turned = tl.permute(x, 2, 0, 1).reshape(BLOCK)
    even, odd = tl.split(turned.reshape(BLOCK // 2, 2))
    half = tl.arange(0, BLOCK // 2)
    tl.store(out_ptr + half, even)
    tl.store(out_ptr + BLOCK // 2 + half, odd)
    tl.store(out_ptr + BLOCK + offsets, tl.join(odd, even).reshape(BLOCK))
    tl.store(out_ptr + 2 * BLOCK + offsets, tl.cat(odd, even, can_reorder=True))
    tl.store(out_ptr + 3 * BLOCK + offsets, tl.gather(turned, (offsets * 5 + 3) % BLOCK, 0))
    tl.store(out_ptr + 4 * BLOCK + offsets, (half[:, None] + tl.arange(0, 2)[None, :] * 100).reshape(BLOCK))


def test_shapes() -> None:
    x, out = torch.randperm(32, dtype=torch.int32), torch.zeros(5, 32, dtype=torch.int32)
    launch(shape_kernel, (1,), x, out, BLOCK=32)
    turned = x.reshape(4, 2, 4).permute(2, 0, 1).reshape(32)
    even, odd = turned[0::2], turned[1::2]
    assert torch.equal(out[0], torch.cat([even, odd]))
    assert torch.equal(out[1], torch.stack([odd, even], 1).reshape(32))
    assert sorted(out[2].tolist()) == sorted(x.tolist())  # in any order
    assert torch.equal(out[3], turned[(torch.arange(32) * 5 + 3) % 32])
    assert out[4].tolist() == [k // 2 + 100 * (k % 2) for k in range(32)]


@triton.jit
def histogram_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(x, BINS, mask=offsets < n))


def test_histogram() -> None:
    x, out = torch.randint(0, 8, (2, 64), dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
    launch(histogram_kernel, (2,), x, out, 100, BLOCK=64, BINS=8)
    assert torch.equal(out[0], torch.bincount(x[0], minlength=8).int())
    assert torch.equal(out[1], torch.bincount(x[1, :36], minlength=8).int())


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BATCH: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    if BATCH:
        batch = tl.arange(0, BATCH)[:, None, None]
        a = tl.load(a_ptr + batch * M * K + m[None] * K + k[None, None, :])
        b = tl.load(b_ptr + batch * K * N + k[None, :, None] * N + n[None])
        tl.store(c_ptr + batch * M * N + m[None] * N + n[None], tl.dot(a, b, out_dtype=c_ptr.dtype.element_ty))
    else:
        a = tl.load(a_ptr + tl.program_id(0) * M * K + m * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + n)
        c = tl.dot(a, b, out_dtype=c_ptr.dtype.element_ty)
        tl.store(c_ptr + tl.program_id(0) * M * N + m * N + n, c)


@pytest.mark.parametrize("batch", [0, 4])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2], ids=str
)
def test_dot(dtype: torch.dtype, batch: int) -> None:
    left, right = (4, 16, 32), (batch or 1, 32, 8)
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, shape, dtype=dtype) for shape in (left, right))
    else:
        a, b = (torch.randn(shape).to(dtype) for shape in (left, right))
    accumulator = {torch.int8: torch.int32, torch.float64: torch.float64}.get(dtype, torch.float32)
    c = torch.zeros(4, 16, 8, dtype=accumulator)
    launch(dot_kernel, (1,) if batch else (4,), a, b, c, M=16, N=8, K=32, BATCH=batch)
    exact = a.double() @ b.double()
    if dtype == torch.int8:
        assert torch.equal(c, exact.int())
    else:
        assert_rounded(c, exact, a.double().abs() @ b.double().abs(), 64 if dtype == torch.float64 else 2)
