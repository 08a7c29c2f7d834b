"""From kernel to native code: with a compiler, without, with one that fails; caches; artifacts to read."""

import json
import re
import runpy
import stat
import textwrap
from importlib.resources import files

import pytest
import torch
import triton
import triton.language as tl

from cpu_target_helpers import on_the_processor, run_program
from tilewright import settings
from tilewright.cpu import build, kernel
from tilewright.errors import KernelBuildError
from tilewright.platforms import cpu as platform


@pytest.fixture(autouse=True)
def _on_the_processor():
    with on_the_processor():
        yield


@pytest.fixture
def compiler_of(monkeypatch, tmp_path):
    """Replace the C compiler by a script, in a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def replace(script):
        monkeypatch.setenv("CC", executable(tmp_path / "compiler", script))
        forget()

    def forget():
        platform.c_compiler.cache_clear()
        build.machine.cache_clear()

    yield replace
    monkeypatch.undo()
    forget()


def executable(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, i < n), i < n)


# A program that launches a kernel twice with one tile and once with another.
PROGRAM = """
import warnings
import torch, triton, triton.language as tl
import tilewright, tilewright.cpu

@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, i < n), i < n)

with warnings.catch_warnings(record=True) as caught, tilewright.cpu.active():
    warnings.simplefilter("always")
    for block in (256, 256, 128):
        x, out = torch.arange(999), torch.zeros(999, dtype=torch.int64)
        compiled = double[(8,)](x, out, 999, BLOCK=block)
        assert torch.equal(out, 2 * x)
warned = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
print(len(warned), compiled.metadata.executor, *warned)
if not torch.accelerator.is_available():
    cos, sin = tilewright.rope_table(16, 8)
    for impl in (None, "triton"):
        explained = tilewright.explain("rope", torch.ones(1, 8, 2, 16), cos, sin, impl=impl)
        print(explained.chosen)
        print(explained)
