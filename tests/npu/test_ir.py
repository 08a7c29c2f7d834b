"""The dialect: where its operations come from, their text, what is well-formed, and that passes change no meaning."""

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from iree.compiler import ir as mlir
from xdsl.dialects.builtin import FileLineColLoc, ModuleOp
from xdsl.dialects.func import ReturnOp
from xdsl.dialects.scf import IfOp, YieldOp

from tilewright.errors import NpuProgramError
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.executor import execute
from tilewright.npu.front import TensorSpec, build
from tilewright.npu.ir import dialect, passes
from tilewright.npu.ir.text import argument_names, kernel_name, parse_program, print_program, span_of
from tilewright.npu.kernel import JitFunction
from tilewright.npu.language import float32
from tilewright.npu.profiles import profile
from tilewright.npu.program import Program

properties = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
HERE = Path(__file__).name


@jit
def all_of(base, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (R, C), (C, 1), (0, 0), (R, C), (1, 0))


@jit
def everything(
    x_ptr, mask_ptr, cache, counts, scale, out_ptr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, W: tl.constexpr
):
    """Every operation of the dialect."""
    x = tl.load(all_of(x_ptr, R, C)) * scale
    mask = tl.load(all_of(mask_ptr, R, C))
    out = all_of(out_ptr, R, C)
    count = rblib.to_dynamic_index(tl.make_block_ptr(counts, (1, 2), (2, 1), (0, 1), (1, 1), (1, 0)), P)
    start = rblib.to_dynamic_index(tl.make_block_ptr(counts, (1, 2), (2, 1), (0, 0), (1, 1), (1, 0)))
    y = rblib.masked_softmax(x, mask) + rblib.softmax(x) + rblib.dynamic_masked_softmax(x, count)
    y = y + rblib.window_softmax(x, start, W) + float("-inf") * 0.0 + 1 / 3 + float("nan") - 1e-45 + 123456789.0
    if rblib.partition_skip(count) == False:  # noqa: E712
        block = tl.make_block_ptr(cache, (4, P, C), (P * C, C, 1), (start, 0, 0), (1, P, C), (2, 1, 0))
        rows = rblib.insert(rblib.dynamic_load(block, 1, count), tl.reshape(x, (1, R, C)), 1, count)
        rblib.dynamic_store(block, rows, 1, count + R)
        whole = rblib.dynamic_load(block)
        rblib.dynamic_store(block, whole)
        curr = rblib.window_insert(whole, tl.reshape(x, (1, R, C)), 1, start)
        part = rblib.nn_pad(rblib.window_slice(curr, count, 1, R), 0.5, 2, (1, 0), "constant")
        y = tl.where(tl.trans(tl.trans(x) > 0.0), y, tl.exp(tl.max(part))[None])
    m, e, s = rblib.flash_attn_tile(x, mask)
    n, f, t = rblib.dynamic_flash_attn_tile(x, count, m)
    s, o = rblib.flash_attn_recompute(m, n, s, t, e, f)
    o = tl.dot(o, tl.trans(x))
    tl.store(out, y + tl.sum(o, axis=1, keep_dims=True) / s)


ARGUMENTS = {
    "x_ptr": (2, 8), "mask_ptr": (2, 8), "cache": (4, 6, 8), "counts": (1, 2), "scale": (), "out_ptr": (2, 8)
}  # fmt: skip
SIZES = {"R": 2, "C": 8, "P": 6, "W": 3}


def specs(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(shape, tl.int32 if name == "counts" else float32) for name, shape in shapes.items()}


def built(kernel: JitFunction, shapes: dict[str, tuple[int, ...]], **sizes: Any) -> ModuleOp:
    """A kernel's program before any pass."""
    diagnostics = Diagnostics(profile("tile"))
    module = build(kernel.node, kernel.scope, specs(shapes), sizes, diagnostics)
    assert module is not None, "\n".join(map(str, diagnostics.all))
    return module


@lru_cache(maxsize=1)
def program() -> Program:
    tensors = {
        name: torch.empty(shape, dtype=torch.int32 if name == "counts" else torch.float32, device="meta")
        for name, shape in ARGUMENTS.items()
    }
    return everything.warmup(**tensors, **SIZES, profile="tile")


