"""What kernels may say, and what the programs made of them compute: each against the same in torch."""

import ast
import linecache
import sys
import textwrap
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from xdsl.dialects.scf import IfOp

from tilewright.errors import ArgumentError, NpuKernelError, NpuLanguageError
from tilewright.npu import jit, rblib, triton
from tilewright.npu import language as tl
from tilewright.npu.check import check_file
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.front import interface
from tilewright.npu.kernel import FileKernel, JitFunction
from tilewright.npu.profiles import profile

SCALE = 0.5
ZERO, NOTHING = 0, None
SIZES = [3, 5]
WIDTH = tl.constexpr(64)

properties = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


@jit
def row(base, at, N: tl.constexpr, C: tl.constexpr = 64):
    return tl.make_block_ptr(base, (N, C), (C, 1), (at, 0), (1, C), (1, 0))


@jit
def all_of(base, R: tl.constexpr, C: tl.constexpr = 64):
    return tl.make_block_ptr(base, (R, C), (C, 1), (0, 0), (R, C), (1, 0))


@jit
def number(table, at, N: tl.constexpr, MAX: tl.constexpr = -1):
    return rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, at), (1, 1), (1, 0)), MAX).cast(tl.int32)


def run(kernel: JitFunction, *args: Any, profile: str = "tile") -> None:
    """Compile a kernel and run it. The profile that takes most of the language is asked."""
    kernel.warmup(*args, profile=profile).run(*(each for each in args if isinstance(each, torch.Tensor)))


