"""The kernels of RMSNorm and FP8 quantisation as they run on a GPU: with a GPU's launch parameters, on the CPU.

There rows stay in registers and one backward walks over its rows, which the CPU's own parameters never choose.
"""

import dataclasses

import pytest
import torch

from tilewright.ops import family
from tilewright.ops.quant_fp8 import kernels as quant_kernels
from tilewright.ops.quant_fp8 import kernels_dequant
from tilewright.ops.quant_fp8 import op as quant_op
from tilewright.ops.quant_fp8.cases import ADD, DEQUANT, SILU
from tilewright.ops.rms_norm import kernels, kernels_backward
from tilewright.ops.rms_norm import op as norm_op
from tilewright.ops.rms_norm.call import Options
from tilewright.ops.rms_norm.launch import backward_block, row_block
from tilewright.platforms import DeviceFacts, facts
from tilewright.testing import Target, check_backward, check_forward

CPU = Target("triton", torch.device("cpu"))
GPU = DeviceFacts("nvidia", "sm_90", n_units=3, triton="compiled", fp8_saturates=True, limits_registers=True)
HAS_KERNELS = bool(facts(torch.device("cpu")).triton)
MAX_ELEMENTS = 200_000


@pytest.fixture(autouse=True)
def gpu_parameters(monkeypatch):
    """Plans are made as for a GPU, and forgotten afterwards."""
    as_gpu = dataclasses.replace(GPU, limits_registers=False)  # the CPU's compiler knows no such option
    for module in (kernels, kernels_backward, quant_kernels, kernels_dequant):
        monkeypatch.setattr(module, "facts", lambda device: as_gpu)
    for module in (norm_op, quant_op):
        for name, value in vars(module).copy().items():
            if type(value).__name__ == "PlanCache":
                monkeypatch.setattr(module, name, type(value)())


def _row_length(n_cols, dtype, kind):
    """Which of the shapes that launch parameters give a program a row has."""
    block = row_block(n_cols, dtype.itemsize, GPU, kind)
    chunks = -(-n_cols // block.chunk)
    return block.rows > 1, min(chunks, 2), block.resident, n_cols % block.chunk == 0


def _norm_branches(case, x):
    """What the kernels of RMSNorm branch on in a case."""
    has_sum = case.function == "add_rms_norm"
    length = _row_length(x.shape[-1], x.dtype, "residual" if has_sum else "plain")
    weight = case.weight and ("same" if case.weight == "same" else "own")
    yield "rows", case.function, length, backward_block(x.shape[-1], 1, GPU) is None, case.residual, case.rounding
    yield "norm", case.function, weight, case.cast, case.rounding
    yield "memory", case.strides, case.residual_strides
    yield "numbers", case.values
    yield "offset", case.function, case.offset != 0
    yield "dtype", case.function, x.dtype, x.numel() == 0


def _quant_branches(case, x):
    """What the kernels of FP8 quantisation branch on in a case."""
    kind = {ADD: "residual", SILU: "gated"}.get(case.function, "plain")
    formats, options = (case.format, *case.also), Options(**dict(case.norm))
    per_token = any(f.group_size is None for f in formats)
    length = _row_length(case.n_cols, case.dtypes[-1], kind)  # codes come back in that dtype
    yield "rows", case.function, length, per_token
    yield "norm", case.weight, options.cast
    yield "offset", options.weight_offset != 0
    yield "sum", case.function == ADD and (case.residual, options.residual_rounding)
    yield "results", case.function, len(formats), length if len(formats) == 3 else case.static
    yield "emitted", case.emit and case.function
    yield "memory", case.strides, case.function in (ADD, DEQUANT)
    yield "numbers", case.values, x.numel() == 0
    for f in formats:
        policy = f.arithmetic
        scale = case.static or (f.group_size, f.scale_format)
        yield "format", case.function == DEQUANT, scale, f.dtype, x.dtype
        group = "given" if case.static else "row" if f.group_size is None else "group"
        yield "policy", policy.apply, policy.round_input, f.scale_format, group, x.dtype
        yield "clamp", policy.maximum


def _cases(name, branches):
    """The cases that are small, less those that take no branch which an earlier one has not taken already."""
    device, seen = torch.device("meta"), set()
    for case in family(name).cases:
        x = case.arguments(device, case.dtypes[-1]).args[0]
        taken = set(branches(case, x))
        if x.numel() <= MAX_ELEMENTS and not taken <= seen:
            seen |= taken
            yield pytest.param(case, id=case.id)


@pytest.mark.skipif(not HAS_KERNELS, reason="Triton kernels do not run on this CPU")
@pytest.mark.parametrize("case", [*_cases("rms_norm", _norm_branches), *_cases("quant_fp8", _quant_branches)])
def test_with_parameters_of_a_gpu(case):
    check_forward(case, case.dtypes[-1], CPU)
    if case.has_gradients:
        check_backward(case, case.dtypes[-1], CPU)


@pytest.mark.parametrize("kind", ["plain", "residual", "gated"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("n_cols", [1, 2, 7, 64, 128, 256, 257, 1536, 4096, 7168, 16384, 40000, 262144])
def test_every_thread_takes_one_wide_load_of_a_chunk(n_cols, itemsize, kind):
    block = row_block(n_cols, itemsize, GPU, kind)
    assert block.rows * block.chunk == block.num_warps * 32 * block.vector
    assert block.vector * itemsize <= 16
    assert block.chunk % block.vector == 0
    chunks = -(-n_cols // block.chunk)
    assert (chunks - 1) * block.chunk < n_cols
    assert block.rows == 1 or chunks == 1


@pytest.mark.parametrize("n_rows", [1, 5, 64, 8192, 1_000_003])
@pytest.mark.parametrize("n_cols", [1, 64, 1536, 8192])
def test_a_backward_walks_over_every_row_once(n_rows, n_cols):
    walk = backward_block(n_cols, n_rows, GPU)
    assert walk is not None
    assert walk.rows_per_program % walk.rows == 0
    assert walk.programs * walk.rows_per_program >= n_rows > (walk.programs - 1) * walk.rows_per_program


def test_rows_that_are_too_long_for_a_walk():
    assert backward_block(8193, 100, GPU) is None
