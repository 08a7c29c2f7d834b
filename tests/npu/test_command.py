import json
import re
import sys
from pathlib import Path

import npu_kernels
import pytest
import torch

from tilewright import npu
from tilewright.cli import main
from tilewright.errors import ArgumentError, MissingDependencyError
from tilewright.npu import artifact, demo
from tilewright.npu.profiles import profiles
from tilewright.npu.rules import RULES
from tilewright.npu.specs import parse_argument, parse_arguments

FILE = npu_kernels.__file__


def run(capsys, *arguments):
    status = main(["npu", *arguments])
    return status, *capsys.readouterr()


def test_compile_infers_outputs_and_constexprs(capsys, tmp_path):
    status, out, _ = run(
        capsys,
        "compile",
        FILE,
        "--kernel",
        "matmul",
        "--args",
        "f32[2,5,64]",
        "b=f32[2,64,128]",
        "--output",
        str(tmp_path),
    )
    assert status == 0
    program = artifact.load(out.splitlines()[-1])
    assert program.manifest.constexprs == {"BATCH": 2, "M": 5, "K": 64, "N": 128}
    a, b, result = torch.randn(2, 5, 64), torch.randn(2, 64, 128), torch.full((2, 5, 128), torch.nan)
    program.run(a, b, result)
    torch.testing.assert_close(result, a @ b)
    full = ("f32[2,5,64]", "f32[2,64,128]", "f32[2,5,128]", "2", "5", "64", "N=128")
    _, out, _ = run(capsys, "compile", FILE, "--kernel", "matmul", "--args", *full, "--output", str(tmp_path))
    assert artifact.load(out.splitlines()[-1]).text == program.text


def test_compile_prints_json(capsys, tmp_path):
    arguments = ("--args", "row=f32[1,64]", "cache=f32[4,64]", "count=i32[1]", "--host-layout", "0:1", "--name", "put")
    status, out, _ = run(capsys, "compile", FILE, "--kernel", "append", *arguments, "--output", str(tmp_path), "--json")
    document = json.loads(out)
    assert status == 0
    assert document["manifest"]["kernel"] == "put"
    assert document["manifest"]["host_layout"] == [0, 1]
    assert document["manifest"]["indices"] == [2]


def test_text_is_a_constexpr_too(capsys, tmp_path):
    given = ("f32[4,64]", "f32[4,64]", "4", "64", "MODE='exp'", "SHAPE=(4,64)", "REST=0")
    status, out, _ = run(capsys, "compile", FILE, "--kernel", "by_mode", "--args", *given, "--output", str(tmp_path))
    assert status == 0
    assert artifact.load(out.splitlines()[-1]).manifest.constexprs["MODE"] == "exp"


def test_compile_for_another_target(capsys, tmp_path):
    status, out, _ = run(
        capsys,
        "compile",
        FILE,
        "--kernel",
        "matmul",
        "--args",
        "f32[1,8,8]",
        "f32[1,8,8]",
        "--profile",
        "tile",
        "--output",
        str(tmp_path),
    )
    assert status == 0
    files = artifact.load(out.splitlines()[-1]).files
    assert "linalg" in files["linalg.mlir"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.py", "--kernel", "matmul"), "missing.py"),
        ((FILE, "--kernel", "nothing"), "there are: scaled_sum, matmul, append"),
        ((FILE, "--kernel", "matmul", "--args", "f32[2,5,64]"), "'b': is missing"),
        ((FILE, "--kernel", "matmul", "--args", "f32[2,5,64]", "f32[2,60,128]"), "STRIDE_MISMATCH|OUT_OF_BOUNDS"),
        ((FILE, "--kernel", "matmul", "--args", "f32[2,5]", "f32[2,60,128]"), "a.shape"),
        ((FILE, "--kernel", "matmul", "--args", "f32[2,5,64]", "f32[2,64,128]", "f32[2,5,5]"), "it would be"),
        ((FILE, "--kernel", "matmul", "--args", "q32[2]"), "got dtype 'q32'"),
        ((FILE, "--kernel", "matmul", "--args", "f32[1 2]"), "invalid literal"),
        ((FILE, "--kernel", "matmul", "--args", "f32[99999999999999999999]"), "got 'f32"),
        ((FILE, "--kernel", "matmul", "--args", "f32[2,5,64]", "f32[2,64,64]", "N=f32[2]"), "it is a tl.constexpr"),
        ((FILE, "--kernel", "matmul", "--args", "f32[2,5,64]", "f32[2,64,64]", "--host-layout", "a:b"), "'1:2:3'"),
        ((FILE, "--kernel", "matmul", "--args", "nonsense"), "expected a tensor such as"),
        ((FILE, "--kernel", "matmul", "--args", "z=3"), "'z' is no parameter"),
        ((FILE, "--kernel", "matmul", "--args", "f32[1]", "a=f32[1]"), "'a' is given twice"),
        ((FILE, "--kernel", "matmul", "--profile", "hw-9"), "there is no profile"),
    ],
)
def test_compile_says_what_is_wrong(capsys, tmp_path, arguments, message):
    status, _, error = run(capsys, "compile", *arguments, "--output", str(tmp_path))
    assert status == 2
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_compile_does_not_run_the_file(capsys, tmp_path):
    path = tmp_path / "kernels.py"
    path.write_text(Path(FILE).read_text() + "\nraise SystemExit('run')\n")
    arguments = ("--args", "f32[1,8,64]", "f32[1,64,64]", "--output", str(tmp_path / "bundles"))
    assert run(capsys, "compile", str(path), "--kernel", "matmul", *arguments)[0] == 0