def names(module: ModuleOp) -> list[str]:
    return [each.name for each in module.walk()]


# Places


@jit
def places(x_ptr, out_ptr, R: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0))
    größe = tl.load(p) * 2.0  # noqa: PLC2401
    y = tl.exp(größe) - größe
    q = all_of(out_ptr, R, 64)
    tl.store(
        q,
        tl.trans(y).T,
    )


def test_every_operation_has_its_place_in_the_source() -> None:
    module = built(places, {"x_ptr": (4, 64), "out_ptr": (4, 64)}, R=4)
    source = places.module.source
    found = []
    for each in module.walk():
        if isinstance(each, ModuleOp):
            continue
        assert isinstance(each.location, FileLineColLoc)
        assert each.location.filename.data == HERE
        line, column = each.location.line.data, each.location.column.data
        found.append((each.name, line - places.node.lineno, source.line(line)[column - 1 :][:12]))
    here = all_of.node.lineno - places.node.lineno
    assert found == [
        ("func.func", 0, "def places(x"),
        ("npu.block", 1, "tl.make_bloc"),
        ("npu.load", 2, "tl.load(p) *"),
        ("arith.constant", 2, "tl.load(p) *"),
        ("npu.broadcast", 2, "tl.load(p) *"),
        ("npu.elementwise", 2, "tl.load(p) *"),
        ("npu.elementwise", 3, "tl.exp(größe"),
        ("npu.elementwise", 3, "tl.exp(größe"),
        ("npu.transpose", 7, "tl.trans(y)."),
        ("npu.transpose", 7, "tl.trans(y)."),
        ("npu.block", here + 1, "tl.make_bloc"),
        ("npu.store", 5, "tl.store("),
        ("func.return", 0, "def places(x"),
    ]


def test_places_survive_the_passes() -> None:
    for each in program().module.walk():
        if not isinstance(each, ModuleOp | YieldOp):
            assert isinstance(each.location, FileLineColLoc), each.name
    lines = {each["operation"]: each["line"] - everything.node.lineno for each in program().source_map}
    assert lines["npu.window_slice"] > lines["npu.window_insert"] > lines["scf.if"] > lines["npu.window_softmax"]


# Text


def test_the_kernel_of_these_tests_has_every_operation() -> None:
    used = set(names(built(everything, ARGUMENTS, **SIZES)))
    assert {each.name for each in dialect.OPERATIONS} <= used
    assert used <= {each.name for each in dialect.OPERATIONS} | {
        "builtin.module", "func.func", "func.return", "scf.if", "scf.yield", "arith.constant"
    }  # fmt: skip


@pytest.mark.parametrize("readable", [False, True], ids=["generic", "readable"])
@pytest.mark.parametrize("clean", [False, True], ids=["as built", "cleaned"])
@pytest.mark.parametrize("locations", [False, True], ids=["without places", "with places"])
def test_text_that_is_read_gives_the_same_text(readable: bool, clean: bool, locations: bool) -> None:
    module = copy.deepcopy(program().module) if clean else built(everything, ARGUMENTS, **SIZES)
    text = print_program(module, locations=locations, readable=readable)
    again = parse_program(text)
    assert print_program(again, locations=locations, readable=readable) == text
    assert again.is_structurally_equivalent(module)
    assert ("loc(" in text) == locations
    assert ('"npu.load"' in text) != readable


def test_both_forms_are_one_program() -> None:
    generic = parse_program(print_program(program().module))
    readable = parse_program(print_program(program().module, readable=True))
    assert generic.is_structurally_equivalent(readable)
    assert print_program(generic) == print_program(readable) == program().text


