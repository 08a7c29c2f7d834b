"""What only a run can tell: rules about values, and that what was loaded stays what it was."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.errors import ArgumentError, DTypeError, NpuError, NpuRunError
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.kernel import JitFunction
from tilewright.npu.rules import RULES

AT_RUN_TIME = {rule.code for rule in RULES if rule.when == "run"}
ROWS, COLUMNS = 8, 64


@jit
def block(base, at, N: tl.constexpr, R: tl.constexpr):
    return tl.make_block_ptr(base, (N, R, 64), (R * 64, 64, 1), (at, 0, 0), (1, R, 64), (2, 1, 0))


@jit
def number(table, at, N: tl.constexpr, MAX: tl.constexpr = -1):
    return rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, at), (1, 1), (1, 0)), MAX)


@jit
def gather(x_ptr, table, out_ptr, B: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """Blocks of a tensor, in the order of a table."""
    for n in tl.static_range(N):
        pointer = block(x_ptr, number(table, n, N), B, R)
        tl.store(block(out_ptr, n, N, R), tl.load(pointer))


@jit
def append(cache, new, counts, P: tl.constexpr, L: tl.constexpr, R: tl.constexpr):
    """New rows behind those of the last partition that has some; a full one takes none."""
    for p in tl.static_range(P):
        count = number(counts, p, P, R)
        if rblib.partition_skip(count) == False:  # noqa: E712
            pointer = block(cache, p, P, R)
            rows = rblib.insert(rblib.dynamic_load(pointer, 1, count), tl.load(block(new, 0, 1, L)), 1, count)
            rblib.dynamic_store(pointer, rows, 1, count + L)


@jit
def half_written(x_ptr, out_ptr, R: tl.constexpr):
    tl.store(block(out_ptr, 1, 2, R), tl.load(block(x_ptr, 0, 2, R)))


@jit
def logarithm(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(block(x_ptr, 0, 1, R))
    tl.store(block(out_ptr, 0, 1, R), tl.log(x))


def line_of(kernel: JitFunction, text: str) -> tuple[int, int]:
    """Where a piece of a kernel's source stands."""
    lines = kernel.module.source.lines[kernel.node.lineno - 1 : kernel.node.end_lineno]
    (found,) = [(number, line.index(text)) for number, line in enumerate(lines) if text in line]
    return kernel.node.lineno + found[0], found[1] + 1


def failing(kernel: JitFunction, code: str, text: str, *args: Any) -> str:
    """The message of a run that has to fail at a piece of the kernel's source."""
    assert code in AT_RUN_TIME
    tensors = [each for each in args if isinstance(each, torch.Tensor)]
    program = kernel.warmup(*args)
    with pytest.raises(NpuRunError) as caught:
        program.run(*tensors)
    message = str(caught.value)
    line, column = line_of(kernel, text)
    assert message.startswith(f"{Path(__file__).name}:{line}:{column}: error[NPU-{code}] {kernel.name}: ")
    assert caught.value.code == code
    assert isinstance(caught.value, NpuError)
    return message


def blocks(count: int, rows: int = ROWS) -> torch.Tensor:
    return torch.arange(count * rows * COLUMNS, dtype=torch.float32).reshape(count, rows, COLUMNS)


def table(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.int32)


# BLOCK_NUMBER


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1])
def test_block_numbers_lie_inside_their_tensor(wrong: int) -> None:
    x, out = blocks(3), torch.empty(2, ROWS, COLUMNS)
    where = "tl.make_block_ptr(base, (N, R, 64)"
    program = gather.warmup(x, table(0, 0), out, 3, 2, ROWS)
    with pytest.raises(
        NpuRunError, match=rf"error\[NPU-BLOCK_NUMBER\] gather: block {wrong} of dimension 0 of 'x_ptr'"
    ) as caught:
        program.run(x, table(2, wrong), out)
    line, column = line_of(block, where)
    assert str(caught.value).startswith(f"{Path(__file__).name}:{line}:{column}: ")
    assert caught.value.code == "BLOCK_NUMBER"
    program.run(x, table(2, 0), out)
    torch.testing.assert_close(out, x[[2, 0]], rtol=0, atol=0)


def test_counts_lie_inside_their_axis() -> None:
    cache, new = blocks(1), blocks(1, 1)
    message = failing(append, "BLOCK_NUMBER", "rblib.dynamic_load(pointer", cache, new, table(ROWS + 1), 1, 1, ROWS)
    assert f"index {ROWS + 1} on an axis of {ROWS}" in message


# STRADDLE


def test_rows_that_are_inserted_fit_into_their_partition() -> None:
    cache, new = blocks(2), blocks(1, 3)
    message = failing(append, "STRADDLE", "rblib.insert(", cache, new, table(ROWS - 2, 0), 2, 3, ROWS)
    assert f"3 rows from {ROWS - 2} on do not fit into a partition of {ROWS}: 1 would be lost" in message


@pytest.mark.parametrize(
    ("counts", "partition", "first"),
    [((0, 0), 0, 0), ((ROWS - 3, 0), 0, ROWS - 3), ((ROWS, 0), 1, 0), ((ROWS, ROWS - 3), 1, ROWS - 3)],
)
def test_a_full_partition_takes_no_row_if_the_next_one_does(
    counts: tuple[int, int], partition: int, first: int
) -> None:
    cache, new = blocks(2), -1.0 - blocks(1, 3)
    expected = cache.clone()
    expected[partition, first : first + 3] = new[0]
    append.warmup(cache, new, table(*counts), 2, 3, ROWS).run(cache, new, table(*counts))
    kept = torch.tensor(
        [[row < count or (p, row) >= (partition, first) for row in range(ROWS)] for p, count in enumerate(counts)]
    )
    torch.testing.assert_close(cache[kept], expected[kept], rtol=0, atol=0)
    torch.testing.assert_close(cache[partition, first : first + 3], new[0], rtol=0, atol=0)


