"""What is known of a function before it is lowered: who uses a value, what it costs, where its memory comes from.

The main result is :attr:`Analysis.stored`: the tiles that are written to local memory where they are defined. Every
other tile is computed again wherever an element of it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilewright.cpu import pointwise
from tilewright.cpu.ttir import Block, Operation, Value
from tilewright.cpu.types import Pointer, Tensor, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.cpu.ttir import Region

_WORTH_STORING = 10
"""A tile that is used twice is stored if an element costs as much as this."""

_INDEX_WORTH_STORING = 60
"""The same for arithmetic on indices alone, which is mostly done outside the innermost loop."""

_TOO_LONG = 400
"""A tile is stored if its expression would cost more, used twice or not: the text of a nest stays within bounds."""

MOVES = frozenset(
    {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.join", "tt.cat", "tt.split",
     "tt.make_range", "tt.gather", "tt.unsplat"}
)  # fmt: skip
"""Operations that only say where an element comes from."""

ATOMICS = frozenset({"tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_store"})
WRITES = ATOMICS | {"tt.store"}
ANYWHERE = "*"
"""The root of a pointer whose origin is not known."""


@dataclass
class Analysis:
    """The facts about one function."""

    uses: dict[Value, list[Operation]] = field(default_factory=dict)
    block_of: dict[Operation, Block] = field(default_factory=dict)
    position: dict[Operation, int] = field(default_factory=dict)
    cost: dict[Value, int] = field(default_factory=dict)
    stored: set[Value] = field(default_factory=set)
    roots: dict[Value, frozenset[Value | str]] = field(default_factory=dict)
    last_use: dict[Value, int] = field(default_factory=dict)
    index_only: set[Value] = field(default_factory=set)

    def is_lazy(self, operation: Operation) -> bool:
        """Whether the operation's tile is computed where its elements are needed."""
        return is_lazy(operation) and not any(result in self.stored for result in operation.results)

    def may_overlap(self, a: frozenset[Value | str], b: frozenset[Value | str], aliased: bool) -> bool:
        """Whether memory reached from the two sets of roots may overlap."""
        return aliased or ANYWHERE in a or ANYWHERE in b or bool(a & b)


def is_lazy(operation: Operation) -> bool:
    """Whether the operation yields a tile that can be computed element by element where it is needed."""
    if not operation.results or not isinstance(operation.results[0].type, Tensor):
        return False
    if operation.name in {"arith.constant", "ub.poison"} or operation.name in MOVES:
        return True
    if operation.name == "tt.load":
        return True
    return pointwise.is_pointwise(operation)


def operations_of(region: Region) -> Iterator[Operation]:
    """Every operation of a region, those of nested regions after the one that holds them."""
    for block in region.blocks:
        for operation in block.operations:
            yield operation
            for inner in operation.regions:
                yield from operations_of(inner)


def analyse(function: Operation, aliased: bool) -> Analysis:
    """Study a function; ``aliased`` says that its pointers may lead to memory that overlaps."""
    facts = Analysis()
    body = function.regions[0]
    _number(facts, body)
    _find_roots(facts, function)
    operations = sorted(facts.position, key=lambda operation: facts.position[operation])
    effects = [operation for operation in operations if operation.name in WRITES or operation.name == "tt.call"]
    for _ in range(2):  # the first round's choices make elements cheap that the second need not store
        before, facts.stored = facts.stored, set()
        for operation in operations:
            _find_cost(facts, operation, before)
        # From the last to the first: what is stored later decides how often an earlier tile is read.
        for operation in reversed(operations):
            _decide(facts, operation, effects, aliased)
    return facts


def _number(facts: Analysis, region: Region) -> None:
    for block in region.blocks:
        for operation in block.operations:
            facts.position[operation] = len(facts.position)
            facts.block_of[operation] = block
            for operand in operation.operands:
                facts.uses.setdefault(operand, []).append(operation)
            for inner in operation.regions:
                _number(facts, inner)


def _find_roots(facts: Analysis, function: Operation) -> None:
    """Follow pointers from the arguments. Loops carry them round, so this repeats until nothing changes."""
    anywhere = frozenset({ANYWHERE})
    roots = facts.roots
    is_kernel = function.attributes.get("sym_visibility") == "public"
    for argument in function.regions[0].blocks[0].arguments:
        if isinstance(element_of_or_none(argument), Pointer):
            roots[argument] = frozenset({argument}) if is_kernel else anywhere
    changed = True
    while changed:
        changed = False
        for operation in facts.position:
            for target, sources in _flows(operation):
                if not isinstance(element_of_or_none(target), Pointer):
                    continue
                found = frozenset[Value | str]().union(*(roots.get(source, frozenset()) for source in sources))
                if not sources:
                    found = anywhere
                if found - roots.get(target, frozenset()):
                    roots[target] = roots.get(target, frozenset()) | found
                    changed = True


def element_of_or_none(value: Value) -> object:
    """The element type of a value, None if its type is opaque."""
    type_ = value.type
    return type_.element if isinstance(type_, Tensor) else type_