"""


@pytest.mark.parametrize("how", ["CC", "PATH"])
def test_without_a_compiler_the_interpreter_serves(tmp_path, how):
    """Neither what CC names nor anything on the path: one warning, right results, and explain says so."""
    empty = tmp_path / "bin"
    empty.mkdir()
    without = {"CC": "/nonexistent/cc"} if how == "CC" else {"PATH": str(empty)}
    first, *rest = run_program(PROGRAM, tmp_path, **without).splitlines()
    assert first.startswith("1 interpreter ")
    assert "no C compiler" in first
    check_explained(rest, "there is no C compiler")


def test_the_interpreter_on_request(tmp_path):
    first, *rest = run_program(PROGRAM, tmp_path, TILEWRIGHT_CPU_EXECUTOR="interpreter").splitlines()
    assert first == "0 interpreter"
    check_explained(rest, "TILEWRIGHT_CPU_EXECUTOR=interpreter")


def check_explained(lines, reason):
    """What is interpreted serves on request only. Where there is an accelerator nothing was asked."""
    if lines:
        assert [line for line in lines if line in ("reference", "triton")] == ["reference", "triton"]
        assert "interpreted on the CPU" in "\n".join(lines)
        assert reason in "\n".join(lines)


LOGGING = 'echo "$@" >> {log}; exec {real} "$@"'


def test_a_second_process_does_not_call_the_compiler(tmp_path):
    """Save to ask for its version, which is part of the key."""
    log = tmp_path / "log"
    compiler = executable(tmp_path / "logged-gcc", LOGGING.format(log=log, real=platform.c_compiler()))
    calls = []
    for _ in range(2):
        log.write_text("")
        assert run_program(PROGRAM, tmp_path, CC=compiler).startswith("0 native")
        calls.append([line for line in log.read_text().splitlines() if line != "--version"])
    assert len(calls[0]) == 2  # one for each tile
    assert all("-o" in line.split() for line in calls[0])
    assert calls[1] == []


def test_a_compiler_that_fails_is_an_error_with_its_words(compiler_of):
    compiler_of('echo "the disc is full of eels" >&2; exit 1')
    fresh, out = triton.JITFunction(double.fn), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(KernelBuildError, match=r"(?s)cannot build the kernel 'double'.*the disc is full of eels"):
        fresh[(1,)](torch.ones(64, dtype=torch.int32), out, 64, BLOCK=64)
    assert not out.any()


def test_a_compiler_that_writes_nonsense_is_an_error(compiler_of):
    compiler_of('while [ $# -gt 1 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done; exit 0')
    fresh, out = triton.JITFunction(double.fn), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(KernelBuildError, match="cannot be loaded"):
        fresh[(1,)](torch.ones(64, dtype=torch.int32), out, 64, BLOCK=64)
    assert not out.any()


def test_the_compiler_is_part_of_the_key(compiler_of, tmp_path):
    """Another compiler, or another version of it, builds anew."""
    real, log, x = platform.c_compiler(), tmp_path / "log", torch.arange(64)
    built = []
    for version in ("one 1.0", "one 1.0", "one 2.0"):
        compiler_of(
            f'if [ "$1" = --version ]; then echo "{version}"; exit 0; fi; ' + LOGGING.format(log=log, real=real)
        )
        log.write_text("")
        fresh, out = triton.JITFunction(double.fn), torch.zeros(64, dtype=torch.int64)
        fresh[(1,)](x, out, 64, BLOCK=64)
        assert torch.equal(out, 2 * x)
        built.append(len(log.read_text().splitlines()))
    assert built == [1, 0, 1]


# Artifacts


def artifact():
    compiled = double.warmup(torch.int32, torch.int32, 1000, BLOCK=64, grid=(1,))
    return json.loads(compiled.asm["cpukernel"])


def test_the_artifact_is_readable():
    found = artifact()
    assert found["name"] == "double"
    assert found["types"] == ["!tt.ptr<i32>", "!tt.ptr<i32>", "i32"]
    assert found["written"] == [False, True, False]
    assert "tt.load" in found["ttir"]
    assert "tw_launch" in found["c"]


def test_the_loop_program_is_readable():
    """As the folder's README shows it: one loop over the tile that loads, multiplies and stores."""
    text = str(kernel.loop_program(artifact()["ttir"]))
    assert "double" in text
    assert "x_ptr" in text
    assert "out_ptr" in text


def test_the_artifacts_kernel_runs_by_itself():
    """What is in the cache suffices to run it, without the kernel's source."""
    loaded = kernel.Kernel(json.dumps(artifact()).encode())
    x, out = torch.arange(1000, dtype=torch.int32), torch.zeros(1000, dtype=torch.int32)
    loaded.run((16, 1, 1), [x.data_ptr(), out.data_ptr(), 1000], overlapping=False)
    assert torch.equal(out, 2 * x)


# The folder's README

README = files("tilewright.cpu").joinpath("README.md").read_text(encoding="utf-8")


def blocks(language):
    """The code blocks of a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text) for _, text in found]


def words(text):
    """Without line breaks, and without the numbers by which versions of Triton tell unnamed values apart."""
    return "".join(re.sub(r"\bi_\d+_", "i_", text).split())


def test_the_readmes_example_gives_what_it_shows(tmp_path):
    kernel_and_launch, look = blocks("python")
    file = tmp_path / "example.py"
    file.write_text(kernel_and_launch + look.replace("print(", "shown = str("), encoding="utf-8")
    example = runpy.run_path(str(file))
    loops, _ = blocks("text")
    assert words(example["shown"]) == words(loops)
    (innermost,) = blocks("c")
    assert words(innermost) in words(example["artifact"]["c"])


def test_the_readme_names_every_file():
    for path in files("tilewright.cpu").iterdir():
        if path.name.endswith((".py", ".h")) and path.name != "__init__.py":
            assert f"`{path.name}`" in README or path.name.startswith("interpreter"), path.name


def test_the_readme_names_every_setting():
    assert f"`{settings.CPU_EXECUTOR}`" in README
    assert f"`{settings.CPU_SANITIZE}`" in README
