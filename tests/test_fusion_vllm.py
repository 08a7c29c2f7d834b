"""Graph fusion of vLLM's own operators: what each is read as, what is refused, and whose memory is written."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import types

import pytest
import torch

import tilewright
import vllm_helpers
from fusion_helpers import fresh, fused, only, same, targets  # noqa: F401 - a fixture among them
from tilewright.errors import ArgumentError, MissingDependencyError
from tilewright.fusion import add_adapter, options, remove_adapter, report_of
from tilewright.integrations import vllm
from tilewright.integrations.vllm_fusion import operators, register, rounding
from vllm_helpers import FP8, MAX

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning")

M, N, EPS = 6, 256, 1e-6


@pytest.fixture(autouse=True)
def engine():
    """vLLM's namespaces, and the adapter for them."""
    rounding.measured.cache_clear()
    vllm_helpers.define_all()
    vllm.register_fusion()
    yield
    remove_adapter("vllm")


@pytest.fixture(params=[False, True], ids=["v1", "v2"])
def functionalized(request):
    """Both ways in which Inductor makes operators that write functional."""
    with torch._inductor.config.patch(enable_auto_functionalized_v2=request.param):
        yield request.param


def tensors(*shape, n=N, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(*shape, n, generator=generator).to(dtype) for _ in range(2))
    return x, residual, (torch.rand(n, generator=generator) + 0.5).to(dtype)


# As vLLM calls them.


def c_norm(x, w, eps=EPS):
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, w, eps)
    return y


def c_add_norm(x, residual, w, eps=EPS):
    torch.ops._C.fused_add_rms_norm(x, residual, w, eps)
    return x, residual


def c_static(x, scale, *shape):
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    torch.ops._C.static_scaled_fp8_quant(values, x, scale, *shape)
    return values


