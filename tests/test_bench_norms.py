"""The benchmarks of RMSNorm and FP8 quantisation: their providers pass the gate, and what is wrong does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench_helpers import CACHE, EFFORT
from tilewright.bench import norm_peers, quant_fp8, records, report, rms_norm, runner, timing
from tilewright.bench.gate import Gate, spoil
from tilewright.bench.providers import Prepared, evaluate, suite
from tilewright.errors import ArgumentError
from tilewright.numerics import compare
from tilewright.ops.quant_fp8.cases import ADD, NORM, QUANT, ROPE, SILU
from tilewright.ops.quant_fp8.format import DTYPES, QuantFormat
from tilewright.ops.quant_fp8.spec import QuantWorkload
from tilewright.ops.rms_norm.spec import RmsNormWorkload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Direction, Workload

CPU = torch.device("cpu")
PACKED = QuantFormat(scale_format="ue8m0_packed", scale_layout="tma_aligned")
MX = QuantFormat(group_size=32, scale_format="ue8m0")
NORMS = (RmsNormWorkload("test", 1, 9, 96), RmsNormWorkload("test", 1, 9, 96, residual=True))
QUANTS = (
    QuantWorkload("test", 1, NORM, 5, 384),
    QuantWorkload("test", 1, NORM, 6, 384, (QuantFormat(), MX), emit=True),
    QuantWorkload("test", 1, NORM, 5, 384, static=True),
    QuantWorkload("test", 1, ADD, 5, 384),
    QuantWorkload("test", 1, ADD, 5, 384, (QuantFormat(), MX), emit=True),
    QuantWorkload("test", 1, SILU, 5, 384),
    QuantWorkload("test", 1, QUANT, 5, 384),
    QuantWorkload("test", 1, QUANT, 5, 384, (QuantFormat(None),)),
    QuantWorkload("test", 1, QUANT, 6, 640, (PACKED,)),
    QuantWorkload("test", 1, ROPE, 128, 256),
    QuantWorkload("test", 1, ROPE, 128, 128, (QuantFormat(), MX), emit=True),
)
WIDE = QuantWorkload("test", 1, NORM, 32, 1024)


def task_of(family: str, workload: Workload, direction: Direction = "forward", dtype: Any = torch.bfloat16) -> Task:
    return runner.make_task(suite(family), workload, direction, dtype, CPU)


def judged(family: str, task: Task, results: Tensors, formulation: Any = None) -> Any:
    prepared = Prepared(calls=(lambda: None,), results=lambda _: results, formulation=formulation)
    return Gate(suite(family), task).judge(prepared)


def without_compiler(family: str) -> list[str]:
    """The names of the providers that are there on a CPU, but for the compiled ones, which are plain functions too."""
    return [p.name for p in suite(family).providers if p.name != "compile" and p.available(CPU) is None]


# Every provider passes


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("workload", NORMS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_providers_pass_the_gate(workload: RmsNormWorkload, direction: Direction, dtype: torch.dtype) -> None:
    task = task_of("rms_norm", workload, direction, dtype)
    assert task.wrt == tuple(range(len(task.args)))
    assert len(task.grads) == (0 if direction == "forward" else 1 + workload.residual)
    gate = Gate(suite("rms_norm"), task)
    names = without_compiler("rms_norm")
    assert {"eager", "torch", "reference", "copy"} <= set(names)
    for provider in suite("rms_norm").chosen(names):
        assert provider.accepts(task) is None
        verdict = gate.judge(provider.prepare([task, task.twin()]))
        assert verdict.ok, (provider.name, verdict.reason)


@pytest.mark.parametrize("workload", QUANTS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quant_providers_pass_the_gate(workload: QuantWorkload, dtype: torch.dtype) -> None:
    task = task_of("quant_fp8", workload, dtype=dtype)
    gate = Gate(suite("quant_fp8"), task)
    accepted = set()
    for provider in suite("quant_fp8").chosen(without_compiler("quant_fp8")):
        if provider.accepts(task) is None:
            verdict = gate.judge(provider.prepare([task, task.twin()]))
            assert verdict.ok, (provider.name, verdict.reason)
            accepted.add(provider.name)
    assert accepted >= {"eager", "reference", "copy"}
    assert ("two_kernels" in accepted) == ("triton" in accepted and workload.function in (NORM, ADD, ROPE))


def test_plain_parts_are_one_graph() -> None:
    """What is compiled is one graph, a norm with two formats and all it returns included."""
    from torch._dynamo.testing import CompileCounter

    for family, function, workload in (
        ("rms_norm", lambda task: rms_norm.plain, NORMS[1]),
        ("quant_fp8", quant_fp8.plain, QUANTS[4]),
        ("quant_fp8", quant_fp8.plain, QUANTS[8]),
    ):
        counter = CompileCounter()
        task = task_of(family, workload)
        torch.compiler.reset()
        compiled = torch.compile(function(task), backend=counter, dynamic=False, fullgraph=True)
        assert judged(family, task, quant_fp8.with_exponents(evaluate(compiled, task))).ok
        assert counter.frame_count == 1


# What peers are handed, and what they are judged against


class InPlaceNorm(torch.autograd.Function):
    """A peer whose backward writes into the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, *_options: Any) -> torch.Tensor:
        with torch.enable_grad():
            ctx.inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            (ctx.y,) = rms_norm.plain(*ctx.inputs, eps=eps)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grads = torch.autograd.grad(ctx.y, ctx.inputs, grad, retain_graph=True)
        return grad.copy_(grads[0]), grads[1], None, None, None, None, None


