"""The Triton kernel of a linear layer from FP8 with block scales."""

# The bodies of jit functions are Triton's language, not Python's types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilewright.bench.fp8_linear import GROUP


class Launch(NamedTuple):
    """Launch parameters.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile, all within one block of the weight.
        warps: of a program.
        stages: tiles of the operands that are under way at once.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


def launch_of(m: int) -> Launch:
    """Launch parameters for ``m`` rows: few rows are a read of the weight, which narrow tiles spread over the chip."""
    if m <= 16:
        return Launch(16, 32, 4, 6)
    if m <= 64:
        return Launch(64, 32, 4, 5)
    return Launch(128, 128, 8, 3)


@triton.jit
def block_scaled_linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    y_ptr,
    stride_x_row,
    stride_x_scale_row,
    stride_x_scale_group,
    stride_weight_row,
    stride_weight_scale_row,
    n_rows,
    n_out,
    n_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUPER_M: tl.constexpr,
):
    """One tile of ``y = (x * x_scale) @ (weight * weight_scale).T``: each group's product is scaled as it is added."""
    tiles_m, tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N)
    program = tl.program_id(0)
    first = program // (SUPER_M * tiles_n) * SUPER_M  # programs that share rows and columns run together
    height = tl.minimum(tiles_m - first, SUPER_M)
    within = program % (SUPER_M * tiles_n)
    row = ((first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    col_start = within // height * BLOCK_N
    col = (col_start + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)
    row_mask, col_mask = row < n_rows, col < n_out
    x_ptrs = x_ptr + row[:, None] * stride_x_row + k[None, :]
    weight_ptrs = weight_ptr + col[None, :] * stride_weight_row + k[:, None]
    x_scale_ptrs = x_scale_ptr + row * stride_x_scale_row
    weight_scale_ptrs = weight_scale_ptr + (col_start // BLOCK_K).to(tl.int64) * stride_weight_scale_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(tl.cdiv(n_in, BLOCK_K)):
        left = n_in - group * BLOCK_K
        x = tl.load(x_ptrs, row_mask[:, None] & (k[None, :] < left), 0.0)  # [BLOCK_M, BLOCK_K] fp8
        weight = tl.load(weight_ptrs, col_mask[None, :] & (k[:, None] < left), 0.0)  # [BLOCK_K, BLOCK_N] fp8
        x_scale = tl.load(x_scale_ptrs + group * stride_x_scale_group, row_mask, 0.0)  # [BLOCK_M] fp32
        weight_scale = tl.load(weight_scale_ptrs + group)
        total += tl.dot(x, weight) * (x_scale * weight_scale)[:, None]
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    y_ptrs = y_ptr + row[:, None] * n_out + col[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), row_mask[:, None] & col_mask[None, :])


def block_scaled_linear(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """See :func:`tilewright.bench.fp8_linear.fp8_linear`."""
    (m, k), n = values.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=torch.bfloat16, device=values.device)
    chosen = launch_of(m)
    tiles = triton.cdiv(m, chosen.block_m) * triton.cdiv(n, chosen.block_n)
    block_scaled_linear_kernel[(tiles,)](
        values,
        scales,
        weight,
        weight_scales,
        y,
        values.stride(0),
        scales.stride(0),
        scales.stride(1),
        weight.stride(0),
        weight_scales.stride(0),
        m,
        n,
        k,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=GROUP,
        SUPER_M=8,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return y
