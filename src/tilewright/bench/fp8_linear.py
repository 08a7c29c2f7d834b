"""Linear layers from FP8 with block scales, as DeepSeek-V3 has them: what surrounds the fusions that are measured.

No part of the library: one operator, served by whichever of two kernels is the faster at hand for a shape, ours in
Triton or torch's own (cuBLAS). Both are held against float64 before one is chosen. On a CPU the definition serves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tilewright import numerics
from tilewright.bench.environment import explain_failure
from tilewright.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable

    Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

GROUP = 128
E4M3_MAX = 448.0
LEAST_AMAX = 1e-4

_ALIGNED = 4
"""cuBLAS asks for rows of a weight's scales that begin at multiples of 16 bytes."""


@dataclass(frozen=True)
class Choice:
    """Who computes a product.

    Attributes:
        kernel: its name.
        us: microseconds of those that agreed.
        reasons: why the others were left out.
    """

    kernel: str
    us: dict[str, float]
    reasons: dict[str, str]


_chosen: dict[tuple[torch.device, int, int, int], Choice] = {}


def choices() -> dict[str, dict[str, Any]]:
    """Every choice so far, by the product's sizes."""
    return {f"m{m} n{n} k{k}": asdict(choice) for (_, m, n, k), choice in _chosen.items()}


@torch.library.custom_op("tilewright_bench::fp8_linear", mutates_args=())
def fp8_linear(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """``dequantised(values, scales) @ dequantised(weight, weight_scales).T`` in bfloat16.

    Args:
        values: ``[M, K]``, float8_e4m3fn.
        scales: ``[M, ceil(K / 128)]``, float32, any strides.
        weight: ``[N, K]``, float8_e4m3fn.
        weight_scales: ``[ceil(N / 128), ceil(K / 128)]``, float32, as :func:`quantised_blocks` gives them.
    """
    given = values, scales, weight, weight_scales
    if values.device.type == "cpu":
        return definition(*given)
    key = values.device, values.shape[0], *weight.shape
    if key not in _chosen:
        _chosen[key] = choose(given)
    return KERNELS[_chosen[key].kernel](*given)


@fp8_linear.register_fake
def _(values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    return values.new_empty(values.shape[0], weight.shape[0], dtype=torch.bfloat16)


def quantised_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight ``[N, K]`` in FP8, and a float32 scale for each of its blocks: ``[ceil(N / 128), ceil(K / 128)]``."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % GROUP, 0, -n % GROUP))
    blocks = padded.view(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
    scales = blocks.abs().amax((1, 3)).clamp(min=LEAST_AMAX) / E4M3_MAX
    values = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    aligned = F.pad(scales, (0, -scales.shape[1] % _ALIGNED))[:, : scales.shape[1]]
    return values.view(padded.shape)[:n, :k].contiguous(), aligned


def by_rows(weight_scales: torch.Tensor, n_rows: int) -> torch.Tensor:
    """The scales of a weight's blocks, repeated for each of its rows."""
    return weight_scales.repeat_interleave(GROUP, 0)[:n_rows]


def dequantised(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that values ``[rows, K]`` and scales ``[rows, ceil(K / 128)]`` stand for, in float64."""
    return values.double() * scales.double().repeat_interleave(GROUP, -1)[:, : values.shape[1]]


def exact(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """The product in float64."""
    return dequantised(values, scales) @ dequantised(weight, by_rows(weight_scales, weight.shape[0])).T


def definition(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """The product in float32, rounded once."""
    wide = (
        dequantised(values, scales).float(),
        dequantised(weight, by_rows(weight_scales, weight.shape[0])).float(),
    )
    return (wide[0] @ wide[1].T).bfloat16()


def by_cublas(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """The product by torch's own operator, which wants the scales of one group beside each other."""
    columns = scales.t().contiguous().t()  # no copy where they are
    y: torch.Tensor = torch._scaled_mm(values, weight.t(), columns, weight_scales.t(), out_dtype=torch.bfloat16)
    return y


def by_cublas_as_dense(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Likewise where torch asks for scales of a weight without gaps between rows, and cuBLAS reads them with gaps.

    So do versions of torch before pytorch/pytorch's ``is_blockwise_128x128_scaling`` rounded the stride up.
    """
    told = weight_scales.as_strided(weight_scales.shape, (weight_scales.shape[1], 1))
    return by_cublas(values, scales, weight, told)


def by_triton(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """The product by our kernel."""
    from tilewright.bench.fp8_linear_kernels import block_scaled_linear

    return block_scaled_linear(values, scales, weight, weight_scales)


KERNELS: dict[str, Kernel] = {"triton": by_triton, "cublas": by_cublas, "cublas, as dense": by_cublas_as_dense}


def choose(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> Choice:
    """The fastest kernel that computes the right product."""
    from triton.testing import do_bench

    reference, truth = definition(*given), exact(*given)
    times: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        try:
            agreement = numerics.compare(kernel(*given), reference, truth)
            if agreement.ok:
                times[name] = float(do_bench(lambda kernel=kernel: kernel(*given), warmup=5, rep=20)) * 1e3
            else:
                reasons[name] = str(agreement)
        except Exception as error:  # whatever a version of torch or Triton cannot do
            reasons[name] = explain_failure(error)
    if not times:
        raise BenchmarkError(f"bench fusion: no kernel computes a linear layer from FP8: {reasons}")
    return Choice(min(times, key=times.__getitem__), times, reasons)
