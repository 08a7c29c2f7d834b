"""What is symbolic in a graph and hides an operation is named, with what makes it a number."""

import pytest
import torch
import torch.nn.functional as F

import tilewright
from fusion_helpers import fresh  # noqa: F401 - a fixture
from test_fusion_forms import Seen, group_quant, llama, rotate_half
from tilewright.fusion.forms import symbolic_number

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning")


def constant_quant(x):
    return group_quant(x, 128, 1e-4, 448.0)


def rope(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def complex_rope(q, k, turns):
    def one(x):
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns.view(1, pairs.shape[1], 1, -1)).flatten(3).to(x.dtype)

    return one(q), one(k)


def activation(x):
    gate, up = x.chunk(2, -1)
    return constant_quant(F.silu(gate) * up)


def norm(x, w):
    xf = x.float()
    return constant_quant(w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


def heads(*sizes):
    return tuple(torch.randn(2, 7, n, 64) for n in sizes)


CASES = {
    "rope": (rope, (*heads(4, 3), *torch.randn(2, 7, 1, 64)), "rope", "rope_qk"),
    "complex": (
        complex_rope,
        (*heads(4, 3), torch.polar(torch.ones(7, 32), torch.randn(7, 32))),
        "rope",
        "rope_qk",
    ),
    "norm": (norm, (torch.randn(6, 256).bfloat16(), torch.rand(256).bfloat16()), "quant_fp8", "rms_norm_quant"),
    "activation": (activation, (torch.randn(6, 512).bfloat16(),), "quant_fp8", "silu_mul_quant"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("static", [False, True])
def test_symbolic_last_dimensions(name, static):
    function, given, kind, rule = CASES[name]
    for tensor in given if static else ():
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    with torch.no_grad():
        compiled = tilewright.compile(function, dynamic=True)
        compiled(*given)
    report = compiled.fusion_report
    if static:
        assert report.counts == {rule: 1}
        return
    assert not report.counts
    reasons = [d.reason for d in report.decisions if d.rule == kind and d.action == "refused"]
    assert len(reasons) == (2 if kind == "rope" else 1)
    assert "the last dimension is symbolic" in reasons[0]
    assert "mark_static(x, -1)" in reasons[0]


@pytest.mark.parametrize("constant", [False, True])
def test_symbolic_numbers(constant):
    """A default argument is a symbolic float where everything is dynamic."""
    x, w = torch.randn(6, 256).bfloat16(), torch.rand(256).bfloat16()
    for tensor in (x, w):
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=constant):
        compiled = tilewright.compile(lambda x, w: constant_quant(llama(x, w)), dynamic=True)
        compiled(x, w)
    report = compiled.fusion_report
    if constant:
        assert report.counts == {"rms_norm_quant": 1}
    else:
        (reason,) = [d.reason for d in report.decisions if d.rule == "rms_norm"]
        assert "a Python number in it is symbolic" in reason
        assert "specialize_float" in reason


def test_what_is_decided_is_told_once():
    """Symbolic columns that hide nothing are no near miss."""
    seen = Seen(llama, torch.randn(6, 256).bfloat16(), torch.rand(256).bfloat16(), dynamic=True)
    assert not seen.misses
    assert not any(map(symbolic_number, seen.graph.nodes))
    with torch.no_grad():
        compiled = tilewright.compile(
            lambda x, w: (*tilewright.quant_fp8(tilewright.rms_norm(x, w)), x + w), dynamic=True
        )
        given = torch.randn(6, 256).bfloat16(), torch.rand(256).bfloat16()
        compiled(*given)
    (decision,) = compiled.fusion_report.decisions
    assert decision.action == "fused"
