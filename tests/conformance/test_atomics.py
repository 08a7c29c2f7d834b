"""Atomic read-modify-writes: their results, what they return, and many programs at once."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, DTYPES, assert_equal, interpreter_gap, needs, random, random_bits, skip_if_interpreted

BFLOAT16 = pytest.param("bfloat16", marks=interpreter_gap("has no bfloat16 atomics"))
UNIQUE = 64


@triton.jit
def read_modify_write(
    x_ptr, value_ptr, old_ptr, n, OP: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    mask = i < n
    value = tl.load(value_ptr + i)
    if OP == "add":
        old = tl.atomic_add(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "max":
        old = tl.atomic_max(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "min":
        old = tl.atomic_min(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "and":
        old = tl.atomic_and(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "or":
        old = tl.atomic_or(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "xor":
        old = tl.atomic_xor(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    else:
        old = tl.atomic_xchg(x_ptr + i, value, mask=mask, sem=SEM, scope=SCOPE)
    tl.store(old_ptr + i, old, mask=mask)


FUNCTIONS = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "xchg": lambda old, new: new,
}


def check(op, x, value, n, sem=None, scope=None):
    before = x.cpu().numpy().copy()
    expected = before.copy()
    expected[:n] = FUNCTIONS[op](before[:n], value.cpu().numpy()[:n])
    old = torch.zeros_like(x)
    read_modify_write[(1,)](x, value, old, n, op, sem, scope, BLOCK=x.numel())
    assert_equal(x, expected)
    assert_equal(old[:n], before[:n])
    assert_equal(old[n:], np.zeros_like(before[n:]))


@pytest.mark.parametrize("n", [UNIQUE, 41])
@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "uint64"])
def test_integer_operations(dtype, op, n):
    dtype = DTYPES[dtype]
    check(op, random_bits(dtype, UNIQUE), random_bits(dtype, UNIQUE, seed=1), n)


@pytest.mark.parametrize("n", [UNIQUE, 41])
@pytest.mark.parametrize("op", ["add", "max", "min", "xchg"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_operations(dtype, op, n):
    if op == "xchg":
        skip_if_interpreted("exchanges no floats")
    if (dtype, op) == ("float64", "min"):
        skip_if_interpreted("returns the old bits as a number")
    dtype = DTYPES[dtype]
    x, value = random(dtype, UNIQUE), random(dtype, UNIQUE, seed=1)
    x[:4] = torch.tensor([math.inf, -math.inf, 1.0, -1.0])
    value[:4] = torch.tensor([1.0, 1.0, math.inf, -math.inf])
    check(op, x, value, n)


@pytest.mark.parametrize("n", [UNIQUE, 41])
def test_float16_addition_rounds_as_one_operation(n):
    check("add", random(DTYPES["float16"], UNIQUE), random(DTYPES["float16"], UNIQUE, seed=1), n)


@pytest.mark.parametrize("n", [UNIQUE, 41])
@interpreter_gap("has no bfloat16 atomics")
def test_bfloat16_addition_rounds_as_one_operation(n):
    x, value = random(DTYPES["bfloat16"], UNIQUE), random(DTYPES["bfloat16"], UNIQUE, seed=1)
    before, old = x.clone(), torch.zeros_like(x)
    read_modify_write[(1,)](x, value, old, n, "add", None, None, BLOCK=UNIQUE)
    live = torch.arange(UNIQUE, device=DEVICE) < n
    assert_equal(x, torch.where(live, before + value, before))
    assert_equal(old, torch.where(live, before, torch.zeros_like(before)))


@pytest.mark.parametrize("scope", ["gpu", "cta", "sys"])
@pytest.mark.parametrize("sem", ["acquire", "release", "acq_rel", "relaxed"])
def test_memory_orders_and_scopes(sem, scope):
    x, value = random_bits(DTYPES["int32"], UNIQUE), random_bits(DTYPES["int32"], UNIQUE, seed=1)
    check("add", x, value, 50, sem, scope)


@triton.jit
def scalar_updates(x_ptr, old_ptr, wanted):
    tl.store(old_ptr, tl.atomic_add(x_ptr, 5))
    tl.store(old_ptr + 1, tl.atomic_add(x_ptr, 7, mask=wanted > 0))
    tl.store(old_ptr + 2, tl.atomic_max(x_ptr, 100))
    tl.store(old_ptr + 3, tl.atomic_xchg(x_ptr, -1))
    tl.store(old_ptr + 4, tl.atomic_cas(x_ptr, -1, 8))
    tl.store(old_ptr + 5, tl.atomic_cas(x_ptr, -1, 9))
    tl.atomic_xor(x_ptr, 3)


@pytest.mark.parametrize("wanted", [0, 3])
def test_scalar_updates(wanted):
    x = torch.tensor([10, 77], dtype=torch.int32, device=DEVICE)
    old = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    scalar_updates[(1,)](x, old, wanted)
    known = [0, 2, 3, 4, 5] if not wanted else range(6)  # a masked atomic returns nothing in particular
    expected = torch.tensor([10, 15, 22 if wanted else 15, 100, -1, 8], dtype=torch.int32)
    assert_equal(old[list(known)], expected[list(known)])
    assert_equal(x, torch.tensor([8 ^ 3, 77], dtype=torch.int32))


@triton.jit
def compare_and_swap(x_ptr, expected_ptr, value_ptr, old_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    old = tl.atomic_cas(x_ptr + i, tl.load(expected_ptr + i), tl.load(value_ptr + i), sem="acq_rel")
    tl.store(old_ptr + i, old)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "float32", "float64"])
def test_compare_and_swap_of_tiles(dtype):
    dtype = DTYPES[dtype]
    x, value = random(dtype, UNIQUE), random(dtype, UNIQUE, seed=1)
    even = torch.arange(UNIQUE, device=DEVICE) % 2 == 0
    wanted, before = x.clone(), x.clone()
    wanted[1::2] = value[1::2]
    old = torch.zeros_like(x)
    compare_and_swap[(1,)](x, wanted, value, old, BLOCK=UNIQUE)
    expected = before.clone()
    expected[0::2] = value[0::2]
    assert even.sum() == UNIQUE // 2
    assert_equal(x, expected)
    assert_equal(old, before)


@triton.jit
def accumulate(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(out_ptr, tl.sum(x, axis=0))  # one per program
    tl.atomic_add(out_ptr + 1 + i * 0, x, mask=i < n)  # one per element, all of one address
    tl.atomic_add(out_ptr + 2 + tl.arange(0, BLOCK), x)  # one per column


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "float32", "float64"])
def test_contended_sums(dtype):
    n, block = 1000, 32
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 1000, n)).to(DTYPES[dtype].torch)
    out = torch.zeros(2 + block, dtype=x.dtype, device=DEVICE)
    accumulate[(triton.cdiv(n, block),)](x.to(DEVICE), out, n, BLOCK=block)
    wide = x.double()
    columns = torch.nn.functional.pad(wide, (0, -n % block)).reshape(-1, block).sum(0)
    assert_equal(out, torch.cat([wide.sum()[None], wide.sum()[None], columns]).to(x.dtype))


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16])
def test_contended_sums_in_16_bits(dtype):
    n, block = 120, 32
    x = torch.ones(n, device=DEVICE).to(DTYPES[dtype].torch)  # sums up to 120 are exact
    out = torch.zeros(2 + block, dtype=x.dtype, device=DEVICE)
    accumulate[(triton.cdiv(n, block),)](x, out, n, BLOCK=block)
    columns = torch.full((block,), n // block) + (torch.arange(block) < n % block)
    assert_equal(out, torch.cat([torch.tensor([n, n]), columns]).to(x.dtype))


@triton.jit
def extremes_of_all(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_max(out_ptr + i * 0, x, mask=i < n)
    tl.atomic_min(out_ptr + 1 + i * 0, x, mask=i < n)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float32", "float64"])
def test_contended_extremes(dtype):
    dtype = DTYPES[dtype]
    x = random(dtype, 500)
    out = x[:1].repeat(2)
    extremes_of_all[(16,)](x, out, 500, BLOCK=32)
    values = x.cpu().numpy()
    assert_equal(out, np.array([values.max(), values.min()], dtype=values.dtype))


@triton.jit
def tickets(counter_ptr, seen_ptr, BLOCK: tl.constexpr):
    mine = tl.atomic_add(counter_ptr, 1)
    tl.store(seen_ptr + mine, tl.program_id(0))
    lanes = tl.atomic_add(counter_ptr + 1 + tl.zeros((BLOCK,), tl.int32), 1)
    tl.store(seen_ptr + tl.num_programs(0) + lanes, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))


def test_every_ticket_is_given_once():
    programs, block = 50, 16
    counters = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    seen = torch.full((programs * (1 + block),), -1, dtype=torch.int32, device=DEVICE)
    tickets[(programs,)](counters, seen, BLOCK=block)
    assert_equal(counters, torch.tensor([programs, programs * block], dtype=torch.int32))
    assert_equal(seen[:programs].sort().values, torch.arange(programs, dtype=torch.int32))
    assert_equal(seen[programs:].sort().values, torch.arange(programs * block, dtype=torch.int32))


@triton.jit
def count_values(x_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(counts_ptr + x, tl.full((BLOCK,), 1, tl.int32), mask=i < n)


def test_scattered_counts():
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 10, 700).astype(np.int64))
    counts = torch.zeros(10, dtype=torch.int32, device=DEVICE)
    count_values[(triton.cdiv(700, 64),)](x.to(DEVICE), counts, 700, BLOCK=64)
    assert_equal(counts, torch.bincount(x, minlength=10).int())


@triton.jit
def locked_update(x_ptr, data_ptr, lock_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + i)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    count = tl.load(lock_ptr + 1, volatile=True)
    data = tl.load(data_ptr + i, volatile=True)
    tl.debug_barrier()
    tl.store(data_ptr + i, data * 3 + x)  # mod 2**32, so the order shows
    tl.store(lock_ptr + 2 + count, tl.program_id(0))
    tl.store(lock_ptr + 1, count + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_lock_protects_an_update_across_programs():
    programs, block = 32, 64
    x = random(DTYPES["int32"], (programs, block))
    data = torch.zeros(block, dtype=torch.int32, device=DEVICE)
    lock = torch.full((2 + programs,), -1, dtype=torch.int32, device=DEVICE)
    lock[:2] = 0
    locked_update[(programs,)](x, data, lock, BLOCK=block)
    order = lock[2:].tolist()
    assert sorted(order) == list(range(programs))
    expected = np.zeros(block, dtype=np.int32)
    for program in order:
        expected = expected * np.int32(3) + x[program].cpu().numpy()
    assert_equal(data, expected)
    assert lock[:2].tolist() == [0, programs]


@triton.jit
def last_program_sums(x_ptr, partial_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(partial_ptr + row, tl.sum(x, axis=0))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == PROGRAMS - 1:
        parts = tl.load(partial_ptr + tl.arange(0, PROGRAMS), volatile=True)
        tl.store(out_ptr, tl.sum(parts, axis=0))


def test_the_last_program_sees_what_the_others_stored():
    x = random(DTYPES["int32"], (32, 64)) % 1000
    partial, count, out = (torch.zeros(k, dtype=torch.int32, device=DEVICE) for k in (32, 1, 1))
    last_program_sums[(32,)](x, partial, count, out, BLOCK=64, PROGRAMS=32)
    assert_equal(out, x.sum()[None].int())


@triton.jit
def exchange_chain(x_ptr, old_ptr):
    row = tl.program_id(0)
    tl.store(old_ptr + row, tl.atomic_xchg(x_ptr, row + 1))


def test_exchanges_lose_no_value():
    x = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    old = torch.full((40,), -1, dtype=torch.int64, device=DEVICE)
    exchange_chain[(40,)](x, old)
    assert_equal(torch.cat([old, x]).sort().values, torch.arange(41))


@triton.jit
def broadcast_updates(x_ptr, old_ptr, rows, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    at = i * N + j
    old = tl.atomic_add(x_ptr + at, i + 1, mask=i < rows)  # value and mask of one column for the whole tile
    tl.store(old_ptr + at, old, mask=i < rows)
    tl.atomic_max(x_ptr + at, 5, mask=j > 3)


def test_values_and_masks_broadcast_to_the_tile():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (8, 16)).astype(np.int32)).to(DEVICE)
    before, old = x.clone(), torch.full_like(x, -1)
    broadcast_updates[(1,)](x, old, 6, M=8, N=16)
    i, j = torch.arange(8, device=DEVICE)[:, None], torch.arange(16, device=DEVICE)[None, :]
    expected = torch.where(i < 6, before + i + 1, before).int()
    assert_equal(x, torch.where(j > 3, expected.clamp(min=5), expected))
    assert_equal(old, torch.where(i < 6, before, -1))


@triton.jit
def atomic_copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.atomic_load(x_ptr + i, mask=i < n, sem="acquire")
    tl.atomic_store(out_ptr + i, x, mask=i < n, sem="release")


@needs("tl.atomic_load")
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_atomic_loads_and_stores(dtype):
    x = random_bits(DTYPES[dtype], UNIQUE)
    out = torch.zeros_like(x)
    atomic_copy[(1,)](x, out, 50, BLOCK=UNIQUE)
    expected = torch.zeros_like(x)
    expected[:50] = x[:50]
    assert_equal(out, expected)
