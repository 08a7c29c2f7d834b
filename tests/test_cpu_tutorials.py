"""Plain Triton kernels on CPU tensors, by whatever Triton target is active, agree with torch.

Every result goes into a view in the middle of a larger buffer, at an odd offset and with rows apart: an element that
nobody writes stays NaN and is seen, and one that is written outside the view is seen as well.
"""

import dataclasses
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional

from tilewright import settings
from tilewright.errors import ArgumentError, BenchmarkError
from tilewright.numerics import compare

pytest.importorskip("triton")

from tilewright.bench import cpu_kernels, cpu_target, cpu_workloads

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available() and not settings.triton_interpret(),
    reason="Triton's active target is the accelerator, which cannot reach CPU tensors",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["fp32", "bf16", "fp16"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


def needs_arithmetic(dtype):
    """Skips what Triton's interpreter cannot do: it keeps bfloat16 as integers, and adds and multiplies those."""
    if settings.triton_interpret() and dtype == torch.bfloat16:
        pytest.skip("arithmetic on bfloat16 is wrong in Triton's interpreter")


def random(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def apart(x):
    """The same values in a larger buffer, at an odd offset, unit strides along the last axis alone."""
    buffer = torch.full([size + 3 for size in x.shape], math.nan, dtype=x.dtype)
    view = buffer[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


@contextmanager
def framed(*shape, dtype):
    """A view full of NaN to write into. Its surroundings must stay as they are, and none of it may."""
    buffer = torch.full([size + 3 for size in shape], 7.0, dtype=dtype)
    place = tuple(slice(1, 1 + size) for size in shape)
    buffer[place] = math.nan
    yield buffer[place]
    assert not buffer[place].isnan().any(), "an element was not written"
    buffer[place] = 7.0
    assert (buffer == 7.0).all(), "an element outside the result was written"


def agree(result, reference, truth, *, reduced=1):
    agreement = compare(result, reference, truth, reduced=reduced)
    assert agreement.ok, str(agreement)


# Element by element.


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (64,), (1000,), (3, 5, 7)], ids=str)
def test_add(shape, dtype):
    needs_arithmetic(dtype)
    # Whole numbers up to 126, whose sums every dtype holds: exact, whatever a target does when it rounds.
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-63, 64, shape, generator=generator).to(dtype) for _ in range(2))
    assert torch.equal(cpu_kernels.add(x, y, block=64), x + y)
    out = torch.full(shape, math.nan, dtype=dtype)
    assert cpu_kernels.add(x, y, out=out, block=64) is out
    assert torch.equal(out, x + y)


def test_add_rounds_once():
    x, y = (random(1000, dtype=torch.float32, seed=s) for s in (1, 2))
    assert torch.equal(cpu_kernels.add(x, y, block=64), x + y)


