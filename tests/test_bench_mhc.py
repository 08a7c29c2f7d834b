"""The benchmark of hyper-connections: its providers pass the gate, and what is wrong does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench_helpers import CACHE, EFFORT
from tilewright.bench import mhc, mhc_peers, records, report, runner, timing
from tilewright.bench.gate import Gate
from tilewright.bench.providers import Prepared, evaluate, suite
from tilewright.numerics import compare
from tilewright.ops.mhc.cases import HEAD, POST, POST_PRE, PRE
from tilewright.ops.mhc.reference import rounded_fn
from tilewright.ops.mhc.spec import MhcWorkload

if TYPE_CHECKING:
    from pathlib import Path

    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Direction

CPU = torch.device("cpu")
FUNCTIONS = (PRE, POST, POST_PRE, HEAD)
DIRECTIONS = ("forward", "backward")


def task_of(function: str, direction: Direction = "forward", dtype: Any = torch.bfloat16, **shape: int) -> Task:
    workload = MhcWorkload(function, **({"tokens": 9, "hidden": 64} | shape))
    return runner.make_task(suite("mhc"), workload, direction, dtype, CPU)


def judged(task: Task, results: Tensors, formulation: Any = None) -> Any:
    prepared = Prepared(calls=(lambda: None,), results=lambda _: results, formulation=formulation)
    return Gate(suite("mhc"), task).judge(prepared)


# Every provider passes


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_providers_pass_the_gate(function: str, direction: Direction, dtype: torch.dtype) -> None:
    task = task_of(function, direction, dtype)
    assert task.wrt == tuple(range(len(task.args)))
    gate, passed = Gate(suite("mhc"), task), set()
    for provider in suite("mhc").providers:
        if provider.name == "compile" or provider.available(CPU) is not None:
            continue
        assert provider.accepts(task) is None
        verdict = gate.judge(provider.prepare([task, task.twin()]))
        assert verdict.ok, (provider.name, verdict.reason)
        passed.add(provider.name)
    assert passed >= {"eager", "reference", "copy"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_plain_pytorch_is_one_graph(function: str) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, task = CompileCounter(), task_of(function)
    torch.compiler.reset()
    compiled = torch.compile(mhc.plain(task), backend=counter, dynamic=False, fullgraph=True)
    assert judged(task, evaluate(compiled, task)).ok
    assert counter.frame_count == 1


def test_tilelang_is_for_inference() -> None:
    (provider,) = suite("mhc").chosen(["tilelang"])
    assert provider.available(CPU)
    assert provider.accepts(task_of(PRE, "backward")) == "has no backward, and stores nothing for one"
    assert "NVIDIA" in (provider.accepts(task_of(PRE)) or "")  # dispatch would not let it


# What peers are handed, and what they are judged against


class TileNormFn(torch.autograd.Function):
    """TileKernels' projection: weights and the gradient of the product in tf32, all streams' gradients in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fn: torch.Tensor, eps: float, fuse_grad_acc: bool) -> torch.Tensor:
        assert x.dim() == 4
        assert fn.shape[0] == 24
        rows, weights = x.flatten(0, 1).flatten(1).float(), tf32(fn)
        product, rstd = rows @ weights.T, torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(rows, weights, product, rstd)
        ctx.fuse_grad_acc, ctx.shape = fuse_grad_acc, x.shape
        return (product * rstd).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.fuse_grad_acc:
            raise AttributeError("'UntypedStorage' object has no attribute 'grad_from_mhc_post'")
        rows, weights, product, rstd = ctx.saved_tensors
        grad = grad.squeeze(0)
        spread = -(grad * product).sum(-1, keepdim=True) * rstd**3 / rows.shape[-1]
        narrow = tf32(grad * rstd)
        streams = narrow @ weights + spread * rows
        return streams.bfloat16().view(ctx.shape), narrow.T @ rows, None, None


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 11 significant bits."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent).float()


def tile_norm_fn(x: Any, fn: Any, weight: None, eps: float, fuse_grad_acc: bool = True) -> torch.Tensor:
    return TileNormFn.apply(x, fn, eps, fuse_grad_acc)


def tile_split(mixes: torch.Tensor, scale: Any, base: Any, n: int, post_mult: float, eps: float) -> Tensors:
    scaled = mixes * scale.repeat_interleave(torch.tensor([n, n, n * n])) + base
    pre, post, comb = scaled.split([n, n, n * n], -1)
    return pre.sigmoid().unsqueeze(-1) + eps, post.sigmoid().unsqueeze(-1) * post_mult, comb.unflatten(-1, (n, n))


