"""`tilewright fuse`: which program it compiles, how it calls it, what it prints, and what it says when it cannot."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

from tilewright.errors import ArgumentError, TilewrightError, UnknownNameError
from tilewright.fusion import command
from tilewright.fusion.report import Decision, FusionReport, GraphReport

MODELS = """
from dataclasses import dataclass
import torch
from torch import nn
import beside_the_model


@dataclass
class Sizes:
    width: int = beside_the_model.WIDTH


class Layer(nn.Module):
    def __init__(self, width=Sizes().width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.linear = nn.Linear(width, width)
        self.seen = []

    def forward(self, x, scale=1.0):
        if not torch.compiler.is_compiling():
            self.seen.append("eager")
        return x + self.linear(self.norm(x)) * scale, x.shape[0]


class Holder:
    layer = Layer()


class Plain:
    pass


instance = Layer(4)
number = 3


def build():
    return Layer()


def build_badly():
    raise RuntimeError("no weights here")


def scaled(x, scale=2.0):
    return x * scale


def everything(*tensors):
    return sum(tensors)


def breaks(x):
    x.sin_()
    torch._dynamo.graph_break()
    raise RuntimeError("in the middle")


def whole_numbers(x):
    return x.round().long()


def example_inputs():
    return (torch.ones(3, Sizes().width),)
"""


@pytest.fixture
def models(tmp_path):
    (tmp_path / "beside_the_model.py").write_text("WIDTH = 8\n")
    file = tmp_path / "models.py"
    file.write_text(MODELS)
    yield str(file)
    sys.modules.pop("beside_the_model", None)


class Recorder:
    """In place of `tilewright.compile`: the real Inductor, with a pass that only looks."""

    def __init__(self):
        self.report = FusionReport()
        self.options = None
        self.function = None
        self.calls = []

    def __call__(self, function, **options):
        self.function, self.options = function, dict(options)
        report, calls = self.report, self.calls
        options.pop("numerics")

        class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
            def __call__(self, graph):
                names = [node.name for node in graph.nodes if node.op == "placeholder"]
                role = "backward" if any(n.startswith("tangents") for n in names) else "inference"
                if role == "inference" and any(n.startswith("primals") for n in names):
                    role = "forward"
                sizes = [d for n in graph.nodes for d in getattr(n.meta.get("val"), "shape", ())]
                reason = "symbolic" if any(isinstance(d, torch.SymInt) for d in sizes) else "static"
                report.graphs.append(GraphReport(role, (Decision("looks", "x", "fused", reason),)))

            def uuid(self):
                return b"looks"

        inner = torch.compile(function, options={"post_grad_custom_post_pass": Pass()}, **options)

        def compiled(*args, **kwargs):
            calls.append((args, kwargs, torch.is_grad_enabled()))
            return inner(*args, **kwargs)

        compiled.fusion_report = self.report
        return compiled

    @property
    def seen(self):
        return [(graph.role, graph.decisions[0].reason) for graph in self.report.graphs]


def parsed(*argv):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["fuse", *argv])


def fuse(*argv):
    torch._dynamo.reset()
    arguments, recorder = parsed(*argv), Recorder()
    assert arguments.run is command.run
    return command.run(arguments, compile=recorder), recorder


@pytest.mark.parametrize("name", ["Layer", "build", "Holder.layer"])
def test_a_module_is_found_called_and_reported(models, capsys, name):
    status, recorder = fuse(f"{models}:{name}")
    assert status == 0
    assert type(recorder.function).__name__ == "Layer"
    assert not recorder.function.training
    assert recorder.options == {"numerics": "strict"}
    assert recorder.seen == [("inference", "static")]
    ((args, kwargs, with_gradients),) = recorder.calls
    assert [tuple(arg.shape) for arg in args] == [(3, 8)]
    assert (kwargs, with_gradients) == ({}, False)
    assert capsys.readouterr().out == f"{recorder.report}\n"


def test_the_instance_itself_is_compiled_with_inputs_from_the_command_line(models):
    expression = "torch.full((number, instance.linear.in_features), 2.0)"
    _, recorder = fuse(f"{models}:instance", "--inputs", expression)
    ((args, _, _),) = recorder.calls
    torch.testing.assert_close(args, (torch.full((3, 4), 2.0),))
    assert recorder.function.norm.normalized_shape == (4,)


def test_named_arguments(models):
    _, recorder = fuse(f"{models}:scaled", "--inputs", "dict(x=torch.ones(2), scale=torch.ones(1))")
    ((args, kwargs, _),) = recorder.calls
    assert args == ()
    assert sorted(kwargs) == ["scale", "x"]
    assert recorder.seen == [("inference", "static")]


@pytest.mark.parametrize("name", ["scaled", "everything"])
def test_a_function_that_wants_arguments_is_compiled_itself(models, name):
    _, recorder = fuse(f"{models}:{name}")
    assert recorder.function.__name__ == name
    assert recorder.seen == [("inference", "static")]


def test_options(models):
    _, recorder = fuse(f"{models}:Layer", "--dynamic", "--numerics", "relaxed")
    assert recorder.options == {"numerics": "relaxed", "dynamic": True}
    assert recorder.seen == [("inference", "symbolic")]


@pytest.mark.parametrize("name", ["Layer", "scaled"])
def test_training_compiles_a_forward_and_a_backward_graph(models, name):
    _, recorder = fuse(f"{models}:{name}", "--training")
    assert recorder.seen == [("forward", "static"), ("backward", "static")]
    assert recorder.calls[0][2]
    assert getattr(recorder.function, "training", True)


def test_neither_a_compiler_nor_the_cache_is_needed(models, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch("cpp.cxx", ("/nowhere/c++",)):
        for _ in range(2):
            status, recorder = fuse(f"{models}:Layer")
            assert (status, recorder.seen) == (0, [("inference", "static")])
            assert recorder.report.notes == []


def test_a_saved_graph(tmp_path, models):
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x.sin() * self.weight

    path = str(tmp_path / "saved.pt2")
    torch.export.save(torch.export.export(Scale(), (torch.full((2, 8), 3.0),)), path)
    _, recorder = fuse(path)
    assert recorder.seen == [("inference", "static")]
    torch.testing.assert_close(recorder.calls[0][0], (torch.full((2, 8), 3.0),))
    _, recorder = fuse(path, "--inputs", "torch.zeros(2, 8)", "--training")
    assert recorder.seen == [("forward", "static"), ("backward", "static")]
    torch.testing.assert_close(recorder.calls[0][0], (torch.zeros(2, 8),))


def test_json_and_output(models, capsys, tmp_path):
    pages = tmp_path / "reports" / "fusion.html"
    _, recorder = fuse(f"{models}:Layer", "--json", "--output", str(pages))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(recorder.report.to_json()))
    assert pages.read_text().startswith("<!DOCTYPE html>")
    data = tmp_path / "fusion.json"
    _, recorder = fuse(f"{models}:Layer", "--output", str(data))
    assert json.loads(data.read_text()) == json.loads(json.dumps(recorder.report.to_json()))
    assert capsys.readouterr().out == f"{recorder.report}\nwritten to {data}\n"


def test_a_call_that_fails_behind_a_graph_leaves_its_report(models, capsys):
    status, recorder = fuse(f"{models}:breaks")
    assert status == 1
    assert recorder.seen == [("inference", "static")]
    (note,) = recorder.report.notes
    assert "after 1 graph," in note
    assert "in the middle" in note
    assert note in capsys.readouterr().out


def test_a_failed_rule_shows_in_the_exit_status(models):
    report = FusionReport([GraphReport("inference", (Decision("looks", "x", "failed", "KeyError: 'w'"),))])

    def compile(function, **options):
        def compiled(*args):
            return function(*args)

        compiled.fusion_report = report
        return compiled

    assert command.run(parsed(f"{models}:scaled"), compile=compile) == 1


def test_nothing_of_the_import_stays(models, tmp_path):
    before = list(sys.path)
    fuse(f"{models}:scaled")
    assert sys.path == before
    assert not [name for name in sys.modules if name.startswith("_tilewright_fuse")]


@pytest.mark.parametrize(
    ("argv", "kind", "said"),
    [
        (["{folder}/none.py:Layer"], ArgumentError, ["there is no file", "none.py"]),
        (["{folder}/none.pt2"], ArgumentError, ["there is no file", "none.pt2"]),
        (["Layer"], ArgumentError, ["FILE.py:NAME", "FILE.pt2"]),
        (["{models}"], ArgumentError, ["models.py:NAME", "Layer, ", "build", "instance"]),
        (["{models}:Lair"], UnknownNameError, ["'Lair'", "Layer", "scaled"]),
        (["{models}:number"], ArgumentError, ["'number'", "int"]),
        (["{models}:Plain"], ArgumentError, ["'Plain'", "torch.nn.Module"]),
        (["{models}:build_badly"], ArgumentError, ["RuntimeError: no weights here"]),
        (["{models}:Layer", "--inputs", "torch.ones("], ArgumentError, ["'torch.ones('", "SyntaxError"]),
        (["{models}:Layer", "--inputs", "nothing"], ArgumentError, ["NameError", "nothing"]),
        (["{models}:Layer", "--inputs", "3"], ArgumentError, ["int", "tuple of tensors"]),
        (["{models}:Layer", "--inputs", "torch.ones(2, 7)"], ArgumentError, ["'Layer'", "8"]),
        (["{models}:Layer", "--device", "nowhere"], ArgumentError, ["nowhere"]),
        (["{models}:Layer", "--output", "{folder}"], ArgumentError, ["is a folder", "fusion.html"]),
        (["{models}:Layer", "--output", "{models}/fusion.html"], ArgumentError, ["cannot be written", "fusion.html"]),
        (["{models}:whole_numbers", "--training"], ArgumentError, ["--training"]),
        (["{folder}/no_inputs.py:f"], ArgumentError, ["--inputs", "example_inputs"]),
        (["{folder}/broken.py:f"], ArgumentError, ["ZeroDivisionError", "line 2"]),
        (["{folder}/leaves.py:f"], ArgumentError, ["SystemExit", "__main__"]),
        (["{folder}/not_saved.pt2"], ArgumentError, ["not_saved.pt2", "torch.export.save"]),
        (["{folder}/no_data.py:model"], ArgumentError, ["cannot be moved to 'cpu'"]),
    ],
)
def test_errors_say_what_to_do(models, tmp_path, argv, kind, said):
    (tmp_path / "no_inputs.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "not_saved.pt2").write_text("not a graph")
    (tmp_path / "no_data.py").write_text(
        "import torch\nmodel = torch.nn.Linear(2, 2, device='meta')\nexample_inputs = (torch.ones(2),)\n"
    )
    before = list(sys.path)
    with pytest.raises(TilewrightError) as caught:
        fuse(*(word.format(models=models, folder=tmp_path) for word in argv))
    assert type(caught.value) is kind
    assert all(words in str(caught.value) for words in said), caught.value
    assert "\n" not in str(caught.value)
    assert sys.path == before
    assert not [name for name in sys.modules if name.startswith("_tilewright_fuse")]


def test_a_parser_can_be_built_without_torch():
    program = (
        "import sys; sys.modules['torch'] = None; import argparse; from tilewright.fusion.command import add_parser; "
        "add_parser(argparse.ArgumentParser().add_subparsers()).print_help()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "FILE.py:NAME" in done.stdout


FUSIBLE = """
import torch
import tilewright


def norm_and_quantise(x, weight):
    return tuple(tilewright.quant_fp8(tilewright.rms_norm(x, weight)))


example_inputs = (torch.ones(4, 256, dtype=torch.bfloat16), torch.ones(256, dtype=torch.bfloat16))
"""


@pytest.mark.parametrize("options", [[], ["--dynamic"]])
def test_with_the_librarys_own_compile(tmp_path, capsys, options):
    torch._dynamo.reset()
    file = tmp_path / "fusible.py"
    file.write_text(FUSIBLE)
    assert command.run(parsed(f"{file}:norm_and_quantise", "--json", *options)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["counts"] == {"rms_norm_quant": 1}
    assert record["graphs"][0]["decisions"][0]["source"].startswith(f"{file}:7: ")
    assert not record["graphs"][0]["cached"]


def test_a_model_without_candidates_is_told_once(models, capsys, recwarn):
    torch._dynamo.reset()
    assert command.run(parsed(f"{models}:scaled")) == 0
    assert capsys.readouterr().out.startswith("fusion: 0 of 0 candidates in 1 graph\n")
    assert not [warning for warning in recwarn if "fused" in str(warning.message)]
