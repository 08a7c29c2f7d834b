"""A fusion report as one page: what became of every candidate, and each graph before and after, side by side."""

from __future__ import annotations

import re
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tilewright.fusion.report import Decision, FusionReport, GraphReport, Line

_ACTIONS = ("fused", "refused", "failed")
_HEADS = ("action", "rule", "node", "reason", "source line", "kernels", "bytes", "numerics", "verified")
_TEXTS = ("node", "reason", "source line", "numerics")
_VERIFIED = {True: "yes", False: "no", None: "not asked"}


def page(report: FusionReport) -> str:
    """The report as HTML: complete in itself, without scripts. Equal reports give equal text."""
    ends = list(accumulate(len(graph.decisions) for graph in report.graphs))
    graphs = [_graph(i, graph, ends[i] - len(graph.decisions)) for i, graph in enumerate(report.graphs)]
    parts = [_summary(report), _notes(report.notes), _decisions(report), *graphs]
    return _PAGE.replace("@BODY@", "\n".join(part for part in parts if part))


class _Anchors(NamedTuple):
    """Where the nodes of a graph are on the page, by their names."""

    before: Mapping[str, str]
    after: Mapping[str, str]

    @classmethod
    def of(cls, number: int, graph: GraphReport) -> _Anchors:
        sides = (("before", graph.before), ("after", graph.after))
        return cls(*({line.name: _anchor(number, side, i) for i, line in enumerate(lines)} for side, lines in sides))


def _anchor(graph: int, side: str, line: int) -> str:
    return f"g{graph}-{side}-{line}"  # a node's name can be any text, a place in the graph cannot


def _summary(report: FusionReport) -> str:
    decisions = report.decisions
    fused = [decision for decision in decisions if decision.action == "fused"]
    rules = dict.fromkeys(decision.rule for decision in decisions)
    rows = [_summary_row(rule, [d for d in decisions if d.rule == rule]) for rule in rules]
    table = _table(
        "By rule; kernels and bytes are those of the fused candidates, before and after",
        ("rule", *_ACTIONS, "kernels", "bytes"),
        [*rows, _summary_row("all", decisions)] if len(rows) != 1 else rows,
    )
    cached = sum(graph.cached for graph in report.graphs)
    told = (
        f" The code of {_count(cached, 'graph')} came out of a cache, with the decisions kept beside it."
        if cached
        else ""
    )
    return f"""<header>
<h1>tilewright fusion</h1>
<p class="verdict"><strong>{len(fused)} of {_count(len(decisions), "candidate")}</strong> fused in
{_count(len(report.graphs), "graph")}: {_kernels(fused)} kernels, {_bytes(fused)}.{told}</p>
{table}
</header>"""


def _summary_row(name: str, decisions: Sequence[Decision]) -> list[str]:
    counts = [sum(decision.action == action for decision in decisions) for action in _ACTIONS]
    fused = [decision for decision in decisions if decision.action == "fused"]
    return [_text(name), *(f"{count}" for count in counts), _kernels(fused), _bytes(fused)]


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "\n".join(f"<li>{_text(note)}</li>" for note in notes)
    return f"<section>\n<h2>Notes</h2>\n<ul>\n{items}\n</ul>\n</section>"


def _decisions(report: FusionReport) -> str:
    rows = []
    for number, graph in enumerate(report.graphs):
        anchors = _Anchors.of(number, graph)
        rows += [_decision(decision, anchors) for decision in graph.decisions]
    if not rows:
        return "<section>\n<h2>Decisions</h2>\n<p>No graph held anything that a rule is about.</p>\n</section>"
    table = _table("Every candidate, in the order in which it was decided", _HEADS, rows, anchor="d")
    return f"<section>\n<h2>Decisions</h2>\n{table}\n</section>"


def _decision(decision: Decision, anchors: _Anchors) -> list[str]:
    where = anchors.before if decision.node in anchors.before else anchors.after
    nodes = [_link(decision.node, where)]
    for sign, names, side in (("-", decision.replaced, anchors.before), ("+", decision.added, anchors.after)):
        if names:
            nodes.append(f'<small class="{_SIGNS[sign]}">{sign} {", ".join(_link(n, side) for n in names)}</small>')
    told = decision.action == "fused" or any(decision.kernels) or any(decision.bytes_moved)
    return [
        f'<span class="action {_text(decision.action)}">{_text(decision.action)}</span>',
        _text(decision.rule),
        "".join(f"<div>{node}</div>" for node in nodes),
        _text(decision.reason),
        f"<code>{_text(decision.source)}</code>" if decision.source else "",
        _kernels([decision]) if told else "",
        _bytes([decision]) if told else "",
        _text(", ".join(decision.numerics)),
        _VERIFIED[decision.verified],
    ]


_SIGNS = {"-": "gone", "+": "new"}


def _link(name: str, anchors: Mapping[str, str]) -> str:
    text = f"<code>{_text(name)}</code>"
    return f'<a href="#{anchors[name]}">{text}</a>' if name in anchors else text


