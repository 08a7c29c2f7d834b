"""The custom pass that Inductor runs over its graphs, with the identity that its cache asks for."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from tilewright.errors import ArgumentError
from tilewright.fusion.fuse import Policy, fuse
from tilewright.fusion.recognise import identity
from tilewright.fusion.roomy import roomy
from tilewright.fusion.rules import RULES
from tilewright.ops import register
from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.fx import Graph

    from tilewright.fusion.report import FusionReport, GraphReport, Role
    from tilewright.fusion.rule import Rule
    from tilewright.fusion.store import Store


SLOT = "post_grad_custom_post_pass"
"""The option of Inductor's that takes the pass."""


class FusionPass(CustomGraphPass):
    """Fuses graphs and adds what it decides to a report.

    Args:
        report: where decisions go.
        policy: what may be done.
        rules: by default all that the library has.
        store: where each graph's decisions are kept as soon as they are made; None if somebody else does that.
        then: the passes of others that run over each graph afterwards.
    """

    def __init__(
        self,
        report: FusionReport,
        policy: Policy,
        rules: Sequence[Rule] | None = None,
        store: Store | None = None,
        then: Sequence[Any] = (),
    ) -> None:
        register()  # the operators that rules put in
        self.report, self.policy, self._store = report, policy, store
        self.rules = tuple(RULES if rules is None else rules)
        self.then = tuple(then)
        self.salt = ""
        """What else compiled code is to depend on: the graph's own key, so that a hit is one of this graph."""
        self.was_asked = False
        """Whether Inductor has asked who this is: something was compiled, or found compiled."""
        self.made: list[GraphReport] = []
        """The reports of graphs since somebody last took them away: what a compilation has added."""

    def __call__(self, graph: Graph) -> None:
        """Fuse one graph in place, and run the passes of others over it."""
        role = role_of(graph)
        start = time.perf_counter()
        with _uncollected():
            done = roomy(fuse, graph, self.rules, self.policy, role)
        done = replace(done, seconds=time.perf_counter() - start)
        self.report.graphs.append(done)
        self.made.append(done)
        if self._store is not None and (identity := self.identity()) is not None:
            text = "\n".join(f"{line.name} {line.text}" for line in done.before)
            keep(self._store, identity, hashlib.sha256(text.encode()).hexdigest(), [done], self.report)
        for other in self.then:
            if _wants_to_know(other):
                other(graph, is_inference=role == "inference")
            else:
                other(graph)

    def uuid(self) -> str | None:
        """What Inductor's cache asks for: :meth:`identity`, and :attr:`salt`."""
        self.was_asked = True
        identity = self.identity()
        return identity and hashlib.sha256((identity + self.salt).encode()).hexdigest()

    def identity(self) -> str | None:
        """What compiled code depends on besides the graph: a digest, equal in every process.

        None, with which Inductor caches nothing, if there is a rule that is not the library's and has no ``version``,
        or somebody else's pass that has no ``uuid``.
        """
        rules = [_identity(rule) for rule in self.rules]
        others = [_identity_of_pass(other) for other in self.then]
        if None in rules or None in others:
            return None
        parts: dict[str, Any] = {
            "library": _source_digest(),
            "torch": torch.__version__,
            "triton": _triton_version(),
            "devices": _devices(),
            "policy": [self.policy.relaxed, self.policy.verify],
            "rules": rules,
            "adapters": identity(),
            "then": others,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: a full one beside a large model's graph takes half as long as all of its fusions."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def passes(given: Any) -> tuple[Any, ...]:
    """Those that the option holds, but for the library's own: none, one, or several.

    Raises:
        ArgumentError: one of them cannot be called.
    """
    several = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
    for each in several:
        if not callable(each):
            raise ArgumentError("compile", SLOT, f"got {each!r}; expected a pass, a list of passes, or None")
    return tuple(each for each in several if not isinstance(each, FusionPass))


def configured() -> tuple[Any, ...]:
    """Those that Inductor's configuration has now."""
    from torch._inductor import config

    return passes(config.post_grad_custom_post_pass)


def _wants_to_know(other: Any) -> bool:
    from torch._inductor import custom_graph_pass

    kind = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)  # not in every version
    return kind is not None and isinstance(other, kind)


def _identity_of_pass(other: Any) -> str | None:
    """What tells somebody else's pass from others; None if nothing does."""
    uuid = other.uuid() if isinstance(other, CustomGraphPass) else None
    return hashlib.sha256(pickle.dumps(uuid)).hexdigest() if uuid else None


def keep(store: Store, identity: str, key: str, made: Sequence[GraphReport], report: FusionReport) -> None:
    """Keep decisions for later runs; what hinders it becomes a note."""
    try:
        store.keep(identity, key, made)
    except OSError as error:
        report.notes.append(f"the decisions of a graph could not be kept for later runs: {error}")


def _identity(rule: Rule) -> list[Any] | None:
    """What tells a rule from others; None if nothing does."""
    version = "" if rule in RULES else getattr(rule, "version", None)
    if version is None:
        return None
    return [type(rule).__module__, type(rule).__qualname__, rule.name, rule.replacement, list(rule.pays), str(version)]


def role_of(graph: Graph) -> Role:
    """Which graph of a compilation this is, by the names that autograd gives inputs."""
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    if any(name.startswith("tangents") for name in names):
        return "backward"
    if any(name.startswith("primals") for name in names):
        return "forward"
    return "inference"


@lru_cache(maxsize=1)
def _source_digest() -> str:
    """Of the whole library's source, kernels included: what a rule puts in is a part of the code as the rule is."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _triton_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> list[str]:
    """Which kernels can be chosen: facts about the CPU and about each GPU."""
    found = [repr(facts(torch.device("cpu")))]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        places = [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
        found += [repr(facts(place)) for place in places]
    return found
