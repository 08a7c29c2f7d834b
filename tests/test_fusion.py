"""Graph fusion of the library's own operators: every graph shape, what is refused, and what a report says."""

import dataclasses
import warnings
from functools import partial

import pytest
import torch

import tilewright
from fusion_helpers import clones, each_device, fresh, fused, only, same, seeded, targets  # noqa: F401 - fixtures among them
from tilewright.errors import ArgumentError, FusionError
from tilewright.fusion import RULES, FusionWarning, add_adapter, options, remove_adapter, report_of
from tilewright.fusion.rule import Refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning"),
    pytest.mark.usefixtures("each_device"),
]

M, N = 6, 256


def tensors(*shape, n=N):
    generator = seeded(0)
    x = torch.randn(*shape, n, generator=generator).bfloat16()
    return x, torch.rand(n, generator=generator).bfloat16() + 0.5


def norm(x, w, **kwargs):
    return tilewright.rms_norm(x, w, **kwargs)


def quant(y, **kwargs):
    return tuple(tilewright.quant_fp8(y, **kwargs))


# The graph shapes of the report on vLLM's passes, and more: what is fused, and what the kernel writes for others.

SHAPES = {
    "one quantisation": quant,
    "two": lambda y: (quant(y), quant(y, group_size=64)),
    "three": lambda y: (quant(y), quant(y, group_size=64), quant(y, group_size=32)),
    "one and another user": lambda y: (quant(y), y + 1),
    "two and another user": lambda y: (quant(y), quant(y, group_size=64), y + 1),
    "one, and the norm returned": lambda y: (quant(y), y),
    "only values": lambda y: quant(y)[0],
    "only scales": lambda y: quant(y)[1],
    "per token": lambda y: quant(y, group_size=None),
    "powers of two": lambda y: (quant(y, scale_format="ue8m0"), quant(y, scale_format="ue8m0_fp32")),
    "packed": lambda y: (quant(y, scale_format="ue8m0_packed", scale_layout="tma_aligned"), quant(y)),
    "columns": lambda y: quant(y, scale_layout="column"),
    "a shared view": lambda y: [quant(v, group_size=g) for v in [y.view(-1, N)] for g in (128, 64)],
    "separate views": lambda y: (quant(y.view(-1, N)), quant(y.reshape(-1, N), group_size=64)),
    "other views": lambda y: (quant(y.flatten(0, -2)), quant(y.unsqueeze(0).contiguous(), group_size=64)),
    "casts to its own dtype": lambda y: quant(y.to(torch.bfloat16).clone()),
    "policies": lambda y: (quant(y, policy="vllm_cuda"), quant(y, policy="deep_gemm"), quant(y, policy="aiter")),
}
EMITS = {"one and another user", "two and another user", "one, and the norm returned"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(M,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_graph_shapes(name, shape, dynamic):
    consumers = SHAPES[name]
    report = fused(lambda x, w: consumers(norm(x, w)), *tensors(*shape), dynamic=dynamic)
    assert report.counts == {"rms_norm_quant": 1}
    decision = only(report)
    assert decision.verified
    assert ("written for others" in decision.reason) == (name in EMITS)
    assert decision.kernels[0] > decision.kernels[1] == 1
    assert decision.bytes_moved[0] > decision.bytes_moved[1]
    (operator,) = [t for t in targets(report) if t.startswith("tilewright")]
    assert operator == "tilewright.rms_norm_quant_fp8.default"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["no rows", "one row", "short groups", "one column", "zeros", "tiny", "strided"])
def test_edge_shapes(case, dtype):
    """Each rule about quantisation, on what kernels get wrong first."""
    n = {"short groups": 100, "one column": 2}.get(case, N)
    x, w = (t.to(dtype) for t in tensors({"no rows": 0, "one row": 1}.get(case, M), n=n))
    x = {"zeros": x * 0, "tiny": x * 2.0**-14}.get(case, x)
    if case == "strided":
        x = torch.cat([x, x], -1)[:, :n]

    def run(x, w):
        y, z = tilewright.add_rms_norm(x, x, w)
        gate, up = x.chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        return quant(norm(x, w)), quant(y), quant(y, group_size=None), z, quant(h, group_size=32)

    report = fused(run, x, w, verify=False)
    wanted = {"rms_norm_quant": 1, "add_rms_norm_quant": 1, "silu_mul_quant": 1}
    assert report.counts == wanted, report


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.3])
@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_options_of_the_norm_are_variables(eps, cast, offset):
    report = fused(lambda x, w: quant(norm(x, w, eps=eps, cast=cast, weight_offset=offset)), *tensors(M))
    assert report.counts == {"rms_norm_quant": 1}


