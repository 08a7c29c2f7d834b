"""The benchmark of norms and rotation of queries and keys: its providers pass the gate, and what is compiled is one."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tilewright.bench import qk_norm_rope, runner
from tilewright.bench.gate import Gate
from tilewright.bench.providers import evaluate, suite
from tilewright.ops.qk_norm_rope.spec import FAMILY, QkNormRopeWorkload

CPU = torch.device("cpu")
WORKLOADS = [QkNormRopeWorkload("test", 1, 2, 5, 3, 32, 1, interleaved=interleaved) for interleaved in (False, True)]


def task_of(workload, direction="forward", dtype=torch.bfloat16):
    return runner.make_task(suite("qk_norm_rope"), workload, direction, dtype, CPU)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_providers_pass_the_gate(workload, direction, dtype):
    chosen, task = suite("qk_norm_rope"), task_of(workload, direction, dtype)
    assert task.wrt == (0, 1, 2, 3)
    gate, passed = Gate(chosen, task), set()
    for provider in chosen.providers:
        if provider.name == "compile" or provider.available(CPU) is not None or provider.accepts(task) is not None:
            continue
        verdict = gate.judge(provider.prepare([task, task.twin()]))
        assert verdict.ok, (provider.name, verdict.reason)
        passed.add(provider.name)
    assert passed >= {"eager", "reference", "copy"}


def test_what_is_compiled_is_one_graph():
    torch._dynamo.reset()
    counter, task = CompileCounter(), task_of(WORKLOADS[0])
    evaluate(torch.compile(qk_norm_rope.plain, backend=counter, fullgraph=True), task)
    assert counter.frame_count == 1


def test_bytes_of_a_workload():
    workload = QkNormRopeWorkload("test", 1, 1, 2, 3, 4, 1)
    streams, tables, weights = 2 * 4 * 4, 2 * 4 * 4, 2 * 4
    assert workload.bytes_moved(torch.bfloat16, "forward") == 2 * (2 * streams + weights) + tables
    assert workload.bytes_moved(torch.bfloat16, "backward") == 2 * (3 * streams + 2 * weights) + tables
    assert all(workload.kv_heads for workload in FAMILY.workloads)
