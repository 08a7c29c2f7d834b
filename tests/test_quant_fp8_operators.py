"""The registered operators of FP8 quantisation, torch.compile, gradients, explanations and formats."""

from dataclasses import fields

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tilewright
from quant_fp8_helpers import FP8, MX, PACKED, TARGETS, random, serve, spread
from tilewright import (
    QuantFormat,
    QuantPolicy,
    add_rms_norm_quant_fp8,
    dequant_fp8,
    numerics,
    quant_fp8,
    rms_norm_quant_fp8,
    rope_quant_fp8,
    scaled_mm_fp8,
    silu_mul_quant_fp8,
    use,
)
from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.quant_fp8 import op
from tilewright.ops.quant_fp8.cases import same_bits
from tilewright.ops.quant_fp8.format import POLICIES, checked, decoded, encoded
from tilewright.testing import Target

tilewright.register()
OPERATORS = torch.ops.tilewright
CPU = Target("reference", torch.device("cpu"))
FORMATS = {
    "fp32": QuantFormat(),
    "token": QuantFormat(None),
    "column": QuantFormat(32, "ue8m0", "column"),
    "tma": QuantFormat(64, "ue8m0_fp32", "tma_aligned"),
    "packed": QuantFormat(128, **PACKED),
    "e5m2": QuantFormat(dtype=torch.float8_e5m2),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **kwargs):
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def tensors(result):
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in tensors(part)]


def text(f, device):
    return encoded(checked(f, device, "test"))


# The operators themselves.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(target, name):
    x, residual = random(target, 5, 300), random(target, 5, 300, dtype=torch.float32, seed=1)
    weight, impl = random(target, 300, seed=2), target.implementation
    one, two = ([text(f, target.device) for f in given] for given in ((FORMATS[name],), (FORMATS[name], MX)))
    norm = (1e-5, 1.0, "after_weight")
    torch.library.opcheck(OPERATORS.quant_fp8.default, (x, None, one, impl))
    torch.library.opcheck(OPERATORS.rms_norm_quant_fp8.default, (x, weight, None, two, True, *norm, impl))
    torch.library.opcheck(OPERATORS.rms_norm_quant_fp8.default, (x, weight, None, one, False, *norm, impl))
    added = (x, residual, None, None, two, True, 1e-6, 0.0, "before_weight", "exact", impl)
    torch.library.opcheck(OPERATORS.add_rms_norm_quant_fp8.default, added)
    torch.library.opcheck(OPERATORS.silu_mul_quant_fp8.default, (x, None, two, True, impl))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("positions", ["counted", "given"])
def test_opcheck_of_a_rotation(target, positions):
    x, tables = random(target, 2, 3, 4, 96), [random(target, 5, 32, dtype=torch.float32, seed=seed) for seed in (1, 2)]
    given = torch.tensor([[4, 0, 1]], device=target.device) if positions == "given" else None
    two = [text(f, target.device) for f in (QuantFormat(), MX)]
    for layout in ("bshd", "bhsd"):
        at = x if layout == "bshd" else x.transpose(1, 2).contiguous()
        args = at, *tables
        options = (layout, False, 64, 16, "exact", target.implementation)
        torch.library.opcheck(OPERATORS.rope_quant_fp8.default, (*args, given, None, two, True, *options))


@pytest.mark.parametrize("target", TARGETS)
def test_opcheck_of_a_given_scale(target):
    x, scale, one = random(target, 5, 300), torch.full((1,), 0.1, device=target.device), [text(MX, target.device)]
    with pytest.raises(ArgumentError, match="group_size"):
        OPERATORS.quant_fp8(x, scale, one)
    one = [text(QuantFormat(), target.device)]
    impl = target.implementation
    torch.library.opcheck(OPERATORS.quant_fp8.default, (x, scale, one, impl))
    torch.library.opcheck(OPERATORS.silu_mul_quant_fp8.default, (x, scale, one, True, impl))
    norm = (1e-6, 0.0, "before_weight")
    torch.library.opcheck(OPERATORS.rms_norm_quant_fp8.default, (x, None, scale, one, True, *norm, impl))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FORMATS)
def test_opcheck_of_dequant(target, name):
    f = FORMATS[name]
    pair = quant_fp8(
        random(target, 5, 300), group_size=f.group_size, scale_format=f.scale_format, scale_layout=f.scale_layout,
        dtype=f.dtype, impl=target.implementation,
    )  # fmt: skip
    before = [t.clone() for t in pair]
    # torch's check of the schema compares inputs by `allclose`, which has no FP8: that they stay is seen by their bits.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (*pair, f.group_size, torch.bfloat16, target.implementation)
    torch.library.opcheck(OPERATORS.dequant_fp8.default, args, test_utils=checks)
    assert all(map(same_bits, pair, before))


