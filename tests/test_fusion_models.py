"""Graph fusion of whole layers: as DeepSeek-V3.2 and Hugging Face write them, and in operators of other namespaces."""

import pytest
import torch
import torch.nn.functional as F

import tilewright
from fusion_helpers import each_device, flat, fresh, only, same, seeded, targets  # noqa: F401 - fixtures among them
from tilewright import numerics
from tilewright.fusion import Found, add_adapter, remove_adapter
from tilewright.fusion.graph import arguments, result

pytestmark = [
    pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning"),
    pytest.mark.usefixtures("each_device"),
]

WIDTH, RANK, HEADS, DIM = 256, 128, 2, 64


class Fp8Linear(torch.nn.Module):
    """A linear layer with FP8 weights, scaled by blocks, of activations quantised by groups, at two dimensions."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(n_out, n_in) * n_in**-0.5)

    def forward(self, x):
        values, scales = tilewright.quant_fp8(x.view(-1, x.shape[-1]))
        wide = values.float() * scales.repeat_interleave(128, -1)
        return (wide @ self.weight.T).to(x.dtype).view(*x.shape[:-1], -1)


class RMSNorm(torch.nn.Module):
    """As the models write it."""

    def __init__(self, n, plain):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(n) + 0.5)
        self.plain = plain

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if not self.plain:
            return tilewright.rms_norm(x, weight)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide.to(x.dtype)


class SparseAttention(torch.nn.Module):
    """Latent queries whose norm feeds the queries' projection and the indexer's, both in FP8, both through views."""

    def __init__(self, plain):
        super().__init__()
        self.input_norm, self.q_norm, self.kv_norm = RMSNorm(WIDTH, plain), RMSNorm(RANK, plain), RMSNorm(RANK, plain)
        self.q_a, self.kv_a = Fp8Linear(WIDTH, RANK), Fp8Linear(WIDTH, RANK)
        self.q_b, self.wq_b, self.kv_b = (Fp8Linear(RANK, HEADS * DIM) for _ in range(3))
        self.router = torch.nn.Linear(WIDTH, 4, bias=False, dtype=torch.bfloat16)

    def forward(self, x, residual):
        residual = x + residual
        hidden = self.input_norm(residual)
        latent = self.q_norm(self.q_a(hidden))
        return (
            self.q_b(latent),
            self.wq_b(latent),
            self.kv_b(self.kv_norm(self.kv_a(hidden))),
            self.router(hidden),
            residual,
        )


def layer_inputs(dynamic):
    generator = seeded(3)
    x, residual = (torch.randn(2, 3, WIDTH, generator=generator).bfloat16() for _ in range(2))
    if dynamic:
        for tensor in (x, residual):
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 1)
    return x, residual


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_a_layer_of_sparse_attention_fuses_completely(plain, dynamic):
    torch.manual_seed(0)
    layer = SparseAttention(plain)
    expect = {"add_rms_norm_quant": 1, "rms_norm_quant": 2}
    with torch.no_grad():
        compiled = tilewright.compile(layer, fullgraph=True, expect=expect, unmet="raise", verify=True)
        results, expected = compiled(*layer_inputs(dynamic)), layer(*layer_inputs(False))
    report = compiled.fusion_report
    assert "tilewright.quant_fp8.default" not in targets(report)
    assert "tilewright.rms_norm.default" not in targets(report)
    reasons = sorted(d.reason for d in report.decisions)
    assert reasons[0].startswith("1 quantisation in one kernel")
    assert any("1 equal to another merged" in reason for reason in reasons)
    assert any("written for others" in reason for reason in reasons)
    for got, wanted in zip(results, expected, strict=True):
        assert numerics.compare(got, wanted, wanted.double(), reduced=WIDTH * RANK).ok


def group_quant(x, size=128, maximum=448.0):
    """A group quantisation as models write it."""
    groups = x.float().view(*x.shape[:-1], -1, size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / maximum
    return (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(x.shape), scale.squeeze(-1)


def test_a_feed_forward_layer_in_plain_pytorch():
    norm = RMSNorm(WIDTH, plain=True)

    def run(x, residual, up, maximum=448.0):
        residual = x + residual
        y = norm(residual)
        gate, other = (y @ up).chunk(2, -1)
        return *group_quant(y, maximum=maximum), *group_quant(F.silu(gate) * other, maximum=maximum), residual

    torch.manual_seed(0)
    up = torch.randn(WIDTH, 2 * WIDTH).bfloat16() * 0.1
    with torch.no_grad():
        compiled = tilewright.compile(run, verify=True)
        results = compiled(*layer_inputs(False), up)
        # A GPU multiplies by a number's rounded reciprocal, and divides by a tensor.
        expected = run(*layer_inputs(False), up, torch.tensor(448.0))
    assert compiled.fusion_report.counts == {"add_rms_norm_quant": 1, "silu_mul_quant": 1}
    for got, wanted in zip(results, expected, strict=True):
        if got.dtype == torch.float8_e4m3fn:
            assert (got.view(torch.uint8) == wanted.view(torch.uint8)).float().mean() >= numerics.EQUAL_CODES
        else:
            assert numerics.compare(got, wanted, wanted.double(), reduced=WIDTH).ok


# Rotary embedding in plain PyTorch.


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotated_halves(q, k, cos, sin):
    """As Hugging Face's models write it."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def with_table(q, k, positions, frequencies):
    angles = positions[:, :, None].float() * frequencies
    doubled = torch.cat((angles, angles), -1)
    return rotated_halves(q, k, doubled.cos().to(q.dtype), doubled.sin().to(q.dtype))


