"""Reports that outlive the process: kept beside Inductor's cache, for when it is hit and the pass does not run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import ArgumentError
from tilewright.files import replace_text
from tilewright.fusion.report import graph_report

if TYPE_CHECKING:
    import types

    from tilewright.fusion.report import GraphReport

_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{8,128}")


class Store:
    """A folder of reports: one file for each compiled program, in one folder for each identity of the pass.

    Args:
        root: the folder; by default ``tilewright_fusion`` in the folder of Inductor's cache, which is asked for at
            every use, so that the reports are always where the code is.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root

    @property
    def root(self) -> Path:
        """The folder, which need not be there yet."""
        if self._root is not None:
            return self._root
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return Path(cache_dir()) / "tilewright_fusion"

    def keep(self, identity: str, graph_key: str, graphs: Sequence[GraphReport]) -> None:
        """Keep what was decided in the graphs of a program, in the place of what was kept before.

        Args:
            identity: of the pass, as hex digits: rules, parameters, versions.
            graph_key: of the program, from :func:`graph_key`.
            graphs: what was decided in its graphs.

        Raises:
            ArgumentError: ``identity`` or ``graph_key`` is not a digest.
            OSError: the folder cannot be written to.
        """
        path = self._path(identity, graph_key)
        data = [asdict(replace(graph, cached=False)) for graph in graphs]
        body = json.dumps(data, separators=(",", ":"))
        record = {"format": _FORMAT, "sha256": _sha256(body), "graphs": data}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(record, separators=(",", ":")) + "\n")

    def recall(self, identity: str, graph_key: str) -> tuple[GraphReport, ...] | None:
        """What was kept for a program, marked as cached; None if nothing was, or its file cannot be understood.

        Raises:
            ArgumentError: ``identity`` or ``graph_key`` is not a digest.
        """
        _check("identity", identity)
        _check("graph_key", graph_key)
        try:
            return _read(self._path(identity, graph_key))
        except OSError:  # from Inductor, if its cache has no folder
            return None

    def everything(self, identity: str) -> tuple[GraphReport, ...]:
        """All that was kept under an identity, in the order of the keys, marked as cached; without damaged files.

        Raises:
            ArgumentError: ``identity`` is not a digest.
        """
        _check("identity", identity)
        try:
            files = sorted(p for p in (self.root / identity).glob("*.json") if _DIGEST.fullmatch(p.stem))
        except OSError:
            return ()
        return tuple(graph for file in files for graph in _read(file) or ())

    def _path(self, identity: str, key: str) -> Path:
        _check("identity", identity)
        _check("graph_key", key)
        return self.root / identity / f"{key}.json"


def _check(argument: str, value: str) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        got = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        raise ArgumentError("fusion store", argument, f"got {got}, expected a digest of 8 to 128 lower-case hex digits")