def test_without_a_weight():
    assert fused(lambda x: quant(tilewright.rms_norm(x)), tensors(M)[0]).counts == {"rms_norm_quant": 1}


@pytest.mark.parametrize("given", ["tensor", "computed"])
def test_static_scales(given):
    def run(x, w, scale):
        y = norm(x, w)
        scale = scale if given == "tensor" else scale * 2
        return quant(y, scale=scale)[0], quant(y.view(-1, N), scale=scale)[0], y

    report = fused(run, *tensors(2, 3), torch.tensor([0.03]))
    assert "2 quantisations in one kernel, 1 equal to another" in only(report).reason


def test_a_scale_that_comes_from_what_it_scales():
    def run(x, w):
        y = norm(x, w)
        return quant(y, scale=y.float().abs().amax().reshape(1) / 448)

    report = fused(run, *tensors(M))
    assert not report.counts
    assert only(report, "refused").reason == "a given scale is computed from what it scales"


def test_more_formats_than_a_launch_takes():
    def run(x, w):
        y = norm(x, w)
        return [quant(y, group_size=g) for g in (128, 64, 32, None)]

    report = fused(run, *tensors(M))
    assert "3 quantisations" in only(report).reason
    assert "1 left" in only(report).reason
    assert sorted(t for t in targets(report) if t.startswith("tilewright")) == [
        "tilewright.quant_fp8.default",
        "tilewright.rms_norm_quant_fp8.default",
    ]


def test_equal_consumers_are_merged_and_their_results_stay_apart():
    def run(x, w):
        y = norm(x, w)
        return quant(y), quant(y.view(-1, N)), quant(y), y

    report = fused(run, *tensors(2, 3))
    assert "2 equal to another merged" in only(report).reason
    assert sum(t == "aten.clone.default" for t in targets(report)) == 4  # values and scales of two


@pytest.mark.parametrize("view", ["view", "unsqueeze", "slice", "rows"])
def test_merged_results_stay_apart_behind_views(view):
    def run(x, w):
        y = norm(x, w)
        first, second = quant(y)[0], quant(y)[0]
        return {
            "view": lambda: (first.view(-1), second.view(-1)),
            "unsqueeze": lambda: (first, second.unsqueeze(0)),
            "slice": lambda: (first[1:], second[:2]),
            "rows": lambda: (*first.unbind(0), *second.unbind(0)),
        }[view]()

    x, w = tensors(M)
    with torch.no_grad():
        compiled = tilewright.compile(run)
        results, expected = compiled(x, w), run(x, w)
    assert compiled.fusion_report.counts == {"rms_norm_quant": 1}
    places = [len({t.untyped_storage().data_ptr() for t in each}) for each in (results, expected)]
    assert places[0] == places[1]


# Sums.


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_sums(own, last):
    """The residual's sum, which a last layer does not use, by the library's operator and by an addition."""

    def run(x, residual, w):
        if own:
            y, z = tilewright.add_rms_norm(x, residual, w)
        else:
            z = x + residual
            y = norm(z, w)
        return (quant(y.view(-1, N)), y) if last else (quant(y.view(-1, N)), z * 2)

    x, w = tensors(2, 3)
    report = fused(run, x, tensors(2, 3)[0].flip(0), w)
    assert report.counts == {"add_rms_norm_quant": 1}
    assert "aten.add.Tensor" not in targets(report)


def test_a_sum_with_a_broadcast_is_left_alone():
    x, w = tensors(2, 3)
    report = fused(lambda x, r, w: quant(norm(x + r, w)), x, x[0, 0].clone(), w)
    assert report.counts == {"rms_norm_quant": 1}


