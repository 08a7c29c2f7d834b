"""Plain-PyTorch forms: what is recognised in a compiled graph means what the library's own operation computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.custom_graph_pass import CustomGraphPass

import tilewright
from tilewright import numerics
from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.graph import aten, origin, value
from tilewright.fusion.inductor import leaves_out_roundings
from tilewright.fusion.recognise.aten import recognise
from tilewright.ops.quant_fp8.format import MIN_SCALE

FP8 = torch.float8_e4m3fn
POLICY = tilewright.QuantPolicy
HALVES = [torch.bfloat16, torch.float16]
LEFT_OUT = "(before 2.13, torch leaves out a rounding"
"""What a refusal says where torch has dropped a rounding of the program's before the pass sees its graph."""


class _Captured(BaseException):
    """Ends a compilation whose graph is all that is wanted."""


class _Capture(CustomGraphPass):
    graph: torch.fx.Graph

    def __call__(self, graph):
        self.graph = graph
        raise _Captured

    def uuid(self):
        return None


class Seen:
    """A function's post-grad graph, with what is recognised in it and the value of each node for its arguments."""

    def __init__(self, function, *tensors, dynamic=False, grad=False):
        torch._dynamo.reset()
        capture = _Capture()
        options = {"post_grad_custom_post_pass": capture}
        compiled = torch.compile(function, fullgraph=True, options=options)
        for tensor in tensors if dynamic else ():
            for dim in range(tensor.dim() - 1):
                if tensor.shape[dim] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        with torch.set_grad_enabled(grad), pytest.raises(_Captured):
            compiled(*tensors)
        self.graph = capture.graph
        self.values = self._run(tensors)
        self.found, self.misses = recognise(self.graph)

    def _run(self, tensors):
        """By the interpreter; placeholders are given to those arguments whose fakes they are."""
        rest = list(tensors)
        given: list[Any] = []
        for node in (n for n in self.graph.nodes if n.op == "placeholder"):
            fake = value(node)
            if isinstance(fake, torch.Tensor):
                fits = (
                    i for i, t in enumerate(rest)
                    if t.dtype == fake.dtype and t.dim() == fake.dim()
                    and all(not isinstance(a, int) or a == b for a, b in zip(fake.shape, t.shape, strict=True))
                )  # fmt: skip
                given.append(rest.pop(next(fits)))
            else:
                given.append(fake)
        given = [g.node.hint if isinstance(g, torch.SymInt) else g for g in given]
        values: dict[torch.fx.Node, Any] = {}

        class Keep(torch.fx.Interpreter):
            def run_node(self, node):
                values[node] = super().run_node(node)
                return values[node]

        module = torch.fx.GraphModule(self.graph.owning_module or torch.nn.Module(), self.graph)
        with torch.no_grad():
            Keep(module).run(*given)
        return values

    def one(self, kind: str) -> Found:
        assert not self.misses
        (found,) = [each for each in self.found if each.kind == kind]
        assert found.source == "aten"
        inputs = [node for node in found.inputs.values() if node is not None]
        assert not found.nodes & set(inputs)
        assert set(found.outputs.values()) <= found.nodes
        _is_whole(found, inputs)
        return found

    def miss(self, kind: str) -> str:
        (miss,) = self.misses
        assert isinstance(miss, NearMiss)
        assert miss.kind == kind
        assert not [found for found in self.found if found.kind == kind]
        return miss.reason

    def of(self, node):
        return None if node is None else self.values[node]


def _is_whole(found: Found, inputs):
    """Outputs need nothing but the form and its inputs; the form holds nothing else."""
    needed, waiting = set(), list(found.outputs.values())
    while waiting:
        node = waiting.pop()
        if node in needed or node in inputs or not isinstance(value(node), torch.Tensor | tuple | list):
            continue
        assert node in found.nodes, node
        needed.add(node)
        waiting += node.all_input_nodes
    assert needed == found.nodes


def means_norm(seen: Seen, found: Found):
    given = {name: seen.of(node) for name, node in found.inputs.items()}
    y, expected = seen.of(found.outputs["y"]), None
    function = getattr(tilewright, found.kind)
    result = function(**given, **found.options, impl="reference")
    expected = result if found.kind == "rms_norm" else result.y
    assert y.dtype == expected.dtype
    if any(node.target is aten.sqrt.default for node in found.nodes):  # torch.rsqrt is no more exact
        doubled = {n: t if t is None else t.double() for n, t in given.items()}
        agreement = numerics.compare(y, expected, function(**doubled, **found.options, impl="reference"))
        assert agreement.ok, agreement
    else:
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    if "stored" in found.outputs:
        torch.testing.assert_close(seen.of(found.outputs["stored"]), result.residual, rtol=0, atol=0)


