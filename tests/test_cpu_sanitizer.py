"""TILEWRIGHT_CPU_SANITIZE=1: accesses outside of the tensors' storages are reported, others are not."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cpu_target_helpers import EXECUTORS, line_of, on_the_processor
from tilewright.errors import KernelAccessError


@pytest.fixture(autouse=True)
def _on_the_processor():
    with on_the_processor():
        yield


@pytest.fixture(params=EXECUTORS)
def checked(request, monkeypatch):
    """Accesses are checked, on each executor."""
    monkeypatch.setenv("TILEWRIGHT_CPU_EXECUTOR", request.param)
    monkeypatch.setenv("TILEWRIGHT_CPU_SANITIZE", "1")
    return request.param


def amid(n, fill=7, around=64):
    """A tensor whose storage is its own, and the memory before, in and after it to look at."""
    memory = np.full(around + n + around, fill, dtype=np.int32)
    return torch.frombuffer(part(memory, around, n), dtype=torch.int32), memory


def part(memory, start, n):
    return memoryview(memory)[start : start + n]


@triton.jit
def copy(x_ptr, out_ptr, n_read, n_written, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n_read, other=-1)
    tl.store(out_ptr + i, x, mask=i < n_written)


@triton.jit
def read_at(x_ptr, out_ptr, index):
    tl.store(out_ptr, tl.load(x_ptr + index))


@triton.jit
def write_at(x_ptr, index, value):
    tl.store(x_ptr + index, value)


@triton.jit
def add_at(x_ptr, index_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, i < n, other=0)
    tl.atomic_add(x_ptr + index, 1, mask=i < n)


@triton.jit
def swap_at(x_ptr, index):
    tl.atomic_cas(x_ptr + index, 7, 8)


@triton.jit
def scale_rows(x_ptr, scale_ptr, out_ptr, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        x = tl.load(x_ptr + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], (row < n)[:, None], 0.0)
        total += x * tl.load(scale_ptr + row, row < n, 0.0)[:, None]
    tl.store(out_ptr + tl.arange(0, BLOCK_N), tl.sum(total, axis=0))


def rejected(launch, kernel, text, program, *words):
    """The launch is rejected; the message names line, program and place."""
    with pytest.raises(KernelAccessError) as caught:
        launch()
    message = str(caught.value)
    file, number, line, _ = line_of(kernel, text)
    assert message.startswith(f"{file}:{number}:")
    assert line.strip() in message
    numbers = [tuple(map(int, found.split(", "))) for found in re.findall(r"program \((\d+, \d+, \d+)\)", message)]
    assert numbers == [program]
    for word in words:
        assert re.search(word, message), message
    assert isinstance(caught.value, IndexError)


def test_a_load_past_the_end(checked):
    x, _ = amid(40)
    out = torch.zeros(48, dtype=torch.int32)
    # The third program reads elements 32 to 47 of 40.
    rejected(lambda: copy[(3,)](x, out, 48, 48, BLOCK=16), copy, "tl.load(", (2, 0, 0), r"\b40\b", r"x_ptr")


def test_a_store_past_the_end_leaves_other_memory_alone(checked):
    x = torch.arange(48, dtype=torch.int32)
    out, memory = amid(40)
    rejected(lambda: copy[(3,)](x, out, 48, 48, BLOCK=16), copy, "tl.store(", (2, 0, 0), r"\b40\b", r"out_ptr")
    assert (memory[:64] == 7).all()
    assert (memory[-64:] == 7).all()


@pytest.mark.parametrize("index", [-1, -60, 40, 100])
def test_the_index_is_named(checked, index):
    """Elements of the argument's storage, counted from its start."""
    x, memory = amid(40)
    out = torch.zeros(1, dtype=torch.int32)
    rejected(lambda: read_at[(1,)](x, out, index), read_at, "tl.load(", (0, 0, 0), rf"index {index}\b", r"x_ptr")
    rejected(lambda: write_at[(1,)](x, index, 5), write_at, "tl.store(", (0, 0, 0), rf"index {index}\b", r"x_ptr")
    assert not out.any()
    assert (memory == 7).all()


def test_an_atomic_past_the_end(checked):
    x, memory = amid(40)
    index = torch.tensor([0, 39, 40, 3], dtype=torch.int32)
    rejected(lambda: add_at[(1,)](x, index, 4, BLOCK=4), add_at, "tl.atomic_add(", (0, 0, 0), r"index 40\b", r"x_ptr")
    assert (memory[-64:] == 7).all()
    rejected(lambda: swap_at[(1,)](x, 41), swap_at, "tl.atomic_cas(", (0, 0, 0), r"index 41\b", r"x_ptr")
    assert (memory[-64:] == 7).all()


