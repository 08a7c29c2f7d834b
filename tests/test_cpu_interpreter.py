"""The interpreter of the CPU target, driven with Triton IR directly: programs, memory, atomics, checks."""

import math
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cpu_interpreter_helpers import addresses, assert_same, build, launch
from tilewright.cpu import interpreter
from tilewright.cpu.interpreter import StorageCheck, interpret
from tilewright.errors import KernelAccessError, KernelAssertionError, UnsupportedKernelError

# Programs and memory


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask) + tl.load(y_ptr + offsets, mask), mask)


@pytest.mark.parametrize("at_once", [1, 64, 1 << 18])
def test_add(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs run together."""
    monkeypatch.setattr(interpreter, "_ELEMENTS_AT_ONCE", at_once)
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1001,), -1.0)
    launch(add_kernel, (63,), x, y, out, 1000, BLOCK=16)
    assert torch.equal(out[:1000], x + y)
    assert out[1000] == -1


@triton.jit
def program_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny = tl.num_programs(0), tl.num_programs(1)
    tl.store(out_ptr + (z * ny + y) * nx + x, x + 10 * y + 100 * z + 1000 * tl.num_programs(2))


def test_program_ids() -> None:
    out = torch.zeros(4, 3, 2, dtype=torch.int32)
    launch(program_kernel, (2, 3, 4), out)
    expected = [[[x + 10 * y + 100 * z + 4000 for x in range(2)] for y in range(3)] for z in range(4)]
    assert out.tolist() == expected


def test_empty_grid_runs_nothing() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    launch(program_kernel, (0, 3, 4), out)
    assert out.item() == 0


@triton.jit
def masked_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask))
    tl.store(out_ptr + BLOCK + offsets, tl.load(x_ptr + offsets, mask, other=7))
    nowhere = tl.cast(tl.cast(0, tl.int64), tl.pointer_type(tl.float32))
    tl.store(out_ptr + 2 * BLOCK + offsets, tl.load(nowhere + offsets, offsets < 0, other=offsets))


def test_masked_elements_are_not_read() -> None:
    x, out = torch.randn(3), torch.empty(24)
    launch(masked_kernel, (1,), x, out, 3, BLOCK=8)
    assert_same(out[:8], torch.cat([x, torch.zeros(5)]))
    assert_same(out[8:16], torch.cat([x, torch.full((5,), 7.0)]))
    assert_same(out[16:], torch.arange(8.0))


def test_unaligned_addresses() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    out = torch.zeros(4, dtype=torch.int32)
    module = build(masked_copy_kernel, (out, out), {"BLOCK": 4})
    interpret(module, (1, 1, 1), [memory.data_ptr() + 1, out.data_ptr()])
    assert out.tolist() == list(struct.unpack("<4i", bytes(range(1, 17))))
    interpret(module, (1, 1, 1), [out.data_ptr(), memory.data_ptr() + 35])
    assert memory.tolist() == [*range(35), *range(1, 17), *range(51, 64)]


@triton.jit
def masked_copy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def indirect_kernel(table_ptr, out_ptr, BLOCK: tl.constexpr):
    pointer = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offsets, tl.load(pointer + offsets))
    tl.store(table_ptr + tl.program_id(0), (pointer + 3).to(tl.int64))


def test_addresses_in_memory() -> None:
    rows = [torch.randn(8) for _ in range(3)]
    table, out = torch.tensor([row.data_ptr() for row in rows]), torch.empty(3, 8)
    launch(indirect_kernel, (3,), table, out, BLOCK=8)
    assert torch.equal(out, torch.stack(rows))
    assert table.tolist() == [row.data_ptr() + 12 for row in rows]


@triton.jit
def truth_kernel(x_ptr, flag_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    flag = tl.load(flag_ptr + offsets)
    tl.store(out_ptr + offsets, flag & (tl.load(x_ptr + offsets) > 0))


def test_truth_values_take_a_byte() -> None:
    x, flag, out = torch.randn(16), torch.arange(16) % 3 == 0, torch.zeros(16, dtype=torch.bool)
    launch(truth_kernel, (1,), x, flag, out, BLOCK=16)
    assert torch.equal(out, flag & (x > 0))


@triton.jit
def block_pointer_kernel(x_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    source = tl.make_block_ptr(x_ptr, (rows, columns), (columns, 1), (2, -1), (ROWS, COLUMNS), (1, 0))
    target = tl.make_block_ptr(out_ptr, (ROWS, 2 * COLUMNS), (2 * COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    for _ in range(2):
        tl.store(target, tl.load(source, boundary_check=(0, 1), padding_option="nan"), boundary_check=(0, 1))
        source = tl.advance(source, (0, COLUMNS))
        target = tl.advance(target, (0, COLUMNS))


@pytest.mark.filterwarnings("ignore:.*make_block_ptr")
@pytest.mark.skipif(not hasattr(tl, "make_block_ptr"), reason="this Triton has no block pointers")
@pytest.mark.parametrize("kept", [False, True], ids=["rewritten", "kept"])
def test_block_pointers(kept: bool) -> None:
    x, out = torch.randn(5, 6), torch.zeros(4, 8)
    launch(block_pointer_kernel, (1,), x, out, 5, 6, ROWS=4, COLUMNS=4, block_pointers=kept)
    expected = torch.full((4, 8), math.nan)
    expected[:3, 1:7] = x[2:]
    assert_same(out, expected)


# Atomics


@triton.jit
def ticket_kernel(counter_ptr, ticket_ptr, sums_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(ticket_ptr + pid, tl.atomic_add(counter_ptr, pid + 1))
    offsets = tl.arange(0, BLOCK)
    old = tl.atomic_add(sums_ptr + offsets % 4, offsets, mask=offsets < BLOCK - 1)
    tl.store(ticket_ptr + tl.num_programs(0) + pid * BLOCK + offsets, old, mask=offsets < BLOCK - 1)


def test_atomics_happen_in_turn() -> None:
    """By program and then by place in the tile, so that what they return can be told."""
    counter, sums = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    ticket = torch.full((5 + 5 * 16,), -1, dtype=torch.int32)
    launch(ticket_kernel, (5,), counter, ticket, sums, BLOCK=16)
    assert ticket[:5].tolist() == [0, 1, 3, 6, 10]
    assert counter.item() == 15
    expected, old = [0] * 4, []
    for _ in range(5):
        for k in range(15):
            old.append(expected[k % 4])
            expected[k % 4] += k
        old.append(-1)
    assert ticket[5:].tolist() == old
    assert sums.tolist() == expected


@triton.jit
def contended_kernel(x_ptr, memory_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    place = memory_ptr + offsets % 3
    if OP == "add":
        tl.atomic_add(place, x)
    elif OP == "max":
        tl.atomic_max(place, x)
    elif OP == "min":
        tl.atomic_min(place, x)
    elif OP == "and":
        tl.atomic_and(place, x)
    elif OP == "or":
        tl.atomic_or(place, x)
    elif OP == "xor":
        tl.atomic_xor(place, x)
    else:
        tl.atomic_xchg(place, x)


@pytest.mark.parametrize(
    ("dtype", "operation"),
    [
        (d, o)
        for d in (torch.int32, torch.uint32, torch.int64)
        for o in ("add", "max", "min", "and", "or", "xor", "xchg")
    ]
    + [(torch.float32, o) for o in ("add", "max", "min", "xchg")],
    ids=str,
)
def test_contended_atomics(dtype: torch.dtype, operation: str) -> None:
    if dtype == torch.float32:
        x, memory = torch.randn(64), torch.tensor([0.5, -0.25, 0.0])
    else:
        x = (
            torch.randint(0, 2**32, (64,)).to(torch.int32).view(dtype)
            if dtype.itemsize == 4
            else torch.randint(-9, 9, (64,))
        )
        memory = torch.tensor([5, 2**31 - 1, 0], dtype=dtype)
    number = {"float32": np.float32}.get(str(dtype)[6:], int)
    combine = {
        "add": lambda a, b: a + b, "max": max, "min": min, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b, "xchg": lambda a, b: b,
    }[operation]  # fmt: skip
    expected = [number(v) for v in memory.tolist()]
    for k, value in enumerate(x.tolist()):
        expected[k % 3] = combine(expected[k % 3], number(value))
    launch(contended_kernel, (4,), x, memory, OP=operation, BLOCK=16)
    if dtype != torch.float32:
        bits = torch.iinfo(dtype).bits
        assert [v % 2**bits for v in memory.tolist()] == [v % 2**bits for v in expected]
    else:
        assert memory.tolist() == expected


@triton.jit
def swap_kernel(memory_ptr, old_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(old_ptr + offsets, tl.atomic_cas(memory_ptr + offsets // 4, offsets, offsets + 1))


def test_compare_and_swap_in_turn() -> None:
    memory, old = torch.tensor([0, 4, 9, 12], dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    launch(swap_kernel, (1,), memory, old, BLOCK=16)
    assert memory.tolist() == [4, 8, 12, 16]
    assert old.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 9, 10, 11, 12, 13, 14, 15]


@triton.jit
def lock_kernel(lock_ptr, count_ptr, BLOCK: tl.constexpr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    offsets = tl.arange(0, BLOCK)
    tl.store(count_ptr + offsets, tl.load(count_ptr + offsets) + 1)
    tl.atomic_xchg(lock_ptr, 0)


def test_programs_that_wait_for_a_lock() -> None:
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    launch(lock_kernel, (20,), lock, count, BLOCK=8)
    assert count.tolist() == [20] * 8


# What the user sees


@triton.jit
def print_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if tl.program_id(1) == 1:
        tl.device_print("x is", x)


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    launch(print_kernel, (1, 2), torch.tensor([1.5, -2.0]), BLOCK=2)
    assert capsys.readouterr().out.splitlines() == [
        "pid (0, 1, 0) idx (0) x is: 1.500000",
        "pid (0, 1, 0) idx (1) x is: -2.000000",
    ]


@triton.jit
def assert_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if tl.program_id(0) > 0:
        tl.device_assert(x > 0, "must be positive")
    tl.store(out_ptr + offsets, x)


def test_assertion() -> None:
    x, out = torch.ones(4, 8), torch.zeros(4, 8)
    x[0, 1] = -1  # in a program that does not come by the assertion
    launch(assert_kernel, (4,), x, out, BLOCK=8)
    assert torch.equal(x, out)
    x[2, 5] = -1
    with pytest.raises(KernelAssertionError, match="must be positive") as error:
        launch(assert_kernel, (4,), x, out, BLOCK=8)
    assert "program (2, 0, 0), index (5,)" in str(error.value)
    assert 'tl.device_assert(x > 0, "must be positive")' in str(error.value)
    assert __file__ in str(error.value)


@triton.jit
def assembly_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + tl.arange(0, BLOCK), y)


def test_unsupported_operations_are_named() -> None:
    x = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(UnsupportedKernelError, match=r"tt\.elementwise_inline_asm") as error:
        launch(assembly_kernel, (1,), x, BLOCK=8)
    assert "tl.inline_asm_elementwise(" in str(error.value)


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(ValueError, match="takes 1 arguments, not 2"):
        interpret(build(assembly_kernel, [torch.zeros(1, dtype=torch.int32)], {"BLOCK": 8}), (1, 1, 1), [0, 0])


# Checked accesses


def storage(*tensors: torch.Tensor) -> StorageCheck:
    return StorageCheck([(t.data_ptr(), t.numel() * t.itemsize) for t in tensors])


def test_accesses_inside_pass() -> None:
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    launch(add_kernel, (63,), x, y, out, 1000, check=storage(x, y, out), BLOCK=16)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("which", ["load", "store"])
def test_access_outside_is_named(which: str) -> None:
    memory = torch.randn(64)
    short = memory[: 3 * 16 + 5]  # the memory behind it exists, and must stay as it is
    whole = torch.randn(64)
    before = memory.clone()
    x, out = (short, whole) if which == "load" else (whole, short)
    with pytest.raises(KernelAccessError) as error:
        launch(add_kernel, (4,), x, x, out, 64, check=storage(short, whole), BLOCK=16)
    message = str(error.value)
    assert f"{which} of 4 bytes" in message
    assert "program (3, 0, 0), index (5,)" in message
    assert "at byte 212 of one of 212 bytes" in message
    assert "tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask)" in message
    if which == "load":
        assert torch.equal(memory, before)
    else:
        assert torch.equal(memory[53:], before[53:])


def test_access_before_a_tensor() -> None:
    memory = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(KernelAccessError, match="4 bytes before one of 28 bytes"):
        interpret(
            build(masked_copy_kernel, (memory, memory), {"BLOCK": 4}),
            (1, 1, 1),
            [memory.data_ptr() + 4, memory.data_ptr()],
            check=storage(memory[1:]),
        )


def test_atomics_are_checked() -> None:
    memory = torch.zeros(4, dtype=torch.int32)
    x = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(KernelAccessError, match=r"atomic of 4 bytes.*index \(2,\)"):
        launch(contended_kernel, (1,), x, memory, check=storage(x, memory[:2]), OP="add", BLOCK=16)
    assert memory.tolist() == [0] * 4


def test_an_access_across_the_end_is_outside() -> None:
    memory = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(KernelAccessError, match="load of 4 bytes"):
        interpret(
            build(masked_copy_kernel, (x := torch.zeros(4, dtype=torch.int32), x), {"BLOCK": 4}),
            (1, 1, 1),
            addresses([memory, x]),
            check=StorageCheck([(memory.data_ptr(), 15), (x.data_ptr(), 16)]),
        )
