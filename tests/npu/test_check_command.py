"""Files and folders that are checked together, and ``tilewright npu`` as a user and as a program reads it."""

import json
from pathlib import Path

import pytest
from check_helpers import BARE, KERNEL, MODULE, changed

from tilewright import cli
from tilewright.errors import ArgumentError, UnknownNameError
from tilewright.npu.check import check_file, check_files
from tilewright.npu.profiles import DEFAULT_PROFILE, profiles
from tilewright.npu.rules import RULES

WRONG_NAME = changed(("def add_wrapper(", "def add_op("))
LATE_OUTPUT = changed(
    ("    output = torch.empty_like(x)\n", ""), ("    params", "    output = torch.empty_like(x)\n    params")
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv):
    status = cli.main(("npu", *argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def codes(report):
    return [(each.code, str(each.span)) for each in report.diagnostics]


# Files and folders


def test_a_module_that_breaks_no_rule(folder):
    for name, text in (("module.py", MODULE), ("bare.py", BARE.replace("def add", "def plus"))):
        Path(name).write_text(text)
    report = check_files(["module.py", Path("bare.py")])
    assert codes(report) == []
    assert list(report.sources) == ["module.py", "bare.py"]


def test_a_file_without_a_kernel_has_no_findings(folder):
    Path("plain.py").write_text("from . import common\n\ncommon.run()\n")
    report = check_file("plain.py")
    assert (codes(report), list(report.sources)) == ([], ["plain.py"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("x = 1\ndef f(:\n    pass\n", "broken.py:2:7"),
        ("def f(", "broken.py:1:6"),
        ("x = '''\n", "broken.py:1:5"),
        ("if x:\n", "broken.py:1:6"),
        ("x = 1\n  y = 2\n", "broken.py:2:2"),
        ("é = 'é' x\n", "broken.py:1:9"),
        ("\0", "broken.py:1:1"),
    ],
)
def test_a_file_that_is_not_python(folder, text, place):
    Path("broken.py").write_text(text, encoding="utf-8")
    report = check_file("broken.py")
    assert codes(report) == [("SYNTAX", place)]
    assert "^" in str(report) or text == "\0"


def test_what_is_no_text_in_a_folder_is_passed_over(folder):
    Path("kernels").mkdir()
    Path("kernels/add.py").write_text(WRONG_NAME)
    Path("kernels/image.py").write_bytes(b"\xff\xfe\x00")
    Path("kernels/gone.py").symlink_to("nowhere.py")
    report = check_file("kernels")
    assert list(report.sources) == [str(Path("kernels/add.py"))]
    assert codes(report)


def test_a_folder_is_searched_for_kernels(folder):
    files = {
        "kernels/add.py": WRONG_NAME,
        "kernels/plain.py": "def f(): pass",
        "kernels/deep/bare.py": BARE.replace("def add", "def plus"),
        "kernels/deep/broken.py": f"{BARE}\n)",
        "kernels/deep/template.py": "{{ this is no Python }}",
        "kernels/deep/notes.txt": KERNEL,
        "kernels/.hidden/add.py": WRONG_NAME,
        "kernels/__pycache__/add.py": WRONG_NAME,
        "kernels/environment/add.py": WRONG_NAME,
        "kernels/environment/pyvenv.cfg": "",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    report = check_files(["kernels"])
    assert list(report.sources) == ["kernels/add.py", "kernels/deep/bare.py", "kernels/deep/broken.py"]
    assert codes(report) == [("WRAPPER_NAME", "kernels/add.py:24:5"), ("SYNTAX", "kernels/deep/broken.py:11:1")]


def test_a_file_that_is_named_twice_is_checked_once(folder):
    Path("kernels").mkdir()
    Path("kernels/add.py").write_text(WRONG_NAME)
    report = check_files(["kernels/add.py", "kernels", Path("kernels/add.py").resolve()])
    assert codes(report) == [("WRAPPER_NAME", "kernels/add.py:24:5")]


def test_one_name_in_two_files(folder):
    Path("first.py").write_text(MODULE)
    Path("second.py").write_text(BARE)
    assert codes(check_files(["first.py", "second.py"])) == [("SAME_KERNEL_NAME", "second.py:6:5")]
    assert codes(check_files(["second.py", "first.py"])) == [("SAME_KERNEL_NAME", "first.py:11:5")]
    assert codes(check_files(["first.py", "second.py"], "tile")) == []


def test_findings_in_kernels_stand_beside_those_of_the_file(folder):
    text = changed(("def add_wrapper(", "def add_op("), ("x + y)", "tl.arange(0, 4))"))
    Path("add.py").write_text(text)
    assert [code for code, _ in codes(check_file("add.py"))] == ["UNSUPPORTED_OP", "WRAPPER_NAME"]


def test_a_file_in_another_encoding_is_read_as_python_reads_it(folder):
    Path("latin.py").write_bytes(f"# -*- coding: latin-1 -*-\n# für\n{MODULE}".encode("latin-1"))
    assert codes(check_file("latin.py")) == []


def test_what_cannot_be_checked(folder):
    with pytest.raises(ArgumentError, match=r"npu check: argument 'FILE': there is no file or folder 'nothing.py'"):
        check_file("nothing.py")
    Path("image.py").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ArgumentError, match=r"'image.py' cannot be read"):
        check_file("image.py")
    Path("add.py").write_text(MODULE)
    with pytest.raises(UnknownNameError, match="no profile 'hw-9'"):
        check_file("add.py", "hw-9")


# The command


def test_clean(folder, capsys):
    Path("add.py").write_text(MODULE)
    assert run(capsys, "check", "add.py") == (0, f"0 errors, 0 warnings in 1 file ({DEFAULT_PROFILE})\n", "")


def test_an_error(folder, capsys):
    Path("add.py").write_text(WRONG_NAME)
    status, out, err = run(capsys, "check", "add.py", "--profile", "doc")
    lines = out.splitlines()
    assert (status, err) == (1, "")
    assert lines[0].startswith("add.py:24:5: error[NPU-WRAPPER_NAME] ")
    assert lines[1] == "   24 | def add_op(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:"
    assert lines[2] == "      |     ^^^^^^  hint: def add_wrapper(...)"
    assert lines[3] == "1 error, 0 warnings in 1 file (doc)"


def test_a_warning_counts_where_it_is_asked_to(folder, capsys):
    Path("add.py").write_text(LATE_OUTPUT)
    status, out, _ = run(capsys, "check", "add.py")
    assert (status, out.splitlines()[-1]) == (0, f"0 errors, 1 warning in 1 file ({DEFAULT_PROFILE})")
    assert run(capsys, "check", "add.py", "--strict")[0] == 1


def test_the_profile_decides(folder, capsys):
    Path("add.py").write_text(WRONG_NAME)
    assert run(capsys, "check", "add.py", "--profile", "tile")[0] == 0


def test_what_is_ignored_is_counted(folder, capsys):
    line = "def add_op(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:\n    x, y"
    Path("add.py").write_text(changed((line, line.replace(":\n", ":  # npu: ignore[WRAPPER_NAME]\n")), text=WRONG_NAME))
    assert run(capsys, "check", "add.py")[:2] == (0, f"0 errors, 0 warnings, 1 ignored in 1 file ({DEFAULT_PROFILE})\n")


@pytest.mark.parametrize("form", ["json", "sarif"])
def test_for_programs(folder, capsys, form):
    Path("add.py").write_text(WRONG_NAME)
    status, out, _ = run(capsys, "check", "add.py", "--format", form)
    record = json.loads(out)
    assert (status, record["version"]) == (1, {"json": 1, "sarif": "2.1.0"}[form])
    status, told, _ = run(capsys, "check", "add.py", "--format", form, "--output", f"found.{form}")
    assert status == 1
    assert told == f"1 error, 0 warnings in 1 file ({DEFAULT_PROFILE}); written to found.{form}\n"
    assert json.loads(Path(f"found.{form}").read_text()) == record


def test_text_in_a_file(folder, capsys):
    Path("add.py").write_text(WRONG_NAME)
    assert run(capsys, "check", "add.py", "--output", "found.txt")[0] == 1
    assert Path("found.txt").read_text() == f"{check_file('add.py')}\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("nothing.py",), "there is no file or folder 'nothing.py'"),
        (("add.py", "--profile", "hw-9"), "there is no profile 'hw-9'"),
        (("add.py", "--output", "nowhere/found.txt"), "'nowhere/found.txt' cannot be written"),
    ],
)
def test_errors(folder, capsys, argv, told):
    Path("add.py").write_text(MODULE)
    status, out, err = run(capsys, "check", *argv)
    assert (status, out) == (2, "")
    assert told in err