def test_lanes_that_are_masked_off_may_point_anywhere(checked):
    x, memory = amid(40)
    out, _ = amid(40)
    copy[(3,)](x, out, 40, 40, BLOCK=16)
    assert torch.equal(out, x)
    add_at[(1,)](x, torch.tensor([0, 39, 40_000, -9], dtype=torch.int32), 2, BLOCK=4)
    assert x.tolist() == [8, *[7] * 38, 8]
    assert (memory[:64] == 7).all()
    assert (memory[-64:] == 7).all()


def test_kernels_within_bounds_give_the_same(checked):
    x = torch.arange(1000, dtype=torch.int32)
    out = torch.zeros(1000, dtype=torch.int32)
    copy[(16,)](x, out, 1000, 900, BLOCK=64)
    assert torch.equal(out[:900], x[:900])
    assert not out[900:].any()


def test_a_view_reaches_its_storage_and_no_further(checked):
    """Strided views and padding are the kernel's business; the storage is what there is."""
    storage, _ = amid(40)
    storage.copy_(torch.arange(40))
    view, out = storage[10:20], torch.zeros(1, dtype=torch.int32)
    for index in (-10, 0, 9, 10, 29):
        read_at[(1,)](view, out, index)
        assert out.item() == 10 + index
    write_at[(1,)](view, 29, 77)
    assert storage[39] == 77
    rejected(lambda: read_at[(1,)](view, out, 30), read_at, "tl.load(", (0, 0, 0), r"index 40\b")
    rejected(lambda: read_at[(1,)](view, out, -11), read_at, "tl.load(", (0, 0, 0), r"index -1\b")


@triton.jit
def straddle(x_ptr, out_ptr, offset):
    wide = (x_ptr.to(tl.pointer_type(tl.int8)) + offset).to(tl.pointer_type(tl.int64))
    tl.store(out_ptr, tl.load(wide))


def test_an_element_that_is_half_inside(checked):
    x, _ = amid(4)
    out = torch.zeros(1, dtype=torch.int64)
    straddle[(1,)](x, out, 8)
    assert out.item() == 7 << 32 | 7
    rejected(lambda: straddle[(1,)](x, out, 12), straddle, "tl.load(", (0, 0, 0))


@triton.jit
def shared_by_two(x_ptr, y_ptr, out_ptr, index):
    tl.store(out_ptr, tl.load(x_ptr + index) + tl.load(y_ptr + index))


def test_the_argument_that_is_nearest_is_named(checked):
    memory = np.full(400, 7, dtype=np.int32)
    x = torch.frombuffer(part(memory, 0, 40), dtype=torch.int32)
    y = torch.frombuffer(part(memory, 200, 20), dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.int32)
    shared_by_two[(1,)](x, y, out, 19)
    assert out.item() == 14
    rejected(lambda: shared_by_two[(1,)](x, y, out, 25), shared_by_two, "tl.load(", (0, 0, 0), r"index 25\b", "y_ptr")


def test_switching_the_check_in_one_process(monkeypatch):
    """Kernels that check and kernels that do not are kept apart, in memory and on disk."""
    kernel = triton.JITFunction(write_at.fn)
    for executor in EXECUTORS * 2:
        monkeypatch.setenv("TILEWRIGHT_CPU_EXECUTOR", executor)
        for check in ("0", "1", "0"):
            memory = np.full(12, 7, dtype=np.int32)
            x = torch.frombuffer(part(memory, 0, 4), dtype=torch.int32)
            monkeypatch.setenv("TILEWRIGHT_CPU_SANITIZE", check)
            if check == "1":
                with pytest.raises(KernelAccessError):
                    kernel[(1,)](x, 5, 1)
                assert memory[5] == 7
            else:
                kernel[(1,)](x, 5, 1)  # past the storage, but memory of ours
                assert memory[5] == 1


def test_a_column_that_is_spread_over_a_tile(checked):
    x, scale, out = torch.arange(48.0).reshape(6, 8), torch.arange(1.0, 7.0), torch.empty(8)
    scale_rows[(1,)](x, scale, out, 6, BLOCK_M=4, BLOCK_N=8)
    assert torch.equal(out, (x * scale[:, None]).sum(0))
    with pytest.raises(KernelAccessError, match="scale_ptr"):
        scale_rows[(1,)](x, scale[:5].clone(), out, 6, BLOCK_M=4, BLOCK_N=8)
