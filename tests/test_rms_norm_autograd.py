"""Gradients of RMSNorm, what autograd saves for them, and the registered operators under torch.compile and its kin."""

import math
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import tilewright
from rms_norm_helpers import GPU_TRITON, TARGETS, random, same_bits, serve
from tilewright import add_rms_norm, numerics, rms_norm, use
from tilewright.errors import ArgumentError, DTypeError, TilewrightError
from tilewright.ops.rms_norm.spec import FAMILY

tilewright.register()
NAMES = ("x", "residual", "weight")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(target, shape=(3, 4, 24), dtype=torch.float32, stream=None, wanted=NAMES):
    """``x``, ``residual`` and ``weight``; those in ``wanted`` require a gradient."""
    made = (
        random(target, *shape, dtype=dtype),
        random(target, *shape, dtype=stream or dtype, seed=1),
        random(target, shape[-1], dtype=dtype, seed=2),
    )
    return [t.requires_grad_(name in wanted) for name, t in zip(NAMES, made, strict=True)]


# Gradients.

MODES = [
    {},
    {"cast": "after_weight"},
    {"weight_offset": 1.0, "eps": 1e-2},
    {"residual_rounding": "exact"},
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("used", ["both", "y", "residual"])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_gradients(target, kwargs, used, weighted):
    *summands, weight = leaves(target, (2, 5), torch.float64)
    if not weighted:
        kwargs = {name: value for name, value in kwargs.items() if name != "weight_offset"}
    # The weight has no part in the sum, which gradcheck would find fault with.
    tensors = (*summands, weight) if weighted and used != "residual" else summands

    def call(x, residual, *given):
        result = serve(target, add_rms_norm, x, residual, *given or ((weight,) if weighted else ()), **kwargs)
        # As one tensor: of two, gradcheck gives each a gradient by itself.
        return torch.stack(tuple(result)) if used == "both" else getattr(result, used)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_depend_on_each_other(target):
    """Gradients of gradients where all tensors of a call are made of one."""
    leaf = random(target, 4, dtype=torch.float64).requires_grad_()

    def call(leaf):
        result = serve(target, add_rms_norm, leaf.square().expand(3, 4) * 2, leaf.expand(3, 4), leaf * 3)
        return torch.stack(tuple(result))

    assert torch.autograd.gradcheck(call, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (leaf,), fast_mode=True)


@pytest.mark.parametrize("target", TARGETS)
def test_third_derivatives(target):
    def third(norm, x):
        (value,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
        for last in (False, True):
            (value,) = torch.autograd.grad(value.sin().sum(), x, create_graph=not last)
        return value

    x = random(target, 6, 16).requires_grad_()
    agreement = numerics.compare(
        third(partial(serve, target, rms_norm), x),
        third(formula, x),
        third(formula, x.detach().double().requires_grad_()),
    )
    assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["rounded", "exact"])
@pytest.mark.parametrize("wanted", ["x", "residual", "weight"])
def test_only_one_requires_a_gradient(target, stream, rounding, wanted):
    def gradients(*names):
        tensors = leaves(target, dtype=torch.bfloat16, stream=stream, wanted=names)
        y, total = serve(target, add_rms_norm, *tensors, residual_rounding=rounding)
        (y.sum() + (total.square().sum() if total.requires_grad else 0)).backward()
        return {name: t.grad for name, t in zip(NAMES, tensors, strict=True)}

    alone, all_of_them = gradients(wanted), gradients(*NAMES)
    assert [name for name, grad in alone.items() if grad is not None] == [wanted]
    assert same_bits(alone[wanted], all_of_them[wanted])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rounding", ["rounded", "exact"])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("expanded", [False, True])
def test_only_the_sum_is_used(target, rounding, stream, expanded):
    x, residual, weight = leaves(target, dtype=torch.bfloat16, stream=stream)
    with torch.no_grad():
        x[0, 0, 0] = math.nan  # spoils that row's norm, which nobody asked for
    total = serve(target, add_rms_norm, x, residual, weight, residual_rounding=rounding).residual
    grad = random(target, *x.shape, dtype=stream, seed=5)
    if expanded:
        grad = grad[:1, :1].expand(x.shape)
    grads = torch.autograd.grad(total, (x, residual, weight), grad, allow_unused=True)
    assert same_bits(grads[0], grad.bfloat16())
    assert same_bits(grads[1], grad)
    assert grads[2] is None
    assert [g.stride() for g in grads[:2]] == [x.stride(), residual.stride()]


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_do_not_share_memory(target):
    """One tensor may be the gradient of both summands, but not after autograd has kept it for both."""
    x, residual, weight = leaves(target)
    for _ in range(2):
        serve(target, add_rms_norm, x, residual, weight).y.sum().backward()
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    assert same_bits(x.grad, residual.grad)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_gradients_of_each_dtype_are_rounded_once(target, stream):
    """With a wider stream its gradient is the one that the gradient of ``x`` is rounded from."""
    x, residual, weight = leaves(target, dtype=torch.bfloat16, stream=stream)
    y, _ = serve(target, add_rms_norm, x, residual, weight)
    grads = torch.autograd.grad(y, (x, residual, weight), random(target, *y.shape, dtype=torch.bfloat16, seed=3))
    assert [g.dtype for g in grads] == [torch.bfloat16, stream, torch.bfloat16]
    assert same_bits(grads[0], grads[1].bfloat16())
    if stream == torch.float32:
        assert not torch.equal(grads[0].float(), grads[1])


# What is saved.


def storages_saved(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = call()
    return {t.untyped_storage().data_ptr() for t in saved}, result


def storages(*tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("compiled", [False, True])
def test_saved_tensors(target, compiled):
    x, residual, weight = leaves(target)

    def watched(function, *args, **kwargs):
        call = partial(serve, target, function, *args, **kwargs)
        if compiled:  # the registered operators
            call = partial(
                torch.compile(lambda *args: function(*args, impl=target.implementation, **kwargs), backend="aot_eager"),
                *args,
            )
        return storages_saved(call)

    saved, _ = watched(rms_norm, x, weight)
    assert saved == storages(x, weight)
    saved, result = watched(add_rms_norm, x, residual, weight)
    assert saved == storages(result.residual, weight), "the stored sum in place of both summands"
    saved, _ = watched(add_rms_norm, x, residual, weight, residual_rounding="exact")
    assert saved == storages(x, residual, weight)


@pytest.mark.parametrize("target", TARGETS)
def test_the_stored_sum_is_guarded(target):
    x, residual, weight = leaves(target)
    y, total = serve(target, add_rms_norm, x, residual, weight)
    with torch.no_grad():
        x.zero_()  # nobody needs it any more
        residual.zero_()
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert expected.any()
    with torch.no_grad():
        total.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(target, mode):
    tensors = leaves(target)
    expected = serve(target, add_rms_norm, *tensors)
    with mode():
        got = serve(target, add_rms_norm, *tensors)
    assert not got.y.requires_grad
    assert got.y.is_inference() == (mode is torch.inference_mode)
    for ours, theirs in zip(got, expected, strict=True):
        assert same_bits(ours, theirs.detach())


@pytest.mark.parametrize("target", TARGETS)
def test_checkpointing(target):
    x, residual, weight = leaves(target)

    def block(x):
        return serve(target, add_rms_norm, x * 2, residual, weight).y.square()

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum(), x)
    assert same_bits(got, expected)


# The registered operators.

CASES = {case.id: case for case in FAMILY.cases}
OPCHECK = ("norm", "weight-none-after_weight", "weight-float32-before_weight", "offset-bfloat16-after_weight", "sum",
           "stream-float32-rounded", "stream-float32-exact", "heads-rows", "permuted-stream", "expanded-sum",
           "permuted-both", "one-dimension", "no-rows-sum")  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(target, name):
    case = CASES[name]
    args, kwargs = case.arguments(target.device, case.dtypes[0])
    tensors = [x.detach().requires_grad_() for x in args]
    operator = getattr(torch.ops.tilewright, case.function).default
    torch.library.opcheck(operator, tuple(tensors), kwargs | {"impl": target.implementation})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["rounded", "exact"])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_opcheck_backward(target, stream, rounding, weight_grad):
    x, residual, weight = leaves(target, (2, 3, 8), torch.bfloat16, stream)
    grad = random(target, 2, 3, 8, dtype=torch.bfloat16, seed=3).requires_grad_()
    grad_stored = random(target, 2, 3, 8, dtype=stream, seed=4)
    z, other = (residual, None) if rounding == "rounded" else (x, residual)
    options = (1e-6, 0.0, "before_weight", rounding, torch.bfloat16, weight_grad, target.implementation)
    args = (grad, grad_stored, z, other, weight, *options)
    results = torch.ops.tilewright.rms_norm_backward(*args)
    dtypes = [torch.bfloat16, *([torch.float32] if stream == torch.float32 else [])]
    assert [t.dtype for t in results] == dtypes + [torch.bfloat16] * weight_grad
    torch.library.opcheck(torch.ops.tilewright.rms_norm_backward.default, args)


def test_default_arguments_are_the_functions():
    x, residual, weight = leaves(TARGETS[0].values[0], wanted=())
    assert torch.equal(torch.ops.tilewright.rms_norm(x), rms_norm(x))
    assert torch.equal(torch.ops.tilewright.rms_norm(x, weight), rms_norm(x, weight))
    results = torch.ops.tilewright.add_rms_norm(x, residual, weight)
    for got, expected in zip(results, add_rms_norm(x, residual, weight), strict=True):
        assert torch.equal(got, expected)


WRONG_BACKWARDS = {
    "grad dtype": ({"grad": torch.ones(2, 8).bfloat16()}, DTypeError, "grad"),
    "z dtype": ({"z": torch.ones(2, 8).half(), "grad_stored": None}, DTypeError, "residual"),
    "z shape": ({"z": torch.ones(3, 8)}, ArgumentError, "residual"),
    "z shape alone": ({"z": torch.ones(3, 8), "grad_stored": None}, ArgumentError, "z"),
    "grad_stored shape": ({"grad_stored": torch.ones(2, 9)}, ArgumentError, "grad_stored"),
    "grad_stored dtype": ({"grad_stored": torch.ones(2, 8).double()}, DTypeError, "grad_stored"),
    "weight shape": ({"weight": torch.ones(9)}, ArgumentError, "weight"),
    "no weight": ({"weight": None}, ArgumentError, "weight_grad"),
    "residual not needed": ({"residual": torch.ones(2, 8)}, ArgumentError, "residual"),
    "residual needed": ({"residual_rounding": "exact"}, ArgumentError, "residual"),
    "eps": ({"eps": 0.0}, ArgumentError, "eps"),
}


@pytest.mark.parametrize("wrong", WRONG_BACKWARDS)
def test_invalid_backward(wrong):
    changes, error, argument = WRONG_BACKWARDS[wrong]
    names = ("grad", "grad_stored", "z")
    valid = {name: torch.ones(2, 8) for name in names} | {"residual": None, "weight": torch.ones(8), "eps": 1e-6}
    valid |= {"weight_offset": 0.0, "cast": "before_weight", "residual_rounding": "rounded"}
    valid |= {"dtype": torch.float32, "weight_grad": True}
    assert len(torch.ops.tilewright.rms_norm_backward(*valid.values())) == 2
    with pytest.raises(error) as caught:
        torch.ops.tilewright.rms_norm_backward(*(valid | changes).values())
    assert caught.value.argument == argument
    assert caught.value.operation == "rms_norm_backward"


def test_meta_tensors():
    x = torch.empty(4, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    residual = torch.empty(4, 16, device="meta", requires_grad=True)
    weight = torch.empty(16, device="meta", requires_grad=True)
    result = add_rms_norm(x, residual, weight)
    grads = torch.autograd.grad([result.y.sum(), result.residual.sum()], (x, residual, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(g.is_meta for g in (*result, *grads))


# torch.compile.


def compiled(function, backend="aot_eager", **kwargs):
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_equals_eager(target, kwargs, stream, grad):
    def model(x, residual, weight):
        y, residual = add_rms_norm(x, residual, weight, impl=target.implementation, **kwargs)
        plain = {name: value for name, value in kwargs.items() if name != "residual_rounding"}
        return rms_norm(y, weight, impl=target.implementation, **plain), residual

    outcomes = []
    for run in (model, compiled(model)):
        tensors = leaves(target, dtype=torch.bfloat16, stream=stream, wanted=NAMES if grad else ())
        results = run(*tensors)
        gradients = torch.autograd.grad([y.float().square().sum() for y in results], tensors) if grad else ()
        outcomes.append((*results, *gradients))
    for eager, other in zip(*outcomes, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("target", TARGETS)
def test_inductor(target):
    def model(x, residual, weight):
        return add_rms_norm(x + x, residual.transpose(0, 1).contiguous().transpose(0, 1), weight,
                            impl=target.implementation)  # fmt: skip

    outcomes = []
    for run in (model, compiled(model, "inductor")):
        tensors = leaves(target)
        results = run(*tensors)
        outcomes.append((*results, *torch.autograd.grad([y.sum() for y in results], tensors)))
    for eager, other in zip(*outcomes, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grad", [False, True])
def test_one_recompilation_at_most(target, grad):
    counter = CompileCounter()

    def model(x, residual, weight):
        return add_rms_norm(x, residual, weight, impl=target.implementation)

    run = compiled(model, counter)
    for n in (2, 3, 5, 6):
        tensors = leaves(target, (n, 3, 16), wanted=NAMES if grad else ())
        for got, expected in zip(run(*tensors), model(*tensors), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("target", TARGETS)
def test_dynamic_from_the_start(target):
    counter = CompileCounter()
    run = compiled(lambda x, weight: rms_norm(x, weight, impl=target.implementation), counter, dynamic=True)
    for n in (2, 3, 5):
        x, weight = random(target, n, n + 1, 16), random(target, 16)
        assert torch.equal(run(x, weight), rms_norm(x, weight, impl=target.implementation))
    assert counter.frame_count == 1


@pytest.mark.parametrize("target", TARGETS)
def test_numbers_that_vary_in_a_compiled_function(target):
    run = compiled(lambda x, weight, eps, offset: rms_norm(x, weight, eps, weight_offset=offset), dynamic=None)
    x, weight = random(target, 4, 16), random(target, 16)
    for eps, offset in ((1e-6, 0.0), (1e-5, 1.0), (1e-2, 2.0)):
        assert torch.equal(run(x, weight, eps, offset), rms_norm(x, weight, eps, weight_offset=offset))


def test_errors_in_a_graph_are_the_same():
    with pytest.raises(Exception, match=r"rms_norm: argument 'weight': got shape \(9,\); expected \[8\]"):
        compiled(rms_norm)(torch.ones(2, 8), torch.ones(9))


def test_use_around_a_compiled_function():
    asked = []

    def backend(module, example_inputs):
        asked.extend(node.args[-1] for node in module.graph.nodes if "tilewright" in str(node.target))
        return module.forward

    run, x = compiled(rms_norm, backend), torch.randn(2, 16)
    assert torch.equal(run(x), rms_norm(x))
    with use("reference"):
        assert torch.equal(run(x), rms_norm(x))
    assert asked == [None, "reference"]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    def function(x, residual, weight):
        x = x.detach().requires_grad_()
        y, _ = add_rms_norm(x, residual, weight)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        return y, grad

    tensors = leaves(TARGETS[0].values[0], wanted=())
    traced = make_fx(function, tracing_mode=mode)(*tensors)
    operators = [str(node.target) for node in traced.graph.nodes if str(node.target).startswith("tilewright.")]
    assert operators == ["tilewright.add_rms_norm.default", "tilewright.rms_norm_backward.default"]
    others = [2 * t + 1 for t in tensors]
    for got, expected in zip(traced(*others), function(*others), strict=True):
        assert torch.equal(got, expected)


# Function transforms and forward mode: right, or refused; never silently wrong.


def formula(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).sin().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x.sin())[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.sin(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, 2 * x)))[1],
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(target, transform):
    x = random(target, 4, 16)
    run = TRANSFORMS[transform]
    try:
        got = run(lambda z: rms_norm(z, impl=target.implementation), x)
    except (RuntimeError, TilewrightError):  # refused
        return
    agreement = numerics.compare(got, run(formula, x), run(formula, x.double()))
    assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
def test_forward_mode_is_right_or_refused(target):
    x, t = random(target, 4, 16), random(target, 4, 16, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        try:
            y = rms_norm(dual, impl=target.implementation)
        except (RuntimeError, TilewrightError):  # refused
            return
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert tangent is not None, "the derivative was dropped"


@pytest.mark.parametrize("target", GPU_TRITON)
def test_graph_capture(target):
    x, residual, weight = leaves(target, (64, 512), torch.bfloat16, wanted=())
    serve(target, add_rms_norm, x, residual, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_rms_norm(x, residual, weight, impl="triton")
    for seed in (5, 6):
        x.copy_(random(target, 64, 512, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        for got, expected in zip(captured, add_rms_norm(x, residual, weight, impl="triton"), strict=True):
            assert same_bits(got, expected)
