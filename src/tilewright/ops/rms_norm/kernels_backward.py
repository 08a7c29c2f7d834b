"""The Triton kernels of RMSNorm, backward.

Two ways. Rows that fit into the registers of one program, with the sums for the weight's gradient beside them, take one
launch of programs that each walk over a block of rows: the next rows are loaded while the present ones are finished.
Longer rows, and all rows on a CPU, take two: gradients row by row, then the weight's gradient in column tiles, which
read everything a second time.

The weight's gradient is summed by each program over its rows, in order, and then over the programs, in order: the same
bits in every run on the same device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.rms_norm.kernels import COMPUTE, load_weight, row_offset, tile, tile_mask
from tilewright.ops.rms_norm.launch import SumBlock, backward_block, row_block, sum_block
from tilewright.ops.rows import Rows, contiguous_twin, rows
from tilewright.platforms import facts

if TYPE_CHECKING:
    from tilewright.ops.rms_norm.call import GradInputs, RmsNormCall, Runner, Tensors
    from tilewright.platforms import DeviceFacts


@triton.jit
def _pair_sum(first_1, second_1, first_2, second_2):
    return first_1 + first_2, second_1 + second_2


@triton.jit
def _load_z(z_ptr, residual_ptr, z_row, residual_row, column, mask, COMPUTE: tl.constexpr):
    """One chunk of what the norm was taken of, [BLOCK_M, CHUNK], in the narrowest dtype that holds it."""
    z = tl.load(z_ptr + tile(z_row, column), mask, 0.0)
    if residual_ptr is not None:
        z = z.to(COMPUTE) + tl.load(residual_ptr + tile(residual_row, column), mask, 0.0).to(COMPUTE)
    return z


@triton.jit
def _weighted(grad, weight, WEIGHT_OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    """The gradient of the norm before its weight multiplied, [BLOCK_M, CHUNK]."""
    grad = grad.to(COMPUTE)
    if weight is not None:
        weight = weight.to(COMPUTE)
        if WEIGHT_OFFSET != 0:
            weight += WEIGHT_OFFSET
        grad = grad * weight[None, :]
    return grad


@triton.jit
def _row_factors(squares, products, N_COLS: tl.constexpr, EPS: tl.constexpr):
    """1 / rms of each row, r, and mean(g * n) with n = z * r, both [BLOCK_M]."""
    square_sum, product_sum = tl.reduce((squares, products), 1, _pair_sum)
    rstd = tl.rsqrt(square_sum / N_COLS + EPS)
    return rstd, product_sum * rstd / N_COLS


@triton.jit
def _store_grad(
    grad_x_ptr, grad_residual_ptr, grad_stored_ptr, grad_x_row, grad_residual_row, grad_stored_row, column, mask,
    g, z, rstd, mean, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Finish and store one chunk of the gradient of ``z``, once for each dtype that it is wanted in."""
    grad_z = rstd[:, None] * (g - z * rstd[:, None] * mean[:, None])
    if grad_stored_ptr is not None:
        grad_z += tl.load(grad_stored_ptr + tile(grad_stored_row, column), mask, 0.0).to(COMPUTE)
    tl.store(grad_x_ptr + tile(grad_x_row, column), grad_z.to(grad_x_ptr.dtype.element_ty), mask)
    if grad_residual_ptr is not None:
        value = grad_z.to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + tile(grad_residual_row, column), value, mask)