class Sum:
    @staticmethod
    def apply(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *_options: Any) -> Any:
        return rms_norm.plain(x, residual, weight, eps=eps)


def norm_of_exact_sum(x: torch.Tensor, weight: torch.Tensor, residual: Any = None, eps: float = 1e-6) -> Any:
    z = x.float() if residual is None else x.float() + residual.float()
    y = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
    return y if residual is None else (y, z.to(x.dtype))


def overwriting_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, **_options: Any) -> None:
    y, stored = norm_of_exact_sum(x, weight, residual, eps)
    x.copy_(y)
    residual.copy_(stored)


def block_quant(
    out: Any, scales: Any, normed: Any, x: Any, residual: Any, weight: Any, eps: float, **_pdl: Any
) -> None:
    """By columns, times the reciprocal of the scale, of the norm of the exact sum."""
    overwriting_sum(normed.copy_(x), residual, weight, eps)
    groups = normed.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    out.copy_((groups * (448.0 / amax)).flatten(-2).to(out.dtype))
    scales[:, : x.shape[0]] = (amax / 448.0).squeeze(-1).T


def act_quant(x: torch.Tensor, block: int, dtype: torch.dtype) -> Tensors:
    groups = x.float().unflatten(-1, (-1, block))
    scale = groups.abs().amax(-1, keepdim=True) / torch.full((), 448.0)
    return (groups / scale).flatten(-2).to(dtype), scale.squeeze(-1)