def sinkhorn(logits: torch.Tensor, repeat: int = 10, eps: float = 1e-6) -> torch.Tensor:
    y = logits.softmax(-1) + eps
    y = y / (y.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        y = y / (y.sum(-1, keepdim=True) + eps)
        y = y / (y.sum(-2, keepdim=True) + eps)
    return y


def tile_apply(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    return (x.float() * mix).sum(-2).bfloat16()


def tile_post(x: torch.Tensor, residual: torch.Tensor, post_mix: torch.Tensor, comb_mix: torch.Tensor) -> torch.Tensor:
    assert residual.dim() == post_mix.dim() == 4
    assert post_mix.shape[-1] == 1
    mixed = torch.einsum("abij,abih->abjh", comb_mix, residual.float())
    return (post_mix * x.float().unsqueeze(-2) + mixed).bfloat16()


def tile_gate(mixes: torch.Tensor, scale: Any, base: Any, eps: float) -> torch.Tensor:
    assert mixes.is_contiguous()
    return (mixes * scale + base).sigmoid() + eps


def tile_pre(
    residual: torch.Tensor, fn: Any, scale: Any, base: Any, *, norm_eps: float, mhc_mult: int, post_mult_value: float,
    pre_eps: float, sinkhorn_eps: float, sinkhorn_repeat: int,
) -> Any:  # fmt: skip
    assert not torch.is_grad_enabled()  # or it would compute for a backward
    mixes = tile_norm_fn(residual, fn, None, norm_eps)
    pre, post, comb = tile_split(mixes, scale, base, mhc_mult, post_mult_value, pre_eps)
    return tile_apply(residual, pre), (post, sinkhorn(comb, sinkhorn_repeat, sinkhorn_eps))


def in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def liger_coeffs(x: Any, phi: Any, b: Any, *rest: Any) -> Tensors:
    *alphas, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult = rest
    assert phi.dtype == x.dtype
    assert phi.is_contiguous()
    assert not allow_fp32
    n, rows = x.shape[1], x.flatten(1).float()
    product = mhc.rounding_gradient(in_bfloat16)(rows @ phi.float())
    mixes = product * torch.rsqrt(rows.square().mean(-1, keepdim=True) + rms_eps)
    pre, post, res = mixes.split([n, n, n * n], -1)
    pre_b, post_b, res_b = b.split([n, n, n * n])
    logits = (res * alphas[2] + res_b).view(-1, n, n)
    return (
        (pre * alphas[0] + pre_b).sigmoid() + pre_eps,
        (post * alphas[1] + post_b).sigmoid() * post_mult,
        sinkhorn(logits, tmax, sinkhorn_eps),
    )


def liger_post(x: torch.Tensor, f_out: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    """``h_res`` in the paper's orientation: new streams by old ones."""
    assert h_res.is_contiguous()
    mixed = torch.einsum("toi,tih->toh", h_res, x.float())
    return (h_post.unsqueeze(-1) * f_out.float().unsqueeze(1) + mixed).to(x.dtype)


def liger_pre(x: torch.Tensor, h_pre: torch.Tensor) -> torch.Tensor:
    return (x.float() * h_pre.unsqueeze(-1)).sum(1).to(x.dtype)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = {
        mhc_peers.TILE_KERNELS: SimpleNamespace(mhc_pre=tile_pre),
        mhc_peers.TILE_KERNELS_OPS: SimpleNamespace(
            mhc_pre_norm_fn=tile_norm_fn,
            mhc_pre_split_mixes=tile_split,
            sinkhorn_normalize=sinkhorn,
            mhc_pre_apply_mix=tile_apply,
            mhc_post=tile_post,
            mhc_head_compute_mix=tile_gate,
        ),
        mhc_peers.LIGER: SimpleNamespace(
            LigerMHCCoeffsFunction=SimpleNamespace(apply=liger_coeffs),
            LigerMHCPreFunction=SimpleNamespace(apply=liger_pre),
            LigerMHCPostResFunction=SimpleNamespace(apply=liger_post),
        ),
    }
    monkeypatch.setattr(mhc_peers, "import_module", stubs.__getitem__)


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("peer", ["tilekernels", "liger"])
def test_peers_pass_the_gate_and_leave_the_task_alone(peer: str, function: str, direction: Direction) -> None:
    task = task_of(function, direction)
    (provider,) = suite("mhc").chosen([peer])
    if (peer, function) == ("liger", HEAD):
        assert provider.accepts(task) == "has no head"
        return
    assert provider.accepts(task) is None
    before = [value.clone() for value in (*task.args, *task.grads)]
    verdict = Gate(suite("mhc"), task).judge(provider.prepare([task, task.twin()]))
    assert verdict.ok, verdict.reason
    assert bool(verdict.less_precise) == (function != POST)
    assert all(map(torch.equal, (*task.args, *task.grads), before))


@pytest.mark.usefixtures("peers")
def test_a_forward_that_records_gradients_can_be_called() -> None:
    """Its time on the host is measured too."""
    workload = MhcWorkload(PRE, 3, 64)
    task = runner.make_task(suite("mhc"), workload, "forward", torch.bfloat16, CPU, gradients=True)
    for provider in suite("mhc").chosen(["tilekernels", "liger"]):
        verdict = Gate(suite("mhc"), task).judge(provider.prepare([task]))
        assert verdict.ok, (provider.name, verdict.reason)


def test_peers_say_what_they_cannot_do() -> None:
    tilekernels, liger = suite("mhc").chosen(["tilekernels", "liger"])
    assert tilekernels.accepts(task_of(PRE, dtype=torch.float16)) == "takes bfloat16 only"
    assert tilekernels.accepts(task_of(PRE, streams=2)) == "takes 4 streams"
    assert tilekernels.accepts(task_of(POST, hidden=72)) == "takes multiples of 64 columns"
    assert liger.accepts(task_of(PRE, dtype=torch.float32)) == "takes float16 and bfloat16"
    assert liger.accepts(task_of(POST, streams=3)) == "takes a power of two streams, 2 or more"
    huge = torch.empty(1, dtype=torch.bfloat16).expand(131072, 4, 4096)
    task = task_of(PRE)
    assert liger.accepts(replace(task, args=(huge, *task.args[1:]))) == "counts elements of streams in 32 bits"
    for provider in (tilekernels, liger):
        assert provider.accepts(task_of(POST)) is None
        assert provider.available(CPU) == "runs on accelerators only"


def test_sums_on_tensor_cores_are_rounded_toward_zero() -> None:
    fine = 2.0**-23  # between float32 numbers beside 1
    rows = torch.tensor([[1, 0.75 * fine, 0.75 * fine, 0.75 * fine], [-1, -0.75 * fine, 0, 2 * fine]])
    multiply = mhc.on_tensor_cores(2, lambda grad: grad)
    assert multiply(rows, torch.ones(1, 4)).tolist() == [[1 + fine], [-1 + 2 * fine]]
    multiply = mhc.on_tensor_cores(1, lambda grad: grad)
    assert multiply(rows, torch.ones(1, 4)).tolist() == [[1.0], [-1 + 2 * fine]]


def test_tf32_is_rounded_to_nearest() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mhc.to_tf32(x), tf32(x))
    halfway = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11])
    assert torch.equal(mhc.to_tf32(halfway), torch.tensor([1 + 2.0**-10, -1 - 2.0**-10, 1 + 2 * 2.0**-10]))


