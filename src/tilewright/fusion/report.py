"""What a fusion pass decided, for every candidate, and how it is told."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tilewright.files import replace_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Action = Literal["fused", "refused", "failed"]
Role = Literal["inference", "forward", "backward", "unknown"]


@dataclass(frozen=True)
class Decision:
    """What became of one candidate.

    Attributes:
        rule: the rule's name.
        node: the candidate's first node, such as the norm whose results are quantised.
        action: ``"fused"``; ``"refused"``; or ``"failed"``, where the rule raised an exception and was not used again
            in this graph.
        reason: what was done, or the first thing that was in the way.
        source: the line of the user's program, ``file:line: code``, where it is known.
        replaced: the nodes that are gone or that nobody needs any more.
        added: the nodes that were put in.
        kernels: launches before and after, as far as the rule knows.
        bytes_moved: bytes read and written before and after, symbolic sizes at their hints.
        numerics: the named differences that ``numerics="relaxed"`` allowed.
        verified: whether the replacement was run beside what it replaces and agreed; None if it was not asked for.
    """

    rule: str
    node: str
    action: Action
    reason: str
    source: str = ""
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    kernels: tuple[int, int] = (0, 0)
    bytes_moved: tuple[int, int] = (0, 0)
    numerics: tuple[str, ...] = ()
    verified: bool | None = None

    def __str__(self) -> str:
        parts = [f"{self.action:7} {self.rule} at {self.node}: {self.reason}"]
        if self.action == "fused":
            before, after = self.bytes_moved
            parts.append(f"{self.kernels[0]} -> {self.kernels[1]} kernels, {_readable(before)} -> {_readable(after)}")
        if self.numerics:
            parts.append("differs in " + ", ".join(self.numerics))
        if self.verified is not None:
            parts.append("verified" if self.verified else "not verified")
        if self.source:
            parts.append(self.source)
        return "\n          ".join(parts)


@dataclass(frozen=True)
class Line:
    """One node of a graph, to be shown.

    Attributes:
        name: of the node.
        text: its call, with the shape and dtype of its result.
        touched: whether a fusion removed or added it.
    """

    name: str
    text: str
    touched: bool = False


@dataclass(frozen=True)
class GraphReport:
    """What was decided in one graph.

    Attributes:
        role: an inference graph, or the forward or backward of a training one.
        decisions: in the order in which they were made.
        before: the graph before.
        after: the graph after.
        cached: whether the code came out of a cache, and this from the record that was kept with it.
        seconds: what deciding and changing took; of a cached one, when it was made.
    """

    role: Role
    decisions: tuple[Decision, ...]
    before: tuple[Line, ...] = ()
    after: tuple[Line, ...] = ()
    cached: bool = False
    seconds: float = field(default=0.0, compare=False)


@dataclass
class FusionReport:
    """Everything that a compiled function's fusion has decided so far, a graph for each compilation.

    Attributes:
        graphs: in the order of their compilations.
        notes: what concerns no candidate, such as a report that could not be kept.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Those of all graphs."""
        return tuple(decision for graph in self.graphs for decision in graph.decisions)

    @property
    def counts(self) -> dict[str, int]:
        """How many times each rule fused."""
        return dict(Counter(d.rule for d in self.decisions if d.action == "fused"))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        fused = sum(self.counts.values())
        asked = _plural(len(self.decisions), "candidate")
        yield f"fusion: {fused} of {asked} in {_plural(len(self.graphs), 'graph')}"
        for number, graph in enumerate(self.graphs):
            yield f"graph {number} ({graph.role}{', from the cache' if graph.cached else ''})"
            for decision in graph.decisions:
                yield f"  {decision}"
            if not graph.decisions:
                yield "  nothing that any rule is about"
        for note in self.notes:
            yield f"note: {note}"

    def to_json(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return {"format": 1, "counts": self.counts, "graphs": [asdict(g) for g in self.graphs], "notes": self.notes}

    def save(self, path: Path | str) -> Path:
        """Write the report: a page with the graphs side by side if the name ends in ``.html``, else JSON.

        The file is written aside and then renamed.
        """
        target = Path(path)
        if target.suffix == ".html":
            from tilewright.fusion.html import page

            text = page(self)
        else:
            text = json.dumps(self.to_json(), indent=1) + "\n"
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
        return target


def graph_report(data: Mapping[str, Any], *, cached: bool = False) -> GraphReport:
    """The report that ``dataclasses.asdict`` of one gave, through JSON or not."""
    decisions = tuple(map(_decision, data["decisions"]))
    before, after = (tuple(Line(**line) for line in data[side]) for side in ("before", "after"))
    return GraphReport(data["role"], decisions, before, after, cached or data["cached"], data["seconds"])


def _decision(data: Mapping[str, Any]) -> Decision:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    return Decision(**fields)


def _readable(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} B"


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