def act_quant_lhs(x: torch.Tensor, block: int) -> Tensors:
    """The scale is the reciprocal of a rounded reciprocal."""
    groups = x.float().unflatten(-1, (-1, block))
    inverse = (448.0 / groups.abs().amax(-1, keepdim=True).double()).float()
    return (groups * inverse).flatten(-2).to(torch.float8_e4m3fn), (1.0 / inverse).squeeze(-1).T.contiguous().T


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def rms_norm_fn(x: Any, weight: Any, bias: Any, residual: Any = None, eps: float = 1e-6, **_options: Any) -> Any:
        return norm_of_exact_sum(x, weight, residual, eps)

    def rmsnorm(x: Any, weight: Any, eps: float = 1e-6, residual: Any = None, **_options: Any) -> Any:
        return norm_of_exact_sum(x, weight, residual, eps)

    stubs = {
        norm_peers.LIGER: SimpleNamespace(LigerRMSNormFunction=InPlaceNorm),
        norm_peers.LIGER_SUM: SimpleNamespace(LigerFusedAddRMSNormFunction=Sum),
        norm_peers.FLASH_ATTENTION: SimpleNamespace(rms_norm_fn=rms_norm_fn),
        norm_peers.FLASHINFER: SimpleNamespace(
            rmsnorm=rmsnorm, fused_add_rmsnorm=overwriting_sum, fused_add_rmsnorm_fp8_block_quant=block_quant
        ),
        norm_peers.QUACK: SimpleNamespace(rmsnorm=rmsnorm),
        norm_peers.TORCHAO: SimpleNamespace(fp8_blockwise_act_quant=act_quant),
        norm_peers.TORCHAO_TRAINING: SimpleNamespace(triton_fp8_blockwise_act_quant_lhs=act_quant_lhs),
    }
    monkeypatch.setattr(norm_peers, "import_module", stubs.__getitem__)


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("workload", NORMS, ids=lambda workload: workload.name)
def test_norm_peers_pass_the_gate_and_leave_the_task_alone(workload: RmsNormWorkload, direction: Direction) -> None:
    task = task_of("rms_norm", workload, direction)
    gate = Gate(suite("rms_norm"), task)
    before = [value.clone() for value in (*task.args, *task.grads)]
    for provider in suite("rms_norm").chosen(["liger", "flash_attn", "flashinfer", "flashinfer_pdl", "quack"]):
        if provider.name.startswith("flashinfer") and direction == "backward":
            assert provider.accepts(task) == "has no backward"
            continue
        assert provider.accepts(task) is None
        verdict = gate.judge(provider.prepare([task, task.twin()]))
        assert verdict.ok, (provider.name, verdict.reason)
        for value, kept in zip((*task.args, *task.grads), before, strict=True):
            assert torch.equal(value, kept), provider.name


@pytest.mark.usefixtures("peers")
def test_quant_peers_pass_the_gate_and_leave_the_task_alone() -> None:
    passed = set()
    for workload in (QuantWorkload("test", 1, ADD, 5, 512), QuantWorkload("test", 1, QUANT, 5, 512)):
        task = task_of("quant_fp8", workload)
        gate = Gate(suite("quant_fp8"), task)
        before = [value.clone() for value in task.args]
        for provider in suite("quant_fp8").chosen(["flashinfer", "torchao", "torchao_training"]):
            if provider.accepts(task) is None:
                verdict = gate.judge(provider.prepare([task, task.twin()]))
                assert verdict.ok, (provider.name, verdict.reason)
                passed.add((workload.function, provider.name))
        assert all(map(torch.equal, task.args, before))
    assert passed == {(ADD, "flashinfer"), (QUANT, "torchao"), (QUANT, "torchao_training")}


def test_truth_rounds_the_sum_where_the_formulation_does() -> None:
    task = task_of("rms_norm", RmsNormWorkload("test", 1, 64, 256, residual=True))
    x, residual, weight = (value.double() for value in task.args)
    stored = (task.args[0] + task.args[1]).double()
    for formulation, z in ((rms_norm.AFTER_WEIGHT_EXACT_SUM, x + residual), (rms_norm.AFTER_WEIGHT, stored)):
        y, _ = formulation.exact(task)
        expected = z / (z.square().mean(-1, keepdim=True) + norm_peers.EPS).sqrt() * weight
        assert compare(y, expected, expected).ok
    assert not torch.equal(stored, x + residual)


def test_peers_say_what_they_cannot_do() -> None:
    by_name = {provider.name: provider for provider in suite("quant_fp8").chosen(None)}
    refusing = {
        "flashinfer": QUANTS[:3],
        "torchao": QUANTS[:6] + QUANTS[7:],
        "torchao_training": QUANTS[:6] + QUANTS[7:],
    }
    for name, workloads in refusing.items():
        for workload in workloads:
            assert by_name[name].accepts(task_of("quant_fp8", workload)), (name, workload.name)
    assert by_name["flashinfer"].accepts(task_of("quant_fp8", QUANTS[3], dtype=torch.float32))
    wide = RmsNormWorkload("test", 1, 1, 131072)
    for provider in suite("rms_norm").chosen(["liger", "flash_attn"]):
        assert provider.accepts(task_of("rms_norm", wide))