def test_text_that_is_no_format():
    for wrong in ("fp32", "", text(QuantFormat(), torch.device("cpu")).replace("float8", "float9")):
        with pytest.raises(ArgumentError) as caught:
            OPERATORS.quant_fp8(torch.ones(2, 8), None, [wrong])
        assert caught.value.argument == "formats"


def test_the_operator_is_the_function():
    x = random(TARGETS[0].values[0], 4, 300)
    one = [text(QuantFormat(policy="deep_gemm"), x.device)]
    results = OPERATORS.quant_fp8(x, None, one)
    assert all(map(same_bits, results, quant_fp8(x, policy="deep_gemm")))
    assert same_bits(OPERATORS.dequant_fp8(*results, 128, torch.float16), dequant_fp8(*results, dtype=torch.float16))


# Gradients are refused, never dropped.

TURNS = torch.randn(2, 1, 150)
REFUSED = {
    "quant_fp8": lambda x, w, **k: quant_fp8(x, **k),
    "rms_norm_quant_fp8": rms_norm_quant_fp8,
    "add_rms_norm_quant_fp8": lambda x, w, **k: add_rms_norm_quant_fp8(x.detach(), x, w, **k),
    "silu_mul_quant_fp8": lambda x, w, **k: silu_mul_quant_fp8(x, **k),
    "rope_quant_fp8": lambda x, w, **k: rope_quant_fp8(x[:, None, None, :], *TURNS.to(x.device), **k),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REFUSED)
def test_gradients_are_refused(target, name):
    function, kwargs = REFUSED[name], {"impl": target.implementation}
    x, weight = random(target, 4, 300), random(target, 300)
    leaf = x.clone().requires_grad_()
    named = "residual" if name.startswith("add") else "x"
    for given, argument in (((leaf, weight), named), ((x, weight.clone().requires_grad_()), "weight")):
        if argument == "weight" and "norm" not in name:
            continue
        with pytest.raises(ArgumentError, match="has no backward; detach it or use torch") as caught:
            function(*given, **kwargs)
        assert (caught.value.operation, caught.value.argument) == (name, argument)
        with pytest.raises(Exception, match=f"argument '{argument}': requires a gradient, but {name} has no backward"):
            compiled(lambda x, w: function(x, w, **kwargs))(*given)
        with torch.no_grad():
            run = compiled(lambda x, w: function(x, w, **kwargs))
            results = tensors(function(*given, **kwargs)), tensors(run(*given))
        assert not any(t.requires_grad for result in results for t in result)
        expected = tensors(function(x, weight, **kwargs))
        assert all(same_bits(*pair) for result in results for pair in zip(result, expected, strict=True))


def test_operators_refuse_gradients():
    x, weight = torch.ones(2, 64), torch.ones(64)
    scale, one = torch.ones(1), [text(QuantFormat(), x.device)]
    norm = (False, 1e-6, 0.0, "before_weight")
    values, scales = quant_fp8(x)

    def leaf(t):
        return t.clone().requires_grad_()

    for argument, operator, args in (
        ("x", OPERATORS.quant_fp8, (leaf(x), None, one)),
        ("scale", OPERATORS.quant_fp8, (x, leaf(scale), one)),
        ("weight", OPERATORS.rms_norm_quant_fp8, (x, leaf(weight), None, one, *norm)),
        ("residual", OPERATORS.add_rms_norm_quant_fp8, (x, leaf(x), None, None, one, *norm, "rounded")),
        ("x", OPERATORS.silu_mul_quant_fp8, (leaf(x), None, one, False)),
        ("scales", OPERATORS.dequant_fp8, (values, leaf(scales), 128, torch.float32)),
    ):
        with pytest.raises(ArgumentError, match="has no backward") as caught:
            operator(*args)
        assert caught.value.argument == argument
        with torch.no_grad():
            operator(*args)


# torch.compile.

GLOBAL = QuantFormat(32, "ue8m0", "column", policy=QuantPolicy(amax_floor=1e-3))


