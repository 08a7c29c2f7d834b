"""The back end of ``torch.compile``."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._dynamo import register_backend

from rebel import recorder

NAMESPACE = "rbln_triton_ops"


class RBLNCompileError(RuntimeError):
    """What strict mode raises."""


@register_backend
def rbln(graph, example_inputs, *, options):
    """Compile every kernel of a graph; what runs the graph then."""
    recorder.record("compile", options={name: str(value) for name, value in options.items()})
    nodes = [each for each in graph.graph.nodes if str(each.target).startswith(f"{NAMESPACE}.")]
    try:
        if recorder.FAIL == "fallback":
            raise RBLNCompileError("python3: command not found")
        if (message := recorder.fail("graph")) is not None:
            raise RBLNCompileError(message)
        programs = {node: compiled(node) for node in nodes}
    except RBLNCompileError as error:
        if "strict" in options["mode"] and recorder.FAIL != "fallback":
            raise
        print(f"{error}\nFallback to eager execution", file=sys.stderr)
        return graph.forward
    if "compile_only" in options["mode"]:
        Path(options["cache_dir"], "graph.rbln").write_text("compiled")
    marked = getattr(options.get("compile_context"), "marked", [])
    return lambda *inputs: Run(graph, programs, marked).run(*inputs)


def compiled(node):
    """The program of an operator's kernel, compiled by another process from the module that defines the operator."""
    name = str(node.target).split(".")[1]
    source = next(each.__file__ for each in list(sys.modules.values()) if f"{name}_wrapper" in vars(each))
    examples = [each.meta["example_value"] for each in node.args]
    lines = [f"arg{index} = {empty(each)}" for index, each in enumerate(examples)]
    call = f"{name}_wrapper({''.join(f'arg{index}, ' for index in range(len(examples)))})"
    script = "\n".join([Path(source).read_text(), "", *lines, call, ""])
    folder = Path.cwd() / hashlib.sha256(script.encode()).hexdigest()[:16]
    folder.mkdir()
    (folder / "kernel_compile.py").write_text(script)
    done = subprocess.run(
        ["python3", "kernel_compile.py"],
        cwd=folder,
        env={**os.environ, "RBLN_WRITE_RTOSA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise RBLNCompileError(f"kernel_compile.py exited with {done.returncode}")
    from tilewright.npu.ir.text import parse_program
    from tilewright.npu.program import Manifest, Program

    found = json.loads(Path(os.environ["TRITON_HOME"], f"{name}.json").read_text())
    return Program(parse_program(found["program"]), Manifest.from_json(found["manifest"]))


def empty(tensor):
    """How the script allocates an argument."""
    sizes = "".join(f"{size}, " for size in tensor.shape) or "(), "
    return f"torch.empty({sizes}{'' if tensor.dtype == torch.float32 else f'dtype={tensor.dtype}, '})"


class Run(torch.fx.Interpreter):
    """A run of a graph on the device."""

    def __init__(self, graph, programs, marked):
        super().__init__(graph)
        self.programs = programs
        self.marked = marked

    def run_node(self, node):
        """Kernels by their programs, everything else as it is."""
        if node not in self.programs:
            return super().run_node(node)
        return self.kernel(node, self.programs[node], [self.env[each] for each in node.args])

    def kernel(self, node, program, tensors):
        """Match tensors with the kernel's by position, and run it."""
        infos = program.manifest.arguments
        taken = [info for info in infos if not info.is_output]
        values = {}
        for info, tensor in zip(taken, tensors, strict=True):
            carried = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
            missing = info.shape[-1] - tensor.shape[-1] if info.shape else 0
            values[info.name] = (torch.nn.functional.pad(carried, (0, missing)) if missing else carried).clone()
        outputs = {info.name: torch.empty(info.shape) for info in infos if info.is_output}
        values |= outputs
        program.run(*(values[info.name] for info in infos), compute_dtype="dlfloat16")
        for info, tensor in zip(taken, tensors, strict=True):
            if info.role == "inout" and tensor.data_ptr() in self.marked:
                tensor.copy_(values[info.name] + (recorder.FAIL == "wrong_cache"))
        examples = node.meta["example_value"]
        several = isinstance(examples, tuple)
        results = tuple(
            (value + (recorder.FAIL == "wrong")).to(example.dtype)
            for value, example in zip(outputs.values(), examples if several else [examples], strict=True)
        )
        return results if several else results[0]
