"""The demo decoder's evaluation in FP8."""

from __future__ import annotations

import collections
import copy
import dataclasses
import warnings

import pytest
import torch

import tilewright
from models_helpers import HYPER, TINY, tokens
from tilewright.fusion import FusionWarning
from tilewright.models.decoder import Decoder
from tilewright.models.fp8 import (
    SCALE_FORMATS,
    Fp8Linear,
    compiled_validation_loss,
    fp8_validation_loss,
    quantised,
)
from tilewright.models.parts import Parts
from tilewright.models.text import load_corpus
from tilewright.models.training import Recipe, train, validation_loss


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def trained(corpus):
    return train(TINY, Parts.tilewright(), corpus, steps=40, recipe=Recipe(batch=8, learning_rate=1e-2, warmup=5))


def with_wrong_scales(model):
    """The same FP8 decoder, the scales of its weights doubled."""
    for block in model.blocks:
        for linear in (block.qkv, block.out, block.gate_up, block.down):
            values, scales = linear.weight
            linear.weight = (values, (2 * scales.float()).to(scales.dtype))
    return model


SCALES = pytest.mark.parametrize("scale_format", SCALE_FORMATS)


@SCALES
@pytest.mark.parametrize("n_in", [48, 300])
def test_fp8_linear_layer_is_off_by_the_rounding_of_its_operands(scale_format, n_in):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(n_in, 20, bias=False)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
    x = torch.randn(5, n_in, generator=generator)
    layer = Fp8Linear(linear, torch.float32, scale_format)
    quantised_x = tilewright.quant_fp8(x, scale_format=scale_format)

    def rounding(operand, scales):
        # Half a unit in the last place of a normal number, half the least number of any other.
        about = torch.finfo(torch.float8_e4m3fn)
        wide = scales.double().repeat_interleave(128, -1)[:, : operand.shape[1]]
        return torch.maximum(about.eps / 2 * operand.abs(), about.tiny * about.eps / 2 * wide)

    x, weight = x.double(), linear.weight.detach().double()
    of_x, of_weight = rounding(x, quantised_x.scales), rounding(weight, layer.weight.scales)
    allowed = of_x @ weight.abs().T + x.abs() @ of_weight.T + of_x @ of_weight.T
    error = (layer(*quantised_x) - x @ weight.T).abs()
    assert (error <= allowed).all()
    assert (error > 0).any()
    layer.weight = (layer.weight.values, (2 * layer.weight.scales.float()).to(layer.weight.scales.dtype))
    assert not ((layer(*quantised_x) - x @ weight.T).abs() <= allowed).all()


def test_fp8_linear_layer_sums_in_float32_under_autocast():
    x, linear = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), torch.nn.Linear(48, 20, bias=False)
    layer = Fp8Linear(linear, torch.bfloat16, "fp32")
    expected = tilewright.scaled_mm_fp8(tilewright.quant_fp8(x), tilewright.quant_fp8(linear.weight.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(*tilewright.quant_fp8(x)), expected)


@SCALES
@torch.no_grad()
def test_fp8_blocks_quantise_in_one_format_and_where_the_input_is_made(scale_format, monkeypatch):
    calls = []

    def spied(name):
        function = getattr(tilewright, name)
        return lambda *args, **options: calls.append((name, options["scale_format"])) or function(*args, **options)

    sources = ["quant_fp8", "rms_norm_quant_fp8", "add_rms_norm_quant_fp8", "silu_mul_quant_fp8"]
    for name in sources:
        monkeypatch.setattr(tilewright, name, spied(name))
    model = quantised(Decoder(TINY, Parts.tilewright()), torch.float32, scale_format)
    assert [name for name, _ in calls] == ["quant_fp8"] * 4 * TINY.layers  # the weights
    model(tokens(1, 5))
    plain, first, later, activation = sources
    inputs = [name for norm in (first, later) for name in (norm, plain, later, activation)]
    assert [name for name, _ in calls[4 * TINY.layers :]] == inputs
    assert {used for _, used in calls} == {scale_format}


@SCALES
@torch.no_grad()
def test_fp8_blocks_written_step_by_step_have_the_same_bits(scale_format):
    model, x = Decoder(TINY, Parts.tilewright()), tokens(2, 9)
    steps = quantised(model, torch.float32, scale_format, fused=False)(x)
    assert torch.equal(steps, quantised(model, torch.float32, scale_format)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_fp8_evaluation(trained, corpus, dtype, tmp_path, monkeypatch):
    """Every norm and activation of the blocks is fused with its quantisation, and the loss is the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = dataclasses.replace(trained, dtype=dtype)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        loss, report = compiled_validation_loss(run, corpus, "fp32")
    layers = run.model.config.layers
    first = collections.Counter(d.rule for d in report.graphs[0].decisions if d.action == "fused")
    assert first == {"rms_norm_quant": 1, "add_rms_norm_quant": 2 * layers - 1, "silu_mul_quant": layers}
    exact, eager = validation_loss(run, corpus), fp8_validation_loss(run, corpus, "fp32")
    assert abs(loss - eager) < abs(eager - exact)


@SCALES
@torch.no_grad()
def test_fp8_blocks_take_hyper_connections(scale_format):
    model, x = Decoder(HYPER, Parts.tilewright()), tokens(2, 9)
    plain, fp8 = model(x), quantised(model, torch.float32, scale_format)(x)
    wrong = with_wrong_scales(quantised(model, torch.float32, scale_format))(x)
    assert 0 < (fp8 - plain).square().mean() < (wrong - plain).square().mean()


@SCALES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_evaluation_costs_less_than_a_wrong_scale(trained, corpus, scale_format, dtype):
    run = dataclasses.replace(trained, dtype=dtype)
    exact, fp8 = validation_loss(run, corpus), fp8_validation_loss(run, corpus, scale_format)
    wrong = dataclasses.replace(run, model=with_wrong_scales(quantised(run.model, dtype, scale_format)))
    assert 0 < abs(fp8 - exact) < abs(validation_loss(wrong, corpus) - exact)
    assert validation_loss(run, corpus) == exact  # the decoder itself is left alone


class RoundedLinear(torch.nn.Module):
    """A linear layer of the operands that FP8 and back makes of its own."""

    def __init__(self, linear, scale_format):
        super().__init__()
        self.scale_format = scale_format
        self.weight = self.rounded(linear.weight.detach())

    def rounded(self, operand):
        return tilewright.dequant_fp8(*tilewright.quant_fp8(operand, scale_format=self.scale_format))

    def forward(self, x):
        return self.rounded(x) @ self.weight.T


@SCALES
@torch.no_grad()
def test_fp8_decoder_is_the_decoder_of_rounded_operands(trained, scale_format):
    # The same sums, but for a code here and there where SiLU is rounded otherwise: far nearer than the decoder itself.
    rounded, x = copy.deepcopy(trained.model), tokens(4, TINY.context)
    for block in rounded.blocks:
        for layer in (block.attention, block.ffn):
            for name, linear in list(layer.named_children()):
                setattr(layer, name, RoundedLinear(linear, scale_format))
    fp8 = quantised(trained.model, torch.float32, scale_format)
    cost = (rounded(x) - trained.model(x)).square().mean()
    assert (fp8(x) - rounded(x)).square().mean() < cost