def test_upstream_mlir_reads_the_generic_text_and_keeps_the_places() -> None:
    with mlir.Context() as context:
        context.allow_unregistered_dialects = True
        module = mlir.Module.parse(program().text)
        assert module.operation.verify()
        again = module.operation.get_asm(print_generic_op_form=True, enable_debug_info=True)
        found: dict[str, str] = {}

        def visit(operation: Any) -> Any:
            found.setdefault(operation.name, str(operation.location))
            return mlir.WalkResult.ADVANCE

        module.operation.walk(visit)
    for each in program().source_map:
        assert f'"{HERE}":' in found[each["operation"]]
    (line,) = {each["line"] for each in program().source_map if each["operation"] == "npu.window_slice"}
    assert found["npu.window_slice"].startswith(f'loc("{HERE}":{line}:')
    # What it prints is a program again: the same but for the names of values, and short names for places.
    assert parse_program(again).is_structurally_equivalent(program().module)


@pytest.mark.parametrize("name", ['we"ird\\ name.py', "größe.py", "a b.py"])
def test_names_of_files_are_written_so_that_they_can_be_read(name: str, tmp_path: Path) -> None:
    text = (
        "from tilewright.npu import jit\nfrom tilewright.npu import language as tl\n\n\n@jit\n"
        "def größe(x_1, x, _2, ptr, R: tl.constexpr):\n"
        "    x_2 = tl.load(tl.make_block_ptr(x_1, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)))\n"
        "    ä = x_2 + tl.load(tl.make_block_ptr(x, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)))\n"
        "    tl.store(tl.make_block_ptr(_2, (R, 64), (64, 1), (0, 0), (R, 64), (1, 0)), ä)\n"
    )
    path = tmp_path / name
    path.write_text(text)
    namespace: dict[str, Any] = {}
    exec(compile(text, str(path), "exec"), namespace)
    x = torch.empty(2, 64, device="meta")
    made = namespace["größe"].warmup(x, x, x, x, 2)
    again = parse_program(made.text)
    assert print_program(again) == made.text
    assert argument_names(again) == ["x_1", "x", "_2", "ptr"]
    assert kernel_name(again) == "größe"
    assert {each["file"] for each in made.source_map} == {name}
    assert {span_of(each.location).file for each in again.walk()} == {name, ""}
    with mlir.Context() as context:
        context.allow_unregistered_dialects = True
        mlir.Module.parse(made.text)


# What is well-formed


def broken(old: str, new: str, count: int = 1) -> str:
    """The text of a program with something replaced."""
    text = print_program(program().module, locations=False)
    assert text.count(old) >= count, f"{text.count(old)} times: {old}\n{text}"
    return text.replace(old, new, count)


def small(body: str, arguments: str = "%x: memref<4x64xf32>, %t: memref<1x2xi32>") -> str:
    """The text of a program of a few operations."""
    return f"builtin.module {{ func.func @kernel({arguments}) {{ {body} func.return }} }}"


X, T, V, L = "memref<4x64xf32>", "memref<1x2xi32>", "tensor<4x64xf32>", "tensor<4x1xf32>"
ZERO_ONE = "<{static_offsets = array<i64: 0, 1>}>"
LOAD = f'%l = "npu.load"(%x) : ({X}) -> {V} '
INDEX = (
    f'%i = "npu.block"(%t) {ZERO_ONE} : ({T}) -> memref<1x1xi32> '
    '%n = "npu.index"(%i) <{max = -1 : i64}> : (memref<1x1xi32>) -> index '
)


def block(offsets: str, result: str = "memref<1x64xf32>") -> str:
    return f'%b = "npu.block"(%x) <{{static_offsets = array<{offsets}>}}> : ({X}) -> {result} '


def of_load(operation: str, attributes: str, result: str, operands: int = 1) -> str:
    """An operation of what was loaded."""
    given, types = ", ".join(["%l"] * operands), ", ".join([V] * operands)
    results = ", ".join(f"%r{number}" for number in range(result.count("tensor")))
    return f'{LOAD} {results} = "npu.{operation}"({given}) {attributes} : ({types}) -> {result} '


