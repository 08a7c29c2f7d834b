"""Handing a kernel over to the vendor's compiler: the contract with it, held against the double in ``rebel_double``."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import device_kernels
import pytest
import torch

from tilewright.errors import ArgumentError, MissingDependencyError, NpuHandoffError, NpuKernelError
from tilewright.npu.device_file import device_module, kernel_compile
from tilewright.npu.handoff import HandOffOptions, hand_off
from tilewright.npu.operator import define
from tilewright.npu.rounding import COMPUTE_DTYPES
from tilewright.npu.shim import shim
from tilewright.npu.vendor_messages import ending, understood
from tilewright.numerics import DEVICE_TOLERANCES, device_difference

DOUBLE = Path(__file__).parent / "rebel_double" / "packages"
FAILURES = json.loads((DOUBLE / "rebel" / "failures.json").read_text())
SECONDS = 300.0

ADD = define(device_kernels.add_scaled, align=["x", "y"])
ATTEND = define(device_kernels.attend_rows, align=["rows"], host_layout="1")
DOUBTFUL = define(device_kernels.doubtful)
PRODUCT = define(device_kernels.product_and_peak, constexprs={"SCALE": 0.5})
REFUSED = define(device_kernels.refused)
COPIED = define(device_kernels.copied)


def arguments(operator):
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator)

    if operator is ATTEND:
        tables = (torch.tensor([[5]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))
        return [draw(1, 3, 80), draw(4, 16, 80), *tables, torch.tensor(0.3)]
    if operator is PRODUCT:
        return [draw(1, 8, 64).bfloat16(), draw(1, 72, 64).bfloat16()]
    return [draw(2, 16, 64) if operator is ADD else draw(16, 64) for _ in operator.inputs]


class Call:
    """A hand-off to the double, and what came of it.

    Attributes:
        result: what it gave.
        error: what it raised.
        given: its arguments, as they are afterwards.
        folder: what was kept.
    """

    def __init__(self, operator, folder, fail="", **options):
        self.given = arguments(operator)
        self.folder = folder / "kept"
        self.path = folder / "record.jsonl"
        self.operator = operator
        variables = {"REBEL_DOUBLE_FAIL": fail, "REBEL_DOUBLE_RECORD": str(self.path)}
        options = {"timeout": SECONDS, "keep": self.folder, "environment": variables} | options
        self.result = self.error = None
        try:
            self.result = hand_off(operator, *self.given, options=HandOffOptions(**options))
        except NpuHandoffError as error:
            self.error = error

    def record(self, event, recompiles=None):
        """What the double wrote down about an event."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [
            each
            for each in lines
            if each["event"] == event and (recompiles is None or each["recompiles"] == recompiles)
        ]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Every hand-off of this file that starts a compiler, two at a time."""
    wanted = {
        "good": lambda folder: Call(ATTEND, folder),
        "wrong": lambda folder: Call(ATTEND, folder, "wrong_cache"),
        "compiled": lambda folder: Call(PRODUCT, folder, compile_only=True, target_soc="RBLN-CA25"),
        "exp2": lambda folder: Call(DOUBTFUL, folder, "exp2"),
        "fallback": lambda folder: Call(ADD, folder, "fallback"),
        "segfault": lambda folder: Call(ADD, folder, "segfault"),
        "hang": lambda folder: Call(ADD, folder, "hang", timeout=0.2),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in wanted}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.syspath_prepend(DOUBLE)
        patch.setenv("RBLN_WRITE_RTOSA", "1")  # must not reach the compiler
        patch.setenv("TRITON_CACHE_DIR", str(folders["good"]))
        futures = {name: pool.submit(call, folders[name]) for name, call in wanted.items()}
        return {name: each.result() for name, each in futures.items()}


@pytest.fixture
def double(monkeypatch):
    """The double on the path of this process."""
    monkeypatch.syspath_prepend(DOUBLE)


# What the compiler is called with


def test_warmup_gets_a_grid_and_the_host_layout(calls):
    (warmup,) = calls["good"].record("warmup")
    assert warmup["kernel"] == "attend_rows"
    assert warmup["options"] == {"grid": [1], "host_layout": "1"}
    assert calls["compiled"].record("warmup")[0]["options"] == {"grid": [1]}


def test_the_kernel_gets_its_arguments_in_its_order(calls):
    (warmup,) = calls["good"].record("warmup")
    expected = [
        "torch.float32[1, 3, 128]",  # rows, aligned
        "torch.float32[4, 16, 80]",  # cache
        "torch.int32[1, 1]",  # counts
        "torch.int32[1]",  # block_table
        "torch.float32[1, 3, 80]",  # out, not aligned
        "torch.float32[]",  # scale
        *(4, 16, 3, 128),
    ]
    assert warmup["arguments"] == expected
    (written,) = calls["good"].record("write_rtosa")
    assert (written["kernel"], written["arguments"]) == ("attend_rows", expected)
    given = calls["compiled"].record("warmup")[0]["arguments"]
    assert given == [
        *("torch.float32[1, 8, 64]", 64, "torch.float32[1, 72, 64]", "torch.float32[1, 8, 72]"),
        *(8, "torch.float32[1, 8, 64]", 72, 0.5),
    ]


def test_the_kernel_is_compiled_by_the_recompile_only(calls):
    assert [each["recompiles"] for each in calls["good"].record("import")] == [False, True]
    assert calls["good"].record("warmup", recompiles=False) == []


def test_the_environment_is_the_compilers_own(calls):
    here, again = (each["environment"] for each in calls["good"].record("import"))
    folder = str(calls["good"].folder)
    for environment in (here, again):
        assert environment["RBLN_USE_CUSTOM_KERNEL"] == "1"
        assert environment["TRITON_HOME"] == f"{folder}/triton"
        assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert "TRITON_CACHE_DIR" not in environment
        assert "RBLN_TARGET_SOC" not in environment
    assert "RBLN_WRITE_RTOSA" not in here
    assert again["RBLN_WRITE_RTOSA"] == "1"
    assert calls["good"].record("import")[0]["folder"] == folder
    assert calls["compiled"].record("import")[0]["environment"]["RBLN_TARGET_SOC"] == "RBLN-CA25"


def test_the_graph_is_compiled_in_strict_mode(calls):
    (compiled,) = calls["good"].record("compile")
    assert compiled["options"]["mode"] == "['strict']"
    assert compiled["options"]["cache_dir"] == str(calls["good"].folder / "cache")
    (compiled,) = calls["compiled"].record("compile")
    assert compiled["options"]["mode"] == "['strict', 'compile_only']"
    assert "compile_context" not in compiled["options"]


def test_what_is_changed_in_place_is_told_to_the_compiler(calls):
    (marked,) = calls["good"].record("mark_static_address")
    assert marked["tensor"] == "torch.float32[4, 16, 80]"
    assert calls["compiled"].record("mark_static_address") == []


@pytest.mark.parametrize("name", ["good", "compiled"])
def test_the_script_is_the_one_that_is_written_here(calls, name):
    call = calls[name]
    assert (call.folder / "device_module.py").read_text() == device_module(call.operator)
    (script,) = call.folder.glob("*/kernel_compile.py")
    tensors = dict(zip(call.operator.inputs, call.given, strict=True))
    assert script.read_text().split() == kernel_compile(call.operator, tensors).split()


# What comes of it


def test_a_result_that_agrees_is_returned(calls):
    call = calls["good"]
    assert call.error is None
    expected = arguments(ATTEND)
    out = ATTEND(*expected, compute_dtype="dlfloat16")
    torch.testing.assert_close(call.result.outputs, (out,))
    torch.testing.assert_close(call.result.mutated, {"cache": expected[1]})
    assert set(call.result.errors) == {"out", "cache"}
    assert call.result.compute_dtype == "dlfloat16"
    assert call.result.compiler == "0.11.1+double"
    assert "agrees with the CPU in dlfloat16" in str(call.result)


def test_arguments_are_left_as_they_were(calls):
    for name in ("good", "wrong", "compiled"):
        torch.testing.assert_close(calls[name].given, arguments(calls[name].operator), rtol=0, atol=0)


def test_a_result_that_differs_is_an_error(calls):
    message = str(calls["wrong"].error)
    assert "the device differs from the CPU in dlfloat16: 'cache': " in message
    assert "'out'" not in message
    assert calls["wrong"].error.diagnostics == ()


def test_only_compiling_runs_nothing(calls):
    call = calls["compiled"]
    assert call.error is None
    assert (call.result.outputs, call.result.mutated, call.result.errors) == ((), {}, {})
    assert (call.folder / "cache" / "graph.rbln").exists()
    assert "nothing was run" in str(call.result)


def test_a_message_of_the_compiler_becomes_a_diagnostic(calls):
    error = calls["exp2"].error
    (found,) = error.diagnostics
    assert (found.code, found.severity, found.profile) == ("OP_DOC_ONLY", "error", DOUBTFUL.profile)
    assert (found.span.line, found.span.column) == line_of("lang.exp2(numbers)")
    assert "NPU-OP_DOC_ONLY" in str(error)
    assert "lang.exp2(numbers)\n" in str(error)
    assert "math.exp2" in str(error)


def test_a_fallback_is_an_error(calls):
    assert "strict mode forbids" in str(calls["fallback"].error)
    assert "python3: command not found" in str(calls["fallback"].error)


def test_a_crash_is_an_error(calls):
    assert "the compiler crashed (SIGSEGV)" in str(calls["segfault"].error)


def test_a_compiler_that_hangs_is_stopped(calls):
    assert "not finished after 0.2 s" in str(calls["hang"].error)


def test_files_are_kept_where_that_is_wanted(calls):
    call = calls["good"]
    assert call.result.folder == call.folder
    names = {each.name for each in call.folder.iterdir()}
    assert {"device_module.py", "inputs.pt", "job.json", "results.pt", "run.py", "stdout.txt", "triton"} <= names
    assert "tilewright" not in (call.folder / "run.py").read_text().partition("import annotations")[2]


def test_nothing_is_left_behind(double, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = HandOffOptions(timeout=0.05, environment={"REBEL_DOUBLE_FAIL": "hang"})
    with pytest.raises(NpuHandoffError, match="not finished"):
        hand_off(ADD, *arguments(ADD), options=options)
    assert list(tmp_path.iterdir()) == []


# Before the compiler


def test_without_the_compiler_one_is_told_what_to_do():
    with pytest.raises(MissingDependencyError, match=r"Install rebel-compiler .*device_module writes the file"):
        hand_off(ADD, *arguments(ADD))
    with shim(), pytest.raises(MissingDependencyError):  # which is not the real one
        hand_off(ADD, *arguments(ADD))


def test_the_checker_speaks_before_the_compiler(double):
    tensors = arguments(ATTEND)
    tensors[2] = tensors[2].long()
    with pytest.raises(NpuKernelError, match="INDEX_DTYPE"):
        hand_off(ATTEND, *tensors)


def test_what_does_not_fit_is_refused(double, tmp_path):
    with pytest.raises(ArgumentError, match="got 1, expected x, y"):
        hand_off(ADD, *arguments(ADD)[:1])
    with pytest.raises(ArgumentError, match="profile 'tile' is not one of RBLN"):
        hand_off(define(device_kernels.add_scaled, profile="tile"), *arguments(ADD))
    (tmp_path / "something").touch()
    with pytest.raises(ArgumentError, match="is not empty"):
        hand_off(ADD, *arguments(ADD), options=HandOffOptions(keep=tmp_path))


# Messages


def line_of(*pieces):
    """Line and column of a piece of the kernels' file that is in it once; of several, all of them."""
    text = Path(device_kernels.__file__).read_text()
    places = []
    for piece in pieces:
        assert text.count(piece) == 1, piece
        before = text[: text.index(piece)]
        places.append((before.count("\n") + 1, len(before) - before.rfind("\n")))
    return places[0] if len(places) == 1 else places


