"""The demo's report: one HTML file that needs no network and no script."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.errors import ArgumentError
from tilewright.files import replace_text
from tilewright.models import figures
from tilewright.models.result import TABLE_HEADS, table_rows
from tilewright.optional import require

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tilewright.models.result import Comparison, DemoResult

_ALL_THREE = "The loss of all three trainings, step by step."


def check_output(output: str | Path) -> Path:
    """The path, if a report can be written there.

    Raises:
        ArgumentError: its folder does not exist or cannot be written to, or it is a folder itself.
    """
    path = Path(output)
    if path.is_dir():
        raise ArgumentError("demo", "output", f"'{path}' is a folder; name a file, such as '{path / 'report.html'}'")
    if not path.parent.is_dir():
        raise ArgumentError("demo", "output", f"the folder '{path.parent}' does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError("demo", "output", f"the folder '{path.parent}' cannot be written to; choose another one")
    return path


def write(result: DemoResult, output: str | Path) -> Path:
    """Write the report. A reader of the path sees the old file or the whole new one, never a part.

    Args:
        result: what the demo found out.
        output: where to; an existing file is replaced.

    Raises:
        ArgumentError: nothing can be written there.
        MissingDependencyError: matplotlib is missing.
    """
    path = check_output(output)
    require("matplotlib", "the report of tilewright demo")
    page = render(result)
    replace_text(path, page)
    return path


def render(result: DemoResult) -> str:
    """The report as HTML."""
    sections = (
        _header(result),
        _curves(result),
        _cost(result),
        _served(result),
        _hyper(result.hyper),
        _fp8(result),
        _samples(result),
        _settings(result),
    )
    return _PAGE.replace("@BODY@", "\n".join(sections))


def _header(result: DemoResult) -> str:
    verdicts = "\n".join(
        f'<p class="verdict {"good" if curves.agrees else "bad"}"><strong>{escape(curves.verdict)}</strong></p>'
        for curves in (result, result.hyper)
    )
    config = result.config
    return f"""<header>
<h1>tilewright demo</h1>
{verdicts}
<p>One decoder of {result.n_parameters:,} weights ({config.layers} layers, width {config.width}) learnt the same text
three times from the same weights: with plain PyTorch parts, with tilewright's parts, and in float64 as the truth.
Held against the truth, tilewright {escape(str(result.agreement))}.</p>
</header>"""


def _curves(result: DemoResult) -> str:
    policy = (
        "A curve may be off by twice the largest error that plain PyTorch has made up to that step, plus one rounding "
        f"of {result.plain.dtype} for each step so far, adding up as a random walk."
    )
    return f"""<section>
<h2>Learning</h2>
<div class="pair">
{_figure(figures.loss_curves(result), _ALL_THREE)}
{_figure(figures.errors(result), f"How far both are from the truth. {policy}")}
</div>
</section>"""


def _trainings(result: Comparison, caption: str) -> str:
    columns = list(range(len(TABLE_HEADS)))
    if all(training.peak_bytes is None for training in result.trainings):
        columns.remove(TABLE_HEADS._fields.index("peak_memory"))
    rows = [[row[column] for column in columns] for row in table_rows(result)]
    return _table(caption, [TABLE_HEADS[column] for column in columns], rows)


def _cost(result: DemoResult) -> str:
    return f"""<section>
<h2>Cost</h2>
<div class="pair">
{_figure(figures.step_times(result), "The median step: forward, backward and update.")}
{_figure(figures.throughputs(result), "Tokens learnt from in a second, at the median step; a token is a byte.")}
</div>
{_trainings(result, "The three trainings")}
</section>"""


def _served(result: DemoResult) -> str:
    rows = [
        (served.operation, training.name, served.implementation, served.reason)
        for training in (result.plain, result.tilewright, result.hyper.plain, result.hyper.tilewright)
        for served in training.served
    ]
    rows = list(dict.fromkeys(rows))  # with hyper-connections some parts are the same
    table = _table("Who computed what, and why", ("operation", "parts", "served by", "why"), rows)
    return f"<section>\n<h2>Implementations</h2>\n{table}\n</section>"


def _hyper(hyper: Comparison) -> str:
    return f"""<section>