MALFORMED = [
    (f'%l = "npu.load"(%x) : ({X}) -> tensor<4x32xf32>', r"expected \(4, 64\)"),
    (f'%l = "npu.load"(%x) : ({X}) -> tensor<4x64xi1>', "elements i1, expected f32"),
    (f'%l = "npu.load"(%x) : ({X}) -> tensor<4x64xf16>', "elements f16, expected f32"),
    (block("i64: 4, 0"), "rows 4 to 5"),
    (block("i64: -1, 0"), "rows -1 to 0"),
    (block("i64: 0"), "ranks differ"),
    (block("i32: 0, 0"), "integers have 64 bits"),
    (block("f64: 0.0, 0.0"), "integers have 64 bits"),
    (block(f"i64: {dialect.DYNAMIC}, 0"), "1 offsets are operands, 0 are given"),
    (block("i64: 0, 0", "memref<1x64xi32>"), "a block has elements i32, its base f32"),
    (block("i64: 0, 0", "memref<?x64xf32>"), "has a size that is not known"),
    (f'%b = "npu.block"(%x) : ({X}) -> memref<1x64xf32>', "static_offsets"),
    (of_load("elementwise", '<{function = "tanh"}>', V), "'tanh' of 1 operands is unknown"),
    (of_load("elementwise", '<{function = "add"}>', V), "'add' of 1 operands is unknown"),
    (of_load("elementwise", '<{function = "exp"}>', V, operands=0), "'exp' of 0 operands is unknown"),
    (of_load("elementwise", "<{function = 1 : i64}>", V), "1 : i64 should be of base attribute string"),
    (of_load("elementwise", '<{function = "lt"}>', V, operands=2), "elements f32, expected i1"),
    (of_load("elementwise", '<{function = "select"}>', V, operands=3), "elements f32, expected i1"),
    (of_load("elementwise", '<{function = "exp"}>', "tensor<64x4xf32>"), "a result has shape"),
    (of_load("reduce", '<{function = "mean", axis = 1 : i64}>', L), "there is no reduction 'mean'"),
    (of_load("reduce", '<{function = "sum", axis = 2 : i64}>', L), "axis 2 of a tensor with 2 dimensions"),
    (of_load("reduce", '<{function = "sum", axis = 1 : i64}>', "tensor<4xf32>"), r"expected \(4, 1\)"),
    (of_load("reduce", '<{function = "sum"}>', L), "axis"),
    (of_load("matmul", "", V, operands=2), "inner dimensions"),
    (of_load("transpose", "<{permutation = array<i64: 0, 0>}>", "tensor<4x4xf32>"), "is no order of"),
    (of_load("transpose", "<{permutation = array<i64: 1, 0>}>", V), r"expected \(64, 4\)"),
    (of_load("reshape", "", "tensor<4x32xf32>"), "has 256 elements"),
    (of_load("reshape", "", "tensor<4x64xi1>"), "elements i1, expected f32"),
    (of_load("reshape", "", "tensor<?x64xf32>"), "has a size that is not known"),
    (of_load("broadcast", "", "tensor<8x64xf32>"), "cannot be repeated"),
    (of_load("pad", "<{axis = 1 : i64, low = -1 : i64, high = 0 : i64, value = 0.0 : f32}>", V), "a padding of -1"),
    (of_load("softmax", "", "tensor<4x32xf32>"), "a result has shape"),
    (of_load("flash_tile", "", f"({L}, {V}, {L})", operands=3), "row_max_prev has shape"),
    (of_load("flash_recompute", "", f"({V}, {L})", operands=6), "a result has shape"),
    (f'{LOAD} %r = "npu.reshape"(%l) : ({V}) -> tensor<64x4xf32> "npu.store"(%r, %x) : (tensor<64x4xf32>, {X}) -> ()',
     "is written to a block"),
    (f'%s = "npu.scalar"(%x) : ({X}) -> tensor<f32>', "is no scalar"),
    (f'%n = "npu.index"(%t) <{{max = -1 : i64}}> : ({T}) -> index', "expected ones"),
    (block("i64: 0, 0", "memref<1x1xf32>") + '%n = "npu.index"(%b) <{max = -1 : i64}> : (memref<1x1xf32>) -> index',
     "expected integers"),
    (f'%b = "npu.partition_skip"(%t) <{{position = array<i64: 0, 2>, partition_size = 4 : i64}}> : ({T}) -> i1',
     "is no position"),
    (f'%b = "npu.partition_skip"(%t) <{{position = array<i64: 0, 1>, partition_size = -1 : i64}}> : ({T}) -> i1',
     "a partition of -1 rows"),
    (f'{INDEX} %l = "npu.dyn_load"(%x, %n) <{{axis = 2 : i64}}> : ({X}, index) -> {V}', "axis 2"),
    (f'{LOAD} {INDEX} %e = "npu.insert"(%l, %l, %n) <{{axis = 5 : i64}}> : ({V}, {V}, index) -> {V}', "axis 5"),
    ("%c = arith.constant 1.0 : f32", "a constant of type f32, expected a tensor"),
    ("%c = arith.constant dense<1.0> : tensor<4xf32> %d = arith.addf %c, %c : tensor<4xf32>",
     "there is no operation arith.addf"),
    (f'%l = "npu.wish"(%x) : ({X}) -> {V}', "npu.wish"),
    (f'%l = "npu.load"(%y) : ({X}) -> {V}', "y"),
    (f'%l = "npu.load"(%x) : ({X})', "xpected"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), MALFORMED)
