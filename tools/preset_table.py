"""In how many bytes the presets of FP8 quantisation differ: the table of their README, computed by the definition.

Run by itself it prints the table; ``make_tables.py`` puts it into the page.
"""

from __future__ import annotations

import torch

from tilewright.ops.quant_fp8.call import Inputs, Options, describe
from tilewright.ops.quant_fp8.format import POLICIES, QuantFormat
from tilewright.ops.quant_fp8.reference import quantised

N_ROWS, N_COLS = 2048, 1024
TINY = 1e-6
FIRST = "exact"


def data() -> dict[str, tuple[str, torch.Tensor, str]]:
    """What is quantised, by its heading: the function, its input, and the format of the scales."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((N_ROWS, N_COLS), generator=generator).bfloat16()
    return {
        "normals": ("quant_fp8", normal, "fp32"),
        "normals, ue8m0": ("quant_fp8", normal, "ue8m0"),
        "tiny": ("quant_fp8", normal * TINY, "fp32"),
        "norm": ("rms_norm_quant_fp8", normal, "fp32"),
    }


def results(function: str, x: torch.Tensor, scale_format: str, policy: str) -> list[torch.Tensor]:
    """Values and scales in groups of 128, as bytes and as words."""
    dtype = torch.float8_e4m3fn
    inputs = Inputs(x)
    options = Options((QuantFormat(128, scale_format, dtype=dtype, policy=policy),))
    values, scales = quantised(describe(inputs, options, function), inputs)
    return [values.view(torch.uint8), scales.view(torch.uint8 if scales.dtype.itemsize == 1 else torch.int32)]


def share(one: torch.Tensor, other: torch.Tensor) -> str:
    """How many of a hundred differ, to three digits."""
    found = 100 * float((one != other).double().mean())
    return f"{found:.3g}" if found else "0"


def presets() -> str:
    """Shares of values and scales in which each preset differs from the first, and the scale of a group of zeros."""
    heads = ["preset", *(f"{name}: values / scales, %" for name in data()), "scale of zeros"]
    lines = [heads, [":--" for _ in heads]]
    expected = {name: results(*given, FIRST) for name, given in data().items()}
    for policy in POLICIES:
        cells = [f"`{policy}`"]
        for name, given in data().items():
            got = results(*given, policy)
            cells.append(" / ".join(share(*pair) for pair in zip(got, expected[name], strict=True)))
        zero = results("quant_fp8", torch.zeros(1, N_COLS, dtype=torch.bfloat16), "fp32", policy)[1]
        lines.append([*cells, f"{float(zero.view(torch.float32)[0, 0]):.4g}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    print(presets(), end="")
