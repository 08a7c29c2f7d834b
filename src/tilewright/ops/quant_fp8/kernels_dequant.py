"""The Triton kernel that multiplies FP8 values by their scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.rms_norm.kernels import row_offset, tile, tile_mask
from tilewright.ops.rms_norm.launch import row_block
from tilewright.ops.rows import contiguous_twin, rows
from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilewright.ops.quant_fp8.dequant_call import DequantCall, DequantInputs
    from tilewright.ops.rms_norm.call import Runner, Tensors


_MAX_CHUNK = 1024


@triton.jit
def dequant_kernel(
    values_ptr, scale_ptr, out_ptr,
    stride_values_outer, stride_values_inner, stride_scale_outer, stride_scale_inner, stride_scale_group,
    n_rows, n_inner,
    N_COLS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, EXPONENTS: tl.constexpr, ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Multiply one chunk of BLOCK_M rows. The grid is one axis over (rows, chunks), chunks fastest."""
    n_chunks: tl.constexpr = (N_COLS + CHUNK - 1) // CHUNK
    row = (tl.program_id(0) // n_chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % n_chunks) * CHUNK + tl.arange(0, CHUNK)
    mask = tile_mask(row < n_rows, column, N_COLS, CHUNK)
    values_row = row_offset(row, n_inner, stride_values_outer, stride_values_inner, True)
    value = tl.load(values_ptr + tile(values_row, column), mask, 0.0).to(tl.float32)
    if ONE_SCALE:
        scale = tl.load(scale_ptr)
    else:
        group = column // GROUP
        place = (group // PACK) * stride_scale_group + group % PACK
        scale_row = row_offset(row, n_inner, stride_scale_outer, stride_scale_inner, True)
        scale = tl.load(scale_ptr + tile(scale_row, place), mask, 0)
        if EXPONENTS:  # 2^-127 is no normal number, and 255 means NaN
            bits = scale.to(tl.int32)
            number = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
            scale = number.to(tl.float32, bitcast=True)
    tl.store(out_ptr + tile(row * N_COLS, column), (value * scale).to(out_ptr.dtype.element_ty), mask)


def plan(call: DequantCall, inputs: DequantInputs, outputs: Sequence[torch.Tensor]) -> Runner:
    """Prepare the launch for tensors of this metadata; the tensors themselves are not kept."""
    values, scales = inputs
    if call.n_rows == 0:
        return lambda tensors: None
    # Of scales one column is enough to say how their rows lie.
    seen = rows([values] if call.one_scale else [values, scales[..., :1]])
    if seen is None:
        return contiguous_twin(plan, call, inputs, outputs)
    device = facts(values.device)
    block = row_block(min(call.n_cols, _MAX_CHUNK), outputs[0].element_size(), device)
    programs = block.programs(call.n_rows) * -(-call.n_cols // block.chunk)
    check_programs(programs, "dequant_fp8", "values")
    pack = 4 if call.is_packed else 1
    scale_strides = (0, 0, 0) if call.one_scale else (*seen.strides[1], scales.stride(-1))
    tail = (
        *seen.strides[0],
        *(pack * stride for stride in scale_strides),
        call.n_rows,
        seen.inner,
        call.n_cols,
        call.group_size or call.n_cols,
        pack,
        call.scales_dtype != torch.float32,
        call.one_scale,
        block.rows,
        block.chunk,
    )
    kernel = BoundKernel(dequant_kernel, programs, values.device, tail, block.options(device))
    if call.scales_dtype == torch.float32:
        return kernel

    def run(tensors: Tensors) -> None:
        kernel((tensors[0], as_bytes(tensors[1]), tensors[2]))

    return run


def as_bytes(scales: torch.Tensor | None) -> torch.Tensor:
    """The memory of scales as bytes, for Triton, which has no dtype for exponents; only where it begins matters."""
    assert scales is not None
    return scales.view(torch.uint8) if scales.itemsize == 1 else scales.as_strided((1,), (1,)).view(torch.uint8)