def test_a_malformed_program_is_refused(body: str, message: str) -> None:
    with pytest.raises(NpuProgramError, match=message):
        parse_program(small(body), "given.mlir")


def test_other_texts_are_no_programs() -> None:
    assert parse_program(small(LOAD)) is not None
    for text in ("", "builtin.module { }", "not mlir at all", small("") * 2):
        with pytest.raises(NpuProgramError):
            parse_program(text)
    two = small("").replace("func.return }", "func.return } func.func @other() { func.return }")
    with pytest.raises(NpuProgramError, match="this one has 2 functions"):
        parse_program(two)
    with pytest.raises(NpuProgramError, match=r"^given\.mlir: "):
        parse_program("nothing", "given.mlir")


def test_every_operation_is_verified_when_it_is_read() -> None:
    for old, new in (
        ("axis = 1 : i64", "axis = 7 : i64"),
        ('function = "exp"', 'function = "log1p"'),
        ("size = 2 : i64", "size = 3 : i64"),
        ("partition_size = 6 : i64", "partition_size = 0 : i64"),
        ("array<i64: 1, 0>", "array<i64: 1, 1>"),
        ("tensor<1x6x8xf32>", "tensor<1x5x8xf32>"),
    ):
        with pytest.raises(NpuProgramError):
            parse_program(broken(old, new))


# Passes


def run(
    module: ModuleOp, kernel: JitFunction, tensors: dict[str, torch.Tensor], **sizes: Any
) -> dict[str, torch.Tensor]:
    """Run a program that is not a compiled one; its tensors afterwards."""
    given = {name: each.clone() for name, each in tensors.items()}
    manifest = kernel.warmup(**tensors, **sizes, profile="tile").manifest
    execute(Program(module, manifest), list(given.values()), check=False)
    return given


def cleaned(module: ModuleOp) -> ModuleOp:
    result = module.clone()
    passes.clean(result)
    result.verify()
    return result


def equivalent(kernel: JitFunction, tensors: dict[str, torch.Tensor], **sizes: Any) -> tuple[ModuleOp, ModuleOp]:
    """A program before and after the clean-up: both compute the same."""
    before = built(kernel, {name: tuple(each.shape) for name, each in tensors.items()}, **sizes)
    after = cleaned(before)
    first, second = (run(each, kernel, tensors, **sizes) for each in (before, after))
    for name in tensors:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0, equal_nan=True)
    text = print_program(after)
    passes.clean(after)
    assert print_program(after) == text, "cleaning twice changes more than cleaning once"
    return before, after


def tensors(*shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"x_ptr": torch.randn(shape, generator=g), "out_ptr": torch.full(shape, float("nan"))}


