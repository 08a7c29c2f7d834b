"""What RMSNorm computes: other libraries' norms, where it rounds, what it makes of unusual rows."""

import math

import pytest
import torch

from rms_norm_helpers import (
    GPU_TRITON,
    HALVES,
    TARGETS,
    double,
    needs_memory,
    plain_norm,
    random,
    same_bits,
    serve,
    wide,
)
from tilewright import add_rms_norm, numerics, rms_norm, settings
from tilewright.ops.rms_norm.spec import RmsNormCase

# The norms of other libraries, each transcribed.


def torch_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def llama_norm(x, weight, eps):
    """``LlamaRMSNorm`` of Hugging Face."""
    hidden_states = wide(x)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + eps)
    return weight * hidden_states.to(x.dtype)


def gemma_norm(x, weight, eps):
    """``GemmaRMSNorm`` of Hugging Face."""
    output = wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
    output = output * (1.0 + wide(weight))
    return output.type_as(x)


OTHERS = {
    "torch": (torch_norm, {"cast": "after_weight"}),
    "llama": (llama_norm, {"cast": "before_weight"}),
    "gemma": (gemma_norm, {"cast": "after_weight", "weight_offset": 1.0}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_agrees_with_other_libraries(target, dtype, other, eps):
    """Results and gradients are as good as theirs."""
    theirs, options = OTHERS[other]
    x = random(target, 6, 5, 48, dtype=dtype).requires_grad_()
    weight = (random(target, 48, seed=1) * 0.1 + 1).to(dtype).requires_grad_()
    grad = random(target, 6, 5, 48, seed=2).bfloat16()

    def outcome(norm, x, weight):
        y = norm(x, weight, eps)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))]

    def ours(x, weight, eps):
        return serve(target, rms_norm, x, weight, eps, **options)

    truths = outcome(theirs, *double(x, weight))
    wrong = numerics.disagreement(
        "result", outcome(ours, x, weight), outcome(theirs, x, weight), truths, reduced=(1, 1, 30)
    )
    assert not wrong, wrong


@pytest.mark.parametrize("target", TARGETS)
def test_the_two_casts_differ_as_they_should(target):
    """Three roundings of which one is left out: each cast is nearer to its own formula than the other is."""
    x, weight = random(target, 256, 64, dtype=torch.bfloat16), random(target, 64, dtype=torch.bfloat16, seed=1)
    norm = plain_norm(x.double())
    formulas = {
        "before_weight": norm.bfloat16().double() * weight.double(),
        "after_weight": norm * weight.double(),
    }
    results = {cast: serve(target, rms_norm, x, weight, cast=cast).double() for cast in formulas}
    for cast, formula in formulas.items():
        errors = {each: float((y - formula).abs().mean()) for each, y in results.items()}
        assert min(errors, key=errors.get) == cast, errors


# The sum.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stream", ["same", torch.float32])
@pytest.mark.parametrize("rounding", ["rounded", "exact"])
def test_residual_formulas(target, dtype, stream, rounding):
    x, weight = random(target, 40, 96, dtype=dtype), random(target, 96, dtype=dtype, seed=1)
    residual = random(target, 40, 96, dtype=dtype if stream == "same" else stream, seed=2)
    got = serve(target, add_rms_norm, x, residual, weight, residual_rounding=rounding)
    total = x.float() + residual.float()
    stored = total.to(residual.dtype)
    assert same_bits(got.residual, stored), "the sum of two numbers, rounded once"
    normed = stored if rounding == "rounded" else total
    reference = (plain_norm(normed.float()).to(dtype).float() * weight.float()).to(dtype)
    # Of the exact sum, not of the one in float32.
    exact = stored.double() if rounding == "rounded" else x.double() + residual.double()
    agreement = numerics.compare(got.y, reference, plain_norm(exact) * weight.double())
    assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
def test_which_sum_is_normalised(target):
    x, residual = random(target, 256, 96, dtype=torch.bfloat16), random(target, 256, 96, dtype=torch.bfloat16, seed=1)
    total = x.double() + residual.double()
    formulas = {"rounded": plain_norm(total.bfloat16().double()), "exact": plain_norm(total)}
    results = {r: serve(target, add_rms_norm, x, residual, residual_rounding=r).y.double() for r in formulas}
    for rounding, formula in formulas.items():
        errors = {each: float((y - formula).abs().mean()) for each, y in results.items()}
        assert min(errors, key=errors.get) == rounding, errors


