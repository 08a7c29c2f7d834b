"""Each rule about kernels: files with faults, in which a caret under a line marks what the checker has to find there.

A finding is marked by a comment below its line, whose caret stands under the finding's first character and is followed
by the codes; for the first character of a line, which the comment's sign covers, the caret stands directly behind that.
What is not marked must not be found. ``# args: f32[1,64] 64`` before a kernel compiles it for these arguments as well
(``.T`` transposes a tensor), and ``# profile: doc`` asks another profile.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.errors import NpuKernelError
from tilewright.npu import jit
from tilewright.npu import language as tl
from tilewright.npu.check import check_file
from tilewright.npu.compile import compile_kernel
from tilewright.npu.diagnostics import Diagnostic
from tilewright.npu.kernel import FileKernel
from tilewright.npu.profiles import DEFAULT_PROFILE, profile, profiles
from tilewright.npu.rules import RULES
from tilewright.npu.specs import parse_argument

FILES = sorted((Path(__file__).parent / "faults").glob("*.py"))
ABOUT_KERNELS = [rule.code for rule in RULES if rule.when == "kernel"]
Place = tuple[int, int, str]


def marked(path: Path) -> set[Place]:
    """Line, column and code of all that is marked."""
    found: set[Place] = set()
    line = 0
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        mark = re.match(r"#( *)\^ ([A-Z][A-Z0-9_ ]+)$", text)
        if mark is None:
            line = number
        else:
            column = len(mark[1]) + 2 if mark[1] else 1
            found |= {(line, column, code) for code in mark[2].split()}
    return found


def asked(path: Path) -> str:
    """The profile that a file is for."""
    told = re.search(r"^# profile: (\S+)$", path.read_text(), re.MULTILINE)
    return told[1] if told else DEFAULT_PROFILE


def compilations(path: Path) -> list[tuple[str, list[Any]]]:
    """Which kernels of a file are compiled, and for what."""
    result = []
    waiting: list[list[Any]] = []
    for line in path.read_text().splitlines():
        if line.startswith("# args: "):
            waiting.append([argument(each) for each in line.removeprefix("# args: ").split()])
        elif defined := re.match(r"def (\w+)\(", line):
            result += [(defined[1], each) for each in waiting]
            waiting = []
    assert not waiting
    return result


def argument(text: str) -> Any:
    """An argument of a kernel."""
    return parse_argument(text.removesuffix(".T")).mT if text.endswith(".T") else parse_argument(text)


def compiled(path: Path, name: str, arguments: list[Any], asked_profile: str) -> tuple[Diagnostic, ...]:
    """What compiling a kernel finds; warnings alone do not stop it."""
    kernel = FileKernel(str(path), name)
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    try:
        return compile_kernel(kernel, given, profile=asked_profile).diagnostics
    except NpuKernelError as error:
        return error.diagnostics


def findings(path: Path, asked_profile: str) -> dict[Place, Diagnostic]:
    """All that the checker finds in a file, and that compiling its kernels finds."""
    found = list(check_file(path, asked_profile).diagnostics)
    for name, arguments in compilations(path):
        found += compiled(path, name, arguments, asked_profile)
    return {(each.span.line, each.span.column, each.code): each for each in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_that_is_marked_is_found_and_nothing_else(path: Path) -> None:
    found = findings(path, asked(path))
    unexpected = [str(found[place]) for place in sorted(found.keys() - marked(path))]
    assert not unexpected
    assert found.keys() == marked(path)
    severity = profile(asked(path)).severity
    assert all(each.severity == severity(each.code) and each.span.file == str(path) for each in found.values())


@pytest.mark.parametrize("code", ABOUT_KERNELS)
def test_each_rule_about_kernels_has_a_file(code: str) -> None:
    path = Path(__file__).parent / "faults" / f"{code.lower()}.py"
    assert {found for _, _, found in marked(path)} == {code}
    clean = {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and not any(node.lineno <= line <= (node.end_lineno or 0) for line, _, _ in marked(path))
    }
    assert clean - {"rows", "count"}, "no kernel that has to pass"


def test_no_fault_hides_another() -> None:
    codes = {code for _, _, code in marked(Path(__file__).parent / "faults" / "all_at_once.py")}
    assert codes == set(ABOUT_KERNELS)


@pytest.mark.parametrize("name", profiles())
def test_profiles_differ_in_severities_and_in_what_was_seen_to_fail(name: str) -> None:
    """Whatever the profile, a finding under it is one under the strictest too."""
    for path in FILES:
        if asked(path) != DEFAULT_PROFILE or path.stem in {"last_dim_64", "rank", "index_dtype", "reduce_store"}:
            continue
        strictest = findings(path, DEFAULT_PROFILE)
        for place, each in findings(path, name).items():
            assert place in strictest or place[2] == "STRIDE_MISMATCH", str(each)
            assert each.severity == profile(name).severity(each.code)


def test_what_only_failed_on_hardware_is_documented() -> None:
    path = Path(__file__).parent / "faults" / "op_doc_only.py"
    assert not findings(path, "doc")
    found = findings(path, "hw-0.10.3").values()
    assert {each.severity for each in found} == {"warning"}
    hints = [each.hint for each in found]
    assert "tl.exp(x * 0.6931471805599453)" in hints
    assert "tl.exp((x + y) * 0.6931471805599453)" in hints
    assert "1 / (1 + tl.exp(-(x)))" in hints
    assert "tl.maximum(x, y)" in hints


def test_a_tile_npu_reduces_any_axis_to_any_rank() -> None:
    for name in ("keep_dims", "reduce_axis", "reduce_store", "matmul_order", "last_dim_64"):
        found = findings(Path(__file__).parent / "faults" / f"{name}.py", "tile")
        assert not [str(each) for each in found.values() if each.code == name.upper()]


def test_a_fault_in_another_file_is_found_there(tmp_path: Path) -> None:
    """A helper of another file is inlined: what is wrong in it has its file, and its line."""
    (tmp_path / "helper_file.py").write_text(
        "from tilewright.npu import jit\nfrom tilewright.npu import language as tl\n\n\n"
        "@jit\ndef top(base, R: tl.constexpr):\n"
        "    x = tl.load(tl.make_block_ptr(base, (R, 100), (100, 1), (0, 0), (R, 100), (1, 0)))\n"
        "    return tl.max(x, axis=0, keep_dims=True) + x\n"
    )
    namespace: dict[str, Any] = {}
    path = str(tmp_path / "helper_file.py")
    exec(compile((tmp_path / "helper_file.py").read_text(), path, "exec"), namespace)
    top = namespace["top"]

    @jit
    def kernel(x_ptr, out_ptr, R: tl.constexpr):
        x = top(x_ptr, R)
        tl.store(tl.make_block_ptr(out_ptr, (R, 100), (100, 1), (0, 0), (R, 100), (1, 0)), x)

    x = torch.empty(4, 100, device="meta")
    with pytest.raises(NpuKernelError) as caught:
        kernel.warmup(x, x, 4)
    found = {(each.code, each.span.file, each.span.line) for each in caught.value.diagnostics}
    here = kernel.node.body[-1].lineno
    assert found == {
        ("REDUCE_AXIS", path, 8),
        ("LAST_DIM_64", path, 7),
        ("LAST_DIM_64", __file__, here),
    }
    assert "return tl.max(x, axis=0, keep_dims=True) + x" in str(caught.value)


def test_the_grid_of_a_compilation() -> None:
    @jit
    def copy(x_ptr, out_ptr, R: tl.constexpr):
        x = tl.load(tl.make_block_ptr(x_ptr, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)))
        tl.store(tl.make_block_ptr(out_ptr, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)), x)

    x = torch.empty(4, 64, device="meta")
    for grid in ((4,), (1, 1), lambda options: (1,)):
        with pytest.raises(NpuKernelError) as caught:
            copy.warmup(x, x, 4, grid=grid)
        (found,) = caught.value.diagnostics
        assert (found.code, found.span.line, found.span.column) == ("GRID", copy.node.lineno, 5)
    copy.warmup(x, x, 4, grid=[1])
