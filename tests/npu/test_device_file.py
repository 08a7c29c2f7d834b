"""The file that the vendor's compiler reads: its form, that it stands alone, and that it computes the same."""

import ast
import importlib.util
from pathlib import Path

import device_kernels
import pytest
import torch

from tilewright.errors import ArgumentError
from tilewright.npu.check import check_file
from tilewright.npu.device_file import device_module, functions_of, kernel_compile
from tilewright.npu.kernel import FileKernel
from tilewright.npu.kernels import OPERATORS
from tilewright.npu.operator import define
from tilewright.npu.shim import shim

MADE = {
    "add_up": define(device_kernels.add_scaled, name="add_up", align=["x", "y"]),
    "product_and_peak": define(device_kernels.product_and_peak, constexprs={"SCALE": 0.5}, host_layout="1"),
    "attend_rows": define(device_kernels.attend_rows, align=["rows"], host_layout="1"),
    "widened": define(device_kernels.with_width(2.5)),
    "doubtful": define(device_kernels.doubtful),
}

WRAPPER = """\
def warmup(func, *args):
    kernel = func.warmup(*args, grid=(1,), host_layout="1")
    rblib.write_rtosa(kernel, args)
    return kernel


@triton_op("rbln_triton_ops::attend_rows", mutates_args=())
def attend_rows_wrapper(
    rows: torch.Tensor,
    cache: torch.Tensor,
    counts: torch.Tensor,
    block_table: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    rows_dtype = rows.dtype
    rows = rows.to(torch.float32)
    cache = cache.to(torch.float32)
    scale = scale.to(torch.float32)
    out = torch.empty_like(rows)
    rows = rblib.align_tensor_last_dim_to_64(rows)
    BLOCKS = cache.shape[0]
    PARTITION = cache.shape[1]
    ROWS = rows.shape[1]
    WIDTH = rows.shape[2]
    params = [rows, cache, counts, block_table, out, scale, BLOCKS, PARTITION, ROWS, WIDTH]
    warmup(attend_rows, *params)
    return out.to(rows_dtype)


@register_fake("rbln_triton_ops::attend_rows")
def _(
    rows: torch.Tensor,
    cache: torch.Tensor,
    counts: torch.Tensor,
    block_table: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(rows)
"""

IMPORTS = """\
import torch
from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib
"""


def arguments(name):
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator)

    def table(values):
        return torch.tensor(values, dtype=torch.int32)

    return {
        "add_up": lambda: [draw(2, 16, 80), draw(2, 16, 80)],
        "product_and_peak": lambda: [draw(1, 8, 64), draw(1, 72, 64)],
        "attend_rows": lambda: [draw(1, 3, 80), draw(4, 16, 80), table([[5]]), table([2]), torch.tensor(0.3)],
        "widened": lambda: [draw(8, 64)],
        "doubtful": lambda: [draw(8, 64)],
    }[name]()


def loaded(text, folder, name="device_module"):
    """The module of a text; the shim has to be installed."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operator_of(text, folder, name="operator", **options):
    """The operator of the one kernel of a file that is loaded."""
    path = folder / f"{name}_kernels.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return define(module.kernel, **options)


COPY = """\
from tilewright.npu import jit
from tilewright.npu import language as tl
{before}