def everything(target):
    """Every function in one graph."""
    impl = target.implementation

    def model(x, weight, scale):
        norm = rms_norm_quant_fp8(
            x, weight, also=(GLOBAL,), return_norm=True, policy=QuantPolicy(apply="reciprocal"), impl=impl
        )
        added = add_rms_norm_quant_fp8(x, x + x, weight, scale=scale, policy="vllm_fused", impl=impl)
        gated = silu_mul_quant_fp8(x, **PACKED, return_activation=True, impl=impl)
        plain = quant_fp8(x, group_size=None, dtype=torch.float8_e5m2, impl=impl)
        return (
            norm, added, gated, plain, dequant_fp8(*plain, group_size=None, dtype=torch.bfloat16, impl=impl),
            dequant_fp8(gated.values, gated.scales, impl=impl),
        )  # fmt: skip

    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_compiled_equals_eager(target, backend, dynamic):
    model = everything(target)
    run = compiled(model, backend, dynamic=dynamic)
    weight, scale = random(target, 300), torch.full((1,), 0.1, device=target.device)
    for n_rows in (5, 7):
        x = random(target, n_rows, 300, seed=n_rows)
        eager, other = tensors(model(x, weight, scale)), tensors(run(x, weight, scale))
        assert len(eager) == len(other)
        for a, b in zip(eager, other, strict=True):
            assert same_bits(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_recompilation_at_most(dynamic):
    counter = CompileCounter()
    run = compiled(lambda x, w: rms_norm_quant_fp8(x, w, also=(GLOBAL,), **PACKED), counter, dynamic=dynamic)
    target = TARGETS[0].values[0]
    for n_rows in (2, 3, 5, 6):
        given = random(target, n_rows, 3, 300), random(target, 300)
        expected = rms_norm_quant_fp8(*given, also=(GLOBAL,), **PACKED)
        assert all(map(same_bits, tensors(run(*given)), tensors(expected)))
    assert counter.frame_count <= (1 if dynamic else 2)


def test_a_graph_holds_for_its_format_alone():
    """Every field of a format is guarded, however the format comes into the graph."""
    x = random(TARGETS[0].values[0], 4, 300) * 1e-3
    policies = (
        "exact", "deep_gemm", QuantPolicy(), QuantPolicy(amax_floor=0.5), QuantPolicy(amax_floor=0.25),
        QuantPolicy(maximum=100.0),
    )  # fmt: skip
    formats = [QuantFormat(size, kind, policy=p) for size in (128, 32) for kind in ("fp32", "ue8m0") for p in policies]
    functions = {
        "format": lambda x, f: rms_norm_quant_fp8(x, also=[f]),
        "fields": lambda x, f: quant_fp8(x, group_size=f.group_size, scale_format=f.scale_format, policy=f.policy),
    }
    torch._dynamo.config.recompile_limit, before = 2 * len(formats), torch._dynamo.config.recompile_limit
    try:
        for dynamic in (None, True):
            for function in functions.values():
                run = compiled(function, "eager", dynamic=dynamic)
                for f in formats:
                    assert all(map(same_bits, tensors(run(x, f)), tensors(function(x, f)))), f
    finally:
        torch._dynamo.config.recompile_limit = before


def test_errors_in_a_graph_are_the_same():
    x = torch.ones(2, 64)
    with pytest.raises(Exception, match=r"quant_fp8: argument 'group_size': got 100"):
        compiled(lambda x: quant_fp8(x, group_size=100))(x)
    with pytest.raises(Exception, match=r"rms_norm_quant_fp8: argument 'also': no policy is called 'sloppy'"):
        compiled(lambda x: rms_norm_quant_fp8(x, also=[QuantFormat(policy="sloppy")]))(x)
    for also, given in ((QuantFormat(), "QuantFormat"), (["ue8m0"], "str")):
        with pytest.raises(Exception, match=f"rms_norm_quant_fp8: argument 'also': got {given}; expected"):
            compiled(lambda x, also=also: rms_norm_quant_fp8(x, also=also))(x)


def test_use_inside_a_compiled_function():
    seen = []

    def backend(graph_module, example_inputs):
        seen.extend(n.args[-1] for n in graph_module.graph.nodes if str(n.target).startswith("tilewright."))
        return graph_module.forward

    def model(x):
        with use("reference"):
            pair = quant_fp8(x)
        return dequant_fp8(*pair, dtype=torch.float32)

    x = torch.randn(2, 300)
    assert torch.equal(compiled(model, backend)(x), model(x))
    assert seen == ["reference", None]


def test_export_keeps_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x):
            return tuple(quant_fp8(x, **PACKED))

    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Model(), (torch.randn(4, 300),), dynamic_shapes=({0: rows},))
    assert any(str(node.target) == "tilewright.quant_fp8.default" for node in program.graph.nodes)
    x = torch.randn(9, 300)
    assert all(map(same_bits, program.module()(x), quant_fp8(x, **PACKED)))


# Explanations.


