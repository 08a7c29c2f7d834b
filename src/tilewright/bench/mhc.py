"""Who computes hyper-connections, for the benchmark, and what each is judged against.

Everyone is held against the definition in float64. What ``fn`` is rounded to decides how good mixes can be, so each is
held against the definition of the weights that he multiplies with; and who rounds on his way, in long sums on tensor
cores or in a backward, is allowed the error of plain PyTorch that rounds in the same places.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tilewright.bench import mhc_peers
from tilewright.bench.providers import (
    CopyProvider,
    Formulation,
    FunctionProvider,
    Provider,
    Suite,
    by_reference,
    evaluate,
    no_kernels,
    not_chosen,
    peer_missing,
    public_function,
    records_gradients,
)
from tilewright.numerics import disagreement
from tilewright.ops.contract import Arguments
from tilewright.ops.mhc.call import Options
from tilewright.ops.mhc.cases import HALVES, HEAD, POST, POST_PRE, PRE, ROUNDS, MhcCase
from tilewright.ops.mhc.reference import rounded_fn

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.bench.providers import Task, Tensors
    from tilewright.ops.contract import Workload

    Change = Callable[[torch.Tensor], torch.Tensor]
    Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CHUNK = 2**26
"""Elements of streams whose truth is computed at a time: half a gibibyte of them in float64."""

_STREAMS = {PRE: 0, HEAD: 0, POST: 1, POST_PRE: 1}
"""The place of the streams among a function's arguments."""

_PER_TOKEN = {PRE: 1, HEAD: 1, POST: 4, POST_PRE: 4}
"""How many of the first arguments have a row for each token; the others are weights, ``fn`` the first of them."""

_N_RESULTS = {PRE: 3, HEAD: 1, POST: 1, POST_PRE: 4}


def suite() -> Suite:
    """Everything that the benchmark of ``mhc`` needs."""
    from tilewright.ops import family

    providers: tuple[Provider, ...] = (
        FunctionProvider(
            "triton",
            "tilewright's Triton kernels",
            partial(public_function, "triton"),
            formulation=two_numbers,
            missing=no_kernels,
            refuses=partial(not_chosen, "triton"),
        ),
        FunctionProvider(
            "tilelang",
            "tilewright's TileLang kernels, forward only",
            partial(public_function, "tilelang"),
            formulation=two_numbers,
            missing=peer_missing("tilelang", "jit"),
            refuses=_tilelang_refuses,
        ),
        FunctionProvider("eager", "plain PyTorch", plain, formulation=eager),
        FunctionProvider(
            "compile", "torch.compile(dynamic=False) of plain PyTorch", plain, formulation=compiled, compiled=True
        ),
        FunctionProvider(
            "reference", "tilewright's definition", partial(public_function, "reference"), formulation=definition
        ),
        *mhc_peers.mhc_providers(tf32, streams_dtype),
        CopyProvider(),
    )
    return Suite(
        family=family("mhc"),
        formulation=DEFINITION,
        wrt=_wrt,
        providers=providers,
        on_request=frozenset({"reference"}),
        reduced=reduced,
    )


def _wrt(workload: Workload, arguments: Arguments) -> tuple[int, ...]:
    return tuple(range(len(arguments.args)))  # every tensor


def _tilelang_refuses(task: Task) -> str | None:
    if records_gradients(task):
        return "has no backward, and stores nothing for one"
    return not_chosen("tilelang", task)


