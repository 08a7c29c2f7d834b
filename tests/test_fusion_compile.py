"""Compiled functions beside what else one does with them: passes of others, copies, and one inside another."""

import pytest
import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import tilewright
from fusion_helpers import fresh  # noqa: F401 - a fixture
from tilewright.fusion import options, report_of

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning")

SLOT = "post_grad_custom_post_pass"


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(256).bfloat16())

    def forward(self, x):
        return tuple(tilewright.quant_fp8(tilewright.rms_norm(x, self.weight.detach())))


def inputs():
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()


class Doubled(CustomGraphPass):
    """Makes scales twice as large, and remembers what it saw."""

    def __init__(self, uuid="doubled"):
        self.name, self.seen = uuid, []

    def __call__(self, graph):
        self.seen += [str(node.target) for node in graph.nodes]
        output = next(node for node in graph.nodes if node.op == "output")
        values, scales = output.args[0]
        with graph.inserting_before(output):
            twice = graph.call_function(torch.ops.aten.mul.Tensor, (scales, 2))
            twice.meta["val"] = scales.meta["val"]
        output.args = ((values, twice),)

    def uuid(self):
        return self.name


def run_with(how, given):
    """A layer compiled with somebody else's pass; the compiled function, and the fusion's report."""
    torch._dynamo.reset()
    layer = Layer()
    layer.weight.data.fill_(1)
    if how == "options":
        compiled = tilewright.compile(layer, options={SLOT: given})
    elif how == "configuration":
        compiled = tilewright.compile(layer)
    else:
        with config.patch({SLOT: given} if how == "torch.compile, configuration" else {}):
            chosen = options() if how == "torch.compile, configuration" else options(then=given)
        compiled = torch.compile(layer, options=chosen)
    with config.patch({SLOT: given} if how == "configuration" else {}), torch.no_grad():
        results = compiled(inputs())
        plain = layer(inputs())
    report = compiled.fusion_report if hasattr(compiled, "fusion_report") else report_of(chosen)
    return results[1] / plain[1], report


HOWS = ["options", "configuration", "torch.compile, configuration", "torch.compile, then"]


@pytest.mark.parametrize("how", HOWS)
def test_passes_of_others_run_afterwards(how):
    mine = Doubled()
    factor, report = run_with(how, mine)
    assert report.counts == {"rms_norm_quant": 1}
    assert factor.unique().tolist() == [2]
    assert "tilewright.rms_norm_quant_fp8.default" in mine.seen
    again = Doubled()
    factor, report = run_with(how, again)  # out of the cache
    assert not again.seen
    assert factor.unique().tolist() == [2]
    assert [graph.cached for graph in report.graphs] == [True]
    other = Doubled("another")
    factor, report = run_with(how, other)
    assert other.seen


@pytest.mark.parametrize("how", ["options", "torch.compile, then"])
def test_several_passes_or_none(how):
    factor, report = run_with(how, [Doubled("a"), Doubled("b")])
    assert factor.unique().tolist() == [4]
    assert report.counts == {"rms_norm_quant": 1}
    with config.patch({SLOT: Doubled("c")}):
        factor, report = run_with(how, None)
    assert factor.unique().tolist() == [1]
    assert report.counts == {"rms_norm_quant": 1}


@pytest.mark.parametrize("how", HOWS)
def test_a_pass_without_identity_is_never_cached(how):
    calls = []
    for _ in range(2):
        _, report = run_with(how, lambda graph: calls.append(len(graph.nodes)))
        assert [graph.cached for graph in report.graphs] == [False]
    assert len(calls) == 2


def test_a_pass_that_asks_whether_a_graph_is_for_inference():
    base = pytest.importorskip("torch._inductor.custom_graph_pass")
    if not hasattr(base, "CustomInferenceAwareGraphPass"):
        pytest.skip("this torch has no such passes")
    asked = []

    class Aware(base.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            asked.append(is_inference)

        def uuid(self):
            return "aware"

    run_with("options", Aware())
    assert asked == [True]
