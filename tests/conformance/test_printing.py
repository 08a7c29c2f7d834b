"""What kernels say: prints and assertions, at run time and at compile time."""

import ctypes
import re
import time

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from .harness import DEVICE, ON_GPU, assert_equal, gpu_differs, interpreter_gap


def flush() -> None:
    """A device's prints stay in the C library's buffer, or on the device, until asked for."""
    if ON_GPU:
        torch.cuda.synchronize()
    ctypes.CDLL(None).fflush(None)


def lines_of(text, prefix):
    """Per program id, the numbers after the prefix, in order."""
    found = {}
    # A tile may be printed one value to a line, with its place before the prefix, or all in brackets over some lines.
    numbers = r"((?:\s*[-\[\]\d.ex+a-f,]+)+)"
    pattern = rf"\((\d+, \d+, \d+)\)[^\n]*?{prefix}:? *(?:\(operand \d+\))?{numbers}"
    for program, values in re.findall(pattern, text):
        printed = [n for n in re.split(r"[\s\[\],]+", values) if n]
        found.setdefault(tuple(map(int, program.split(", "))), []).extend(printed)
    return found


@triton.jit
def print_scalars(x_ptr):
    x = tl.load(x_ptr + tl.program_id(0) + tl.program_id(1) * 3)
    tl.device_print("value", x)


def test_device_print_of_scalars(capfd):
    x = torch.tensor([11, -22, 33, 44, 55, 66], dtype=torch.int32, device=DEVICE)
    print_scalars[(3, 2)](x, num_warps=1)
    flush()
    printed = lines_of(capfd.readouterr().out, "value")
    assert {p: set(v) for p, v in printed.items()} == {
        (i, j, 0): {str(int(x[i + 3 * j]))} for i in range(3) for j in range(2)
    }


@triton.jit
def print_tiles(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.device_print("tile", tl.load(x_ptr + tl.program_id(0) * BLOCK + i))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8])
def test_device_print_of_tiles(capfd, dtype):
    x = torch.arange(-4, 12, device=DEVICE).to(dtype)
    print_tiles[(2,)](x, BLOCK=8, num_warps=1)
    flush()
    printed = lines_of(capfd.readouterr().out, "tile")
    assert {p: sorted({int(v) for v in values}) for p, values in printed.items()} == {
        (0, 0, 0): list(range(-4, 4)),
        (1, 0, 0): list(range(4, 12)),
    }


@triton.jit
def print_floats(x_ptr):
    tl.device_print("number", tl.load(x_ptr))


@pytest.mark.parametrize("value", [0.5, -2.25, 1024.0])
def test_device_print_of_floats(capfd, value):
    print_floats[(1,)](torch.tensor([value], dtype=torch.float32, device=DEVICE), num_warps=1)
    flush()
    printed = lines_of(capfd.readouterr().out, "number")
    assert {p: {float(v) for v in values} for p, values in printed.items()} == {(0, 0, 0): {value}}


