"""The public functions of graph fusion."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from tilewright.errors import ArgumentError, FusionError
from tilewright.fusion.report import FusionReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tilewright.fusion.rule import Rule

Numerics = Literal["strict", "relaxed"]
Unmet = Literal["warn", "raise"]


class FusionWarning(UserWarning):
    """A fusion that was expected did not happen, or nothing was fused at all."""


def compile(
    function: Any,
    *,
    fusion: bool = True,
    expect: Mapping[str, int] | None = None,
    unmet: Unmet = "warn",
    verify: bool = False,
    numerics: Numerics = "strict",
    rules: Sequence[Rule] | None = None,
    **torch_compile_options: Any,
) -> Any:
    """``torch.compile`` with the library's fusions, and a report of what they did.

    Every graph that Inductor compiles is searched for operations, the library's own and plain PyTorch's, that one
    kernel can do together; where the rules of :mod:`tilewright.fusion` allow it, that kernel takes their place.

    Args:
        function: a module or a function.
        fusion: False: compile without any fusion.
        expect: how many times each rule is to fuse in the first call's graphs, such as
            ``{"rms_norm_quant": 2 * n_layers}``.
        unmet: what happens where it does not: ``"warn"`` or ``"raise"``, either way with the reasons.
        verify: run each replacement beside what it replaces, on random tensors of the graph's shapes, while compiling;
            refuse it if they disagree.
        numerics: ``"strict"``: a replacement rounds where what it replaces rounds; ``"relaxed"``: named differences are
            allowed, and recorded.
        rules: instead of all that the library has.
        **torch_compile_options: of ``torch.compile``; ``backend`` must be ``"inductor"``. A pass of yours in
            ``options["post_grad_custom_post_pass"]``, or else in ``torch._inductor.config``, runs after the fusions.

    Returns:
        What ``torch.compile`` returns, with one more attribute, ``fusion_report``: a
        :class:`tilewright.fusion.FusionReport` that grows with each compilation. A copy of a compiled module, and one
        that was pickled, has a copy of the report, which grows by itself.

    Raises:
        ArgumentError: an option that is not known, or a backend that has no fusion.
        FusionError: from the first call, where an expectation is not met and ``unmet="raise"``.

    Example:
        >>> import torch, tilewright
        >>> def layer(x, weight):
        ...     return tuple(tilewright.quant_fp8(tilewright.rms_norm(x, weight)))
        >>> compiled = tilewright.compile(layer)
        >>> values, scales = compiled(torch.randn(4, 256, dtype=torch.bfloat16), torch.ones(256, dtype=torch.bfloat16))
        >>> compiled.fusion_report.counts
        {'rms_norm_quant': 1}
    """
    _check(expect, unmet, numerics, torch_compile_options, rules)
    settings = _Settings(fusion, verify, numerics, rules, torch_compile_options)
    return _compiled(function, settings, _Judge(FusionReport(), expect, unmet))


@dataclass(frozen=True)
class _Settings:
    """The arguments of :func:`compile` that its judge does not have."""

    fusion: bool
    verify: bool
    numerics: Numerics
    rules: Sequence[Rule] | None
    torch_compile_options: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        """The same: a rule is the library's own by what it is, not by what it is like."""
        return self


def _compiled(function: Any, settings: _Settings, judge: _Judge) -> Any:
    given = dict(settings.torch_compile_options)
    if settings.fusion:
        from tilewright.fusion.backend import Backend, inductor_options
        from tilewright.fusion.fuse import Policy
        from tilewright.fusion.graph_pass import FusionPass

        passed = FusionPass(judge.report, Policy(settings.numerics == "relaxed", settings.verify), settings.rules)
        backend = Backend(passed, inductor_options(given), function)
        compiled = torch.compile(function, backend=backend, **given)
        if isinstance(compiled, torch.nn.Module):
            compiled.__dict__["forward"] = judge.after(compiled.forward)
        else:
            compiled = judge.after(compiled)
    else:
        compiled = torch.compile(function, **given)
    own = compiled.__dict__  # a module's own way to set an attribute would give it to the original
    own["fusion_report"] = judge.report
    if isinstance(compiled, torch.nn.Module):
        made_of = _compiled, (function, settings, judge)
        own["__reduce__"] = lambda: made_of
        own["__reduce_ex__"] = lambda protocol: made_of
    return compiled


