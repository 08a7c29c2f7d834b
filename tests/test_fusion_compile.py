"""Compiled functions beside what else one does with them: passes of others, copies, and one inside another."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import tilewright
from fusion_helpers import fresh, same  # noqa: F401 - a fixture among them
from tilewright.fusion import RULES, FusionWarning, options, report_of

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


# Copies.


def unpickled(module):
    return pickle.loads(pickle.dumps(module))


def loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, unpickled, loaded])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
def test_copies_have_reports(way, called, fusion):
    expect = {"rms_norm_quant": 1}
    module = tilewright.compile(Layer(), fusion=fusion, expect=expect if fusion else None, unmet="raise", rules=RULES)
    if called:
        module(inputs())
    twin = way(module)
    assert type(twin) is type(module)
    assert twin.fusion_report.counts == module.fusion_report.counts
    assert (twin.fusion_report is module.fusion_report) == (way is copy.copy)
    same(twin(inputs()), module(inputs()))
    if way is copy.copy:
        return
    assert twin.weight is not module.weight
    twin.weight.data.mul_(2)
    plain = Layer()
    plain.load_state_dict(twin.state_dict(), strict=False)
    plain.weight.data.copy_(twin.weight)
    same(twin(inputs()), plain(inputs()))
    twin.fusion_report.notes.append("mine")
    assert "mine" not in module.fusion_report.notes


def test_a_copy_of_a_model_that_holds_a_compiled_layer():
    model = torch.nn.Sequential(tilewright.compile(Layer()))
    twin = copy.deepcopy(model)
    twin(inputs())
    assert twin[0].fusion_report.counts == {"rms_norm_quant": 1}
    assert not model[0].fusion_report.graphs


# One inside another.


class Outer(torch.nn.Module):
    def __init__(self, inner, breaks=False):
        super().__init__()
        self.inner, self.breaks = inner, breaks

    def forward(self, x):
        if self.breaks:
            torch._dynamo.graph_break()
        return self.inner(x * 2)


def calling(layer):
    def function(x):
        return layer(x)

    return function


@pytest.mark.parametrize("kind", ["module", "function"])
@pytest.mark.parametrize("breaks", [False, True])
def test_one_inside_another(kind, breaks):
    layer = Layer()
    inner = tilewright.compile(layer if kind == "module" else calling(layer))
    outer = tilewright.compile(Outer(inner, breaks), expect={"rms_norm_quant": 1}, unmet="raise")
    bystander = tilewright.compile(Layer())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FusionWarning)
        same(outer(inputs()), layer(inputs() * 2))
    assert "called inside another compiled function" in str(inner.fusion_report)
    assert not inner.fusion_report.graphs
    assert not outer.fusion_report.notes
    assert not bystander.fusion_report.notes
    inner(inputs()[:2])  # by itself
    assert inner.fusion_report.counts == {"rms_norm_quant": 1}


def test_one_behind_a_break_inside_another():
    class Broken(Layer):
        def forward(self, x):
            results = super().forward(x)
            torch._dynamo.graph_break()
            return results

    inner = tilewright.compile(Broken())
    outer = tilewright.compile(Outer(inner))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        outer(inputs())
    assert inner.fusion_report.counts == {"rms_norm_quant": 1}
    assert not outer.fusion_report.counts
    assert "see their reports" in str(outer.fusion_report)


def test_the_same_compiled_twice_is_not_inside_itself():
    layer = Layer()
    first, second = (tilewright.compile(layer) for _ in range(2))
    first(inputs())
    assert not second.fusion_report.notes
    function = calling(layer)
    first, second = (tilewright.compile(function) for _ in range(2))
    first(inputs())
    assert not second.fusion_report.notes
