"""The fused kernels lay a row out over a GPU's threads as the plain ones do, so that both sum it in the same order.

This decides whether a fused result has the same bits as its two steps on a GPU. Kernels are compiled for one here;
nothing runs, so none is needed.
"""

import re

import pytest
import torch

from tilewright.ops.quant_fp8 import call as quant_call
from tilewright.ops.quant_fp8 import kernels as quant_kernels
from tilewright.ops.quant_fp8.format import QuantFormat
from tilewright.ops.rms_norm import call as norm_call
from tilewright.ops.rms_norm import kernels
from tilewright.platforms import DeviceFacts

triton = pytest.importorskip("triton")

GPU = DeviceFacts("nvidia", "sm_90", n_units=132, triton="compiled", fp8_saturates=True, limits_registers=True)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
}


class Compiled:
    """In the place of a BoundKernel: compiles for a GPU what would be launched."""

    def __init__(self, kernel, grid, device, tail, options):
        self.kernel, self.tail, self.options = kernel, tail, options

    def __call__(self, tensors):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, hints = {}, {}, {}
        for index, (param, value) in enumerate(zip(self.kernel.params, (*tensors, *self.tail), strict=True)):
            if param.is_constexpr or value is None or (not isinstance(value, torch.Tensor) and value == 1):
                signature[param.name], constants[index,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[param.name], hints[index,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[param.name] = "i32"
                if value % 16 == 0:
                    hints[index,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, hints)
        Compiled.last = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=self.options)


@pytest.fixture(autouse=True)
def compile_only(monkeypatch):
    for module in (kernels, quant_kernels):
        monkeypatch.setattr(module, "BoundKernel", Compiled)
        monkeypatch.setattr(module, "facts", lambda device: GPU)


def layout_of_sums():
    """The layout in which the last kernel sums its squares, and how many warps share it."""
    lines = Compiled.last.asm["ttgir"].splitlines()
    first = next(index for index, line in enumerate(lines) if '"tt.reduce"' in line)
    name = re.search(r"tensor<[^>]*, (#\w+)>", next(line for line in lines[first:] if ") : (tensor<" in line))[1]
    return next(line.partition(" = ")[2] for line in lines if line.startswith(f"{name} ="))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n_cols", "stride"), [(7, 7), (300, 300), (300, 303), (1536, 1536), (4099, 4099), (7168, 7200)]
)
def test_fused_rows_lie_as_plain_ones(n_cols, stride, dtype, residual):
    x = torch.empty(5, stride, dtype=dtype)[:, :n_cols]
    other = x if residual else None
    weight = torch.empty(n_cols, dtype=dtype)
    norm_inputs = norm_call.Inputs(x, other, weight)
    name = "add_rms_norm" if residual else "rms_norm"
    plain = norm_call.describe(norm_inputs, norm_call.Options(), name)
    outputs = (torch.empty_like(x), torch.empty_like(x) if residual else None)
    kernels.plan(plain, norm_inputs, outputs)((*norm_inputs, *outputs))
    expected = layout_of_sums()

    inputs = quant_call.Inputs(x, other, weight)
    options = quant_call.Options((QuantFormat(), QuantFormat(32, "ue8m0_fp32"), QuantFormat(None)), emit=True)
    for given in (options, options._replace(formats=options.formats[:1], emit=False)):
        fused = quant_call.describe(inputs, given, f"{name}_quant_fp8")
        results = quant_call.empty_results(fused, inputs)
        quant_kernels.plan(fused, inputs, results)((*inputs, *results))
        assert layout_of_sums() == expected