def test_a_chain_of_layers():
    def run(x, ws):
        residual = x
        out = []
        for w in ws:
            residual = x + residual
            y = norm(residual, w)
            out += quant(y.view(-1, N))
            x = y * 0.5
        return out, residual

    x, w = tensors(2, 3)
    with torch.no_grad():
        compiled = tilewright.compile(run, fullgraph=True, expect={"add_rms_norm_quant": 4}, unmet="raise")
        same(compiled(x, [w] * 4), run(x, [w] * 4))


# The other rules.


def rope_inputs():
    generator = seeded(1)
    q, k = (torch.randn(2, 16, heads, 64, generator=generator).bfloat16() for heads in (4, 2))
    angles = torch.randn(16, 32, generator=generator)
    return q, k, angles.cos(), angles.sin()


def test_rope_of_queries_and_keys():
    def run(q, k, cos, sin):
        return tilewright.rope(q, cos, sin), tilewright.rope(k, cos, sin)

    assert fused(run, *rope_inputs()).counts == {"rope_qk": 1}


@pytest.mark.parametrize("how", ["options", "tables", "chain"])
def test_ropes_that_are_no_pair(how):
    def run(q, k, cos, sin):
        first = tilewright.rope(q, cos, sin)
        if how == "options":
            return first, tilewright.rope(k, cos, sin, interleaved=True)
        if how == "tables":
            return first, tilewright.rope(k, cos * 2, sin)
        return tilewright.rope(first * 2, cos, sin)

    report = fused(run, *rope_inputs())
    assert not report.counts
    if how == "chain":
        assert "computed from the first one's rotation" in only(report, "refused").reason


@pytest.mark.parametrize("how", ["heads", "permuted", "one norm", "used", "eps", "inverse"])
def test_norms_of_heads_before_their_rotation(how):
    def run(q, k, cos, sin, wq, wk):
        y = norm(q, wq)
        z = k if how == "one norm" else norm(k, wk, eps=1e-5 if how == "eps" else 1e-6)
        options = {"inverse": how == "inverse"}
        if how == "permuted":
            y, z, options = y.transpose(1, 2), z.transpose(1, 2), {"layout": "bhsd"}
        rotated = tilewright.rope(y, cos, sin, **options), tilewright.rope(z, cos, sin, **options)
        return (*rotated, y * 2) if how == "used" else rotated

    weights = (torch.rand(64).bfloat16() + 0.5 for _ in range(2))
    report = fused(run, *rope_inputs(), *weights)
    if how in ("heads", "permuted"):
        assert report.counts == {"qk_norm_rope": 1}
        return
    assert report.counts == {"rope_qk": 1}
    reason = {
        "one norm": "only one of the two",
        "used": "also used before its rotation",
        "eps": "different eps: 1e-06 and 1e-05",
        "inverse": "the rotation is inverse",
    }[how]
    assert reason in only(report, "refused").reason


def mhc_inputs():
    generator = seeded(2)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = randn(24, 4 * 128) * 0.05, torch.tensor([1.0, 0.7, 0.9]), randn(24) * 0.5
    return randn(5, 128).bfloat16(), randn(5, 4, 128).bfloat16(), *weights, torch.rand(128).bfloat16()


@pytest.mark.parametrize("cast", ["after_weight", "before_weight"])
def test_hyper_connections(cast):
    """A layer between two mixes: the norm of its input, and its end with the next one's beginning."""

    def run(x, streams, fn, scale, base, w):
        mixes = tilewright.mhc_pre(streams, fn, scale, base)
        y = norm(mixes.layer_input, w, cast=cast) * x
        streams = tilewright.mhc_post(y, streams, mixes.post_mix, mixes.comb_mix)
        return streams, *tilewright.mhc_pre(streams, fn, scale, base)

    report = fused(run, *mhc_inputs())
    if cast == "after_weight":
        assert report.counts == {"mhc_pre_norm": 1, "mhc_post_pre": 1}
    else:
        assert report.counts == {"mhc_post_pre": 1}
        assert "before its weight multiplies" in only(report, "refused").reason


