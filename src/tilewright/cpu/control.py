"""Loops, branches, jumps and calls, with tiles as their state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.cpu.analysis import branches
from tilewright.cpu.collectives import roots_of
from tilewright.cpu.diagnostics import unsupported
from tilewright.cpu.expressions import Expr
from tilewright.cpu.loops import (
    Assert,
    Assign,
    Atomic,
    Buffer,
    Declare,
    Dot,
    Fold,
    For,
    Histogram,
    If,
    Jump,
    Label,
    Leave,
    Let,
    Loop,
    Nest,
    Print,
    Scan,
    Write,
)  # fmt: skip
from tilewright.cpu.ttir import Operation, Value
from tilewright.cpu.types import I64, Pointer, Tensor, element_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tilewright.cpu.loops import Statement
    from tilewright.cpu.lowering import Binding, Lowering
    from tilewright.cpu.ttir import Block, Region


def _region(
    lowering: Lowering, operations: Sequence[Operation], end: Callable[[], None] | None = None
) -> list[Statement]:
    """Lower operations into a list of statements of their own; ``end`` adds what follows them."""
    outer, lowering.out = lowering.out, []
    lowering.block(operations)
    if end is not None:
        end()
    lowering.flush()
    inner, lowering.out = lowering.out, outer
    return inner


# State that a loop or a jump carries


def _variable(lowering: Lowering, value: Value) -> Binding:
    """A place for a value that is assigned more than once: a variable or a buffer."""
    element = element_of(value.type)
    if isinstance(value.type, Tensor):
        return lowering.buffer(value.name, element, shape_of(value.type))
    name = lowering.name(value.name)
    lowering.out.append(Declare(name, element))
    return lowering.make.var(name, element)


def _assign(
    lowering: Lowering, targets: Sequence[Binding], values: Sequence[Value], steps: Sequence[tuple[str, Expr]] = ()
) -> None:
    """Give places the values, as if all at once, and variables those of ``steps`` with them."""
    lowering.flush()
    pairs = [(t, v) for t, v in zip(targets, values, strict=True) if isinstance(t, Buffer)]
    pairs = [(t, v) for t, v in pairs if _bound(lowering, v) is not t]
    reads = [_buffers_read(lowering, value) for _, value in pairs]
    direct: list[tuple[Buffer, Value]] = []
    through: list[tuple[Buffer, Value]] = []
    for k, (target, value) in enumerate(pairs):
        needed_by_others = any(target in read for j, read in enumerate(reads) if j != k)
        moved = target in reads[k] and not _reads_in_place(lowering, value, target)
        (through if needed_by_others or moved else direct).append((target, value))
    copies = []
    for target, value in through:
        copy = lowering.buffer(target.name, target.element, target.shape)
        lowering.write(copy, value)
        copies.append((target, copy))
    if through:
        lowering.flush()
    for target, value in direct:
        lowering.write(target, value)
    for target, copy in copies:
        _copy(lowering, target, copy)
    lowering.flush()
    scalars = [(t, lowering.scalar(v)) for t, v in zip(targets, values, strict=True) if isinstance(t, Expr)]
    moving = [*steps, *((str(target.attr), value) for target, value in scalars if value is not target)]
    if moving:
        lowering.out.append(Assign(moving))


def _copy(lowering: Lowering, target: Buffer, source: Buffer) -> None:
    def build(index: tuple[Expr, ...]) -> list[Write]:
        return [Write(target, lowering.make.flat(index, target.shape), lowering.read(source, index))]

    lowering.sink(target.shape, build)  # type: ignore[arg-type]


def _bound(lowering: Lowering, value: Value) -> Binding | None:
    bound = lowering.bindings.get(value)
    while isinstance(bound, Value):
        bound = lowering.bindings.get(bound)
    return bound


def _buffers_read(lowering: Lowering, value: Value) -> set[Buffer]:
    """The buffers that computing a tile's elements reads."""
    found: set[Buffer] = set()
    seen: set[Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        bound = lowering.bindings.get(current)
        if isinstance(bound, Buffer):
            found.add(bound)
        elif isinstance(bound, Value):
            pending.append(bound)
        elif bound is not None and hasattr(bound, "start"):
            pending.append(bound.start)
        elif bound is None and isinstance(current.owner, Operation):
            pending += current.owner.operands
    return found


def _reads_in_place(lowering: Lowering, value: Value, target: Buffer) -> bool:
    """Whether the tile's element at an index reads the buffer at that index alone."""
    lowering.flush()
    good = True

    def build(index: tuple[Expr, ...]) -> list[Write]:
        nonlocal good
        e = lowering.element(value, index)
        position = lowering.make.flat(index, target.shape)
        for part in e.walk(set()):
            if part.op == "element" and part.attr is target and part.args[0] is not position:
                good = False
        return []

    lowering.sink(target.shape, build)  # type: ignore[arg-type]
    lowering.open = None
    return good


# Structured control flow


def _for(lowering: Lowering, operation: Operation) -> None:
    from tilewright.cpu.lowering import Shifted

    lowering.flush()
    start, stop, step = (lowering.scalar(operand) for operand in operation.operands[:3])
    body = operation.regions[0].block
    induction, *carried = body.arguments
    yielded = body.operations[-1].operands
    places: list[Binding] = []
    shifts: list[tuple[str, Value]] = []
    for argument, initial, value in zip(carried, operation.operands[3:], yielded, strict=True):
        amount = _uniform_shift(lowering, argument, value, body)
        if amount is not None:
            if not isinstance(_bound(lowering, initial), Buffer) and lowering.facts.cost.get(initial, 0) > 10:
                lowering.bindings[initial] = lowering.stored(initial)
            element = I64 if isinstance(element_of(argument.type), Pointer) else element_of(argument.type)
            name = lowering.name(f"{argument.name}_moved")
            lowering.out.append(Let(name, lowering.make.const(0, element), mutable=True))
            places.append(Shifted(initial, lowering.make.var(name, element)))
            shifts.append((name, amount))
        else:
            places.append(_variable(lowering, argument))
    assigned = [k for k, place in enumerate(places) if not isinstance(place, Shifted)]
    _assign(lowering, [places[k] for k in assigned], [operation.operands[3 + k] for k in assigned])
    for argument, place in zip(carried, places, strict=True):
        lowering.bindings[argument] = place
    variable = lowering.name(induction.name)
    lowering.bindings[induction] = lowering.make.var(variable, start.type)
    _find_homes(lowering, body, [(carried[k], places[k], yielded[k]) for k in assigned])

    def end() -> None:
        steps = []
        for name, amount in shifts:
            place = next(p for p in places if isinstance(p, Shifted) and p.by.attr == name)
            by = _uniform(lowering, amount)
            assert by is not None
            if by.type != place.by.type:
                by = lowering.make.make("sext", place.by.type, (by,))
            steps.append((name, lowering.make.int_op("add", place.by, by)))
        _assign(lowering, [places[k] for k in assigned], [yielded[k] for k in assigned], steps)

    inner = _region(lowering, body.operations[:-1], end)
    unsigned = bool(operation.attributes.get("unsignedCmp", False))
    lowering.out.append(For(variable, start, stop, step, unsigned, inner))
    for result, place in zip(operation.results, places, strict=True):
        lowering.bindings[result] = place


def _uniform_shift(lowering: Lowering, argument: Value, value: Value, body: Block) -> Value | None:
    """The tile of equal elements that a loop adds to a carried tile of pointers or integers, if that is all it does."""
    owner = value.owner
    if not isinstance(argument.type, Tensor) or not isinstance(owner, Operation) or owner not in body.operations:
        return None
    if owner.name not in {"tt.addptr", "arith.addi"} or argument not in owner.operands:
        return None
    left, right = owner.operands
    amount = right if left is argument else left
    if amount is argument or (owner.name == "tt.addptr" and left is not argument):
        return None
    return amount if _is_uniform(amount) else None


def _is_uniform(value: Value) -> bool:
    """Whether all elements of a tile are the same scalar."""
    owner = value.owner
    if not isinstance(value.type, Tensor):
        return True
    if not isinstance(owner, Operation):
        return False
    if owner.name == "arith.constant":
        return bool(getattr(owner.attributes["value"], "splat", False))
    if owner.name == "tt.splat":
        return True
    moves = {"tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.muli", "arith.addi"}
    return owner.name in moves and all(_is_uniform(operand) for operand in owner.operands)


def _uniform(lowering: Lowering, value: Value) -> Expr | None:
    """The scalar that all elements of a tile are."""
    owner = value.owner
    if not isinstance(value.type, Tensor):
        return lowering.scalar(value)
    assert isinstance(owner, Operation)
    from tilewright.cpu import pointwise

    if owner.name == "arith.constant":
        return pointwise.constant(lowering.make, owner)
    args = [_uniform(lowering, operand) for operand in owner.operands]
    if pointwise.is_pointwise(owner):
        return pointwise.build(lowering.make, owner, [arg for arg in args if arg is not None])
    return args[0]


def _find_homes(lowering: Lowering, body: Block, carried: list[tuple[Value, Binding, Value]]) -> None:
    """Products that may accumulate in the buffer that the loop carries: nothing reads it after them."""
    facts = lowering.facts
    for argument, place, value in carried:
        owner = value.owner
        if not isinstance(place, Buffer) or not isinstance(owner, Operation) or owner.name != "tt.dot":
            continue
        if facts.block_of.get(owner) is not body or len(facts.uses.get(value, [])) != 1:
            continue
        if place.element != element_of(value.type) or place.element.is_small_float:
            continue
        last = 0
        for user in facts.uses.get(argument, []):
            if facts.is_lazy(user):
                last = max([last, *(facts.last_use[result] for result in user.results)])
            else:
                last = max(last, facts.position[user])
        also_yielded = any(other is argument for _, _, other in carried)
        if (
            last <= facts.position[owner]
            and not also_yielded
            and _pointwise_chain(lowering, owner.operands[2], argument)
        ):
            lowering.homes[owner] = place


def _pointwise_chain(lowering: Lowering, value: Value, argument: Value) -> bool:
    """Whether a tile's element at an index needs the carried tile at that index alone."""
    if value is argument:
        return True
    owner = value.owner
    if not isinstance(owner, Operation) or value in lowering.facts.stored:
        return True  # stored before the product begins
    from tilewright.cpu import pointwise

    if pointwise.is_pointwise(owner):
        return all(_pointwise_chain(lowering, operand, argument) for operand in owner.operands)
    return not _depends(lowering, value, argument)


def _depends(lowering: Lowering, value: Value, argument: Value) -> bool:
    """Whether computing a tile's elements reads the carried tile."""
    if value is argument:
        return True
    owner = value.owner
    if not isinstance(owner, Operation) or not lowering.facts.is_lazy(owner):
        return False
    return any(_depends(lowering, operand, argument) for operand in owner.operands)


def _if(lowering: Lowering, operation: Operation) -> None:
    lowering.flush()
    condition = lowering.scalar(operation.operands[0])
    places = [_variable(lowering, result) for result in operation.results]
    sides: list[list[Statement]] = []
    for region in operation.regions:
        if not region.blocks:
            sides.append([])
            continue
        *body, last = region.block.operations
        sides.append(_region(lowering, body, lambda last=last: _assign(lowering, places, last.operands)))  # type: ignore[misc]
    lowering.out.append(If(condition, sides[0], sides[1] if len(sides) > 1 else []))
    for result, place in zip(operation.results, places, strict=True):
        lowering.bindings[result] = place


def _while(lowering: Lowering, operation: Operation) -> None:
    lowering.flush()
    before, after = operation.regions[0].block, operation.regions[1].block
    state = [_variable(lowering, argument) for argument in before.arguments]
    passed = [_variable(lowering, argument) for argument in after.arguments]
    _assign(lowering, state, operation.operands)
    for argument, place in zip(before.arguments, state, strict=True):
        lowering.bindings[argument] = place
    condition = before.operations[-1]

    def decide() -> None:
        _assign(lowering, passed, condition.operands[1:])
        lowering.out.append(Leave(lowering.scalar(condition.operands[0])))

    inner = _region(lowering, before.operations[:-1], decide)
    for argument, place in zip(after.arguments, passed, strict=True):
        lowering.bindings[argument] = place
    last = after.operations[-1]
    inner += _region(lowering, after.operations[:-1], lambda: _assign(lowering, state, last.operands))
    lowering.out.append(Loop(inner))
    for result, place in zip(operation.results, passed, strict=True):
        lowering.bindings[result] = place


# Jumps and calls


def blocks(lowering: Lowering, region: Region) -> None:
    """Lower a function of several blocks, which early returns make."""
    labels = lowering.labels
    for block in region.blocks[1:]:
        labels[block] = lowering.name("block")
        for argument in block.arguments:
            lowering.bindings[argument] = _variable(lowering, argument)
    for k, block in enumerate(region.blocks):
        if k:
            lowering.out.append(Label(labels[block]))
        lowering.block(block.operations)
        lowering.flush()


def _jump(lowering: Lowering, operation: Operation) -> None:
    lowering.flush()

    def to(block: Block, values: Sequence[Value]) -> list[Statement]:
        outer, lowering.out = lowering.out, []
        _assign(lowering, [lowering.bindings[argument] for argument in block.arguments], values)
        inner, lowering.out = lowering.out, outer
        return [*inner, Jump(lowering.labels[block])]

    ways = [to(block, values) for block, values in branches(operation)]
    if operation.name == "cf.br":
        lowering.out += ways[0]
    else:
        lowering.out.append(If(lowering.scalar(operation.operands[0]), ways[0], ways[1]))


def _call(lowering: Lowering, operation: Operation) -> None:
    lowering.flush()
    function = lowering.module.functions.get(operation.attributes["callee"])
    if function is None:
        raise unsupported(operation, f"a call of {operation.attributes['callee']}")
    places = [_variable(lowering, result) for result in operation.results]
    end = lowering.name("returned")
    arguments: list[Binding] = []
    for operand in operation.operands:
        tile = isinstance(operand.type, Tensor)
        arguments.append(lowering.stored(operand) if tile else lowering.scalar(operand))

    def leave(values: Sequence[Value]) -> None:
        _assign(lowering, places, values)
        if len(function.regions[0].blocks) > 1:
            lowering.out.append(Jump(end))

    outer, lowering.out = lowering.out, []
    lowering.function(function, arguments, leave)
    lowering.flush()
    inner, lowering.out = lowering.out, outer
    lowering.out += [*inner, Label(end)]
    for result, place in zip(operation.results, places, strict=True):
        lowering.bindings[result] = place


HANDLERS: dict[str, Callable[[Lowering, Operation], None]] = {
    "scf.for": _for,
    "scf.if": _if,
    "scf.while": _while,
    "cf.br": _jump,
    "cf.cond_br": _jump,
    "tt.call": _call,
}


# Which buffers are read


def _nested(statement: Statement) -> list[list[Statement]]:
    if isinstance(statement, For | Loop):
        return [statement.body]
    if isinstance(statement, If):
        return [statement.then, statement.otherwise]
    return []


def _expressions(statement: Statement) -> Iterator[Expr]:
    if isinstance(statement, Let):
        yield statement.value
    elif isinstance(statement, Assign):
        yield from (value for _, value in statement.targets)
    elif isinstance(statement, Nest):
        for sink in statement.sinks:
            yield from roots_of(sink)
    elif isinstance(statement, For):
        yield from (statement.start, statement.stop, statement.step)
    elif isinstance(statement, If):
        yield statement.condition
    elif isinstance(statement, Leave):
        yield statement.unless


def count_reads(statements: Sequence[Statement]) -> None:
    """Count the reads of every buffer."""
    for statement in statements:
        seen: set[Expr] = set()
        for expression in _expressions(statement):
            for part in expression.walk(seen):
                if part.op == "element":
                    part.attr.n_reads += 1
        whole: list[object] = []
        if isinstance(statement, Dot):
            whole = [statement.a, statement.b, statement.c]
        elif isinstance(statement, Scan):
            whole = list(statement.buffers)
        elif isinstance(statement, Histogram):
            whole = [statement.values, statement.mask, statement.bins]
        elif isinstance(statement, Print):
            whole = [value for value, _ in statement.values]
        elif isinstance(statement, Assert):
            whole = [statement.condition]
        elif isinstance(statement, Nest):
            for sink in statement.sinks:
                if isinstance(sink, Fold):
                    whole += sink.targets
                elif isinstance(sink, Atomic):
                    whole.append(sink.target)
        for buffer in whole:
            if isinstance(buffer, Buffer):
                buffer.n_reads += 1
        for inner in _nested(statement):
            count_reads(inner)


def drop_writes(statements: list[Statement], dead: set[Buffer]) -> None:
    """Remove writes to the buffers, and nests that do nothing then."""
    for statement in statements:
        if isinstance(statement, Nest):
            statement.sinks = [s for s in statement.sinks if not (isinstance(s, Write) and s.buffer in dead)]
        for inner in _nested(statement):
            drop_writes(inner, dead)
    statements[:] = [s for s in statements if not (isinstance(s, Nest) and not s.sinks)]