@triton.jit
def _load_rows(
    grad_ptr, z_ptr, residual_ptr, row, end, n_inner,
    stride_grad_outer, stride_grad_inner, stride_z_outer, stride_z_inner, stride_residual_outer, stride_residual_inner,
    N_COLS: tl.constexpr, COMPUTE: tl.constexpr, TWO_LEVELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All chunks of the gradient and of ``z``, zeros for rows from ``end`` on."""
    grad_row = row_offset(row, n_inner, stride_grad_outer, stride_grad_inner, TWO_LEVELS)
    z_row = row_offset(row, n_inner, stride_z_outer, stride_z_inner, TWO_LEVELS)
    residual_row = row_offset(row, n_inner, stride_residual_outer, stride_residual_inner, TWO_LEVELS)
    grads = ()
    zs = ()
    for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
        column = c * CHUNK + tl.arange(0, CHUNK)
        mask = tile_mask(row < end, column, N_COLS, CHUNK)
        grads = grads + (tl.load(grad_ptr + tile(grad_row, column), mask, 0.0),)  # noqa: RUF005
        zs = zs + (_load_z(z_ptr, residual_ptr, z_row, residual_row, column, mask, COMPUTE),)  # noqa: RUF005
    return grads, zs


@triton.jit
def rows_backward_kernel(
    grad_ptr, grad_stored_ptr, z_ptr, residual_ptr, weight_ptr, grad_x_ptr, grad_residual_ptr, partial_ptr,
    stride_grad_outer, stride_grad_inner, stride_grad_stored_outer, stride_grad_stored_inner,
    stride_z_outer, stride_z_inner, stride_residual_outer, stride_residual_inner,
    stride_grad_x_outer, stride_grad_x_inner, stride_grad_residual_outer, stride_grad_residual_inner,
    n_rows, n_inner, rows_per_program,
    N_COLS: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    COMPUTE: tl.constexpr, DTYPE: tl.constexpr, TWO_LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All gradients of a block of rows; of the weight's, the sum over these rows, in ``partial_ptr [programs, N]``."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(first + rows_per_program, n_rows)
    sums = ()
    weights = ()
    for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
        sums = sums + (tl.zeros((BLOCK_M, CHUNK), COMPUTE),)  # noqa: RUF005
        if weight_ptr is not None:
            weights = weights + (load_weight(weight_ptr, c * CHUNK + tl.arange(0, CHUNK), N_COLS),)  # noqa: RUF005
    grads, zs = _load_rows(
        grad_ptr, z_ptr, residual_ptr, first + tl.arange(0, BLOCK_M), end, n_inner,
        stride_grad_outer, stride_grad_inner, stride_z_outer, stride_z_inner,
        stride_residual_outer, stride_residual_inner, N_COLS, COMPUTE, TWO_LEVELS, CHUNK,
    )  # fmt: skip
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        next_grads, next_zs = _load_rows(
            grad_ptr, z_ptr, residual_ptr, row + BLOCK_M, end, n_inner,
            stride_grad_outer, stride_grad_inner, stride_z_outer, stride_z_inner,
            stride_residual_outer, stride_residual_inner, N_COLS, COMPUTE, TWO_LEVELS, CHUNK,
        )  # fmt: skip
        squares = tl.zeros((BLOCK_M, CHUNK), COMPUTE)
        products = tl.zeros((BLOCK_M, CHUNK), COMPUTE)
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            z = zs[c].to(COMPUTE)
            squares = tl.fma(z, z, squares)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = weights[c]
            products = tl.fma(_weighted(grads[c], weight, WEIGHT_OFFSET, COMPUTE), z, products)
        rstd, mean = _row_factors(squares, products, N_COLS, EPS)
        grad_stored_row = row_offset(row, n_inner, stride_grad_stored_outer, stride_grad_stored_inner, TWO_LEVELS)
        grad_x_row = row_offset(row, n_inner, stride_grad_x_outer, stride_grad_x_inner, TWO_LEVELS)
        grad_residual_row = row_offset(
            row, n_inner, stride_grad_residual_outer, stride_grad_residual_inner, TWO_LEVELS, 1
        )
        next_sums = ()
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = weights[c]
            z = zs[c].to(COMPUTE)
            _store_grad(
                grad_x_ptr, grad_residual_ptr, grad_stored_ptr, grad_x_row, grad_residual_row, grad_stored_row, column,
                tile_mask(row < end, column, N_COLS, CHUNK), _weighted(grads[c], weight, WEIGHT_OFFSET, COMPUTE), z,
                rstd, mean, COMPUTE,
            )  # fmt: skip
            if partial_ptr is not None:
                n = z * rstd[:, None]
                if ROUND_NORM:
                    n = n.to(DTYPE).to(COMPUTE)
                next_sums = next_sums + (tl.fma(grads[c].to(COMPUTE), n, sums[c]),)  # noqa: RUF005
            else:
                next_sums = next_sums + (sums[c],)  # noqa: RUF005
        sums = next_sums
        grads = next_grads
        zs = next_zs
    if partial_ptr is not None:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            target = partial_ptr + tl.program_id(0).to(tl.int64) * N_COLS + column
            tl.store(target, tl.sum(sums[c], axis=0), column < N_COLS)


@triton.jit
def grad_z_kernel(
    grad_ptr, grad_stored_ptr, z_ptr, residual_ptr, weight_ptr, grad_x_ptr, grad_residual_ptr, rstd_ptr,
    stride_grad_outer, stride_grad_inner, stride_grad_stored_outer, stride_grad_stored_inner,
    stride_z_outer, stride_z_inner, stride_residual_outer, stride_residual_inner,
    stride_grad_x_outer, stride_grad_x_inner, stride_grad_residual_outer, stride_grad_residual_inner,
    n_rows, n_inner,
    N_COLS: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr, TWO_LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M rows of ``z``; keeps 1 / rms of each, [n_rows]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < n_rows
    grad_row = row_offset(row, n_inner, stride_grad_outer, stride_grad_inner, TWO_LEVELS)
    grad_stored_row = row_offset(row, n_inner, stride_grad_stored_outer, stride_grad_stored_inner, TWO_LEVELS)
    z_row = row_offset(row, n_inner, stride_z_outer, stride_z_inner, TWO_LEVELS)
    residual_row = row_offset(row, n_inner, stride_residual_outer, stride_residual_inner, TWO_LEVELS)
    grad_x_row = row_offset(row, n_inner, stride_grad_x_outer, stride_grad_x_inner, TWO_LEVELS)
    grad_residual_row = row_offset(row, n_inner, stride_grad_residual_outer, stride_grad_residual_inner, TWO_LEVELS)
    squares = tl.zeros((BLOCK_M, CHUNK), COMPUTE)
    products = tl.zeros((BLOCK_M, CHUNK), COMPUTE)
    grads = ()
    zs = ()
    if RESIDENT:
        grads, zs = _load_rows(
            grad_ptr, z_ptr, residual_ptr, row, n_rows, n_inner,
            stride_grad_outer, stride_grad_inner, stride_z_outer, stride_z_inner,
            stride_residual_outer, stride_residual_inner, N_COLS, COMPUTE, TWO_LEVELS, CHUNK,
        )  # fmt: skip
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, c * CHUNK + tl.arange(0, CHUNK), N_COLS)
            z = zs[c].to(COMPUTE)
            squares = tl.fma(z, z, squares)
            products = tl.fma(_weighted(grads[c], weight, WEIGHT_OFFSET, COMPUTE), z, products)
    else:
        for c in range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(row_mask, column, N_COLS, CHUNK)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            grad = tl.load(grad_ptr + tile(grad_row, column), mask, 0.0)
            z = _load_z(z_ptr, residual_ptr, z_row, residual_row, column, mask, COMPUTE).to(COMPUTE)
            squares = tl.fma(z, z, squares)
            products = tl.fma(_weighted(grad, weight, WEIGHT_OFFSET, COMPUTE), z, products)
    rstd, mean = _row_factors(squares, products, N_COLS, EPS)
    tl.store(rstd_ptr + row, rstd, row_mask)
    if RESIDENT:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            _store_grad(
                grad_x_ptr, grad_residual_ptr, grad_stored_ptr, grad_x_row, grad_residual_row, grad_stored_row, column,
                tile_mask(row_mask, column, N_COLS, CHUNK), _weighted(grads[c], weight, WEIGHT_OFFSET, COMPUTE),
                zs[c].to(COMPUTE), rstd, mean, COMPUTE,
            )  # fmt: skip
    else:
        for c in range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(row_mask, column, N_COLS, CHUNK)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            grad = tl.load(grad_ptr + tile(grad_row, column), mask, 0.0)
            z = _load_z(z_ptr, residual_ptr, z_row, residual_row, column, mask, COMPUTE).to(COMPUTE)
            _store_grad(
                grad_x_ptr, grad_residual_ptr, grad_stored_ptr, grad_x_row, grad_residual_row, grad_stored_row, column,
                mask, _weighted(grad, weight, WEIGHT_OFFSET, COMPUTE), z, rstd, mean, COMPUTE,
            )  # fmt: skip


@triton.jit
def weight_partial_kernel(
    grad_ptr, z_ptr, residual_ptr, rstd_ptr, partial_ptr,
    stride_grad_outer, stride_grad_inner, stride_z_outer, stride_z_inner, stride_residual_outer, stride_residual_inner,
    n_rows, n_inner, rows_per_program,
    N_COLS: tl.constexpr, ROUND_NORM: tl.constexpr, COMPUTE: tl.constexpr, DTYPE: tl.constexpr,
    TWO_LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A column tile of the weight's gradient, summed over a block of rows: ``partial_ptr [row blocks, N]``."""
    n_tiles = tl.cdiv(N_COLS, BLOCK_N)
    block = (tl.program_id(0) // n_tiles).to(tl.int64)
    column = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = block * rows_per_program
    end = tl.minimum(first + rows_per_program, n_rows)
    total = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = tile_mask(row < end, column, N_COLS, BLOCK_N)
        grad_row = row_offset(row, n_inner, stride_grad_outer, stride_grad_inner, TWO_LEVELS)
        z_row = row_offset(row, n_inner, stride_z_outer, stride_z_inner, TWO_LEVELS)
        residual_row = row_offset(row, n_inner, stride_residual_outer, stride_residual_inner, TWO_LEVELS)
        grad = tl.load(grad_ptr + tile(grad_row, column), mask, 0.0).to(COMPUTE)
        n = _load_z(z_ptr, residual_ptr, z_row, residual_row, column, mask, COMPUTE).to(COMPUTE)
        n = n * tl.load(rstd_ptr + row, row < end, 0.0)[:, None]
        if ROUND_NORM:
            n = n.to(DTYPE).to(COMPUTE)
        total = tl.fma(grad, n, total)
    tl.store(partial_ptr + block * N_COLS + column, tl.sum(total, axis=0), column < N_COLS)


@triton.jit
def sum_partials_kernel(
    partial_ptr, weight_grad_ptr, n_partials, N_COLS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum ``partial_ptr [n_partials, N]`` over its rows."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), COMPUTE)
    for start in range(0, n_partials, BLOCK_P):
        partial = start + tl.arange(0, BLOCK_P)
        mask = (partial < n_partials)[:, None] & (column < N_COLS)[None, :]
        total += tl.load(partial_ptr + partial.to(tl.int64)[:, None] * N_COLS + column[None, :], mask, 0.0)
    tl.store(weight_grad_ptr + column, tl.sum(total, axis=0).to(weight_grad_ptr.dtype.element_ty), column < N_COLS)


def plan(call: RmsNormCall, inputs: GradInputs, outputs: Tensors) -> Runner:
    """Prepare the launches for tensors of this metadata; the tensors themselves are not kept."""
    weight_grad = outputs[2]
    if call.n_rows == 0:
        return lambda tensors: None if tensors[-1] is None else _zero(tensors[-1])
    weight = inputs.weight
    given = (*inputs[:4], *outputs[:2])
    seen = rows([t for t in given if t is not None], any_order=True)
    if seen is None or (weight is not None and weight.stride(0) != 1 and call.n_cols > 1):
        return contiguous_twin(plan, call, inputs, outputs)
    device = facts(inputs.grad.device)
    strides = seen.strides_of(given)
    walk = backward_block(call.n_cols, call.n_rows, device)
    if walk is not None:
        return _in_one_pass(call, inputs, seen, strides, walk, weight_grad is not None)
    return _in_two_passes(call, inputs, seen, strides, device, weight_grad is not None)


def _zero(weight_grad: torch.Tensor) -> None:
    weight_grad.zero_()


def _in_one_pass(
    call: RmsNormCall, inputs: GradInputs, seen: Rows, strides: tuple[tuple[int, int], ...], walk: SumBlock,
    weight_grad: bool,
) -> Runner:  # fmt: skip
    device, compute = inputs.grad.device, call.compute_dtype
    tail = (
        *(stride for pair in strides for stride in pair),
        call.n_rows,
        seen.inner,
        walk.rows_per_program,
        call.n_cols,
        float(call.options.eps),
        float(call.options.weight_offset),
        call.weight_dtype is not None and call.options.cast == "before_weight",
        COMPUTE[compute],
        _DTYPES[call.dtype],
        seen.inner > 1,
        walk.rows,
        walk.columns,
    )
    rows_backward = BoundKernel(rows_backward_kernel, walk.programs, device, tail, walk.options(facts(device)))
    if not weight_grad:
        return lambda tensors: rows_backward((*tensors[:7], None))
    sum_partials = _sum_partials(call, walk.programs, device)

    def run(tensors: Tensors) -> None:
        partial = torch.empty((walk.programs, call.n_cols), dtype=compute, device=device)
        rows_backward((*tensors[:7], partial))
        sum_partials((partial, tensors[7]))

    return run


def _in_two_passes(
    call: RmsNormCall, inputs: GradInputs, seen: Rows, strides: tuple[tuple[int, int], ...], device: DeviceFacts,
    weight_grad: bool,
) -> Runner:  # fmt: skip
    where, compute = inputs.grad.device, call.compute_dtype
    block = row_block(call.n_cols, inputs.grad.element_size(), device, "residual")
    programs = check_programs(block.programs(call.n_rows), "rms_norm", "x")
    tail = (
        *(stride for pair in strides for stride in pair),
        call.n_rows,
        seen.inner,
        call.n_cols,
        float(call.options.eps),
        float(call.options.weight_offset),
        COMPUTE[compute],
        seen.inner > 1,
        block.rows,
        block.chunk,
        block.resident,
    )
    grad_z = BoundKernel(grad_z_kernel, programs, where, tail, block.options(device))
    if not weight_grad:

        def run_without_weight(tensors: Tensors) -> None:
            grad_z((*tensors[:7], torch.empty(call.n_rows, dtype=compute, device=where)))

        return run_without_weight
    cut = sum_block(call.n_cols, call.n_rows, device)
    tail = (
        *strides[0],
        *strides[2],
        *strides[3],
        call.n_rows,
        seen.inner,
        cut.rows_per_program,
        call.n_cols,
        call.options.cast == "before_weight",
        COMPUTE[compute],
        _DTYPES[call.dtype],
        seen.inner > 1,
        cut.rows,
        cut.columns,
    )
    tiles = -(-call.n_cols // cut.columns)
    weight_partial = BoundKernel(weight_partial_kernel, cut.programs * tiles, where, tail, cut.options(device))
    sum_partials = _sum_partials(call, cut.programs, where)

    def run(tensors: Tensors) -> None:
        rstd = torch.empty(call.n_rows, dtype=compute, device=where)
        partial = torch.empty((cut.programs, call.n_cols), dtype=compute, device=where)
        grad_z((*tensors[:7], rstd))
        weight_partial((tensors[0], tensors[2], tensors[3], rstd, partial))
        sum_partials((partial, tensors[7]))

    return run


def _sum_partials(call: RmsNormCall, n_partials: int, device: torch.device) -> BoundKernel:
    columns = 32
    tail = (n_partials, call.n_cols, COMPUTE[call.compute_dtype], 64, columns)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return BoundKernel(sum_partials_kernel, -(-call.n_cols // columns), device, tail, options)


_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
