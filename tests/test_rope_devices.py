"""Rotary embedding beyond 2**31 elements, in graphs, on several devices and from several threads."""

import threading

import pytest
import torch

from rope_helpers import GPU_TRITON, TARGETS, integers, random, same_bits, serve, tables
from tilewright import rope, rope_qk, rope_table


def needs_memory(target, gibibytes):
    free, _ = torch.cuda.mem_get_info(target.device)
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of device memory")


@pytest.mark.parametrize("target", GPU_TRITON)
def test_more_than_two_to_the_31_elements(target):
    needs_memory(target, 10)
    seqlen = 65536 + 1
    x = torch.empty(seqlen, 4, 64, 128, dtype=torch.bfloat16, device=target.device)
    assert x.numel() > 2**31
    x[-2:] = random(target, 2, 4, 64, 128, dtype=torch.bfloat16)
    cos, sin = tables(target, 128, seqlen)
    y = serve(target, rope, x, cos, sin, layout="sbhd")
    last = torch.arange(seqlen - 2, seqlen, device=target.device)
    expected = rope(x[-2:], cos, sin, layout="sbhd", position_ids=last, impl="reference")
    assert same_bits(y[-2:], expected)
    del y
    rope(x, cos, sin, layout="sbhd", inplace=True, impl="triton")
    assert same_bits(x[-2:], expected)


@pytest.mark.parametrize("target", GPU_TRITON)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
def test_a_view_that_spans_more_than_two_to_the_31_elements(target, axis):
    needs_memory(target, 6)
    shape, strides = [2, 2, 2, 64], [256, 128, 64, 1]
    strides[axis] = 2**31 + 1024
    memory = torch.empty(strides[axis] + 1024, dtype=torch.bfloat16, device=target.device)
    x = memory.as_strided(shape, strides)
    x.copy_(random(target, *shape, dtype=torch.bfloat16))
    cos, sin = tables(target, 64, 2)
    expected = rope(x.contiguous(), cos, sin, impl="reference")
    assert same_bits(serve(target, rope, x, cos, sin), expected)
    rope(x, cos, sin, inplace=True, impl="triton")
    assert same_bits(x, expected)


@pytest.mark.parametrize("target", GPU_TRITON)
def test_graph_capture(target):
    cos, sin = tables(target, 64, 32)
    q, k = random(target, 2, 8, 4, 64), random(target, 2, 8, 2, 64, seed=1)
    starts = integers(target, 0, 5)
    serve(target, rope_qk, q, k, cos, sin, offsets=starts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rope_qk(q, k, cos, sin, offsets=starts, impl="triton")
    for seed, offsets in ((5, (3, 0)), (6, (20, 7))):
        q.copy_(random(target, 2, 8, 4, 64, seed=seed))
        k.copy_(random(target, 2, 8, 2, 64, seed=seed + 10))
        starts.copy_(integers(target, *offsets))
        graph.replay()
        expected = rope_qk(q, k, cos, sin, offsets=starts, impl="reference")
        assert same_bits(captured.q, expected.q)
        assert same_bits(captured.k, expected.k)


@pytest.mark.gpu
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two devices")
def test_kernels_run_on_the_device_of_their_tensors():
    kind = torch.accelerator.current_accelerator().type
    before = torch.accelerator.current_device_index()
    for index in (1, 0, 1):
        device = torch.device(kind, index)
        cos, sin = rope_table(16, 8, device=device)
        x = torch.randn(1, 8, 2, 16, device=device, requires_grad=True)
        for _ in range(2):  # the first launch of a plan and a repeated one
            y = rope(x, cos, sin, impl="triton")
            (grad,) = torch.autograd.grad(y, x, x.detach())
            assert y.device == grad.device == device
            assert same_bits(y.detach(), rope(x.detach(), cos, sin, impl="reference"))
        assert torch.accelerator.current_device_index() == before


@pytest.mark.parametrize(
    "target", [p for p in TARGETS if p.values[0].on_gpu or p.values[0].implementation == "reference"]
)
def test_calls_from_many_threads(target):
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16)
    expected = [rope(x[:, : 1 + n], cos, sin, impl="reference") for n in range(5)]
    wrong = []

    def work(n):
        try:
            for turn in range(4):
                size = (n + turn) % 5
                if not same_bits(rope(x[:, : 1 + size], cos, sin, impl=target.implementation), expected[size]):
                    wrong.append(size)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
