"""Kernels whose sizes are symbols."""

import ast
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from front_helpers import (
    HEAD,
    all_of,
    codes,
    meta,
    number,
    row,
)

from tilewright.npu import jit
from tilewright.npu import language as tl
from tilewright.npu.check import check_file
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.front import interface
from tilewright.npu.kernel import JitFunction
from tilewright.npu.profiles import profile


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


# Sizes without values


def checked(folder: Path, text: str, **arguments: Any) -> list[str]:
    """What the checker finds in a kernel's file."""
    path = folder / "checked.py"
    path.write_text(HEAD + textwrap.dedent(text))
    return [f"{each.span.line}: {each.code}" for each in check_file(path, "tile").diagnostics]


SWITCHES = """
@jit
def kernel(x_ptr, out_ptr, R: tl.constexpr, MODE: tl.constexpr, TALL: tl.constexpr):
    p = tl.make_block_ptr(
        x_ptr, (R, 2) if TALL else (2, R), (2, 1) if TALL else (R, 1), (0, 0), (1, 1), (1, 0)
    )
    x = tl.load(p)
    if MODE == 0:
        x = tl.arange(0, 4)
    elif MODE == 1:
        y = x
    elif MODE != 2:
        tl.static_assert(False, "there is no such mode")
    else:
        x = tl.cat(x, x)
    if MODE == 1:
        x = y + 1.0
    if not TALL:
        x = tl.flip(x)
    if R > 8 and TALL:
        x = tl.ravel(x)
    tl.store(tl.make_block_ptr(out_ptr, (R, 2), (2, 1), (0, 0), (1, 1), (1, 0)), x)
"""


def test_every_way_through_a_kernel_is_checked(tmp_path: Path) -> None:
    """Whatever a constexpr switches, both ways are gone, each with what it decides everywhere."""
    assert checked(tmp_path, SWITCHES) == [f"{line}: UNSUPPORTED_OP" for line in (11, 17, 21, 23)]


def test_many_switches_are_looked_at_together(tmp_path: Path) -> None:
    names = [f"S{number}" for number in range(12)]
    parameters = ", ".join(f"{name}: tl.constexpr" for name in names)
    ifs = "".join(f"    if {name}:\n        x = tl.flip(x)\n" for name in names)
    text = f"\n@jit\ndef kernel(out_ptr, {parameters}):\n    x = 1.0\n{ifs}    tl.store(out_ptr, x)\n"
    found = checked(tmp_path, text)
    assert found == [*(f"{8 + 2 * number}: UNSUPPORTED_OP" for number in range(12)), "31: RAWPTR"]


def test_an_assertion_that_holds_on_no_way_is_reported(tmp_path: Path) -> None:
    text = """
    @jit
    def kernel(x_ptr, R: tl.constexpr, MODE: tl.constexpr):
        if MODE == 0:
            pass
        tl.static_assert(2 * R < R)
        x = tl.arange(0, 4)
    """
    assert checked(tmp_path, text) == ["8: STATIC_ASSERT", "9: UNSUPPORTED_OP"]


def test_loops_with_sizes_without_values(tmp_path: Path) -> None:
    text = """
    @jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr, STEP: tl.constexpr):
        for i in tl.static_range(0, N, STEP):
            if i == 0:
                x = tl.load(tl.make_block_ptr(x_ptr, (N, 64), (64, 1), (i, 0), (1, 64), (1, 0)))
            else:
                x = tl.flip(x)
            if i < 0:
                x = tl.sort(x)
        for i in tl.static_range(N - 1, -1, -1):
            if i == 0:
                x = tl.ravel(x)
            if i == -1:
                x = tl.sort(x)
        for i in tl.static_range(-4, N):
            if i == -3:
                y = tl.cat(x, x)
        for i in tl.static_range(4):
            for j in tl.static_range(i, N):
                if j < i:
                    x = tl.sort(x)
        tl.store(tl.make_block_ptr(out_ptr, (N, 64), (64, 1), (0, 0), (1, 64), (1, 0)), x)
    """
    assert checked(tmp_path, text) == [f"{line}: UNSUPPORTED_OP" for line in (10, 15, 20)]