<h2>Hyper-connections</h2>
<p>The same decoder with {hyper.config.hc_mult} residual streams, {hyper.n_parameters:,} weights, learnt the same text
for {hyper.steps} steps, again three times. A layer's input is a mix of the streams, its output goes back into all of
them, and the streams are mixed among themselves; every mix is computed from the streams. Held against the truth,
tilewright {escape(str(hyper.agreement))}.</p>
<div class="pair">
{_figure(figures.loss_curves(hyper, "hyper-loss"), _ALL_THREE)}
{_figure(figures.errors(hyper, "hyper-error"), "How far both are from the truth, by the policy above.")}
</div>
{_trainings(hyper, "The three trainings with hyper-connections")}
</section>"""


def _fp8(result: DemoResult) -> str:
    lines = "\n".join(f"<li>{escape(line)}</li>" for line in result.fp8_lines)
    return f"""<section>
<h2>FP8</h2>
<p>The decoder trained with {escape(result.tilewright.name)}, evaluated as an inference engine would run it: in every
linear layer of the blocks weight and input are FP8, and 128 neighbours along the input dimension share a scale. It was
not trained for that.</p>
<ul>
{lines}
</ul>
{_compiled(result)}{_npu(result)}</section>"""


def _compiled(result: DemoResult) -> str:
    if result.compiled is None:
        return ""
    return f"<p>{escape(result.compiled_line)}.</p>\n<pre>{escape(result.compiled.report)}</pre>\n"


def _npu(result: DemoResult) -> str:
    if result.npu is None:
        return ""
    return f"<p>{escape(result.npu_line)}.</p>\n<pre><b>{escape(result.prompt)}</b>{escape(result.npu.sample)}</pre>\n"


def _samples(result: DemoResult) -> str:
    boxes = "\n".join(
        f"<article><h3>With {escape(training.name)}</h3>"
        f"<pre><b>{escape(result.prompt)}</b>{escape(training.sample or '')}</pre></article>"
        for training in (result.plain, result.tilewright)
    )
    same = "The two are the same." if result.plain.sample == result.tilewright.sample else "The two differ."
    return f"""<section>
<h2>Samples</h2>
<p>What both decoders write behind the words in bold, drawn with the same seed. {same}</p>
<div class="pair">
{boxes}
</div>
</section>"""


def _settings(result: DemoResult) -> str:
    config = result.config
    facts = {
        "text": f"{result.corpus}, by bytes",
        "attention": f"{config.heads} query heads, {config.kv_heads} key and value heads, head_dim {config.head_dim}",
        "feed-forward": f"SwiGLU, width {config.ffn_width}",
        "context": f"{config.context} bytes, RoPE base {config.rope_base:g}",
        "training": f"{result.steps} steps of {result.tokens_per_step} bytes, AdamW, seed {result.seed}",
        "truth": f"{result.truth.dtype} on {result.truth.device}",
        **result.environment,
        "whole run": f"{result.seconds:.0f} s",
    }
    pairs = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<section>\n<h2>Settings and environment</h2>\n<dl>\n{pairs}\n</dl>\n</section>"


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>\n{drawing}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"""<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">
<table>
<caption>{escape(caption)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>tilewright demo</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c1f24; --soft: #5a616b; --line: #dcdfe4;
  --plain: #2f6fdb; --tilewright: #c8500a; --truth: #1c1f24; --good: #0b7a3e; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e6e8eb; --soft: #a2a9b4; --line: #363b44;
    --plain: #79a8ff; --tilewright: #ff9a57; --truth: #e6e8eb; --good: #5fd08f; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 48rem; }
.verdict { border-left: .35rem solid; padding: .6rem .9rem; background: var(--card); font-size: 1.1rem; }
.good { border-color: var(--good); } .good strong { color: var(--good); }
.bad { border-color: var(--bad); } .bad strong { color: var(--bad); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.pair > * { margin: 0; min-width: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg text { font-family: inherit !important; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: .88rem/1.5 ui-monospace, SFMono-Regular, Consolas, monospace; }
dl { margin: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem; }
dl div { display: flex; gap: .8rem; padding: .35rem 0; border-bottom: 1px solid var(--line); }
dt { flex: 0 0 7rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
@BODY@
</main>
</body>
</html>
"""
