"""What FP8 quantisation computes, beyond the grid of cases: presets, rounding, layouts and edges."""

import math
from types import SimpleNamespace

import pytest
import torch

import tilewright
from quant_fp8_helpers import (
    FP8,
    MX,
    PACKED,
    TARGETS,
    codes_of,
    half_steps,
    nearest,
    random,
    serve,
    spread,
)
from tilewright import (
    QuantFormat,
    QuantPolicy,
    add_rms_norm_quant_fp8,
    dequant_fp8,
    numerics,
    quant_fp8,
    rms_norm_quant_fp8,
    rope,
    rope_quant_fp8,
    silu_mul_quant_fp8,
)
from tilewright.dispatch.eager import PlanCache
from tilewright.ops.quant_fp8 import format as format_module
from tilewright.ops.quant_fp8 import kernels, op
from tilewright.ops.quant_fp8.cases import same_bits
from tilewright.ops.quant_fp8.format import DTYPES
from tilewright.ops.rms_norm.launch import RowBlock, cut_block, row_block
from tilewright.platforms import DeviceFacts, amd, nvidia
from tilewright.testing import Target

REFERENCE = Target("reference", torch.device("cpu"))
MAX = 448.0
MIN_SCALE_VLLM = 1.0 / (MAX * 512.0)

# Presets, each against its source's formula written down once more: m(x) is the largest magnitude of a group.


def fp8(x):
    return x.to(torch.float8_e4m3fn)


def vllm_native(x, group_size, ue8m0):
    """vllm-project/vllm: vllm/model_executor/layers/quantization/input_quant_fp8.py, ``_quantize_group_native``."""
    grouped = x.unflatten(-1, (-1, group_size))
    scale = grouped.abs().amax(-1, keepdim=True).float() / torch.tensor(MAX)
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.clamp(min=MIN_SCALE_VLLM)
    return fp8((grouped / scale).clamp(-MAX, MAX)).flatten(-2), scale.squeeze(-1)


def vllm_native_per_token(x, group_size, ue8m0):
    """The same file, ``forward_native``, dynamic per token."""
    scale = (x.abs().amax(-1, keepdim=True).float() / torch.tensor(MAX)).clamp(min=MIN_SCALE_VLLM)
    return fp8((x.float() * scale.reciprocal()).clamp(-MAX, MAX)), scale


def vllm_cuda(x, group_size, ue8m0):
    """vllm-project/vllm: csrc/libtorch_stable/quantization/w8a8/fp8/per_token_group_quant.cu."""
    grouped = x.float().unflatten(-1, (-1, group_size))
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.tensor(MAX)
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10))))
    return fp8((grouped / scale).clamp(-MAX, MAX)).flatten(-2), scale.squeeze(-1)


def deep_gemm(x, group_size, ue8m0):
    """deepseek-ai/DeepGEMM: deep_gemm/utils/math.py, ``per_token_cast_to_fp8``."""
    grouped = x.unflatten(-1, (-1, group_size))
    scale = grouped.abs().float().amax(-1, keepdim=True).clamp(min=1e-4) / torch.tensor(MAX)
    if ue8m0:
        bits = scale.view(torch.int32)
        exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
        scale = (exponent.clamp(1, 254) << 23).view(torch.float32)
    return fp8(grouped * (1.0 / scale)).flatten(-2), scale.squeeze(-1)