def computed(kernel: JitFunction, x: torch.Tensor, *rest: Any, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """What a kernel of one tensor and one output gives."""
    out = torch.full(shape or tuple(x.shape), float("nan"))
    run(kernel, x, out, *rest)
    return out


def codes(kernel: JitFunction, *args: Any, profile: str = "tile") -> list[str]:
    """What compiling a kernel finds."""
    with pytest.raises(NpuKernelError) as caught:
        kernel.warmup(*args, profile=profile)
    return [each.code for each in caught.value.diagnostics]


def exactly(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    torch.testing.assert_close(result, expected.float(), rtol=0, atol=0, equal_nan=True)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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


HEAD = "from tilewright.npu import jit, triton\nfrom tilewright.npu import language as tl\n"
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
    assert files == {"npu_front_helpers.py", Path(__file__).name}


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


# Run-time branches


@jit
def branches(x_ptr, counts, out_ptr, N: tl.constexpr, P: tl.constexpr):
    x = tl.load(row(x_ptr, 0, 1))
    kept = x
    total = x * 0.0
    n = 0
    for p in tl.static_range(N):
        count = number(counts, p, N, P)
        if rblib.partition_skip(count) == False:  # noqa: E712
            x = x + 1.0
            total = total + x
            local = x * 2.0
            n = 0
            total = total + local
        else:
            total = total - 100.0
    tl.store(row(out_ptr, 0, 3), x)
    tl.store(row(out_ptr, 1, 3), total + n)
    tl.store(row(out_ptr, 2, 3), kept)


@pytest.mark.parametrize("counts", [(0, 0, 0), (4, 0, 0), (8, 0, 0), (8, 8, 3), (8, 8, 8)])
def test_what_a_branch_changes_and_what_it_does_not(counts: tuple[int, ...]) -> None:
    x, table, out = torch.randn(1, 64), torch.tensor([counts], dtype=torch.int32), torch.empty(3, 64)
    run(branches, x, table, out, 3, 8)
    value, total = x.clone(), x * 0.0
    for p, count in enumerate(counts):
        if p > 0 and count == 0 and counts[p - 1] < 8:
            total = total - 100.0
        else:
            value = value + 1.0
            total = total + value + value * 2.0
    exactly(out, torch.cat((value, total, x)))


def test_a_branch_is_an_if_that_gives_what_it_changes() -> None:
    program = branches.warmup(meta(1, 64), meta(1, 1, dtype=torch.int32), meta(3, 64), 1, 8, profile="tile")
    (branch,) = [each for each in program.module.walk() if isinstance(each, IfOp)]
    assert [each.name_hint for each in branch.results] == ["total", "x"]
    assert [str(each.type) for each in branch.results] == ["tensor<1x64xf32>"] * 2
    for region in branch.regions:
        assert region.block.last_op is not None
        assert len(region.block.last_op.operands) == 2


@jit
def swapped_unless_skipped(x, y, count, TIMES: tl.constexpr):
    if rblib.partition_skip(count) == False:  # noqa: E712
        for n in tl.static_range(TIMES):
            x, y = y, x + n
    return x, y


@jit
def nested(x_ptr, counts, out_ptr, P: tl.constexpr):
    x, y = tl.load(row(x_ptr, 0, 2)), tl.load(row(x_ptr, 1, 2))
    n = 7.0
    first, second = number(counts, 1, 3, P), number(counts, 2, 3, P)
    writes = rblib.partition_skip(first) == False  # noqa: E712
    if writes:
        x, y = y, x
        z = x
        if rblib.partition_skip(second) == False:  # noqa: E712
            z = z + n
            x, z = z, x
        else:
            y = y * 2.0
        y = y + z
    if writes:
        x = x + 0.25
    x, y = swapped_unless_skipped(x, y, second, TIMES=3)
    tl.store(row(out_ptr, 0, 2), x)
    tl.store(row(out_ptr, 1, 2), y + n)


@pytest.mark.parametrize("counts", [(8, 8, 0), (8, 3, 0), (3, 0, 0), (3, 0, 1), (8, 8, 1)])
def test_branches_in_branches_and_names_that_change_places(counts: tuple[int, ...]) -> None:
    x, out = torch.randint(-8, 9, (2, 64)).float(), torch.empty(2, 64)
    run(nested, x, torch.tensor([counts], dtype=torch.int32), out, 8)
    skips = [p > 0 and counts[p] == 0 and counts[p - 1] < 8 for p in range(3)]
    a, b = x[0], x[1]
    if not skips[1]:
        a, b = b, a
        z = a
        if not skips[2]:
            z = z + 7.0
            a, z = z, a
        else:
            b = b * 2.0
        b = b + z
        a = a + 0.25
    if not skips[2]:
        for n in range(3):
            a, b = b, a + n
    exactly(out, torch.stack((a, b + 7.0)))


@jit
def stores(x_ptr, counts, out_ptr, P: tl.constexpr):
    x = tl.load(row(x_ptr, 0, 1))
    tl.store(row(out_ptr, 0, 2), x)
    before = tl.load(row(out_ptr, 0, 2))
    if rblib.partition_skip(number(counts, 1, 2, P)) == False:  # noqa: E712
        tl.store(row(out_ptr, 0, 2), x + 1.0)
        inside = tl.load(row(out_ptr, 0, 2))
        tl.store(row(out_ptr, 0, 2), inside + x)
    after = tl.load(row(out_ptr, 0, 2))
    tl.store(row(out_ptr, 1, 2), after - before)


def test_stores_happen_where_they_stand(x: torch.Tensor) -> None:
    x = x[:1].round()
    for counts, skipped in (((3, 0), True), ((8, 0), False)):
        out = torch.empty(2, 64)
        run(stores, x, torch.tensor([counts], dtype=torch.int32), out, 8)
        written = x if skipped else x + 1.0 + x
        exactly(out, torch.cat((written, written - x)))


@jit
def defined_on_both_ways(x_ptr, counts, out_ptr, P: tl.constexpr):
    x = tl.load(row(x_ptr, 0, 1))
    if rblib.partition_skip(number(counts, 1, 2, P)) == False:  # noqa: E712
        y = x + 1.0
        factor = 2.0
    else:
        y = x
        factor = 2.0
    tl.store(row(out_ptr, 0, 1), y * factor)


def test_names_that_both_ways_define(x: torch.Tensor) -> None:
    for counts, plus in (((3, 0), 0.0), ((8, 0), 1.0)):
        out = torch.empty(1, 64)
        run(defined_on_both_ways, x[:1].contiguous(), torch.tensor([counts], dtype=torch.int32), out, 8)
        exactly(out, (x[:1] + plus) * 2.0)


# Tensors


@jit
def shapes_of(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(all_of(x_ptr, R, C))
    column = tl.max(x, axis=1)[:, None]
    line = x.sum(axis=0)[None, :]
    x = x - column + line[:, :] + tl.expand_dims(tl.sum(x, axis=-2), 0)
    x = tl.trans(tl.trans(x) + x.T) / 2
    x = x.reshape(1, R, C).permute(0, 2, 1).trans(0, 2, 1).reshape((R, -1))
    wide, _ = tl.broadcast(tl.reshape(column, (R, 1)), x)
    x = x + wide + x.exp().to(tl.float32) * x.shape[0]
    tl.store(all_of(out_ptr, R, C), x)


def test_shapes_and_methods() -> None:
    x = torch.randn(5, 7)
    column, line = x.amax(1, keepdim=True), x.sum(0, keepdim=True)
    y = x - column + line + x.sum(-2, keepdim=True)
    y = (y.T + y.T).T / 2
    torch.testing.assert_close(computed(shapes_of, x, 5, 7), y + column + y.exp() * 5)


@jit
def reductions(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0)))
    a = tl.sum(tl.sum(x, 2), 1)
    b = tl.max(tl.min(x, axis=-3), axis=0)
    c = tl.sum(x, axis=1, keep_dims=True)
    d = tl.max(tl.max(x, 0, keep_dims=True), -1)
    e = tl.sum(x)
    x = x + a[:, None, None] + b[None, None] + c + d[:, :, None] + e + tl.max(x, keep_dims=True)
    tl.store(tl.make_block_ptr(out_ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0)), x)


