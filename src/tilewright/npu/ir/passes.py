"""Passes over a program: target-independent clean-up, then the stage of the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects.builtin import ArrayAttr, DenseArrayBase, DictionaryAttr, StringAttr
from xdsl.dialects.scf import IfOp, YieldOp
from xdsl.pattern_rewriter import (
    GreedyRewritePatternApplier,
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import dce

from tilewright.npu.ir import dialect
from tilewright.npu.ir.dialect import BroadcastOp, ReshapeOp, TransposeOp, element_of, shape_of
from tilewright.npu.ir.text import kernel_of

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp
    from xdsl.dialects.func import FuncOp
    from xdsl.ir import SSAValue

    from tilewright.npu.profiles import Profile


def clean(module: ModuleOp) -> None:
    """Make a program smaller: shape operations in one form, equal operations once, none whose result nobody uses."""
    patterns = [_LastShape(), _Transpose(), _TransposeOfBroadcast(), _UnusedYield()]
    PatternRewriteWalker(GreedyRewritePatternApplier(patterns)).rewrite_module(module)
    cse(module)
    dce(module)


def target(module: ModuleOp, profile: Profile, host_layout: tuple[int, ...], compute_dtype: str) -> None:
    """Write down what the target decides: layouts, the padding of last dimensions, the dtype of its arithmetic.

    A tensor that does not stay in the host's layout lies in the device's memory with its last dimension padded to the
    profile's multiple: ``npu.padded_shape``.
    """
    function = kernel_of(module)
    assert function.arg_attrs is not None
    arguments = []
    position = 0  # among the arguments without the outputs
    for value, given in zip(function.body.block.args, function.arg_attrs, strict=True):
        attributes = dict(given.data)
        role = attributes["npu.role"]
        assert isinstance(role, StringAttr)
        on_host = role.data != "out" and position in host_layout
        position += role.data != "out"
        attributes["npu.layout"] = StringAttr("host" if on_host else "device")
        shape = shape_of(value)
        if role.data in {"in", "out", "inout"} and not on_host and shape and shape[-1] % profile.last_dim_multiple:
            last = -(-shape[-1] // profile.last_dim_multiple) * profile.last_dim_multiple
            attributes["npu.padded_shape"] = dialect.integers([*shape[:-1], last])
        arguments.append(DictionaryAttr(attributes))
    function.arg_attrs = ArrayAttr(arguments)
    function.attributes["npu.profile"] = StringAttr(profile.name)
    function.attributes["npu.compute_dtype"] = StringAttr(compute_dtype)
    function.attributes["npu.host_layout"] = dialect.integers(host_layout)


def seen_shape(function: FuncOp, position: int) -> tuple[int, ...] | None:
    """The shape that a kernel gives an argument, where that is not the argument's own."""
    assert function.arg_attrs is not None
    found = function.arg_attrs.data[position].data.get("npu.seen_shape")
    return tuple(int(each) for each in found.iter_values()) if isinstance(found, DenseArrayBase) else None


class _LastShape(RewritePattern):
    """A reshape or a broadcast to the same shape is nothing; of two of a kind only the last counts."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: ReshapeOp | BroadcastOp, rewriter: PatternRewriter) -> None:
        kind, before = type(op), op.argument.owner
        if op.argument.type == op.result.type:
            rewriter.replace(op, [], [op.argument])
        elif isinstance(before, kind):
            made = kind.build(operands=[before.argument], result_types=[op.result.type])
            made.location = op.location
            rewriter.replace(op, made)


class _Transpose(RewritePattern):
    """An order that changes nothing is nothing; of two orders one is made."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: TransposeOp, rewriter: PatternRewriter) -> None:
        order = op.sizes("permutation")
        if order == tuple(range(len(order))):
            rewriter.replace(op, [], [op.argument])
        elif isinstance(before := op.argument.owner, TransposeOp):
            inner = before.sizes("permutation")
            made = _transposed(before.argument, [inner[each] for each in order], op)
            rewriter.replace(op, made)


class _TransposeOfBroadcast(RewritePattern):
    """What is broadcast and then transposed is transposed first: devices fuse that order into the product."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: TransposeOp, rewriter: PatternRewriter) -> None:
        before = op.argument.owner
        if not isinstance(before, BroadcastOp) or len(shape_of(before.argument)) != len(shape_of(before.result)):
            return
        first = _transposed(before.argument, list(op.sizes("permutation")), op)
        second = BroadcastOp.build(operands=[first.result], result_types=[op.result.type])
        second.location = before.location
        rewriter.replace(op, [first, second])


class _UnusedYield(RewritePattern):
    """What a branch gives and nobody uses need not be given."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: IfOp, rewriter: PatternRewriter) -> None:
        used = [number for number, result in enumerate(op.results) if result.first_use is not None]
        if len(used) == len(op.results):
            return
        for region in op.regions:
            end = region.block.last_op
            assert end is not None
            rewriter.replace(end, YieldOp(*(end.operands[number] for number in used)))
        regions = [region.clone() for region in op.regions]
        made = IfOp(op.cond, [op.results[number].type for number in used], regions[0], regions[1])
        made.location = op.location
        kept = dict(zip(used, made.results, strict=True))
        rewriter.replace(op, made, [kept.get(number) for number in range(len(op.results))])


def _transposed(argument: SSAValue, order: list[int], like: TransposeOp) -> TransposeOp:
    shape = shape_of(argument)
    made = TransposeOp.build(
        operands=[argument],
        properties={"permutation": dialect.integers(order)},
        result_types=[dialect.tensor([shape[each] for each in order], element_of(argument))],
    )
    made.location = like.location
    return made