def complex_numbers(q, k, turns):
    """As DeepSeek's models write it."""

    def one(x):
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns.view(1, pairs.shape[1], 1, -1)).flatten(3).to(x.dtype)

    return one(q), one(k)


def rope_inputs(form, dtype, batch, length=16, dim=64):
    generator = seeded(4)
    q, k = (torch.randn(batch, length, heads, dim, generator=generator).to(dtype) for heads in (4, 2))
    angles = torch.randn(batch, length, dim, generator=generator)
    if form is complex_numbers:
        return q, k, torch.polar(torch.ones(length, dim // 2), angles[0, :, : dim // 2].contiguous())
    if form is with_table:
        rest = torch.arange(length).expand(batch, length).contiguous(), torch.rand(dim // 2, generator=generator)
    else:
        rest = angles.cos().to(dtype), angles.sin().to(dtype)
    return q.transpose(1, 2), k.transpose(1, 2), *rest


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "table", ["of each sequence", "with heads", "shared", "of one sequence", "angle of a sequence"]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
def test_tables_of_models(layout, table, batch, length):
    """Whose rows are whose, where sizes are one or equal: each token must be turned by its own."""
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]  # of batch, heads, tokens
    shape = {
        "of each sequence": (batch, 1, length, 64),
        "with heads": (batch, 1, length, 64),
        "shared": (1, 1, length, 64),
        "of one sequence": (1, 1, length, 64),
        "angle of a sequence": (batch, 1, 1, 64),
    }[table]
    generator = seeded(5)
    q, k = (torch.randn(batch, n, length, 64, generator=generator).permute(order) for n in (4, 2))
    cos, sin = (torch.randn(shape, generator=generator).permute(order) for _ in range(2))
    if table == "shared" and layout == "bhsd":
        cos, sin = cos[0, 0], sin[0, 0]

    def run(q, k, cos, sin):
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    given = q, k, cos.contiguous(), sin.contiguous()
    with torch.no_grad():
        results = tilewright.compile(run)(*given)
        expected = run(*given)
        truths = run(*(t.double() for t in given))
    for got, wanted, truth in zip(results, expected, truths, strict=True):
        assert numerics.compare(got, wanted, truth).ok


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", [rotated_halves, with_table, complex_numbers])
def test_rope_of_models(form, batch, dynamic):
    """In float32 nothing is rounded on the way, and bfloat16 is widened first in the complex form."""
    dtype = torch.bfloat16 if form is complex_numbers else torch.float32
    given = rope_inputs(form, dtype, batch)
    for tensor in given if dynamic else ():
        for dim, size in enumerate(tensor.shape):
            if size == given[0].shape[1 if form is complex_numbers else 2]:
                torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        compiled = tilewright.compile(form, fullgraph=True, verify=True)
        results, expected = compiled(*given), form(*given)
        truths = form(*(t.double() if t.is_floating_point() else t for t in given))
    assert compiled.fusion_report.counts == {"rope_qk": 1}
    for got, wanted, truth in zip(results, expected, truths, strict=True):
        assert got.stride() == wanted.stride()
        if form is complex_numbers and not got.is_cuda:  # float32 in between whatever comes in; GPUs contract products
            assert torch.equal(got, wanted)
        else:
            assert numerics.compare(got, wanted, truth).ok


def test_rounded_products_are_a_difference_with_a_name():
    given = rope_inputs(rotated_halves, torch.bfloat16, 2)
    exact = rotated_halves(*(t.double() for t in given))
    plain = rotated_halves(*given)
    for mode in ("strict", "relaxed"):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = tilewright.compile(rotated_halves, numerics=mode, verify=True)
            results = compiled(*given)
        for got, wanted, truth in zip(results, plain, exact, strict=True):
            assert numerics.compare(got, wanted, truth).ok
        if mode == "strict":
            assert not compiled.fusion_report.counts
            assert "differs in rope_products" in only(compiled.fusion_report, "refused").reason
        else:
            assert only(compiled.fusion_report).numerics == ("rope_products",)


# Another namespace.


@pytest.fixture
def engine():
    """Operators of an engine, with its names and argument orders, and an adapter for them."""
    library = torch.library.Library("an_engine", "DEF")
    library.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor")
    library.define("per_token_group_quant(Tensor input, int group) -> (Tensor, Tensor)")

    def norm(x, weight, epsilon):
        return tilewright.rms_norm(x, weight, epsilon)

    def quant(input, group):
        return tuple(tilewright.quant_fp8(input, group_size=group, policy="vllm_cuda"))

    for name, function in (("rms_norm", norm), ("per_token_group_quant", quant)):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"an_engine::{name}", function, lib=library)

    def recognise(graph):
        found = []
        for node in graph.nodes:
            if node.target is torch.ops.an_engine.rms_norm.default:
                given = arguments(node)
                inputs = {"x": given["x"], "weight": given["weight"]}
                options = {"eps": given["epsilon"], "weight_offset": 0.0, "cast": "before_weight"}
                found.append(Found("rms_norm", "an_engine", inputs, options, {"y": node}, frozenset({node})))
            elif node.target is torch.ops.an_engine.per_token_group_quant.default:
                given = arguments(node)
                size, dtype = given["group"], torch.float8_e4m3fn
                options = {"format": tilewright.QuantFormat(size, dtype=dtype, policy="vllm_cuda")}
                taken = {"values": result(node, 0), "scales": result(node, 1)}
                outputs = {role: each for role, each in taken.items() if each is not None}
                nodes = frozenset({node, *outputs.values()})
                inputs = {"x": given["input"], "scale": None}
                found.append(Found("quant_fp8", "an_engine", inputs, options, outputs, nodes))
        return found, []

    add_adapter("an_engine", recognise, version="1")
    yield torch.ops.an_engine
    remove_adapter("an_engine")
    library._destroy()


def test_operators_of_another_namespace(engine):
    def run(x, weight):
        y = engine.rms_norm(x, weight, 1e-5)
        return *engine.per_token_group_quant(y.view(-1, WIDTH), 128), *engine.per_token_group_quant(y, 64), y

    x = layer_inputs(False)[0]
    weight = torch.rand(WIDTH).bfloat16()
    with torch.no_grad():
        compiled = tilewright.compile(run, verify=True)
        same(compiled(x, weight), run(x, weight))
    assert compiled.fusion_report.counts == {"rms_norm_quant": 1}
    assert only(compiled.fusion_report).verified
    assert not any(t.startswith("an_engine") for t in targets(compiled.fusion_report))
    assert flat(compiled.fusion_report.counts) == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_verification_allows_for_sums_in_another_order(dtype):
    """Many rows of a norm that is quantised without a rounding in between: last digits of float32 are not the same.

    Before torch 2.13 the rounding of the bfloat16 norm is left out of the graph, and both dtypes are such a norm.
    """
    x, weight = torch.randn(600, 256).to(dtype), torch.rand(256).to(dtype)
    compiled = tilewright.compile(
        lambda x, w: group_quant(F.rms_norm(x, (256,), w, 1e-6)), fullgraph=True, verify=True,
        expect={"rms_norm_quant": 1}, unmet="raise",
    )  # fmt: skip
    with torch.no_grad():
        compiled(x, weight)
    assert only(compiled.fusion_report).verified