def c_token(x, ub=None):
    values, scales = torch.empty(x.shape, dtype=FP8), torch.empty((x.numel() // x.shape[-1], 1))
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(values, x, scales, ub)
    return values, scales


def c_group(x, group=128, layout="row", ue8m0=False, eps=1e-10):
    """``per_token_group_quant_fp8`` of fp8_utils.py."""
    rows, groups = x.shape[-2], x.shape[-1] // group
    if layout == "row":
        scales = torch.empty((*x.shape[:-1], groups))
    elif layout == "column":
        scales = torch.empty((groups, rows)).permute(-1, -2)
    else:
        scales = torch.empty_strided((rows, groups), (1, ALIGNED[layout](rows)))
    values = torch.empty(x.shape, dtype=FP8)
    torch.ops._C.per_token_group_fp8_quant(
        x, values, scales, group, eps, -MAX, MAX, ue8m0, layout != "row", layout in ALIGNED
    )
    return values, scales


def c_packed(x, group=128):
    rows, groups = x.shape[-2], x.shape[-1] // group
    words = torch.empty_strided((rows, (groups + 3) // 4), (1, (rows + 3) // 4 * 4), dtype=torch.int32)
    values = torch.empty(x.shape, dtype=FP8)
    torch.ops._C.per_token_group_fp8_quant_packed(x, values, words, group, 1e-10, -MAX, MAX)
    return values, words


def c_silu(x):
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype)
    torch.ops._C.silu_and_mul(y, x)
    return y


def ir_norm(x, w, eps=EPS):
    return torch.ops.vllm_ir.rms_norm(x, w, eps)


def ir_group(x, group=128, columns=False, ue8m0=False, alignment=1):
    return torch.ops.vllm_ir.dynamic_group_quant_fp8(x, [1, group], columns, ue8m0, FP8, alignment)


def ir_silu(x):
    return torch.ops.vllm_ir.silu_and_mul(x)


def ir_token(x):
    return torch.ops.vllm_ir.dynamic_quant_fp8(x, True, FP8)


# What fuses, with the bits of the operators.

CONSUMERS = {
    "vllm_ir, groups": ir_group,
    "vllm_ir, groups of 64, by columns": lambda y: ir_group(y, 64, columns=True),
    "vllm_ir, per token": ir_token,
    "_C, groups": c_group,
    "_C, groups of 64": lambda y: c_group(y, 64),
    "_C, another eps": lambda y: c_group(y, eps=2.0),
    "_C, by columns": lambda y: c_group(y, layout="column"),
    "_C, aligned": lambda y: c_group(y, layout="up"),
    "_C, powers of two": lambda y: c_group(y, ue8m0=True),
    "_C, packed": c_packed,
    "_C, per token": c_token,
    "vllm, groups": lambda y: torch.ops.vllm.triton_per_token_group_quant_fp8(y, 128),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_norm_and_its_quantisation(name, functionalized):
    consumer, norm = CONSUMERS[name], ir_norm if functionalized else c_norm
    report = fused(lambda x, w: consumer(norm(x, w)), *tensors(M)[::2])
    assert report.counts == {"rms_norm_quant": 1}, report
    assert only(report).verified
    assert not [t for t in targets(report) if "vllm" in t or "auto_functionalized" in t or "empty" in t]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("norm", "quant"), [(ir_norm, ir_group), (c_norm, c_group)], ids=["vllm_ir", "_C"])
@pytest.mark.parametrize("shape", [(M,), (2, 3)], ids=str)
def test_two_and_three_consumers(norm, quant, shape, dynamic, functionalized):
    def run(x, w):
        y = norm(x, w)
        flat = y.view(-1, N)
        return quant(flat), quant(flat), quant(y.reshape(-1, N), 64), y + 1

    report = fused(run, *tensors(*shape)[::2], dynamic=dynamic)
    assert report.counts == {"rms_norm_quant": 1}, report
    assert (
        "3 quantisations in one kernel, 1 equal to another merged with it, with what is quantised"
        in only(report).reason
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("own", "quant", "last"),
    [(False, ir_group, False), (False, ir_token, True), (True, c_group, False), (True, c_token, True)],
)
def test_a_sum_its_norm_and_quantisations(quant, own, last, dynamic, functionalized):
    """The activations are results of other operations, as after a projection."""

    def run(x, residual, w):
        x, residual = x * 2, residual * 0.5
        if own:
            y, z = c_add_norm(x, residual, w)
        else:
            y, z = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, w, EPS)
        return quant(y.view(-1, N)) if last else (quant(y.view(-1, N)), z * 2)

    report = fused(run, *tensors(2, 3), dynamic=dynamic)
    assert report.counts == {"add_rms_norm_quant": 1}, report
    assert not [t for t in targets(report) if "auto_functionalized" in t]


@pytest.mark.parametrize("silu", [ir_silu, c_silu])
@pytest.mark.parametrize("quant", [ir_group, c_group, c_token])
def test_gated_silu(silu, quant, functionalized):
    report = fused(lambda x: quant(silu(x).view(-1, N)), tensors(2, 3, n=2 * N)[0])
    assert report.counts == {"silu_mul_quant": 1}, report


ALIGNED = {
    "up": lambda rows: (rows + 3) // 4 * 4,
    "down": lambda rows: -(-rows // 4) * 4,
    "by less than nothing": lambda rows: -(rows // -4) * 4,
}


@pytest.mark.parametrize("layout", ["row", "column", "packed", *ALIGNED])
def test_any_number_of_rows(layout, functionalized):
    """As vLLM compiles: tokens symbolic, the hidden size not; columns are padded however that is written."""
    quant = {"packed": c_packed}.get(layout, lambda y: c_group(y, layout=layout))

    def run(x, w):
        return quant(c_norm(x, w))

    with torch.no_grad():
        compiled = tilewright.compile(run, fullgraph=True, verify=True)
        for rows in (6, 9):
            x, _, w = tensors(rows)
            torch._dynamo.mark_dynamic(x, 0)
            same(compiled(x, w), run(x, w))
    report = compiled.fusion_report
    assert len(report.graphs) == 1
    assert report.counts == {"rms_norm_quant": 1}, report


@pytest.mark.parametrize("shape", [(1, N), (1, 128), (M, 128)], ids=str)
def test_edge_shapes(shape, functionalized):
    def run(x, w):
        y = c_norm(x, w)
        return c_group(y), c_group(y, 32, "column"), c_token(y), c_packed(c_norm(x * 2, w)), c_group(x * 3, layout="up")

    report = fused(run, *tensors(*shape[:1], n=shape[1])[::2])
    assert report.counts == {"rms_norm_quant": 2}, report


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_given_scale(shape, functionalized):
    def run(x, w, scale):
        y = ir_norm(x, w)
        return c_static(y, scale), torch.ops.vllm_ir.static_quant_fp8(y, scale, FP8), c_static(y, scale, [-1, -1])

    report = fused(run, *tensors(M)[::2], torch.full(shape, 0.03))
    assert "3 quantisations in one kernel, 2 equal to another" in only(report).reason


@pytest.mark.parametrize("own", [False, True], ids=["vllm_ir", "_C"])
def test_without_a_weight(own, functionalized):
    def run(x, residual):
        if own:
            y, h, r = torch.empty_like(x), x * 2, residual * 2
            torch.ops._C.rms_norm_weightless(y, x, EPS)
            torch.ops._C.fused_add_rms_norm_weightless(h, r, EPS)
            return c_group(y), c_group(h), r
        h, r = torch.ops.vllm_ir.fused_add_rms_norm(x * 2, residual * 2, None, EPS)
        return ir_group(ir_norm(x, None)), ir_group(h), r

    report = fused(run, *tensors(M)[:2])
    assert report.counts == {"rms_norm_quant": 1, "add_rms_norm_quant": 1}, report


def test_two_layers_of_the_indexer_model(functionalized):
    """DeepSeek-V3.2: the norm of the query's latent feeds q_b_proj's and the indexer's quantisation, by views."""

    def layer(x, residual, w_in, w_q, down):
        y, residual = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, w_in, EPS)
        first, scales = c_group(y.view(-1, N), layout="column")
        latent = (first.float().view(2, 3, N // 128, 128) * scales.view(2, 3, -1, 1)).bfloat16().flatten(-2)
        q_c = ir_norm(latent @ down, w_q)
        q_b, q_b_scales = c_group(q_c.view(-1, N))
        indexer, indexer_scales = c_group(q_c.view(-1, N))
        out = (q_b.float() + indexer.float()).bfloat16().view(2, 3, N) * q_b_scales.sum() * indexer_scales.sum()
        return out, residual

    def run(x, residual, w, down):
        for _ in range(2):
            x, residual = layer(x, residual, w, w, down)
        return x, residual

    x, residual, w = tensors(2, 3)
    down = (torch.eye(N) * 0.5).bfloat16()
    with torch.no_grad():
        expect = {"add_rms_norm_quant": 2, "rms_norm_quant": 2}
        compiled = tilewright.compile(run, fullgraph=True, verify=True, expect=expect, unmet="raise")
        same(compiled(x, residual, w, down), torch.compile(run, fullgraph=True)(x, residual, w, down))
    merged = [d for d in compiled.fusion_report.decisions if d.rule == "rms_norm_quant" and d.action == "fused"]
    assert all("1 equal to another merged" in d.reason for d in merged)


# Where norms round.


@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
@pytest.mark.parametrize("rounded", ["rounded", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_measured(cast, rounded, dtype, monkeypatch):
    """Whatever the operators do, the fused ones do it too."""
    monkeypatch.setattr(vllm_helpers, "ROUNDING", {"cast": cast, "sum": rounded})
    operator = torch.ops._C.fused_add_rms_norm.default
    assert rounding.measured(operator, torch.device("cpu"), dtype) == (cast, rounded)
    assert rounding.measured(torch.ops._C.rms_norm.default, torch.device("cpu"), dtype) == (cast, "rounded")
    aiter = torch.ops.vllm.rocm_aiter_rmsnorm2d_fwd_with_add.default
    assert rounding.measured(aiter, torch.device("cpu"), dtype) == ("before_weight", "exact")

    def run(x, residual, w):
        y, z = c_add_norm(x * 2, residual * 2, w)
        return c_group(y), z, c_group(c_norm(x, w)), c_group(torch.ops.vllm.rocm_aiter_rms_norm(x * 3, w, EPS))

    report = fused(run, *tensors(M, dtype=dtype))
    assert report.counts == {"add_rms_norm_quant": 1, "rms_norm_quant": 2}, report


def test_rounding_that_cannot_be_measured(monkeypatch):
    """On a device that is not there, or where the operator computes something else."""
    assert rounding.measured(torch.ops._C.rms_norm.default, torch.device("meta"), torch.bfloat16) is None
    monkeypatch.setattr(vllm_helpers, "norm", lambda z, weight, epsilon, dtype, cast: (z * weight).to(dtype))
    report = fused(lambda x, w: c_group(c_norm(x, w)), *tensors(M)[::2])
    assert only(report, "refused").reason == "differs in norm_rounding, which numerics='relaxed' would allow"


# Whose memory is written.


def test_a_result_in_another_shape_of_its_memory(functionalized):
    def run(x, w):
        y = torch.empty_like(x)
        torch.ops._C.rms_norm(y.view(-1, N), x.view(-1, N), w, EPS)
        values = torch.empty(x.shape, dtype=FP8)
        scales = torch.empty(*x.shape[:-1], N // 128)
        torch.ops._C.per_token_group_fp8_quant(
            y.view(-1, N), values.view(-1, N), scales.view(-1, N // 128), 128, 1e-10, -MAX, MAX, False, False, False
        )
        return values, scales, y

    report = fused(run, *tensors(2, 3)[::2])
    assert report.counts == {"rms_norm_quant": 1}, report


MEMORY = {
    "an input": (
        lambda x, r, w, out: torch.ops._C.rms_norm(out, x, w, EPS) or c_group(out),
        "result is not memory of its own: arg0_1 is an input of the graph",
    ),
    "what holds something": (
        lambda x, r, w, out: c_group(c_norm_into(x * 2, x, w)),
        "result is not memory of its own: mul holds something already",
    ),
    "read before": (
        lambda x, r, w, out: reads_before(x, w),
        "result is not memory of its own: add reads the same memory",
    ),
    "an input changed": (
        lambda x, r, w, out: (c_group(c_add_norm(x * 2, r, w)[0]), r),
        "residual is written back into arg1_1, an input of the graph",
    ),
    "an input changed twice": (
        lambda x, r, w, out: [c_group(c_add_norm(h, r, w)[0]) for h in (x * 2, x * 3)],
        "residual is written back into arg1_1, an input of the graph",
    ),
}


def c_norm_into(result, x, w):
    torch.ops._C.rms_norm(result, x, w, EPS)
    return result


def reads_before(x, w):
    result = torch.full_like(x, 3.0)
    early = result + x
    return c_group(c_norm_into(result, x, w)), early


@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_is_not_there_for_it_alone(name, functionalized):
    run, reason = MEMORY[name]
    x, residual, w = tensors(M)
    report = fused(run, x, residual, w, torch.empty_like(x))
    refused = [d.reason for d in report.decisions if d.action == "refused"]
    assert not report.counts, report
    assert f"not quite: {reason}" in refused, refused


def test_old_values_that_others_read(functionalized):
    """What is changed in place is still read as it was."""

    def run(x, residual, w):
        h, r = x * 2, residual * 2
        before = h + r
        y, z = c_add_norm(h, r, w)
        return c_group(y), z, before, x + residual

    report = fused(run, *tensors(M))
    assert report.counts == {"add_rms_norm_quant": 1}


def test_parts_of_one_tensor(functionalized):
    def run(x, w):
        both = x.new_zeros(2, M, N)
        torch.ops._C.rms_norm(both[0], x, w, EPS)
        return c_group(both[0]), both

    report = fused(run, *tensors(M)[::2])
    assert not report.counts
    why = "result is a view of the tensor that it is written into" if functionalized else "select_scatter"
    assert why in only(report, "refused").reason


def test_memory_that_is_used_again(functionalized):
    """A buffer for one result after another: each has its own values."""

    def run(x, w):
        buffer = torch.empty_like(x)
        first = c_norm_into(buffer, x, w)
        one = (*c_group(first), first + 1)
        second = c_norm_into(buffer, x * 3, w)
        return *one, *c_group(second), second

    report = fused(run, *tensors(M)[::2])
    assert report.counts == {"rms_norm_quant": 2}, report


def test_a_graph_that_is_not_functional():
    graph = torch.fx.Graph()
    given = [graph.placeholder(name) for name in ("result", "input", "weight")]
    graph.call_function(torch.ops._C.rms_norm.default, (*given, EPS))
    found, (miss,) = operators.recognise(graph)
    assert not found
    assert (miss.kind, miss.reason) == (
        "rms_norm",
        "it writes into its arguments, and the graph is not functional",
    )


# What is refused.

MISSES = {
    "variance_size": (
        lambda x, w: ir_group(torch.ops.vllm_ir.rms_norm(x, w, EPS, 128)),
        "the mean is of the first 128 columns alone (variance_size)",
    ),
    "scale_ub": (lambda x, w: c_token(ir_norm(x, w), x.new_ones(1).float()), "scale_ub is given"),
    "one scale": (
        lambda x, w: torch.ops.vllm_ir.dynamic_quant_fp8(ir_norm(x, w), False, FP8),
        "one scale is computed for the whole tensor",
    ),
    "one scale by _C": (lambda x, w: c_tensor(ir_norm(x, w)), "one scale is computed for the whole tensor"),
    "padding": (
        lambda x, w: torch.ops.vllm_ir.dynamic_quant_fp8(ir_norm(x, w), True, FP8, None, 4),
        "num_token_padding is given",
    ),
    "scales for rows": (
        lambda x, w: torch.ops.vllm_ir.static_quant_fp8(ir_norm(x, w), w[:M, None].float(), FP8),
        "scale is torch.float32[6, 1]; expected one float32 number",
    ),
    "groups of rows": (
        lambda x, w: torch.ops.vllm_ir.dynamic_group_quant_fp8(ir_norm(x, w), [2, 128], False, False, FP8),
        "groups have shape [2, 128]; expected parts of one row",
    ),
    "group size": (lambda x, w: c_group(ir_norm(x, w), 16), "expected one of 128, 64, 32, None"),
    "int8": (
        lambda x, w: torch.ops.vllm_ir.static_quant_fp8(ir_norm(x, w), x.new_ones(1).float(), torch.int8),
        "the values are torch.int8",
    ),
    "eps": (lambda x, w: ir_group(ir_norm(x, w, 0.0)), "epsilon is 0.0; expected a number of at least"),
    "weight by row": (lambda x, w: c_group(c_norm(x, w.expand(M, N).contiguous())), "weight has shape (6, 256)"),
    "16-bit weight": (
        lambda x, w: ir_group(ir_norm(x, w.half())),
        "the norm is rounded to torch.float16 before its weight multiplies",
    ),
    "aiter per token": (
        lambda x, w: torch.ops.vllm.rocm_aiter_per_token_quant(ir_norm(x, w), FP8),
        "how it computes its scale is not known",
    ),
    "rotation": (lambda x, w: rotated(ir_norm(x, w)), "one launch turns query and key already"),
}


def c_tensor(x):
    values, scale = torch.empty(x.shape, dtype=FP8), torch.empty(1)
    torch.ops._C.dynamic_scaled_fp8_quant(values, x, scale)
    return values, scale


def rotated(y):
    q, k = y * 1, y * 2
    torch.ops._C.rotary_embedding(torch.arange(M), q, k, 64, torch.ones(M, 64, dtype=y.dtype), True)
    return q, k


@pytest.mark.parametrize("name", MISSES)
def test_what_no_public_function_does(name):
    run, reason = MISSES[name]
    with torch.no_grad():
        compiled = tilewright.compile(run, fullgraph=True)
        x, _, w = tensors(M)
        same(compiled(x, w), run(x, w))
    refused = [d.reason for d in compiled.fusion_report.decisions if d.action == "refused"]
    assert any(reason in each for each in refused), refused
    assert not compiled.fusion_report.counts
    assert not [d for d in compiled.fusion_report.decisions if d.action == "failed"]


DIFFERENCES = {
    "ue8m0_floor": lambda y: ir_group(y, ue8m0=True),
    "scale_rounding": lambda y: torch.ops.vllm.rocm_aiter_group_fp8_quant(y, 128),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_named_differences(name):
    def run(x, w):
        return DIFFERENCES[name](ir_norm(x, w))

    x, _, w = tensors(M)
    report = fused(run, x, w)
    assert only(report, "refused").reason == f"differs in {name}, which numerics='relaxed' would allow"
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = tilewright.compile(run, fullgraph=True, numerics="relaxed")
        values, scales = compiled(x, w)
    assert only(compiled.fusion_report).numerics == (name,)
    expected, expected_scales = run(x, w)
    assert not tilewright.numerics.compare_codes(values, expected)
    torch.testing.assert_close(scales, expected_scales, rtol=torch.finfo(torch.float32).eps, atol=0.0)


def test_rows_of_any_size_are_no_groups_of_one():
    report = fused(lambda x, w: c_group(ir_norm(x, w)), *tensors(M)[::2], dynamic=True)
    assert only(report, "refused").reason == (
        "not quite: the size of input's rows is symbolic: mark the last dimension as static"
    )


def test_a_float32_weight_is_multiplied_before_rounding():
    """As Gemma's, which vLLM gives as ``weight.float() + 1``."""
    report = fused(lambda x, w: ir_group(ir_norm(x, w.float() + 1)), *tensors(M)[::2])
    assert report.counts == {"rms_norm_quant": 1}, report


def test_scales_of_batches_by_columns_lie_otherwise():
    report = fused(lambda x, w: ir_group(ir_norm(x, w), columns=True), *tensors(2, 3)[::2])
    assert "has strides" in only(report, "refused").reason


# Versions of vLLM, and no vLLM.


def c_group_older(x):
    values, scales = torch.empty(x.shape, dtype=FP8), torch.empty((M, N // 128))
    torch.ops._C.older_group_quant(x, values, scales, 128, 1e-10, -MAX, MAX, False)
    return values, scales


def test_an_older_schema(functionalized, monkeypatch):
    """vLLM v0.11: without the two that repeat the layout."""
    schema = vllm_helpers.SCHEMAS["_C"]["per_token_group_fp8_quant"]
    schema = schema.replace(", bool dummy_is_scale_transposed, bool dummy_is_tma_aligned )", ")")
    vllm_helpers.define("_C", "older_group_quant", schema, vllm_helpers.c_per_token_group_fp8_quant)
    known = operators.OPERATORS["_C.per_token_group_fp8_quant"]
    monkeypatch.setitem(operators.OPERATORS, "_C.older_group_quant", known)
    report = fused(lambda x, w: c_group_older(c_norm(x, w)), *tensors(M)[::2])
    assert report.counts == {"rms_norm_quant": 1}, report


def c_static_newer(x, scale):
    values = torch.empty(x.shape, dtype=FP8)
    torch.ops._C.newer_static_quant(values, x, scale)
    return values


def c_static_overload(x, scale):
    values = torch.empty(x.shape, dtype=FP8)
    torch.ops._C.static_scaled_fp8_quant.by(values, x, scale)
    return values


def test_schemas_that_are_not_known(functionalized, monkeypatch):
    schema = "(Tensor! result, Tensor input, Tensor scale, Tensor? azp=None) -> ()"
    vllm_helpers.define("_C", "newer_static_quant", schema, vllm_helpers.c_static_scaled_fp8_quant)
    known = operators.OPERATORS["_C.static_scaled_fp8_quant"]
    monkeypatch.setitem(operators.OPERATORS, "_C.newer_static_quant", known)
    schema = "(Tensor! result, Tensor input, Tensor scale) -> ()"
    vllm_helpers.define("_C", "static_scaled_fp8_quant.by", schema, vllm_helpers.c_static_scaled_fp8_quant)

    def run(x, w, scale):
        y = c_norm(x, w)
        return c_static_newer(y, scale), c_static_overload(y, scale)

    report = fused(run, *tensors(M)[::2], torch.full((1,), 0.03))
    assert sorted(d.reason for d in report.decisions) == [
        "not quite: _C::newer_static_quant has arguments that are not known: result input scale azp; "
        "expected result input scale group_shape",
        "not quite: the overload 'by' of _C::static_scaled_fp8_quant is not known",
    ]


def test_a_call_that_cannot_be_read(monkeypatch):
    """Whatever an engine's later version does, the other operators are still recognised."""

    def read(call):
        return call.given["what is not there"]

    known = operators.OPERATORS["vllm_ir.silu_and_mul"]
    monkeypatch.setitem(operators.OPERATORS, "vllm_ir.silu_and_mul", dataclasses.replace(known, read=read))
    report = fused(lambda x, w: (ir_silu(x), ir_group(ir_norm(x, w))), *tensors(M)[::2])
    assert report.counts == {"rms_norm_quant": 1}
    assert only(report, "refused").reason == "not quite: cannot be read: KeyError: 'what is not there'"


@pytest.mark.parametrize("how", ["transposed", "equal sizes", "slice", "other rows"])
@pytest.mark.parametrize("operator", ["_C", "vllm_ir"])
def test_views_that_are_changed_in_place(how, operator, functionalized):
    """What is read is the view and not what it is a view of."""
    shown = {
        "transposed": lambda t: t.transpose(0, 1),
        "equal sizes": lambda t: t.transpose(0, 1),
        "slice": lambda t: t[1:3],
        "other rows": lambda t: t.view(-1, N // 2),
    }[how]
    n = N // 2 if how == "other rows" else N

    def run(x, residual, w):
        h, z = x * 2, residual * 2
        if operator == "_C":
            torch.ops._C.fused_add_rms_norm(shown(h), shown(z), w, EPS)
            return tuple(tilewright.quant_fp8(shown(h).reshape(-1, n)))
        y, _ = torch.ops.vllm_ir.fused_add_rms_norm.maybe_inplace(shown(h), shown(z), w, EPS)
        return tuple(tilewright.quant_fp8(y.reshape(-1, n)))

    x, residual, _ = tensors(3, 3 if how == "equal sizes" else 5)
    given = x, residual, (torch.rand(n) + 0.5).bfloat16()
    with torch.no_grad():
        compiled = tilewright.compile(run, fullgraph=True)
        results = compiled(*given)
    if functionalized or how != "slice" or operator != "_C":  # of which torch.compile makes something else by itself
        same(results, run(*given))
    assert how != "slice" or operator != "_C" or not compiled.fusion_report.counts
    assert all(decision.action != "failed" for decision in compiled.fusion_report.decisions)


def test_maybe_inplace(functionalized):
    """vLLM's overload that may use its inputs' memory as it likes."""

    def run(x, residual, w):
        y, z = torch.ops.vllm_ir.fused_add_rms_norm.maybe_inplace(x * 2, residual * 2, w, EPS)
        return ir_group(y), z

    report = fused(run, *tensors(M))
    assert report.counts == {"add_rms_norm_quant": 1}, report


def test_it_is_registered_once_and_can_be_taken_back():
    vllm.register_fusion()
    remove_adapter("vllm")
    report = fused(lambda x, w: ir_group(ir_norm(x, w)), *tensors(M)[::2])
    assert not report.decisions
    vllm.register_fusion()
    remove_adapter("vllm")
    add_adapter("vllm", lambda graph: ([], []), version="another's")
    with pytest.raises(ArgumentError, match="an adapter called 'vllm' already"):
        vllm.register_fusion()


def test_what_is_installed_is_a_part_of_the_identity(monkeypatch):
    identities = {options()["post_grad_custom_post_pass"].identity()}
    for version in ("0.22.0", "0.23.0"):
        remove_adapter("vllm")
        monkeypatch.setattr(register.metadata, "version", lambda name, version=version: version)
        vllm.register_fusion()
        identities.add(options()["post_grad_custom_post_pass"].identity())
    assert len(identities) == 3


@pytest.mark.parametrize("place", register._PASSES)
def test_a_pass_that_vllm_takes(place, monkeypatch):
    """vllm-project/vllm, ``vllm/compilation/backends.py``: an ``InductorPass``, in a configuration that is copied."""

    class InductorPass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def is_applicable_for_range(self, compile_range):
            return True

    parts = place.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[place].InductorPass = InductorPass
    register._pass_class.cache_clear()
    try:
        remove_adapter("vllm")
        made = vllm.fusion_pass(verify=True, numerics="relaxed")
        assert isinstance(made, InductorPass)
        assert made.is_applicable_for_range(None)
        assert made.uuid() == options(verify=True, numerics="relaxed")["post_grad_custom_post_pass"].uuid()
        assert copy.deepcopy({"pass": made})["pass"] is made
        again = pickle.loads(pickle.dumps(made))
        assert (type(again), again.policy, again.uuid()) == (type(made), made.policy, made.uuid())
        slot = {"post_grad_custom_post_pass": made}
        with torch.no_grad():
            torch.compile(lambda x, w: c_group(c_norm(x, w)), options=slot)(*tensors(M)[::2])
        assert report_of(slot).counts == {"rms_norm_quant": 1}
    finally:
        register._pass_class.cache_clear()


def test_a_pass_needs_vllm_and_the_adapter_does_not(monkeypatch):
    with pytest.raises(MissingDependencyError, match="fusion_pass needs vLLM's InductorPass"):
        vllm.fusion_pass()
    with pytest.raises(ArgumentError, match="numerics"):
        vllm.fusion_pass(numerics="loose")


def test_nothing_is_loaded_for_who_does_not_ask():
    program = """
import sys
import tilewright, tilewright.fusion
from tilewright.fusion import RULES
from tilewright.integrations import vllm
assert not [name for name in sys.modules if name.startswith("tilewright.integrations.vllm_fusion")]
import torch
before = set(sys.modules)
vllm.register_fusion()
assert not [name for name in set(sys.modules) - before if name.partition(".")[0] in ("vllm", "triton")]
assert not hasattr(torch.ops._C, "rms_norm")
assert not torch.cuda.is_initialized()
compiled = tilewright.compile(lambda x: tuple(tilewright.quant_fp8(tilewright.rms_norm(x))))
with torch.no_grad():
    compiled(torch.ones(2, 128, dtype=torch.bfloat16))
(decision,) = compiled.fusion_report.decisions
assert decision.action == "fused"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
