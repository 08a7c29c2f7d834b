"""Programs as linalg on tensors, compiled by upstream MLIR for the CPU and held against the executor."""

from collections.abc import Sequence
from dataclasses import replace

import iree.compiler
import iree.runtime
import numpy as np
import pytest
import torch
from attention_cases import Case, assert_same, cache_after, compiled, dense, judged, prepared, tensors

from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.backends.linalg import lower
from tilewright.npu.executor import FUNCTIONS, causal_mask, softmax, window_mask
from tilewright.npu.ir.text import parse_program
from tilewright.npu.kernel import JitFunction
from tilewright.npu.kernels.flash_attention import flash_attention
from tilewright.npu.kernels.flash_causal_attention import flash_causal_attention
from tilewright.npu.kernels.sliding_window_attention import sliding_window_attention
from tilewright.npu.program import Program
from tilewright.numerics import compare, difference

Tensors = Sequence[torch.Tensor]
Outputs = dict[str, torch.Tensor]


class Native:
    """A program that MLIR has compiled for this machine. Of the tensors it is given it changes none."""

    def __init__(self, program: Program) -> None:
        self.program = program
        binary = iree.compiler.compile_str(
            lower(program),
            target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=generic"],
        )
        context = iree.runtime.SystemContext(config=iree.runtime.Config("local-sync"))
        context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, binary))
        self.function = context.modules.module[program.name]

    def __call__(self, given: Tensors) -> Outputs:
        """What it writes, by name."""
        infos = self.program.manifest.arguments
        taken = [each.numpy() for each, info in zip(given, infos, strict=True) if not info.is_output]
        results = self.function(*taken)
        results = results if isinstance(results, tuple | list) else [results]
        names = [info.name for info in infos if info.role in {"inout", "out"}]
        return {name: torch.from_numpy(np.array(each.to_host())) for name, each in zip(names, results, strict=True)}


def executed(program: Program, given: Tensors) -> Outputs:
    """What the executor writes; what it does not write of an output is NaN."""
    pairs = list(zip(program.manifest.arguments, given, strict=True))
    copies = [torch.full_like(each, torch.nan) if info.is_output else each.clone() for info, each in pairs]
    program.run(*copies, check=False)
    return {info.name: each for (info, _), each in zip(pairs, copies, strict=True) if info.role in {"inout", "out"}}


def both(kernel: JitFunction, *arguments: object) -> tuple[Outputs, Outputs]:
    """What MLIR and the executor make of a kernel's arguments."""
    program = kernel.warmup(*arguments, grid=(1,), profile="tile")
    given = [each for each in arguments if isinstance(each, torch.Tensor)]
    return Native(program)(given), executed(program, given)


def assert_agrees(result: torch.Tensor, expected: torch.Tensor, truth: torch.Tensor, what: object = "") -> None:
    agreement = compare(result, expected, truth)
    assert agreement.ok, f"{what}: {agreement}"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@jit