# What is true


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_truth_does_not_depend_on_how_it_is_cut(
    function: str, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(function, direction)
    whole = mhc.exact(task)
    assert all(t.dtype == torch.float64 for t in whole)
    monkeypatch.setattr(mhc, "CHUNK", 4 * 4 * 64)  # tokens: 4, 4 and 1
    for cut, result, n in zip(mhc.exact(task), whole, mhc.reduced(task), strict=True):
        agreement = compare(cut, result, result, reduced=max(n, 4 * 64))
        assert agreement.ok, agreement


def test_the_truth_rounds_the_new_streams() -> None:
    task = task_of(POST_PRE)
    new, *mixes = mhc.exact(task)
    assert torch.equal(new.bfloat16().double(), new)
    second = replace(task, function=PRE, args=(new.bfloat16(), *task.args[4:]))
    for mix, expected in zip(mixes, mhc.exact(second), strict=True):
        agreement = compare(mix, expected, expected, reduced=4 * 64)
        assert agreement.ok, agreement


def test_gradients_are_judged_as_in_the_grid() -> None:
    """Those of weights sum over tokens, those of mixes over columns, those of the streams over nothing."""
    tokens, cols = 9, 64
    streams, *weights = mhc.reduced(task_of(PRE, "backward"))
    assert streams == 1
    assert all(n >= tokens for n in weights)
    assert mhc.reduced(task_of(POST, "backward")) == (1, 1, cols, cols)
    assert mhc.reduced(task_of(POST_PRE, "backward")) == (1, 1, cols, cols, *weights)
    assert mhc.reduced(task_of(PRE)) == (1, 1, 1)
    assert mhc.reduced(task_of(HEAD, dtype=torch.float32)) == (4 * cols,)
    assert mhc.reduced(task_of(POST, dtype=torch.float32)) == (1,)


# What is wrong is caught


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_results_are_caught(function: str, direction: Direction) -> None:
    task = task_of(function, direction)
    for formulation in (f(task) for f in (mhc.definition, mhc.two_numbers, mhc.eager, mhc.compiled, mhc.tf32)):
        results = formulation.evaluate(task)
        assert judged(task, results, formulation).ok, formulation.name
        for index, result in enumerate(results):
            missing = result.clone()
            missing[-1] = torch.nan
            for wrong in (missing, result * 2, torch.zeros_like(result)):
                changed = (*results[:index], wrong.to(result.dtype), *results[index + 1 :])
                assert not judged(task, changed, formulation).ok, (formulation.name, index)


def test_the_other_orientation_is_caught() -> None:
    task = task_of(POST)
    transposed = replace(task, args=(*task.args[:3], task.args[3].mT.contiguous()))
    assert not judged(task, mhc.DEFINITION.evaluate(transposed)).ok
    task = task_of(PRE)
    post, comb, layer_input = mhc.DEFINITION.evaluate(task)
    assert not judged(task, (post, comb.mT.contiguous(), layer_input)).ok


@pytest.mark.parametrize("function", [PRE, POST_PRE])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_weights_are_judged_as_they_are_rounded(function: str, direction: Direction) -> None:
    """From the finest to the coarsest: none passes for a finer one. The more tokens a gradient sums over, the more
    of its rounding may go either way: few of them tell the formulations apart, whatever the data."""
    task = task_of(function, direction, tokens=8, hidden=256)
    finest_first = [mhc.two_numbers(task), mhc.tf32(task), mhc.streams_dtype(task)]
    for rank, finer in enumerate(finest_first):
        for coarser in finest_first[rank + 1 :]:
            results = tuple(r.to(e.dtype) for r, e in zip(coarser.evaluate(task), finer.evaluate(task), strict=True))
            assert not judged(task, results, finer).ok, (coarser.name, finer.name)
    assert not torch.equal(rounded_fn(task.args[-3].detach()), task.args[-3])


def test_mixes_of_streams_that_are_not_rounded_are_caught_but_for_a_compiler() -> None:
    task = task_of(POST_PRE, tokens=64, hidden=256)
    results = mhc.compiled(task).evaluate(task)
    assert not judged(task, results, mhc.definition(task)).ok
    assert judged(task, results, mhc.compiled(task)).ok


def test_a_rounding_of_the_new_streams_counts_once() -> None:
    """One number of the new streams rounded the other way changes every mix of its token."""
    task = task_of(POST_PRE, tokens=1)
    new, *_ = mhc.definition(task).evaluate(task)
    exact = mhc.exact(replace(task, function=POST, args=task.args[:4]))[0]
    off = new.clone()
    place = (new.double() - exact).abs().argmax()  # nearest to halfway between two numbers
    up = bool(exact.flatten()[place] > new.double().flatten()[place])
    neighbour = torch.nextafter(new.flatten()[place], torch.tensor(torch.inf if up else -torch.inf).bfloat16())
    off.view(-1)[place] = neighbour
    second = mhc.DEFINITION.evaluate(replace(task, function=PRE, args=(off, *task.args[4:])))
    assert not judged(task, (off, *second)).ok
    verdict = judged(task, (off, *second), mhc.definition(task))
    assert verdict.ok, verdict.reason


# A run


def test_runs_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "make_timer", lambda device, quick: timing.HostTimer(EFFORT, cache_bytes=CACHE))
    result = runner.run(
        "mhc",
        device="cpu",
        providers=["eager", "liger", "copy"],
        workloads=["post t1 h7168", "pre t1 h7168"],
        output=tmp_path,
        quiet=True,
    )
    assert not result.wrong
    assert "pre t1 h7168 n4" in report.to_markdown(result.path)
    found = records.results(result.records)
    assert {(r["provider"], r["function"], r["direction"], r["status"]) for r in found} == {
        (provider, function, direction, "ok")
        for provider in ("eager", "copy")
        for function in (PRE, POST)
        for direction in DIRECTIONS
    }
    assert result.records[0]["providers"]["liger"]["missing"] == "runs on accelerators only"
