"""Telling graph fusion what vLLM's operators mean, and a pass of the kind that vLLM takes."""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import import_module, metadata
from threading import Lock
from typing import TYPE_CHECKING, Any

from tilewright.errors import MissingDependencyError
from tilewright.fusion import FusionReport, add_adapter, options
from tilewright.fusion.recognise import identity
from tilewright.integrations.vllm_fusion.operators import recognise

if TYPE_CHECKING:
    from tilewright.fusion.api import Numerics
    from tilewright.fusion.graph_pass import FusionPass

_PASSES = ("vllm.compilation.passes.inductor_pass", "vllm.compilation.inductor_pass")
"""Where vLLM has had its ``InductorPass``, the latest place first."""

_REGISTERING = Lock()


def register() -> None:
    """See :func:`tilewright.integrations.vllm.register_fusion`."""
    with _REGISTERING:
        if ("vllm", _installed()) not in identity():
            add_adapter("vllm", recognise, version=_installed())


def _installed() -> str:
    """Whose operators a graph can have: what they do may change with it, and so may compiled code."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "not installed"


def fusion_pass(*, verify: bool = False, numerics: Numerics = "strict") -> Any:
    """See :func:`tilewright.integrations.vllm.fusion_pass`."""
    from tilewright.fusion.fuse import Policy
    from tilewright.fusion.store import Store

    options(verify=verify, numerics=numerics)  # which checks them
    kind = _pass_class()
    register()
    return kind(FusionReport(), Policy(numerics == "relaxed", verify), None, Store())


@lru_cache(maxsize=1)
def _pass_class() -> Any:
    """The library's pass as one of vLLM's.

    Raises:
        MissingDependencyError: vLLM is not installed, or has no such class where it is known to have been.
    """
    from tilewright.fusion.graph_pass import FusionPass

    reasons = []
    for name in _PASSES:
        try:
            base = import_module(name).InductorPass
        except (ImportError, AttributeError) as error:
            reasons.append(f"{name}: {error}")
            continue
        return type("VllmFusionPass", (FusionPass, base), {"__reduce__": _reduced, "__deepcopy__": _itself})
    raise MissingDependencyError(
        f"fusion_pass needs vLLM's InductorPass, which cannot be imported: {'; '.join(reasons)}"
    )


def _reduced(self: FusionPass) -> tuple[Any, ...]:
    """In another process the pass is made anew there, and its operators registered."""
    numerics: Numerics = "relaxed" if self.policy.relaxed else "strict"
    return partial(fusion_pass, verify=self.policy.verify, numerics=numerics), ()


def _itself(self: FusionPass, memo: Any) -> FusionPass:
    """A copied configuration has the same pass, with the same report."""
    return self
