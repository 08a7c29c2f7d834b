"""The order in which a program's effects show: state that a loop carries, and stores that meet."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, assert_equal, gpu_differs


@triton.jit
def tile_by_scalar(out_ptr, n, BLOCK: tl.constexpr):
    tile = tl.arange(0, BLOCK)
    step = n
    for _ in range(n):
        tile = tile + step  # the step of this round, not of the next
        step = step + 1
    tl.store(out_ptr + tl.arange(0, BLOCK), tile)


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_a_carried_tile_moves_by_a_carried_scalar(n):
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    tile_by_scalar[(1,)](out, n, BLOCK=4)
    assert_equal(out, (np.arange(4) + sum(range(n, 2 * n))).astype(np.int32))


@triton.jit
def pointers_by_scalar(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pointers = x_ptr + tl.arange(0, BLOCK)
    step = BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(n):
        total += tl.load(pointers)
        pointers += step
        step = step * 2
    tl.store(out_ptr + tl.arange(0, BLOCK), total)


def test_carried_pointers_move_by_a_carried_scalar():
    x = torch.arange(64, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    pointers_by_scalar[(1,)](x, out, 4, BLOCK=4)
    starts = np.array([0, 4, 12, 28])
    assert_equal(out, (starts[:, None] + np.arange(4)).sum(0).astype(np.int32))


@triton.jit
def two_stores(out_ptr, stride, distance, n, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    pointers = out_ptr + i * stride + j
    tl.store(pointers, i * 100 + j, mask=j < n)
    tl.store(pointers + distance, -(i * 100 + j) - 1, mask=j < n)


@gpu_differs("threads of one program race for an address")
@pytest.mark.parametrize("n", [16, 11])
@pytest.mark.parametrize("distance", [16, 5, 32])
@pytest.mark.parametrize("stride", [64, 32, 16])
def test_of_two_stores_that_meet_the_later_one_stays(stride, distance, n):
    out = torch.zeros(8 * 64 + 64, dtype=torch.int32, device=DEVICE)
    expected = np.zeros(out.numel(), dtype=np.int32)
    two_stores[(1,)](out, stride, distance, n, M=8, N=16)
    for shift, sign, less in ((0, 1, 0), (distance, -1, 1)):
        for i in range(8):
            for j in range(n):
                expected[i * stride + j + shift] = sign * (i * 100 + j) - less
    assert_equal(out, expected)


@triton.jit
def two_constant_stores(out_ptr, stride, M: tl.constexpr, N: tl.constexpr, DISTANCE: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    pointers = out_ptr + i * stride + j
    tl.store(pointers, i * 100 + j)
    tl.store(pointers + DISTANCE, -(i * 100 + j) - 1)


@gpu_differs("threads of one program race for an address")
@pytest.mark.parametrize("distance", [16, 5, 32, 64])
@pytest.mark.parametrize("stride", [128, 64, 48, 33, 32, 16])
def test_stores_a_constant_distance_apart(stride, distance):
    """Both may run side by side only where they cannot meet."""
    out = torch.zeros(8 * 128 + 128, dtype=torch.int32, device=DEVICE)
    two_constant_stores[(1,)](out, stride, M=8, N=16, DISTANCE=distance)
    expected = np.zeros(out.numel(), dtype=np.int32)
    for shift, sign, less in ((0, 1, 0), (distance, -1, 1)):
        for i in range(8):
            for j in range(16):
                expected[i * stride + j + shift] = sign * (i * 100 + j) - less
    assert_equal(out, expected)