@jit
def reshapes(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(all_of(x_ptr, R, C))
    y = tl.reshape(tl.reshape(tl.reshape(x, (C, R)), (1, R * C)), (R, C))
    z = tl.permute(tl.permute(tl.reshape(x, (1, R, C)), (1, 2, 0)), (2, 0, 1))
    w = tl.trans(tl.trans(tl.permute(x, (0, 1))))
    tl.store(all_of(out_ptr, R, C), y + tl.reshape(z, (R, C)) * w)


def test_shapes_that_change_nothing_are_gone() -> None:
    before, after = equivalent(reshapes, tensors(3, 5), R=3, C=5)
    assert names(before).count("npu.reshape") == 5
    assert names(before).count("npu.transpose") == 5
    assert "npu.reshape" not in names(after)
    assert "npu.transpose" not in names(after)


@jit
def repeated(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (R, C), (C, 1), (0, 0), (1, C), (1, 0)))
    wide = tl.permute(tl.broadcast_to(tl.broadcast_to(x, (R, C)), (R, C)), (1, 0))
    front = tl.permute(tl.broadcast_to(x, (2, R, C)), (2, 1, 0))
    y = tl.trans(wide) + tl.max(tl.permute(front, (1, 2, 0)), axis=1)
    tl.store(all_of(out_ptr, R, C), y)


def test_what_is_repeated_and_transposed_is_transposed_first() -> None:
    before, after = equivalent(repeated, tensors(3, 5), R=3, C=5)
    for module, order in ((before, ["npu.broadcast", "npu.transpose"]), (after, ["npu.broadcast"])):
        (add,) = [each for each in module.walk() if each.name == "npu.elementwise"]
        chain = []
        value = add.operands[0]
        while value.owner.name in {"npu.broadcast", "npu.transpose"}:  # type: ignore[union-attr]
            chain.insert(0, value.owner.name)  # type: ignore[union-attr]
            value = value.owner.operands[0]  # type: ignore[union-attr]
        assert list(dict.fromkeys(chain)) == order
    assert "npu.transpose" in names(after)  # of what is repeated in front, where the order would be another one


