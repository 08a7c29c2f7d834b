"""The page of a fusion report: complete, safe, the same for equal reports, and true to what was decided."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tilewright.fusion.html import page
from tilewright.fusion.report import Decision, FusionReport, GraphReport, Line

EVIL = "<script>alert('x')</script>&\"'"
VOID = {"meta", "br", "link"}

NORM = Decision(
    rule="rms_norm_quant",
    node="norm",
    action="fused",
    reason="one kernel for the norm and two quantisations",
    source="model.py:12: q = quant(norm(x))",
    replaced=("norm", "quant"),
    added=("fused",),
    kernels=(3, 1),
    bytes_moved=(5 * 2**20, 2 * 2**20),
    numerics=("unrounded norm",),
    verified=True,
)
ROPE = Decision("rope_qk", "rope", "fused", "one launch", kernels=(2, 1), bytes_moved=(3 * 1024, 1024), verified=False)
REFUSED = Decision("rms_norm_quant", "other", "refused", "the weight is fp32", kernels=(2, 2), bytes_moved=(7, 7))
FAILED = Decision("rope_qk", "rope_2", "failed", "KeyError: 'sin'")


def lines(*names, touched=()):
    return tuple(Line(name, f"call({name}_in)  bf16[2, 8]", name in touched) for name in names)


def sample():
    inference = GraphReport(
        "inference",
        (NORM, REFUSED),
        lines("x", "norm", "quant", "other", touched=("norm", "quant")),
        lines("x", "fused", "other", touched=("fused",)),
    )
    backward = GraphReport("backward", (ROPE, FAILED), lines("rope", "rope_2"), lines("rope_2"), cached=True)
    return FusionReport([inference, backward], ["the report could not be kept: no space"])


class Page(HTMLParser):
    """The elements of a page; it fails where they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.rows, self.lines = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
        elif tag == "li":
            self.lines.append((attributes.get("id"), attributes.get("class", ""), []))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "li" in self.open:
            self.lines[-1][2].append(data)

    def table(self, first_head):
        heads = [row for row in self.rows if "rule" in row]
        (start,) = (self.rows.index(row) for row in heads if row[0] == first_head)
        ends = [self.rows.index(row) for row in heads if self.rows.index(row) > start]
        rows = self.rows[start + 1 : min(ends, default=None)]
        return [dict(zip(self.rows[start], row, strict=True)) for row in rows]


def test_the_summary_sums_over_what_was_fused():
    assert Page(page(sample())).table("rule") == [
        {
            "rule": "rms_norm_quant",
            "fused": "1",
            "refused": "1",
            "failed": "0",
            "kernels": "3 → 1",
            "bytes": "5.00 MiB → 2.00 MiB",
        },
        {
            "rule": "rope_qk",
            "fused": "1",
            "refused": "0",
            "failed": "1",
            "kernels": "2 → 1",
            "bytes": "3.00 KiB → 1.00 KiB",
        },
        {
            "rule": "all",
            "fused": "2",
            "refused": "1",
            "failed": "1",
            "kernels": "5 → 2",
            "bytes": "5.00 MiB → 2.00 MiB",
        },
    ]


def test_the_table_of_decisions_has_every_one():
    norm, refused, rope, failed = Page(page(sample())).table("action")
    assert norm == {
        "action": "fused",
        "rule": "rms_norm_quant",
        "node": "norm- norm, quant+ fused",
        "reason": NORM.reason,
        "source line": NORM.source,
        "kernels": "3 → 1",
        "bytes": "5.00 MiB → 2.00 MiB",
        "numerics": "unrounded norm",
        "verified": "yes",
    }
    assert (refused["action"], refused["reason"], refused["bytes"]) == ("refused", "the weight is fp32", "7 B → 7 B")
    assert (refused["verified"], rope["verified"]) == ("not asked", "no")
    assert (failed["reason"], failed["kernels"], failed["bytes"]) == ("KeyError: 'sin'", "", "")


