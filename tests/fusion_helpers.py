"""What the tests of graph fusion share: compiling with a fresh cache, and comparing with what was not fused."""

import pytest
import torch

import tilewright
from tilewright import numerics
from tilewright.testing import targets as devices

ON_GPU = [pytest.param(t.device, id=str(t.device), marks=pytest.mark.gpu) for t in devices() if t.on_gpu][:1]


@pytest.fixture(params=[pytest.param(torch.device("cpu"), id="cpu"), *ON_GPU])
def each_device(request):
    """Tensors are made on the CPU, and for ``-m gpu`` on the GPU."""
    if request.param.type != "cpu":
        torch.set_default_device(request.param)
    yield
    torch.set_default_device(None)


def seeded(seed):
    """A generator where tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of Inductor's and a state of Dynamo's that no other test has seen."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused(function, *args, grad=False, verify=True, **kwargs):
    """Compile and call; the results must have the bits, strides and separate memory that they have without fusion.

    On a GPU sums have another order, and what is float32 throughout has other last digits.

    Returns:
        The report.
    """
    with torch.set_grad_enabled(grad):
        expected = function(*clones(args))
        compiled = tilewright.compile(function, fullgraph=True, verify=verify, **kwargs)
        results = compiled(*clones(args))
    same(results, expected, is_exact=args[0].device.type == "cpu" or args[0].dtype != torch.float32)
    return compiled.fusion_report


def clones(args):
    return [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]


def same(results, expected, *, is_exact=True):
    results, expected = flat(results), flat(expected)
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.equal(bits(got), bits(wanted)) if is_exact else not numerics.difference(got, wanted)
    apart = [got.untyped_storage().data_ptr() for got in results if got.numel()]
    wanted = [t.untyped_storage().data_ptr() for t in expected if t.numel()]
    assert len(set(apart)) == len(set(wanted)), "results share memory that did not before, or the other way round"


def bits(t):
    t = t.detach().contiguous()
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def flat(results):
    return torch.utils._pytree.tree_leaves(results)


def targets(report):
    """The operators in the graphs after fusion, by name."""
    return [line.text.split("(")[0] for graph in report.graphs for line in graph.after if "(" in line.text]


def only(report, action="fused"):
    """The one decision of a kind."""
    (decision,) = [d for d in report.decisions if d.action == action]
    return decision