SOURCES = {
    "vllm_native": vllm_native,
    "vllm_native_per_token": vllm_native_per_token,
    "vllm_cuda": vllm_cuda,
    "deep_gemm": deep_gemm,
}
DATA = {
    "normal": lambda x: x,
    "tiny": lambda x: x * 1e-7,
    "zero groups": lambda x: x * (torch.arange(x.shape[-1], device=x.device) // 128 % 2),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("preset", SOURCES)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_preset_is_its_source(target, preset, data, ue8m0):
    if ue8m0 and preset == "vllm_native_per_token":
        pytest.skip("the source has no powers of two")
    if ue8m0 and preset == "vllm_native" and data != "normal":
        pytest.skip("the source's floor is no power of two: ours is rounded up to one")
    group_size = None if preset == "vllm_native_per_token" else 128
    x = DATA[data](random(target, 64, 512))
    scale_format = "ue8m0_fp32" if ue8m0 else "fp32"
    got = serve(target, quant_fp8, x, group_size=group_size, scale_format=scale_format, policy=preset)
    values, scales = SOURCES[preset](x.cpu(), group_size, ue8m0)  # a GPU multiplies by 1 / MAX instead of dividing
    assert same_bits(got.scales.cpu(), scales)
    assert not numerics.compare_codes(got.values.cpu(), values)


def test_preset_vllm_fused_is_its_source():
    """vllm-project/vllm: csrc/libtorch_stable/quantization/fused_kernels/layernorm_utils.cuh.

    The sum is not rounded before the norm, the norm is before the weight, and so is the product.
    """
    x, residual = random(REFERENCE, 16, 512), random(REFERENCE, 16, 512, seed=1)
    weight = random(REFERENCE, 512, seed=2)
    z = x.float() + residual.float()
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)
    y = (z * r).bfloat16() * weight
    grouped = y.float().unflatten(-1, (-1, 128))
    scale = (grouped.abs().amax(-1, keepdim=True) / torch.tensor(MAX)).clamp(min=MIN_SCALE_VLLM)
    got = add_rms_norm_quant_fp8(x, residual, weight, policy="vllm_fused", residual_rounding="exact", impl="reference")
    assert same_bits(got.values, fp8((grouped / scale).clamp(-MAX, MAX)).flatten(-2))
    assert same_bits(got.scales, scale.squeeze(-1))
    assert same_bits(got.residual, z.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_preset_aiter_is_its_source(dtype):
    """ROCm/aiter: aiter/ops/triton/_triton_kernels/quant/fused_fp8_quant.py. The norm is never rounded."""
    x, weight = random(REFERENCE, 16, 512), random(REFERENCE, 512, seed=2)
    z = x.float()
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6) * weight.float()
    grouped, largest = y.unflatten(-1, (-1, 128)), torch.finfo(dtype).max
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.tensor(largest)
    got = rms_norm_quant_fp8(x, weight, policy="aiter", dtype=dtype, impl="reference")
    assert same_bits(got.values, (grouped * (1.0 / scale)).clamp(-largest, largest).to(dtype).flatten(-2))
    assert same_bits(got.scales, scale.squeeze(-1))


def quantised_norm(x, policy, **kwargs):
    return rms_norm_quant_fp8(x, policy=policy, impl="reference", **kwargs)


def quantised(x, policy, **kwargs):
    return quant_fp8(x, policy=policy, impl="reference", **kwargs)


@pytest.mark.parametrize(
    ("function", "one", "other", "factor", "values_differ", "scales_differ"),
    [
        (quantised, "exact", "vllm_cuda", 1.0, False, False),
        (quantised, "exact", "vllm_native", 1.0, False, False),
        (quantised, "exact", "deep_gemm", 1.0, True, False),
        (quantised, "vllm_native", "vllm_native_per_token", 1.0, True, False),
        (quantised, "exact", "vllm_native", 1e-6, True, True),
        (quantised, "exact", "vllm_cuda", 1e-12, True, True),
        (quantised, "vllm_cuda", "deep_gemm", 1e-6, True, True),
        (quantised_norm, "exact", "aiter", 1.0, True, True),
    ],
)
def test_where_presets_differ(function, one, other, factor, values_differ, scales_differ):
    x = random(REFERENCE, 256, 1024) * factor
    first, second = function(x, one), function(x, other)
    assert same_bits(first.values, second.values) != values_differ
    assert same_bits(first.scales, second.scales) != scales_differ


# Rounding.


def truncated(x, dtype):
    """A stand-in that rounds towards zero."""
    codes = codes_of(dtype).to(x.device)
    at = torch.searchsorted(codes, x.abs(), right=True) - 1
    return codes[at] * x.sign()


def drift(step, dtype, x, deltas):
    """How far the signed error of chained steps lies from that of the nearest codes, in standard deviations.

    A step adds, quantises and dequantises; its error counts as positive away from zero. Rounding to nearest has a small
    mean error of its own, as codes are not evenly spaced: the nearest codes of the same numbers, found in the table of
    all codes, have it too. Under independent errors the sum of ``n`` of them has the deviation ``sqrt(n)`` times
    their root mean square.
    """
    total, ideal, squares, n = 0.0, 0.0, 0.0, 0
    for delta in deltas:
        x = x + delta
        wide, scales = step(x)
        target = nearest(x.double() / scales, dtype) * scales
        total += float(((wide.double() - x.double()) * x.sign()).sum())
        ideal += float(((target - x.double()) * x.sign()).sum())
        squares += float((target - x.double()).square().sum())
        n += x.numel()
        x = wide
    return abs(total - ideal) / math.sqrt(squares)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", FP8)
def test_no_drift_over_a_hundred_steps(target, dtype):
    x = random(target, 8, 256, dtype=torch.float32)
    deltas = [random(target, 8, 256, dtype=torch.float32, seed=seed) for seed in range(1, 101)]

    def step(x):
        values, scales = quant_fp8(x, dtype=dtype, impl=target.implementation)
        return dequant_fp8(values, scales, impl=target.implementation), spread(scales, 128, 256).double()

    def truncating(x):
        scales = spread(quant_fp8(x, dtype=dtype, impl=target.implementation).scales, 128, 256).double()
        return (truncated(x.double() / scales, dtype) * scales).float(), scales

    assert drift(step, dtype, x, deltas) <= numerics.BIAS_DEVIATIONS
    assert drift(truncating, dtype, x, deltas) > numerics.BIAS_DEVIATIONS, "truncation is not noticed"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("group_size", [128, 32, None])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0_fp32"])
@pytest.mark.parametrize("apply", ["divide", "reciprocal"])
def test_the_error_is_half_a_step(target, dtype, group_size, scale_format, apply):
    x = random(target, 32, 300, dtype=torch.float32) * torch.exp2(random(target, 32, 300, seed=1).float() * 4)
    values, scales = serve(
        target, quant_fp8, x, group_size=group_size, scale_format=scale_format, dtype=dtype,
        policy=QuantPolicy(apply=apply),
    )  # fmt: skip
    wide = spread(scales, group_size, 300).double()
    exact = values.double() * wide
    # The quotient is rounded once, as a product twice (its factor before it): it may lie on the other side of a tie.
    slack = 2 * torch.finfo(torch.float32).eps * x.double().abs()
    assert ((x.double() - exact).abs() <= half_steps(values) * wide + slack).all()
    back = serve(target, dequant_fp8, values, scales, group_size=group_size)
    assert same_bits(back, exact.float())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", FP8)
def test_division_by_the_maximum_is_exact_for_every_mantissa(target, dtype):
    """A quotient in float64 has more than twice the digits, so rounding it again gives the float32 quotient."""
    bits = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32, device=target.device)
    x = bits.view(torch.float32).unsqueeze(-1)
    scales = serve(target, quant_fp8, x, group_size=None, dtype=dtype).scales
    assert torch.equal(scales.cpu(), (x.cpu().double() / torch.finfo(dtype).max).float())