def _read(path: Path) -> tuple[GraphReport, ...] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (
            record["format"] != _FORMAT
            or _sha256(json.dumps(record["graphs"], separators=(",", ":"))) != record["sha256"]
        ):
            return None
        return tuple(graph_report(graph, cached=True) for graph in record["graphs"])
    # What a file holds that is damaged or that somebody else wrote can be wrong in any of these ways.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def graph_key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """A digest of a graph that Dynamo captured: the same for equal programs, in this process and in any other.

    It covers every call with its constants; attributes by name, shape, dtype, stride and device; inputs by the same and
    by whether they want a gradient; and what of torch's state changes a trace: gradients, autocast, the default dtype.
    Names of nodes and of symbolic sizes do not count, nor do the numbers in tensors or the values at which symbolic
    sizes were seen.

    Args:
        gm: the graph, as a back end of ``torch.compile`` gets it.
        example_inputs: as a back end gets them.
    """
    describe = _Description()
    lines = [*_state(example_inputs), *describe.graph(gm, example_inputs)]
    return _sha256("\n".join(lines))


def _state(inputs: Sequence[Any]) -> list[str]:
    lines = [f"grad {torch.is_grad_enabled()} inference {torch.is_inference_mode_enabled()}"]
    lines.append(f"default {torch.get_default_dtype()}")
    for device in sorted({"cpu", *(x.device.type for x in inputs if isinstance(x, torch.Tensor))}):
        if torch.amp.is_autocast_available(device):
            cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            lines.append(f"autocast {device} {cast}")
    return lines


class _Description:
    """Says what a graph holds in words that do not vary from run to run; symbols are numbered as they are met."""

    def __init__(self) -> None:
        self._symbols: dict[Any, Any] = {}
        self._numbers: dict[torch.fx.Node, int] = {}

    def graph(self, gm: torch.fx.GraphModule, inputs: Sequence[Any] = ()) -> list[str]:
        """A line for each node."""
        given, lines = list(inputs), []
        for number, node in enumerate(gm.graph.nodes):
            self._numbers[node] = number
            line = f"%{number} {node.op}"
            if node.op == "placeholder":
                example = given.pop(0) if given else None
                # Dynamo's fake has the symbolic sizes, where the example has those of this one call.
                line += f" {self.value(node.meta.get('example_value', node.meta.get('val', example)))}"
            elif node.op == "get_attr":
                line += f" {node.target} {self.value(_attribute(gm, node.target))}"
            elif node.op == "call_module":
                line += f" {node.target} {self._module(gm.get_submodule(node.target))}"
            elif node.op == "call_function":
                line += f" {self._function(node.target)}"
            elif node.op == "call_method":
                line += f" {node.target}"
            if node.op != "placeholder":
                line += f" {self.value(node.args)} {self._keywords(node)}"
            lines.append(line)
        return lines + [f"input {self.value(extra)}" for extra in given]

    def value(self, value: Any) -> str:  # noqa: PLR0911 - a kind of value each
        """An argument, a constant or an input."""
        if isinstance(value, torch.fx.Node):
            return f"%{self._numbers.get(value)}"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return f"{type(value).__name__} {self._symbolic(value)}"
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        if isinstance(value, slice):
            return f"slice{self.value((value.start, value.stop, value.step))}"
        if isinstance(value, Mapping):
            pairs = sorted(f"{self.value(k)}: {self.value(v)}" for k, v in value.items())
            return "{" + ", ".join(pairs) + "}"
        if isinstance(value, AbstractSet):
            return "{" + ", ".join(sorted(map(self.value, value))) + "}"
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            kind = "[" if isinstance(value, list) else "("
            return kind + ", ".join(map(self.value, value)) + "]"
        if callable(value):
            return self._function(value)
        return f"{type(value).__name__} {_without_addresses(repr(value))}"

    def _tensor(self, tensor: torch.Tensor) -> str:
        from torch._subclasses.fake_tensor import FakeTensor

        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
        parts = ["Tensor" if plain else _name(type(tensor)), self.value(tuple(tensor.shape))]
        if tensor.layout is torch.strided:
            parts.append(self.value(tuple(tensor.stride())))
        parts += [str(tensor.dtype), str(tensor.device), str(tensor.layout), f"grad {tensor.requires_grad}"]
        if not plain and hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            parts += [self.value({name: getattr(tensor, name) for name in names}), self.value(context)]
        return " ".join(parts)

    def _symbolic(self, number: Any) -> str:
        expression = getattr(number.node, "expr", None)
        if expression is None:
            return str(number)
        import sympy  # type: ignore[import-untyped]

        for symbol in sorted(expression.free_symbols, key=lambda s: (len(str(s)), str(s))):
            if symbol not in self._symbols:
                self._symbols[symbol] = sympy.Symbol(f"d{len(self._symbols)}", **symbol.assumptions0)
        return str(expression.xreplace(self._symbols))

    def _module(self, module: torch.nn.Module) -> str:
        if isinstance(module, torch.fx.GraphModule):
            return "graph(" + "; ".join(self.graph(module)) + ")"
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return f"{_name(type(module))} {_without_addresses(repr(module))} {self.value(held)}"

    def _function(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return str(target)
        name = _name(target)
        code = getattr(target, "__code__", None)
        if code is None or name.startswith("torch."):
            return name
        return f"{name} {_sha256(self._code(code))}"  # a function of the user's, which may change under its name

    def _code(self, code: types.CodeType) -> str:
        constants = [self._code(c) if hasattr(c, "co_code") else self.value(c) for c in code.co_consts]
        return f"{code.co_code.hex()} {code.co_names} {constants}"

    def _keywords(self, node: torch.fx.Node) -> str:
        if "kernel_idx" not in node.kwargs:
            return self.value(node.kwargs)
        # A Triton kernel of the user's: two of its arguments are places in a table that this process filled.
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        keywords = dict(node.kwargs)
        kernel: Any = kernel_side_table.get_kernel(keywords.pop("kernel_idx"))  # type: ignore[arg-type]
        while not hasattr(kernel, "src") and hasattr(kernel, "fn"):  # what autotunes it
            kernel = kernel.fn
        keywords["kernel"] = f"{_name(kernel)} {getattr(kernel, 'src', None)}"
        if "constant_args_idx" in keywords:
            place: Any = keywords.pop("constant_args_idx")
            keywords["constants"] = kernel_side_table.get_constant_args(place)
        return self.value(keywords)


def _attribute(module: torch.nn.Module, target: Any) -> Any:
    value: Any = module
    for part in str(target).split("."):
        value = getattr(value, part, None)
    return value


def _name(thing: Any) -> str:
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    if name is None:  # an object that can be called, such as a partial function
        return f"{_name(type(thing))} {_without_addresses(repr(thing))}"
    return f"{getattr(thing, '__module__', None)}.{name}"


def _without_addresses(text: str) -> str:
    return re.sub(r"\b0x[0-9a-fA-F]+", "", text)