# Plain PyTorch


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def product(rows: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
    """Streams [T, n * H] times weights [M, n * H], in the streams' dtype: [T, M]."""
    return rows @ fn.to(rows.dtype).T


def plain(task: Task, **steps: Any) -> Callable[..., Any]:
    """The task's function as one writes it in PyTorch.

    Args:
        task: says which.
        **steps: of :func:`plain_pre`.
    """
    functions: dict[str, Callable[..., Any]] = {
        PRE: plain_pre,
        POST: plain_post,
        POST_PRE: plain_post_pre,
        HEAD: plain_head,
    }
    function = functions[task.function]
    return partial(function, **steps) if steps else function


def plain_post(
    x: torch.Tensor, residual: torch.Tensor, post_mix: torch.Tensor, comb_mix: torch.Tensor, *, rounded: bool = True
) -> torch.Tensor:
    """The new streams.

    Args:
        x: the layer's output, [T, H].
        residual: the streams, [T, n, H].
        post_mix: [T, n].
        comb_mix: [T, n, n].
        rounded: to the streams' dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    streams = residual.to(wide)
    out = post_mix[:, :, None] * x.to(wide)[:, None]
    for i in range(residual.shape[1]):
        out = out + comb_mix[:, i, :, None] * streams[:, i, None]
    return out.to(residual.dtype) if rounded else out


def plain_pre(
    residual: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    apart: bool = False,
    product: Product = product,
    **options: Any,
) -> Tensors:
    """The mixes with which a layer's output goes back, and its input.

    Args:
        residual: the streams, [T, n, H].
        fn: [n * (n + 2), n * H].
        scale: [3].
        base: [n * (n + 2)].
        apart: the streams are widened anew for each use, so that the gradient of each is rounded by itself.
        product: how streams and ``fn`` are multiplied.
        **options: those of the public function.
    """
    given, n = Options(**options), residual.shape[1]
    streams = residual.to(torch.promote_types(residual.dtype, torch.float32))
    mixes = _mixes(streams, fn, given.rms_eps, product)
    pre, post, comb = torch.split(mixes, [n, n, n * n], 1)
    pre_base, post_base, comb_base = torch.split(base, [n, n, n * n])
    pre = torch.sigmoid(pre * scale[0] + pre_base) + given.pre_eps
    post = torch.sigmoid(post * scale[1] + post_base) * given.post_mult
    matrix = torch.softmax((comb * scale[2] + comb_base).view(-1, n, n), -1) + given.sinkhorn_eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + given.sinkhorn_eps)
    for _ in range(given.sinkhorn_iters - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + given.sinkhorn_eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + given.sinkhorn_eps)
    collapsed = residual.to(streams.dtype) if apart else streams
    return post.unsqueeze(-1), matrix, (pre.unsqueeze(-1) * collapsed).sum(1).to(residual.dtype)


def plain_post_pre(x: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor, **steps: Any) -> Tensors:
    """The new streams, and what :func:`plain_pre` makes of them.

    Args:
        x: as in :func:`plain_post`.
        residual: as in :func:`plain_post`.
        *rest: the two mixes, and the weights of :func:`plain_pre`.
        **steps: of :func:`plain_pre`.
    """
    new = plain_post(x, residual, *rest[:2])
    return new, *plain_pre(new, *rest[2:], **steps)


def plain_head(
    residual: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    rms_eps: float = Options().rms_eps,
    eps: float = Options().pre_eps,
    apart: bool = False,
    product: Product = product,
) -> torch.Tensor:
    """The streams collapsed.

    Args:
        residual: as in :func:`plain_pre`.
        fn: [n, n * H].
        scale: [1].
        base: [n].
        rms_eps: as in the public function.
        eps: as in the public function.
        apart: as in :func:`plain_pre`.
        product: as in :func:`plain_pre`.
    """
    streams = residual.to(torch.promote_types(residual.dtype, torch.float32))
    gate = torch.sigmoid(_mixes(streams, fn, rms_eps, product) * scale + base) + eps
    collapsed = residual.to(streams.dtype) if apart else streams
    return (gate.unsqueeze(-1) * collapsed).sum(1).to(residual.dtype)


def _mixes(streams: torch.Tensor, fn: torch.Tensor, eps: float, product: Product) -> torch.Tensor:
    rows = streams.flatten(1)
    rstd = torch.rsqrt(rows.square().mean(1, keepdim=True) + eps)
    return product(rows, fn) * rstd


class _RoundedGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Change) -> torch.Tensor:
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rounding(grad), None


def rounding_gradient(rounding: Change) -> Change:
    """A function that gives back its tensor and rounds the gradient.

    Args:
        rounding: of the gradient, in its own dtype.
    """

    def passed(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _RoundedGradient.apply(x, rounding)  # type: ignore[no-untyped-call]
        return result

    return passed


def on_tensor_cores(depth: int, rounding: Change) -> Product:
    """A product as long sums on tensor cores are: ``depth`` products are added to it at a time, and each sum is rounded
    toward zero to float32 (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). Its gradient is rounded.

    Args:
        depth: products that one instruction adds up.
        rounding: of the gradient.
    """

    def multiply(rows: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
        plain = product(rows, fn)
        with torch.no_grad():
            total = torch.zeros_like(plain, dtype=torch.float64)
            for start in range(0, rows.shape[1], depth):
                at = slice(start, start + depth)
                total = _toward_zero(total + product(rows[:, at].double(), fn[:, at]))
            lost = total.to(plain.dtype) - plain
        return rounding_gradient(rounding)(plain + lost)

    return multiply


def _toward_zero(x: torch.Tensor) -> torch.Tensor:
    """The nearest float32 numbers that are no further from zero, in float64."""
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), near.nextafter(torch.zeros_like(near)), near).double()


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Float32 numbers rounded to the 10 bits of tf32, as TileKernels rounds them: to nearest, ties away from zero."""
    return (x.contiguous().view(torch.int32) + 0x1000).bitwise_and(-0x2000).view(torch.float32)


# What is true


def case_of(task: Task) -> MhcCase:
    """The point of the test grid that a task would be."""
    tokens, n, h = task.args[_STREAMS[task.function]].shape
    return MhcCase("", task.function, (tokens,), n, h)


def exact(task: Task) -> Tensors:
    """Results of the definition in float64, which rounds where the contract says so, some tokens at a time."""
    case, per_token = case_of(task), _PER_TOKEN[task.function]
    step = max(1, CHUNK // (case.n_streams * case.n_cols))
    parts = [_exact_part(task, slice(start, start + step)) for start in range(0, case.lead[0], step)]
    each = list(zip(*parts, strict=True))
    if task.direction == "forward":
        return tuple(map(torch.cat, each))
    return tuple(
        torch.cat(grads) if place < per_token else torch.stack(grads).sum(0)
        for place, grads in zip(task.wrt, each, strict=True)
    )


def _exact_part(task: Task, tokens: slice) -> Tensors:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()[tokens].requires_grad_(tensor.requires_grad)

    per_token = _PER_TOKEN[task.function]
    args = (*map(cut, task.args[:per_token]), *task.args[per_token:])
    part = replace(task, args=args, grads=tuple(grad[tokens] for grad in task.grads))
    case, rounds = case_of(part), {} if task.dtype == torch.float64 else {ROUNDS: task.dtype}
    return evaluate(lambda *args, **kwargs: case.definition(Arguments(args, kwargs | rounds)), part.in_double())


def reduced(task: Task) -> tuple[int, ...]:
    """How many rows each result sums over: gradients as in the test grid; forward, mixes of float32 streams."""
    case = case_of(task)
    if task.direction == "backward":
        rows = case.summed_rows(Arguments(task.args, {}))
        return tuple(rows[place] for place in task.wrt)
    sums = task.function != POST and task.dtype not in HALVES
    return (case.n_streams * case.n_cols if sums else 1,) * _N_RESULTS[task.function]


def with_fn(task: Task, weights: Change) -> Task:
    """The task with other weights ``fn``; the task itself if it has none."""
    if task.function == POST:
        return task
    at = _PER_TOKEN[task.function]
    fn = task.args[at]
    changed = weights(fn.detach()).requires_grad_(fn.requires_grad)
    return replace(task, args=(*task.args[:at], changed, *task.args[at + 1 :]))


def judge_halves(
    weights: Change,
    by: Callable[[Task], Tensors],
    task: Task,
    results: Tensors,
    expected: Tensors,
    truth: Tensors,
) -> str:
    """Why results of ``mhc_post_pre`` are wrong; empty if they are right.

    The second half is held against ``mhc_pre`` of the streams that came, so that a rounding of theirs that fell the
    other way counts once and not again in all that follows from it.
    """
    wrong = disagreement("the new streams:", results[:1], expected[:1], truth[:1])
    if wrong:
        return wrong
    second = with_fn(replace(task, function=PRE, args=(results[0], *task.args[4:])), weights)
    return disagreement("result", results[1:], by(second), exact(second), reduced(second))


def formulation(
    name: str,
    weights: Change = _as_it_is,
    *,
    by: Callable[[Task], Tensors] = by_reference,
    halves: bool = False,
    less_precise: str = "",
) -> Formulation:
    """Hyper-connections with these weights.

    Args:
        name: of the formulation.
        weights: what ``fn`` is rounded to, in float32.
        by: who evaluates the task with the rounded weights.
        halves: whether the results are those of ``mhc_post_pre``, to be judged by :func:`judge_halves`.
        less_precise: as in :class:`Formulation`.
    """
    return Formulation(
        name,
        evaluate=lambda task: by(with_fn(task, weights)),
        truth=lambda task: exact(with_fn(task, weights)),
        less_precise=less_precise,
        judges=partial(judge_halves, weights, by) if halves else None,
    )


DEFINITION = formulation("float32 arithmetic, fn as it is")


def _has_halves(task: Task) -> bool:
    return task.function == POST_PRE and task.direction == "forward"


def definition(task: Task) -> Formulation:
    """For who multiplies with ``fn`` as it is, and rounds nothing else than the contract."""
    return formulation(DEFINITION.name, halves=True) if _has_halves(task) else DEFINITION


def two_numbers(task: Task) -> Formulation:
    """For kernels that round ``fn`` beside streams of 16 bits as the contract allows."""
    if task.function == POST or task.dtype not in HALVES:
        return definition(task)
    return formulation("fn as a sum of two bfloat16 numbers", rounded_fn, halves=_has_halves(task))


def eager(task: Task) -> Formulation:
    """For plain PyTorch, whose new streams have a gradient in their own dtype."""
    if task.function != POST_PRE or task.direction == "forward" or task.dtype not in HALVES:
        return definition(task)
    return formulation(
        "fn as it is, the gradient of the new streams rounded",
        by=lambda task: evaluate(plain(task), task),
        less_precise="the gradient of the new streams is rounded before it goes on to the old ones",
    )


def compiled(task: Task) -> Formulation:
    """For a compiler, which may leave out the rounding of the new streams where it goes on with them."""
    if task.function != POST_PRE or task.dtype not in HALVES:
        return definition(task)
    rounds = "the gradient of the new streams may be rounded before it goes on to the old ones"
    return formulation(
        "fn as it is, mixes of the new streams before they are rounded or after",
        by=lambda task: evaluate(_unrounded, task),
        less_precise=rounds if task.direction == "backward" else "",
    )


def _unrounded(x: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor) -> Tensors:
    dtype = residual.dtype
    new = plain_post(x, residual, *rest[:2], rounded=False)
    seen = rounding_gradient(lambda grad: grad.to(dtype).to(grad.dtype))(new)
    *mixes, layer_input = plain_pre(seen, *rest[2:])
    return new.to(dtype), *mixes, layer_input.to(dtype)


def tf32(task: Task) -> Formulation:
    """For who multiplies with ``fn`` in tf32 on tensor cores, as TileKernels does."""
    return _narrow(task, "tf32", torch.float32, to_tf32, 8)


def streams_dtype(task: Task) -> Formulation:
    """For who multiplies with ``fn`` in the streams' dtype, as Liger does on tensor cores."""
    dtype = task.dtype
    return _narrow(task, str(dtype).removeprefix("torch."), dtype, lambda x: x.to(dtype).to(x.dtype), 16)


def _narrow(task: Task, name: str, dtype: torch.dtype, rounding: Change, depth: int) -> Formulation:
    """For kernels that round ``fn`` and the gradient of its products, which they leave to tensor cores to add up, and
    have a gradient for each use of the streams.

    Args:
        task: what is judged.
        name: of what they round to.
        dtype: in which they take ``fn``, and so give its gradient.
        rounding: to what they round.
        depth: products that an instruction of a tensor core adds up.
    """
    if task.function == POST:
        return DEFINITION
    steps: dict[str, Any] = {"product": on_tensor_cores(depth, rounding)}
    if task.direction == "forward":
        return formulation(
            f"fn in {name}, sums in tensor cores",
            rounding,
            by=lambda task: evaluate(plain(task, **steps), task),
            halves=_has_halves(task),
            less_precise=f"fn is rounded to {name}, and its products are added up in tensor cores",
        )
    steps["apart"] = True
    return formulation(
        f"fn and the gradient of its products in {name}, a rounded gradient for each use of the streams",
        rounding,
        by=lambda task: evaluate(plain(task, **steps), with_fn(task, lambda fn: fn.to(dtype))),
        less_precise=f"fn and the gradient of its products are rounded to {name}, the streams' gradient for each use",
    )