def means_quant(seen: Seen, found: Found):
    form = found.options["format"]
    scale = seen.of(found.inputs["scale"])
    if scale is not None:
        given = {"scale": scale, "dtype": form.dtype, "policy": form.policy}
    else:
        given = {f: getattr(form, f) for f in ("group_size", "scale_format", "scale_layout", "dtype", "policy")}
    result = tilewright.quant_fp8(seen.of(found.inputs["x"]), **given, impl="reference")
    values = seen.of(found.outputs["values"])
    assert torch.equal(values.view(torch.uint8), result.values.reshape(values.shape).view(torch.uint8))
    if "scales" in found.outputs:
        scales = seen.of(found.outputs["scales"])
        assert scales.dtype == result.scales.dtype
        assert torch.equal(scales.float(), result.scales.float().reshape(scales.shape))
        if form.scale_layout != "row":
            assert scales.stride() == result.scales.stride()


def square_sum(x, eps=1e-6):
    return x.pow(2).mean(-1, keepdim=True) + eps


def llama(x, w, eps=1e-6):
    xf = x.to(torch.float32)
    return w * (xf * torch.rsqrt(square_sum(xf, eps))).to(x.dtype)


def gemma(x, w):
    xf = x.float()
    return (xf * torch.rsqrt(square_sum(xf)) * (1.0 + w.float())).type_as(x)


def deepseek(x, w):
    xf = x.float()
    return (w * (xf * torch.rsqrt(square_sum(xf)))).to(x.dtype)


def by_parts(inverse):
    def norm(x, w):
        xf = x.float()
        return w * (xf * inverse((xf * xf).mean(x.dim() - 1, keepdim=True) + 1e-5)).to(x.dtype)

    return norm


NORMS = {
    "llama": (llama, {"eps": 1e-6, "cast": "before_weight", "weight_offset": 0.0}),
    "F.rms_norm": (
        lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6),
        {"eps": torch.tensor(1e-6).item(), "cast": "after_weight", "weight_offset": 0.0},
    ),
    "gemma": (gemma, {"eps": 1e-6, "cast": "after_weight", "weight_offset": 1.0}),
    "deepseek": (deepseek, {"eps": 1e-6, "cast": "after_weight", "weight_offset": 0.0}),
    "rsqrt of a product": (by_parts(torch.rsqrt), {"eps": 1e-5, "cast": "before_weight", "weight_offset": 0.0}),
    "pow": (by_parts(lambda v: v.pow(-0.5)), {"eps": 1e-5, "cast": "before_weight", "weight_offset": 0.0}),
    "1 / sqrt": (by_parts(lambda v: 1 / torch.sqrt(v)), {"eps": 1e-5, "cast": "before_weight", "weight_offset": 0.0}),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("case", ["2-D", "3-D", "dynamic", "training"])
def test_norms(name, case):
    norm, options = NORMS[name]
    x = torch.randn((6, 192) if case == "2-D" else (2, 3, 192)).bfloat16()
    w = torch.rand(192).bfloat16()
    x.requires_grad_(case == "training")
    seen = Seen(norm, x, w, dynamic=case == "dynamic", grad=case == "training")
    found = seen.one("rms_norm")
    assert found.options == options
    assert {name: n.op for name, n in found.inputs.items()} == {"x": "placeholder", "weight": "placeholder"}
    assert [value(n).dim() for n in found.inputs.values()] == [x.dim(), 1]
    means_norm(seen, found)


