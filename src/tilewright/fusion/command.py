"""``tilewright fuse``: the fusion report of a model in a file, without a GPU.

The model is compiled for the CPU and called once. Inductor's custom pass sees the graph that it would see anywhere, and
everything behind the pass is made cheap: each operator is left to PyTorch, so that no kernel is generated and no C++
compiler is needed, and Inductor's cache is left out, so that the pass runs.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tilewright.errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    import torch

    from tilewright.fusion.report import FusionReport

    Compile = Callable[..., Any]

_INPUTS = "example_inputs"
_SUMMARY = "print what graph fusion makes of a model, without a GPU"


class Program(NamedTuple):
    """What is compiled, and the call that compiles it.

    Attributes:
        name: as the user wrote it.
        function: a module or a function.
        args: of the call.
        kwargs: of the call.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command to those of the command line."""
    parser = commands.add_parser("fuse", help=_SUMMARY, description=_SUMMARY)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")
    parser.add_argument(
        "model",
        metavar="FILE",
        help="FILE.py:NAME, a module, a function, or something that returns a module; or FILE.pt2 of torch.export.save",
    )
    parser.add_argument(
        "--inputs",
        metavar="EXPR",
        help="a Python expression for the arguments of a call, with the names of the file: a tuple, or a dict for "
        f"named arguments, such as 'torch.randn(2, 64),' (default: the file's '{_INPUTS}', a function or a tuple)",
    )
    parser.add_argument("--device", default="cpu", help="where to compile for (default: cpu)")
    parser.add_argument("--dynamic", action="store_true", help="compile with symbolic sizes")
    parser.add_argument("--training", action="store_true", help="compile forward and backward (default: inference)")
    parser.add_argument(
        "--numerics", choices=["strict", "relaxed"], default="strict", help="which differences are allowed"
    )
    parser.add_argument("--output", metavar="PATH", help="write the report: a page for .html, else JSON")
    return parser


def run(arguments: argparse.Namespace, *, compile: Compile | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the parser of :func:`add_parser`.
        compile: in place of :func:`tilewright.compile`.

    Returns:
        0; or 1 where a rule failed, or the call did after something was compiled.

    Raises:
        ArgumentError: a file, a name, an expression or a device cannot be used, or nothing of the model was compiled.
        UnknownNameError: the file does not have the name.
    """
    from tilewright.platforms import usable_device

    if compile is None:
        from tilewright.fusion.api import compile as own

        compile = own
    output = _checked_output(arguments.output)
    device = usable_device(arguments.device, "fuse")
    with loaded(arguments.model, arguments.inputs, device) as program:
        report, is_whole = fusion_report(
            program,
            compile=compile,
            dynamic=arguments.dynamic,
            training=arguments.training,
            numerics=arguments.numerics,
        )
    print(json.dumps(report.to_json()) if arguments.json else report)
    if output is not None:
        try:
            report.save(output)
        except OSError as error:
            raise ArgumentError("fuse", "output", f"'{output}' cannot be written: {error}") from error
        if not arguments.json:
            print(f"written to {output}")
    return 0 if is_whole and all(decision.action != "failed" for decision in report.decisions) else 1


def fusion_report(
    program: Program,
    *,
    compile: Compile,
    dynamic: bool = False,
    training: bool = False,
    numerics: str = "strict",
) -> tuple[FusionReport, bool]:
    """Compile a program by calling it once, and say what was fused, and whether the call went through.

    Args:
        program: what is compiled; a module is put in training or evaluation mode.
        compile: :func:`tilewright.compile`, or what takes the same arguments.
        dynamic: whether sizes are symbolic.
        training: compile a forward and a backward graph, and not one for inference.
        numerics: of :func:`tilewright.compile`.

    Raises:
        ArgumentError: nothing was compiled.
    """
    import torch

    if isinstance(program.function, torch.nn.Module) and not _is_exported(program.function):
        program.function.train(training)
    if training:
        program = _wanting_gradients(program)
    options = {"dynamic": True} if dynamic else {}
    compiled = compile(program.function, numerics=numerics, **options)
    report: FusionReport = compiled.fusion_report
    is_whole = True
    with _only_the_pass(), torch.set_grad_enabled(training):
        try:
            result = compiled(*program.args, **program.kwargs)
            if training:
                _backward(result)
        except ArgumentError:
            raise
        except Exception as error:  # of the program, or of torch about it: it may raise anything
            told = _in_one_line(error)
            if not report.graphs:
                message = f"'{program.name}' could not be compiled and called with these inputs: {told}"
                raise ArgumentError("fuse", "inputs", f"{message}; see that it runs without torch.compile") from error
            graphs = f"{len(report.graphs)} graph{'s' if len(report.graphs) != 1 else ''}"
            report.notes.append(f"the call failed after {graphs}, which is all this report knows of: {told}")
            is_whole = False
    return report, is_whole


