"""What the checker found, as text, as JSON and as SARIF."""

import json
from pathlib import Path

import pytest
from check_helpers import BARE, changed

import tilewright
from tilewright.npu.check import Report, check_file
from tilewright.npu.check.render import render_text, to_json, to_sarif
from tilewright.npu.diagnostics import Diagnostic
from tilewright.npu.rules import RULES
from tilewright.npu.source import SourceFile, Span

SOURCE = SourceFile(
    "kernels/attention.py",
    "\n".join(
        ["#"] * 40 + ["    m = tl.max(x, axis=2)", "", "\tout = tl.dot(a,", "\t\t    b)", 's = "최대"; m = f(x)']
    ),
)
SOURCES = {SOURCE.path: SOURCE}


def finding(line, column, end_line, end_column, *, code="KEEP_DIMS", severity="error", hint="", file=SOURCE.path):
    span = Span(file, line, column, end_line, end_column)
    return Diagnostic(code, severity, "tl.max(axis=2) drops the reduced axis", span, hint, "hw-0.11.1")


def lines_of(*findings):
    return render_text(findings, SOURCES).split("\n")


def test_text():
    text = render_text([finding(41, 9, 41, 26, hint="tl.max(x, axis=2, keep_dims=True)")], SOURCES)
    assert text == (
        "kernels/attention.py:41:9: error[NPU-KEEP_DIMS] tl.max(axis=2) drops the reduced axis\n"
        "   41 |     m = tl.max(x, axis=2)\n"
        "      |         ^^^^^^^^^^^^^^^^^  hint: tl.max(x, axis=2, keep_dims=True)"
    )


def test_nothing_found_is_no_text():
    assert render_text([], {}) == ""


def test_several_findings_stand_under_each_other():
    lines = lines_of(finding(41, 5, 41, 6), finding(41, 9, 41, 11, severity="warning", code="OP_DOC_ONLY"))
    assert lines[2] == "      |     ^"
    assert lines[3].startswith("kernels/attention.py:41:9: warning[NPU-OP_DOC_ONLY]")
    assert len(lines) == 6


def test_tabs_stay_tabs():
    assert lines_of(finding(43, 2, 43, 5))[1:] == ["   43 | \tout = tl.dot(a,", "      | \t^^^"]


def test_of_several_lines_the_first_is_underlined():
    assert lines_of(finding(43, 8, 44, 9))[1:] == ["   43 | \tout = tl.dot(a,", "      | \t      ^^^^^^^^^"]


def test_wide_characters_have_two_columns():
    assert lines_of(finding(45, 11, 45, 12))[1:] == ['   45 | s = "최대"; m = f(x)', "      |             ^"]
    assert lines_of(finding(45, 5, 45, 9))[2] == "      |     ^^^^^^"


def test_nothing_to_underline_has_a_caret():
    assert lines_of(finding(41, 26, 41, 26))[2] == "      |                          ^"


@pytest.mark.parametrize("span", [(0, 0, 0, 0), (42, 1, 42, 1), (900, 1, 900, 2)])
def test_without_a_line_a_finding_is_one_line(span):
    (line,) = lines_of(finding(*span, hint="keep_dims=True"))
    assert line.endswith("error[NPU-KEEP_DIMS] tl.max(axis=2) drops the reduced axis; hint: keep_dims=True")


def test_without_its_file_a_finding_is_one_line():
    assert len(lines_of(finding(1, 1, 1, 2, file="other.py"))) == 1


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Of a file in the working directory with one finding that counts, and one that is ignored."""
    monkeypatch.chdir(tmp_path)
    text = changed(
        ("grid=(1,)", "grid=(2,)"),
        ('host_layout="1:2")', 'host_layout="1:2")  # npu: ignore'),
        ("add_wrapper(", "add_op("),
    )
    Path("my kernels.py").write_text(text)
    return check_file("my kernels.py")


def test_report(report):
    assert isinstance(report, Report)
    assert [each.code for each in report.errors] == ["WRAPPER_NAME"]
    assert (report.warnings, report.ignored, report.profile) == ((), 1, "hw-0.11.1")
    assert str(report).startswith("my kernels.py:24:5: error[NPU-WRAPPER_NAME]")


def test_json(report):
    record = json.loads(json.dumps(to_json(report)))
    assert (record["version"], record["profile"]) == (1, "hw-0.11.1")
    assert record["counts"] == {"files": 1, "errors": 1, "warnings": 0, "ignored": 1}
    assert record["files"] == ["my kernels.py"]
    (found,) = record["diagnostics"]
    assert found.pop("message").startswith("the compiler calls 'add_wrapper'")
    assert found == {
        "code": "NPU-WRAPPER_NAME",
        "severity": "error",
        "hint": "def add_wrapper(...)",
        "file": "my kernels.py",
        "line": 24,
        "column": 5,
        "end_line": 24,
        "end_column": 11,
    }


def test_sarif(report):
    log = json.loads(json.dumps(to_sarif(report)))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    assert run["columnKind"] == "unicodeCodePoints"
    assert run["invocations"] == [{"executionSuccessful": True}]
    assert run["artifacts"] == [{"location": {"uri": "my%20kernels.py"}, "sourceLanguage": "python"}]
    (result,) = run["results"]
    assert result["ruleId"] == "NPU-WRAPPER_NAME"
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    assert result["level"] == "error"
    assert result["message"]["text"].endswith("\nhint: def add_wrapper(...)")
    assert result["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "my%20kernels.py"},
                "region": {"startLine": 24, "startColumn": 5, "endLine": 24, "endColumn": 11},
            }
        }
    ]


def test_sarif_names_every_rule_with_its_level(report):
    driver = to_sarif(report)["runs"][0]["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("tilewright npu check", tilewright.__version__)
    assert [each["id"] for each in driver["rules"]] == [f"NPU-{rule.code}" for rule in RULES]
    for each, rule in zip(driver["rules"], RULES, strict=True):
        assert each["shortDescription"]["text"] == rule.summary
        assert rule.code in each["help"]["text"]
        assert each["defaultConfiguration"]["enabled"]
        assert each["defaultConfiguration"]["level"] in ("error", "warning")


def test_sarif_has_the_levels_of_the_profile(tmp_path):
    (tmp_path / "kernels.py").write_text(BARE)
    run = to_sarif(check_file(tmp_path / "kernels.py", "tile"))["runs"][0]
    levels = {each["name"]: each["defaultConfiguration"] for each in run["tool"]["driver"]["rules"]}
    assert levels["KEEP_DIMS"] == {"level": "none", "enabled": False}
    assert levels["PARTITION_DIV"] == {"level": "warning", "enabled": True}
    assert run["properties"]["profile"] == "tile"


def test_sarif_names_files_elsewhere_by_whole_addresses(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "kernels.py").write_text(changed(("add_wrapper(", "add_op(")))
    monkeypatch.chdir(tmp_path / "here")
    (result,) = to_sarif(check_file("../kernels.py"))["runs"][0]["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == (tmp_path / "kernels.py").as_uri()


def test_sarif_of_a_finding_without_a_line():
    found = finding(0, 0, 0, 0)
    (result,) = to_sarif(Report((found,), {}, 0, "doc"))["runs"][0]["results"]
    assert "region" not in result["locations"][0]["physicalLocation"]
    assert result["message"] == {"text": found.message}