def get2(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.load(tl.make_block_ptr(ptr, (ROWS, COLS), (COLS, 1), (0, 0), (ROWS, COLS), (1, 0)))


@jit
def get3(ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    return tl.load(tl.make_block_ptr(ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0)))


@jit
def put2(ptr, value, ROWS: tl.constexpr, COLS: tl.constexpr):
    tl.store(tl.make_block_ptr(ptr, (ROWS, COLS), (COLS, 1), (0, 0), (ROWS, COLS), (1, 0)), value)


@jit
def put3(ptr, value, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    tl.store(tl.make_block_ptr(ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0)), value)


@jit
def put_row(ptr, value, at: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    to = tl.make_block_ptr(ptr, (COUNT, ROWS, COLS), (ROWS * COLS, COLS, 1), (at, 0, 0), (1, ROWS, COLS), (2, 1, 0))
    tl.store(to, tl.reshape(value, (1, ROWS, COLS)))


@jit
def number(ptr, at: tl.constexpr, COUNT: tl.constexpr):
    return rblib.to_dynamic_index(tl.make_block_ptr(ptr, (COUNT,), (1,), (at,), (1,), (0,)))


# Elements

ELEMENTWISE = (
    "abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "neg", "rsqrt", "sigmoid", "sin", "sqrt",
    "add", "sub", "mul", "div", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne",
)  # fmt: skip
OF_POSITIVE = {"log", "log2", "rsqrt", "sqrt"}


@jit
def elements(x_ptr, y_ptr, scale, out_ptr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x, y = get2(x_ptr, R, C), get2(y_ptr, R, C)
    positive = tl.abs(x) + 0.125
    put_row(out_ptr, tl.abs(x), 0, N, R, C)
    put_row(out_ptr, tl.ceil(x), 1, N, R, C)
    put_row(out_ptr, tl.cos(x), 2, N, R, C)
    put_row(out_ptr, tl.erf(x), 3, N, R, C)
    put_row(out_ptr, tl.exp(x), 4, N, R, C)
    put_row(out_ptr, tl.exp2(x), 5, N, R, C)
    put_row(out_ptr, tl.floor(x), 6, N, R, C)
    put_row(out_ptr, tl.log(positive), 7, N, R, C)
    put_row(out_ptr, tl.log2(positive), 8, N, R, C)
    put_row(out_ptr, -x, 9, N, R, C)
    put_row(out_ptr, tl.rsqrt(positive), 10, N, R, C)
    put_row(out_ptr, tl.sigmoid(x), 11, N, R, C)
    put_row(out_ptr, tl.sin(x), 12, N, R, C)
    put_row(out_ptr, tl.sqrt(positive), 13, N, R, C)
    put_row(out_ptr, x + y, 14, N, R, C)
    put_row(out_ptr, x - y, 15, N, R, C)
    put_row(out_ptr, x * y, 16, N, R, C)
    put_row(out_ptr, tl.fdiv(x, y), 17, N, R, C)
    put_row(out_ptr, tl.maximum(x, y), 18, N, R, C)
    put_row(out_ptr, tl.minimum(x, y), 19, N, R, C)
    put_row(out_ptr, tl.where(x < y, 1.0, 0.0), 20, N, R, C)
    put_row(out_ptr, tl.where(x <= y, 1.0, 0.0), 21, N, R, C)
    put_row(out_ptr, tl.where(x > y, 1.0, 0.0), 22, N, R, C)
    put_row(out_ptr, tl.where(x >= y, 1.0, 0.0), 23, N, R, C)
    put_row(out_ptr, tl.where(x == y, 1.0, 0.0), 24, N, R, C)
    put_row(out_ptr, tl.where(x != y, 1.0, 0.0), 25, N, R, C)
    put_row(out_ptr, tl.where(x > 0.5, x * scale, tl.zeros((R, C), tl.float32)), 26, N, R, C)


def test_functions_of_elements() -> None:
    x, y, scale = normal(16, 32), normal(16, 32, seed=1), torch.tensor(0.75, dtype=torch.float16)
    x[0, :8] = y[0, :8]
    x[1, 0], y[1, 1], x[2, :2] = torch.nan, torch.nan, torch.tensor([torch.inf, -torch.inf])
    count = len(ELEMENTWISE) + 1
    got, expected = both(elements, x, y, scale, torch.empty(count, 16, 32), count, 16, 32)
    a, b = x.double(), y.double()
    for row, name in enumerate(ELEMENTWISE):
        one = (x.abs() + 0.125).double() if name in OF_POSITIVE else a
        given = (one,) if row < ELEMENTWISE.index("add") else (a, b)
        result, other = got["out_ptr"][row], expected["out_ptr"][row]
        if name in {"cos", "sin"}:  # MLIR's polynomials are off by a few roundings of one
            assert not difference(result, other, differs=True), name
        else:
            assert_agrees(result, other, FUNCTIONS[name](*given).double(), name)
    assert_same(got["out_ptr"][-1], expected["out_ptr"][-1])


# Reductions and products


@jit
def reductions(x_ptr, first, second, last, rows, all_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = get3(x_ptr, A, B, C)
    put3(first, tl.max(x, axis=0, keep_dims=True), 1, B, C)
    put3(second, tl.min(x, axis=1, keep_dims=True), A, 1, C)
    put3(last, tl.sum(x, axis=2, keep_dims=True), A, B, 1)
    # What is reduced is used as any tensor: repeated, transposed, reduced again, without the axis.
    centred = tl.trans(x - tl.max(x, axis=2, keep_dims=True), 0, 2, 1)
    put2(
        rows, tl.sum(centred * tl.broadcast_to(tl.sum(x, axis=1, keep_dims=True), A, B, C).trans(0, 2, 1), axis=1), A, B
    )
    repeated = tl.sum(tl.broadcast_to(tl.max(x, axis=2, keep_dims=True), A, B, C), axis=2)
    put2(all_ptr, tl.reshape(tl.sum(repeated) + tl.max(x) - tl.min(x), 1, 1), 1, 1)


def test_reductions_of_every_axis() -> None:
    x = normal(3, 5, 24)
    outputs = [torch.empty(shape) for shape in ((1, 5, 24), (3, 1, 24), (3, 5, 1), (3, 5), (1, 1))]
    got, expected = both(reductions, x, *outputs, 3, 5, 24)

    def truth(x: torch.Tensor) -> list[torch.Tensor]:
        centred = (x - x.amax(2, keepdim=True)) * x.sum(1, keepdim=True)
        total = x.amax(2).sum() * 24 + x.max() - x.min()
        return [
            x.amax(0, keepdim=True),
            x.amin(1, keepdim=True),
            x.sum(2, keepdim=True),
            centred.sum(2),
            total.reshape(1, 1),
        ]

    for (name, result), exact in zip(got.items(), truth(x.double()), strict=True):
        assert_agrees(result, expected[name], exact, name)


@jit
def products(
    x_ptr, y_ptr, q_ptr, k_ptr, flat, matrix, deep,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    x, y = get3(x_ptr, N, M, K), get3(y_ptr, N, K, M)
    put3(flat, tl.dot(x, y), N, M, M)
    put2(matrix, tl.dot(tl.reshape(x, N * M, K), tl.reshape(tl.trans(x, 2, 0, 1), K, N * M)), N * M, N * M)
    q = tl.reshape(get3(q_ptr, H * G, M, K), 1, H, G, M, K)
    k = tl.broadcast_to(tl.permute(tl.reshape(get3(k_ptr, H, M, K), 1, H, 1, M, K), 0, 1, 2, 4, 3), 1, H, G, K, M)
    put3(deep, tl.reshape(tl.dot(q, k), H * G, M, M), H * G, M, M)


def test_products_of_any_rank() -> None:
    n, m, k, h, g = 2, 8, 24, 3, 2
    x, y, q, keys = normal(n, m, k), normal(n, k, m, seed=1), normal(h * g, m, k, seed=2), normal(h, m, k, seed=3)
    outputs = torch.empty(n, m, m), torch.empty(n * m, n * m), torch.empty(h * g, m, m)
    got, expected = both(products, x, y, q, keys, *outputs, n, m, k, h, g)
    rows = x.double().flatten(0, 1)
    truths = {
        "flat": x.double() @ y.double(),
        "matrix": rows @ rows.T,
        "deep": q.double() @ keys.double().repeat_interleave(g, 0).transpose(1, 2),
    }
    for name, truth in truths.items():
        assert_agrees(got[name], expected[name], truth, name)


# Shapes and memory


@jit
def moves(x_ptr, a_ptr, b_ptr, c_ptr, d_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = get3(x_ptr, A, B, C)
    put3(a_ptr, tl.permute(x, 2, 0, 1), C, A, B)
    first = tl.load(tl.make_block_ptr(x_ptr, (A, B, C), (B * C, C, 1), (1, 0, 2), (1, B, 2), (2, 1, 0)))
    wide = tl.broadcast_to(tl.expand_dims(tl.trans(first), (1, 2)), (1, A, 3, 2, B))
    put3(b_ptr, tl.reshape(tl.trans(wide, 4, 3, 0, 2, 1), B * 2, 3, A), B * 2, 3, A)
    chosen = tl.where(tl.broadcast_to(tl.reshape(first > 0, B, 1, 2), B, A, 2), 1.0, -1.0)
    put3(c_ptr, tl.reshape(tl.reshape(chosen, B * A * 2), 2, A, B), 2, A, B)
    for row in tl.static_range(A):  # an output that is written piece by piece, the last one over another
        piece = tl.make_block_ptr(d_ptr, (A, B, C), (B * C, C, 1), (row, 0, 0), (1, B, C), (2, 1, 0))
        tl.store(piece, tl.zeros((1, B, C), tl.float32) + row)
    tl.store(
        tl.advance(tl.make_block_ptr(d_ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (1, B, 2), (2, 1, 0)), (1, 0, 2)),
        first,
    )


def test_shapes() -> None:
    x = normal(3, 5, 4)
    outputs = torch.empty(4, 3, 5), torch.empty(10, 3, 3), torch.empty(2, 3, 5), torch.empty(3, 5, 4)
    got, expected = both(moves, x, *outputs, 3, 5, 4)
    assert got.keys() == {"a_ptr", "b_ptr", "c_ptr", "d_ptr"}
    for name, result in got.items():
        assert_same(result, expected[name])


@jit
def cache_rows(
    cache, new, table, loaded, inserted, joined, last, padded,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NEW: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block, start, until = number(table, 0, 3), number(table, 1, 3), number(table, 2, 3)
    there = tl.make_block_ptr(
        cache, (BLOCKS, ROWS, COLS), (ROWS * COLS, COLS, 1), (block, 0, 0), (1, ROWS, COLS), (2, 1, 0)
    )
    rows, update = rblib.dynamic_load(there, 1, start), get3(new, 1, NEW, COLS)
    put3(loaded, rows, 1, ROWS, COLS)
    with_new = rblib.insert(rows, update, 1, start)
    put3(inserted, with_new, 1, ROWS, COLS)
    rblib.dynamic_store(there, with_new * 2.0, 1, until + 1)
    everything = rblib.window_insert(rblib.dynamic_load(there), update, 1, start)
    put3(joined, everything, 1, ROWS + NEW, COLS)
    put3(last, rblib.window_slice(everything, until, 1, SIZE), 1, SIZE, COLS)
    put3(padded, rblib.nn_pad(update, -3.0, 1, (1, 2)), 1, NEW + 3, COLS)


def test_rows_of_a_cache_at_places_that_are_read() -> None:
    blocks, rows, cols, new, size = 4, 8, 12, 3, 5
    cache, update = normal(blocks, rows, cols), normal(1, new, cols, seed=1)
    shapes = rows, rows, rows + new, size, new + 3
    outputs = [torch.empty(1, each, cols) for each in shapes]
    sizes = blocks, rows, cols, new, size
    for dtype in (torch.int32, torch.int64):
        table = torch.zeros(3, dtype=dtype)
        program = cache_rows.warmup(cache, update, table, *outputs, *sizes, grid=(1,), profile="tile")
        native = Native(program)
        # All fits; nothing is there yet; rows are clipped; a full block, whose store is clipped; a store of one row.
        for block, start, until in ((2, 3, 5), (0, 0, 2), (3, rows - 1, rows), (1, rows, rows), (1, 2, 0)):
            given = [cache, update, torch.tensor([block, start, until], dtype=dtype), *outputs]
            got, expected = native(given), executed(program, given)
            assert got.keys() == {"cache", "loaded", "inserted", "joined", "last", "padded"}
            for name, result in got.items():
                assert_same(result, expected[name])


@jit
def columns(x_ptr, y_ptr, out_ptr, table, R: tl.constexpr, C: tl.constexpr):
    at, until = number(table, 0, 2), number(table, 1, 2)
    x = tl.load(tl.make_block_ptr(x_ptr, (R, C), (C, 1), (0, 64), (R, 64), (1, 0)))
    y = tl.load(tl.make_block_ptr(y_ptr, (R, C), (C, 1), (0, at), (R, 64), (1, 0)))
    tl.store(tl.make_block_ptr(y_ptr, (R, C), (C, 1), (0, at), (R, 64), (1, 0)), x + 1.0)
    rblib.dynamic_store(tl.make_block_ptr(x_ptr, (R, C), (C, 1), (0, 64), (R, 64), (1, 0)), y + x, 0, until)
    put2(out_ptr, tl.load(tl.make_block_ptr(x_ptr, (R, C), (C, 1), (0, 0), (R, C), (1, 0))) + 1.0, R, C)


def test_columns_in_the_padding() -> None:
    x, y, out = normal(6, 80), normal(6, 80, seed=1), torch.empty(6, 80)
    table = torch.zeros(2, dtype=torch.int32)
    program = columns.warmup(x, y, out, table, 6, 128, grid=(1,), profile="hw-0.11.1")
    assert [info.seen_shape for info in program.manifest.arguments] == [(6, 128)] * 3 + [None]
    native = Native(program)
    for at, until in ((0, 6), (64, 2), (3, 0)):
        given = [x, y, out, torch.tensor([at, until], dtype=torch.int32)]
        got, expected = native(given), executed(program, given)
        for name, result in got.items():
            assert_same(result, expected[name])


@jit
def either(x_ptr, y_ptr, counts, out_ptr, R: tl.constexpr, C: tl.constexpr):
    scaled = x = get2(x_ptr, R, C)
    count = rblib.to_dynamic_index(tl.make_block_ptr(counts, (2,), (1,), (1,), (1,), (0,)), 4)
    if rblib.partition_skip(count) == False:  # noqa: E712
        put2(y_ptr, get2(y_ptr, R, C) + x, R, C)
    else:
        scaled = x * 2.0
        put2(y_ptr, get2(y_ptr, R, C) - x, R, C)
    put2(out_ptr, get2(y_ptr, R, C) + scaled, R, C)


def test_both_branches_write() -> None:
    x, y, out = normal(2, 8), normal(2, 8, seed=1), torch.empty(2, 8)
    counts = torch.zeros(2, dtype=torch.int32)
    program = either.warmup(x, y, counts, out, 2, 8, grid=(1,), profile="tile")
    native = Native(program)
    for filled in ([3, 0], [4, 0], [4, 1]):  # the partition behind an open one is skipped
        given = [x, y, torch.tensor(filled, dtype=torch.int32), out]
        got, expected = native(given), executed(program, given)
        for name, result in got.items():
            assert_same(result, expected[name])


@jit
def zero(out_ptr, R: tl.constexpr, C: tl.constexpr):
    put2(out_ptr, tl.zeros((R, C), tl.float32), R, C)


def test_a_constant_of_several_numbers() -> None:
    out = torch.empty(2, 2)
    program = zero.warmup(out, 2, 2, grid=(1,), profile="tile")
    numbers = "dense<[[1.0, 2.0], [3.0, 4.0]]>"
    text = program.text.replace("dense<0.000000e+00>", numbers)
    table = replace(program, module=parse_program(text))
    assert_same(Native(table)([out])["out_ptr"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


# Softmax


@jit
def softmaxes(
    x_ptr, mask_ptr, table, out_ptr,
    N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    x, mask, index = get2(x_ptr, R, C), get2(mask_ptr, 1, C), number(table, 0, 1)
    put_row(out_ptr, rblib.softmax(x), 0, N, R, C)
    put_row(out_ptr, rblib.masked_softmax(x, mask > 0.5), 1, N, R, C)
    put_row(out_ptr, rblib.dynamic_masked_softmax(x, index), 2, N, R, C)
    put_row(out_ptr, rblib.window_softmax(x, index, WINDOW), 3, N, R, C)
    first, e, total = rblib.flash_attn_tile(x, mask)
    second, f, more = rblib.flash_attn_tile(x * 2.0, mask, first)
    total, weighted = rblib.flash_attn_recompute(first, second, total, more, e, f)
    put_row(out_ptr, weighted / total, 4, N, R, C)


def test_every_softmax() -> None:
    rows, columns, window = 6, 20, 4
    x = normal(rows, columns) * 4
    mask = (torch.arange(columns)[None] % 3 > 0).float()
    out = torch.empty(5, rows, columns)
    arguments = [x, mask, torch.zeros(1, dtype=torch.int32), out]
    program = softmaxes.warmup(*arguments, 5, rows, columns, window, grid=(1,), profile="tile")
    native = Native(program)
    for index in (0, 7, columns, columns + window):  # in the last one the windows of all rows lie behind the columns
        given = [x, mask, torch.tensor([index], dtype=torch.int32), out]
        got, expected = native(given)["out_ptr"], executed(program, given)["out_ptr"]
        wide, shown = x.double(), mask.expand(rows, columns) > 0
        both_tiles = torch.cat([wide, 2 * wide], -1).masked_fill(~shown.repeat(1, 2), -torch.inf).softmax(-1)
        truths = [
            softmax(wide),
            softmax(wide, shown),
            softmax(wide, causal_mask(wide, index)),
            softmax(wide, window_mask(wide, index, window)),
            both_tiles[:, :columns] + both_tiles[:, columns:],
        ]
        for row, truth in enumerate(truths):
            assert_agrees(got[row], expected[row], truth, (row, index))
    assert bool(got[3].isnan().all())


# Attention


@pytest.mark.parametrize(
    ("kernel", "case", "others", "profile"),
    [
        (flash_causal_attention, Case((20,), 3, prefill=True), ((0,), (64,), (189,)), "tile"),
        (flash_causal_attention, Case((128, 20)), ((0, 191), (63, 64)), "tile"),
        (flash_causal_attention, Case((70,), 2, prefill=True, head_dim=80, partitions=2), ((0,),), "hw-0.11.1"),
        (flash_attention, Case((70,), 2, partitions=2), ((0,), (126,)), "tile"),
    ],
    ids=["prefill", "decode", "padded", "masked"],
)
def test_flash_attention(kernel: JitFunction, case: Case, others: Sequence[tuple[int, ...]], profile: str) -> None:
    program = compiled(kernel, prepared(tensors(case)), profile=profile)
    native = Native(program)
    for positions in (case.positions, *others):  # one program for all of them
        step = replace(case, positions=positions)
        given = tensors(step)
        values = prepared(given)
        got = native([values[info.name] for info in program.manifest.arguments])
        agreement = judged(got["output"], lambda dtype: dense(step, given, dtype, kernel is flash_attention), case.keys)  # noqa: B023
        assert agreement.ok, f"{step}: {agreement}"
        assert_same(got["kv_cache"], cache_after(step, given))


def test_attention_to_a_window() -> None:
    given = prepared(tensors(Case((0, 0), query_len=2, partition=8, partitions=1))) | {
        "cache_seq_len": torch.tensor([[5], [8]], dtype=torch.int32),
        "cache_offset": torch.tensor([[7], [10]], dtype=torch.int32),
    }
    given["kv_cache"] = normal(*given["kv_cache"].shape)
    program = compiled(sliding_window_attention, given, profile="tile")
    values = [given[info.name] for info in program.manifest.arguments]
    got, expected = Native(program)(values), executed(program, values)
    assert_same(got["kv_cache"], expected["kv_cache"])
    keys, fresh = given["kv_cache"][:, given["block_table"][:, 0].long()], (given["key"], given["value"])
    for batch, start in enumerate((5, 8)):
        k, v = (torch.cat([keys[n, batch, ..., :start, :], fresh[n][batch]], -2).double() for n in (0, 1))
        scores = given["query"][batch].double() @ k.transpose(-1, -2) * given["qk_scale"].double()
        truth = softmax(scores, window_mask(scores, start, 8)) @ v
        assert_agrees(got["output"][batch], expected["output"][batch], truth, start)
