"""The table of back ends, and the text that the one for linalg gives."""

from dataclasses import replace

import pytest
from attention_cases import Case, compiled, prepared, tensors
from xdsl.context import Context
from xdsl.dialects import arith, builtin, func, linalg, math, scf, tensor
from xdsl.parser import Parser
from xdsl.printer import Printer

from tilewright.errors import NpuProgramError, UnknownNameError
from tilewright.npu.backends import BACKENDS, backend, emit
from tilewright.npu.backends.linalg import lower
from tilewright.npu.ir.text import parse_program
from tilewright.npu.kernels.flash_causal_attention import flash_causal_attention
from tilewright.npu.profiles import profiles
from tilewright.npu.program import Program

UPSTREAM = (builtin.Builtin, func.Func, arith.Arith, math.Math, tensor.Tensor, linalg.Linalg, scf.Scf)


def attention_program(**options: object) -> Program:
    return compiled(flash_causal_attention, prepared(tensors(Case((20,), 3, partitions=2))), **options)


def parsed(text: str) -> builtin.ModuleOp:
    """The text as xdsl reads it with upstream dialects only."""
    context = Context()
    for dialect in UPSTREAM:
        context.load_dialect(dialect)
    module = Parser(context, text).parse_module()
    module.verify()
    return module


def test_the_text_is_upstream_mlir_with_the_places_of_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    program = attention_program(profile="tile")
    text = emit(program)["linalg.mlir"]
    assert program.asm == {"npu": program.text, "linalg": text}
    module = parsed(text)
    Printer(print_debuginfo=True).print_op(module)
    head, _, rest = text.partition("\n")
    assert head == (
        "// Kernel flash_causal_attention of profile tile: from query, key, value, kv_cache, qk_scale, seq_idx, "
        "block_table, dummy to kv_cache, output."
    )
    assert capsys.readouterr().out + "\n" == rest
    source = {each["line"] for each in program.source_map if each["operation"] == "npu.dynamic_flash_tile"}
    lines = {each.location.line.data for each in module.walk() if each.name == "math.exp"}  # type: ignore[attr-defined]
    assert source <= lines
    assert "?" not in text  # every shape is static; only offsets are not


def test_back_ends_are_a_table() -> None:
    assert {each.backend for each in profiles().values()} <= BACKENDS.keys()
    assert "linalg" not in attention_program().asm
    with pytest.raises(UnknownNameError, match=r"no back end 'other'; there are: rbln, linalg"):
        backend("other")


def test_what_is_unknown_is_an_error() -> None:
    program = attention_program(profile="tile")
    text = "builtin.module { func.func @zero() { %1 = arith.constant 1 : i32 func.return } }"
    manifest = replace(program.manifest, arguments=())
    with pytest.raises(NpuProgramError, match="a constant of type i32"):
        lower(replace(program, module=parse_program(text), manifest=manifest))