def philox_uniform(seed, n):
    """Uniform numbers of offsets 0 to n - 1: ten rounds of Philox 4x32 (Salmon et al. 2011), folded to [0, 1)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.arange(n, dtype=np.uint64), *(np.zeros(n, dtype=np.uint64) for _ in range(3))]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, third = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_1, low_1, high_3, low_3 = first >> np.uint64(32), first & mask, third >> np.uint64(32), third & mask
        c = [high_3 ^ c[1] ^ np.uint64(k0), low_3, high_1 ^ c[3] ^ np.uint64(k1), low_1]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    signed = c[0].astype(np.uint32).view(np.int32)
    folded = np.where(signed < 0, -signed - 1, signed)
    return torch.from_numpy(folded.astype(np.float32) * np.float32(4.6566127342e-10))


@every_dtype
@pytest.mark.parametrize("seed", [0, 123, 2**40 + 7])
@pytest.mark.parametrize("n", [64, 1000])
def test_dropout(n, seed, dtype):
    x = random(n, dtype=dtype)
    keep = philox_uniform(seed, n) > 0.5
    assert 0 < keep.sum() < n
    # Doubling is exact.
    assert torch.equal(cpu_kernels.dropout(x, 0.5, seed, block=64), torch.where(keep, 2 * x, 0))
    keep = philox_uniform(seed, n) > 0.25
    y = cpu_kernels.dropout(x, 0.25, seed, block=64)
    assert torch.equal(y == 0, ~keep | (x == 0))
    agree(y, *(torch.where(keep, x.to(kind) / 0.75, 0) for kind in (dtype, torch.float64)))


# Row by row.

ROWS = pytest.mark.parametrize("shape", [(1, 1), (3, 64), (4, 100), (2, 513)], ids=str)


@every_dtype
@ROWS
def test_softmax(shape, dtype):
    x = apart(4 * random(*shape, dtype=dtype))
    with framed(*shape, dtype=dtype) as out:
        for y in (cpu_kernels.softmax(x, out=out), cpu_kernels.softmax(x.contiguous())):
            agree(y, torch.softmax(x, -1), torch.softmax(x.double(), -1))


def test_softmax_of_large_and_masked_scores():
    x = torch.tensor([[1e30, 1e30, -math.inf], [-math.inf, -1e30, -math.inf]])
    assert torch.equal(cpu_kernels.softmax(x), torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))


@every_dtype
@ROWS
def test_rms_norm(shape, dtype):
    x, weight = apart(random(*shape, dtype=dtype)), random(shape[1], dtype=dtype, seed=1)

    def definition(kind):
        return functional.rms_norm(x.to(kind), shape[1:], weight.to(kind), 1e-6)

    with framed(*shape, dtype=dtype) as out:
        y = cpu_kernels.rms_norm(x, weight, out=out)
        agree(y, definition(dtype), definition(torch.float64))


@every_dtype
@ROWS
def test_layer_norm(shape, dtype):
    x = apart(random(*shape, dtype=dtype) + 2)
    weight, bias = (random(shape[1], dtype=dtype, seed=s) for s in (1, 2))

    def definition(kind):
        wide = x.to(torch.promote_types(kind, torch.float32))  # the statistics are float32 whatever x is
        mean, rstd = wide.mean(-1), (wide.var(-1, unbiased=False) + 1e-5).rsqrt()
        return functional.layer_norm(x.to(kind), shape[1:], weight.to(kind), bias.to(kind), 1e-5), mean, rstd

    with framed(*shape, dtype=dtype) as out:
        # Blocks of 64 columns: one block, more than one, and a ragged last one.
        results = cpu_kernels.layer_norm(x, weight, bias, out=out, block=64)
        for result, reference, truth in zip(results, definition(dtype), definition(torch.float64), strict=True):
            agree(result, reference, truth, reduced=shape[1])


@every_dtype
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (7, 200)], ids=str)
def test_layer_norm_backward(shape, groups, dtype):
    x, dy = apart(random(*shape, dtype=dtype)), apart(random(*shape, dtype=dtype, seed=3))
    weight, bias = (random(shape[1], dtype=dtype, seed=s) for s in (1, 2))
    exact = x.double()
    mean, rstd = exact.mean(-1).float(), (exact.var(-1, unbiased=False) + 1e-5).rsqrt().float()

    def definition(kind):
        leaves = [tensor.to(kind).detach().requires_grad_() for tensor in (x, weight, bias)]
        y = functional.layer_norm(leaves[0], shape[1:], leaves[1], leaves[2], 1e-5)
        return torch.autograd.grad(y, leaves, dy.to(kind))

    with framed(*shape, dtype=dtype) as out:
        results = cpu_kernels.layer_norm_backward(dy, x, weight, mean, rstd, groups=groups, out=out)
        # dx sums along a row, the others down the rows.
        reduced = (shape[1], shape[0], shape[0])
        facts = zip(results, definition(dtype), definition(torch.float64), reduced, strict=True)
        for result, reference, truth, count in facts:
            agree(result, reference, truth, reduced=count)


# Tiles.


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 2), (8, 4, 16), (5, 3, 20), (7, 9, 64)], ids=str)
def test_rope(shape, dtype):
    x = apart(random(*shape, dtype=dtype))
    frequency = 10000.0 ** (-torch.arange(shape[2] // 2, dtype=torch.float64) / (shape[2] // 2))
    angle = torch.arange(shape[0])[:, None] * frequency
    cos, sin = (apart(table.float()) for table in (angle.cos(), angle.sin()))

    def definition(kind):
        x1, x2 = x.to(torch.promote_types(kind, torch.float32)).chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1).to(kind)

    with framed(*shape, dtype=dtype) as out:
        y = cpu_kernels.rope(x, cos, sin, out=out)
        agree(y, definition(dtype), definition(torch.float64))


LAYOUTS = {"rows": lambda x: x, "columns": lambda x: x.T.contiguous().T, "apart": apart}


@every_dtype
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_matmul_layouts(layout_a, layout_b, dtype):
    needs_arithmetic(dtype)
    a = LAYOUTS[layout_a](random(33, 50, dtype=dtype))
    b = LAYOUTS[layout_b](random(50, 40, dtype=dtype, seed=1))
    with framed(33, 40, dtype=dtype) as out:
        y = cpu_kernels.matmul(a, b, out=out, block_m=16, block_n=32, block_k=16)
        agree(y, a @ b, a.double() @ b.double(), reduced=50)


@every_dtype
@pytest.mark.parametrize("wrap", [False, True], ids=["masked", "wrapped"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (32, 32, 32), (70, 17, 45)], ids=str)
def test_matmul(shape, activation, wrap, dtype):
    needs_arithmetic(dtype)
    m, n, k = shape
    a, b = random(m, k, dtype=dtype), random(k, n, dtype=dtype, seed=1)
    applied = {"none": lambda x: x, "relu": torch.relu, "silu": functional.silu}[activation]
    # Five tiles of rows in groups of two: the last group has one.
    blocks = {"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2}
    with framed(m, n, dtype=dtype) as out:
        y = cpu_kernels.matmul(a, b, activation=activation, wrap=wrap, out=out, **blocks)
        agree(y, applied(a @ b), applied(a.double() @ b.double()), reduced=k)


@every_dtype
@pytest.mark.parametrize("batch", [(), (4,)], ids=["tiles", "batches"])
def test_dot_tiles(batch, dtype):
    needs_arithmetic(dtype)
    # Five pairs by two programs: the second has one fewer.
    a, b = random(5, *batch, 16, 32, dtype=dtype), random(5, *batch, 32, 16, dtype=dtype, seed=1)
    out = cpu_kernels.dot_tiles(a, b, 2)

    def definition(kind):
        products = a.to(kind) @ b.to(kind)
        return torch.stack((products[:3].sum(0), products[3:].sum(0)))

    agree(out, definition(torch.float32), definition(torch.float64), reduced=3 * 32)


@every_dtype
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (32, 32), (45, 45), (19, 50), (50, 19)], ids=str)
def test_attention(lengths, blocks, causal, dtype):
    needs_arithmetic(dtype)
    (n_q, n_k), (block_m, block_n) = lengths, blocks
    shapes = (1, 2, n_q, 16), (1, 2, n_k, 16), (1, 2, n_k, 16)
    q, k, v = (apart(random(*shape, dtype=dtype, seed=s)) for s, shape in enumerate(shapes))

    def definition(kind):
        out = functional.scaled_dot_product_attention(q.to(kind), k.to(kind), v.to(kind), is_causal=causal)
        wide = torch.promote_types(kind, torch.float32)  # the logarithm is float32 whatever q is
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / 4
        if causal:
            scores = scores.masked_fill(torch.ones(n_q, n_k, dtype=torch.bool).triu(1), -math.inf)
        return out, scores.logsumexp(-1)

    with framed(1, 2, n_q, 16, dtype=dtype) as out:
        results = cpu_kernels.attention(q, k, v, causal=causal, out=out, block_m=block_m, block_n=block_n)
        for result, reference, truth in zip(results, definition(dtype), definition(torch.float64), strict=True):
            agree(result, reference, truth, reduced=n_k)


@every_dtype
def test_attention_of_tokens_before_heads(dtype):
    needs_arithmetic(dtype)
    q, k, v = (random(2, 20, 3, 32, dtype=dtype, seed=s).transpose(1, 2) for s in range(3))
    y = cpu_kernels.attention(q, k, v, scale=0.25, block_m=16, block_n=16).out

    def definition(kind):
        return functional.scaled_dot_product_attention(
            q.to(kind), k.to(kind), v.to(kind), is_causal=True, scale=0.25
        )  # fmt: skip

    agree(y, definition(dtype), definition(torch.float64), reduced=20)
    assert y.stride() == q.stride()


# What the kernels cannot do is refused.


def test_rows_with_strides_are_refused():
    x = random(4, 8, dtype=torch.float32).T
    with pytest.raises(ArgumentError, match="softmax: argument 'x'"):
        cpu_kernels.softmax(x)
    with pytest.raises(ArgumentError, match="rms_norm: argument 'out'"):
        cpu_kernels.rms_norm(x.contiguous(), torch.ones(4), out=x)
    with pytest.raises(ArgumentError, match="attention: argument 'q'"):
        cpu_kernels.attention(*(random(1, 1, 8, 24, dtype=torch.float32) for _ in range(3)))
    with pytest.raises(ArgumentError, match="matmul: argument 'b'"):
        cpu_kernels.matmul(x, x)


# The benchmark of the target: what it measures is right, and what is wrong is not measured.

OURS = [(workload.name, workload.dtype, workload) for workload in cpu_workloads.workloads(quick=True)]
SMALL = {"rms_norm": 2, "softmax": 2, "rope": 5, "causal": 1, "matmul": 64, "dot": 16}


def small(workload):
    """The workload in small, and of its contestants those that Triton computes."""
    kind = workload.name.split()[0]
    if kind in {"causal", "matmul", "dot"}:
        needs_arithmetic(workload.dtype)
    contest = workload.build(SMALL[kind], workload.dtype)
    ours = {name: each for name, each in contest.contestants.items() if name.startswith("triton")}
    assert ours
    return dataclasses.replace(contest, contestants=ours)


@pytest.mark.parametrize("workload", [pytest.param(w, id=f"{name}-{dtype}") for name, dtype, w in OURS])
def test_the_benchmark_finds_the_kernels_right(workload):
    for name, verdict in cpu_target.judge(small(workload), workload.dtype):
        assert verdict["status"] == "ok", f"{name}: {verdict['reason']}"


def failing():
    raise RuntimeError("no such kernel")


def test_the_benchmark_times_only_what_is_right():
    x = random(64, dtype=torch.float32)
    untouched, right = torch.empty_like(x), torch.empty_like(x)
    contestants = {
        "triton": cpu_workloads.Contestant(lambda: torch.mul(x, 2, out=right), right),
        "off": cpu_workloads.Contestant(lambda: x * 2.001),
        "idle": cpu_workloads.Contestant(lambda: None, untouched),
        "failing": cpu_workloads.Contestant(failing),
    }
    contest = cpu_workloads.Contest(contestants, lambda kind: x.to(kind) * 2)
    workload = cpu_workloads.Workload("twice", torch.float32, lambda size, dtype: contest, 64, ())
    found = {record["provider"]: record for record in cpu_target.measure_workload(workload, rounds=2)}
    assert {name: record["status"] for name, record in found.items()} == {
        "triton": "ok",
        "off": "wrong",
        "idle": "wrong",
        "failing": "failed",
    }
    assert found["failing"]["reason"] == "RuntimeError: no such kernel"
    assert [name for name, record in found.items() if "time" in record] == ["triton"]
    claims = (cpu_workloads.Claim("triton", "off", 0.5), cpu_workloads.Claim("idle", "triton"))
    for ratio, met in zip(
        cpu_target.ratios(list(found.values()), {("twice", "float32"): claims}), (False, None), strict=True
    ):
        assert ratio["ratio"] is None
        assert ratio["met"] is met


def test_the_benchmark_refuses_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BenchmarkError, match="unset TRITON_INTERPRET"):
        cpu_target.main(tmp_path)
    assert not list(tmp_path.iterdir())