@contextmanager
def loaded(target: str, inputs: str | None, device: torch.device) -> Iterator[Program]:
    """The program that a user names, for as long as its file counts as imported.

    Args:
        target: ``FILE.py:NAME`` or ``FILE.pt2``.
        inputs: an expression for the arguments of the call; None: what the file has.
        device: where module and arguments go.

    Raises:
        ArgumentError: a file, a name, an expression or a device cannot be used.
        UnknownNameError: the file does not have the name.
    """
    if target.endswith(".pt2"):
        yield _exported(_file(target), inputs, device)
        return
    path, _, name = target.rpartition(":")
    if not path:
        path, name = name, ""
    if not path.endswith(".py"):
        raise ArgumentError("fuse", "FILE", f"got '{target}', expected FILE.py:NAME or a FILE.pt2 of torch.export.save")
    with _imported(_file(path)) as module:
        if not name:
            raise ArgumentError("fuse", "FILE", f"name what to compile: '{path}:NAME'; {_candidates(module)}")
        function = _function(module, name)
        args, kwargs = _arguments(module, inputs, path)
        yield _moved(Program(name, function, args, kwargs), device)


def _file(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ArgumentError("fuse", "FILE", f"there is no file '{path}'")
    return file.resolve()


@contextmanager
def _imported(file: Path) -> Iterator[ModuleType]:
    """A file as a module of its own; what stands beside it can be imported while it is."""
    from importlib.util import module_from_spec, spec_from_file_location

    name = f"_tilewright_fuse_{file.stem}"
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ArgumentError("fuse", "FILE", f"Python cannot import '{file}'")
    module, folder, before = module_from_spec(spec), str(file.parent), sys.modules.get(name)
    sys.modules[name] = module  # Dynamo and dataclasses look there
    try:
        sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            message = f"importing '{file}' raised {_in_one_line(error)}{_line_of(error, file)}"
            hint = "; put what is not for an import under `if __name__ == '__main__':`"
            raise ArgumentError("fuse", "FILE", message + (hint if isinstance(error, SystemExit) else "")) from error
        finally:
            if folder in sys.path:
                sys.path.remove(folder)
        yield module
    finally:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before


def _candidates(module: ModuleType) -> str:
    import torch

    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and name != _INPUTS
        if isinstance(value, torch.nn.Module) or (callable(value) and value.__module__ == module.__name__)
    ]
    return f"there are: {', '.join(names)}" if names else "but the file has no module, class or function of its own"


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    """What a name stands for: a module, what returns one when it is called without arguments, or a function."""
    import torch

    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise UnknownNameError(f"fuse: '{module.__file__}' has no '{name}'; {_candidates(module)}")
        value = getattr(value, part)
    if isinstance(value, torch.nn.Module):
        return value
    if not callable(value):
        raise ArgumentError("fuse", "FILE", f"'{name}' is {_a(value)}, expected a module, a class or a function")
    if isinstance(value, type) or _needs_nothing(value):
        made = _call(value, f"{name}()", "FILE", "; name a function that builds the module without arguments")
        if isinstance(made, torch.nn.Module):
            return made
        if isinstance(value, type):
            raise ArgumentError("fuse", "FILE", f"'{name}' is a class of {_a(made)}, expected one of torch.nn.Module")
    function: Callable[..., Any] = value
    return function


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments; one that takes any number of them is there to be compiled."""
    import inspect

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)


def _arguments(module: ModuleType, expression: str | None, path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if expression is not None:
        return _evaluated(expression, vars(module))
    if not hasattr(module, _INPUTS):
        raise ArgumentError(
            "fuse",
            "inputs",
            "nothing says what to call the model with; give --inputs, such as --inputs 'torch.randn(2, 64),', or "
            f"define '{_INPUTS}' in '{path}', a tuple or a function that returns one",
        )
    found = getattr(module, _INPUTS)
    if callable(found):
        found = _call(found, f"{_INPUTS}()", "inputs")
    return _as_call(found, f"'{_INPUTS}' of '{path}'")


def _evaluated(expression: str, names: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    def value() -> Any:
        return eval(expression, {"torch": torch, **names})

    return _as_call(_call(value, f"'{expression}'", "inputs"), f"'{expression}'")


def _as_call(value: Any, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        return (value,), {}
    if isinstance(value, dict):
        return (), value
    if isinstance(value, tuple | list):
        return tuple(value), {}
    raise ArgumentError(
        "fuse", "inputs", f"{source} is {_a(value)}, expected a tuple of tensors, or a dict of named arguments"
    )


def _exported(file: Path, inputs: str | None, device: torch.device) -> Program:
    """A program that ``torch.export.save`` wrote."""
    import torch
    from torch.export.passes import move_to_device_pass

    try:
        exported = move_to_device_pass(torch.export.load(file), device)
    except Exception as error:  # torch raises what its unpickling raises
        message = f"'{file}' cannot be loaded as a graph of torch.export.save: {_in_one_line(error)}"
        raise ArgumentError("fuse", "FILE", message) from error
    if inputs is not None:
        args, kwargs = _evaluated(inputs, {})
    elif exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
    else:
        raise ArgumentError(
            "fuse",
            "inputs",
            f"'{file}' was saved without example inputs; give --inputs, such as --inputs 'torch.randn(2, 64),', or "
            "save it with them, as torch.export.export keeps them",
        )
    return _moved(Program(file.name, exported.module(), tuple(args), dict(kwargs)), device)


def _is_exported(module: torch.nn.Module) -> bool:
    """Whether a module came out of ``torch.export``, which refuses to change its mode."""
    import torch

    return isinstance(module, torch.fx.GraphModule)


def _moved(program: Program, device: torch.device) -> Program:
    import torch
    from torch.utils._pytree import tree_map_only

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device)

    try:
        if isinstance(program.function, torch.nn.Module) and not _is_exported(program.function):
            program.function.to(device)
        args, kwargs = tree_map_only(torch.Tensor, move, (program.args, program.kwargs))
    except RuntimeError as error:  # such as weights without data, or too little memory
        message = f"'{program.name}' and its inputs cannot be moved to '{device}': {_in_one_line(error)}"
        raise ArgumentError("fuse", "device", message) from error
    return program._replace(args=args, kwargs=kwargs)


def _wanting_gradients(program: Program) -> Program:
    """The program with a gradient to compute: where no weight wants one, the inputs do."""
    import torch
    from torch.utils._pytree import tree_map_only

    if isinstance(program.function, torch.nn.Module) and any(p.requires_grad for p in program.function.parameters()):
        return program

    def wanting(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(torch.Tensor, wanting, (program.args, program.kwargs))
    return program._replace(args=args, kwargs=kwargs)


def _backward(result: Any) -> None:
    import torch
    from torch.utils._pytree import tree_leaves

    # FP8 results carry no gradient anybody could use, though autograd lets them ask for one.
    wanted = [
        t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad and t.dtype.itemsize > 1
    ]
    if not wanted:
        raise ArgumentError("fuse", "training", "no result wants a gradient; leave --training out")
    torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])


@contextmanager
def _only_the_pass() -> Iterator[None]:
    """Compile for the sake of Inductor's custom pass: nothing comes from its cache, and no kernel is generated."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    with ExitStack() as stack:
        stack.enter_context(inductor.patch(fx_graph_cache=False))
        stack.enter_context(functorch.patch(enable_autograd_cache=False))
        if hasattr(inductor, "fallback_by_default"):
            stack.enter_context(inductor.patch(fallback_by_default=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="nothing was fused")  # the report says so
        yield


def _checked_output(output: str | None) -> Path | None:
    """The path of the report, if it can be a file's: a long compilation comes before it is written."""
    if output is None:
        return None
    path = Path(output)
    if path.is_dir():
        raise ArgumentError("fuse", "output", f"'{path}' is a folder; name a file, such as '{path / 'fusion.html'}'")
    return path


def _call(function: Callable[[], Any], told: str, argument: str, hint: str = "") -> Any:
    """Call what the user wrote."""
    try:
        return function()
    except Exception as error:
        raise ArgumentError("fuse", argument, f"{told} raised {_in_one_line(error)}{hint}") from error


def _in_one_line(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None)  # what torch wraps around a failure of a backend
    if isinstance(inner, BaseException):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    meant = [line for line in lines if ": got " in line][:1] if type(error).__module__ == "torch._dynamo.exc" else []
    if meant:  # what a call in the user's program raised, behind the call and its arguments
        return meant[0].rpartition(": got ")[2]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _line_of(error: BaseException, file: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" (line {lines[-1]})" if lines else ""


def _a(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