@pytest.mark.parametrize("name", ["llama", "F.rms_norm", "gemma", "deepseek"])
def test_norms_of_float32_have_no_casts(name):
    seen = Seen(NORMS[name][0], torch.randn(5, 96), torch.rand(96))
    found = seen.one("rms_norm")
    assert found.options == {**NORMS[name][1], "cast": "before_weight"}
    means_norm(seen, found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("function", [deepseek, lambda x, w: llama(x, w).to(x.dtype)])
def test_norms_with_a_float32_weight(dtype, function):
    seen = Seen(function, torch.randn(5, 96).to(dtype), torch.rand(96))
    means_norm(seen, seen.one("rms_norm"))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_norm_without_weight(dtype):
    seen = Seen(lambda x: F.rms_norm(x, (96,)), torch.randn(5, 96).to(dtype))
    found = seen.one("rms_norm")
    assert found.inputs["weight"] is None
    means_norm(seen, found)


@pytest.mark.parametrize("only_widened", [False, True])
def test_roundings_that_are_left_out(only_widened):
    """Inductor is asked right: it drops a rounding before 2.13, unless something else than a wider cast uses it."""

    def f(x):
        narrow = x.bfloat16()
        wide = narrow.float() * 2
        return wide if only_widened else (wide, narrow)

    seen = Seen(f, torch.randn(3, 8))
    is_there = any(t.dtype == torch.bfloat16 for t in seen.values.values() if isinstance(t, torch.Tensor))
    assert is_there is not (only_widened and leaves_out_roundings())


@pytest.mark.parametrize("only_normed", [False, True])
def test_a_norm_behind_another_dtype(only_normed):
    """What is rounded before is part of neither the norm nor its nodes."""

    def f(x, w):
        narrow = x.bfloat16()
        wide = llama(narrow, w).float() * 2
        return wide if only_normed else (wide, narrow)

    seen = Seen(f, torch.randn(5, 96), torch.rand(96).bfloat16())
    if only_normed and leaves_out_roundings():  # the graph takes the norm of numbers that are not rounded
        assert f"and x is float32 {LEFT_OUT}" in seen.miss("rms_norm")
        return
    found = seen.one("rms_norm")
    assert value(found.inputs["x"]).dtype == value(found.outputs["y"]).dtype == torch.bfloat16
    means_norm(seen, found)


def test_intermediates_may_be_used_elsewhere():
    def f(x, w, v):
        xf = x.float()
        n = xf * torch.rsqrt(square_sum(xf))
        return w * n.to(x.dtype), v * n.to(x.dtype), n

    seen = Seen(f, torch.randn(5, 96).bfloat16(), torch.rand(96).bfloat16(), torch.rand(96).bfloat16())
    assert [found.kind for found in seen.found] == ["rms_norm", "rms_norm"]
    for found in seen.found:
        means_norm(seen, found)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: w * (x * torch.rsqrt(square_sum(x))), "the square of x is rounded to bfloat16"),
        (lambda x, w: w * (x * torch.rsqrt(square_sum(x.float())).to(x.dtype)), "1 / rms is rounded to bfloat16"),
        (lambda x, w: w * (x.float() / torch.sqrt(square_sum(x.float()))).to(x.dtype), "divided by the root"),
        (lambda x, w: w.float() * (x * torch.rsqrt(square_sum(x.float()))), "the result stays float32"),
        (
            lambda x, w: (w.float() * (x.float() * torch.rsqrt(square_sum(x.float()))).half()).to(x.dtype),
            "the norm is rounded to float16 before its weight",
        ),
        (lambda x, w: llama(x, w, eps=0.0), "eps is 0"),
    ],
)
def test_norms_that_round_otherwise(function, reason):
    seen = Seen(function, torch.randn(5, 96).bfloat16(), torch.rand(96).bfloat16())
    assert reason in seen.miss("rms_norm")


def test_a_rounded_sum_of_weight_and_offset_is_the_weight():
    def f(x, w):
        return ((1 + w) * (x.float() * torch.rsqrt(square_sum(x.float())))).to(x.dtype)

    seen = Seen(f, torch.randn(5, 96).bfloat16(), torch.rand(96).bfloat16())
    found = seen.one("rms_norm")
    assert found.options["weight_offset"] == 0
    assert found.tensor("weight").op == "call_function"
    means_norm(seen, found)


@pytest.mark.parametrize("name", NORMS)
def test_norms_that_stay_float32(name):
    """What is cast to float32 and not back is the norm of the cast."""
    seen = Seen(lambda x, w: NORMS[name][0](x.float(), w.float()), torch.randn(5, 96).half(), torch.rand(96).half())
    found = seen.one("rms_norm")
    assert value(found.inputs["x"]).dtype == torch.float32
    means_norm(seen, found)


