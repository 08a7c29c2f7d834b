import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from tilewright.errors import ImplementationError, NpuLanguageError
from tilewright.npu import install_shim, language, rblib, shim, uninstall_shim

MODULE = """
import os

import torch
from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib
from torch.library import register_fake, triton_op

FACTOR = 3.0


@triton.jit
def {name}(x_ptr, cache_ptr, count_ptr, out_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    x_block = tl.make_block_ptr(x_ptr, (1, WIDTH), (WIDTH, 1), (0, 0), (1, WIDTH), (1, 0))
    cache_block = tl.make_block_ptr(cache_ptr, (ROWS, WIDTH), (WIDTH, 1), (0, 0), (ROWS, WIDTH), (1, 0))
    out_block = tl.make_block_ptr(out_ptr, (ROWS, WIDTH), (WIDTH, 1), (0, 0), (ROWS, WIDTH), (1, 0))
    count_block = tl.make_block_ptr(count_ptr, (1,), (1,), (0,), (1,), (0,))
    count = rblib.to_dynamic_index(count_block, ROWS).cast(tl.int32)
    rows = rblib.insert(rblib.dynamic_load(cache_block, 0, count), tl.load(x_block), 0, count)
    rblib.dynamic_store(cache_block, rows, 0, count + 1)
    tl.store(out_block, rows * FACTOR)


def warmup(func, *args):
    kernel = func.warmup(*args, grid=(1,), host_layout="0:1")
    rblib.write_rtosa(kernel, args)
    return kernel


@triton_op("rbln_triton_ops::{name}", mutates_args=())
def {name}_wrapper(x: torch.Tensor, cache: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(cache)
    x = rblib.align_tensor_last_dim_to_64(x)
    params = [x, cache, count, out, cache.shape[0], x.shape[1]]
    warmup({name}, *params)
    return out


@register_fake("rbln_triton_ops::{name}")
def _(x, cache, count):
    return torch.empty_like(cache)
"""


@pytest.fixture
def installed():
    install_shim()
    yield
    uninstall_shim()


def loaded(tmp_path, name):
    path = tmp_path / f"{name}.py"
    path.write_text(MODULE.format(name=name))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_installed_by_an_import():
    code = """
import sys
import tilewright.npu.kernels
ours = [each for each in sys.meta_path if type(each).__module__.startswith("tilewright")]
sys.exit(bool(ours) or "rebel" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(ImportError):
        import rebel  # noqa: F401


def test_a_file_for_the_vendors_compiler_runs_unmodified(installed, tmp_path):
    module = loaded(tmp_path, "shim_append")
    x, cache = torch.randn(1, 70), torch.zeros(4, 70)
    count = torch.tensor([2], dtype=torch.int32)
    result = torch.ops.rbln_triton_ops.shim_append(x, cache, count)
    assert torch.equal(cache[2], x[0])
    assert torch.equal(result, cache * 3.0)
    compiled = torch.compile(
        lambda *args: torch.ops.rbln_triton_ops.shim_append(*args) + 1, backend="rbln", dynamic=False
    )
    other = torch.zeros(4, 70)
    assert torch.equal(compiled(x, other, count), result + 1)
    assert torch.equal(other, cache)
    assert (
        module.shim_append.warmup(
            x[:, :64].contiguous(), cache[:, :64].contiguous(), count, result[:, :64].contiguous(), 4, 64
        ).name
        == "shim_append"
    )


def test_modules_stand_for_this_librarys(installed):
    import rebel.triton.language as tl
    from rebel import triton
    from rebel.triton.language.extra.rbln import libdevice

    assert tl.dot is language.dot
    assert tl.math.exp is language.exp
    assert libdevice.insert is rblib.insert
    assert triton.cdiv(7, 2) == 4
    assert triton.next_power_of_2(5) == 8
    with pytest.raises(AttributeError):
        tl.no_such_function  # noqa: B018
    with pytest.raises(NpuLanguageError, match="inside a kernel"):
        tl.load(None)


def test_uninstalling_undoes_it(tmp_path):
    install_shim()
    install_shim()
    import rebel

    uninstall_shim()
    uninstall_shim()
    with pytest.raises(ImportError):
        import rebel.triton  # noqa: F401
    assert "rbln" not in torch._dynamo.list_backends(exclude_tags=())


def test_a_shim_in_a_shim():
    with shim.shim(), shim.shim(execute=False):
        pass
    with shim.shim():
        with shim.shim(execute=False):
            assert not shim._state.execute
        assert shim._state.execute
        import rebel.triton.language
    with pytest.raises(ImportError):
        import rebel.triton.language  # noqa: F401


def test_everything_of_the_language_can_be_imported(installed):
    names = {}
    exec("from rebel.triton.language import *\nfrom rebel.triton.language.extra.rbln.libdevice import *", names)
    assert names["dot"] is language.dot
    assert names["insert"] is rblib.insert


def test_another_back_end_of_that_name_is_left_alone():
    def other(graph, inputs):
        return graph.forward

    torch._dynamo.register_backend(other, name="rbln")
    try:
        install_shim()
        uninstall_shim()
        assert "rbln" in torch._dynamo.list_backends(exclude_tags=())
    finally:
        shim._unregister_backend()


def test_findings_are_told(installed, tmp_path):
    module = loaded(tmp_path, "shim_narrow")
    x, cache, count = torch.randn(1, 48), torch.zeros(4, 48), torch.tensor([1], dtype=torch.int32)
    with pytest.warns(UserWarning, match=r"shim_narrow\.py:\d+:\d+: warning\[NPU-LAST_DIM_64\]"):
        module.shim_narrow.warmup(x, cache, count, torch.empty(4, 48), 4, 48)


def test_compiling_may_be_all_that_it_does(tmp_path):
    install_shim(execute=False)
    try:
        module = loaded(tmp_path, "shim_not_run")
        cache = torch.zeros(4, 64)
        module.shim_not_run_wrapper(torch.randn(1, 64), cache, torch.tensor([2], dtype=torch.int32))
        assert not cache.any()
    finally:
        uninstall_shim()


def test_meta_tensors_are_compiled_for_and_not_run(installed, tmp_path):
    module = loaded(tmp_path, "shim_meta")
    meta = torch.device("meta")
    out = module.shim_meta_wrapper(
        torch.empty(1, 64, device=meta), torch.empty(4, 64, device=meta), torch.empty(1, dtype=torch.int32, device=meta)
    )
    assert out.shape == (4, 64)


def test_the_real_compiler_is_not_replaced(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: ModuleSpec("rebel", None) if name == "rebel" else found(name, *args),
    )
    assert shim.real_rebel()
    with pytest.raises(ImplementationError, match="real rebel"):
        install_shim()


def test_the_other_form_of_warmup(installed, tmp_path):
    module = loaded(tmp_path, "shim_conf")
    x, cache, count = torch.randn(1, 64), torch.zeros(4, 64), torch.tensor([1], dtype=torch.int32)
    out = torch.empty_like(cache)
    conf = {"vector_inputs": 2, "host_layout": [0, 1], "indices": [2]}
    program = rblib.warmup(module.shim_conf, conf, x, cache, count, out, 4, 64)
    assert torch.equal(out, cache * 3.0)
    assert {
        key: list(program.metadata[key]) if key != "vector_inputs" else program.metadata[key] for key in conf
    } == conf
    assert rblib.collect_triton_op_files() == []
    assert rblib.attach_triton_op_files_to_loaded_modules("package") is None
