"""The benchmark of graph fusion: its layer, the linear layers around it, what it measures and how it tells."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tilewright
from bench_helpers import CACHE, EFFORT
from fusion_helpers import ON_GPU, fresh, targets  # noqa: F401 - a fixture among them
from tilewright import cli, numerics
from tilewright.bench import fp8_linear, fusion, records, timing
from tilewright.bench.decoder_layer import DecoderLayer, ExactParts, Parts, PlainParts, Sizes, layer_inputs
from tilewright.bench.fp8_linear_kernels import launch_of
from tilewright.errors import BenchmarkError

SIZES = Sizes(
    hidden=256, q_rank=256, kv_rank=128, heads=4, nope=64, rotated=32, value=64, index_heads=2, index=128, ffn=128
)
TINY = fusion.Layer("tiny", SIZES, 3, 0.05)
CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch):
    """A run of one small workload, soon over."""
    monkeypatch.setattr(timing, "make_timer", lambda device, quick: timing.HostTimer(EFFORT, cache_bytes=CACHE))
    monkeypatch.setattr(fusion, "workloads", lambda device: (TINY, TINY._replace(name="tiny too", tokens=2)))


# Linear layers


@pytest.mark.parametrize("device", [CPU, *ON_GPU], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 256), (5, 264, 384), (40, 130, 512), (130, 256, 256), (66, 64, 200)])
def test_the_kernel_of_linear_layers(m, n, k, device):
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randn(rows, k, generator=generator).to(device) for rows in (m, n))
    given = *tilewright.quant_fp8(x.bfloat16()), *fp8_linear.quantised_blocks(weight)
    reference, truth = fp8_linear.definition(*given), fp8_linear.exact(*given)
    for transposed in (given, (given[0], given[1].t().contiguous().t(), *given[2:])):
        assert numerics.compare(fp8_linear.by_triton(*transposed), reference, truth).ok
    wrong = given[0], given[1].flip(0), *given[2:]
    assert m == 1 or not numerics.compare(fp8_linear.by_triton(*wrong), reference, truth).ok


def test_tiles_lie_within_a_block_of_the_weight():
    assert all(fp8_linear.GROUP % launch_of(m).block_n == 0 for m in (1, 16, 17, 64, 65, 1024))


def test_weights_are_quantised_by_blocks():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    values, scales = fp8_linear.quantised_blocks(weight)
    assert values.shape == weight.shape
    assert scales.shape == (2, 3)
    assert scales.stride() == (4, 1), "rows begin at multiples of 16 bytes"
    assert scales[1, 2] == weight[128:, 256:].abs().max() / 448
    back = fp8_linear.dequantised(values, fp8_linear.by_rows(scales, 200))
    assert (back - weight).abs().max() <= scales.max() * 448 * 2**-4  # half a unit of three bits of mantissa


def test_the_fastest_right_kernel_serves(monkeypatch):
    given = *tilewright.quant_fp8(torch.randn(4, 256).bfloat16()), *fp8_linear.quantised_blocks(torch.randn(128, 256))

    def broken(*tensors):
        raise RuntimeError("not on this device")

    kernels = {
        "slow": fp8_linear.definition,
        "wrong": lambda *tensors: fp8_linear.definition(*tensors) + 1,
        "broken": broken,
        "fast": fp8_linear.definition,
    }
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(fp8_linear, "KERNELS", kernels)
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **effort: (call(), next(seconds))[1])
    choice = fp8_linear.choose(given)
    assert choice.kernel == "fast"
    assert choice.us == {"slow": 2000.0, "fast": 1000.0}
    assert choice.reasons["broken"] == "RuntimeError: not on this device"
    assert "DISAGREES" in choice.reasons["wrong"]
    monkeypatch.setattr(fp8_linear, "KERNELS", {"broken": broken})
    with pytest.raises(BenchmarkError, match="not on this device"):
        fp8_linear.choose(given)


# The layer


@pytest.mark.parametrize("device", [CPU, *ON_GPU], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("form", fusion.FORMS)
def test_the_layer_fuses_completely(form, tokens, device):
    layer, given = DecoderLayer(SIZES, fusion.FORMS[form], device=device), layer_inputs(SIZES, tokens, device)
    with torch.no_grad():
        compiled = tilewright.compile(
            layer, fullgraph=True, expect=fusion.EXPECTED[form], unmet="raise", verify=True, dynamic=False
        )
        results, expected = fusion.numbers(compiled(*given)), fusion.numbers(layer(*given))
        exact = DecoderLayer(SIZES, ExactParts, device=device).double()
        truth = fusion.numbers(exact(*(tensor.double() for tensor in given)))
    assert not numerics.disagreement(form, results, expected, truth)
    there = targets(compiled.fusion_report)
    assert "tilewright.rms_norm.default" not in there
    rotated = there.count("tilewright.rope.default")
    assert rotated == (2 if form == "operators" else 0), "attention's queries, with what is beside them, and its keys"
    alone = there.count("tilewright.quant_fp8.default")
    assert alone == (1 if form == "operators" else 0), "of attention's result"


def test_both_ways_to_write_it_are_one_layer():
    given = layer_inputs(SIZES, 4)
    with torch.no_grad():
        own, plain = (fusion.numbers(DecoderLayer(SIZES, parts)(*given)) for parts in (Parts, PlainParts))
        other = fusion.numbers(DecoderLayer(SIZES, PlainParts, seed=1)(*given))
        truth = fusion.numbers(DecoderLayer(SIZES, ExactParts).double()(*(tensor.double() for tensor in given)))
    assert not numerics.disagreement("plain PyTorch", plain, own, truth)
    assert numerics.disagreement("other weights", other, own, truth)


# What is measured


def test_runs_and_is_reported(short, capsys, tmp_path):
    assert (
        cli.main(["bench", "fusion", "--device", "cpu", "--workloads", "tiny", "--output", str(tmp_path / "to")]) == 0
    )
    shown = capsys.readouterr().out
    assert "plain PyTorch" in shown
    (path,) = (tmp_path / "to").iterdir()
    run, *found = records.read(path)
    assert run["family"] == "fusion"
    results = [record for record in found if record["record"] == "result"]
    assert {(r["form"], r["fusion"]) for r in results} == {(form, on) for form in fusion.FORMS for on in (False, True)}
    for record in results:
        assert record["status"] == "ok", record["reason"]
        assert record["report"]["counts"] == (fusion.EXPECTED[record["form"]] if record["fusion"] else {})
        inlined = record["fusion"] and record["form"] == "plain PyTorch"
        assert len(record["report"]["refused"]) == (2 if inlined else 0)
        assert not any("decoder_layer.py" in each for each in record["report"]["refused"]), "where a machine has it"
        assert record["report"]["graphs"] == int(record["fusion"]), "layers of one kind share their code"
        assert len(record["rounds_us"]) == fusion.ROUNDS
        assert record["stream"]["median_us"] in record["rounds_us"]
    ratios = [record for record in found if record["record"] == "ratio"]
    assert [record["form"] for record in ratios] == list(fusion.FORMS)
    assert all(record["met"] == (record["saved"] >= 0.05) for record in ratios)


def test_the_part_of_a_compilation_that_the_pass_takes(short, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fusion, "STACK", fusion.Stack("compilation of 2 layers", SIZES, 2, 0.02))
    options = ["--device", "cpu", "--workloads", "compilation", "--output", str(tmp_path / "to")]
    assert cli.main(["bench", "fusion", *options]) == 0
    assert "of which the pass" in capsys.readouterr().out
    _, *found = records.read(next((tmp_path / "to").iterdir()))
    assert [record["form"] for record in found] == list(fusion.FORMS)
    for record in found:
        assert record["counts"] == {rule: 2 * n for rule, n in fusion.EXPECTED[record["form"]].items()}
        assert 0 < record["pass_seconds"] < record["seconds"]
        assert record["met"] == (record["share"] <= 0.02)


def test_what_is_wrong_is_told_and_not_timed(short, monkeypatch, capsys, tmp_path):
    compile = tilewright.compile

    def off_by_a_little(function, *, fusion, **options):
        compiled = compile(function, fusion=fusion, **options)
        if not fusion:
            return compiled

        def call(*args):
            results = compiled(*args)
            return results._replace(y=results.y * 1.5)

        call.fusion_report = compiled.fusion_report
        return call

    monkeypatch.setattr(tilewright, "compile", off_by_a_little)
    status = cli.main(
        ["bench", "fusion", "--device", "cpu", "--workloads", "tiny too", "--output", str(tmp_path), "--json"]
    )
    assert status == cli.EXIT_DISAGREEMENT
    _, *found = json.loads(capsys.readouterr().out)
    by_status = {(r["fusion"], r["status"], "stream" in r) for r in found if r["record"] == "result"}
    assert by_status == {(False, "ok", True), (True, "wrong", False)}
    assert all(r["saved"] is None and not r["met"] for r in found if r["record"] == "ratio")
    console = SimpleNamespace(lines=[], print=lambda *what, **how: console.lines.append(str(what[0])))
    fusion.show([{"record": "run", "device": "a processor"}, *found], console)
    assert sum("WRONG: tiny too" in line for line in console.lines) == len(fusion.FORMS)


def test_a_contestant_that_raises_is_told(short, monkeypatch):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("no compiler")

        call.fusion_report = tilewright.fusion.FusionReport()
        return call

    monkeypatch.setattr(tilewright, "compile", broken)
    timer = timing.HostTimer(EFFORT, cache_bytes=CACHE)
    found = fusion.measure_workload(TINY, timer)
    assert {r["reason"] for r in found if r["record"] == "result"} == {"RuntimeError: no compiler"}


def test_workloads_of_an_accelerator_have_goals():
    there = fusion.workloads(torch.device("meta"))
    assert {layer.tokens: layer.least for layer in there} == {1: 0.05, 64: 0.05, 1024: 0.10}
    assert len({layer.name for layer in there}) == len(there)
    whole, eighth = there[-1].sizes, there[0].sizes
    assert replace(whole, heads=whole.heads // 8, ffn=whole.ffn // 8) == eighth


@pytest.mark.parametrize("option", [("--dtype", "float16"), ("--providers", "triton"), ("--directions", "forward")])
def test_options_that_say_nothing_here_are_refused(option, capsys):
    assert cli.main(["bench", "fusion", *option]) == cli.EXIT_ERROR
    assert "workloads of its own" in capsys.readouterr().err
