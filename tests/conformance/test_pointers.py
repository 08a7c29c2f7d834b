"""Pointers as values: aliasing, choice, addresses, tables; conversions on store; and grids."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import (
    BOOL,
    DEVICE,
    DTYPES,
    FLOAT8,
    assert_equal,
    from_bits,
    interpreter_gap,
    random,
    random_bits,
)


def untouched(shape, dtype):
    """A tensor whose every byte is 0x5A, which shows where no kernel wrote."""
    size = torch.empty(0, dtype=dtype.torch).element_size()
    raw = np.full(np.prod(shape) * size, 0x5A, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype.torch).reshape(shape).to(DEVICE)


@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask), mask=mask)


@triton.jit
def backwards(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    source = x_ptr + n - 1 - i
    target = out_ptr + i
    for start in range(0, n, BLOCK):
        tl.store(target, tl.load(source, mask=start + i < n), mask=start + i < n)
        source -= BLOCK
        target += BLOCK


@pytest.mark.parametrize("n", [1, 16, 50])
def test_pointers_that_go_backwards(n):
    x = random_bits(DTYPES["float32"], n)
    out = untouched(n, DTYPES["float32"])
    backwards[(1,)](x, out, n, BLOCK=16)
    assert_equal(out, x.flip(0))


@triton.jit
def add_into(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x + y, mask=i < n)


@pytest.mark.parametrize("case", ["x twice", "in place", "all one"])
def test_one_tensor_for_several_arguments(case):
    x, y = random(DTYPES["float32"], 100), random(DTYPES["float32"], 100, seed=1)
    x_before, y_before = x.clone(), y.clone()
    if case == "x twice":
        out, expected = torch.empty_like(x), x_before + x_before
        add_into[(4,)](x, x, out, 100, BLOCK=32)
    elif case == "in place":
        out, expected = x, x_before + y_before
        add_into[(4,)](x, y, x, 100, BLOCK=32)
    else:
        out, expected = x, x_before + x_before
        add_into[(4,)](x, x, x, 100, BLOCK=32)
    assert_equal(out, expected)


@pytest.mark.parametrize("shift", [1, -1, 5, 16, -16])
def test_a_tile_is_loaded_before_its_overlapping_store(shift):
    # One program whose one tile covers everything: memmove, not memcpy. One warp, as warps do not wait for each other.
    x = random_bits(DTYPES["int32"], 128)
    expected = x.clone()
    source, target = (16, 16 + shift)
    expected[target : target + 64] = x[source : source + 64]
    copy[(1,)](x[source:], x[target:], 64, BLOCK=64, num_warps=1)
    assert_equal(x, expected)


@triton.jit
def running_copy(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for step in range(steps):
        x = tl.load(x_ptr + step * BLOCK + i)
        tl.debug_barrier()
        tl.store(out_ptr + step * BLOCK + i, x + 1)
        tl.debug_barrier()


@pytest.mark.parametrize("shift", [1, 7, 16, 24])
def test_a_store_is_seen_by_the_loads_of_later_trips(shift):
    x = random(DTYPES["int32"], 160) % 1000
    expected = x.cpu().numpy().copy()
    for start in range(0, 128, 16):
        expected[start + shift : start + shift + 16] = expected[start : start + 16] + 1
    running_copy[(1,)](x, x[shift:], 8, BLOCK=16)
    assert_equal(x, expected)


@triton.jit
def swap(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    y = tl.load(y_ptr + i, mask=mask)
    tl.store(x_ptr + i, y, mask=mask)
    tl.store(y_ptr + i, x, mask=mask)


def test_swap_in_place():
    x, y = random_bits(DTYPES["float32"], 64), random_bits(DTYPES["float32"], 64, seed=1)
    x_before, y_before = x.clone(), y.clone()
    swap[(1,)](x, y, 50, BLOCK=64)
    assert_equal(x, torch.cat([y_before[:50], x_before[50:]]))
    assert_equal(y, torch.cat([x_before[:50], y_before[50:]]))


@triton.jit
def store_then_load(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    before = tl.load(x_ptr + i)
    tl.store(x_ptr + i, before * 2)
    tl.debug_barrier()
    same = tl.load(x_ptr + i)
    other = tl.load(x_ptr + (BLOCK - 1 - i))
    tl.store(x_ptr + i, same + 1, mask=i % 2 == 0)
    tl.debug_barrier()
    after = tl.load(x_ptr + i)
    tl.store(out_ptr + i, before)
    tl.store(out_ptr + BLOCK + i, other)
    tl.store(out_ptr + 2 * BLOCK + i, after)


def test_a_load_after_a_store_sees_it():
    x = random(DTYPES["int32"], 64) % 1000
    before = x.clone()
    out = torch.empty(3, 64, dtype=torch.int32, device=DEVICE)
    store_then_load[(1,)](x, out, BLOCK=64)
    even = torch.arange(64, device=DEVICE) % 2 == 0
    after = torch.where(even, before * 2 + 1, before * 2)
    assert_equal(out, torch.stack([before, before.flip(0) * 2, after]))
    assert_equal(x, after)


@triton.jit
def last_store_wins(out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, i)
    tl.store(out_ptr + i, i + 100, mask=i > 3)
    tl.store(out_ptr + i, i + 200, mask=i > 7)


def test_later_stores_of_a_program_win():
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    last_store_wins[(1,)](out, BLOCK=16)
    assert_equal(out, torch.tensor([i + 100 * (i > 3) + 100 * (i > 7) for i in range(16)], dtype=torch.int32))


@triton.jit
def add_one(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "uint64", "float16", "float64"])
def test_update_in_place(dtype):
    x = (torch.arange(100) % 50).to(DTYPES[dtype].torch).to(DEVICE)
    expected = ((torch.arange(100) % 50) + (torch.arange(100) < 77)).to(x.dtype)
    add_one[(3,)](x, 77, BLOCK=32)
    assert_equal(x, expected)


@triton.jit
def chosen_pointer(x_ptr, y_ptr, out_ptr, choice, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointer = y_ptr
    if choice > 0:
        pointer = x_ptr
    tl.store(out_ptr + i, tl.load(pointer + i))
    tl.store(out_ptr + BLOCK + i, tl.load(tl.where(i % 2 == 0, x_ptr + i, y_ptr + (BLOCK - 1 - i))))
    start = x_ptr if choice > 2 else y_ptr
    tl.store(out_ptr + 2 * BLOCK + i, tl.load(start + i))


@pytest.mark.parametrize("choice", [0, 2, 3])
def test_pointers_chosen_at_run_time(choice):
    x, y = random_bits(DTYPES["float32"], 32), random_bits(DTYPES["float32"], 32, seed=1)
    out = untouched((3, 32), DTYPES["float32"])
    chosen_pointer[(1,)](x, y, out, choice, BLOCK=32)
    even = torch.arange(32, device=DEVICE) % 2 == 0
    mixed = torch.where(even, x.view(torch.int32), y.flip(0).view(torch.int32)).view(torch.float32)
    assert_equal(out, torch.stack([x if choice > 0 else y, mixed, x if choice > 2 else y]))


@triton.jit
def from_tuple(pointers, sizes, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in tl.static_range(len(sizes)):
        mask = i < sizes[k]
        tl.store(pointers[2] + k * BLOCK + i, tl.load(pointers[k] + i, mask=mask, other=0), mask=mask)


def test_pointers_in_a_tuple():
    x, y = random(DTYPES["float32"], 32), random(DTYPES["float16"], 20)
    out = torch.zeros(64, dtype=torch.float32, device=DEVICE)
    from_tuple[(1,)]((x, y, out), (31, 20), BLOCK=32)
    expected = torch.zeros_like(out)
    expected[:31], expected[32:52] = x[:31], y.float()
    assert_equal(out, expected)


@triton.jit
def optional_bias(x_ptr, bias_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i)
    tl.store(out_ptr + i, x)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_pointer_may_be_none(with_bias):
    x, bias = random(DTYPES["float32"], 32), random(DTYPES["float32"], 32, seed=1)
    out = torch.empty_like(x)
    optional_bias[(1,)](x, bias if with_bias else None, out, BLOCK=32)
    assert_equal(out, x + bias if with_bias else x)


@triton.jit
def with_hints(
    x_ptr,
    out_ptr,
    LOAD: tl.constexpr,
    STORE: tl.constexpr,
    EVICT: tl.constexpr,
    VOLATILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, cache_modifier=LOAD, eviction_policy=EVICT, volatile=VOLATILE)
    tl.store(out_ptr + i, x, cache_modifier=STORE, eviction_policy=EVICT)


@pytest.mark.parametrize(
    ("load", "store", "evict", "volatile"),
    [
        (".ca", ".wb", "", False),
        (".cg", ".cg", "", False),
        (".cv", ".cs", "", False),
        ("", ".wt", "", False),
        ("", "", "evict_first", False),
        ("", "", "evict_last", False),
        ("", "", "", True),
    ],
)
def test_cache_hints_do_not_change_values(load, store, evict, volatile):
    x = random_bits(DTYPES["float32"], 128)
    out = untouched(128, DTYPES["float32"])
    with_hints[(1,)](x, out, LOAD=load, STORE=store, EVICT=evict, VOLATILE=volatile, BLOCK=128)
    assert_equal(out, x)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "float16"),
        ("float32", "float64"),
        ("float64", "float32"),
        ("float32", "int32"),
        ("float32", "int8"),
        ("int32", "float32"),
        ("int32", "int64"),
        ("int64", "int16"),
        ("uint8", "int32"),
        ("int8", "int64"),
        ("uint32", "int64"),
        ("bool", "int32"),
        ("bool", "float32"),
        ("int32", "float16"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        pytest.param("float32", "bfloat16", marks=interpreter_gap("rounds float32 to bfloat16 towards zero")),
    ],
)
def test_a_store_converts_to_the_pointer_type(source, target):
    source, target = DTYPES[source], DTYPES[target]
    x = random(source, 128)
    if source.is_float and not target.is_float:
        x = x * 40  # truncated towards zero, within every target's range
    if source.name == "int32" and target.is_float:
        x = x % 5000
    out = untouched(128, target)
    copy[(1,)](x, out, 128, BLOCK=128)
    assert_equal(out, x.cpu().to(target.torch))


@triton.jit
def compare(x_ptr, flags_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    flags = tl.load(flags_ptr + i)
    greater = tl.load(x_ptr + i) > 0
    tl.store(out_ptr + i, greater & flags)
    tl.store(out_ptr + BLOCK + i, tl.where(flags, greater, ~greater))


def test_boolean_tensors():
    x, flags = random(DTYPES["float32"], 64), random(BOOL, 64)
    out = torch.zeros(2, 64, dtype=torch.bool, device=DEVICE)
    compare[(1,)](x, flags, out, BLOCK=64)
    assert_equal(out, torch.stack([(x > 0) & flags, torch.where(flags, x > 0, x <= 0)]))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_widens_exactly(dtype):
    x = from_bits(np.arange(256), dtype).to(DEVICE)
    x = x[torch.isfinite(x.float())] if not dtype.name.endswith("e5") else x[:0x7C]
    out = torch.zeros(x.numel(), dtype=torch.float32, device=DEVICE)
    copy[(4,)](x, out, x.numel(), BLOCK=64)
    assert_equal(out, x.float())


@triton.jit
def through_address(address, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x_ptr = address.to(tl.int64).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0))


@triton.jit
def through_integers(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    addresses = (x_ptr + i).to(tl.int64) + 4 * (i % 2)  # the right neighbour of every odd element
    words = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    moved = addresses.to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + i, tl.load(moved))
    tl.store(out_ptr + BLOCK + i, (tl.load(words + i) & 0x7FFFFFFF).to(tl.float32, bitcast=True))


def test_an_address_as_an_integer_argument():
    x = random_bits(DTYPES["float32"], 32)
    out = untouched(32, DTYPES["float32"])
    through_address[(1,)](x.data_ptr(), out, 20, BLOCK=32)
    expected = x.clone()
    expected[20:] = 0
    assert_equal(out, expected)


def test_pointers_to_integers_and_back():
    x = random(DTYPES["float32"], 33)
    out = untouched((2, 32), DTYPES["float32"])
    through_integers[(1,)](x, out, BLOCK=32)
    i = torch.arange(32, device=DEVICE)
    assert_equal(out, torch.stack([x[i + i % 2], x[:32].abs()]))


@triton.jit
def pointer_table(table_ptr, lengths_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr + row).to(tl.pointer_type(tl.float16))
    x = tl.load(x_ptr + i, mask=i < tl.load(lengths_ptr + row), other=-1.0)
    tl.store(out_ptr + row * BLOCK + i, x)


def test_pointers_loaded_from_a_table():
    rows = [random(DTYPES["float16"], n, seed=n) for n in (3, 32, 17)]
    table = torch.tensor([r.data_ptr() for r in rows], dtype=torch.int64, device=DEVICE)
    lengths = torch.tensor([r.numel() for r in rows], dtype=torch.int32, device=DEVICE)
    out = untouched((3, 32), DTYPES["float16"])
    pointer_table[(3,)](table, lengths, out, BLOCK=32)
    expected = torch.full((3, 32), -1.0, dtype=torch.float16)
    for k, row in enumerate(rows):
        expected[k, : row.numel()] = row.cpu()
    assert_equal(out, expected)


@triton.jit
def grid_shape(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny, nz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    at = out_ptr + ((z * ny + y) * nx + x) * 6
    tl.store(at, x)
    tl.store(at + 1, y)
    tl.store(at + 2, z)
    tl.store(at + 3, nx)
    tl.store(at + 4, ny)
    tl.store(at + 5, nz)


@pytest.mark.parametrize("grid", [(1,), (7,), (3, 5), (3, 5, 2), (1, 1, 6), (2, 1, 3)])
def test_every_program_of_the_grid_runs_once(grid):
    nx, ny, nz = (*grid, 1, 1)[:3]
    out = torch.full((nz, ny, nx, 6), -1, dtype=torch.int32, device=DEVICE)
    grid_shape[grid](out)
    expected = [[[[x, y, z, nx, ny, nz] for x in range(nx)] for y in range(ny)] for z in range(nz)]
    assert_equal(out, torch.tensor(expected, dtype=torch.int32))


def test_a_grid_may_be_a_function_of_the_constants():
    x = random_bits(DTYPES["int32"], 100)
    out = untouched(100, DTYPES["int32"])
    copy[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, out, 100, BLOCK=16)
    assert_equal(out, x)


def test_an_empty_grid_runs_nothing():
    out = untouched(4, DTYPES["int32"])
    expected = out.clone()
    last_store_wins[(0,)](out, BLOCK=4)
    last_store_wins[(2, 0)](out, BLOCK=4)
    assert_equal(out, expected)


@triton.jit
def broadcast_store(out_ptr, value, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    tl.store(out_ptr + i * N + j, value)
    tl.store(out_ptr + M * N + i * N + j, j * 3)
    tl.store(out_ptr + 2 * M * N + i * N + j, i * 5, mask=j > i)


def test_stored_values_broadcast_to_the_tile():
    out = torch.full((3, 4, 8), -1, dtype=torch.int32, device=DEVICE)
    broadcast_store[(1,)](out, 42, M=4, N=8)
    i, j = np.meshgrid(np.arange(4), np.arange(8), indexing="ij")
    expected = np.stack([np.full((4, 8), 42), j * 3, np.where(j > i, i * 5, -1)])
    assert_equal(out, expected.astype(np.int32))


@triton.jit
def same_address(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i * 0) + tl.load(x_ptr + i // 4))


def test_many_lanes_read_one_address():
    x = random(DTYPES["int32"], 8) % 1000
    out = untouched(32, DTYPES["int32"])
    same_address[(1,)](x, out, BLOCK=32)
    assert_equal(out, x[0] + x.repeat_interleave(4))
