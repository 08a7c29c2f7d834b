"""Inductor as a back end of ``torch.compile``, with the fusion pass in it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from tilewright.fusion.graph_pass import SLOT, FusionPass, configured, keep, passes
from tilewright.fusion.roomy import roomy
from tilewright.fusion.store import Store, graph_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from tilewright.fusion.report import FusionReport


_LIVING: WeakValueDictionary[int, Backend] = WeakValueDictionary()
INSIDE = "called inside another compiled function: what was decided there is in that one's report"
"""The note of a compiled function that became a part of another one's graphs."""


class Backend:
    """Inductor with the pass in it, which also keeps and recalls what was decided for each graph of Dynamo's.

    Passes of others for the same place run after it: those that the options name, otherwise those that Inductor's
    configuration has when a graph is compiled.

    Args:
        passed: the pass.
        config: Inductor's other options.
        function: what is compiled.
    """

    def __init__(self, passed: FusionPass, config: Mapping[str, Any], function: Any) -> None:
        self._pass, self._config, self._store = passed, dict(config), Store()
        self._has_others = SLOT in self._config
        passed.then = passes(self._config.pop(SLOT)) if self._has_others else configured()
        self._identity = passed.identity()  # once: Dynamo compares backends when it looks for code, at every call
        self.__name__ = "tilewright"
        code = getattr(function, "__code__", None)
        self._subject = str(id(function)) if isinstance(function, torch.nn.Module) else code
        _LIVING[id(self)] = self

    def __eq__(self, other: object) -> bool:
        """Dynamo serves a call by code that an equal backend has compiled, as for the layers of one class."""
        if not isinstance(other, Backend):
            return NotImplemented
        mine, its = self._identity, other._identity
        return self is other or (mine is not None and mine == its and self._config == other._config)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Compile one graph of Dynamo's."""
        from torch._inductor.compile_fx import compile_fx

        self._tell_those_inside(module)
        if not self._has_others:
            self._pass.then = configured()
        key = graph_key(module, example_inputs)
        identity = self._pass.identity()
        self._pass.made.clear()
        self._pass.salt = key
        patches = self._config | {SLOT: self._pass}
        with _eager_backward():
            compiled: Any = roomy(compile_fx, module, example_inputs, config_patches=patches)
        made, self._pass.made = self._pass.made, []
        report = self._pass.report
        if identity is not None:
            if made:
                keep(self._store, identity, key, made, report)
            else:
                report.graphs += self._recalled(identity, key)
        return compiled

    @staticmethod
    def reports() -> list[FusionReport]:
        """Those of every compiled function that is there."""
        return [each._pass.report for each in list(_LIVING.values())]

    def _tell_those_inside(self, module: torch.fx.GraphModule) -> None:
        """Note in the reports of compiled functions that Dynamo traced as parts of this one."""
        from torch._guards import TracingContext

        stacks = (node.meta.get("nn_module_stack") or () for node in module.graph.nodes)
        inside = {str(key).partition("@")[0] for stack in stacks for key in stack}  # the modules' ids
        codes = (TracingContext.get_traced_code() or ())[1:]  # the first is that of the whole
        for each in list(_LIVING.values()):
            subject, report = each._subject, each._pass.report
            is_inside = subject in inside if isinstance(subject, str) else any(code is subject for code in codes)
            if is_inside and each is not self and INSIDE not in report.notes:
                report.notes.append(INSIDE)

    def _recalled(self, identity: str, key: str) -> tuple[Any, ...]:
        kept = self._store.recall(identity, key)
        if kept is None:
            self._pass.report.notes.append(
                "a graph came out of Inductor's cache, and what was decided when it was compiled was not kept"
            )
        return kept or ()


def _eager_backward() -> AbstractContextManager[Any]:
    """Have a training graph's backward compiled with its forward, so that what is decided in it is kept with it."""
    from torch._functorch import config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        patched: AbstractContextManager[Any] = config.patch(force_non_lazy_backward_lowering=True)
        return patched
    return nullcontext()


def inductor_options(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of Inductor out of those of ``torch.compile``, as its own wrapper reads them."""
    from torch import _TorchCompileInductorWrapper

    mode, chosen = given.pop("mode", None), dict(given.pop("options", None) or {})
    named = {name.replace("-", "_"): name for name in chosen}  # as the wrapper spells them
    others = {SLOT: chosen.pop(named[SLOT])} if SLOT in named else {}
    wrapper = _TorchCompileInductorWrapper(mode, chosen, given.get("dynamic"))  # type: ignore[no-untyped-call]
    given.pop("backend", None)
    config: dict[str, Any] = dict(wrapper.config)
    return config | others  # several passes are not a type that every version of the wrapper knows