def _flows(operation: Operation) -> Iterator[tuple[Value, list[Value]]]:
    """Which values' pointers the results, and the arguments of the operation's blocks, may be."""
    name = operation.name
    if name == "scf.for":
        carried, body = operation.operands[3:], operation.regions[0].block
        ends = body.operations[-1].operands
        for k, result in enumerate(operation.results):
            yield body.arguments[k + 1], [carried[k], ends[k]]
            yield result, [carried[k], ends[k]]
    elif name == "scf.while":
        before, after = operation.regions[0].block, operation.regions[1].block
        passed, ends = before.operations[-1].operands[1:], after.operations[-1].operands
        for argument, start, end in zip(before.arguments, operation.operands, ends, strict=True):
            yield argument, [start, end]
        for argument, result, value in zip(after.arguments, operation.results, passed, strict=True):
            yield argument, [value]
            yield result, [value]
    elif name == "scf.if":
        for k, result in enumerate(operation.results):
            yield result, [region.block.operations[-1].operands[k] for region in operation.regions]
    elif name in {"cf.br", "cf.cond_br"}:
        for block, values in branches(operation):
            for argument, value in zip(block.arguments, values, strict=True):
                yield argument, [value]
    else:
        pointers = [v for v in operation.operands if isinstance(element_of_or_none(v), Pointer)]
        known = name in MOVES or name in {"tt.addptr", "tt.bitcast", "arith.select"}
        for result in operation.results:
            yield result, pointers if known else []


def branches(operation: Operation) -> list[tuple[Block, list[Value]]]:
    """Where a branch goes, with the values for the block's arguments."""
    if operation.name == "cf.br":
        return [(operation.successors[0], operation.operands)]
    _, n_then, n_else = operation.attributes["operandSegmentSizes"]
    then = operation.operands[1 : 1 + n_then]
    otherwise = operation.operands[1 + n_then : 1 + n_then + n_else]
    return list(zip(operation.successors, (then, otherwise), strict=True))


def _find_cost(facts: Analysis, operation: Operation, stored: set[Value]) -> None:
    """What an element of the operation's tiles costs, where tiles in ``stored`` are only read."""
    if not is_lazy(operation):
        return
    inputs = sum(1 if operand in stored else facts.cost.get(operand, 0) for operand in operation.operands)
    if operation.name not in {"tt.load", "tt.gather"} and all(
        operand not in stored and (not isinstance(operand.type, Tensor) or operand in facts.index_only)
        for operand in operation.operands
    ):
        facts.index_only |= {r for r in operation.results if not getattr(element_of_or_none(r), "is_float", True)}
    own = 0 if operation.name in MOVES or operation.name == "arith.constant" else pointwise.cost(operation)
    if operation.name == "tt.load":
        own = pointwise.COSTS["load"]
        if all(o in facts.index_only or not isinstance(o.type, Tensor) for o in operation.operands[:2]):
            inputs = 0  # the address is mostly found outside the innermost loop, and the element is in the cache
    for result in operation.results:
        facts.cost[result] = inputs + own
        if inputs + own > _TOO_LONG:
            facts.stored.add(result)
            facts.cost[result] = 1


def _decide(facts: Analysis, operation: Operation, effects: list[Operation], aliased: bool) -> None:
    """Whether the operation's tile is stored, and how late its elements are read if not."""
    if not is_lazy(operation):
        return
    for result in operation.results:
        users = facts.uses.get(result, [])
        last = max((_end_of_use(facts, user) for user in users), default=facts.position[operation])
        facts.last_use[result] = last
        if result in facts.stored:
            continue
        threshold = _INDEX_WORTH_STORING if result in facts.index_only else _WORTH_STORING
        dear = facts.cost[result] >= threshold
        looked_up = any(user.name == "tt.gather" and user.operands[0] is result for user in users)
        overtaken = operation.name == "tt.load" and _overtaken(facts, operation, effects, last, aliased)
        elsewhere = any(facts.block_of[user] is not facts.block_of[operation] for user in users)
        if dear and (len(users) > 1 or any(_repeats(user, result) for user in users)):
            facts.stored.add(result)
        elif elsewhere and result not in facts.index_only and facts.cost[result] >= pointwise.COSTS["load"]:
            facts.stored.add(result)  # a loop would compute it again in every round
        elif (dear and (elsewhere or looked_up)) or overtaken:
            facts.stored.add(result)
        if result in facts.stored:
            facts.last_use[result] = facts.position[operation]


def _end_of_use(facts: Analysis, user: Operation) -> int:
    """The position up to which an operand of ``user`` is read."""
    if facts.is_lazy(user):
        return max(facts.last_use[result] for result in user.results)
    return facts.position[user]


def _repeats(user: Operation, value: Value) -> bool:
    """Whether the user reads an element of the tile several times, where no outer loop can read it once."""
    if user.name != "tt.broadcast":
        return False
    source, target = shape_of(value.type), shape_of(user.result.type)
    grown = [k for k, (a, b) in enumerate(zip(source, target, strict=True)) if a != b]
    return bool(grown) and any(size > 1 for size in source[grown[0] :])


def _only_pointwise(facts: Analysis, operation: Operation, end: Operation) -> bool:
    """Whether the operation's tile reaches ``end``, if at all, without its elements changing places."""
    return all(
        user is end or (facts.is_lazy(user) and user.name not in MOVES and _only_pointwise(facts, user, end))
        for user in facts.uses.get(operation.results[0], [])
    )


def _overtaken(facts: Analysis, load: Operation, effects: list[Operation], last: int, aliased: bool) -> bool:
    """Whether memory that the load reads may be written between the load and the last use of its tile."""
    own = facts.roots.get(load.operands[0], frozenset({ANYWHERE}))
    for effect in effects:
        if not facts.position[load] < facts.position[effect] <= last:
            continue
        if effect.name == "tt.call":
            return True
        in_place = effect.name == "tt.store" and effect.operands[0] is load.operands[0]
        if in_place and facts.position[effect] == last and _only_pointwise(facts, load, effect):
            continue  # each element is read before it is written, by the same step
        theirs = facts.roots.get(effect.operands[0], frozenset({ANYWHERE}))
        if facts.may_overlap(own, theirs, aliased):
            return True
    return False
