"""The command line, as a user and as a program reads it."""

import json
import subprocess
import sys

import pytest

from tilewright import cli
from tilewright.bench import cpu_target
from tilewright.ops import families

FUNCTIONS = [function for family in families() for function in family.functions]


def run(capsys, *argv):
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list_names_every_operation(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert all(function in out for function in FUNCTIONS)


def test_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "tilewright", "list"], capture_output=True, text=True, check=True)
    assert "rope_qk" in shown.stdout


def test_list_as_json(capsys):
    status, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)["operations"]
    assert status == 0
    assert [row["operation"] for row in rows] == FUNCTIONS
    assert all(row["here"] in row["implementations"] for row in rows)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_explain(capsys, function):
    status, out, _ = run(capsys, "explain", function, "--impl", "reference", "--device", "cpu", "--json")
    record = json.loads(out)
    assert status == 0
    assert (record["operation"], record["chosen"]) == (function, "reference")
    assert run(capsys, "explain", function, "--device", "cpu")[1].startswith(function)


def test_explain_a_workload(capsys):
    status, out, _ = run(capsys, "explain", "rope", "--workload", "b32 s1 h32 d128", "--device", "cpu")
    assert status == 0
    assert "32 x 1 tokens" in out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("explain", "nothing"), "nothing"),
        (("explain", "rope", "--workload", "b0"), "b0"),
        (("explain", "rope", "--dtype", "bf15"), "bf15"),
        (("explain", "rope", "--impl", "cudnn"), "cudnn"),
        (("explain", "rope", "--device", "nowhere"), "nowhere"),
        (("bench", "nothing"), "nothing"),
        (("bench", "cpu", "--dtype", "float16"), "dtype"),
        (("bench", "cpu", "--workloads", "add"), "workloads"),
        (("demo", "--steps", "0"), "steps"),
    ],
)
def test_errors_are_one_line_without_a_traceback(capsys, argv, named):
    status, _, err = run(capsys, *argv)
    assert status == cli.EXIT_ERROR
    assert err.startswith("tilewright: error: ")
    assert named in err


CPU_RECORDS = [
    {"record": "run", "device": "A Processor", "target": "none", "environment": {"torch": {"threads": 1}}},
    {"record": "result", "workload": "add", "dtype": "float32", "provider": "triton", "status": "ok", "reason": ""},
]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_bench_cpu(capsys, monkeypatch, tmp_path, quick, right):
    asked = []
    records = [*CPU_RECORDS, {**CPU_RECORDS[1], "status": "ok" if right else "wrong", "reason": "it is off"}]
    monkeypatch.setattr(cpu_target, "measure", lambda quick, say=None: asked.append(quick) or records)
    options = ["--output", str(tmp_path), *(["--quick"] if quick else [])]
    status, out, _ = run(capsys, "bench", "cpu", *options, "--json")
    assert json.loads(out) == records
    shown = run(capsys, "bench", "cpu", *options)
    assert ("it is off" in shown[1]) != right
    assert status == shown[0] == (0 if right else cli.EXIT_DISAGREEMENT)
    assert asked == [quick, quick]
    assert [json.loads(line) for line in (tmp_path / "cpu-a-processor.jsonl").read_text().splitlines()] == records


def test_an_unknown_command_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["polish"])
    assert caught.value.code == cli.EXIT_ERROR


def test_collect_env_works_without_torch_and_triton():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None; from tilewright.cli import main; "
        "sys.exit(main(['collect-env', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert "error" in record["torch"]["version"]
    assert "error" in record["triton"]["version"]
    assert record["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