def test_rows_go_somewhere() -> None:
    cache, new = blocks(2), blocks(1, 1)
    message = failing(append, "STRADDLE", "rblib.insert(", cache, new, table(ROWS, ROWS), 2, 1, ROWS)
    assert "every partition is full: the rows would be lost" in message
    program = append.warmup(cache, new, table(0, 0), 2, 1, ROWS)
    program.run(cache, new, table(ROWS, ROWS), check=False)  # as a device would: nothing happens
    torch.testing.assert_close(cache, blocks(2), rtol=0, atol=0)


# UNWRITTEN_OUTPUT


def test_every_element_of_an_output_is_written() -> None:
    x, out = blocks(2), torch.empty(2, ROWS, COLUMNS)
    message = failing(half_written, "UNWRITTEN_OUTPUT", "def half_written", x, out, ROWS)
    assert f"output 'out_ptr': {ROWS * COLUMNS} of {2 * ROWS * COLUMNS} elements are never written" in message
    assert message.endswith("the first one at (0, 0, 0)")
    half_written.warmup(x, out, ROWS).run(x, out, check=False)
    torch.testing.assert_close(out[1], x[0], rtol=0, atol=0)


# NAN_OUTPUT


def test_finite_inputs_give_finite_outputs() -> None:
    x, out = 1.0 + blocks(1), torch.empty(1, ROWS, COLUMNS)
    program = logarithm.warmup(x, out, ROWS)
    line, column = line_of(logarithm, "tl.store")
    where = re.escape(f"{Path(__file__).name}:{line}:{column}: warning[NPU-NAN_OUTPUT] logarithm: 1 elements of output")
    for wrong in (-1.0, 0.0):
        x[0, 1, 2] = wrong
        with pytest.warns(RuntimeWarning, match=where):
            program.run(x, out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x[0, 1, 2] = float("nan")  # what comes in may go out
        program.run(x, out)
        x[0, 1, 2] = -1.0
        program.run(x, out, check=False)
    assert out[0, 1, 2].isnan()


def test_every_rule_of_a_run_is_tested() -> None:
    tested = set(re.findall(r"^# ([A-Z_]+)$", Path(__file__).read_text(), re.MULTILINE))
    assert tested == AT_RUN_TIME


# Memory


@jit
def exchange(x_ptr, y_ptr, R: tl.constexpr):
    x, y = tl.load(block(x_ptr, 0, 1, R)), tl.load(block(y_ptr, 0, 1, R))
    tl.store(block(x_ptr, 0, 1, R), y)
    tl.store(block(y_ptr, 0, 1, R), x)


def test_what_was_loaded_stays_what_it_was() -> None:
    x, y = blocks(1), -blocks(1)
    exchange.warmup(x, y, ROWS).run(x, y)
    torch.testing.assert_close(x, -blocks(1), rtol=0, atol=0)
    torch.testing.assert_close(y, blocks(1), rtol=0, atol=0)


@jit
def twice(x_ptr, y_ptr, R: tl.constexpr):
    first = tl.load(block(x_ptr, 0, 1, R))
    tl.store(block(y_ptr, 0, 1, R), first + 1.0)
    second = tl.load(block(x_ptr, 0, 1, R))
    tl.store(block(y_ptr, 0, 1, R), first + second)


def test_one_tensor_as_two_arguments() -> None:
    """Loads and stores happen in the order of the kernel, whatever names their memory has."""
    x, y = blocks(1), torch.zeros(1, ROWS, COLUMNS)
    program = twice.warmup(x, y, ROWS)
    program.run(x, y)
    torch.testing.assert_close(y, 2 * blocks(1), rtol=0, atol=0)
    program.run(x, x)
    torch.testing.assert_close(x, 2 * blocks(1) + 1.0, rtol=0, atol=0)


@jit
def padded(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    for at in tl.static_range(0, C, W):
        p = tl.make_block_ptr(x_ptr, (R, C), (C, 1), (0, at), (R, W), (1, 0))
        q = tl.make_block_ptr(out_ptr, (R, C), (C, 1), (0, at), (R, W), (1, 0))
        tl.store(q, tl.load(p) + 1.0)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_behind_the_last_dimension_are_zeros_and_what_is_written_there_is_lost(width: int) -> None:
    """A tensor of 80 columns is one of 128 for the kernel, in blocks that may lie in the padding altogether."""
    x, out = torch.randn(3, 80), torch.full((3, 80), float("nan"))
    padded.warmup(x, out, 3, 128, width).run(x, out)
    torch.testing.assert_close(out, x + 1.0, rtol=0, atol=0)


def test_tensors_are_those_that_the_program_was_compiled_for() -> None:
    x, out = blocks(1), torch.empty(1, ROWS, COLUMNS)
    program = logarithm.warmup(x, out, ROWS)
    with pytest.raises(ArgumentError, match="got 1"):
        program.run(x)
    with pytest.raises(ArgumentError, match=r"got shape \(1, 9, 64\), expected \(1, 8, 64\)"):
        program.run(blocks(1, ROWS + 1), out)
    with pytest.raises(DTypeError, match="got fp64, expected fp32"):
        program.run(x.double(), out)
    with pytest.raises(ArgumentError, match="is not contiguous"):
        program.run(torch.empty(1, COLUMNS, ROWS).mT, out)
