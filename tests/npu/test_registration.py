import npu_kernels
import pytest
import torch

from tilewright.errors import ArgumentError, DTypeError, NpuKernelError, NpuRunError
from tilewright.npu import jit, register
from tilewright.npu import language as tl
from tilewright.numerics import compare

NAMESPACE = "tilewright_npu_tests"


@pytest.fixture(scope="module")
def scaled_sum():
    register(npu_kernels.scaled_sum, namespace=NAMESPACE)
    return getattr(torch.ops, NAMESPACE).scaled_sum


@pytest.fixture(scope="module")
def append():
    register(npu_kernels.append, namespace=NAMESPACE, outputs={"out": "cache"})
    return getattr(torch.ops, NAMESPACE).append


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


def test_what_is_read_off_the_kernel():
    operator = register(npu_kernels.append, namespace=NAMESPACE, outputs={"out": "cache"})
    assert operator.schema == "(Tensor row, Tensor(a!) cache, Tensor count) -> Tensor"
    assert operator.constexprs == {"ROWS": "cache.shape[0]", "COLUMNS": "row.shape[1]"}
    assert operator.mutated == ("cache",)
    assert operator.aligned == ()
    assert register(npu_kernels.append, namespace=NAMESPACE, outputs={"out": "cache"}) is operator


def test_an_output_may_have_a_shape_of_its_own():
    operator = register(npu_kernels.matmul, namespace=NAMESPACE)
    assert operator.output_shapes == {"out": ("a.shape[0]", "a.shape[1]", "b.shape[2]")}
    a, b = numbers(2, 5, 64), numbers(2, 64, 100)
    result = getattr(torch.ops, NAMESPACE).matmul(a, b)
    assert result.shape == (2, 5, 100)
    assert compare(result, a @ b, a.double() @ b.double()).ok
    torch.library.opcheck(getattr(torch.ops, NAMESPACE).matmul.default, (a, b))


