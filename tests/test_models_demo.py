"""The demo: what a run of it finds, on the terminal, as JSON and in the report."""

from __future__ import annotations

import dataclasses
import html
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from models_helpers import TINY_SCALE
from tilewright.errors import ArgumentError, MissingDependencyError
from tilewright.models import demo, figures, report
from tilewright.models.parts import Parts, Served
from tilewright.numerics import compare_curves, curve_budget
from tilewright.platforms import facts


@pytest.fixture(scope="module")
def result():
    return demo.run(device="cpu", output=None, quiet=True, scale=TINY_SCALE)


# The demo


def test_demo_agrees_and_explains(result):
    assert result.agrees
    assert result.steps == 6
    assert result.truth.dtype == "float64"
    operations = ["rms_norm", "rope_qk", "add_rms_norm"]  # in the order of their first calls
    assert [served.operation for served in result.plain.served] == operations
    assert [served.operation for served in result.tilewright.served] == operations
    assert {served.implementation for served in result.plain.served} == {"plain PyTorch"}
    chosen = "triton" if facts(torch.device("cpu")).triton else "reference"  # not beside an accelerator
    assert {served.implementation for served in result.tilewright.served} == {chosen}
    assert all(served.reason for served in result.tilewright.served)
    assert len(result.plain.sample) == len(result.tilewright.sample) == 50
    assert result.truth.sample is None


def test_demo_compares_hyper_connections_as_well(result):
    hyper = result.hyper
    assert hyper.agrees
    assert result.all_agree
    assert (hyper.steps, hyper.config.hc_mult, hyper.truth.dtype) == (4, 3, "float64")
    assert hyper.n_parameters > result.n_parameters
    operations = ["mhc_expand", "mhc_pre", "rope_qk", "mhc_post_pre", "mhc_post", "mhc_head", "rms_norm"]
    assert [served.operation for served in hyper.plain.served] == operations
    assert [served.operation for served in hyper.tilewright.served] == operations
    assert "with hyper-connections agree" in hyper.verdict
    assert hyper.plain.sample is None
    assert not dataclasses.replace(result, hyper=dataclasses.replace(hyper, agrees=False)).all_agree


def test_demo_trains_hyper_connections_no_longer_than_the_rest():
    assert demo.run(device="cpu", output=None, quiet=True, steps=2, scale=TINY_SCALE).hyper.steps == 2


def test_demo_sees_a_wrong_hyper_connection(monkeypatch):
    right = Parts.tilewright()

    def wrong_post_pre(x, streams, post_mix, comb_mix, *weights):
        return right.post_pre.compute(x, streams, post_mix, comb_mix.transpose(-1, -2) * 1.001, *weights)

    wrong = dataclasses.replace(right, post_pre=dataclasses.replace(right.post_pre, compute=wrong_post_pre))
    monkeypatch.setattr(Parts, "tilewright", classmethod(lambda cls: wrong))
    result = demo.run(device="cpu", output=None, quiet=True, scale=TINY_SCALE)
    assert result.agrees
    assert not result.all_agree
    assert "DISAGREE" in result.hyper.verdict
    assert 'class="verdict bad"' in report.render(result)


def test_demo_sees_a_wrong_part(monkeypatch):
    right = Parts.tilewright()

    def wrong_rope(q, k, cos, sin, start):
        q, k = right.rope.compute(q, k, cos, sin, start)
        return q * 1.001, k

    wrong = dataclasses.replace(right, rope=dataclasses.replace(right.rope, compute=wrong_rope))
    monkeypatch.setattr(Parts, "tilewright", classmethod(lambda cls: wrong))
    result = demo.run(device="cpu", output=None, quiet=True, scale=TINY_SCALE)
    assert not result.agrees
    assert "DISAGREE" in result.verdict
    assert 'class="verdict bad"' in report.render(result)


def test_drawn_budget_is_the_policy(result):
    plain, truth = result.plain.losses, result.truth.losses
    budget = curve_budget(plain, truth, dtype=torch.float32)
    assert budget == result.budget
    for step, allowed in enumerate(budget):
        for share, ok in ((0.99, True), (1.01, False)):
            curve = [*truth[:step], truth[step] + share * allowed, *truth[step + 1 :]]
            assert compare_curves(curve, plain, truth, dtype=torch.float32).ok is ok


def test_json_parses(result, capsys):
    again = demo.run(device="cpu", output=None, quiet=True, json_output=True, scale=TINY_SCALE)
    document = json.loads(capsys.readouterr().out)
    assert document["agrees"] is True
    assert document["tilewright"]["losses"] == list(again.tilewright.losses) == list(result.tilewright.losses)
    assert document["tilewright"]["served"][1]["operation"] == "rope_qk"
    assert document["fp8"] == [dataclasses.asdict(fp8) for fp8 in again.fp8]
    assert [fp8["scale_format"] for fp8 in document["fp8"]] == ["fp32", "ue8m0"]
    assert document["steps"] == 6
    assert document["all_agree"] is True
    assert document["hyper"]["steps"] == 4
    assert document["hyper"]["tilewright"]["served"][1]["operation"] == "mhc_pre"