@pytest.mark.parametrize("add", [torch.add, lambda x, r: (x.float() + r.float()).to(x.dtype)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_sum_that_a_norm_is_taken_of(add, dynamic):
    def f(x, r, w):
        h = add(x, r)
        return llama(h.view(-1, 96), w), h

    x, r = torch.randn(2, 2, 3, 96).bfloat16()
    seen = Seen(f, x, r, torch.rand(96).bfloat16(), dynamic=dynamic)
    norm, total = seen.one("rms_norm"), seen.one("add")
    assert {name: n.op for name, n in total.inputs.items()} == {"x": "placeholder", "residual": "placeholder"}
    assert total.outputs["y"] is origin(norm.tensor("x"))
    means_norm(seen, norm)


@pytest.mark.parametrize("function", [lambda x, r, w: llama(x + 2 * r.sum(-1, keepdim=True), w), lambda x, r, w: x + r])
def test_sums_that_are_none(function):
    seen = Seen(function, *torch.randn(2, 5, 96).bfloat16(), torch.rand(96).bfloat16())
    assert "add" not in {found.kind for found in seen.found}


@pytest.mark.parametrize(("stream", "rounding"), [(torch.bfloat16, "exact"), (torch.float32, "rounded")])
@pytest.mark.parametrize("stored", [True, False])
def test_a_sum_that_is_normalised_before_it_is_rounded(stream, rounding, stored):
    def f(x, r, w):
        h = x.float() + r.float()
        y = (w * (h * torch.rsqrt(square_sum(h)))).to(x.dtype)
        return (y, h.to(r.dtype)) if stored else y

    seen = Seen(f, torch.randn(5, 96).bfloat16(), torch.randn(5, 96).to(stream), torch.rand(96))
    found = seen.one("add_rms_norm")
    assert found.options["residual_rounding"] == rounding
    assert set(found.outputs) == ({"y", "stored"} if stored else {"y"})
    means_norm(seen, found)


def group_quant(x, group=128, floor=1e-12, maximum=448.0, reciprocal=False):
    g = x.float().view(*x.shape[:-1], -1, group)
    s = g.abs().amax(-1, keepdim=True).clamp(min=floor) / maximum
    q = (g * (1.0 / s) if reciprocal else g / s).clamp(-maximum, maximum).to(FP8)
    return q.view(x.shape), s.squeeze(-1)


def flat_quant(x):
    g = x.reshape(-1, 64)
    s = torch.clamp(g.abs().amax(-1).float(), min=1e-4).unsqueeze(1) / 448.0
    return (g.float() / s).clamp(-448.0, 448.0).to(FP8).view(*x.shape), s.view(*x.shape[:-1], -1)


def narrow_floor(x):
    g = x.view(*x.shape[:-1], -1, 128)
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-4).float() / 448.0
    return (g.float() / s).clamp(-448.0, 448.0).to(FP8).view(*x.shape), s.squeeze(-1)


# Where torch leaves roundings out, the floor that the program has rounded with amax is not rounded in the graph.
NARROW_FLOOR = 1e-4 if leaves_out_roundings() else torch.tensor(1e-4).bfloat16().item()


def max_quant(x):
    g = x.unflatten(-1, (-1, 32))
    s = torch.maximum(g.float().abs().max(-1, keepdim=True)[0] / 448.0, torch.tensor(2.0**-100))
    return (g * s.reciprocal()).clamp_min(-448.0).clamp_max(448.0).to(FP8).flatten(-2), s.flatten(-2)


def power_quant(x, e8m0=False, base=False, again=False):
    g = x.float().view(*x.shape[:-1], -1, 128)
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    s = torch.pow(2.0, torch.ceil(torch.log2(s))) if base else torch.exp2(torch.ceil(torch.log2(s)))
    wide = s.to(torch.float8_e8m0fnu).float() if again else s
    q = (g / wide).clamp(-448, 448).to(FP8).view(x.shape)
    return q, s.squeeze(-1).to(torch.float8_e8m0fnu) if e8m0 else s.squeeze(-1)


def column_quant(x):
    q, s = group_quant(x.view(-1, x.shape[-1]))
    return q.view(x.shape), s.t().contiguous().t()


def token_quant(x):
    s = (x.float().abs().amax(-1, keepdim=True) / 448.0).clamp(min=MIN_SCALE)
    return (x.float() / s).clamp(-448, 448).to(FP8), s


def eighth(x):
    g = x.float().view(*x.shape[:-1], -1, 128)
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-6) * 0.0078125
    return (g / s).clamp(-128, 128).to(FP8).view(x.shape), s.squeeze(-1)


def five(x):
    g = x.float().view(*x.shape[:-1], -1, 128)
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 57344.0
    return (g / s).clamp(-57344, 57344).to(torch.float8_e5m2).view(x.shape), s.squeeze(-1)


def quant(group=128, scales="fp32", layout="row", dtype=FP8, **policy):
    return tilewright.QuantFormat(group, scales, layout, dtype, POLICY(**{"scale_floor": 0.0, **policy}))