def test_reductions_of_any_axis_to_any_rank() -> None:
    x = torch.randint(-4, 5, (2, 3, 5)).float()
    expected = x + x.sum((1, 2))[:, None, None] + x.amin(0).amax(0) + x.sum(1, keepdim=True)
    expected = expected + x.amax((0, 2))[None, :, None] + x.sum() + x.max()
    exactly(computed(reductions, x, 2, 3, 5), expected)


@jit
def chosen(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    y = tl.where(x > 0.0, x, -x)
    y = tl.where(tl.trans(tl.reshape(tl.trans(x <= 0.5), (64, R))), y, 0.5)
    y = tl.where(tl.broadcast_to(tl.max(x, axis=1, keep_dims=True) >= x, (R, 64)), y, float("inf"))
    y = tl.where(x == 0.0, float("-inf"), y)
    y = tl.where(x != x, 7.0, y)  # noqa: PLR0124 - NaN
    y = tl.where(0.25 < x, y + 1, y)  # noqa: SIM300
    tl.store(all_of(out_ptr, R), y)


def test_comparisons_and_choices() -> None:
    x = torch.tensor([0.0, -0.0, 0.25, 0.3, 0.5, 1.0, -2.0, float("inf"), -float("inf")]).repeat(8)[:64].reshape(1, 64)
    y = torch.where(x > 0.0, x, -x)
    y = torch.where(x <= 0.5, y, 0.5)
    y = torch.where(x == 0.0, -torch.inf, y)
    exactly(computed(chosen, x, 1), torch.where(x > 0.25, y + 1, y))
    missing = torch.full((1, 64), float("nan"))  # no comparison but != holds
    exactly(computed(chosen, missing, 1), torch.full((1, 64), 7.0))


@jit
def extremes(x_ptr, y_ptr, out_ptr, R: tl.constexpr):
    x, y = tl.load(all_of(x_ptr, R)), tl.load(all_of(y_ptr, R))
    tl.store(row(out_ptr, 0, 4), tl.maximum(x, y))
    tl.store(row(out_ptr, 1, 4), tl.minimum(x, y))
    tl.store(row(out_ptr, 2, 4), tl.max(x, axis=1, keep_dims=True) + y * 0.0)
    tl.store(row(out_ptr, 3, 4), tl.min(x, axis=1, keep_dims=True) + y * 0.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_no_number_stays_none() -> None:
    """Extremes of NaN are NaN: an error does not vanish."""
    x, y, out = torch.zeros(1, 64), torch.ones(1, 64), torch.empty(4, 64)
    x[0, 3] = float("nan")
    run(extremes, x, y, out, 1)
    exactly(out[0], torch.maximum(x, y)[0])
    exactly(out[1], torch.minimum(x, y)[0])
    assert out[2:].isnan().all()


@jit
def numbers(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    y = x * (1 / 3) + 0.1 - 1e-40
    y = 2 - y
    y = -(3.0 / (y + True))
    y = y + tl.exp(1.0) + tl.fdiv(1, 3) + tl.maximum(0.1, 0.2) + tl.zeros((R, 64), dtype=tl.float32) + tl.tensor(-0.0)
    tl.store(all_of(out_ptr, R), y)


def test_numbers_are_float32(x: torch.Tensor) -> None:
    third, tenth = torch.tensor(1 / 3), torch.tensor(0.1)
    y = 2.0 - (x * third + tenth - torch.tensor(1e-40))
    y = -(torch.tensor(3.0) / (y + 1.0))  # a number divided by a tensor is a product in torch
    expected = y + torch.tensor(1.0).exp() + torch.tensor(1.0) / 3.0 + torch.tensor(0.2)
    exactly(computed(numbers, x, 4), expected)


@jit
def signed_zeros(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    tl.store(all_of(out_ptr, R), x / (x * 0.0 + tl.where(x > 0.0, 0.0, -0.0)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_negative_zero_is_another_number() -> None:
    x = torch.tensor([1.0, -1.0]).repeat(32).reshape(1, 64)
    exactly(computed(signed_zeros, x, 1), x / torch.where(x > 0.0, 0.0, x * 0.0))


@jit
def backwards(x_ptr, out_ptr, N: tl.constexpr):
    p = row(x_ptr, N - 1, N)
    q = row(out_ptr, 0, N)
    for _ in tl.static_range(N):
        tl.store(q, tl.load(p))
        p, q = tl.advance(p, (-1, 0)), tl.advance(q, [1, 0])


def test_block_pointers_that_go_backwards(x: torch.Tensor) -> None:
    exactly(computed(backwards, x, 4), x.flip(0))


@jit
def softmaxes(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr):
    tl.store(all_of(out_ptr, R, C), rblib.softmax(tl.load(all_of(x_ptr, R, C)), AXIS))


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_softmax_along_either_axis(axis: int) -> None:
    x = torch.randn(3, 5)
    torch.testing.assert_close(computed(softmaxes, x, 3, 5, axis), x.softmax(axis))


# What is refused rather than built wrong


@jit
def unknown_bound(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    for i in tl.range(R / 2):  # npu: ignore[RANGE]
        x = x + i
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_while(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    while R:  # npu: ignore[RANGE]
        tl.store(all_of(x_ptr, R), x)
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_condition(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    if x_ptr:  # npu: ignore[DYN_IF]
        tl.store(all_of(x_ptr, R), x)
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_mask(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R), mask=R > 2)  # npu: ignore[RAWPTR]
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_accumulator(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    x = tl.dot(x, tl.trans(x), x)  # npu: ignore[DOT_SHAPE]
    tl.store(all_of(out_ptr, R), tl.dot(x, tl.load(all_of(x_ptr, R))))


@jit
def ignored_cast(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R)).to(tl.float16)  # npu: ignore[UNSUPPORTED_OP]
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_end(x_ptr, counts, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    tl.store(all_of(out_ptr, R), x)
    if rblib.partition_skip(number(counts, 0, 1, 8)) == False:  # noqa: E712
        return  # npu: ignore[SYNTAX]
    tl.store(all_of(out_ptr, R), x + 1.0)


@jit
def ignored_statement(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    del x  # npu: ignore[SYNTAX]
    tl.store(all_of(out_ptr, R), 1.0)


@pytest.mark.parametrize(
    "kernel",
    [
        unknown_bound,
        ignored_while,
        ignored_condition,
        ignored_mask,
        ignored_accumulator,
        ignored_cast,
        ignored_end,
        ignored_statement,
    ],
    ids=lambda kernel: kernel.name,
)
def test_an_ignored_error_never_leads_to_another_program(kernel: JitFunction) -> None:
    arguments = [meta(4, 64), meta(4, 64)]
    if "counts" in kernel.arg_names:
        arguments.insert(1, meta(1, 1, dtype=torch.int32))
    with pytest.raises(NpuKernelError, match="cannot be compiled: something in this is not known, or an ignored error"):
        kernel.warmup(*arguments, 4, profile="tile")


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="missing a required argument: 'R'; it takes x_ptr, out_ptr, R"):
        shadows.warmup(meta(4, 64), meta(4, 64))
    with pytest.raises(ArgumentError, match="'R': got a tensor, expected a number"):
        shadows.warmup(meta(4, 64), meta(4, 64), meta(4))
    with pytest.raises(NpuLanguageError, match="cannot be called; compile it"):
        shadows(1)
    with pytest.raises(NpuLanguageError, match="is not launched on a grid"):
        shadows[(1,)]
    with pytest.raises(NpuLanguageError, match="means something inside a kernel only"):
        tl.exp(1.0)


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