@pytest.mark.parametrize("target", TARGETS)
def test_explanations(target):
    x = random(target, 4, 300)
    impl = target.implementation
    told = tilewright.explain("rms_norm_quant_fp8", x, also=(MX,), policy="deep_gemm", impl=impl)
    assert told.chosen == impl
    for expected in ("4 rows of 300", "groups of 128, fp32 scales, row, deep_gemm", "groups of 32, ue8m0 scales"):
        assert expected in str(told)
    assert told.dtypes == ("bfloat16", "float8_e4m3fn", "float8_e4m3fn")
    static = tilewright.explain("quant_fp8", x, scale=torch.ones(1, device=x.device), policy=QuantPolicy(), impl=impl)
    assert "by a given scale, own policy" in static.shape
    values, scales = serve(target, quant_fp8, x, **PACKED)
    assert "groups of 128, packed scales" in tilewright.explain("dequant_fp8", values, scales, impl=impl).shape
    with pytest.raises(ArgumentError):
        tilewright.explain("quant_fp8", x, group_size=7)


def test_e4m3fnuz_is_explained():
    told = tilewright.explain("quant_fp8", torch.ones(2, 64), dtype=torch.float8_e4m3fnuz)
    assert told.chosen == "reference"
    for candidate in told.candidates:
        assert candidate.name == "reference" or "e4m3fnuz" in candidate.reason


# Formats as text, policies, and the product for checks.


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [*FP8, torch.float8_e4m3fnuz])
def test_formats_survive_as_text(name, dtype):
    given = QuantFormat(None, "ue8m0_packed", "tma_aligned", dtype, name)
    read = decoded(encoded(given))
    assert read.arithmetic == given.arithmetic
    assert [getattr(read, f.name) for f in fields(QuantFormat)[:-1]] == [
        getattr(given, f.name) for f in fields(QuantFormat)[:-1]
    ]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"group_size": 128.0}, {"group_size": 128}),
        ({"policy": QuantPolicy(round_input=1)}, {"policy": QuantPolicy(round_input=True)}),
        ({"policy": QuantPolicy(amax_floor=True)}, {"policy": QuantPolicy(amax_floor=1.0)}),
    ],
)
def test_a_wrong_call_does_not_spoil_the_right_one(wrong, right, monkeypatch):
    """Options that compare equal but are of another type are refused and not remembered."""
    monkeypatch.setattr(op, "_PLANS", op.PlanCache())
    x = random(CPU, 3, 300)
    for _ in range(2):
        with pytest.raises((ArgumentError, DTypeError)) as caught:
            quant_fp8(x, **wrong)
        assert caught.value.argument == next(iter(wrong))
    assert quant_fp8(x, **right).values.shape == (3, 300)


@pytest.mark.parametrize("n_cols", [256, 352])
def test_scaled_mm_compiled(n_cols):
    """A last group that is shorter, too: it is plain PyTorch, which the compiler sees."""
    x, weight = torch.randn(5, n_cols), torch.randn(7, n_cols)
    a, b = tilewright.quant_fp8(x), tilewright.quant_fp8(weight)
    expected = scaled_mm_fp8(a, b, dtype=torch.float32)
    torch._dynamo.reset()
    got = torch.compile(lambda *t: scaled_mm_fp8(t[:2], t[2:], dtype=torch.float32), fullgraph=True)(*a, *b)
    wide_a, wide_b = (tilewright.dequant_fp8(*t, dtype=torch.float32).double() for t in (a, b))
    assert numerics.compare(got, expected, wide_a @ wide_b.T, reduced=n_cols).ok


def test_scaled_mm():
    a, b = quant_fp8(random(CPU, 2, 5, 300)), quant_fp8(random(CPU, 7, 300, seed=1), group_size=None)
    wide_a = a.values.double() * spread(a.scales, 128, 300)
    wide_b = b.values.double() * b.scales
    got = scaled_mm_fp8(a, b, group_size=(128, None), dtype=torch.float32)
    same = torch.matmul(wide_a.float(), wide_b.float().T)
    assert numerics.compare(got, same, wide_a @ wide_b.T, reduced=300).ok
    for wrong, argument in (
        ({"a": a.values}, "a"),
        ({"b": tuple(quant_fp8(random(CPU, 7, 128)))}, "b"),
        ({"a": tuple(quant_fp8(random(CPU, 300)))}, "a"),
        ({"group_size": (128, None, 64)}, "group_size"),
        ({"dtype": torch.int32}, "dtype"),
    ):
        given = {"a": a, "b": b, "group_size": (128, None)} | wrong
        with pytest.raises(ArgumentError) as caught:
            scaled_mm_fp8(**given)
        assert caught.value.argument == argument
        assert caught.value.operation == "scaled_mm_fp8"