QUANTS = {
    "group": (group_quant, quant(amax_floor=1e-12)),
    "64, flat, floor before unsqueeze": (flat_quant, quant(64, amax_floor=1e-4)),
    "a floor in 16 bits": (narrow_floor, quant(amax_floor=NARROW_FLOOR)),
    "32, max, maximum, reciprocal": (max_quant, quant(32, scale_floor=2.0**-100, apply="reciprocal")),
    "reciprocal": (lambda x: group_quant(x, reciprocal=True), quant(amax_floor=1e-12, apply="reciprocal")),
    "another maximum": (lambda x: group_quant(x, maximum=224.0), quant(amax_floor=1e-12, maximum=224.0)),
    "ue8m0 as float32": (power_quant, quant(scales="ue8m0_fp32", amax_floor=1e-10)),
    "2 ** n": (lambda x: power_quant(x, base=True), quant(scales="ue8m0_fp32", amax_floor=1e-10)),
    "ue8m0": (lambda x: power_quant(x, e8m0=True), quant(scales="ue8m0", amax_floor=1e-10)),
    "column": (column_quant, quant(layout="column", amax_floor=1e-12)),
    "per token": (token_quant, quant(None, scale_floor=MIN_SCALE)),
    "a power of two": (eighth, quant(amax_floor=1e-6, maximum=128.0)),
    "e5m2": (five, quant(amax_floor=1e-6, dtype=torch.float8_e5m2)),
    "no scales": (lambda x: group_quant(x)[0], quant(amax_floor=1e-12)),
}


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("case", ["2-D", "3-D", "dynamic"])
def test_quantisations(name, case):
    function, form = QUANTS[name]
    x = (torch.randn((6, 256) if case == "2-D" else (2, 3, 256)) * 3).bfloat16()
    x[..., 0, :] = 0
    seen = Seen(function, x, dynamic=case == "dynamic")
    found = seen.one("quant_fp8")
    assert found.options == {"format": form}
    assert found.inputs["scale"] is None
    assert value(found.inputs["x"]).dtype == torch.bfloat16
    assert set(found.outputs) == ({"values"} if name == "no scales" else {"values", "scales"})
    means_quant(seen, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("function", [group_quant, flat_quant, token_quant])
def test_quantisations_of_other_dtypes(function, dtype):
    seen = Seen(function, torch.randn(3, 256).to(dtype))
    found = seen.one("quant_fp8")
    assert value(found.inputs["x"]).dtype == dtype
    means_quant(seen, found)


def test_scales_that_are_rounded_to_exponents_and_back():
    seen = Seen(lambda x: power_quant(x, e8m0=True, again=True), torch.randn(3, 256).bfloat16())
    means_quant(seen, seen.one("quant_fp8"))


def test_rows_of_heads_that_are_joined_by_the_grouping():
    """Where x has rows shorter than a group, the view is quantised, per token."""

    def f(x):
        g = x.reshape(-1, 128)
        s = g.float().abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
        return (g.float() / s).clamp(-448.0, 448.0).to(FP8).view(6, 256), s

    seen = Seen(f, torch.randn(6, 8, 32).bfloat16())
    found = seen.one("quant_fp8")
    assert found.options["format"].group_size is None
    means_quant(seen, found)


STATIC = {
    "divide": (lambda x, s: (x.float() / s).clamp(-448, 448).to(FP8), "divide"),
    "1 / s": (lambda x, s: (x.float() * (1 / s)).clamp(-448, 448).to(FP8), "reciprocal"),
    "reciprocal": (lambda x, s: (x.float() * s.reciprocal()).clamp(-448, 448).to(FP8), "reciprocal"),
}


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_static_quantisation(name, shape, dynamic):
    function, apply = STATIC[name]
    seen = Seen(function, torch.randn(2, 3, 96).bfloat16(), torch.full(shape, 0.013), dynamic=dynamic)
    found = seen.one("quant_fp8")
    assert found.options == {"format": tilewright.QuantFormat(dtype=FP8, policy=POLICY(apply=apply))}
    assert set(found.outputs) == {"values"}
    assert value(found.inputs["x"]).dtype == torch.bfloat16
    means_quant(seen, found)


def by_a_rounded_reciprocal(x):
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) * (1 / 448.0)
    return (x.float() / s).clamp(-448, 448).to(FP8), s


def unclamped(x):
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / 448.0
    return (x.float() / s).to(FP8), s


def unfloored(x):
    s = x.float().abs().amax(-1, keepdim=True) / 448.0
    return (x.float() / s).clamp(-448, 448).to(FP8), s


def otherwise_clamped(x):
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / 440.0
    return (x.float() / s).clamp(-448, 448).to(FP8), s


def in_bfloat16(x):
    s = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 448.0
    return (x / s).clamp(-448, 448).to(FP8), s


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_a_rounded_reciprocal, "amax is multiplied by 0.00223214, a rounded reciprocal"),
        (unclamped, "the scaled values are not clamped"),
        (unfloored, "nothing keeps the scale of a group of zeros above 0"),
        (otherwise_clamped, "the scaled values are clamped to -448 and 448, and amax is mapped to 440"),
        (in_bfloat16, "the scale is computed in bfloat16"),
        (lambda x: group_quant(x, group=16), "groups are of 16; expected 128, 64, 32 or whole rows"),
        (lambda x: group_quant(x, maximum=8.0), "maximum 8.0"),
        (lambda x: (x / x.float().amax()).clamp(-448, 448).to(FP8), "the scaled values are rounded to bfloat16"),
    ],
)
def test_quantisations_that_no_policy_expresses(function, reason):
    assert reason in Seen(function, torch.randn(3, 256).bfloat16()).miss("quant_fp8")


def test_an_unrelated_scale_is_no_near_miss():
    seen = Seen(lambda x, s: (x.float() / s).clamp(-448, 448).to(FP8), torch.randn(3, 256), torch.rand(256))
    assert not seen.found
    assert not seen.misses