def test_compiled(result, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert result.compiled is None
    assert json.loads(json.dumps(result.to_json()))["compiled"] is None
    page = tmp_path / "report.html"
    again = demo.run(device="cpu", output=page, json_output=True, quiet=True, scale=TINY_SCALE, compile=True)
    document = json.loads(capsys.readouterr().out)["compiled"]
    assert document == dataclasses.asdict(again.compiled)
    assert document["counts"]["silu_mul_quant"] >= TINY_SCALE.config.layers
    for text in (page.read_text(), shown(again)):
        assert html.escape(again.compiled_line) in text or again.compiled_line in " ".join(text.split())
        assert "in one kernel" in text


def test_npu(result, capsys, tmp_path):
    assert result.npu is None
    page = tmp_path / "report.html"
    again = demo.run(device="cpu", output=page, json_output=True, quiet=True, scale=TINY_SCALE, npu=True)
    document = json.loads(capsys.readouterr().out)["npu"]
    assert document == dataclasses.asdict(again.npu)
    assert document["agrees"]
    assert document["kernel_calls"] >= TINY_SCALE.sample_bytes
    for text in (page.read_text(), shown(again)):
        assert html.escape(again.npu_line) in text or again.npu_line in " ".join(text.split())
    wrong = dataclasses.replace(again, npu=dataclasses.replace(again.npu, agrees=False))
    assert not wrong.all_agree
    assert "ANOTHER TEXT" in wrong.npu_line


def shown(result):
    from rich.console import Console

    from tilewright.models import terminal

    console = Console(file=io.StringIO(), width=400)
    terminal.show(result, console)
    return console.file.getvalue()


def test_json_has_no_number_that_json_lacks(result):
    broken = dataclasses.replace(result, seconds=float("inf"), budget=(float("nan"),))
    document = json.loads(json.dumps(broken.to_json(), allow_nan=False))
    assert document["seconds"] is None
    assert document["budget"] == [None]


def test_table_on_the_terminal(result):
    from rich.console import Console

    from tilewright.models import terminal

    console = Console(file=io.StringIO(), width=120)
    served = Served("rope_qk", "[bold]x", "because [/b]")  # markup must not be understood
    with terminal.progress(console) as follow:
        follow("plain", 0, 2, float("nan"))
        follow("plain", 2, 2, 1.25)
    terminal.show(
        dataclasses.replace(result, tilewright=dataclasses.replace(result.tilewright, served=(served,))), console
    )
    shown = console.file.getvalue()
    verdicts = (result.verdict, result.hyper.verdict)
    for expected in ("loss 1.250", "step time", "3 residual streams", "[bold]x", "because [/b]", *verdicts):
        assert expected in shown
    for expected in result.fp8_lines:
        assert expected in shown


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"scale": dataclasses.replace(TINY_SCALE, dtype=torch.float64)}, "scale"),
        ({"device": "nonsense"}, "device"),
        ({"device": "meta"}, "device"),
        ({"output": "no/such/folder/report.html"}, "does not exist"),
        ({"output": "."}, "is a folder"),
    ],
)
def test_demo_refuses_before_it_trains(arguments, match, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ArgumentError, match=match):
        demo.run(**{"output": None, "quiet": True, "scale": TINY_SCALE} | arguments)


@pytest.mark.parametrize(("package", "quiet"), [("rich", False), ("matplotlib", True)])
def test_missing_package_is_named(package, quiet, monkeypatch, tmp_path):
    def without(name):
        if name == package:
            raise ImportError(f"No module named '{package}'")

    monkeypatch.setattr("tilewright.optional.import_module", without)
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'tilewright\[cli\]'"):
        demo.run(output=tmp_path / "report.html", quiet=quiet, scale=TINY_SCALE)
    assert not list(tmp_path.iterdir())


# The report


class Page(HTMLParser):
    """Collects what a page consists of, and insists that its elements nest."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src", "xlink:href") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_sound_page(result, tmp_path):
    path = report.write(result, tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("svg") == 6
    assert page.tags.count("table") == 3
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    text = "".join(page.text)
    assert result.verdict in text
    assert result.hyper.verdict in text
    assert result.hyper.tilewright.served[1].reason in text
    assert result.tilewright.served[0].reason in text
    assert len(result.fp8_lines) == 2
    assert all(line in text for line in result.fp8_lines)
    assert result.tilewright.sample in text


def test_drawings_say_what_they_show_in_colours_of_the_page(result):
    for draw in (figures.loss_curves, figures.errors, figures.step_times, figures.throughputs):
        drawing = draw(result)
        assert 'role="img" aria-label="' in drawing
        assert "var(--tilewright)" in drawing
        assert "#01020" not in drawing
        assert "http-equiv" not in drawing


def test_report_escapes(result):
    evil = "<script>alert(1)</script> & \"'"
    tilewright = dataclasses.replace(result.tilewright, sample=evil, served=(Served(evil, evil, evil),), name=evil)
    page = report.render(dataclasses.replace(result, tilewright=tilewright, prompt=evil))
    assert "<script>" not in page
    assert Page(page).open == []
    assert "script" not in Page(page).tags


def test_report_shows_a_training_that_broke(result):
    nan = float("nan")
    losses = (*result.tilewright.losses[:-1], nan)
    broken = dataclasses.replace(result, agrees=False, tilewright=dataclasses.replace(result.tilewright, losses=losses))
    assert result.verdict not in report.render(broken)


def test_report_replaces_a_file_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(source, target):
        assert Path(source).parent == tmp_path  # a rename within the folder, which is atomic
        assert Path(source).read_text(encoding="utf-8").endswith("</html>\n")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            report.write(result, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    report.write(result, path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]


def test_report_needs_its_folder(result, tmp_path):
    with pytest.raises(ArgumentError, match="does not exist") as caught:
        report.write(result, tmp_path / "missing" / "report.html")
    assert (caught.value.operation, caught.value.argument) == ("demo", "output")