@pytest.mark.parametrize("columns", [64, 70, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_last_dimension_and_dtype(scaled_sum, columns, dtype):
    x, y, scale = numbers(3, columns, dtype=dtype), numbers(4, columns, dtype=dtype)[:3], torch.tensor(0.5)
    result = scaled_sum(x, y, scale)
    assert result.dtype == dtype
    assert result.shape == x.shape
    assert torch.equal(result, (x.float() + y.float() * scale).to(dtype))


def test_strides_do_not_matter(scaled_sum):
    x, y = numbers(64, 3).T, numbers(3, 64)
    assert torch.equal(scaled_sum(x, y, torch.tensor(2.0)), x + y * 2)


def test_padding_is_asked_for():
    operator = register(npu_kernels.matmul, namespace=NAMESPACE, name="padded_matmul", align=["b"])
    a, b = numbers(2, 5, 64), numbers(2, 64, 70)
    result = operator(a, b)
    assert result.shape == (2, 5, 70)
    assert compare(result, a @ b, a.double() @ b.double()).ok
    program = operator.program({"a": a, "b": b})
    assert program.manifest.constexprs["N"] == 128
    assert not program.diagnostics
    warned = register(npu_kernels.matmul, namespace=NAMESPACE).program({"a": a, "b": b})
    assert {each.code for each in warned.diagnostics} == {"LAST_DIM_64"}
    with pytest.raises(ArgumentError, match="no input c"):
        register(npu_kernels.matmul, namespace=NAMESPACE, name="other", align=["c"])


def test_a_kernel_may_have_no_output():
    register(increment, namespace=NAMESPACE)
    op = getattr(torch.ops, NAMESPACE).increment
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(2, 64, dtype=dtype)
        assert op(x) is None
        assert torch.equal(x, torch.ones_like(x))
    torch.library.opcheck(op.default, (torch.zeros(2, 64),))


def test_only_what_is_stored_of_a_cache_is_written(append):
    # A cache of 16 bits is not copied: what others write meanwhile into other rows stays.
    cache = numbers(6, 128, dtype=torch.bfloat16)[:, :64]  # of any strides
    expected = cache.clone()
    row = numbers(1, 64, dtype=torch.bfloat16)
    expected[3] = row[0]
    append(row, cache, torch.tensor([3], dtype=torch.int32))
    assert torch.equal(cache, expected)


def test_gradients_are_refused(scaled_sum):
    x = numbers(3, 64).requires_grad_()
    with pytest.raises(ArgumentError, match="have none"):
        scaled_sum(x, x, torch.tensor(1.0))
    with torch.no_grad():
        assert torch.equal(scaled_sum(x, x, torch.tensor(1.0)), x + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_is_changed_in_place(append, dtype):
    row, cache = numbers(1, 70, dtype=dtype), numbers(5, 70, dtype=dtype)
    expected = cache.clone()
    expected[2] = row
    seen = expected.clone()
    seen[3:] = 0  # what lies behind the index is not loaded
    result = append(row, cache, torch.tensor([2], dtype=torch.int32))
    assert torch.equal(cache, expected)
    assert torch.equal(result, seen)


def test_operators_are_as_torch_wants_them(scaled_sum, append):
    torch.library.opcheck(scaled_sum.default, (numbers(3, 70), numbers(3, 70), torch.tensor(0.5)))
    torch.library.opcheck(append.default, (numbers(1, 64), numbers(4, 64), torch.tensor([1], dtype=torch.int32)))


class Model(torch.nn.Module):
    def __init__(self, append):
        super().__init__()
        self.append = append
        self.register_buffer("cache", torch.zeros(4, 64))

    def forward(self, row, count):
        before = self.cache.sum()
        rows = self.append(row, self.cache, count)
        return rows.sum() - before, self.cache * 2


def test_compiled_models_see_the_cache_change(append):
    eager, compiled = Model(append), Model(append)
    run = torch.compile(compiled, fullgraph=True)
    for step in range(4):
        row, count = numbers(1, 64) * (step + 1), torch.tensor([step], dtype=torch.int32)
        for a, b in zip(run(row, count), eager(row, count), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(compiled.cache, eager.cache)
        assert torch.equal(compiled.cache[step], row[0])


def test_sizes_may_change_under_compile(scaled_sum):
    run = torch.compile(lambda x, y, s: scaled_sum(x, y, s) + 1, fullgraph=True, dynamic=True)
    for columns in (64, 70, 128):
        x, y = numbers(3, columns), numbers(3, columns)
        assert torch.equal(run(x, y, torch.tensor(0.5)), x + y * 0.5 + 1)


def test_rounding_to_the_devices_numbers():
    operator = register(npu_kernels.scaled_sum, namespace=NAMESPACE)
    x, y, scale = numbers(3, 64), numbers(3, 64), torch.tensor(0.3)
    exact = x.double() + y.double() * scale.double()
    errors = [
        float((operator(x, y, scale, compute_dtype=each) - exact).abs().mean())
        for each in ("float32", "dlfloat16", "bfloat16")
    ]
    assert errors == sorted(errors)
    assert len(set(errors)) == 3


def test_bad_calls(scaled_sum, append):
    with pytest.raises(ArgumentError, match=r"x\.shape"):
        scaled_sum(numbers(64), numbers(64), torch.tensor(0.5))
    with pytest.raises(NpuKernelError, match=r"npu_kernels\.py:\d+:\d+: error\[NPU-OUT_OF_BOUNDS\].*'y'"):
        scaled_sum(numbers(3, 64), numbers(2, 64), torch.tensor(0.5))
    with pytest.raises(DTypeError, match="'x'"):
        scaled_sum(torch.ones(3, 64, dtype=torch.int64), numbers(3, 64), torch.tensor(0.5))
    with pytest.raises(DTypeError, match="float64"):
        scaled_sum(numbers(3, 64).double(), numbers(3, 64), torch.tensor(0.5))
    operator = register(npu_kernels.scaled_sum, namespace=NAMESPACE)
    with pytest.raises(ArgumentError, match="'scale': got float"):
        operator(numbers(3, 64), numbers(3, 64), 0.5)
    with pytest.raises(ArgumentError, match="the operator takes x, y, scale"):
        operator.program({"x": numbers(3, 64), "y": numbers(3, 64), "s": torch.tensor(0.5)})
    with pytest.raises(NpuKernelError, match="INDEX_DTYPE"):
        append(numbers(1, 64), numbers(4, 64), torch.tensor([1]))
    with pytest.raises(NpuRunError, match="STRADDLE"):
        append(numbers(1, 64), numbers(4, 64), torch.tensor([4], dtype=torch.int32))
    with pytest.raises(NpuRunError, match="BLOCK_NUMBER"):
        append(numbers(1, 64), numbers(4, 64), torch.tensor([-1], dtype=torch.int32))


def test_a_call_that_fails_before_it_stores_leaves_the_cache(append):
    cache = numbers(4, 64)
    before = cache.clone()
    with pytest.raises(NpuRunError):
        append(numbers(1, 64), cache, torch.tensor([7], dtype=torch.int32))
    assert torch.equal(cache, before)


@jit
def increment(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x_block = tl.make_block_ptr(
        base=x, shape=(ROWS, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    tl.store(x_block, tl.load(x_block) + 1.0)


@jit
def needs_more(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    for start in tl.static_range(0, COLUMNS, STEP):
        x_block = tl.make_block_ptr(
            base=x,
            shape=(ROWS, COLUMNS),
            strides=(COLUMNS, 1),
            offsets=(0, start),
            block_shape=(ROWS, STEP),
            order=(1, 0),
        )
        out_block = tl.make_block_ptr(
            base=out,
            shape=(ROWS, COLUMNS),
            strides=(COLUMNS, 1),
            offsets=(0, start),
            block_shape=(ROWS, STEP),
            order=(1, 0),
        )
        tl.store(out_block, tl.exp(tl.load(x_block)))


@jit
def faulty(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x_block = tl.make_block_ptr(
        base=x, shape=(ROWS, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    tl.store(out, tl.cumsum(tl.load(x_block), 1))


def test_bad_registrations():
    with pytest.raises(ArgumentError, match="no tensor's shape tells STEP"):
        register(needs_more, namespace=NAMESPACE)
    with pytest.raises(ArgumentError, match="the kernel has no WIDTH"):
        register(needs_more, namespace=NAMESPACE, constexprs={"STEP": 64, "WIDTH": 1})
    with pytest.raises(ArgumentError, match=r"only writes is \['out'\]"):
        register(needs_more, namespace=NAMESPACE, constexprs={"STEP": 64}, outputs={"y": "x"})
    with pytest.raises(ArgumentError, match="'z', which is no input"):
        register(needs_more, namespace=NAMESPACE, constexprs={"STEP": 64}, outputs={"out": "z"})
    with pytest.raises(NpuKernelError, match="RAWPTR") as caught:
        register(faulty, namespace=NAMESPACE)
    assert {each.code for each in caught.value.diagnostics} == {"RAWPTR", "UNSUPPORTED_OP"}
    for expression, message in (("y.shape[0]", "names y; there are x"), ("x.shape[", "is no expression")):
        with pytest.raises(ArgumentError, match=message):
            register(needs_more, namespace=NAMESPACE, constexprs={"STEP": expression})
    for options, message in (
        ({"name": "a b"}, "expected an identifier"),
        ({"host_layout": "x:y"}, "positions such as"),
        ({"host_layout": "9"}, "among the 3 arguments"),
    ):
        with pytest.raises(ArgumentError, match=message):
            register(npu_kernels.scaled_sum, **{"namespace": NAMESPACE, "name": "unused", **options})
    with pytest.raises(ArgumentError, match="expected an identifier"):
        register(npu_kernels.scaled_sum, namespace="my namespace")
    with pytest.raises(ArgumentError, match="under @jit"):
        register(lambda x: x)
    operator = register(needs_more, namespace=NAMESPACE, constexprs={"STEP": "x.shape[1] // 2"})
    assert torch.equal(operator(numbers(2, 128)), numbers(2, 128).exp())
    with pytest.raises(ArgumentError, match="another kernel's already"):
        register(npu_kernels.matmul, namespace=NAMESPACE, name="needs_more")