def chunked(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def sliced(x):
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


def parted(x):
    gate, up = torch.split(x, [x.shape[-1] // 2] * 2, dim=-1)
    return up * F.silu(gate)


def means_activation(seen: Seen, found: Found):
    given = seen.of(found.inputs["x"])
    result = tilewright.silu_mul_quant_fp8(given, dtype=FP8, return_activation=True, impl="reference")
    assert torch.equal(seen.of(found.outputs["y"]), result.activation)


@pytest.mark.parametrize("function", [chunked, sliced, parted])
@pytest.mark.parametrize("case", ["2-D", "3-D", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations(function, case, dtype):
    x = torch.randn((6, 256) if case == "2-D" else (2, 3, 256)).to(dtype)
    seen = Seen(function, x, dynamic=case == "dynamic")
    found = seen.one("silu_mul")
    assert (found.options, found.inputs["x"].op) == ({}, "placeholder")
    means_activation(seen, found)


def swapped(x):
    up, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def late(x):
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(x.dtype)


def wide_product(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).float() * up.float()


def wide_product_beside(x):
    gate, up = x.chunk(2, dim=-1)
    silu = F.silu(gate)
    return silu.float() * up.float(), silu


def by_sigmoid(x):
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (swapped, "the gate is the second half"),
        (late, "silu(gate) is not rounded to bfloat16"),
        (by_sigmoid, "silu is gate * sigmoid(gate)"),
        (lambda x: F.silu(x[:, :128]) * x[:, 128:].half(), "gate is bfloat16 and up float16"),
        (wide_product, LEFT_OUT if leaves_out_roundings() else "the result stays float32"),
        (wide_product_beside, "the result stays float32"),
        (lambda x: F.silu(x + 1) * x, "not the two halves of one tensor"),
    ],
)
def test_activations_that_differ(function, reason):
    assert reason in Seen(function, torch.randn(3, 256).bfloat16()).miss("silu_mul")


@pytest.mark.parametrize("only_multiplied", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_products_that_are_rounded_once(wide, only_multiplied):
    """A product of two 16-bit numbers in float32 is exact."""

    def f(x):
        gate, up = x.chunk(2, dim=-1)
        silu = F.silu(gate)
        y = (silu.float() * (up.float() if wide else up)).to(x.dtype)
        return y if only_multiplied else (y, silu)

    seen = Seen(f, torch.randn(3, 256).bfloat16())
    if only_multiplied and leaves_out_roundings():  # the graph rounds nothing but the product
        assert LEFT_OUT in seen.miss("silu_mul")
        return
    means_activation(seen, seen.one("silu_mul"))


def test_a_backward_is_no_near_miss():
    seen = Seen(lambda x, grad: F.silu(x.chunk(2, -1)[0]) * grad, torch.randn(3, 256), torch.randn(3, 128))
    assert not seen.found
    assert not seen.misses


def test_a_silu_alone_is_no_near_miss():
    seen = Seen(lambda x: F.silu(x) * x[..., :1], torch.randn(3, 256).bfloat16())
    assert not seen.found
    assert not seen.misses


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def chunk_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope_options(**changed):
    return {
        "layout": "bhsd", "interleaved": False, "rotary_dim": None, "rotary_offset": 0, "inverse": False,
        "numerics": "exact", "table": "unproven", "products": "exact", "batched": False,
    } | changed  # fmt: skip


def means_rope(seen: Seen, found: Found, truth: bool = False):
    options = {k: v for k, v in found.options.items() if k not in ("table", "products", "batched")}
    x = seen.of(found.inputs["x"])
    if found.options["table"] == "complex":
        freqs = seen.of(found.inputs["freqs_cis"])
        cos, sin = freqs.real.contiguous(), freqs.imag.contiguous()
    else:
        cos, sin = (seen.of(found.inputs[name]) for name in ("cos", "sin"))
        if found.options["table"] == "doubled":
            half = cos.shape[-1] // 2
            assert torch.equal(cos[..., :half], cos[..., half:])
            assert torch.equal(sin[..., :half], sin[..., half:])
            cos, sin = cos[..., :half], sin[..., :half]
    batch = x.shape[1] if options["layout"] == "sbhd" else x.shape[0]
    if cos.dim() == 3 and options["layout"] != "thd":
        if options["layout"] == "sbhd":
            cos, sin = cos.squeeze(1), sin.squeeze(1)
        else:
            options["position_ids"] = torch.arange(cos.shape[0] * cos.shape[1]).view(cos.shape[:2]).expand(batch, -1)
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    y = seen.of(found.outputs["y"])
    result = tilewright.rope(x, cos, sin, **options, impl="reference")
    if found.options["products"] == "exact":
        torch.testing.assert_close(y, result, rtol=0, atol=0)
    else:
        exact = tilewright.rope(x.double(), cos.double(), sin.double(), **options, impl="reference")
        agreement = numerics.compare(result, y, exact)
        assert agreement.ok, agreement


@pytest.mark.parametrize("half", [rotate_half, chunk_half])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rotations_with_tables_from_outside(half, dim, dtype, dynamic):
    def f(x, cos, sin):
        return x * cos.unsqueeze(dim) + half(x) * sin.unsqueeze(dim)

    shape = (2, 4, 7, 64) if dim == 1 else (2, 7, 4, 64)
    cos, sin = torch.randn(2, 2, 7, 64).to(dtype)
    seen = Seen(f, torch.randn(shape).to(dtype), cos, sin, dynamic=dynamic)
    found = seen.one("rope")
    rounded = {} if dtype == torch.float32 else {"numerics": "hf", "products": "rounded"}
    assert found.options == rope_options(layout="bhsd" if dim == 1 else "bshd", batched=True, **rounded)
    assert value(found.inputs["cos"]).dim() == 3
    means_rope(seen, found)


def hugging_face(x, inverse, position_ids):
    freqs = (inverse[None, :, None].expand(position_ids.shape[0], -1, 1) @ position_ids[:, None, :].float()).mT
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = (emb.cos() * 1.25).to(x.dtype), (emb.sin() * 1.25).to(x.dtype)
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tables_whose_halves_are_equal(dtype, dynamic):
    positions = torch.arange(7).repeat(2, 1)
    x = torch.randn(2, 7, 4, 64).to(dtype).transpose(1, 2)
    seen = Seen(hugging_face, x, torch.rand(32), positions, dynamic=dynamic)
    found = seen.one("rope")
    assert found.options["table"] == "doubled"
    means_rope(seen, found)


@pytest.mark.parametrize("shape", [(7, 64), (1, 1, 7, 64)])
def test_tables_of_float32_beside_16_bits(shape):
    def f(x, cos, sin):
        return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)

    seen = Seen(f, torch.randn(2, 4, 7, 64).bfloat16(), *torch.randn(2, *shape))
    found = seen.one("rope")
    assert found.options == rope_options()
    if len(shape) == 2:
        means_rope(seen, found)


def test_other_layouts():
    def f(x, cos, sin):
        return x * cos + rotate_half(x) * sin

    for layout, shape, table in (("sbhd", (7, 2, 4, 64), (7, 1, 1, 64)), ("thd", (7, 4, 64), (7, 1, 64))):
        found = Seen(f, torch.randn(shape), *torch.randn(2, *table)).one("rope")
        assert found.options["layout"] == layout


@pytest.mark.parametrize("offset", [0, 64])
def test_rotations_of_a_part(offset):
    def f(x, cos, sin):
        part, rest = (x[..., :32], x[..., 32:]) if offset == 0 else (x[..., 64:], x[..., :64])
        turned = part * cos.unsqueeze(1) + rotate_half(part) * sin.unsqueeze(1)
        return torch.cat((turned, rest) if offset == 0 else (rest, turned), -1)

    seen = Seen(f, torch.randn(2, 4, 7, 96), *torch.randn(2, 2, 7, 32))
    found = seen.one("rope")
    assert found.options == rope_options(rotary_dim=32, rotary_offset=offset, batched=True)
    means_rope(seen, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_complex_rotations(dtype, dynamic):
    def f(x, freqs):
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        freqs = freqs.view(1, pairs.size(1), 1, pairs.size(-1))
        return torch.view_as_real(pairs * freqs).flatten(3).to(x.dtype)

    freqs = torch.polar(torch.ones(7, 32), torch.randn(7, 32))
    seen = Seen(f, torch.randn(2, 7, 4, 64).to(dtype), freqs, dynamic=dynamic)
    found = seen.one("rope")
    assert found.options == rope_options(layout="bshd", interleaved=True, table="complex")
    assert value(found.inputs["freqs_cis"]).dim() == 2
    means_rope(seen, found)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, c, s: x * c + rotate_half(x) * s, "the result stays float32"),
        (lambda x, c, s: x * c.half() + rotate_half(x) * s.half(), "the table is float16; expected bfloat16"),
        (lambda x, c, s: x * c + rotate_half(x) * s.bfloat16(), "the products are rounded to different dtypes"),
    ],
)
def test_rotations_that_round_otherwise(function, reason):
    seen = Seen(function, torch.randn(2, 4, 7, 64).bfloat16(), *torch.randn(2, 7, 64))
    assert reason in seen.miss("rope")


def test_a_whole_layer_start():
    """A norm, through a view, into two quantisations and a plain use."""

    def f(x, r, w):
        h = x + r
        y = llama(h, w)
        return *group_quant(y.view(-1, 256)), *group_quant(y, group=64), y, h

    seen = Seen(f, *torch.randn(2, 2, 3, 256).bfloat16(), torch.rand(256).bfloat16(), dynamic=True)
    assert [found.kind for found in seen.found] == ["add", "rms_norm", "quant_fp8", "quant_fp8"]
    assert not seen.misses
    for found in seen.found[2:]:
        means_quant(seen, found)


def test_symbolic_sizes_get_no_guards():
    seen = Seen(lambda x: group_quant(x.view(-1, 256)), torch.randn(2, 3, 256), dynamic=True)
    mode = next(value(n).fake_mode for n in seen.graph.nodes if isinstance(value(n), torch.Tensor))
    before = len(mode.shape_env.guards)
    recognise(seen.graph)
    assert len(mode.shape_env.guards) == before


def test_weird_graphs_are_left_alone():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")  # no fake
    y = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.rsqrt.default, (x,))))
    z = graph.call_function(torch.ops.prims.convert_element_type.default, (y, FP8))
    graph.call_function(aten.cat.default, ([z, x],))
    graph.output(graph.call_function(aten.add.Tensor, (1, 2)))
    assert recognise(graph) == ([], [])


