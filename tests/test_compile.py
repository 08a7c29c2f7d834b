"""The registered operators under torch.compile, export, tracing and function transforms."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tilewright
from tilewright import ops, rope, rope_from_angles, rope_qk, rope_table, use
from tilewright.errors import ArgumentError, TilewrightError
from tilewright.testing import targets

TARGETS = [pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.on_gpu else []) for t in targets()]
tilewright.register()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(target, *shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(target.device, dtype)


def compiled(function, backend="aot_eager", **kwargs):
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def operators_of(graph):
    """Names of the library's operators in a graph."""
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("tilewright.")]


POSITIONS = {
    "counted": lambda device: {},
    "offset": lambda device: {"offsets": 3},
    "offsets": lambda device: {"offsets": torch.tensor([1, 5], device=device)},
    "position_ids": lambda device: {"position_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], device=device)},
    "parallel": lambda device: {"context_parallel": (1, 2), "seqlen": 4},
    "mrope": lambda device: {
        "position_ids": torch.arange(15, device=device).view(3, 5),
        "mrope_section": (4, 2, 2),
    },
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_equals_eager(target, inplace, positions, grad):
    kwargs = POSITIONS[positions](target.device)
    seqlen = kwargs.pop("seqlen", 5)
    cos, sin = rope_table(16, 32, device=target.device)
    kwargs |= {"inplace": inplace, "impl": target.implementation}
    assert tilewright.explain("rope", random(target, 2, seqlen, 3, 16), cos, sin, **kwargs).chosen == (
        target.implementation
    )

    def model(x, q, k):
        if inplace:
            x, q, k = x * 1, q * 1, k * 1
        y = rope(x, cos, sin, **kwargs)
        rotated = rope_qk(q, k, cos, sin, **kwargs)
        return (x, q, k) if inplace else (y, *rotated)

    outcomes = []
    for run in (model, compiled(model)):
        leaves = [random(target, 2, seqlen, heads, 16, seed=heads).requires_grad_(grad) for heads in (3, 2, 1)]
        results = run(*leaves)
        gradients = torch.autograd.grad([y.square().sum() for y in results], leaves) if grad else ()
        outcomes.append((*results, *gradients))
    for eager, other in zip(*outcomes, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("target", TARGETS)
def test_in_place_on_graph_inputs(target):
    cos, sin = rope_table(16, 32, device=target.device)

    def model(qkv):
        q, k = qkv[:, :, :3], qkv[:, :, 3:4]
        return rope_qk(q, k, cos, sin, inplace=True, impl=target.implementation)

    eager, other = random(target, 2, 5, 5, 16), random(target, 2, 5, 5, 16)
    expected, got = model(eager), compiled(model)(other)
    assert torch.equal(eager, other)
    assert torch.equal(expected.q, got.q)
    assert got.k.data_ptr() == other[:, :, 3:4].data_ptr()


@pytest.mark.parametrize("target", TARGETS)
def test_inductor(target):
    cos, sin = rope_table(16, 32, device=target.device)

    def model(q, k):
        return rope_qk(q + q, k.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, impl=target.implementation)

    outcomes = []
    for run in (model, compiled(model, "inductor")):
        leaves = [random(target, 2, 5, heads, 16).requires_grad_() for heads in (3, 1)]
        results = run(*leaves)
        outcomes.append((*results, *torch.autograd.grad([y.sum() for y in results], leaves)))
    for eager, other in zip(*outcomes, strict=True):
        assert torch.equal(eager, other)


DYNAMIC = {
    "batch": lambda n: ((n, 5, 3, 16), {}),
    "sequence": lambda n: ((2, n, 3, 16), {}),
    "offsets": lambda n: ((n, 5, 3, 16), {"offsets": torch.arange(n)}),
    "offset": lambda n: ((2, 5, 3, 16), {"offsets": n}),
    "position_ids": lambda n: ((n, 5, 3, 16), {"position_ids": torch.arange(5 * n).view(n, 5)}),
    "packed": lambda n: ((6, 3, 16), {"layout": "thd", "cu_seqlens": torch.arange(n)}),
}


@pytest.mark.parametrize("what", DYNAMIC)
@pytest.mark.parametrize("grad", [False, True])
def test_one_recompilation_at_most(what, grad):
    counter = CompileCounter()
    cos, sin = rope_table(16, 32)
    run = compiled(lambda x, **kwargs: rope(x, cos, sin, **kwargs), counter)
    for n in (2, 3, 5, 6):
        shape, kwargs = DYNAMIC[what](n)
        x = torch.randn(shape, requires_grad=grad)
        assert torch.equal(run(x, **kwargs), rope(x, cos, sin, **kwargs))
    assert counter.frame_count <= 2


def test_dynamic_from_the_start():
    counter = CompileCounter()
    cos, sin = rope_table(16, 32)
    run = compiled(lambda q, k: rope_qk(q, k, cos, sin), counter, dynamic=True)
    for n in (2, 3, 5):
        q, k = torch.randn(n, n + 1, 7, 16), torch.randn(n, n + 1, 1, 16)  # no two sizes equal
        assert torch.equal(run(q, k).k, rope_qk(q, k, cos, sin).k)
    assert counter.frame_count == 1


def test_errors_in_a_graph_are_the_same():
    cos, sin = rope_table(16, 4)
    with pytest.raises(Exception, match=r"rope: argument 'cos': has 4 positions, but position 4 is used"):
        compiled(lambda x: rope(x, cos, sin))(torch.ones(1, 5, 2, 16))
    with pytest.raises(Exception, match="leaf"):
        compiled(lambda x: rope(x, cos, sin, inplace=True))(torch.ones(1, 4, 2, 16, requires_grad=True))


# `use` and compilation.


class Requests:
    """A backend that notes which implementation each operator in a graph asks for."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph_module, example_inputs):
        for node in graph_module.graph.nodes:
            if str(node.target).startswith("tilewright."):
                names = [a.name for a in torch.ops.tilewright.rope.default._schema.arguments]
                given = dict(zip(names, node.args, strict=False)) | node.kwargs
                self.seen.append(given.get("impl"))
        return graph_module.forward


def test_use_inside_a_compiled_function():
    requests, (cos, sin) = Requests(), rope_table(16, 32)

    def model(x):
        with use("reference"):
            y = rope(x, cos, sin)
        return rope(y, cos, sin)

    x = torch.randn(2, 5, 3, 16)
    assert torch.equal(compiled(model, requests)(x), model(x))
    assert requests.seen == ["reference", None]


def test_use_around_a_compiled_function():
    requests, (cos, sin) = Requests(), rope_table(16, 32)
    run = compiled(lambda x: rope(x, cos, sin), requests)
    x = torch.randn(2, 5, 3, 16)
    run(x)
    with use("reference"):
        run(x)
        run(x)
    run(x)
    assert requests.seen == [None, "reference"], "compiled once for each choice"


def test_compiling_goes_on_after_use_inside_a_compiled_function():
    """Tracing ``use`` must leave nothing behind that a later compilation trips over, in any thread."""
    import threading

    cos, sin = rope_table(16, 32)
    x = torch.randn(2, 5, 3, 16)
    results = []

    def inside(x):
        with use("reference"):
            return rope(x, cos, sin)

    def work():
        try:
            for function in (inside, lambda x: rope(x, cos, sin), inside):
                results.append(torch.equal(compiled(function)(x), rope(x, cos, sin)))
        except Exception as error:
            results.append(str(error).splitlines()[0])

    thread = threading.Thread(target=work)  # in a thread that has not called `use` before
    thread.start()
    thread.join()
    assert results == [True, True, True]


# The operators themselves.

OPCHECK = (
    "bshd-half-rope",
    "thd-interleaved-rope_qk",
    "bhsd-half-rope_qk",
    "bshd-offset",
    "bshd-offsets",
    "sbhd-position_ids",
    "bshd-mrope_interleaved",
    "thd-cu_seqlens_offsets",
    "cp-thd",
    "partial-middle-interleaved",
    "full-partial-qk",
    "angles-full",
    "inverse",
    "permuted-bshd",
    "spread-bhsd",
    "empty-batch",
)
CASES = {case.id: case for case in ops.family("rope").cases}
CHECKS = [
    pytest.param(
        CASES[name], inplace, p.values[0], id=f"{name}-{'inplace' if inplace else 'new'}-{p.id}", marks=p.marks
    )
    for name in OPCHECK
    for inplace in (False, True)
    for p in TARGETS
    if p.values[0].implementation == "triton" or not p.values[0].on_gpu
]


def operator_call(case, target, inplace):
    """The operator behind a case's public function, with its arguments."""
    args, kwargs = case.arguments(target.device, torch.float32)
    kwargs = dict(kwargs, impl=target.implementation)
    offsets = kwargs.pop("offsets", None)
    if offsets is not None:
        kwargs["offsets" if isinstance(offsets, torch.Tensor) else "offset"] = offsets
    for name in ("context_parallel", "mrope_section"):
        if name in kwargs:
            kwargs[name] = list(kwargs[name])
    if case.function == "rope_from_angles":
        args = (*args, None)
    name = ("rope_qk" if case.function == "rope_qk" else "rope") + ("_" if inplace else "")
    return getattr(torch.ops.tilewright, name).default, args, kwargs


@pytest.mark.parametrize(("case", "inplace", "target"), CHECKS)
def test_opcheck(case, inplace, target):
    operator, args, kwargs = operator_call(case, target, inplace)
    count = len(case.differentiable(case.arguments(target.device, torch.float32)))
    tensors = [x.clone() if inplace else x.detach().requires_grad_() for x in args[:count]]
    torch.library.opcheck(operator, (*tensors, *args[count:]), kwargs)


@pytest.mark.parametrize("name", ["rope_", "rope_qk_"])
def test_in_place_operators_refuse_gradients(name):
    cos, sin = rope_table(16, 8)
    x = torch.ones(1, 4, 2, 16, requires_grad=True) * 1
    operator = getattr(torch.ops.tilewright, name)
    args = (x,) if name == "rope_" else (torch.ones(1, 4, 2, 16), x)
    with pytest.raises(ArgumentError, match="inplace=True"):
        operator(*args, cos, sin)
    with torch.no_grad():
        operator(*args, cos, sin)


def test_default_arguments_are_the_functions():
    cos, sin = rope_table(16, 8)
    x = torch.randn(1, 4, 2, 16)
    assert torch.equal(torch.ops.tilewright.rope(x, cos, sin), rope(x, cos, sin))
    assert torch.equal(torch.ops.tilewright.rope(x, cos, None), rope_from_angles(x, cos))
    written = x.clone()
    assert torch.ops.tilewright.rope_(written, cos, sin, offset=2) is None
    assert torch.equal(written, rope(x, cos, sin, offsets=2))


# Export, fakes and traces.


class Rotary(torch.nn.Module):
    def __init__(self):
        super().__init__()
        cos, sin = rope_table(16, 32)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, q, k, offsets):
        return tuple(rope_qk(q, k, self.cos, self.sin, offsets=offsets))


def test_export_keeps_the_operator():
    module = Rotary()
    args = (torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 16), torch.tensor([1, 2]))
    batch, seqlen = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seqlen", min=2, max=32)
    shapes = ({0: batch, 1: seqlen}, {0: batch, 1: seqlen}, {0: batch})
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    decomposed = program.run_decompositions()
    assert operators_of(program.graph) == ["tilewright.rope_qk.default"]
    assert operators_of(decomposed.graph) == ["tilewright.rope_qk.default"]
    other = (torch.randn(3, 9, 3, 16), torch.randn(3, 9, 1, 16), torch.tensor([4, 0, 20]))
    for run in (program.module(), decomposed.module()):
        for got, expected in zip(run(*other), module(*other), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors(inplace, grad):
    with FakeTensorMode():
        x = torch.randn(2, 5, 3, 16, requires_grad=grad)
        table = torch.randn(8, 8)
        given = x * 1
        y = rope(given, table, table, inplace=inplace)
        assert y.shape == x.shape
        assert (y is given) == inplace
        if grad:
            y.sum().backward()
            assert x.grad.stride() == x.stride()
        with pytest.raises(ArgumentError, match="position 9"):
            rope(x, table, table, offsets=5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    cos, sin = rope_table(16, 32)
    x = torch.randn(2, 5, 3, 16)

    def function(x, cos, sin):
        x = x.detach().requires_grad_()
        y = rope(x, cos, sin)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        return y, grad

    traced = make_fx(function, tracing_mode=mode)(x, cos, sin)
    assert operators_of(traced.graph) == ["tilewright.rope.default"] * 2
    other = torch.randn(2, 5, 3, 16)
    for got, expected in zip(traced(other, cos, sin), function(other, cos, sin), strict=True):
        assert torch.equal(got, expected)


# Function transforms: right, or refused; never silently wrong.

TRANSFORMS = {
    "grad": lambda f, x: (torch.func.grad(lambda z: f(z).square().sum())(x), 2 * x),
    "vjp": lambda f, x: (torch.func.vjp(f, x)[1](f(x))[0], x),
    "jvp": lambda f, x: (torch.func.jvp(f, (x,), (2 * x,))[1], 2 * f(x)),
    "vmap": lambda f, x: (torch.func.vmap(f)(torch.stack((x, 2 * x)))[1], f(2 * x)),
    "functionalize": lambda f, x: (torch.func.functionalize(f)(x), f(x)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(target, transform):
    cos, sin = rope_table(16, 8, device=target.device, dtype=torch.float64)
    x = random(target, 2, 5, 3, 16, dtype=torch.float64)
    try:
        got, expected = TRANSFORMS[transform](lambda z: rope(z, cos, sin, impl=target.implementation), x)
    except (RuntimeError, TilewrightError):  # refused
        return
    # There and back, a pair is multiplied by two matrices: four products and two sums, each rounded. No value on the
    # way is larger than twice the length of a pair, which is at most 1.5 times its larger member.
    bound = 6 * torch.finfo(torch.float64).eps * 2 * 1.5 * x.abs().max()
    assert (got - expected).abs().max() <= bound