def options(
    *, verify: bool = False, numerics: Numerics = "strict", rules: Sequence[Rule] | None = None, then: Any = ...
) -> dict[str, Any]:
    """The library's fusions as ``options=`` of ``torch.compile``, for those who call that themselves.

    The report is ``tilewright.fusion.report_of(options)``. Where Inductor's own cache serves a graph the pass does not
    run, and only what was kept under the same identity can be told, of all graphs together.

    Args:
        verify: as in :func:`tilewright.compile`.
        numerics: as in :func:`tilewright.compile`.
        rules: as in :func:`tilewright.compile`.
        then: a pass of yours for the same place of Inductor's, ``post_grad_custom_post_pass``, or several, which run
            after the fusions; by default what ``torch._inductor.config`` has there now; None for none.

    Raises:
        ArgumentError: an option that is not known.

    Example:
        >>> import torch, tilewright.fusion
        >>> options = tilewright.fusion.options()
        >>> compiled = torch.compile(torch.nn.RMSNorm(64), options=options)
        >>> tilewright.fusion.report_of(options).counts
        {}
    """
    _check(None, "warn", numerics, {}, rules)
    from tilewright.fusion.fuse import Policy
    from tilewright.fusion.graph_pass import SLOT, FusionPass, configured, passes
    from tilewright.fusion.store import Store

    others = configured() if then is ... else passes(then)
    return {SLOT: FusionPass(FusionReport(), Policy(numerics == "relaxed", verify), rules, Store(), others)}


def report_of(given: Mapping[str, Any]) -> FusionReport:
    """The report of :func:`options`: what their pass has decided, or what earlier runs kept of the same identity.

    Args:
        given: what :func:`options` returned.
    """
    from tilewright.fusion.graph_pass import SLOT, FusionPass
    from tilewright.fusion.store import Store

    passed = given.get(SLOT)
    if not isinstance(passed, FusionPass):
        raise ArgumentError("report_of", "given", "has no pass of tilewright.fusion.options in it")
    identity = passed.identity()
    if not passed.report.graphs and passed.was_asked and identity is not None:
        return FusionReport(list(Store().everything(identity)))
    return passed.report


class _Judge:
    """Compares what the first call's graphs have fused with what was expected.

    Args:
        report: that of the compilation.
        expect: of :func:`compile`.
        unmet: of :func:`compile`.
    """

    def __init__(self, report: FusionReport, expect: Mapping[str, int] | None, unmet: Unmet) -> None:
        self.report, self._expect, self._unmet, self._is_done = report, expect, unmet, False

    def after(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, judged after its first call."""

        @functools.wraps(call)
        def judged(*args: Any, **kwargs: Any) -> Any:
            if self._is_done:
                return call(*args, **kwargs)
            before = _elsewhere(self.report)
            result = call(*args, **kwargs)
            if not self._is_done:
                self._is_done = True
                self._judge(_elsewhere(self.report) - before)
            return result

        return judged

    def _judge(self, elsewhere: int) -> None:
        """Judge the first call.

        Args:
            elsewhere: how many graphs other compiled functions have compiled in it.
        """
        counts = self.report.counts
        if elsewhere:
            self.report.notes.append(
                "compiled functions inside this one, behind a break of its graph, have compiled more: see their reports"
            )
        if not self.report.graphs:
            self.report.notes.append("nothing was compiled: code served that an equal compilation had left, or none")
            return
        if self._expect is None:
            if not counts and not elsewhere:
                warnings.warn(f"nothing was fused\n{self.report}", FusionWarning, stacklevel=3)
            return
        wrong = [
            f"{name} was expected to fuse {number} times and did {counts.get(name, 0)} times"
            for name, number in self._expect.items()
            if counts.get(name, 0) != number
        ]
        if wrong:
            text = f"{'; '.join(wrong)}\n{self.report}"
            if self._unmet == "raise":
                raise FusionError(text)
            warnings.warn(text, FusionWarning, stacklevel=3)


def _elsewhere(report: FusionReport) -> int:
    """How many graphs are in the reports of other compiled functions."""
    from tilewright.fusion.backend import Backend

    return sum(len(each.graphs) for each in Backend.reports() if each is not report)


def _check(expect: Any, unmet: Any, numerics: Any, given: Mapping[str, Any], rules: Sequence[Rule] | None) -> None:
    from tilewright.fusion.graph_pass import FusionPass
    from tilewright.fusion.rules import RULES

    names = {rule.name for rule in (RULES if rules is None else rules)}
    for name in expect or ():
        if name not in names:
            raise ArgumentError(
                "compile", "expect", f"no rule is called '{name}'; there are: {', '.join(sorted(names))}"
            )
    if unmet not in ("warn", "raise"):
        raise ArgumentError("compile", "unmet", f"got {unmet!r}; expected 'warn' or 'raise'")
    if numerics not in ("strict", "relaxed"):
        raise ArgumentError("compile", "numerics", f"got {numerics!r}; expected 'strict' or 'relaxed'")
    if given.get("backend", "inductor") != "inductor":
        raise ArgumentError("compile", "backend", f"got {given['backend']!r}; only 'inductor' runs custom passes")
    if given.get("mode") is not None and given.get("options") is not None:
        raise ArgumentError("compile", "mode", "torch.compile takes either mode or options")
    if any(isinstance(each, FusionPass) for each in (given.get("options") or {}).values()):
        raise ArgumentError(
            "compile", "options", "tilewright.fusion.options() are for torch.compile; this function fuses by itself"
        )