# Rotations whose members are computed one by one, with a table of half width


def members(x, cos, sin, others):
    first, second = (x[..., ::2], x[..., 1::2]) if others else x.chunk(2, -1)
    return first * cos - second * sin, second * cos + first * sin


def joined(x, cos, sin):
    return torch.cat(members(x, cos, sin, False), -1)


def stacked(x, cos, sin):
    return torch.stack(members(x, cos, sin, True), -1).flatten(-2)


WRITTEN = {
    "as it is": lambda form, x, cos, sin: form(x, cos, sin),
    "widened": lambda form, x, cos, sin: form(x.float(), cos, sin).to(x.dtype),
    "rounded once": lambda form, x, cos, sin: form(x, cos, sin).to(x.dtype),
    "members rounded": lambda form, x, cos, sin: (
        torch.cat([m.to(x.dtype) for m in members(x.float(), cos, sin, False)], -1)
        if form is joined
        else torch.stack([m.to(x.dtype) for m in members(x.float(), cos, sin, True)], -1).flatten(-2)
    ),
}


@pytest.mark.parametrize("form", [joined, stacked])
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_members_one_by_one(form, written, dtype, dynamic):
    def f(x, cos, sin):
        return WRITTEN[written](form, x, cos.unsqueeze(1), sin.unsqueeze(1))

    table = dtype if written == "as it is" else torch.float32
    cos, sin = torch.randn(2, 2, 7, 32).to(table)
    seen = Seen(f, torch.randn(2, 4, 7, 64).to(dtype), cos, sin, dynamic=dynamic)
    found = seen.one("rope")
    rounded = {"numerics": "hf", "products": "rounded"} if table == torch.bfloat16 else {}
    assert found.options == rope_options(table="half", interleaved=form is stacked, batched=True, **rounded)
    means_rope(seen, found)


