"""What is recognised in a graph: an operation, whoever wrote it and in whatever form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

    from tilewright.fusion.expressions import Expressions


@dataclass(frozen=True, eq=False)
class Found:
    """An operation in a graph. Two of them are the same only if they are one object.

    Attributes:
        kind: what is computed, by the name of the public function that does it: ``"rms_norm"``, ``"add_rms_norm"``,
            ``"quant_fp8"``, ``"silu_mul"``, ``"rope"``, ``"mhc_pre"``, ``"mhc_post"``.
        source: where the form comes from: ``"tilewright"``, ``"aten"`` for plain PyTorch, or an adapter's name.
        inputs: the tensors by the public function's argument names; None where one is left out.
        options: the other arguments likewise, every one of them with its value.
        outputs: the nodes that hold results, by role; results that nobody uses are missing.
        nodes: every node that exists to compute this, outputs included.
        alone: the same without what it carries along, such as a rotation without the features that are not rotated;
            None if it carries nothing.
        differs: names of what the graph's own operator is known to do otherwise than ``options`` say; whatever takes
            its place has these differences, which ``numerics="relaxed"`` alone allows.
    """

    kind: str
    source: str
    inputs: Mapping[str, Node | None]
    options: Mapping[str, Any]
    outputs: Mapping[str, Node]
    nodes: frozenset[Node]
    alone: Found | None = None
    differs: tuple[str, ...] = ()

    def tensor(self, name: str) -> Node:
        """An input that is there."""
        node = self.inputs[name]
        assert node is not None
        return node


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like an operation and is not quite one.

    Attributes:
        kind: what it looks like.
        node: where.
        reason: what is different.
    """

    kind: str
    node: Node
    reason: str


@dataclass
class Index:
    """What has been recognised in a graph.

    Attributes:
        found: in the order of the graph.
        misses: likewise.
        failed: the adapters that raised, with what.
        expressions: which nodes hold the same numbers; None where every node is taken for itself.
        paired: what each rotation has in common with those that one call can make with it, as far as it was asked.
    """

    found: list[Found] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    expressions: Expressions | None = None
    paired: dict[Found, Any] = field(default_factory=dict)

    def of(self, *kinds: str) -> list[Found]:
        """Those of some kinds."""
        return [each for each in self.found if each.kind in kinds]

    def held(self, found: Found, name: str) -> Any:
        """What is equal for inputs of operations that hold the same numbers: a key of dictionaries."""
        node, user = found.inputs.get(name), next(iter(found.outputs.values()), None)
        return node if self.expressions is None or user is None else self.expressions.of(node, user)