# Layouts.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("n_rows", "n_cols"), [(5, 130), (8, 512), (1, 128), (13, 1100)])
def test_packed_scales_are_deep_gemms(target, n_rows, n_cols):
    """deepseek-ai/DeepGEMM: tests/test_layout.py, ``get_mn_major_tma_aligned_packed_ue8m0_tensor_torch_impl``."""
    x = random(target, n_rows, n_cols, dtype=torch.float32) * torch.exp2(random(target, n_rows, n_cols, seed=1).float())
    plain = serve(target, quant_fp8, x, scale_format="ue8m0_fp32").scales
    packed = serve(target, quant_fp8, x, **PACKED)
    groups = plain.shape[-1]
    exponents = (plain.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    bytes_of = torch.zeros(n_rows, -(-groups // 4) * 4, dtype=torch.uint8, device=target.device)
    bytes_of[:, :groups] = exponents
    assert packed.scales.dtype == torch.int32
    assert packed.scales.stride() == (1, -(-n_rows // 4) * 4)
    for row in range(n_rows):
        for group in range(groups):
            word = int(packed.scales[row, group // 4]) & 0xFFFFFFFF
            assert (word >> 8 * (group % 4)) & 0xFF == int(bytes_of[row, group])
        last = int(packed.scales[row, -1]) & 0xFFFFFFFF
        assert last >> 8 * ((groups - 1) % 4 + 1) == 0, "bytes of groups that do not exist are zero"
    assert same_bits(packed.values, serve(target, quant_fp8, x, scale_format="ue8m0_fp32").values)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0", "ue8m0_fp32"])
@pytest.mark.parametrize(
    ("layout", "lead", "strides"),
    [
        ("row", (6,), (3, 1)),
        ("column", (6,), (1, 6)),
        ("tma_aligned", (6,), (1, 8)),
        ("row", (2, 3), (9, 3, 1)),
        ("column", (2, 3), (3, 1, 6)),
        ("tma_aligned", (2, 3), (3, 1, 8)),
        ("column", (), (1,)),
    ],
)
def test_layouts_hold_the_same_scales(target, scale_format, layout, lead, strides):
    x = random(target, *lead, 300)
    got = serve(target, quant_fp8, x, scale_format=scale_format, scale_layout=layout)
    assert got.scales.stride() == strides
    assert same_bits(got.scales, serve(target, quant_fp8, x, scale_format=scale_format).scales)


@pytest.mark.parametrize("target", TARGETS)
def test_formats_hold_the_same_scales(target):
    x = random(target, 6, 300)
    numbers = serve(target, quant_fp8, x, scale_format="ue8m0_fp32")
    bytes_of = serve(target, quant_fp8, x, scale_format="ue8m0")
    assert torch.equal(bytes_of.scales.float(), numbers.scales)
    mantissa, _ = torch.frexp(numbers.scales)
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5)), "powers of two"
    for kwargs in ({"scale_format": "ue8m0"}, PACKED):
        got = serve(target, quant_fp8, x, **kwargs)
        assert same_bits(serve(target, dequant_fp8, *got), serve(target, dequant_fp8, *numbers))


# Static scales, several formats, the platform's own dtype.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_given_scale(target, shape):
    x = random(target, 4, 300) * 100
    scale = torch.full(shape, 0.25, device=target.device)
    got = serve(target, quant_fp8, x, scale=scale)
    assert got.scales is scale
    assert same_bits(got.values, fp8((x.float() * 4).clamp(-MAX, MAX)))
    assert int((got.values.float().abs() == MAX).sum()) > 0, "nothing was too large"
    back = serve(target, dequant_fp8, got.values, scale)
    assert same_bits(back, got.values.float() / 4)


@pytest.mark.parametrize("target", TARGETS)
def test_every_format_of_one_launch(target):
    x, residual, weight = random(target, 5, 300), random(target, 5, 300, seed=1), random(target, 300, seed=2)
    also = (MX, QuantFormat(None, scale_layout="column", dtype=torch.float8_e5m2))
    norm = serve(target, rms_norm_quant_fp8, x, weight, also=also, return_norm=True)
    added = serve(target, add_rms_norm_quant_fp8, x, residual, weight, also=also, return_norm=True)
    activation = serve(target, silu_mul_quant_fp8, x, also=also, return_activation=True)
    for result, y in ((norm, norm.norm), (added, added.norm), (activation, activation.activation)):
        first = serve(target, quant_fp8, y)
        second = serve(target, quant_fp8, y, group_size=32, scale_format="ue8m0")
        third = serve(target, quant_fp8, y, group_size=None, scale_layout="column", dtype=torch.float8_e5m2)
        pairs = zip(((result.values, result.scales), *result.also), (first, second, third), strict=True)
        assert all(same_bits(a, b) for got, expected in pairs for a, b in zip(got, expected, strict=True))
    for function, given in ((rms_norm_quant_fp8, (x,)), (add_rms_norm_quant_fp8, (x, residual))):
        assert serve(target, function, *given).norm is None
    assert serve(target, silu_mul_quant_fp8, x).activation is None


def test_the_dtype_of_the_platform(monkeypatch):
    x = random(REFERENCE, 4, 300)
    with monkeypatch.context() as patch:
        patch.setattr(format_module, "facts", lambda device: DeviceFacts("amd", "gfx942", fp8="e4m3fnuz"))
        patch.setattr(op, "_PLANS", op.PlanCache())
        ours = quant_fp8(x, impl="reference")
        assert "e4m3fnuz" in str(tilewright.explain("quant_fp8", x, impl="reference"))
    assert ours.values.dtype == torch.float8_e4m3fnuz
    assert same_bits(ours.values, quant_fp8(x, dtype=torch.float8_e4m3fnuz, impl="reference").values)
    assert torch.equal(ours.values.float().abs().amax(-1), torch.full((4,), QuantPolicy().fnuz_maximum))
    assert quant_fp8(x, impl="reference").values.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("family", "properties", "formats"),
    [
        (nvidia, {"major": 9, "minor": 0}, {"e4m3fn", "e5m2"}),
        (nvidia, {"major": 8, "minor": 9}, {"e4m3fn", "e5m2"}),
        (nvidia, {"major": 8, "minor": 6}, {"e5m2"}),
        (amd, {"gcnArchName": "gfx942:sramecc+"}, {"e4m3fn", "e4m3fnuz", "e5m2"}),
        (amd, {"gcnArchName": "gfx950"}, {"e4m3fn", "e5m2"}),
    ],
)
def test_where_triton_has_a_format(family, properties, formats, monkeypatch):
    properties = SimpleNamespace(name="a GPU", multi_processor_count=4, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = family.facts(0)
    for name, dtype in DTYPES.items():
        verdict = op._triton_supports(device, (torch.bfloat16, dtype), None)
        assert hasattr(verdict, "on_request") == (name in formats)
        assert name in formats or name in verdict.reason


# Edges.

EDGES = {  # group of 32: (changed elements, scale, value of the changed ones, value of the others)
    "zeros": ({}, 2.0**-126, None, 0.0),
    "nan": ({3: math.nan}, math.nan, math.nan, math.nan),
    "infinity": ({3: math.inf}, math.inf, math.nan, 0.0),
    "negative infinity": ({3: -math.inf}, math.inf, math.nan, 0.0),
    "both": ({3: math.inf, 4: math.nan}, math.nan, math.nan, math.nan),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("apply", ["divide", "reciprocal"])
def test_edges(target, edge, dtype, apply):
    changed, scale, there, elsewhere = EDGES[edge]
    x = torch.zeros(2, 80, dtype=dtype, device=target.device) if not changed else random(target, 2, 80, dtype=dtype)
    plain = x.clone()
    for column, value in changed.items():
        x[1, column] = value
    kwargs = {"group_size": 32, "policy": QuantPolicy(apply=apply)}
    got, untouched = serve(target, quant_fp8, x, **kwargs), serve(target, quant_fp8, plain, **kwargs)
    expected = torch.full((32,), elsewhere)
    for column in changed:
        expected[column] = there
    torch.testing.assert_close(got.values[1, :32].float().cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert float(got.scales[1, 0]) == scale or (math.isnan(scale) and bool(got.scales[1, 0].isnan()))
    assert same_bits(got.values[0], untouched.values[0])
    assert same_bits(got.values[1, 32:], untouched.values[1, 32:]), "another group notices"
    assert same_bits(got.scales[:, 1:], untouched.scales[:, 1:])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_no_numbers_have_the_exponent_255(target, bad):
    x = random(target, 1, 256)
    x[0, 0] = bad
    got = serve(target, quant_fp8, x, **PACKED)
    assert int(got.scales[0, 0]) & 0xFF == 255
    assert bool(serve(target, quant_fp8, x, scale_format="ue8m0").scales[0, 0].isnan())
    assert (int(got.scales[0, 0]) >> 8) & 0xFF < 255


@pytest.mark.parametrize("target", TARGETS)
def test_the_last_group_is_of_the_elements_that_exist(target):
    x = random(target, 3, 130)
    got = serve(target, quant_fp8, x)
    assert same_bits(got.scales[:, 1:], serve(target, quant_fp8, x[:, 128:]).scales)
    assert same_bits(got.values[:, 128:], serve(target, quant_fp8, x[:, 128:]).values)


@pytest.mark.parametrize("target", TARGETS)
def test_no_rows(target):
    x, weight = random(target, 0, 300), random(target, 300)
    assert serve(target, quant_fp8, x).values.shape == (0, 300)
    result = serve(target, rms_norm_quant_fp8, x, weight, return_norm=True, also=(MX,))
    assert [tuple(t.shape) for t in (result.scales, result.norm, result.also[0].scales)] == [(0, 3), (0, 300), (0, 10)]
    assert serve(target, dequant_fp8, result.values, result.scales).shape == (0, 300)


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_does_not_depend_on_the_others(target):
    x, weight = random(target, 70, 300), random(target, 300, seed=1)
    together = serve(target, rms_norm_quant_fp8, x, weight)
    for row in (0, 37, 69):
        alone = serve(target, rms_norm_quant_fp8, x[row], weight)
        assert same_bits(alone.values, together.values[row])
        assert same_bits(alone.scales, together.scales[row])


@pytest.mark.parametrize("target", [p for p in TARGETS if p.values[0].implementation == "triton"])
@pytest.mark.parametrize("form", [{}, {"group_size": 32}, PACKED], ids=str)
@pytest.mark.parametrize("function", [quant_fp8, silu_mul_quant_fp8])
@pytest.mark.parametrize("n_cols", [128, 600, 1536])
def test_rows_cut_among_programs(target, function, form, n_cols, monkeypatch):
    """As launch parameters have it where rows are few: whatever they are, the bits are the same."""
    x = random(target, 5, 2 * n_cols if function is silu_mul_quant_fp8 else n_cols)
    results = []
    for cut in (
        None,
        RowBlock(1, 256, 8, resident=False, num_warps=1),
        RowBlock(2, 512, 8, resident=False, num_warps=1),
    ):
        monkeypatch.setattr(kernels, "cut_block", lambda *given, cut=cut: cut)
        monkeypatch.setattr(op, "_PLANS", PlanCache())
        results.append(serve(target, function, x, **form))
    for each in results[1:]:
        assert same_bits(each.values, results[0].values)
        assert same_bits(each.scales, results[0].scales)


@pytest.mark.parametrize("target", [p for p in TARGETS if p.values[0].implementation == "triton"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("offset", [6, 7, 64])
def test_chunks_of_a_rotation_do_not_show(target, resident, interleaved, full, offset, monkeypatch):
    """Rotations that begin and end within chunks of several rows."""
    x = random(target, 1, 3, 2, 160)
    table = [random(target, 3, 80 if full else 40, dtype=torch.float32) for _ in range(2)]
    turn = {"interleaved": interleaved, "rotary_dim": 80, "rotary_offset": offset}
    results = []
    for block in (None, RowBlock(4, 64, 8, resident=resident, num_warps=1)):
        if block is not None:
            monkeypatch.setattr(kernels, "row_block", lambda *given, block=block: block)
            monkeypatch.setattr(kernels, "cut_block", lambda *given: None)
            monkeypatch.setattr(op, "_PLANS", PlanCache())
        form = {"group_size": 32, "also": (QuantFormat(None),), "return_rotated": True}
        results.append(serve(target, rope_quant_fp8, x, *table, **turn, **form))
    whole, cut = ([*each[:3], *each.also[0]] for each in results)
    assert all(map(same_bits, whole, cut))
    assert same_bits(cut[2], serve(target, rope, x, *table, **turn))


def test_where_rows_are_cut():
    gpu, cpu = DeviceFacts(kind="nvidia", n_units=100), DeviceFacts(kind="cpu")

    def chunk(n_rows, n_cols, kind="plain", device=gpu):
        cut = cut_block(n_rows, n_cols, row_block(n_cols, 2, device, kind), kind, device)
        return cut and cut.chunk

    assert chunk(1600, 7168) == 1024
    assert chunk(1600, 7168, "gated") == 512
    assert chunk(1601, 7168) is None
    assert chunk(1601, 2304, "gated") == 512, "two chunks of 2048 are almost twice the row"
    assert chunk(1, 1024) is None, "one chunk holds the row"
    assert chunk(1, 7168, device=cpu) is None


@pytest.mark.gpu
@pytest.mark.parametrize("target", [p for p in TARGETS if p.values[0].on_gpu] or [pytest.param(None, id="no-gpu")])
def test_more_than_two_to_the_31_elements(target):
    if target is None:
        pytest.skip("no GPU on this machine")
    n_cols = 7168
    n_rows = 2**31 // n_cols + 7
    x = torch.empty(n_rows, n_cols, dtype=torch.bfloat16, device=target.device)
    tail = random(target, 9, n_cols)
    x[:-9] = 0
    x[-9:] = tail
    got, expected = (quant_fp8(t, scale_layout="column", impl=target.implementation) for t in (x, tail))
    assert same_bits(got.values[-9:], expected.values)
    assert same_bits(got.scales[-9:], expected.scales)


STATIC = {
    "infinities": ([float("inf"), -float("inf"), 1.0, -0.0], 0.5),
    "an infinity under no power of two": ([float("inf"), 3.0, 1.0, -2.0], 0.3),
    "a huge scale": ([1e38, -2e38, 3e38, 0.0], 1e38),
    "a tiny scale": ([0.0, 1e-40, -1e-40, 1.0], 1e-40),
    "zero": ([0.0, 1.0, -1.0, 2.0], 0.0),
    "minus zero": ([0.0, 1.0, -1.0, 2.0], -0.0),
    "a negative scale": ([0.0, 1.0, -1.0, 2.0], -0.25),
    "an infinite scale": ([0.0, 1.0, -1.0, float("inf")], float("inf")),
    "no number": ([0.0, 1.0, -1.0, 2.0], float("nan")),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("policy", ["exact", "vllm_native_per_token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", STATIC)
def test_a_given_scale_may_be_anything(target, policy, dtype, case):
    numbers, scale = STATIC[case]
    x, scale = torch.tensor(numbers).to(dtype), torch.tensor(scale)
    exact = x.float() / scale if policy == "exact" else x.float() * (torch.ones(()) / scale)
    values = serve(target, quant_fp8, x.to(target.device), scale=scale.to(target.device), policy=policy).values
    assert same_bits(values.float().cpu(), fp8(exact.clamp(-MAX, MAX)).float())


def test_a_fake_gpu_that_is_not_there():
    from torch._subclasses.fake_tensor import FakeTensorMode

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with FakeTensorMode():
        assert quant_fp8(torch.empty(4, 256, device="cuda")).scales.shape == (4, 2)
