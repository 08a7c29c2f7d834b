"""The benchmark's harness, on a family of its own: scaling a matrix. No test looks at how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench_helpers import FAMILY, bench, found
from tilewright.bench import environment, plots, records, report, runner, timing
from tilewright.errors import ArgumentError, BenchmarkError, MissingDependencyError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("scaling_family")

# The environment


def in_subprocess(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("raised", ["ImportError", "OSError", "RuntimeError"])
def test_environment_works_where_torch_and_triton_cannot_be_imported(raised: str) -> None:
    record = in_subprocess(f"""
        import json, sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "triton"):
                    raise {raised}("libexample.so.1: cannot open /opt/broken/stack/lib")

        sys.meta_path.insert(0, Blocker())
        from tilewright.bench import environment
        record = environment.collect()
        record["text"] = environment.format(record)
        print(json.dumps(record))
    """)
    assert record["torch"]["version"]["error"].startswith(f"{raised}: libexample.so.1")
    assert record["triton"]["version"]["error"].startswith(raised)
    assert "error" in record["devices"]
    assert record["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert record["tilewright"]["version"]
    assert "/opt/broken" not in json.dumps(record)
    assert "not available" in record["text"]


def test_environment_is_imported_without_torch() -> None:
    assert (
        in_subprocess("""
        import json, sys
        from tilewright.bench import environment
        print(json.dumps(sorted({"torch", "triton"} & set(sys.modules))))
    """)
        == []
    )


def test_environment_tells_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/someone/cache/triton")
    monkeypatch.setenv("TILEWRIGHT_CHECK_DEVICE_VALUES", "1")
    monkeypatch.setenv("UNRELATED_SECRET", "hush")
    record = environment.collect()
    assert record["torch"]["version"] == torch.__version__
    assert record["environment"]["TILEWRIGHT_CHECK_DEVICE_VALUES"] == "1"
    assert record["environment"]["TRITON_CACHE_DIR"] == ".../triton"
    text = json.dumps(record) + environment.format(record)
    assert torch.__version__ in environment.format(record)
    assert "someone" not in text
    assert "hush" not in text
    assert str(Path(__file__).parent.parent) not in text


# Records


def test_records_round_trip(tmp_path: Path) -> None:
    result = bench(tmp_path, workloads=["rows 16"], providers=["good", "rounded", "absent", "picky", "failing"])
    assert list(result.records) == records.read(result.path)
    assert [json.loads(line) for line in result.path.read_text().splitlines()] == list(result.records)
    first = result.records[0]
    assert first["record"] == "run"
    assert first["environment"]["torch"]["version"] == torch.__version__
    assert first["providers"]["absent"]["missing"] == "not installed"
    assert len(records.results(result.records)) == 2 * 4  # the absent one has none
    assert {record["provider"] for record in records.hosts(result.records)} == {"good", "rounded", "picky", "failing"}
    good = next(record for record in records.hosts(result.records) if record["provider"] == "good")
    assert good["host_us"] > 0
    assert good["host_grad_us"] > 0


def test_failures_are_listed_and_the_others_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, workloads=["rows 64"], providers=["failing", "refusing", "picky", "good"])
    for direction in ("forward", "backward"):
        status = {p: found(result, p, direction)[0] for p in ("failing", "refusing", "picky", "good")}
        assert status["failing"]["status"] == "failed"
        assert status["failing"]["reason"] == "ValueError: cannot open .../thing.so"
        assert status["refusing"]["status"] == "unsupported"
        assert status["picky"] | {"status": "unsupported", "reason": "too many rows"} == status["picky"]
        assert status["good"]["status"] == "ok"


def test_interrupted_run_keeps_what_it_has_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, workloads=["rows 16"], providers=["good", "interrupting"])
    assert result.interrupted
    assert [record["provider"] for record in records.results(result.records)] == ["good"]
    assert json.loads(result.path.read_text().splitlines()[0])["interrupted"]


def test_run_that_is_interrupted_at_once_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "out", workloads=["rows 16"], providers=["interrupting"])
    assert not list(tmp_path.rglob("*"))


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records.write(path, [{"record": "run", "format": records.FORMAT, "worst": float("inf")}])
    before = path.read_text()
    assert records.read(path)[0]["worst"] is None  # JSON has no infinity

    def broken() -> Iterator[dict[str, Any]]:
        yield {"record": "run", "format": records.FORMAT}
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        records.write(path, broken())
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "{}\n", "not json\n", '{"record": "result"}\n', '{"record": "run", "format": 0}\n']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=r"other\.jsonl"):
        records.read(path)


# Reports and plots


def test_markdown(tmp_path: Path) -> None:
    result = bench(tmp_path, providers=["good", "rounded", "wrong", "absent", "copy"])
    text = report.to_markdown(result.path)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    sections = text.split("### ")[1:-1]
    assert [section.splitlines()[0] for section in sections] == ["rows", "wide rows"]
    for section in sections:
        widths = {line.count("|") for line in section.splitlines() if line.startswith("|")}
        assert len(widths) == 1
    assert sum("**good**" in line for line in tables) == len(FAMILY.workloads)  # alone in doing the whole job rightly
    assert sum("| ~rounded |" in line for line in tables) == len(FAMILY.workloads)
    assert all("wrong" in line.split("|")[3] for line in tables if line.split("|")[2].strip() == "wrong")
    assert "absent is not measured: not installed" in text
    assert "wrong is wrong and was not timed" in text
    assert f"torch {torch.__version__}" in text


def test_fastest_is_neither_copy_nor_less_precise() -> None:
    def record(provider: str, median: float, status: str = "ok", less_precise: str = "") -> dict[str, Any]:
        gate = {"less_precise": less_precise}
        return {"provider": provider, "status": status, "gate": gate, "stream": {"median_us": median}}

    measured = [
        record("copy", 1.0),
        record("rounded", 2.0, less_precise="rounds twice"),
        {"provider": "wrong", "status": "wrong"},
        record("slow", 4.0),
        record("fast", 3.0),
    ]
    leader = records.best(measured)
    assert leader is not None
    assert leader["provider"] == "fast"
    assert records.best(measured[:3]) is None


def test_terminal_output(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(record=True, width=120, file=open(tmp_path / "terminal", "w"))  # noqa: SIM115
    result = bench(tmp_path / "out", providers=["good", "wrong", "copy"], quiet=False, console=console)
    console.file.close()
    text = console.export_text()
    for workload in FAMILY.workloads:
        assert workload.name in text
    assert "wrong is wrong and was not timed" in text
    assert result.path.name in text


def test_plots(tmp_path: Path) -> None:
    result = bench(tmp_path / "run", providers=["good", "rounded", "wrong", "copy"])
    assert {figure.name for figure in result.figures} >= {f"{result.path.stem}-rows.png"}
    figures = plots.draw(result.path, tmp_path / "figures")
    assert len(figures) == 2 * len(plots.FORMATS)
    assert all(figure.stat().st_size > 1000 for figure in figures)
    members = [record for record in records.results(result.records) if record["status"] == "ok"]
    rows = [record for record in members if record["sweep"] == "rows"]
    partial = [r for r in rows if r["provider"] == "good" or r["direction"] == "forward"]
    (legend,) = (panel.get_legend() for panel in plots._figure(result.records[0], "rows", partial).axes[1:])
    assert {text.get_text() for text in legend.get_texts()} == {"good", "~rounded", "copy"}
    drawn = plots._figure(result.records[0], "rows", rows)
    assert [panel.get_title() for panel in drawn.axes] == ["forward", "backward"]
    for panel in drawn.axes:
        assert panel.get_ylim()[0] == 0.0
        lines = {line.get_label(): line for line in panel.get_lines() if not line.get_label().startswith("_")}
        assert set(lines) == {"good", "~rounded", "copy"}
        assert list(lines["good"].get_xdata()) == [4, 16, 64]
        assert list(lines["good"].get_ydata()) == [
            record["stream"]["share"]
            for record in members
            if (record["sweep"], record["provider"], record["direction"]) == ("rows", "good", panel.get_title())
        ]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingDependencyError, match="rich"):
        bench(tmp_path, quiet=False)
    result = bench(tmp_path, providers=["good"], workloads=["rows 16"])  # quiet needs neither
    assert not result.figures
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        plots.draw(result.path, tmp_path)


# Arguments


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'scalling'.*scaling"):
        runner.run("scalling", device="cpu", output=tmp_path, quiet=True)
    with pytest.raises(UnknownNameError, match=r"'best'.*good"):
        bench(tmp_path, providers=["good", "best"])
    with pytest.raises(UnknownNameError, match=r"'rows 5'.*rows 4"):
        bench(tmp_path, workloads=["rows 5"])
    for argument, value in (
        ("dtype", "float16"),
        ("dtype", "nonsense"),
        ("directions", ["sideways"]),
        ("directions", []),
    ):
        with pytest.raises(ArgumentError) as caught:
            bench(tmp_path, **{argument: value})
        assert caught.value.argument == argument
    with pytest.raises(ArgumentError) as caught:
        bench(tmp_path, device="nowhere")
    assert caught.value.argument == "device"
    with pytest.raises(ArgumentError, match="device"):
        bench(tmp_path, device="meta")
    assert not list(tmp_path.iterdir())


def test_max_bytes(tmp_path: Path) -> None:
    small = FAMILY.workloads[1].bytes_moved(torch.bfloat16, "forward")
    result = bench(tmp_path, providers=["good"], max_bytes=small)
    assert {record["workload"] for record in found(result, "good")} == {"rows 4 columns 64", "rows 16 columns 64"}
    with pytest.raises(BenchmarkError, match="no workload is left"):
        bench(tmp_path, max_bytes=1)


def test_quick_run_measures_the_largest_of_each_sweep(tmp_path: Path) -> None:
    result = bench(tmp_path, providers=["good"], quick=True)
    assert [record["workload"] for record in found(result, "good")] == ["rows 64 columns 64", "rows 8 columns 512"]


def test_output_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.jsonl"
    assert bench(path, providers=["good"], workloads=["rows 16"]).path == path
    assert path.exists()


def test_broken_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: timing.HostTimer) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing.HostTimer, "synchronize", broken)
    with pytest.raises(BenchmarkError, match="'failing' has broken the device"):
        bench(tmp_path, providers=["failing"], workloads=["rows 16"])
    assert not list(tmp_path.iterdir())
