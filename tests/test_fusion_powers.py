"""Scales that plain PyTorch rounds up to powers of two through a float32 logarithm: where that is exact."""

import math

import pytest
import torch

import tilewright
from fusion_helpers import fresh, only, same  # noqa: F401 - a fixture among them
from test_fusion_forms import FP8, Seen, means_quant
from tilewright.fusion.recognise.powers import powers_are_exact
from tilewright.ops.quant_fp8.format import MIN_SCALE

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning")

HALVES = [torch.bfloat16, torch.float16]
MAXIMA = [448.0, 57344.0, 240.0, 224.0, 128.0]
FLOORS = [(1e-4, 0.0), (1e-10, 0.0), (0.0, MIN_SCALE), (1e-12, 1e-6)]


def magnitudes(dtype):
    """Every finite one."""
    every = torch.arange(2**15, dtype=torch.int16).view(dtype)
    return every[every.isfinite()].float()


def exact_power(scale):
    """The least power of two not below each, by the bits."""
    significand, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (significand == 0.5).int())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("maximum", MAXIMA)
@pytest.mark.parametrize("floors", FLOORS)
@pytest.mark.parametrize("by", ["division", "reciprocal"])
def test_every_scale_of_16_bits_is_rounded_exactly(dtype, maximum, floors, by):
    amax = magnitudes(dtype)
    amax_floor, scale_floor = floors
    clamped = amax.clamp(min=amax_floor)
    divided = (clamped / maximum).clamp(min=scale_floor)
    scale = divided if by == "division" else (clamped * (1 / maximum)).clamp(min=scale_floor)
    for power in (torch.exp2(scale.log2().ceil()), torch.pow(2.0, scale.abs().log2().ceil())):
        assert torch.equal(power, exact_power(divided))
    # What a logarithm may be wrong by, and be rounded up to the same integer all the same.
    exact = scale.double().log2()
    away = exact != exact.round()
    assert (exact - exact.round()).abs()[away].min() > 30 * 2.0**-17
    factor = None if by == "division" else 1 / maximum
    assert powers_are_exact(dtype, maximum, amax_floor, scale_floor, factor)


def test_what_is_not_proved():
    assert not powers_are_exact(torch.float32, 448.0, 1e-4, 0.0)
    barely = 448.0 * (1 + 2.0**-20)
    assert not powers_are_exact(torch.bfloat16, 448.0, barely, 0.0)
    assert not powers_are_exact(torch.bfloat16, 448.0, 0.0, 1 + 2.0**-20)
    assert not powers_are_exact(torch.bfloat16, barely, 1e-4, 0.0)
    assert not powers_are_exact(torch.bfloat16, 448.0, 1e-4, 0.0, factor=1 / 448 * (1 + 2.0**-10))
    scale = torch.tensor(2.0**-20 * (1 + 2.0**-23))
    assert torch.exp2(scale.log2().ceil()) == exact_power(scale) / 2  # why it matters


def power_quant(x, *, floor=1e-4, by=None, deep_gemm=False, clamps=True):
    groups = x.view(*x.shape[:-1], -1, 128)
    amax = groups.abs().float().amax(-1, keepdim=True).clamp(floor)
    scale = amax / 448.0 if by is None else amax * by
    scale = torch.pow(2.0, torch.ceil(torch.log2(scale.abs()))) if deep_gemm else torch.exp2(scale.log2().ceil())
    scaled = groups * (1.0 / scale) if deep_gemm else groups.float() / scale
    if clamps:
        scaled = scaled.clamp(-448.0, 448.0)
    return scaled.to(FP8).view(x.shape), scale.squeeze(-1)


FORMS = {
    "division": {},
    "reciprocal": {"by": 1 / 448.0},
    "DeepGEMM": {"deep_gemm": True, "clamps": False},
    "no clamp": {"clamps": False},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_16_bits(name, dtype):
    """Every magnitude is the largest of a group."""
    amax = magnitudes(dtype)
    x = torch.zeros(len(amax) // 2, 256)
    x[:, 5], x[:, 133] = amax[0::2], -amax[1::2]
    x[:, 0::7] = (x[:, 5:6] * 0.37).to(dtype).float()
    seen = Seen(lambda x: power_quant(x, **FORMS[name]), x.to(dtype))
    found = seen.one("quant_fp8")
    assert found.options["format"].scale_format == "ue8m0_fp32"
    assert "powers" not in found.options
    means_quant(seen, found)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite(value):
    x = torch.randn(3, 256).bfloat16()
    x[1, 7] = value
    seen = Seen(lambda x: power_quant(x, deep_gemm=True, clamps=False), x)
    form = seen.one("quant_fp8").options["format"]
    result = tilewright.quant_fp8(x, scale_format="ue8m0_fp32", policy=form.policy, impl="reference")
    values, scales = (seen.of(seen.found[-1].outputs[role]) for role in ("values", "scales"))
    torch.testing.assert_close(scales, result.scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values.float(), result.values.float(), rtol=0, atol=0, equal_nan=True)


def test_a_reciprocal_of_something_else():
    for by in (1 / 440.0, 1 / 448.0 * (1 + 2.0**-12)):
        assert "a rounded reciprocal" in Seen(lambda x, by=by: power_quant(x, by=by), torch.randn(3, 256).half()).miss(
            "quant_fp8"
        )


@pytest.mark.parametrize("case", ["float32", "a floor"])
@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_what_is_not_proved_is_a_difference_with_a_name(case, mode):
    """In float32, or behind a floor barely above a power of two."""
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    floor = 1e-4 if case == "float32" else 448.0 * 2.0**-20 * (1 + 2.0**-21)

    def run(x, w):
        return power_quant(tilewright.rms_norm(x, w), floor=floor)

    x, w = torch.randn(6, 256).to(dtype), torch.rand(256).to(dtype)
    with torch.no_grad():
        compiled = tilewright.compile(run, numerics=mode, verify=True)
        results = compiled(x, w)
    report = compiled.fusion_report
    if mode == "strict":
        assert not report.counts
        assert "differs in ue8m0_log2" in only(report, "refused").reason
    else:
        assert only(report).numerics == ("ue8m0_log2",)
        same(results, run(x, w))
