"""Fusing a graph: what every rule proposes, the choice among them, and the change itself.

Rules propose; nothing is changed before all have spoken. What saves most goes first, and whatever overlaps it waits for
the next round, which looks at the changed graph. It ends when nothing waits. A rule that raises is not asked again for
this graph, and the graph stays as it was before it was asked.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch._ops import OpOverload
from torch.fx import Node

from tilewright.errors import TilewrightError
from tilewright.fusion.expressions import writes
from tilewright.fusion.graph import (
    CannotBuild,
    Changes,
    Editor,
    Order,
    aten,
    drop_unused,
    finish,
    hint,
    in_order,
    is_call,
    same_shape,
    same_size,
    value,
    where,
)
from tilewright.fusion.recognise import index as recognised
from tilewright.fusion.report import Decision, GraphReport, Line
from tilewright.fusion.rule import Proposal, Refusal, rows_of, unserved

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.fx import Graph

    from tilewright.fusion.found import Found, Index
    from tilewright.fusion.report import Role
    from tilewright.fusion.rule import Rule

_MAX_ROUNDS = 100
_RIVAL = " saves more with the same operations"


@dataclass(frozen=True)
class Policy:
    """What a pass may do.

    Attributes:
        relaxed: whether named differences are allowed.
        verify: whether each replacement is run beside what it replaces.
    """

    relaxed: bool = False
    verify: bool = False


def fuse(graph: Graph, rules: Sequence[Rule], policy: Policy, role: Role = "unknown") -> GraphReport:
    """Change a graph in place, and say what was decided.

    Args:
        graph: of ATen operators and opaque ones, whose nodes hold fakes.
        rules: in no order that matters but for ties.
        policy: what they may do.
        role: of the graph, for the report.
    """
    drop_unused(graph)
    texts: dict[Node, tuple[object, object, str]] = {}
    before = _lines(graph, texts)
    decided: list[Decision] = []
    refused: dict[tuple[str, str], Decision] = {}
    disabled: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        index = recognised(graph)
        decided += (
            Decision(name, "", "failed", f"{reason}; the adapter is not used in this graph")
            for name, reason in index.failed.items()
            if not any(d.rule == name and d.action == "failed" for d in decided)
        )
        proposals, said = _asked(graph, index, rules, disabled, decided)
        refused |= said
        if not _apply(graph, proposals, policy, disabled, decided, refused):
            break
    done = {name for d in decided if d.action == "fused" for name in d.replaced}
    decided += (d for d in refused.values() if not (d.node in done and d.reason.endswith(_RIVAL)))
    added = {name for d in decided for name in d.added}
    names = {name for name, _ in before}
    after = tuple(Line(name, text, name in added or name not in names) for name, text in _lines(graph, texts))
    remaining = {line.name for line in after}
    shown = tuple(Line(name, text, name not in remaining) for name, text in before)
    return GraphReport(role, tuple(decided), shown, after)


def _asked(
    graph: Graph, index: Index, rules: Sequence[Rule], disabled: set[str], decided: list[Decision]
) -> tuple[list[tuple[Rule, Proposal]], dict[tuple[str, str], Decision]]:
    """What every rule has to say of a graph."""
    proposals: list[tuple[tuple[int, int], Rule, Proposal]] = []
    refused: dict[tuple[str, str], Decision] = {}
    for miss in index.misses:
        decision = Decision(miss.kind, miss.node.name, "refused", f"not quite: {miss.reason}", where(miss.node))
        refused[miss.kind, miss.node.name] = decision
    differing = [found for found in index.found if found.differs]
    for rule in rules:
        if rule.name in disabled:
            continue
        try:
            said = [_with_differences(each, differing) for each in rule.propose(graph, index)]
            ranked = [(each.saved, each) for each in said if isinstance(each, Proposal)]
        except Exception as error:  # whatever it is, the graph is as good as before
            decided.append(_failed(rule, graph, error))
            disabled.add(rule.name)
            continue
        for each in said:
            if isinstance(each, Refusal):
                refused[rule.name, each.node.name] = _refused(rule, each.node, each.reason)
        proposals += ((saved, rule, each) for saved, each in ranked)
    proposals.sort(key=lambda ranked: ranked[0], reverse=True)
    return [(rule, proposal) for _, rule, proposal in proposals], refused


def _with_differences(said: Proposal | Refusal, differing: Sequence[Found]) -> Proposal | Refusal:
    """A proposal that also names how the options of what it replaces are not quite what the graph has."""
    if isinstance(said, Refusal):
        return said
    names = {name: None for found in differing if found.nodes & said.claims for name in found.differs}
    return replace(said, differences=tuple({**dict.fromkeys(said.differences), **names})) if names else said


def _apply(
    graph: Graph,
    proposals: list[tuple[Rule, Proposal]],
    policy: Policy,
    disabled: set[str],
    decided: list[Decision],
    refused: dict[tuple[str, str], Decision],
) -> bool:
    """Make the best of the proposals; whether another round may make more."""
    taken: dict[Node, str] = {}
    changes = Changes()
    regions, order = _regions(graph), Order(graph)
    served: dict[str, str] = {}
    waits = False
    for rule, proposal in proposals:
        key, start = (rule.name, proposal.node.name), proposal.node
        if rule.name in disabled:
            refused[key] = _refused(rule, start, "its rule has failed elsewhere in this graph")
            continue
        rival = next((taken[node] for node in proposal.claims if node in taken), None)
        if rival is not None:
            waits |= not proposal.claims <= taken.keys()  # something of it is left
            refused[key] = _refused(rule, start, f"{rival}{_RIVAL}")
            continue
        try:
            why = _not_allowed(rule, proposal, policy, regions) or unserved(proposal, served)
            outcome = _refused(rule, start, why) if why else _make(graph, rule, proposal, policy, changes, order)
        except TilewrightError as error:  # of the new operation's own check; what was added is dead
            refused[key] = _refused(rule, start, f"the new operation refuses the call: {error}")
            continue
        except Exception as error:  # likewise
            decided.append(_failed(rule, graph, error, start))
            disabled.add(rule.name)
            continue
        if outcome.action == "fused":
            decided.append(outcome)
            refused.pop(key, None)
            taken |= dict.fromkeys(proposal.claims, rule.name)
        else:
            refused[key] = outcome
    finish(graph)
    return waits


def _regions(graph: Graph) -> dict[Node, int]:
    """How many nodes up to each may have written to memory that they were given."""
    regions, written = {}, 0
    for node in graph.nodes:
        written += writes(node)
        regions[node] = written
    return regions


def _not_allowed(rule: Rule, proposal: Proposal, policy: Policy, regions: Mapping[Node, int]) -> str:
    """Why a proposal may not be made; empty if it may."""
    if len({regions[node] for node in proposal.claims}) > 1:
        return "something is written in place between the operations"
    if proposal.differences and not policy.relaxed:
        return f"differs in {', '.join(proposal.differences)}, which numerics='relaxed' would allow"
    least, most = rule.pays
    low, high = rows_of(proposal.node)
    if least is not None and low < least:
        return f"pays from {least} rows on, and this graph serves {low}"
    if most is not None and high > most:
        return f"pays up to {most} rows, and this graph serves {high:g}"
    return ""


def _make(graph: Graph, rule: Rule, proposal: Proposal, policy: Policy, changes: Changes, order: Order) -> Decision:
    """Put the new operation in, unless its results are not quite what is there now."""
    first = min(proposal.claims, key=lambda node: node._sort_key)
    editor = Editor(graph, proposal.node, first, changes)
    try:
        built = proposal.build(editor)
    except CannotBuild as error:
        return _refused(rule, proposal.node, str(error))
    if built.keys() != set(proposal.replaces):
        raise ValueError(
            f"{rule.name} was to build {sorted(map(str, proposal.replaces))}, got {sorted(map(str, built))}"
        )
    added = tuple(node.name for node in editor.added)
    why = next(filter(None, (_unlike(old, new) for old, new in built.items())), "")
    if not why and any(order.depends(new, built) for new in built.values()):
        why = "another fusion has made an input of it depend on its results"
    verified = None
    if not why and policy.verify:
        from tilewright.fusion.verify import disagreement

        why = disagreement(graph, built, differs=bool(proposal.differences))
        verified = not why
    if why:
        return _refused(rule, proposal.node, why)
    replaced = tuple(sorted({node.name for node in proposal.claims}))
    source = where(proposal.node)
    changes.moved |= _exchange(editor, built)
    order.replaced(proposal.claims, editor.added)
    if policy.verify:  # which runs nodes in their order
        in_order(graph)
    return Decision(
        rule.name, proposal.node.name, "fused", proposal.done, source, replaced, added,
        proposal.kernels, proposal.bytes_moved, proposal.differences, verified,
    )  # fmt: skip


def _exchange(editor: Editor, built: Mapping[Node, Node]) -> dict[Node, Node]:
    """Give every user the new nodes; by the old ones. Results that a caller gets as two tensors stay two."""
    handed_out: set[Node] = set()
    exchanged: dict[Node, Node] = {}
    for old, new in built.items():
        given = new
        if _is_handed_out(old):
            memory = new.args[0] if is_call(new, aten.reshape.default) else new
            assert isinstance(memory, Node)
            if memory in handed_out:
                given = editor.call(aten.clone.default, new)
            handed_out.add(memory)
        old.replace_all_uses_with(given)
        exchanged[old] = given
    return exchanged


def _is_handed_out(node: Node) -> bool:
    """Whether a caller gets a node or a part of its memory."""
    return any(user.op == "output" or (_shows(user) and _is_handed_out(user)) for user in node.users)


def _shows(node: Node) -> bool:
    """Whether what a call gives may lie in memory that it was given."""
    if not isinstance(node.target, OpOverload):
        return is_call(node, operator.getitem)
    returned = node.target._schema.returns
    return is_call(node, aten.reshape.default) or any(each.alias_info is not None for each in returned)


def _unlike(old: Node, new: Node) -> str:
    """How what a new node holds is unlike what an old one does; empty if it is not."""
    was, is_now = value(old), value(new)
    for what in ("dtype", "device"):
        if getattr(was, what) != getattr(is_now, what):
            return f"{old.name} is {getattr(was, what)} now and would be {getattr(is_now, what)}"
    if not same_shape(was.shape, is_now.shape):
        return f"{old.name} has shape {tuple(was.shape)} now and would have {tuple(is_now.shape)}"
    for size, a, b in zip(was.shape, was.stride(), is_now.stride(), strict=True):
        if not same_size(size, 1) and not same_size(a, b):
            return f"{old.name} has strides {was.stride()} now and would have {is_now.stride()}"
    return ""


def _refused(rule: Rule, node: Node, reason: str) -> Decision:
    return Decision(rule.name, node.name, "refused", reason, where(node))


def _failed(rule: Rule, graph: Graph, error: Exception, node: Node | None = None) -> Decision:
    at = node or next(iter(graph.nodes))
    reason = f"{type(error).__name__}: {error}; the rule is not used in this graph"
    return Decision(rule.name, at.name, "failed", reason, where(at) if node else "")


def _lines(graph: Graph, texts: dict[Node, tuple[object, object, str]]) -> list[tuple[str, str]]:
    """The nodes of a graph, each by its name and as text.

    Args:
        graph: which.
        texts: those of nodes so far, with the arguments that they had.
    """
    for node in graph.nodes:
        args, kwargs, _ = texts.get(node, (None, None, ""))
        if args is not node.args or kwargs is not node.kwargs:
            texts[node] = node.args, node.kwargs, _text(node)
    return [(node.name, texts[node][2]) for node in graph.nodes]


def _text(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        shown = node.op if node.op == "placeholder" else f"output {node.args[0]}"
    else:
        arguments = [*map(str, node.args), *(f"{name}={given}" for name, given in node.kwargs.items())]
        name = getattr(node.target, "__name__", node.target) if callable(node.target) else node.target
        target = str(node.target) if isinstance(node.target, OpOverload) else name
        shown = f"{target}({', '.join(arguments)})"
    return f"{shown}{''.join(_shapes(node))}"


def _shapes(node: Node) -> Iterator[str]:
    held = value(node)
    if hasattr(held, "shape"):
        sizes = ", ".join(str(size) if isinstance(size, int) else f"{size}={hint(size)}" for size in held.shape)
        yield f"  {str(held.dtype).removeprefix('torch.')}[{sizes}]"