@pytest.mark.parametrize("target", TARGETS)
def test_a_sum_that_the_stream_cannot_hold(target):
    """Stored as infinity; the norm of the exact sum is finite, that of the stored one is not."""
    x = torch.full((3, 16), torch.finfo(torch.float16).max, dtype=torch.float16, device=target.device)
    rounded = serve(target, add_rms_norm, x, x)
    exact = serve(target, add_rms_norm, x, x, residual_rounding="exact")
    assert (rounded.residual == math.inf).all()
    assert (exact.residual == math.inf).all()
    assert rounded.y.isnan().all()
    assert torch.equal(exact.y, torch.ones_like(x))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strides", ["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_norm_of_a_stored_sum_is_the_norm(target, strides, dtype):
    case = RmsNormCase("", "add_rms_norm", (6, 5, 40), strides=strides, residual_strides=strides)
    x, residual, weight = case.arguments(target.device, dtype).args
    y, stored = serve(target, add_rms_norm, x, residual, weight)
    alone = serve(target, rms_norm, stored, weight)
    if target.implementation == "triton":  # in the same order
        assert same_bits(y, alone)
    truth = plain_norm(stored.double()) * weight.double()
    agreement = numerics.compare(y, alone, truth)
    assert agreement.ok, agreement


# Drift of the residual stream.

LAYERS = 100


def nearest(target, x, residual):
    return serve(target, add_rms_norm, x, residual).residual


def truncating(target, x, residual):
    """A stand-in that cuts bits off where it should round to nearest."""
    total = x.double() + residual.double()
    _, exponent = torch.frexp(total)
    unit = torch.ldexp(torch.full_like(total, torch.finfo(residual.dtype).eps), exponent - 1)
    return ((total / unit).trunc() * unit).to(residual.dtype)


def drift(target, add, dtype):
    """How many standard deviations the mean signed error of a stream lies from zero after many layers.

    Each layer adds numbers between 0 and 1 and rounds the stream, whose error against the sum in float64 is that of all
    roundings so far. Rounding to nearest is off by at most half a unit in the last place and, as often up as down, by
    nothing on the average; so the standard deviation of the mean error of n streams is at most
    ``sqrt(sum over layers of (unit / 2)^2 / n)``.
    """
    generator = torch.Generator().manual_seed(0)
    residual = torch.rand(64, 256, generator=generator).to(target.device, dtype)
    exact = residual.double()
    variance = 0.0
    for _ in range(LAYERS):
        x = torch.rand(64, 256, generator=generator).to(target.device, dtype)
        residual = add(target, x, residual)
        exact = exact + x.double()
        _, exponent = torch.frexp(exact)
        unit = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)
        variance += float((unit / 2).square().mean())
    deviation = math.sqrt(variance / residual.numel())
    return float((residual.double() - exact).mean()) / deviation


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stream_does_not_drift(target, dtype):
    if target.implementation == "triton" and not target.on_gpu and settings.triton_interpret():
        pytest.skip("Triton's interpreter cuts float32 off to bfloat16")
    assert abs(drift(target, nearest, dtype)) <= numerics.BIAS_DEVIATIONS
    assert drift(target, truncating, dtype) < -numerics.BIAS_DEVIATIONS, "the test sees no bias"


# Unusual rows.