def meant(name, operator):
    """Code and place of what a message is found to mean."""
    if operator is COPIED:
        tensors = (torch.ones(4, 64), torch.ones(4, 64, dtype=torch.int32), torch.empty(4, 64, dtype=torch.int32))
        program = device_kernels.copied.warmup(*tensors, 4, 64)
    else:
        program = DOUBTFUL.program({"x": torch.empty(4, 64)})
    diagnostics, remarks = understood(FAILURES[name]["message"], operator, program)
    assert not (diagnostics and remarks)
    return [(each.code, (each.span.line, each.span.column)) for each in diagnostics], remarks


@pytest.mark.parametrize(
    ("name", "operator", "code", "pieces"),
    [
        ("unreachable", COPIED, "DTYPE", ["lang.store(out_ptr, lang.load(table_ptr))", "lang.load(table_ptr)"]),
        ("unreachable", ADD, "DTYPE", ["def add_scaled"]),
        ("fp8", COPIED, "DTYPE", ["lang.store(out_ptr, lang.load(table_ptr))", "lang.load(table_ptr)"]),
        ("exp2", DOUBTFUL, "OP_DOC_ONLY", ["lang.exp2(numbers)"]),
        ("reduce_last_dim", DOUBTFUL, "OP_DOC_ONLY", ["lang.min(chances, axis=1, keep_dims=True)"]),
        (
            "index_int64",
            ATTEND,
            "INDEX_DTYPE",
            ["rblib.to_dynamic_index(count_ptr", "rblib.to_dynamic_index(lang.make_block_ptr(block_table"],
        ),
        ("device_graph_conversion", DOUBTFUL, "UNSUPPORTED_OP", ["lang.sigmoid(powers)"]),
        ("device_graph_conversion", PRODUCT, "UNSUPPORTED_OP", ["cleared([1, ROWS, INNER]"]),
        ("device_graph_conversion", ADD, "UNSUPPORTED_OP", ["def add_scaled"]),
        ("unexpected_graph", DOUBTFUL, "UNSUPPORTED_OP", ["lang.where(numbers > chances, numbers, chances)"]),
        ("precise_sqrt", REFUSED, "UNSUPPORTED_OP", ["lang.sqrt_rn(numbers)"]),
        ("precise_divf", REFUSED, "UNSUPPORTED_OP", ["lang.div_rn(numbers, roots)"]),
        ("bitcast", REFUSED, "UNSUPPORTED_OP", ["numbers.to(lang.int32, bitcast=True)"]),
    ],
)
def test_messages_are_rules_at_lines(name, operator, code, pieces):
    places = line_of(*pieces)
    assert meant(name, operator) == ([(code, each) for each in (places if len(pieces) > 1 else [places])], ())