def test_a_layer_input_that_is_used_before_its_norm():
    def run(x, streams, fn, scale, base, w):
        mixes = tilewright.mhc_pre(streams, fn, scale, base)
        return norm(mixes.layer_input, w, cast="after_weight"), mixes.layer_input

    report = fused(run, *mhc_inputs())
    assert not report.counts
    assert "also used before its norm" in only(report, "refused").reason


# Training, mutation, what breaks.


def test_training_graphs():
    """The norm's gradient still comes from its own backward; what is quantised is detached."""

    def run(x, w):
        y = norm(x, w)
        return quant(y.detach()), (y * 2).sum()

    x, w = (t.requires_grad_() for t in tensors(M))
    compiled = tilewright.compile(run, fullgraph=True)
    pairs = []
    for function in (compiled, run):
        a, b = clones((x, w))
        values, total = function(a, b)
        total.backward()
        pairs.append((*values, total.detach(), a.grad, b.grad))
    same(*pairs)
    report = compiled.fusion_report
    assert sorted(graph.role for graph in report.graphs) == ["backward", "forward"]
    assert report.counts == {"rms_norm_quant": 1}
    torch._dynamo.reset()
    again = tilewright.compile(run, fullgraph=True)
    again(*clones((x, w)))
    assert [(g.role, g.cached) for g in again.fusion_report.graphs] == [(g.role, True) for g in report.graphs]


def test_a_buffer_that_is_written_in_between():
    def run(x, w, buffer):
        y = norm(x, w)
        buffer.add_(y.float().sum())
        return quant(y), buffer * 2

    assert fused(run, *tensors(M), torch.zeros(3)).counts == {"rms_norm_quant": 1}


def test_an_adapter_that_raises_is_left_out():
    def recognise(graph):
        raise ZeroDivisionError("of no use")

    add_adapter("broken", recognise, version="1")
    try:
        report = fused(lambda x, w: quant(norm(x, w)), *tensors(M))
    finally:
        remove_adapter("broken")
    assert report.counts == {"rms_norm_quant": 1}
    failure = only(report, "failed")
    assert (failure.rule, failure.reason) == (
        "broken",
        "ZeroDivisionError: of no use; the adapter is not used in this graph",
    )


def test_a_rule_without_sense_leaves_the_graph_alone():
    (rule,) = [r for r in RULES if r.name == "rms_norm_quant"]

    class Senseless:
        name, pays = "senseless", ("few", "many")
        pattern = replacement = contract = ""
        propose = rule.propose

    report = fused(lambda x, w: quant(norm(x, w)), *tensors(M), rules=[Senseless()])
    assert not report.counts
    assert only(report, "failed").reason.startswith("TypeError")


def test_a_rule_that_raises_leaves_the_graph_alone():
    class Broken:
        name = "broken"
        pattern = replacement = contract = ""
        pays = (None, None)

        def propose(self, graph, index):
            raise ZeroDivisionError("of no use")
            yield

    report = fused(lambda x, w: quant(norm(x, w)), *tensors(M), rules=[Broken(), *RULES])
    assert report.counts == {"rms_norm_quant": 1}
    assert only(report, "failed").reason == "ZeroDivisionError: of no use; the rule is not used in this graph"


def test_a_replacement_that_raises_or_is_wrong_is_not_made():
    (rule,) = [r for r in RULES if r.name == "rms_norm_quant"]

    class Wrapped:
        name, pays = "wrapped", (None, None)
        pattern = replacement = contract = ""

        def __init__(self, change):
            self.change = change

        def propose(self, graph, index):
            for proposal in rule.propose(graph, index):
                yield dataclasses.replace(proposal, build=partial(self.changed, proposal.build))

        def changed(self, build, editor):
            return self.change(editor, build(editor))

    def raises(editor, built):
        raise RuntimeError("half way")

    def wrong_shape(editor, built):
        return {old: editor.call(torch.ops.aten.unsqueeze.default, new, 0) for old, new in built.items()}

    def wrong_numbers(editor, built):
        return {
            old: editor.call(torch.ops.aten.mul.Tensor, new, 2) if new.meta["val"].dtype == torch.float32 else new
            for old, new in built.items()
        }

    for change, action, reason in (
        (raises, "failed", "half way"),
        (wrong_shape, "refused", "has shape"),
        (wrong_numbers, "refused", "run beside what it replaces"),
    ):
        torch._dynamo.reset()
        report = fused(lambda x, w: quant(norm(x, w)), *tensors(M), rules=[Wrapped(change)])
        assert not report.counts
        assert reason in only(report, action).reason