def _graph(number: int, graph: GraphReport, first: int) -> str:
    """One graph; ``first`` is the place of its first decision among all."""
    decided: dict[str, dict[str, int]] = {"before": {}, "after": {}}
    for place, decision in enumerate(graph.decisions, first):
        for side, names in (("before", (decision.node, *decision.replaced)), ("after", decision.added)):
            for name in names:
                decided[side].setdefault(name, place)
    cached = ", from the cache" if graph.cached else ""
    facts = f"{_text(graph.role)}{cached}, {_count(len(graph.decisions), 'candidate')}"
    panels = "\n".join(
        _panel(number, side, lines, decided[side]) for side, lines in (("before", graph.before), ("after", graph.after))
    )
    if not graph.before and not graph.after:
        panels = "<p>The text of this graph was not kept.</p>"
    return f"""<section>
<h2 id="g{number}">Graph {number} <small>({facts})</small></h2>
<div class="pair">
{panels}
</div>
</section>"""


def _panel(number: int, side: str, lines: Sequence[Line], decided: Mapping[str, int]) -> str:
    shown = "\n".join(_line(_anchor(number, side, i), i, line, side, decided) for i, line in enumerate(lines))
    touched = sum(line.touched for line in lines)
    doing = "removed" if side == "before" else "added"
    label = f"{side}: {_count(len(lines), 'node')}, {touched} {doing}"
    return f"""<article>
<h3>{label}</h3>
<div class="scroll graph" role="region" aria-label="graph {number} {label}" tabindex="0">
<ol>
{shown}
</ol>
</div>
</article>"""


def _line(anchor: str, place: int, line: Line, side: str, decided: Mapping[str, int]) -> str:
    kind = f' class="touched {"gone" if side == "before" else "new"}"' if line.touched else ""
    number = f'<a href="#d{decided[line.name]}" title="to the decision">{place}</a>' if line.name in decided else place
    text = f"<b>{_text(line.name)}</b> = {_text(line.text)}"
    return f'<li id="{anchor}"{kind}><span class="number">{number}</span><code>{text}</code></li>'


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], anchor: str = "") -> str:
    """A table whose cells are HTML already."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in heads)
    kinds = [' class="text"' if head in _TEXTS else "" for head in heads]
    cells = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    starts = [f'<tr id="{anchor}{i}">' if anchor else "<tr>" for i in range(len(cells))]
    body = "\n".join(f"{start}{row}</tr>" for start, row in zip(starts, cells, strict=True))
    return f"""<div class="scroll" role="region" aria-label="{_text(caption)}" tabindex="0">
<table>
<caption>{_text(caption)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def _text(text: str) -> str:
    """Any text as HTML; what no file or page can hold becomes a replacement character."""
    return escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text))


def _kernels(decisions: Iterable[Decision]) -> str:
    before, after = _sums(decision.kernels for decision in decisions)
    return f"{before} &rarr; {after}"


def _bytes(decisions: Iterable[Decision]) -> str:
    before, after = _sums(decision.bytes_moved for decision in decisions)
    return f"{_size(before)} &rarr; {_size(after)}"


def _sums(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    listed = list(pairs)
    return sum(before for before, _ in listed), sum(after for _, after in listed)


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>tilewright fusion report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c1f24; --soft: #5a616b; --line: #dcdfe4; --link: #1f5fc4;
  --gone: #fde3e0; --new: #dbf3e3; --good: #0b7a3e; --bad: #b3261e; --aim: #c8500a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e6e8eb; --soft: #a2a9b4; --line: #363b44; --link: #8ab4ff;
    --gone: #4d2724; --new: #1c4230; --good: #5fd08f; --bad: #ff8a80; --aim: #ff9a57;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 110rem; padding: 1.25rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h2 small { font-weight: 400; color: var(--soft); }
h3 { font-size: .95rem; font-weight: 500; margin: 0 0 .4rem; color: var(--soft); }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .15em; }
code, ol { font: .85rem/1.5 ui-monospace, SFMono-Regular, Consolas, monospace; }
.verdict { border-left: .35rem solid var(--good); padding: .6rem .9rem; background: var(--card); font-size: 1.1rem; }
.scroll { overflow: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem 1rem .45rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; max-width: 34rem; }
.action { font-weight: 600; color: var(--soft); }
.action.fused { color: var(--good); }
.action.failed { color: var(--bad); }
small.gone, small.new { padding: .05rem .3rem; border-radius: .2rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
@media (max-width: 50rem) { .pair { grid-template-columns: minmax(0, 1fr); } }
.graph { max-height: 75vh; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
ol { list-style: none; margin: 0; padding: .5rem 0; width: max-content; min-width: 100%; }
li[id] { white-space: pre; padding: 0 .75rem 0 0; }
li b { font-weight: 600; }
.number {
  display: inline-block; min-width: 3.5rem; padding-right: .75rem; text-align: right; color: var(--soft);
  user-select: none;
}
.gone { background: var(--gone); }
.new { background: var(--new); }
:target { outline: 2px solid var(--aim); outline-offset: -2px; }
</style>
</head>
<body>
<main>
@BODY@
</main>
</body>
</html>
"""