@pytest.mark.parametrize("form", [joined, stacked])
def test_members_of_a_part_of_the_features(form):
    def f(x, cos, sin):
        return torch.cat((x[..., :16], form(x[..., 16:48].float(), cos, sin).to(x.dtype), x[..., 48:]), -1)

    seen = Seen(f, torch.randn(2, 4, 7, 64).bfloat16(), *torch.randn(2, 7, 16))
    found = seen.one("rope")
    assert (found.options["rotary_dim"], found.options["rotary_offset"]) == (32, 16)
    means_rope(seen, found)


def swapped(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)


def other_table(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * cos), -1)


def moved(x, cos, sin):
    return torch.cat(members(x, cos, sin, True), -1)


def put_between(x, cos, sin):
    return torch.stack(members(x, cos, sin, False), -1).flatten(-2)


def rounded_members(x, cos, sin):
    return torch.cat([member.bfloat16() for member in members(x, cos, sin, False)], -1)


def crossed(x, cos, sin):
    return torch.stack(members(x, cos, sin, False), -2).flatten(-2)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (moved, "features change places"),  # as DeepSeek is in Transformers
        (put_between, "features change places"),
        (lambda x, cos, sin: joined(x, cos, sin).bfloat16().float(), None),
        (lambda x, cos, sin: rounded_members(x, cos, sin).float(), None),
        (lambda x, cos, sin: rounded_members(x.half(), cos, sin).half(), None),
        (lambda x, cos, sin: joined(x.bfloat16(), cos, sin), "the result stays float32"),
        (swapped, None),  # another rotation, the inverse one
        (other_table, None),
        (lambda x, cos, sin: torch.cat(members(x, cos, sin, False)[::-1], -1), None),
    ],
)
def test_members_that_are_no_rotation(form, reason):
    seen = Seen(form, torch.randn(2, 4, 7, 64), *torch.randn(2, 7, 32))
    if reason is None:
        (results,) = next(node for node in seen.graph.nodes if node.op == "output").args
        assert not [f for f in seen.found if f.kind == "rope" and f.outputs["y"] in results]
    else:
        assert reason in seen.miss("rope")


def test_members_behind_one_another_are_joined():
    seen = Seen(crossed, torch.randn(2, 4, 7, 64), *torch.randn(2, 7, 32))
    means_rope(seen, seen.one("rope"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_amax_that_is_rounded_otherwise(dtype):
    def f(x):
        groups = x.float().unflatten(-1, (-1, 32))
        amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4).bfloat16()
        scale = amax.float() / 448.0
        return (groups / scale).clamp(-448.0, 448.0).to(FP8).view(x.shape), scale.squeeze(-1), amax

    assert "amax is rounded to bfloat16" in Seen(f, torch.randn(3, 128).to(dtype)).miss("quant_fp8")