@pytest.mark.parametrize("argv", [(), ("check",), ("check", "add.py", "--format", "xml"), ("nothing",)])
def test_usage(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *argv)
    assert stopped.value.code == 2


def test_rules(capsys):
    status, out, _ = run(capsys, "rules")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith(f"{DEFAULT_PROFILE}: ")
    assert lines[2].split() == ["CODE", "SEVERITY", "WHEN", "SUMMARY"]
    listed = [line.split()[0] for line in lines[3:] if not line.startswith(" ")]
    assert listed == [rule.code for rule in RULES]
    (keep_dims,) = (line for line in lines if line.startswith("KEEP_DIMS "))
    assert keep_dims.split(maxsplit=3) == ["KEEP_DIMS", "error", "kernel", "tl.max and tl.sum have keep_dims=True."]


def test_rules_of_a_profile(capsys):
    lines = run(capsys, "rules", "--profile", "tile")[1].splitlines()
    (index,) = (index for index, line in enumerate(lines) if line.startswith("NAMESPACE "))
    assert lines[index].split()[1] == "off"
    assert lines[index + 1].strip() == "(nothing is compiled again by name)"
    record = json.loads(run(capsys, "rules", "--profile", "tile", "--json")[1])
    assert record["profile"] == "tile"
    (rule,) = (each for each in record["rules"] if each["code"] == "NAMESPACE")
    assert (rule["severity"], rule["when"], rule["reason"]) == ("off", "file", "nothing is compiled again by name")
    assert run(capsys, "rules", "--profile", "hw-9")[0] == 2


def test_profiles(capsys):
    status, out, _ = run(capsys, "profiles")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")][1:] == list(profiles())
    record = json.loads(run(capsys, "profiles", "--json")[1])
    assert record["default"] == DEFAULT_PROFILE
    assert [each["profile"] for each in record["profiles"]] == list(profiles())