# What is wrong is caught


def one_up(tensor: torch.Tensor) -> torch.Tensor:
    """The next bf16 number of each, farther from zero, in the tensor's own dtype."""
    return (tensor.to(torch.bfloat16).view(torch.int16) + 1).view(torch.bfloat16).to(tensor.dtype)


def truncated(y: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes of ``y`` rounded towards zero."""
    quotient = y.float() / scales.repeat_interleave(128, -1)
    nearest = quotient.to(torch.float8_e4m3fn)
    code = nearest.view(torch.uint8)
    return torch.where(nearest.float().abs() > quotient.abs(), code - 1, code).view(torch.float8_e4m3fn)


def with_row(tensor: torch.Tensor, change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    tensor = tensor.clone()
    change(tensor[-1])
    return tensor


@pytest.mark.parametrize("formulation", [quant_fp8.DEFINITION, quant_fp8.SAME_ARITHMETIC], ids=lambda f: f.name)
def test_wrong_quantisations_are_caught(formulation: Any) -> None:
    task = task_of("quant_fp8", WIDE)
    values, scales = by_definition = formulation.evaluate(task)
    (y,) = rms_norm.plain(*task.args)
    assert judged("quant_fp8", task, by_definition, formulation).ok
    wrong = {
        "scales one bf16 up": (values, one_up(scales)),
        "all one bf16 up": ((y.float() / one_up(scales).repeat_interleave(128, -1)).to(values.dtype), one_up(scales)),
        "truncated": (truncated(y, scales), scales),
        "values of a row missing": (with_row(values, spoil), scales),
        "zeros for a row": (with_row(values, torch.Tensor.zero_), scales),
        "scales of a row missing": (values, with_row(scales, spoil)),
        "another group's scales": (values, scales.roll(1, -1)),
        "another dtype": (values.to(torch.float8_e5m2), scales),
        "too few scales": (values, scales[:, :-1]),
    }
    for what, results in wrong.items():
        assert not judged("quant_fp8", task, results, formulation).ok, what


def test_same_arithmetic_is_held_to_codes() -> None:
    """Quantising the norm before it is rounded is right within half a step, and not the same arithmetic."""
    task = task_of("quant_fp8", WIDE)
    values, scales = quant_fp8.DEFINITION.evaluate(task)
    (unrounded,) = rms_norm.plain(*(value.float() for value in task.args))
    own, own_scales = quant_fp8.plain(replace(task, function=QUANT))(unrounded)
    same_scales = (unrounded / scales.repeat_interleave(128, -1)).clamp(-448, 448).to(values.dtype)
    for results in ((own, own_scales), (same_scales, scales)):
        assert judged("quant_fp8", task, results, quant_fp8.DEFINITION).ok
        assert not judged("quant_fp8", task, results, quant_fp8.SAME_ARITHMETIC).ok


def test_wrong_power_of_two_scales_are_caught() -> None:
    task = task_of("quant_fp8", QuantWorkload("test", 1, QUANT, 6, 640, (PACKED,)))
    values, words = quant_fp8.DEFINITION.evaluate(task)
    assert judged("quant_fp8", task, (values, words)).ok
    halved = (values.float() * 2).clamp(-448, 448).to(values.dtype)
    assert not judged("quant_fp8", task, (halved, words - 1)).ok  # the first group's exponent is one less
    assert not judged("quant_fp8", task, (values, with_row(words, spoil))).ok


def test_wrong_returned_tensors_are_caught() -> None:
    task = task_of("quant_fp8", QUANTS[4])
    results = quant_fp8.DEFINITION.evaluate(task)
    assert judged("quant_fp8", task, results).ok
    for index in range(len(results)):
        wrong = [*results[:index], with_row(results[index], spoil), *results[index + 1 :]]
        assert not judged("quant_fp8", task, tuple(wrong)).ok, index
    static = task_of("quant_fp8", QUANTS[2])
    doubled = replace(static, kwargs={"scale": 2 * static.kwargs["scale"]})  # right by itself
    assert judged("quant_fp8", doubled, quant_fp8.DEFINITION.evaluate(doubled)).ok
    assert not judged("quant_fp8", static, quant_fp8.DEFINITION.evaluate(doubled)).ok


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_steps_are_the_distances_of_codes(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    upper = numbers[numbers >= 0]
    assert torch.equal(quant_fp8.step_at(upper[:-1], dtype), upper.diff())
    assert torch.equal(quant_fp8.step_at(-upper[:-1], dtype), upper.diff())
    between = (upper[1:] + upper[:-1]) / 2
    assert torch.equal(quant_fp8.step_at(between, dtype), upper.diff())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_wrong_norms_are_caught(direction: Direction) -> None:
    task = task_of("rms_norm", RmsNormWorkload("test", 1, 64, 96, residual=True), direction)
    results = suite("rms_norm").formulation.evaluate(task)
    assert judged("rms_norm", task, results).ok
    for index, result in enumerate(results):
        missing = result.clone()
        missing[-1] = torch.nan
        for wrong in (missing, result * 2, torch.zeros_like(result)):
            changed = (*results[:index], wrong.to(result.dtype), *results[index + 1 :])
            assert not judged("rms_norm", task, changed).ok


def test_weight_gradients_may_be_summed_in_another_order() -> None:
    """Their budget grows with the rows, that of the other gradients does not."""
    task = task_of("rms_norm", NORMS[1], "backward")
    assert rms_norm.reduced(task) == (1, 1, 9)
    assert rms_norm.reduced(replace(task, direction="forward")) == (1, 1)
    task = task_of("rms_norm", RmsNormWorkload("test", 1, 64, 96), "backward")
    own = suite("rms_norm").formulation
    expected, truth = own.evaluate(task), own.exact(task)
    for index, passes in ((0, False), (1, True)):  # off by what a sum of 64 rows may be, and one number may not
        off = (expected[index].float() * (1 + 4 * torch.finfo(torch.bfloat16).eps)).to(torch.bfloat16)
        assert not compare(off, expected[index], truth[index]).ok
        results = (*expected[:index], off, *expected[index + 1 :])
        assert judged("rms_norm", task, results).ok is passes


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float8_e8m0fnu, torch.bfloat16, torch.float64], ids=str)
def test_spoiled_memory_is_nan_throughout(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 4).to(dtype).T
    spoil(tensor)
    assert tensor.float().isnan().all()


# A run


def test_runs_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "make_timer", lambda device, quick: timing.HostTimer(EFFORT, cache_bytes=CACHE))
    for family, workload in (("rms_norm", "m64 n7168"), ("quant_fp8", "norm m64 n7168")):
        result = runner.run(
            family, device="cpu", providers=["eager", "copy"], workloads=[workload], output=tmp_path, quiet=True
        )
        assert not result.wrong
        assert workload in report.to_markdown(result.path)
        status = {(r["provider"], r["direction"]): r["status"] for r in records.results(result.records)}
        directions = runner.DIRECTIONS if family == "rms_norm" else ("forward",)  # codes have no backward to measure
        assert status == {(provider, d): "ok" for provider in ("eager", "copy") for d in directions}
    (host,) = records.hosts(result.records)
    assert host["host_us"] > 0
    assert "host_grad_us" not in host  # there is no call with gradients
    assert host["reason"] == suite("quant_fp8").no_gradients


def test_backward_alone_is_refused_without_gradients(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="quant_fp8 has no backward: FP8 codes have no gradients") as caught:
        runner.run("quant_fp8", device="cpu", directions=["backward"], output=tmp_path, quiet=True)
    assert caught.value.argument == "directions"
    assert not list(tmp_path.iterdir())
