"""Fusion of rotary embeddings: one head beside many, tables that are equal, norms of heads of packed projections."""

import operator
import time

import pytest
import torch

import tilewright
from fusion_helpers import fresh, only, targets  # noqa: F401 - a fixture among them
from test_fusion_forms import Seen, rotate_half
from tilewright.fusion import RULES
from tilewright.fusion.expressions import Expressions
from tilewright.fusion.fuse import Policy, fuse
from tilewright.fusion.graph import aten
from tilewright.fusion.report import FusionReport
from tilewright.ops import register
from tilewright.ops.quant_fp8.format import encoded

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning")

DIM = 8


def halves(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def complex_numbers(q, k, turns):
    def one(x):
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)

    return one(q), one(k)


def counts_of(function, *tensors, **kwargs):
    return report_of(function, *tensors, **kwargs).counts


def report_of(function, *tensors, dynamic=False, exact=False):
    """What fuses in the graph of a function, without generating code; its results must be those from before."""
    register()
    seen = Seen(function, *tensors, dynamic=dynamic)
    (results,) = next(node for node in seen.graph.nodes if node.op == "output").args
    expected = [seen.values[node] for node in results]
    with torch.no_grad():
        report = fuse(seen.graph, RULES, Policy())
        (results,) = next(node for node in seen.graph.nodes if node.op == "output").args
        values = seen._run(tensors)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close([values[node] for node in results], expected, **tolerance)
    return FusionReport([report])


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_one_head_beside_many(layout, batch, length, heads):
    """Keys of one head, as latent attention has them, whose layout the sizes alone do not tell."""
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, DIM, generator=generator).permute(order).contiguous()

    q, k = made(batch, heads, length), made(batch, 1, length)
    for rows in (batch, 1):
        cos, sin = made(rows, 1, length), made(rows, 1, length)
        turns = torch.complex(cos[..., : DIM // 2].contiguous(), sin[..., : DIM // 2].contiguous())
        assert counts_of(halves, q, k, cos, sin) == {"rope_qk": 1}
        assert counts_of(complex_numbers, q, k, turns) == {"rope_qk": 1}
        if layout == "bhsd" and rows == 1:
            assert counts_of(halves, q, k, cos[0, 0], sin[0, 0]) == {"rope_qk": 1}


@pytest.mark.parametrize("how", ["dtype", "batch"])
@pytest.mark.parametrize("form", ["own", "plain"])
def test_tensors_that_one_call_does_not_take(form, how):
    """They stay two, and do not keep the others from being a pair."""

    def run(first, q, k, cos, sin):
        if form == "own":
            return [tilewright.rope(x, cos, sin, layout="bhsd") for x in (first, q, k)]
        cos, sin = (torch.cat((table, table), -1) for table in (cos, sin))
        return [(x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype) for x in (first, q, k)]

    q, k = (torch.randn(2, n, 3, DIM) for n in (4, 2))
    first = q.bfloat16() if how == "dtype" else torch.randn(5, 4, 3, DIM)
    angles = torch.randn(3, DIM // 2)
    assert counts_of(run, first, q, k, angles.cos(), angles.sin()) == {"rope_qk": 1}


SPLITS = {
    "view": lambda x, heads: x.view(*x.shape[:-1], heads, DIM),
    "unflatten": lambda x, heads: x.unflatten(-1, (heads, DIM)),
    "tokens": lambda x, heads: x.reshape(-1, heads, DIM),
    "rows": lambda x, heads: x.reshape(-1, DIM),
}


@pytest.mark.parametrize("shape", [(6,), (2, 6), (1, 6)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("after", ["heads", "permuted", "flat"])
def test_norms_of_heads_of_a_packed_projection(after, how, dynamic, shape):
    """Parts of one tensor, whose strides are those of the whole, and whose norms' are their own."""

    def run(qkv, cos, sin, wq, wk):
        lead = qkv.shape[:-1] if qkv.dim() == 3 else (1, *qkv.shape[:-1])
        rotated = []
        for x, heads, w in zip(qkv.split([4 * DIM, 2 * DIM, 2 * DIM], -1), (4, 2), (wq, wk), strict=False):
            y = tilewright.rms_norm(SPLITS[how](x, heads), w)
            if after == "flat":
                y = y.view(-1, DIM)
            y = y.view(*lead, heads, DIM)
            layout = "bshd"
            if after == "permuted":
                y, layout = y.transpose(1, 2), "bhsd"
            rotated.append(tilewright.rope(y, cos, sin, layout=layout))
        return rotated

    angles = torch.randn(6, DIM // 2)
    weights = torch.rand(2, DIM)
    given = torch.randn(*shape, 8 * DIM), angles.cos(), angles.sin(), *weights
    assert counts_of(run, *given, dynamic=dynamic, exact=True) == {"qk_norm_rope": 1}


def test_heads_that_are_rotated_in_a_shape_of_their_own():
    """A view of the norm, which is contiguous, that what is normalised has only as a copy."""

    def run(qkv, cos, sin, wq, wk):
        q, k, _ = qkv.split([4 * DIM, 2 * DIM, 2 * DIM], -1)
        y = tilewright.rms_norm(q.unflatten(-1, (4, DIM)), wq).view(2, 6, 2, DIM)
        z = tilewright.rms_norm(k.unflatten(-1, (2, DIM)), wk).view(2, 6, 1, DIM)
        return tilewright.rope(y, cos, sin), tilewright.rope(z, cos, sin)

    angles = torch.randn(6, DIM // 2)
    report = report_of(run, torch.randn(2, 3, 8 * DIM), angles.cos(), angles.sin(), *torch.rand(2, DIM), exact=True)
    assert report.counts == {"rope_qk": 1}
    assert "would have to be copied" in only(report, "refused").reason


def own(q, k, first, second):
    return tilewright.rope(q, *first), tilewright.rope(k, *second)


def plain(q, k, first, second):
    return (
        q * first[0].unsqueeze(2) + rotate_half(q) * first[1].unsqueeze(2),
        k * second[0].unsqueeze(2) + rotate_half(k) * second[1].unsqueeze(2),
    )


def gathered(table, positions, n):
    return table[positions]


def sliced(table, positions, n):
    return table[:n].unsqueeze(0).float()


def selected(table, positions, n):
    return table.index_select(0, positions[0]).unsqueeze(0)


@pytest.mark.parametrize("take", [gathered, sliced, selected])
@pytest.mark.parametrize("form", [own, plain])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tables_that_are_equal(take, form, heads, dynamic):
    """Each of the two takes its rows of the model's table by itself."""
    both = torch.randn(2, 3, 4 + heads, DIM)
    positions = torch.randint(0, 6, (2, 3))
    tables = torch.randn(2, 7, DIM // 2 if form is own else DIM)

    def run(both, cos, sin, positions):
        q, k = both.split([4, heads], 2)
        n = q.shape[1]
        pairs = [[take(table, positions, n) for table in (cos, sin)] for _ in range(2)]
        if form is own:
            pairs = [[table.reshape(-1, DIM // 2)[:n] for table in pair] for pair in pairs]
        return form(q, k, *pairs)

    assert counts_of(run, both, *tables, positions, dynamic=dynamic) == {"rope_qk": 1}


@pytest.mark.parametrize("equal", [False, True])
def test_batches_that_may_differ_stay_two(equal):
    """Equal sizes at the time of compiling are no proof."""

    def run(q, k, cos, sin):
        if equal:
            torch._check(q.shape[0] == k.shape[0])
        return tilewright.rope(q, cos, sin), tilewright.rope(k, cos, sin)

    given = torch.randn(2, 3, 4, DIM), torch.randn(2, 3, 2, DIM), *torch.randn(2, 3, DIM // 2)
    for tensor in given[:2]:
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled = tilewright.compile(run)
    results = compiled(*given)
    assert compiled.fusion_report.counts == ({"rope_qk": 1} if equal else {})
    torch.testing.assert_close(results, run(*given))
    if not equal:
        more = given[0], torch.randn(5, 3, 2, DIM), *given[2:]
        torch.testing.assert_close(compiled(*more), run(*more))


DIFFERENT = {
    "rows": lambda table: (table[:3], table[1:4]),
    "numbers": lambda table: (table[:3] * 2, table[:3] * 3),
    "random": lambda table: (table[:3] * torch.rand(3, 1), table[:3] * torch.rand(3, 1)),
    "dropout": lambda table: [torch.nn.functional.dropout(table[:3]) for _ in range(2)],
}


@pytest.mark.parametrize("how", DIFFERENT)
def test_tables_that_are_not_equal(how):
    def run(q, k, cos, sin):
        first, second = DIFFERENT[how](cos)
        return own(q, k, (first, sin), (second, sin))

    seen = Seen(run, torch.randn(2, 3, 4, DIM), torch.randn(2, 3, 2, DIM), torch.randn(7, 4), torch.randn(3, 4))
    register()
    assert not fuse(seen.graph, RULES, Policy()).decisions


def written(graph, where):
    """A graph with two rotations by copies of a table, one of which, or the table, is written to."""
    mode = torch._subclasses.FakeTensorMode()

    def put(node, *shape):
        with mode:
            node.meta["val"] = torch.empty(shape)
        return node

    q, k = (put(graph.placeholder(name), 2, 3, 4, DIM) for name in "qk")
    cos, sin = (put(graph.placeholder(name), 3, DIM // 2) for name in ("cos", "sin"))
    clones = [put(graph.call_function(aten.clone.default, (cos,)), 3, DIM // 2) for _ in range(2)]
    target = torch.ops.tilewright.rope.default
    first = put(graph.call_function(target, (q, cos if where == "table" else clones[0], sin)), 2, 3, 4, DIM)
    if where == "late":
        second = put(graph.call_function(target, (k, clones[1], sin)), 2, 3, 4, DIM)
    put(graph.call_function(aten.add_.Tensor, (cos if where == "table" else clones[1], 1)), 3, DIM // 2)
    if where != "late":
        second = put(graph.call_function(target, (k, cos if where == "table" else clones[1], sin)), 2, 3, 4, DIM)
    graph.output((first, second))
    return graph


@pytest.mark.parametrize("where", ["copy", "table", "late"])
def test_a_table_that_is_written_in_between(where):
    register()
    report = FusionReport([fuse(written(torch.fx.Graph(), where), RULES, Policy())])
    if where == "late":
        assert report.counts == {"rope_qk": 1}
    else:
        assert not report.decisions


def test_a_norm_that_is_written_before_it_is_quantised():
    register()
    graph, mode = torch.fx.Graph(), torch._subclasses.FakeTensorMode()

    def put(node, *arguments):
        with mode:
            node.meta["val"] = torch.empty(3, 128) if node.op == "placeholder" else node.target(*arguments)
        return node

    x = put(graph.placeholder("x"))
    y = graph.call_function(torch.ops.tilewright.rms_norm.default, (x, None))
    put(y, x.meta["val"], None)
    graph.call_function(aten.add_.Tensor, (y, 1))
    text = encoded(tilewright.QuantFormat(dtype=torch.float8_e4m3fn))
    quantised = graph.call_function(torch.ops.tilewright.quant_fp8.default, (y, None, [text]))
    put(quantised, y.meta["val"], None, [text])
    values = graph.call_function(operator.getitem, (quantised, 0))
    values.meta["val"] = quantised.meta["val"][0]
    graph.output((values,))
    report = FusionReport([fuse(graph, RULES, Policy())])
    assert only(report, "refused").reason == "something is written in place between the operations"


def test_equality_is_asked_of_a_long_graph_in_no_time():
    """Chains that share everything: a walk back from each would never end."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    left = right = x
    for _ in range(2000):
        left, right = (graph.call_function(aten.add.Tensor, (each, each)) for each in (left, right))
    expressions = Expressions(graph)
    start = time.perf_counter()
    assert expressions.of(left, right) == expressions.of(right, left)
    assert expressions.of(left, right) != expressions.of(x, right)
    assert time.perf_counter() - start < 1


def beside_earlier_keys(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q, torch.cat((k[:, :, :2], k), 2)


def keys_alone(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q, torch.cat((torch.zeros_like(k), k), 2)


def latent(q, k, cos, sin):
    """As in latent attention: a part of each query's head, and one head of keys for all."""
    rest, rotated = q.split([DIM, DIM], -1)
    rotated, k = halves(rotated, k[:, :1, :, :DIM], cos[:, :DIM], sin[:, :DIM])
    return torch.cat((rest, rotated), -1), torch.cat((rest, k.expand_as(rest)), -1)


@pytest.mark.parametrize(
    ("function", "fuses"), [(halves, True), (beside_earlier_keys, True), (keys_alone, False), (latent, False)]
)
def test_rotations_in_copies(function, fuses):
    """What Inductor rotates where it copies it anyway needs no launch that could be saved."""
    q, k = (torch.randn(2, 4, 3, 2 * DIM) for _ in range(2))
    cos, sin = torch.randn(2, 3, 2 * DIM)
    report = report_of(function, q, k, cos, sin)
    assert report.counts == ({"rope_qk": 1} if fuses else {})
    reasons = [d.reason for d in report.decisions if d.action == "refused"]
    assert len(reasons) == (not fuses)
    assert fuses or "Inductor rotates it in the kernel of cat" in reasons[0]


def quantised(x):
    scales = x.abs().amax(-1, keepdim=True) / 448
    return (x / scales).to(torch.float8_e4m3fn), scales


def test_a_rotation_that_is_quantised_only():
    def run(q, k, cos, sin):
        q, k = halves(q, k, cos, sin)
        return *quantised(q.transpose(1, 2)), k

    q, k = (torch.randn(2, heads, 3, DIM) for heads in (4, 1))
    report = report_of(run, q, k, *torch.randn(2, 3, DIM))
    assert not report.counts
    assert any("Inductor rotates it in the kernel of abs" in d.reason for d in report.decisions)


@pytest.mark.parametrize("rotary_dim", [None, DIM // 2], ids=["all of the part", "half of the part"])
@pytest.mark.parametrize("place", ["first", "in between", "last"])
def test_features_beside_a_rotation(place, rotary_dim):
    """Operators that rotate a part of each head, and a cat that puts the parts together."""
    run = rotated_parts({"first": [DIM, 6], "in between": [2, DIM, 4], "last": [6, DIM]}[place], rotary_dim)
    q, k = (torch.randn(2, heads, 3, DIM + 6) for heads in (4, 2))
    report = report_of(run, q, k, *torch.randn(2, 3, (rotary_dim or DIM) // 2), exact=True)
    assert report.counts == {"rope_qk": 1}
    assert only(report).kernels == (4, 1)
    assert not any("cat" in target for target in targets(report))


@pytest.mark.parametrize("rotary_dim", [None, DIM // 2], ids=["all of the part", "half of the part"])
def test_features_beside_a_rotation_that_has_no_partner(rotary_dim):
    def run(q, k, cos, sin, more):
        q, k = rotated_parts([4, DIM, 2], rotary_dim)(q, k, cos, sin)
        return q, tilewright.rope(more, cos, sin, layout="bhsd", rotary_dim=rotary_dim), k

    q, k = (torch.randn(2, heads, length, DIM + 6) for heads, length in ((4, 3), (2, 2)))
    tables = torch.randn(2, 3, (rotary_dim or DIM) // 2)
    report = report_of(run, q, k, *tables, torch.randn(2, 1, 3, DIM), exact=True)
    assert report.counts == {"partial_rope": 2}, "which saves more than one launch for the first and the last"
    assert not any("cat" in target for target in targets(report))


def test_features_beside_a_rotation_of_any_number_of_tokens():
    x, cos, sin = torch.randn(2, 6, 3, DIM + 6), *torch.randn(2, 5, DIM // 2)
    torch._dynamo.mark_dynamic(x, 2)

    def run(x, cos, sin):
        return rotated_parts([DIM, 6])(x[:, :4], x[:, 4:], cos, sin)

    compiled = tilewright.compile(run, fullgraph=True)
    for got, wanted in zip(compiled(x, cos, sin), run(x, cos, sin), strict=True):
        assert torch.equal(got, wanted)
    assert compiled.fusion_report.counts == {"rope_qk": 1}
    assert not any("cat" in target for target in targets(compiled.fusion_report))


def test_features_beside_a_rotation_of_a_projection_of_any_number_of_tokens():
    """Whose result lies otherwise than what is rotated."""

    def run(x, wide, narrow, cos, sin):
        q, k = ((x @ w).view(*x.shape[:2], -1, DIM + 6).transpose(1, 2) for w in (wide, narrow))
        return rotated_parts([DIM, 6])(q, k, cos, sin)

    x, tables = torch.randn(2, 7, 16), torch.randn(2, 9, DIM // 2)
    torch._dynamo.mark_dynamic(x, 1)
    given = x, torch.randn(16, 4 * (DIM + 6)), torch.randn(16, 3 * (DIM + 6)), *tables
    compiled = tilewright.compile(run, fullgraph=True)
    for got, wanted in zip(compiled(*given), run(*given), strict=True):
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()
    assert compiled.fusion_report.counts == {"rope_qk": 1}
    assert not any("cat" in target for target in targets(compiled.fusion_report))


@pytest.mark.parametrize("others", [512, 7])
def test_heads_that_one_call_does_not_take_are_rotated_in_parts(others):
    def run(q, k, cos, sin):
        return [torch.cat((x[..., :others], tilewright.rope(x[..., others:], cos, sin)), -1) for x in (q, k)]

    q, k = (torch.randn(1, 3, heads, others + DIM) for heads in (4, 1))
    report = report_of(run, q, k, *torch.randn(2, 3, DIM // 2), exact=True)
    assert report.counts == {"rope_qk": 1}
    assert any("cat" in target for target in targets(report))


@torch._inductor.config.patch(force_pointwise_cat=True)
def test_features_that_inductor_puts_beside_a_rotation():
    """In the kernel that multiplies, as it does on GPUs."""

    def run(q, k, cos, sin):
        return [2 * y for y in rotated_parts([DIM, 6])(q, k, cos, sin)]

    q, k = (torch.randn(2, heads, 3, DIM + 6) for heads in (4, 2))
    report = report_of(run, q, k, *torch.randn(2, 3, DIM // 2), exact=True)
    assert report.counts == {"rope_qk": 1}
    assert only(report).kernels == (2, 1)
    reasons = [d.reason for d in report.decisions if d.rule == "partial_rope"]
    assert len(reasons) == 2
    assert all("beside it in the kernel of mul" in reason for reason in reasons)


@pytest.mark.parametrize("order", ["q k iq ik", "q iq k ik", "iq q ik k"])
def test_rotations_that_inductor_makes_take_no_partner_away(order):
    def run(q, k, iq, ik, cos, sin):
        given = {"q": q, "k": k, "iq": iq, "ik": ik}
        turned = {name: given[name] * cos + rotate_half(given[name]) * sin for name in order.split()}
        return turned["q"], turned["k"], turned["iq"].abs().amax(-1), turned["ik"].abs().amax(-1)

    given = (torch.randn(2, heads, 5, DIM) for heads in (4, 4, 2, 1))
    report = report_of(run, *given, *torch.randn(2, 5, DIM))
    assert report.counts == {"rope_qk": 1}
    assert "kernel of abs" in only(report, "refused").reason


def rotated_parts(sizes, rotary_dim=None):
    def joined(x, cos, sin):
        parts = list(x.split(sizes, -1))
        at = sizes.index(DIM)
        parts[at] = tilewright.rope(parts[at], cos, sin, layout="bhsd", rotary_dim=rotary_dim)
        return torch.cat(parts, -1)

    return lambda q, k, cos, sin: [joined(x, cos, sin) for x in (q, k)]


@pytest.mark.parametrize("positions", ["counted", "given"])
@pytest.mark.parametrize("carries", [False, True], ids=["all features", "some features"])
@pytest.mark.parametrize("also_used", [False, True], ids=["quantised", "and used"])
def test_rotations_that_are_quantised(positions, carries, also_used):
    """As in the indexer of sparse attention."""

    def run(q, k, cos, sin, places):
        given = places if positions == "given" else None
        results = []
        for x in (q, k):
            turned = tilewright.rope(x[..., :DIM] if carries else x, cos, sin, position_ids=given, rotary_dim=DIM)
            y = torch.cat((turned, x[..., DIM:]), -1) if carries else turned
            results += tilewright.quant_fp8(y.view(-1, y.shape[-1]), group_size=32)
            results += [y] if also_used and x is q else []
        return results

    q, k = (torch.randn(2, 3, heads, DIM + 6 * carries) for heads in (4, 1))
    places = torch.tensor([[2, 0, 1], [1, 1, 2]])
    report = report_of(run, q, k, *torch.randn(2, 3, DIM // 2), places, exact=True)
    assert report.counts == {"rope_quant": 2}
    fused = [d for d in report.decisions if d.action == "fused"]
    assert all(d.kernels == (2 + carries, 1) for d in fused)
    assert any("written for others" in d.reason for d in fused) == also_used
    assert "tilewright.quant_fp8.default" not in targets(report)
    assert "tilewright.rope.default" not in targets(report)


@pytest.mark.parametrize("options", [{"inverse": True}, {"offsets": 1}], ids=str)
def test_rotations_that_are_not_quantised_in_one_launch(options):
    def run(x, cos, sin):
        return tilewright.quant_fp8(tilewright.rope(x, cos, sin, **options), group_size=32)

    report = report_of(run, torch.randn(2, 3, 4, DIM), *torch.randn(2, 5, DIM // 2), exact=True)
    assert not report.counts


def test_features_in_another_order_stay_beside_a_rotation():
    def run(q, k, cos, sin):
        return [torch.cat((x[..., DIM:], tilewright.rope(x[..., :DIM], cos, sin, layout="bhsd")), -1) for x in (q, k)]

    q, k = (torch.randn(2, heads, 3, DIM + 6) for heads in (4, 2))
    report = report_of(run, q, k, *torch.randn(2, 3, DIM // 2), exact=True)
    assert only(report).kernels == (2, 1)
    assert any("cat" in target for target in targets(report))


@pytest.mark.parametrize("good_first", [False, True])
def test_tables_of_one_position(good_first):
    """A step of decoding takes one row; another pair in the graph is fused as ever."""

    def run(q, k, cos, sin, one_cos, one_sin):
        one = halves(q[:, :, :1], k[:, :, :1], one_cos, one_sin)
        both = halves(q, k, cos, sin)
        return (*both, *one) if good_first else (*one, *both)

    q, k = (torch.randn(2, heads, 3, DIM) for heads in (4, 2))
    given = q, k, *torch.randn(2, 3, DIM), *torch.randn(2, DIM)
    assert counts_of(run, *given) == {"rope_qk": 2}
