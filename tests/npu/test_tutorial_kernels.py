"""Small kernels of the kind that tutorials begin with, each compiled for the releases that are known, and run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.ir.text import parse_program
from tilewright.npu.kernel import JitFunction
from tilewright.npu.program import Program
from tilewright.npu.rounding import dlfloat16
from tilewright.numerics import compare


@jit
def add(x, y, out, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    x_ptr = tl.make_block_ptr(
        base=x,
        shape=(BATCH, ROWS, COLS),
        strides=(ROWS * COLS, COLS, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, ROWS, BLOCK),
        order=(2, 1, 0),
    )
    y_ptr = tl.make_block_ptr(
        base=y,
        shape=(BATCH, ROWS, COLS),
        strides=(ROWS * COLS, COLS, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, ROWS, BLOCK),
        order=(2, 1, 0),
    )
    out_ptr = tl.make_block_ptr(
        base=out,
        shape=(BATCH, ROWS, COLS),
        strides=(ROWS * COLS, COLS, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, ROWS, BLOCK),
        order=(2, 1, 0),
    )
    for _ in tl.static_range(0, COLS, BLOCK):
        tl.store(out_ptr, tl.load(x_ptr) + tl.load(y_ptr))
        x_ptr = tl.advance(x_ptr, (0, 0, BLOCK))
        y_ptr = tl.advance(y_ptr, (0, 0, BLOCK))
        out_ptr = tl.advance(out_ptr, (0, 0, BLOCK))


@jit
def whole(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(
        base=x,
        shape=(A, B, C),
        strides=(B * C, C, 1),
        offsets=(0, 0, 0),
        block_shape=(A, B, C),
        order=(2, 1, 0),
    )


@jit
def softmax_by_steps(x, out, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    scores = tl.load(whole(x, BATCH, ROWS, COLS))
    exponentials = tl.exp(scores - tl.max(scores, axis=2, keep_dims=True))
    tl.store(whole(out, BATCH, ROWS, COLS), exponentials / tl.sum(exponentials, axis=2, keep_dims=True))


@jit
def softmax_at_once(x, out, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    scores = tl.load(whole(x, BATCH, ROWS, COLS))
    tl.store(whole(out, BATCH, ROWS, COLS), rblib.softmax(scores, axis=2))


@jit
def matmul(a, b, out, BATCH: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    product = tl.dot(tl.load(whole(a, BATCH, M, K)), tl.load(whole(b, BATCH, K, N)))
    tl.store(whole(out, BATCH, M, N), product)


@jit
def scaled_matmul(a, b, a_scale, b_scale, out, BATCH: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    left = tl.load(whole(a, BATCH, M, K)) * tl.load(whole(a_scale, BATCH, M, K))
    right = tl.load(whole(b, BATCH, K, N)) * tl.load(whole(b_scale, BATCH, K, N))
    tl.store(whole(out, BATCH, M, N), tl.dot(left, right))


@jit
def layer_norm(x, mean, inv_std, weight, bias, out, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    centred = tl.load(whole(x, BATCH, ROWS, COLS)) - tl.load(whole(mean, BATCH, ROWS, COLS))
    normalised = centred * tl.load(whole(inv_std, BATCH, ROWS, COLS))
    affine = normalised * tl.load(whole(weight, BATCH, ROWS, COLS)) + tl.load(whole(bias, BATCH, ROWS, COLS))
    tl.store(whole(out, BATCH, ROWS, COLS), affine)


@jit
def exponential(x, out, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    tl.store(whole(out, BATCH, ROWS, COLS), tl.exp(tl.load(whole(x, BATCH, ROWS, COLS))))


@jit
def tile(x, at, HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    return tl.make_block_ptr(
        base=x,
        shape=(HEADS, TOKENS, DIM),
        strides=(TOKENS * DIM, DIM, 1),
        offsets=(0, at, 0),
        block_shape=(HEADS, ROWS, DIM),
        order=(2, 1, 0),
    )


@jit
def flash_attention(
    q,
    k,
    v,
    out,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    Q_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
):
    for first_query in tl.static_range(0, TOKENS, Q_TILE):
        queries = tl.load(tile(q, first_query, HEADS, TOKENS, DIM, Q_TILE))
        row_max = tl.zeros((HEADS, Q_TILE, 1), dtype=tl.float32)
        row_sum = tl.zeros((HEADS, Q_TILE, 1), dtype=tl.float32)
        weighted = tl.zeros((HEADS, Q_TILE, DIM), dtype=tl.float32)
        for first_key in tl.static_range(0, TOKENS, KV_TILE):
            keys = tl.load(tile(k, first_key, HEADS, TOKENS, DIM, KV_TILE))
            values = tl.load(tile(v, first_key, HEADS, TOKENS, DIM, KV_TILE))
            scores = tl.dot(queries, tl.permute(keys, (0, 2, 1)))
            tile_max = tl.max(scores, axis=2, keep_dims=True)
            if first_key == 0:
                row_max = tile_max
                weights = tl.exp(scores - row_max)
                row_sum = tl.sum(weights, axis=2, keep_dims=True)
                weighted = tl.dot(weights, values)
            else:
                new_max = tl.maximum(row_max, tile_max)
                weights = tl.exp(scores - new_max)
                shrunk = tl.exp(row_max - new_max)
                row_sum = shrunk * row_sum + tl.sum(weights, axis=2, keep_dims=True)
                weighted = shrunk * weighted + tl.dot(weights, values)
                row_max = new_max
        tl.store(tile(out, first_query, HEADS, TOKENS, DIM, Q_TILE), weighted / row_sum)


@jit
def attention_at_once(q, k, v, out, HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr):
    keys = tl.permute(tl.load(whole(k, HEADS, TOKENS, DIM)), (0, 2, 1))
    weights = rblib.softmax(tl.dot(tl.load(whole(q, HEADS, TOKENS, DIM)), keys), axis=2)
    tl.store(whole(out, HEADS, TOKENS, DIM), tl.dot(weights, tl.load(whole(v, HEADS, TOKENS, DIM))))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def affine(
    x: torch.Tensor, mean: torch.Tensor, inv_std: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return (x - mean) * inv_std * weight + bias


@dataclass(frozen=True)
class Tutorial:
    """A kernel, what it computes, and on what.

    Attributes:
        kernel: the kernel.
        reference: the same in PyTorch.
        inputs: shapes of its inputs.
        output: shape of its output.
        constexprs: its constexprs.
        reduced: how many products or exponentials each element of the output sums.
    """

    kernel: JitFunction
    reference: Callable[..., torch.Tensor]
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    constexprs: tuple[int, ...] = field(default=())
    reduced: int = 1

    def tensors(self) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        return [*(torch.randn(shape, generator=g) for shape in self.inputs), torch.full(self.output, torch.nan)]

    def program(self, **options: Any) -> Program:
        return self.kernel.warmup(*self.tensors(), *self.constexprs, grid=(1,), **options)


ROWS = (2, 16, 256)
HEADS = (2, 512, 64)
SQUARE = (1, 64, 64)

TUTORIALS = (
    Tutorial(add, torch.add, ((4, 64, 1024),) * 2, (4, 64, 1024), (4, 64, 1024, 256)),
    Tutorial(softmax_by_steps, lambda x: x.softmax(-1), (ROWS,), ROWS, ROWS, 256),
    Tutorial(softmax_at_once, lambda x: x.softmax(-1), (ROWS,), ROWS, ROWS, 256),
    Tutorial(matmul, torch.matmul, (SQUARE, SQUARE), SQUARE, (1, 64, 64, 64), 64),
    Tutorial(layer_norm, affine, (ROWS,) * 5, ROWS, ROWS),
    Tutorial(flash_attention, attention, (HEADS,) * 3, HEADS, (*HEADS, 128, 256), 512),
    Tutorial(attention_at_once, attention, ((2, 128, 64),) * 3, (2, 128, 64), (2, 128, 64), 128),
    Tutorial(exponential, torch.exp, (ROWS,), ROWS, ROWS),
    Tutorial(scaled_matmul, lambda a, b, c, d: (a * c) @ (b * d), (SQUARE,) * 4, SQUARE, (1, 64, 64, 64), 64),
)

each_tutorial = pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda tutorial: tutorial.kernel.name)


@each_tutorial
def test_a_kernel_computes_what_it_says(tutorial: Tutorial) -> None:
    *inputs, output = tensors = tutorial.tensors()
    before = [each.clone() for each in inputs]
    tutorial.program().run(*tensors)
    reference, truth = tutorial.reference(*inputs), tutorial.reference(*(each.double() for each in inputs))
    agreement = compare(output, reference, truth, reduced=tutorial.reduced)
    assert agreement.ok, str(agreement)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


@each_tutorial
@pytest.mark.parametrize("name", ["doc", "hw-0.10.3", "hw-0.11.1", "tile"])
def test_a_kernel_breaks_no_rule(tutorial: Tutorial, name: str) -> None:
    program = tutorial.program(profile=name)
    assert program.diagnostics == ()
    assert [each.role for each in program.manifest.arguments] == ["in"] * len(tutorial.inputs) + ["out"]
    assert program.manifest.vector_inputs == len(tutorial.inputs)


@each_tutorial
def test_a_program_that_is_read_again_computes_the_same(tutorial: Tutorial) -> None:
    program, tensors, again = tutorial.program(), tutorial.tensors(), tutorial.tensors()
    program.run(*tensors)
    Program(parse_program(program.text, program.name), program.manifest).run(*again)
    assert torch.equal(tensors[-1], again[-1])


def test_layer_norm_is_that_of_pytorch_when_its_statistics_are() -> None:
    tutorial = next(each for each in TUTORIALS if each.kernel is layer_norm)
    x, *_ = tensors = tutorial.tensors()
    weight, bias = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    statistics = (mean, torch.rsqrt(variance + 1e-5), weight, bias)
    tensors[1:5] = [each.expand(ROWS).contiguous() for each in statistics]
    tutorial.program().run(*tensors)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x.to(dtype), (256,), weight.to(dtype), bias.to(dtype), 1e-5)

    agreement = compare(tensors[-1], reference(torch.float32), reference(torch.float64), reduced=256)
    assert agreement.ok, str(agreement)


def test_the_devices_numbers_round_each_operation() -> None:
    tutorial = next(each for each in TUTORIALS if each.kernel is add)
    x, y, out = tensors = tutorial.tensors()
    tutorial.program().run(*tensors, compute_dtype="dlfloat16")
    assert torch.equal(out, dlfloat16(dlfloat16(x) + dlfloat16(y)))
    assert not torch.equal(out, x + y)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "dlfloat16"])
@each_tutorial
def test_the_devices_numbers_are_coarser(tutorial: Tutorial, compute_dtype: str) -> None:
    exact, coarse = tutorial.tensors(), tutorial.tensors()
    program = tutorial.program()
    program.run(*exact)
    program.run(*coarse, compute_dtype=compute_dtype)
    truth = tutorial.reference(*(each.double() for each in exact[:-1]))
    errors = [float((each[-1].double() - truth).norm() / truth.norm()) for each in (exact, coarse)]
    assert errors[0] < errors[1] < 1
