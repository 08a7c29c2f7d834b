"""What kernels may say, and what the programs made of them compute: each against the same in torch."""

import linecache
import sys
import textwrap
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from front_helpers import (
    HEAD,
    NOTHING,
    SCALE,
    SIZES,
    WIDTH,
    ZERO,
    all_of,
    codes,
    computed,
    exactly,
    meta,
    number,
    properties,
    row,
    run,
)
from hypothesis import strategies as st

from tilewright.errors import NpuKernelError, NpuLanguageError
from tilewright.npu import jit, triton
from tilewright.npu import language as tl
from tilewright.npu.check import check_file
from tilewright.npu.kernel import FileKernel, JitFunction


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


# What stock Triton refuses


@jit
def six_dimensions(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    for a in tl.static_range(A):
        shape = (A, 1, B, 2, C, D)
        strides = (B * 2 * C * D, B * 2 * C * D, 2 * C * D, C * D, D, 1)
        p = tl.make_block_ptr(x_ptr, shape, strides, (a, 0, 0, 1, 0, 0), (1, 1, B, 1, C, D), (5, 4, 3, 2, 1, 0))
        q = tl.make_block_ptr(out_ptr, shape, strides, (a, 0, 0, 0, 0, 0), (1, 1, B, 1, C, D), (0, 1, 2, 3, 4, 5))
        tl.store(q, tl.load(p) * 2.0)
        q = tl.advance(q, (0, 0, 0, 1, 0, 0))
        tl.store(q, tl.load(tl.advance(p, (0, 0, 0, -1, 0, 0))))


@pytest.mark.parametrize("sizes", [(3, 5, 7, 80), (1, 1, 1, 1), (2, 4, 3, 64)])
def test_block_pointers_of_six_dimensions_and_any_size(sizes: tuple[int, int, int, int]) -> None:
    a, b, c, d = sizes
    x = torch.randn(a, 1, b, 2, c, d)
    exactly(computed(six_dimensions, x, *sizes), torch.cat((x[..., 1:, :, :] * 2.0, x[..., :1, :, :]), dim=3))


@jit
def rank_five_product(q_ptr, k_ptr, out_ptr, H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    q = tl.load(tl.make_block_ptr(
        q_ptr, (1, H, G, L, 80), (H * G * L * 80, G * L * 80, L * 80, 80, 1), (0, 0, 0, 0, 0), (1, H, G, L, 80),
        (4, 3, 2, 1, 0),
    ))  # fmt: skip
    k = tl.load(tl.make_block_ptr(
        k_ptr, (1, H, 1, P, 80), (H * P * 80, P * 80, P * 80, 80, 1), (0, 0, 0, 0, 0), (1, H, 1, P, 80), (4, 3, 2, 1, 0)
    ))  # fmt: skip
    scores = tl.dot(q, tl.broadcast_to(tl.permute(k, (0, 1, 2, 4, 3)), (1, H, G, 80, P)))
    out = tl.make_block_ptr(
        out_ptr,
        (1, H, G, L, P),
        (H * G * L * P, G * L * P, L * P, P, 1),
        (0, 0, 0, 0, 0),
        (1, H, G, L, P),
        (4, 3, 2, 1, 0),
    )
    tl.store(out, scores)


@pytest.mark.parametrize(("groups", "rows", "keys"), [(3, 5, 7), (1, 1, 3), (2, 1, 80)])
def test_products_of_five_dimensions(groups: int, rows: int, keys: int) -> None:
    q = torch.randint(-3, 4, (1, 2, groups, rows, 80)).float()
    k = torch.randint(-3, 4, (1, 2, 1, keys, 80)).float()
    out = torch.empty(1, 2, groups, rows, keys)
    run(rank_five_product, q, k, out, 2, groups, rows, keys)
    exactly(out, q @ k.mT)  # integers: exact in any order


@jit
def gathered(x_ptr, table, scale, out_ptr, B: tl.constexpr, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(row(out_ptr, n, N), tl.load(row(x_ptr, number(table, n, N), B)) * scale)


def test_block_numbers_from_memory_and_scalars_of_no_dimension() -> None:
    x, table, scale, out = (
        torch.randn(5, 64),
        torch.tensor([[4, 0, 3]], dtype=torch.int32),
        torch.tensor(0.25),
        torch.empty(3, 64),
    )
    run(gathered, x, table, scale, out, 5, 3, profile="hw-0.11.1")
    exactly(out, x[[4, 0, 3]] * 0.25)
    program = gathered.warmup(x, table, scale, out, 5, 3)
    scale.fill_(3.0)  # its value is read when the program runs
    program.run(x, table, scale, out)
    exactly(out, x[[4, 0, 3]] * 3.0)


# Constexprs


@jit
def folded(
    x_ptr, out_ptr, R: tl.constexpr, SHAPE: tl.constexpr, NAME: tl.constexpr = "add", OTHER: tl.constexpr = None
):
    COUNT: tl.constexpr = len(SHAPE)
    total = 0
    for i in tl.static_range(COUNT):
        total += SHAPE[i]
    A: tl.constexpr = (R * 3 - 2) // 5 % 4 + 2**3 - (7 // -2) + (5 << 1) - (9 >> 1) | 1
    B = max(min(A, R), 2, *SHAPE) + abs(-3) + int(3.9) + float(1) / 4
    C = -A + (+B) + (not R) + (R if R > 3 else -R)
    D = (R or 7) * 100 + (R and 9) * 10 + (ZERO or 3) + (NOTHING or 5)
    E = 1 if 1 < R <= 4 < R + 4 != 6 and not (R == 5 or SHAPE == (1, 2)) else 0
    F = R in SHAPE, R not in SHAPE, OTHER is None, OTHER is not None, NAME == "add", R is not None
    x = tl.load(all_of(x_ptr, R))
    if NAME == "add":
        x = x + A
    elif NAME != "sub":
        tl.static_assert(False, "there is no such name")
    else:
        x = x - A
    x = x + B + C + D + E + total + F[0] * 2 + F[1] + F[2] + F[3] * 4 + F[4] + F[-1]
    x += triton.cdiv(R, 3) + triton.next_power_of_2(R) + WIDTH + WIDTH.value * 0 + SIZES[1] * SCALE
    tl.store(all_of(out_ptr, R), x)


def folded_in_python(r: int, shape: tuple[int, ...], name: str) -> float:
    a = (r * 3 - 2) // 5 % 4 + 2**3 - (7 // -2) + (5 << 1) - (9 >> 1) | 1
    b = max(min(a, r), 2, *shape) + abs(-3) + int(3.9) + float(1) / 4
    c = -a + (+b) + (not r) + (r if r > 3 else -r)
    d = (r or 7) * 100 + (r and 9) * 10 + (ZERO or 3) + (NOTHING or 5)
    e = 1 if 1 < r <= 4 < r + 4 != 6 and not (r == 5 or shape == (1, 2)) else 0
    total = (a if name == "add" else -a) + b + c + d + e + sum(shape)
    total += (r in shape) * 2 + (r not in shape) + True + False * 4 + (name == "add") + True
    return total + -(-r // 3) + (1 << (r - 1).bit_length()) + 64 + 5 * 0.5


@pytest.mark.parametrize("name", ["add", "sub"])
@pytest.mark.parametrize("shape", [(4, 3), (1, 2), (7,), ()])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_constexprs_are_what_python_computes(rows: int, shape: tuple[int, ...], name: str) -> None:
    out = computed(folded, torch.zeros(rows, 64), rows, shape, name)
    torch.testing.assert_close(out, torch.full((rows, 64), folded_in_python(rows, shape, name)))
    assert "STATIC_ASSERT" in codes(folded, meta(rows, 64), meta(rows, 64), rows, shape, "mul")


@properties
@hypothesis.given(a=st.integers(-20, 20), b=st.integers(-20, 20))
def test_divisions_are_those_of_python(a: int, b: int) -> None:
    hypothesis.assume(b)
    out = computed(divisions, torch.zeros(1, 64), a, b)
    expected = torch.tensor([float(a // b), float(a % b), a / b, float(divmod(a, b) == (a // b, a % b))])
    torch.testing.assert_close(out[0, :4], expected)


@jit
def divisions(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr):
    floor = A // B  # npu: ignore[PARTITION_DIV]
    rest = A % B
    for at in tl.static_range(4):
        q = tl.make_block_ptr(out_ptr, (1, 64), (64, 1), (0, at), (1, 1), (1, 0))
        tl.store(q, (floor, rest, A / B, 1.0)[at])
    tl.store(tl.make_block_ptr(out_ptr, (1, 64), (64, 1), (0, 4), (1, 60), (1, 0)), 0.0)


@jit
def counted(x_ptr, out_ptr, R: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr, STEP: tl.constexpr):
    total = 0
    for i in tl.static_range(STOP):
        total = total * 2 + i
    for i in tl.static_range(START, STOP):
        for j in tl.static_range(i, START, -1):
            total = total + i * j
    for i in tl.static_range(START, STOP, STEP):
        total = total * 3 + i
    for i in tl.static_range(STOP, step=2):
        total += i
    for i in tl.static_range(arg1=START, step=STEP, arg2=STOP):
        total -= i
    else:  # noqa: PLW0120 - as often as not, it is written so
        total += 1
    tl.store(all_of(out_ptr, R), tl.load(all_of(x_ptr, R)) + total + i)


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 4, 1), (1, 7, 3), (5, -1, -2), (-2, 3, 2)])
def test_loops_are_those_of_python(start: int, stop: int, step: int) -> None:
    total = 0
    for i in range(stop):
        total = total * 2 + i
    for i in range(start, stop):
        for j in range(i, start, -1):
            total += i * j
    for i in range(start, stop, step):
        total = total * 3 + i
    for i in range(0, stop, 2):
        total += i
    for i in range(start, stop, step):
        total -= i
    expected = torch.full((1, 64), float(total + 1 + i))
    exactly(computed(counted, torch.zeros(1, 64), 1, start, stop, step), expected)


@jit
def may_be_empty(x_ptr, out_ptr, N: tl.constexpr):
    for i in tl.static_range(N):
        y = tl.load(all_of(x_ptr, 1)) + i
    tl.store(all_of(out_ptr, 1), y)


def test_a_loop_that_never_runs_defines_nothing(x: torch.Tensor) -> None:
    first = x[:1].contiguous()
    exactly(computed(may_be_empty, first, 3), first + 2)
    assert codes(may_be_empty, meta(1, 64), meta(1, 64), 0) == ["NAME"]


@jit
def tuples(x_ptr, out_ptr, N: tl.constexpr):
    tiles = ()
    for n in tl.static_range(N):
        tiles += (tl.load(row(x_ptr, n, N)),)
    first, *rest = tiles
    tiles = (*tiles,)
    tl.store(row(out_ptr, 0, N), first + rest[0])


@jit
def reversed_rows(x_ptr, out_ptr, N: tl.constexpr):
    tiles = ()
    for n in tl.static_range(N):
        tiles += (tl.load(row(x_ptr, n, N)),)
    first, last = tiles[0], tiles[-1]
    first, last = last, first
    (pair, count), rest = ((first, last), len(tiles)), tiles[1:-1]
    tl.store(row(out_ptr, 0, N), pair[0])
    for n in tl.static_range(1, count - 1):
        tl.store(row(out_ptr, n, N), rest[count - 2 - n])
    tl.store(row(out_ptr, count - 1, N), pair[1])


def test_tuples_of_tensors(x: torch.Tensor) -> None:
    exactly(computed(reversed_rows, x, 4), x.flip(0))
    assert set(codes(tuples, meta(4, 64), meta(4, 64), 4)) == {"SYNTAX"}


@jit
def shadows(x_ptr, out_ptr, R: tl.constexpr):
    SCALE = 3.0
    x = tl.load(all_of(x_ptr, R))
    y = x
    x = x * SCALE
    x, y = y, x
    y -= x
    y *= y
    y /= 2
    for x in tl.static_range(3):
        y = y + x
    tl.store(all_of(out_ptr, R), y + x)


def test_names_are_names_and_no_memory(x: torch.Tensor) -> None:
    y = x * 3.0 - x
    exactly(computed(shadows, x, 4), y * y / 2 + 0 + 1 + 2 + 2)


# Functions


@jit
def squared(x, PLUS: tl.constexpr = 1.0, *, MINUS: tl.constexpr = SCALE):
    if PLUS == 0.0:
        return x * x
    y = x * x
    return y + PLUS - MINUS


@jit
def both(x):
    return squared(x), squared(PLUS=2.0, x=x, MINUS=0.0)


@jit
def power(x, N: tl.constexpr):
    if N == 0:
        return 1.0
    return power(x, N - 1) * x


@jit
def calling(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    y, z = both(x)
    N = 3
    tl.store(all_of(out_ptr, R), y + z + squared(x, 0.0) + power(x, N) + N)


def test_other_kernels_are_inlined(x: torch.Tensor) -> None:
    square = x * x
    expected = (square + 1.0 - 0.5) + (square + 2.0 - 0.0) + square + 1.0 * x * x * x + 3
    exactly(computed(calling, x, 4), expected)


def make_kernels(triton: Any, tl: Any, amount: float) -> tuple[JitFunction, JitFunction]:
    """Kernels, as a suite makes them that runs on several kinds of Triton."""
    twice = 2 * amount

    @triton.jit
    def shift(x):
        return x + twice

    @triton.jit
    def add(x_ptr, out_ptr, R: tl.constexpr):
        tl.store(all_of(out_ptr, R), shift(tl.load(all_of(x_ptr, R))))

    @triton.jit
    def sub(x_ptr, out_ptr, R: tl.constexpr):
        tl.store(all_of(out_ptr, R), tl.load(all_of(x_ptr, R)) - amount)

    return add, sub


def test_kernels_that_a_function_makes(x: torch.Tensor) -> None:
    for amount in (1.0, 2.5):
        add, sub = make_kernels(triton, tl, amount)
        exactly(computed(add, x, 4), x + 2 * amount)
        exactly(computed(sub, x, 4), x - amount)


def loaded(folder: Path, name: str, text: str) -> Any:
    """A module of a file that is written now."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name)


COPY = """
@jit
def copy(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)))
    x = x * FACTOR
    tl.store(tl.make_block_ptr(out_ptr, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)), x)
"""


def test_a_helper_of_another_module(tmp_path: Path, x: torch.Tensor) -> None:
    module = loaded(tmp_path, "npu_front_helpers", f"{HEAD}SCALE = 4.0\n\n@jit\ndef scaled(x):\n    return x * SCALE\n")

    @jit
    def kernel(x_ptr, out_ptr, R: tl.constexpr):
        tl.store(all_of(out_ptr, R), module.scaled(tl.load(all_of(x_ptr, R))) + SCALE)

    exactly(computed(kernel, x, 4), x * 4.0 + 0.5)
    program = kernel.warmup(x, x, 4, profile="tile")
    files = {each["file"] for each in program.source_map}
    assert files == {"npu_front_helpers.py", "front_helpers.py", Path(__file__).name}


# Where the source stands


def test_a_kernel_without_a_file_is_refused_with_a_reason() -> None:
    namespace: dict[str, Any] = {}
    exec(f"{HEAD}FACTOR = 1.0\n{COPY}", namespace)
    with pytest.raises(
        NpuLanguageError, match="kernel 'copy': its source is needed, and <string> cannot be read; kernels"
    ):
        namespace["copy"].warmup(meta(4, 64), meta(4, 64), 4)


def test_a_kernel_of_a_prompt_that_keeps_its_lines(x: torch.Tensor) -> None:
    text = f"{HEAD}FACTOR = 3.0\n{COPY}"
    name = "<cell 7>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(compile(text, name, "exec"), namespace)
    exactly(computed(namespace["copy"], x, 4), x * 3.0)


@pytest.mark.parametrize(
    "edit",
    [
        ("x * FACTOR", "x / FACTOR"),
        ("x = x * FACTOR\n", "x = x\n    x = x * FACTOR\n"),
        ("@jit", "\n\n\n@jit"),
        ("def copy(", "def copied("),
        ("(1, 0)), x)", "(1, 0)), x"),
    ],
    ids=["another operator", "another line", "moved", "renamed", "broken"],
)
def test_a_file_that_was_edited_after_it_was_loaded(tmp_path: Path, edit: tuple[str, str]) -> None:
    module = loaded(tmp_path, "npu_front_edited", f"{HEAD}FACTOR = 2.0\n{COPY}")
    path = tmp_path / "npu_front_edited.py"
    assert edit[0] in path.read_text()
    path.write_text(path.read_text().replace(*edit))
    with pytest.raises(NpuLanguageError, match=r"npu_front_edited\.py has changed since it was loaded.*load it again"):
        module.copy.warmup(meta(4, 64), meta(4, 64), 4)


def test_a_file_that_was_written_again_as_it_was(tmp_path: Path, x: torch.Tensor) -> None:
    module = loaded(tmp_path, "npu_front_touched", f"{HEAD}FACTOR = 2.0\n{COPY}")
    path = tmp_path / "npu_front_touched.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    exactly(computed(module.copy, x, 4), x * 2.0)


@pytest.mark.parametrize(
    ("constants", "known"),
    [
        ("FACTOR = 2.0", True),
        ("HALF = 1.0\nFACTOR: float = HALF * 4 / 2", True),
        ("FACTOR = min(2.0, 3)", True),
        ("FACTOR = tl.constexpr(2.0)", True),
        ("FACTOR = 2.0\nFACTOR = 3.0", False),
        ("FACTOR = 2.0\nif triton:\n    FACTOR = 3.0", False),
        ("FACTOR = 2.0\nFACTOR += 1.0", False),
        ("FACTOR = 2.0\nfor FACTOR in (3.0, 4.0):\n    pass", False),
        ("FACTOR = 2.0\ndef change():\n    global FACTOR\n    FACTOR = 3.0\nchange()", False),
        ("import os\nFACTOR = float(os.environ.get('FACTOR', 2.0))", False),
        ("FACTOR, OTHER = 2.0, 3.0", False),
    ],
)
def test_constants_of_a_file_that_is_only_read(tmp_path: Path, constants: str, known: bool, x: torch.Tensor) -> None:
    """What only running the module would tell is never guessed: the program would be another one."""
    path = tmp_path / "kernels.py"
    path.write_text(f"{HEAD}{constants}\n{COPY}")
    kernel = FileKernel(str(path), "copy")
    arguments = {"x_ptr": x, "out_ptr": torch.empty_like(x), "R": 4}
    from tilewright.npu.compile import compile_kernel

    assert not check_file(path).errors
    if known:
        program = compile_kernel(kernel, arguments)
        program.run(x, arguments["out_ptr"])
        exactly(arguments["out_ptr"], x * 2.0)
    else:
        with pytest.raises(NpuKernelError, match="cannot be compiled: something in this is not known"):
            compile_kernel(kernel, arguments)