@jit
def same_twice(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(all_of(x_ptr, R, C))
    y = tl.load(all_of(x_ptr, R, C))
    unused = tl.exp(tl.load(all_of(out_ptr, R, C)))  # noqa: F841
    tl.store(all_of(out_ptr, R, C), (x * x + 1.0) * (y * y + 1.0) + tl.where(x > 0.0, 0.0, -0.0))


def test_equal_operations_are_done_once_and_unused_ones_not_at_all() -> None:
    before, after = equivalent(same_twice, tensors(3, 5), R=3, C=5)
    assert names(before).count("npu.load") == 3
    assert names(after).count("npu.load") == 1
    functions = [each.function.data for each in after.walk() if isinstance(each, dialect.ElementwiseOp)]
    assert sorted(functions) == ["add", "add", "gt", "mul", "mul", "select"]
    constants = re.findall(r"dense<(-?[0-9.e+]+)>", print_program(after))
    assert sorted(map(float, constants)) == [-0.0, 0.0, 1.0]
    assert "dense<-0.0" in print_program(after)  # not the same as zero


@jit
def across_stores(x_ptr, counts, out_ptr, R: tl.constexpr, C: tl.constexpr):
    first = tl.load(all_of(x_ptr, R, C))
    tl.store(all_of(x_ptr, R, C), first + 1.0)
    second = tl.load(all_of(x_ptr, R, C))
    count = rblib.to_dynamic_index(tl.make_block_ptr(counts, (1, 2), (2, 1), (0, 1), (1, 1), (1, 0)), 4)
    if rblib.partition_skip(count) == False:  # noqa: E712
        third = tl.load(all_of(x_ptr, R, C))
        tl.store(all_of(x_ptr, R, C), third * 2.0)
        fourth = tl.load(all_of(x_ptr, R, C))
        tl.store(all_of(out_ptr, R, C), fourth)
    fifth = tl.load(all_of(x_ptr, R, C))
    tl.store(all_of(out_ptr, R, C), first + second * 10.0 + fifth * 100.0)


@pytest.mark.parametrize("counts", [(4, 0), (3, 0)], ids=["taken", "skipped"])
def test_a_load_is_not_another_one_behind_a_store(counts: tuple[int, int]) -> None:
    given = tensors(3, 5)
    given = {
        "x_ptr": given["x_ptr"], "counts": torch.tensor([counts], dtype=torch.int32), "out_ptr": given["out_ptr"]
    }  # fmt: skip
    before, after = equivalent(across_stores, given, R=3, C=5)
    assert names(before).count("npu.load") == 5
    assert names(after).count("npu.load") >= 4  # the one at the branch's begin may be that before it
    x = given["x_ptr"]
    last = (x + 1.0) * 2.0 if counts == (4, 0) else x + 1.0
    result = run(after, across_stores, given, R=3, C=5)["out_ptr"]
    torch.testing.assert_close(result, x + (x + 1.0) * 10.0 + last * 100.0, rtol=0, atol=0)


@jit
def yields(x_ptr, counts, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(all_of(x_ptr, R, C))
    y, z = x, x
    count = rblib.to_dynamic_index(tl.make_block_ptr(counts, (1, 2), (2, 1), (0, 1), (1, 1), (1, 0)), 4)
    if rblib.partition_skip(count) == False:  # noqa: E712
        x = x + 1.0
        y = tl.exp(x)
        z = y * 2.0  # noqa: F841
    tl.store(all_of(out_ptr, R, C), y)


@pytest.mark.parametrize("counts", [(4, 0), (3, 0)], ids=["taken", "skipped"])
def test_what_nobody_takes_is_not_given(counts: tuple[int, int]) -> None:
    given = tensors(3, 5)
    given = {
        "x_ptr": given["x_ptr"], "counts": torch.tensor([counts], dtype=torch.int32), "out_ptr": given["out_ptr"]
    }  # fmt: skip
    before, after = equivalent(yields, given, R=3, C=5)
    for module, count in ((before, 3), (after, 1)):
        (branch,) = [each for each in module.walk() if isinstance(each, IfOp)]
        assert len(branch.results) == count
        assert all(len(region.block.last_op.operands) == count for region in branch.regions)  # type: ignore[union-attr]
    assert "mul" not in print_program(after)


@jit
def chain(x_ptr, out_ptr, STEPS: tl.constexpr):
    """Operations in an order that a test draws."""
    x = tl.reshape(tl.load(all_of(x_ptr, 6, 4)), (2, 3, 4))
    y = x
    for n in tl.static_range(len(STEPS)):
        a, b, c = y.shape[0], y.shape[1], y.shape[2]
        if STEPS[n] == "permute":
            y = tl.permute(y, (2, 0, 1))
        elif STEPS[n] == "trans":
            y = tl.trans(y)
        elif STEPS[n] == "identity":
            y = tl.permute(y, (0, 1, 2))
        elif STEPS[n] == "reshape":
            y = tl.reshape(y, (c, a, b))
        elif STEPS[n] == "flatten":
            y = tl.reshape(tl.reshape(y, (a * b * c,)), (a, b, c))
        elif STEPS[n] == "repeat":
            y = tl.broadcast_to(tl.max(y, axis=1, keep_dims=True), (a, b, c))
        elif STEPS[n] == "front":
            y = tl.broadcast_to(tl.sum(y, axis=0), (a, b, c))
        elif STEPS[n] == "add":
            y = y + tl.reshape(x, (a, b, c))
        else:
            y = tl.where(tl.permute(tl.permute(y, (1, 2, 0)) > 0.0, (2, 0, 1)), y, -y)
    tl.store(all_of(out_ptr, 6, 4), tl.reshape(y, (6, 4)))


STEPS = ("permute", "trans", "identity", "reshape", "flatten", "repeat", "front", "add", "where")


@properties
@hypothesis.given(steps=st.lists(st.sampled_from(STEPS), max_size=7).map(tuple), seed=st.integers(0, 3))
def test_cleaning_never_changes_what_is_computed(steps: tuple[str, ...], seed: int) -> None:
    equivalent(chain, tensors(6, 4, seed=seed), STEPS=steps)


def test_the_program_ends_with_a_return() -> None:
    last = [each for each in program().module.walk() if not isinstance(each, YieldOp)][-1]
    assert isinstance(last, ReturnOp)