@pytest.mark.parametrize(("name", "words"), [("num_threads", "RBLN_NUM_THREADS"), ("bfloat16", "RBLN-CA25")])
def test_messages_that_are_not_about_the_kernel_are_remarks(name, words):
    found, remarks = meant(name, ADD)
    assert found == []
    assert len(remarks) == 1
    assert words in remarks[0]


def test_every_known_message_is_understood():
    silent = [name for name in FAILURES if not any(meant(name, ADD))]
    assert silent == ["unknown"]


def test_colours_do_not_hide_a_message():
    text = "\x1b[1merror:\x1b[0m 'tt.\x1b[31mbitcast\x1b[0m'"
    program = DOUBTFUL.program({"x": torch.empty(4, 64)})
    assert understood(text, REFUSED, program)[0][0].code == "UNSUPPORTED_OP"


def test_how_a_process_ends():
    assert ending(0) == ""
    assert ending(3) == "the compiler failed with exit status 3"
    assert ending(-6) == "the compiler crashed (SIGABRT)"
    assert ending(-199) == "the compiler crashed (signal 199)"


# How far a device may be off


@pytest.mark.parametrize("compute_dtype", DEVICE_TOLERANCES)
@pytest.mark.parametrize("products", [False, True])
def test_a_device_may_round_as_its_dtype_does(compute_dtype, products):
    expected = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    tolerance = DEVICE_TOLERANCES[compute_dtype][products]
    options = {"compute_dtype": compute_dtype, "products": products}
    assert device_difference(expected, expected, **options) == ""
    near = expected + torch.linspace(-1, 1, 64) * tolerance / 10
    assert device_difference(near, expected, **options) == ""
    near[5, 6] += 3 * tolerance * (1 + expected[5, 6].abs())
    assert "1 of 4096 numbers" in device_difference(near, expected, **options)