def test_each_graph_has_both_sides_with_the_touched_nodes_marked():
    shown = [(i, kind, "".join(text)) for i, kind, text in Page(page(sample())).lines if i]
    assert [(i, kind) for i, kind, _ in shown] == [
        ("g0-before-0", ""),
        ("g0-before-1", "touched gone"),
        ("g0-before-2", "touched gone"),
        ("g0-before-3", ""),
        ("g0-after-0", ""),
        ("g0-after-1", "touched new"),
        ("g0-after-2", ""),
        ("g1-before-0", ""),
        ("g1-before-1", ""),
        ("g1-after-0", ""),
    ]
    assert shown[5][2] == "1fused = call(fused_in)  bf16[2, 8]"
    text = page(sample())
    assert "before: 4 nodes, 2 removed" in text
    assert "after: 3 nodes, 1 added" in text
    assert "Graph 1 <small>(backward, from the cache, 2 candidates)" in text


def test_links_lead_from_decisions_to_nodes_and_back():
    parsed = Page(page(sample()))
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    row = re.search(r'<tr id="d0">.*?</tr>', page(sample()), re.S).group()
    assert re.findall(r'href="#([^"]+)"', row) == ["g0-before-1", "g0-before-1", "g0-before-2", "g0-after-1"]
    fused = re.search(r'<li id="g0-after-1".*?</li>', page(sample()), re.S).group()
    assert 'href="#d0"' in fused
    rope = re.search(r'<li id="g1-before-1".*?</li>', page(sample()), re.S).group()
    assert 'href="#d3"' in rope  # the fourth of all decisions, the second of its graph


def evil_report():
    decision = Decision(EVIL, EVIL, "fused", EVIL, EVIL, (EVIL,), (EVIL,), (2, 1), (2, 1), (EVIL,), True)
    graph = GraphReport(EVIL, (decision,), (Line(EVIL, EVIL, True),), (Line(EVIL, EVIL, True),))
    return FusionReport([graph], [EVIL])


def test_nothing_in_a_report_becomes_markup():
    text = page(evil_report())
    assert "<script" not in text
    parsed = Page(text)
    harmless = Page(page(sample()))
    assert set(parsed.tags) <= set(harmless.tags)
    (row,) = parsed.table("action")
    assert (row["rule"], row["reason"], row["source line"], row["numerics"]) == (EVIL, EVIL, EVIL, EVIL)
    assert ["".join(text) for _, _, text in parsed.lines] == [
        EVIL,
        f"0{EVIL} = {EVIL}",
        f"0{EVIL} = {EVIL}",
    ]  # with the note
    assert len(parsed.links) == 5  # the node, both sides of what it replaced, and a way back from each line
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)


@pytest.mark.parametrize("bad", ["\udc80", "\x00", "\x1b[2J", "\x85"])
def test_text_that_no_page_can_hold(bad, tmp_path):
    report = FusionReport([GraphReport("inference", (), (Line("x", f"a{bad}b"),))])
    path = report.save(tmp_path / "fusion.html")
    text = path.read_text(encoding="utf-8")
    assert "a\N{REPLACEMENT CHARACTER}" in text
    assert bad not in text


def test_a_page_needs_nothing_from_elsewhere():
    text = page(sample())
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|https?:|\son\w+=", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_equal_reports_give_equal_pages():
    assert page(sample()) == page(sample())
    other = sample()
    other.graphs[0] = replace(other.graphs[0], decisions=(NORM, replace(REFUSED, reason="another")))
    assert page(sample()) != page(other)


def test_an_empty_report_says_so():
    text = page(FusionReport())
    Page(text)
    assert "<strong>0 of 0 candidates</strong>" in text
    assert "No graph held anything that a rule is about." in text


def test_a_graph_without_text_says_so():
    text = page(FusionReport([GraphReport("forward", (NORM,))]))
    assert "The text of this graph was not kept." in text
    assert Page(text).links == []


def test_saving_writes_the_page(tmp_path):
    path = sample().save(tmp_path / "new" / "fusion.html")
    assert path.read_text(encoding="utf-8") == page(sample())
    assert [entry.name for entry in path.parent.iterdir()] == ["fusion.html"]
