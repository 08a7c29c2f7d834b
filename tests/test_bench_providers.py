"""What the benchmark's providers are handed, and the gate that each passes before it is timed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench_helpers import FAMILY, Rows, bench, found, scale
from tilewright.bench import runner, timing
from tilewright.bench.gate import Gate
from tilewright.bench.providers import FunctionProvider, Prepared, evaluate, suite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tilewright.bench.providers import Task
    from tilewright.ops.contract import Direction

pytestmark = pytest.mark.usefixtures("scaling_family")

# The gate


def test_wrong_provider_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    single = timing.HostTimer.single

    def count(self: timing.HostTimer, calls: Sequence[Callable[[], Any]]) -> timing.Timing:
        timed.append(len(calls))
        return single(self, calls)

    monkeypatch.setattr(timing.HostTimer, "single", count)
    result = bench(tmp_path, providers=["wrong"], directions=["forward"], workloads=["rows 16"])
    n_own = 3  # copy bandwidth at start and end, and the empty kernel
    assert len(timed) == n_own
    (record,) = found(result, "wrong")
    assert record["status"] == "wrong"
    assert "DISAGREES" in record["reason"]
    assert "single" not in record
    assert "stream" not in record
    assert record in result.wrong
    bench(tmp_path, providers=["good"], directions=["forward"], workloads=["rows 16"])
    assert len(timed) == 2 * n_own + 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gate(direction: Direction) -> None:
    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], direction, torch.bfloat16, torch.device("cpu"))
    gate = Gate(chosen, task)
    verdicts = {
        provider.name: gate.judge(provider.prepare([task]))
        for provider in chosen.chosen(["good", "rounded", "wrong", "unwritten", "copy"])
    }
    assert {name for name, verdict in verdicts.items() if verdict.ok} >= {"good", "rounded", "copy"}
    assert not verdicts["wrong"].ok
    if direction == "forward":
        assert not verdicts["unwritten"].ok
    assert verdicts["rounded"].less_precise == "rounds twice"
    assert verdicts["good"].worst <= 1.0 < verdicts["wrong"].worst


def test_gate_rejects_another_dtype_and_another_shape() -> None:
    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], "forward", torch.bfloat16, torch.device("cpu"))
    (exact,) = chosen.formulation.evaluate(task)
    for results in ((exact.float(),), (exact[:-1],), (exact, exact), ()):
        prepared = Prepared(calls=(lambda: None,), results=lambda returned, results=results: results)
        assert not Gate(chosen, task).judge(prepared).ok
    assert Gate(chosen, task).judge(Prepared(calls=(lambda: None,), results=lambda returned: (exact,))).ok


def test_given_outputs_are_poisoned() -> None:
    """A provider that writes nothing must not pass on the strength of what lay in its output before."""
    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], "forward", torch.bfloat16, torch.device("cpu"))
    (exact,) = chosen.formulation.evaluate(task)
    output = exact.clone()
    lazy = Prepared(calls=(lambda: output,), results=lambda returned: (returned,), outputs=(output,))
    assert not Gate(chosen, task).judge(lazy).ok
    assert Gate(chosen, task).judge(replace(lazy, calls=(lambda: output.copy_(exact),))).ok


def test_data_is_random_and_backward_has_gradients() -> None:
    task = runner.make_task(suite("scaling"), FAMILY.workloads[1], "backward", torch.bfloat16, torch.device("cpu"))
    assert task.args[0].requires_grad
    assert not task.args[1].requires_grad
    for tensor in (task.args[0].detach(), *task.grads):
        assert tensor.unique().numel() > 100
        assert tensor.dtype == torch.bfloat16


# Compilation


def test_compiled_provider_survives_many_shapes_and_repeated_backwards() -> None:
    """More shapes than Dynamo recompiles for, each with one graph, and a backward that runs more than once."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compile_ = torch.compile
    chosen = suite("scaling")
    provider = FunctionProvider("compile", "for a test", lambda task: scale, compiled=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
        for rows in range(2, 14):
            task: Task = runner.make_task(chosen, Rows("rows", rows), "backward", torch.float32, torch.device("cpu"))
            prepared = provider.prepare([task, task.twin()])
            verdict = Gate(chosen, task).judge(prepared)
            assert verdict.ok, verdict.reason
            for call in prepared.calls * 2:
                call()
    assert counter.frame_count == 12


def test_compiled_backward_runs_twice_over_one_graph() -> None:
    """The samples of a backward share one graph, here one that has saved an intermediate result."""

    def normalised(x: torch.Tensor, factor: torch.Tensor, *, shift: float) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * factor + shift

    chosen = suite("scaling")
    task = runner.make_task(chosen, FAMILY.workloads[1], "backward", torch.float32, torch.device("cpu"))
    compile_ = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
        prepared = FunctionProvider("compile", "for a test", lambda task: normalised, compiled=True).prepare([task])
    (first,) = prepared.results(prepared.calls[0]())
    (second,) = prepared.results(prepared.calls[0]())
    (expected,) = evaluate(normalised, task)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


# Rotary embedding: what peers are handed, and what they are judged against


class InPlaceRotation(torch.autograd.Function):
    """A peer that rotates q and k [batch, heads, tokens, head_dim] in place, in the tables' dtype."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.tables = cos, sin
        for x in (q, k):
            assert x.transpose(1, 2).is_contiguous()  # what its kernel wants
            InPlaceRotation.turn(x, cos, sin)
        return q.view_as(q), k.view_as(k), cos.view_as(cos), sin.view_as(sin)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, *_tables: Any) -> Any:
        cos, sin = ctx.tables
        for x in (dq, dk):
            InPlaceRotation.turn(x, cos, -sin)
        return dq, dk, None, None

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        x.data.copy_(x.data * cos[:, None] + turned * sin[:, None])


def rotate_by_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    from tilewright.bench.rope import plain

    assert x.dtype == cos.dtype, "Input and cos/sin must have the same dtype"
    return plain(x, cos.float(), sin.float(), interleaved=interleaved)[0]


def rotate_by_angles(
    x: torch.Tensor, freqs: torch.Tensor, *, tensor_format: str, interleaved: bool, fused: bool
) -> torch.Tensor:
    from tilewright.bench.rope import plain

    assert fused
    assert tensor_format == "bshd"
    assert freqs.shape == (x.shape[1], 1, 1, x.shape[3])
    half = freqs[:, 0, 0, ::2] if interleaved else freqs[:, 0, 0, : x.shape[3] // 2]
    return plain(x, half.cos(), half.sin(), interleaved=interleaved)[0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_providers_pass_the_gate(monkeypatch: pytest.MonkeyPatch, direction: Direction, interleaved: bool) -> None:
    from tilewright.bench import peers
    from tilewright.ops.rope.spec import RopeWorkload

    stubs = {
        peers.LIGER: SimpleNamespace(LigerRopeFunction=InPlaceRotation),
        peers.FLASH_ATTENTION: SimpleNamespace(apply_rotary_emb=rotate_by_tables),
        peers.TRANSFORMER_ENGINE: SimpleNamespace(apply_rotary_pos_emb=rotate_by_angles),
    }
    monkeypatch.setattr(peers, "import_module", stubs.__getitem__)
    chosen = suite("rope")
    workload = RopeWorkload("test", 1, 2, 33, 4, 32, kv_heads=2, interleaved=interleaved)
    task = runner.make_task(chosen, workload, direction, torch.bfloat16, torch.device("cpu"))
    assert len(task.wrt) == 2
    gate = Gate(chosen, task)
    before = [value.clone() for value in (*task.args, *task.grads)]
    for provider in chosen.providers:
        if provider.name in {"triton", "compile", "compile_hf"}:  # compiled ones are plain functions, as below
            continue
        if provider.name == "liger" and interleaved:
            assert provider.accepts(task) == "has no interleaved pairs"
            continue
        assert provider.accepts(task) is None
        verdict = gate.judge(provider.prepare([task, task.twin()]))
        assert verdict.ok, (provider.name, verdict.reason)
        assert bool(verdict.less_precise) == (provider.name in {"liger", "flash_attn", "triton_hf"}), provider.name
    for value, kept in zip((*task.args, *task.grads), before, strict=True):
        assert torch.equal(value, kept)  # nobody has written into the task


def test_less_precise_rope_is_told_apart() -> None:
    """Tables and arithmetic in x's dtype pass by their own roundings, and the record shows what they cost."""
    from tilewright.bench import rope
    from tilewright.ops.rope.spec import RopeWorkload

    chosen = suite("rope")
    workload = RopeWorkload("test", 1, 1, 128, 4, 64)
    task = runner.make_task(chosen, workload, "forward", torch.bfloat16, torch.device("cpu"))
    results = evaluate(rope.hugging_face, rope.hugging_face_task(task))
    own = Prepared(calls=(lambda: None,), results=lambda _: results, formulation=rope.HUGGING_FACE)
    gate = Gate(chosen, task)
    loose = gate.judge(own)
    full = gate.judge(replace(own, results=lambda _: evaluate(rope.plain, task), formulation=None))
    assert loose.ok
    assert full.ok
    assert (bool(loose.less_precise), bool(full.less_precise)) == (True, False)
    assert loose.rms_error > 1.2 * full.rms_error > 0.0