def test_constexprs_that_are_no_sizes(tmp_path: Path) -> None:
    text = """
    @jit
    def kernel(
        x_ptr, out_ptr, SHAPE: tl.constexpr, OP: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr
    ):
        A, B = SHAPE
        x = tl.load(tl.make_block_ptr(x_ptr, SHAPE, (SHAPE[1], 1), (0, 0), SHAPE, (1, 0)))
        y = tl.load(tl.make_block_ptr(x_ptr, (N, 64), (64, 1), (0, 0), (N, 64), (1, 0)))
        x = OP(x)
        y = y * (1.0 / N) + EPS * 2.0 + N**0.5 + float(N)
        y = tl.flip(y)
        z = tl.zeros((N, 64), dtype=DTYPE)
        if OP is None or EPS == "none":
            z = tl.sort(z)
        tl.static_assert(len(SHAPE) == 2)
        for i in tl.static_range(len(SHAPE)):
            y = tl.ravel(y)
        tl.store(tl.make_block_ptr(out_ptr, (N, 64), (64, 1), (0, 0), (N, 64), (1, 0)), y)
    """
    assert checked(tmp_path, text) == [f"{line}: UNSUPPORTED_OP" for line in (13, 16, 19)]


def test_functions_that_kernels_call_are_checked_where_they_are_called(tmp_path: Path) -> None:
    text = """
    @jit
    def scaled(x, at):
        return tl.flip(x * at)

    @jit
    def unused(x, at):
        return tl.sort(x[at])

    @jit
    def kernel(out_ptr, R: tl.constexpr):
        p = tl.make_block_ptr(out_ptr, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0))
        tl.store(p, scaled(tl.load(p), 2.0))
    """
    assert checked(tmp_path, text) == ["6: UNSUPPORTED_OP", "10: UNSUPPORTED_OP"]


def test_kernels_of_one_name_are_all_checked(tmp_path: Path) -> None:
    text = """
    def first(triton, tl):
        @triton.jit
        def kernel(x_ptr):
            x = tl.arange(0, 4)

    def second(triton, tl, size):
        @triton.jit
        def kernel(x_ptr):
            x = tl.arange(0, size)
    """
    assert checked(tmp_path, text) == ["7: UNSUPPORTED_OP", "12: UNSUPPORTED_OP"]


def test_a_comment_ignores_what_stands_in_its_lines(tmp_path: Path) -> None:
    text = """
    @jit
    def kernel(x_ptr, R: tl.constexpr):
        x = tl.arange(0, 4)  # npu: ignore[NPU-UNSUPPORTED_OP]
        x = tl.arange(0, 4)  # npu: ignore [KEEP_DIMS, UNSUPPORTED_OP]
        x = tl.arange(0, 4)  # npu: ignored
        x = tl.arange(0, 4)  # npu: ignore[KEEP_DIMS]
        p = tl.make_block_ptr(
            x_ptr,
            shape=(R, 64),
            strides=(128, 1),  # npu: ignore[STRIDE_MISMATCH]
            offsets=(0, 0),
            block_shape=(R, 64),
            order=(1, 0),
        )
        while R:
            x = tl.arange(0, 4)  # npu: ignore[RANGE]
        while R:
            x = tl.arange(0, 4)  # npu: ignore
    """
    assert checked(tmp_path, text) == [
        "8: UNSUPPORTED_OP",
        "9: UNSUPPORTED_OP",
        "18: RANGE",
        "19: UNSUPPORTED_OP",
        "20: RANGE",
    ]


def test_the_interface_is_read_on_every_way() -> None:
    @jit
    def kernel(x_ptr, y_ptr, table, scale, out_ptr, unread, N: tl.constexpr, MODE: tl.constexpr):
        x = tl.load(row(x_ptr, 0, N))
        if MODE == 0:  # noqa: SIM108
            x = x * scale
        else:
            x = x + tl.load(row(y_ptr, number(table, 0, N), N))
        tl.store(row(out_ptr, 0, N), x)

    found = interface(kernel.node, kernel.scope, Diagnostics(profile("tile")))
    roles = {each.name: each.role for each in found}
    expected = {"x_ptr": "in", "y_ptr": "in", "table": "index", "scale": "scalar", "out_ptr": "out", "unread": "unused"}
    assert roles == expected
    assert str({each.name: each.shape for each in found}["table"]) == "(1, N)"


def test_a_long_sum_and_many_steps_are_no_trouble() -> None:
    path = Path(__file__)
    kernel = JitFunction(long)
    assert isinstance(kernel.node, ast.FunctionDef)
    program = kernel.warmup(meta(1, 64), meta(1, 64), 3000, profile="tile")
    assert program.manifest.source_file == path.name
    assert codes(kernel, meta(1, 64), meta(1, 64), 65537) == ["RANGE"]
    assert codes(JitFunction(longer), meta(1, 64), 300) == ["RANGE"]


def long(x_ptr, out_ptr, N: tl.constexpr):
    total = 0
    for i in tl.static_range(N):
        total = total + i
    tl.store(all_of(out_ptr, 1), tl.load(all_of(x_ptr, 1)) + total)


def longer(out_ptr, N: tl.constexpr):
    for _ in tl.static_range(N):
        for _ in tl.static_range(N):
            pass
    tl.store(all_of(out_ptr, 1), 0.0)