@triton.jit
def print_several(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.device_print("several", x, x * 100)


def test_device_print_of_several_operands(capfd):
    print_several[(1,)](torch.arange(1, 5, dtype=torch.int32, device=DEVICE), BLOCK=4, num_warps=1)
    flush()
    printed = lines_of(capfd.readouterr().out, "several")
    assert {p: {int(v) for v in values} for p, values in printed.items()} == {
        (0, 0, 0): {1, 2, 3, 4, 100, 200, 300, 400}
    }


@triton.jit
def print_text(flag):
    if tl.program_id(0) == flag:
        tl.device_print("reached here")


@interpreter_gap("prints nothing without a value")
def test_device_print_without_values(capfd):
    print_text[(5,)](2, num_warps=1)
    flush()
    printed = capfd.readouterr().out
    lines = [line for line in printed.splitlines() if "reached here" in line]
    assert len(lines) >= 1 if ON_GPU else len(lines) == 1  # on a GPU every thread says it
    assert all("(2, 0, 0)" in line for line in lines)


@triton.jit
def python_print(x_ptr):
    print("as python", tl.load(x_ptr))


@interpreter_gap("runs Python's own print")
def test_print_in_a_kernel_prints_on_the_device(capfd):
    python_print[(1,)](torch.tensor([77], dtype=torch.int32, device=DEVICE), num_warps=1)
    flush()
    printed = lines_of(capfd.readouterr().out, "as python")
    assert {p: set(v) for p, v in printed.items()} == {(0, 0, 0): {"77"}}


@triton.jit
def assert_positive(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=-1)
    tl.device_assert(x > 0, "an element is not positive", mask=i < n)
    tl.store(out_ptr + i, x, mask=i < n)


@gpu_differs("a failed assertion ends the context")
@interpreter_gap("has device assertions turned off")
@pytest.mark.parametrize("bad", [0, 13])
def test_device_assert_raises_when_enabled(bad):
    x = torch.arange(1, 17, dtype=torch.int32, device=DEVICE)
    x[bad] = 0
    with pytest.raises((RuntimeError, AssertionError), match="an element is not positive"):
        assert_positive[(1,)](x, torch.zeros_like(x), 16, BLOCK=16, debug=True)


@pytest.mark.parametrize("debug", [True, False])
def test_device_assert_lets_good_values_pass(debug):
    x = torch.arange(1, 17, dtype=torch.int32, device=DEVICE)
    x[12:] = -5  # outside of the mask
    out = torch.zeros_like(x)
    assert_positive[(1,)](x, out, 12, BLOCK=16, debug=debug)
    assert_equal(out[:12], x[:12])


def test_device_assert_does_nothing_when_disabled():
    x = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    out = torch.ones_like(x)
    assert_positive[(1,)](x, out, 16, BLOCK=16, debug=False)
    assert_equal(out, x)


@triton.jit
def assert_by_keyword(x_ptr):
    x = tl.load(x_ptr)
    assert x > 10, "too small"


@gpu_differs("a failed assertion ends the context")
@interpreter_gap("runs Python's own assert")
def test_assert_in_a_kernel_is_a_device_assert():
    assert_by_keyword[(1,)](torch.tensor([11], device=DEVICE), debug=True)
    with pytest.raises((RuntimeError, AssertionError), match="too small"):
        assert_by_keyword[(1,)](torch.tensor([10], device=DEVICE), debug=True)


@triton.jit
def say_at_compile_time(out_ptr, UNIQUE: tl.constexpr):
    tl.static_print("compiling", UNIQUE)
    tl.store(out_ptr, 1)


def test_static_print_speaks_while_compiling(capsys):
    unique = time.time_ns()  # a kernel that no cache holds
    say_at_compile_time[(1,)](torch.zeros(1, dtype=torch.int32, device=DEVICE), UNIQUE=unique)
    assert f"compiling {unique}" in capsys.readouterr().out


@triton.jit
def sized(out_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK >= 16, "BLOCK must be at least 16")
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK))


def test_static_assert_stops_the_compilation():
    out = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    sized[(1,)](out, BLOCK=16)
    assert_equal(out, torch.arange(16, dtype=torch.int32))
    with pytest.raises((CompilationError, InterpreterError), match="BLOCK must be at least 16"):
        sized[(1,)](out, BLOCK=8)


@triton.jit
def assert_dtype(x_ptr):
    x = tl.load(x_ptr)
    tl.static_assert(x.dtype == tl.float32, "float32 only")
    tl.store(x_ptr, x + 1)


def test_static_assert_on_a_dtype():
    x = torch.zeros(1, device=DEVICE)
    assert_dtype[(1,)](x)
    assert_equal(x, torch.ones(1))
    with pytest.raises((CompilationError, InterpreterError), match="float32 only"):
        assert_dtype[(1,)](x.double())