def test_a_rule_that_does_not_pay_here():
    (rule,) = [r for r in RULES if r.name == "rms_norm_quant"]

    class Large:
        name, pays = "large", (M + 1, None)
        pattern = replacement = contract = ""
        propose = rule.propose

    report = fused(lambda x, w: quant(norm(x, w)), *tensors(M), rules=[Large()])
    assert only(report, "refused").reason == f"pays from {M + 1} rows on, and this graph serves {float(M)}"


def test_another_implementation_is_respected():
    def run(x, w, first, second):
        return quant(norm(x, w, impl=first), impl=second)

    report = fused(lambda x, w: run(x, w, "reference", "triton"), *tensors(M))
    assert "different implementations: reference, triton" in only(report, "refused").reason
    torch._dynamo.reset()
    report = fused(lambda x, w: run(x, w, "reference", "reference"), *tensors(M))
    assert only(report, "refused").reason.startswith("no kernel for rms_norm_quant_fp8")


# The report and expectations.


def test_expectations():
    run = lambda x, w: quant(norm(x, w))  # noqa: E731
    x, w = tensors(M)
    with pytest.raises(FusionError, match="rms_norm_quant was expected to fuse 2 times and did 1 times") as raised:
        tilewright.compile(run, expect={"rms_norm_quant": 2}, unmet="raise")(x, w)
    assert "1 quantisation in one kernel" in str(raised.value)
    torch._dynamo.reset()
    with pytest.warns(FusionWarning, match="expected to fuse 0 times"):
        tilewright.compile(run, expect={"rms_norm_quant": 0})(x, w)
    with pytest.warns(FusionWarning, match="nothing was fused"):
        tilewright.compile(lambda x: x + 1)(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        compiled = tilewright.compile(run, expect={"rms_norm_quant": 1})
        compiled(x, w)
        compiled(*tensors(M + 1))  # another compilation, which no expectation is about
        assert not tilewright.compile(run, fusion=False)(x, w)[0].isnan().any()
    assert compiled.fusion_report.counts == {"rms_norm_quant": len(compiled.fusion_report.graphs)}


def test_modules_keep_their_own_attributes():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(tensors(M)[1])

        def forward(self, x):
            return quant(norm(x, self.weight.detach()))

    module = Layer()
    compiled = tilewright.compile(module, expect={"rms_norm_quant": 1}, unmet="raise")
    compiled(tensors(M)[0])
    assert compiled.weight is module.weight
    assert not hasattr(module, "fusion_report")
    assert compiled.fusion_report.counts == {"rms_norm_quant": 1}


def test_what_a_report_says():
    report = fused(lambda x, w: tuple(tilewright.quant_fp8(tilewright.rms_norm(x, w))), *tensors(M))
    decision = only(report)
    file, line, code = decision.source.split(":", 2)
    assert file == __file__
    assert "tilewright.rms_norm(x, w)" in code
    assert int(line)
    text = str(report)
    assert "1 of 1 candidate in 1 graph" in text
    assert decision.source in text
    assert {d.name for d in report.graphs[0].before if d.touched} >= {"rms_norm", "quant_fp8"}
    assert any(line.touched and "rms_norm_quant_fp8" in line.text for line in report.graphs[0].after)


def test_unknown_options():
    for kwargs, match in (
        ({"expect": {"nothing": 1}}, "no rule is called 'nothing'"),
        ({"unmet": "ignore"}, "expected 'warn' or 'raise'"),
        ({"numerics": "loose"}, "expected 'strict' or 'relaxed'"),
        ({"backend": "eager"}, "only 'inductor'"),
        ({"mode": "default", "options": {}}, "either mode or options"),
        ({"options": options()}, "are for torch.compile"),
        ({"options": {"post_grad_custom_post_pass": 3}}, "expected a pass"),
    ):
        with pytest.raises(ArgumentError, match=match):
            tilewright.compile(lambda x: x, **kwargs)


# Caches.


def test_a_report_survives_inductors_cache():
    run = lambda x, w: quant(norm(x, w))  # noqa: E731
    x, w = tensors(M)

    def compiled_report(**kwargs):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = tilewright.compile(run, **kwargs)
        compiled(x, w)
        return compiled.fusion_report, dict(torch._dynamo.utils.counters["inductor"])

    first, counters = compiled_report()
    assert not counters.get("fxgraph_cache_hit")
    again, counters = compiled_report()
    assert [g.cached for g in again.graphs] == [True]
    assert again.counts == first.counts
    assert again.graphs[0].after == first.graphs[0].after
    other, _ = compiled_report(rules=[])
    assert not other.counts
    assert not any(g.cached for g in other.graphs)


def test_a_hit_is_one_of_the_same_graph():
    """Other calls that Inductor would find equal after decomposition have reports of their own."""
    x, w = tensors(M)
    for run in (lambda x, w: quant(norm(x, w)), lambda x, w: quant(norm(x.contiguous(), w).contiguous())):
        for mode in (torch.no_grad, torch.inference_mode):
            torch._dynamo.reset()
            with mode():
                compiled = tilewright.compile(run, expect={"rms_norm_quant": 1}, unmet="raise")
                compiled(x, w)
            assert compiled.fusion_report.counts == {"rms_norm_quant": 1}


def test_layers_of_one_class_share_their_code():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(tensors(M)[1])

        def forward(self, x):
            return quant(norm(x, self.weight.detach()))

    compiled = [tilewright.compile(Layer(), unmet="raise") for _ in range(12)]
    results = [layer(tensors(M)[0]) for layer in compiled]
    for got in results[1:]:
        same(got, results[0])
    assert compiled[0].fusion_report.counts == {"rms_norm_quant": 1}
    assert sum(len(layer.fusion_report.graphs) for layer in compiled) < 4
    assert "an equal compilation had left" in str(compiled[-1].fusion_report)


def test_the_identity_is_all_that_decides():
    def identity(**kwargs):
        return options(**kwargs)["post_grad_custom_post_pass"].uuid()

    assert identity() == identity()
    different = [identity(), identity(verify=True), identity(numerics="relaxed"), identity(rules=RULES[:1])]
    add_adapter("another", lambda graph: ([], []), version="1")
    try:
        different.append(identity())
        with pytest.raises(ArgumentError, match="already"):
            add_adapter("another", lambda graph: ([], []), version="2")
    finally:
        remove_adapter("another")
    assert len(set(different)) == len(different)
    assert identity() == different[0]


def test_with_torch_compile_itself():
    run = lambda x, w: quant(norm(x, w))  # noqa: E731
    x, w = tensors(M)
    for cached in (False, True):
        torch._dynamo.reset()
        given = options()
        same(torch.compile(run, options=given)(x, w), run(x, w))
        report = report_of(given)
        assert report.counts == {"rms_norm_quant": 1}
        assert [g.cached for g in report.graphs] == [cached]
    assert not report_of(options()).graphs  # nothing has been compiled with these
    with pytest.raises(ArgumentError, match=r"no pass of tilewright.fusion.options"):
        report_of({})


def test_every_rule_says_what_it_is():
    for rule in RULES:
        assert all((rule.name, rule.pattern, rule.replacement, rule.contract))
        assert hasattr(tilewright, rule.replacement)
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert Refusal.__doc__


@pytest.mark.parametrize("divide", [torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar], ids=str)
def test_verified_by_the_division_that_is_written(divide):
    def run(x, w):
        groups = norm(x, w).view(-1, 2, N // 2).float()
        scale = divide(groups.abs().amax(-1, keepdim=True).clamp(min=1e-4), 448.0)
        return (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(-1, N), scale.squeeze(-1)

    with torch.no_grad():
        compiled = tilewright.compile(run, fullgraph=True, verify=True)
        compiled(*tensors(M))
    assert compiled.fusion_report.counts == {"rms_norm_quant": 1}
    assert only(compiled.fusion_report).verified