def test_every_compute_dtype_has_tolerances():
    assert set(DEVICE_TOLERANCES) == set(COMPUTE_DTYPES)


def test_zeros_do_not_pass_for_small_numbers():
    expected = torch.full((8, 64), 0.05)
    told = device_difference(torch.zeros(8, 64), expected, compute_dtype="dlfloat16", products=True)
    assert "root mean square" in told


def test_only_the_same_infinities_and_nan_agree():
    options = {"compute_dtype": "bfloat16", "products": True}
    for value in (torch.nan, torch.inf, -torch.inf):
        special, plain = torch.ones(2, 4), torch.ones(2, 4)
        special[1, 2] = value
        assert device_difference(special, special.clone(), **options) == ""
        assert device_difference(special, plain, **options).startswith("1 of 8 numbers")
        assert device_difference(plain, special, **options).startswith("1 of 8 numbers")
        assert value is torch.nan or device_difference(special, -special, **options).startswith("8 of 8")


def test_shapes_dtypes_and_integers_are_equal():
    options = {"compute_dtype": "float32", "products": False}
    one = torch.ones(2, 3)
    assert "expected (3, 2)" in device_difference(one, torch.ones(3, 2), **options)
    assert "torch.bfloat16" in device_difference(one.bfloat16(), one, **options)
    assert device_difference(one.int(), one.int(), **options) == ""
    assert device_difference(one.int(), 2 * one.int(), **options) == "6 of 6 numbers"
    assert device_difference(torch.empty(0), torch.empty(0), **options) == ""