@jit
def kernel(x, out{parameters}, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x_ptr = tl.make_block_ptr(x, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    out_ptr = tl.make_block_ptr(out, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    tl.store(out_ptr, {value})
"""


def copy_kernel(value="tl.load(x_ptr)", before="", parameters=""):
    return COPY.format(value=value, before=before, parameters=parameters)


# Form


def test_the_wrapper_is_what_the_compiler_expects():
    text = device_module(MADE["attend_rows"])
    assert text.endswith(WRAPPER)
    assert IMPORTS in text
    assert "from torch.library import register_fake, triton_op\n" in text


@pytest.mark.parametrize("operator", MADE.values(), ids=MADE)
def test_the_kernel_is_copied_as_it_stands(operator):
    original = operator.kernel
    lines = original.module.source.text.split("\n")[original.node.lineno - 1 : original.node.end_lineno]
    indent = original.node.col_offset
    wanted = "\n".join(line[indent:] for line in lines).replace(f"def {original.name}(", f"def {operator.name}(")
    assert f"@triton.jit\n{wanted}\n" in device_module(operator)


def test_the_operator_has_the_name_that_the_kernel_gets():
    names = [node.name for node in ast.parse(device_module(MADE["add_up"])).body if isinstance(node, ast.FunctionDef)]
    assert names == ["scaled", "add_up", "warmup", "add_up_wrapper", "_"]


def test_arguments_stand_in_the_kernels_order_and_all_outputs_are_returned():
    text = device_module(MADE["product_and_peak"])
    assert "params = [a, INNER, b, product, ROWS, peak, COLUMNS, SCALE]\n" in text
    assert "product = a.new_empty((1, a.shape[1], b.shape[1]))\n" in text
    assert "return product.to(a_dtype), peak.to(a_dtype)\n" in text
    assert "return a.new_empty((1, a.shape[1], b.shape[1])), torch.empty_like(a)\n" in text
    assert text.count("-> tuple[torch.Tensor, torch.Tensor]:") == 2


def test_outputs_are_allocated_before_anything_is_aligned():
    text = device_module(MADE["add_up"])
    assert text.index("out = torch.empty_like(x)") < text.index("rblib.align_tensor_last_dim_to_64(x)")
    assert text.index("rblib.align_tensor_last_dim_to_64(y)") < text.index("COLUMNS = x.shape[2]")


def test_no_layout_is_told_where_there_is_none():
    assert "func.warmup(*args, grid=(1,))\n" in device_module(MADE["add_up"])


def test_names_mean_what_they_mean_in_the_kernels_module():
    text = device_module(MADE["product_and_peak"])
    for line in (
        "from rebel.triton import language as lang",
        "from rebel.triton.language import constexpr",
        "from rebel.triton.language import zeros as cleared",
        "from rebel.triton.language import float32 as WIDE",
        "ORDER = tl.constexpr((2, 1, 0))",
        "TURNED = tl.constexpr((0, 2, 1))",
    ):
        assert f"\n{line}\n" in text
    assert "FACTOR" not in text


def test_closures_and_infinities_are_written_out():
    text = device_module(MADE["widened"])
    assert "\nwidth = tl.constexpr(2.5)\n" in text
    assert '\nSTART = tl.constexpr(float("-inf"))\n' in text


def test_functions_stand_behind_those_that_they_use():
    assert [each.node.name for each in functions_of(MADE["add_up"])] == ["scaled", "add_scaled"]


def test_a_file_that_is_only_read_gives_the_same():
    live = device_kernels.attend_rows
    operator = define(FileKernel(live.module.source.path, "attend_rows"), align=["rows"], host_layout="1")
    assert device_module(operator) == device_module(MADE["attend_rows"])
    operator = define(FileKernel(live.module.source.path, "add_scaled"), name="add_up", align=["x", "y"])
    assert device_module(operator) == device_module(MADE["add_up"])


def test_names_of_the_wrapper_give_way_to_tensors(tmp_path):
    value = "tl.load(x_ptr) * params * x_dtype"
    text = device_module(operator_of(copy_kernel(value, parameters=", params, x_dtype"), tmp_path))
    assert "    params_ = [x, out, params, x_dtype, ROWS, COLUMNS]\n    warmup(kernel, *params_)\n" in text
    assert "    x_dtype_ = x.dtype\n" in text
    assert "    return out.to(x_dtype_)\n" in text


# The script


def test_the_script_has_an_empty_tensor_for_each_argument():
    operator = MADE["attend_rows"]
    text = kernel_compile(operator, dict(zip(operator.inputs, arguments("attend_rows"), strict=True)))
    assert text == device_module(operator) + (
        "\n\n"
        "arg0 = torch.empty(1, 3, 80, )\n"
        "arg1 = torch.empty(4, 16, 80, )\n"
        "arg2 = torch.empty(1, 1, dtype=torch.int32, )\n"
        "arg3 = torch.empty(1, dtype=torch.int32, )\n"
        "arg4 = torch.empty((), )\n"
        "attend_rows_wrapper(arg0, arg1, arg2, arg3, arg4, )\n"
    )


def test_the_script_runs(tmp_path):
    operator = MADE["attend_rows"]
    tensors = [each.to(torch.bfloat16) if each.is_floating_point() else each for each in arguments("attend_rows")]
    with shim(execute=False):
        loaded(kernel_compile(operator, dict(zip(operator.inputs, tensors, strict=True))), tmp_path)


def test_the_script_needs_every_argument():
    with pytest.raises(ArgumentError, match="'cache': is missing"):
        kernel_compile(MADE["attend_rows"], {"rows": torch.empty(1, 3, 80)})


# Alone, clean, and the same


@pytest.mark.parametrize("name", [*(name for name in MADE if name != "add_up"), *OPERATORS])
def test_the_checker_finds_nothing(name, tmp_path):
    path = tmp_path / "device_module.py"
    path.write_text(device_module(MADE.get(name) or OPERATORS[name]))
    assert not check_file(path, "doc").diagnostics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_the_operator_computes_the_same(name, dtype, tmp_path):
    operator = MADE[name]
    given = [each.to(dtype) if each.is_floating_point() else each for each in arguments(name)]
    ours, theirs = ([each.clone() for each in given] for _ in range(2))
    with shim():
        loaded(device_module(operator), tmp_path)
        results = getattr(torch.ops.rbln_triton_ops, operator.name)(*theirs)
    torch.testing.assert_close(results, operator(*ours), rtol=0, atol=0)
    if dtype == torch.float32:  # of 16 bits, what the kernel changes is the wrapper's copy
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_shapes_are_known_without_values(tmp_path):
    with shim():
        loaded(device_module(MADE["product_and_peak"]), tmp_path)
        meta = [each.to("meta", torch.bfloat16) for each in arguments("product_and_peak")]
        product, peak = torch.ops.rbln_triton_ops.product_and_peak(*meta)
    assert (product.shape, peak.shape) == ((1, 8, 72), (1, 8, 64))
    assert product.dtype == peak.dtype == torch.bfloat16


def test_helpers_of_other_files_are_copied(tmp_path, monkeypatch):
    (tmp_path / "shared_by_kernels.py").write_text(
        "from tilewright.npu import jit\nfrom tilewright.npu import language as L\n\nSTEP = 3\n\n\n"
        "@jit\ndef halved(x):\n    return L.maximum(x, x - STEP) * 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    value = "half(tl.load(x_ptr))"
    operator = operator_of(copy_kernel(value, "from shared_by_kernels import halved as half"), tmp_path, "uses")
    text = device_module(operator)
    assert "@triton.jit\ndef half(x):\n    return L.maximum(x, x - STEP) * 0.5\n" in text
    assert "\nfrom rebel.triton import language as L\n" in text
    x = torch.randn(4, 64)
    with shim():
        loaded(text, tmp_path)
        torch.testing.assert_close(torch.ops.rbln_triton_ops.kernel(x), x * 0.5, rtol=0, atol=0)


# What no file can have


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (copy_kernel("tl.load(x_ptr) * math.pi", "import math"), "'math'.* it is of type module"),
        (copy_kernel("tl.load(x_ptr) * warmup", "warmup = 2.0"), "'warmup'.* two things have this name"),
        (copy_kernel("tl.load(x_ptr) * triton", "triton = 2.0"), "'triton'.* two things have this name"),
        (copy_kernel("tl.load(x_ptr) * rblib", parameters=", rblib"), "'rblib'.* rename the kernel's parameter"),
        (
            copy_kernel("f(tl.load(x_ptr)) * STEP", "STEP = 4.0\n" + "{other}"),
            "'STEP'.* two things have this name",
        ),
    ],
    ids=["module", "warmup", "triton", "parameter", "constants"],
)
def test_what_cannot_be_copied_is_refused(text, message, tmp_path, monkeypatch):
    (tmp_path / "other_kernels.py").write_text(
        "from tilewright.npu import jit\n\nSTEP = 3.0\n\n\n@jit\ndef f(x):\n    return x * STEP\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "other_kernels", raising=False)
    operator = operator_of(text.replace("{other}", "from other_kernels import f"), tmp_path)
    with pytest.raises(ArgumentError, match=message):
        device_module(operator)


def test_what_a_file_alone_does_not_tell_is_refused(tmp_path):
    path = tmp_path / "computed_kernels.py"
    path.write_text(copy_kernel("tl.load(x_ptr) * FACTOR", "import os\n\nFACTOR = len(os.sep)\n"))
    with pytest.raises(ArgumentError, match=r"'FACTOR'.* nothing that its file alone tells"):
        device_module(define(FileKernel(str(path), "kernel")))
    assert "\nFACTOR = tl.constexpr(1)\n" in device_module(operator_of(path.read_text(), tmp_path))


def test_an_operator_needs_a_name_and_an_output(tmp_path):
    with pytest.raises(ArgumentError, match="'a-b' is no name"):
        device_module(define(device_kernels.doubtful, name="a-b"))
    text = copy_kernel().replace(
        "tl.store(out_ptr, tl.load(x_ptr))", "tl.store(x_ptr, tl.load(out_ptr) + tl.load(x_ptr))"
    )
    with pytest.raises(ArgumentError, match="give the kernel an output"):
        device_module(operator_of(text, tmp_path))


def test_arguments_go_by_position(tmp_path):
    text = copy_kernel().replace("(x, out, ROWS", "(x, out, *, ROWS")
    with pytest.raises(ArgumentError, match="by position"):
        device_module(operator_of(text, tmp_path))


def test_a_file_of_any_line_ends_is_copied(tmp_path):
    text = copy_kernel()
    plain = device_module(operator_of(text, tmp_path, "plain"))
    path = tmp_path / "plain_kernels.py"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert device_module(define(FileKernel(str(path), "kernel"))) == plain
    assert Path(path).read_bytes().count(b"\r\n") > 5