def test_what_only_running_would_tell_is_refused(capsys, tmp_path):
    path = tmp_path / "kernels.py"
    path.write_text(
        Path(FILE).read_text().replace("* scale)", "* FACTOR)") + "\nFACTOR = float(open('factor').read())\n"
    )
    arguments = ("--args", "x=f32[1,64]", "y=f32[1,64]", "scale=f32[]", "--output", str(tmp_path / "bundles"))
    status, _, error = run(capsys, "compile", str(path), "--kernel", "scaled_sum", *arguments)
    assert status == 2
    assert "cannot be compiled" in error
    assert "tl.store(out_block" in error


def test_demo(capsys, monkeypatch, tmp_path):
    small = demo.Case(heads=2, group=2, head_dim=64, partition=64, partitions=4, position=200)
    monkeypatch.setattr(demo, "Case", lambda: small)
    status, out, _ = run(capsys, "demo", "--output", str(tmp_path))
    assert status == 0
    for part in ("1. Check", "2. Compile", "3. The program", "4. Run", "NPU-KEEP_DIMS", "npu.dyn_load", "dlfloat16"):
        assert part in out
    (bundle,) = tmp_path.iterdir()
    assert artifact.load(bundle).name == "flash_causal_attention_naive_decode"
    errors = demo.run(None, small)
    assert [each.compute_dtype for each in errors] == ["float32", "bfloat16", "dlfloat16"]
    single, bfloat, dlfloat = (each.relative for each in errors)
    assert single < dlfloat < bfloat
    capsys.readouterr()
    status, out, _ = run(capsys, "demo", "--json")
    assert [each["compute_dtype"] for each in json.loads(out)] == ["float32", "bfloat16", "dlfloat16"]


def test_without_xdsl(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "xdsl", None)
    status, _, error = run(capsys, "check", FILE)
    assert status == 2
    assert "pip install 'tilewright[npu]'" in error
    monkeypatch.delitem(vars(npu), "register", raising=False)
    with pytest.raises(MissingDependencyError, match=r"npu\.register needs the package xdsl"):
        npu.register  # noqa: B018


def test_specs():
    assert parse_argument("bf16[2, 3]").dtype == torch.bfloat16
    assert parse_argument("fp32[]").shape == ()
    assert parse_argument("float16[4]").dtype == torch.float16
    assert parse_argument("int64[4]").dtype == torch.int64
    assert parse_argument("0.5") == 0.5
    assert parse_argument("'text'") == "text"
    assert parse_argument("True") is True
    with pytest.raises(ArgumentError, match="one too many"):
        parse_arguments(["a"], ["1", "2"])


@pytest.mark.parametrize("name", profiles())
def test_every_profile_names_rules_that_exist(name):
    chosen = profiles()[name]
    assert all(chosen.severity(rule.code) in {"error", "warning", "off"} for rule in RULES)
    assert chosen.supported
    assert set(chosen.fails) <= chosen.supported