def with_row(target, dtype, row, n_cols=40):
    """Random rows, the second of them replaced."""
    x = random(target, 3, n_cols, dtype=dtype)
    x[1] = row
    return x


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
def test_rows_of_zeros(target, dtype, cast):
    x = with_row(target, dtype, 0.0).requires_grad_()
    weight = random(target, 40, dtype=dtype, seed=1).requires_grad_()
    y = serve(target, rms_norm, x, weight, cast=cast)
    grad = random(target, 3, 40, dtype=dtype, seed=2)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert grad_weight.isfinite().all()
    # There the norm is x / sqrt(eps), and so is its derivative.
    scaled = (grad[1].double() * weight.double()).detach()
    reference = (scaled.float() * torch.rsqrt(torch.tensor(1e-6))).to(dtype)
    truth = scaled / math.sqrt(1e-6)
    agreement = numerics.compare(grad_x[1], reference, truth)
    assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_vanish(target, dtype):
    """Denormal numbers, whose squares are zero in float32: eps alone counts."""
    x = with_row(target, dtype, random(target, 40, seed=3) * 1e-39)
    assert (x[1] != 0).any()
    y = serve(target, rms_norm, x)
    agreement = numerics.compare(y[1], plain_norm(x[1]).to(dtype), x[1].double() / math.sqrt(1e-6))
    assert agreement.ok, agreement
    assert (y[1] != 0).any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_exceed_float32(target, dtype):
    x = with_row(target, dtype, 1e30).requires_grad_()
    weight = random(target, 40, dtype=dtype, seed=1).requires_grad_()
    y = serve(target, rms_norm, x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(grad_x[1], torch.zeros_like(grad_x[1]))
    assert grad_weight.isfinite().all()
    in_float64 = serve(target, rms_norm, x.detach().double())
    assert in_float64[1].isfinite().all()
    assert (in_float64[1] != 0).all(), "float64 has room for the squares"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_a_row_with_an_infinity(target, dtype, infinity):
    x = random(target, 3, 40, dtype=dtype)
    clean = serve(target, rms_norm, x)
    x[1, 7] = infinity
    y = serve(target, rms_norm, x)
    assert y[1, 7].isnan()
    others = torch.cat((y[1, :7], y[1, 8:]))
    assert torch.equal(others, torch.zeros_like(others))
    assert same_bits(y[0::2], clean[0::2])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_with_a_nan(target, dtype):
    x = random(target, 3, 40, dtype=dtype)
    clean = serve(target, rms_norm, x)
    x[1, 7] = math.nan
    y = serve(target, rms_norm, x)
    assert y[1].isnan().all()
    assert same_bits(y[0::2], clean[0::2])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_one_column(target, dtype):
    """With eps out of the way, what is left is the sign."""
    x = torch.cat((random(target, 64, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype, device=target.device)))
    y = serve(target, rms_norm, x, eps=2.0**-126)
    agreement = numerics.compare(y, plain_norm(x, 2.0**-126).to(dtype), x.double().sign())
    assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
@pytest.mark.parametrize("rounding", ["rounded", "exact"])
def test_no_rows(target, shape, rounding):
    x, residual = (torch.ones(shape, device=target.device, requires_grad=True) for _ in range(2))
    weight = torch.ones(16, device=target.device, dtype=torch.bfloat16, requires_grad=True)
    y, stored = serve(target, add_rms_norm, x, residual, weight, residual_rounding=rounding)
    assert y.shape == stored.shape == shape
    grads = torch.autograd.grad((y, stored), (x, residual, weight), (torch.ones_like(y), torch.ones_like(stored)))
    assert [g.shape for g in grads] == [torch.Size(shape), torch.Size(shape), torch.Size((16,))]
    assert same_bits(grads[2], torch.zeros_like(weight))


# Rows and runs.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n_cols", [7, 64, 1000, 7168])
@pytest.mark.parametrize("rounding", ["rounded", "exact"])
def test_a_row_does_not_depend_on_the_others(target, n_cols, rounding):
    if target.implementation == "reference" and target.on_gpu:
        pytest.skip("torch chooses a reduction by the shape of all rows")
    x, residual = (random(target, 19, n_cols, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = random(target, n_cols, dtype=torch.bfloat16, seed=2)
    grad = random(target, 19, n_cols, dtype=torch.bfloat16, seed=3)

    def outcome(rows):
        leaf = x[rows].clone().requires_grad_()
        y, _ = serve(target, add_rms_norm, leaf, residual[rows], weight, residual_rounding=rounding)
        return y.detach(), *torch.autograd.grad(y, leaf, grad[rows])

    together = outcome(slice(0, 19))
    for row in (0, 5, 18):
        for alone, batch in zip(outcome(slice(row, row + 1)), together, strict=True):
            assert same_bits(alone[0], batch[row])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(5000, 64), (300, 1000), (3, 40000)])
def test_gradients_are_deterministic(target, shape):
    x, weight = random(target, *shape).requires_grad_(), random(target, shape[1], seed=1).requires_grad_()
    grad = random(target, *shape, seed=2)
    runs = [torch.autograd.grad(serve(target, rms_norm, x, weight), (x, weight), grad) for _ in range(3)]
    for again in runs[1:]:
        for first, other in zip(runs[0], again, strict=True):
            assert same_bits(first, other)


@pytest.mark.parametrize("target", GPU_TRITON)
def test_more_than_two_to_the_31_elements(target):
    needs_memory(target, 24)
    n_cols = 7168
    n_rows = 2**31 // n_cols + 2
    x = torch.zeros(n_rows, n_cols, dtype=torch.bfloat16, device=target.device)
    assert x.numel() > 2**31
    x[-2:] = random(target, 2, n_cols, dtype=torch.bfloat16)
    weight = random(target, n_cols, dtype=torch.bfloat16, seed=1).requires_grad_()
    x.requires_grad_()
    y = serve(target, rms_norm, x, weight)
    # Only the last rows have a gradient of the weight: the others' norms are zero.
    grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    last = x[-2:].detach().requires_grad_()
    found = y[-2:].detach(), grads[0][-2:], grads[1]

    def outcome(x, weight):
        y = rms_norm(x, weight, impl="reference")
        return y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    truths = outcome(*double(last, weight))
    wrong = numerics.disagreement("result", found, outcome(last, weight), truths, reduced=(1, 1, 2))
    assert not wrong, wrong
