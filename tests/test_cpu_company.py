"""The compiled CPU target beside others: imports, Inductor, registered kernels, another target in one process."""

import pytest
import torch
import triton
import triton.language as tl
from torch._inductor.utils import run_and_get_code
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import tilewright
import tilewright.cpu
from cpu_target_helpers import NO_ACCELERATOR, on_the_processor, run_program
from tilewright import rope, rope_table

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated",
    "ignore:Could not find an active CPU backend",  # torch looks for one called "cpu"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with on_the_processor():
        yield
    torch._dynamo.reset()


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=generator, dtype=torch.int32)


@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, i < n), i < n)


def launch_double(kernel, x):
    out = torch.zeros_like(x)
    kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out


# Imports


def test_importing_tilewright_loads_neither_triton_nor_the_target(tmp_path):
    program = """
import sys
import tilewright
import tilewright.cpu
names = ("triton", "torch", "tilewright.cpu.compiler", "tilewright.cpu.driver")
loaded = [name for name in names if name in sys.modules]
assert not loaded, loaded
"""
    run_program(program, tmp_path)


def test_triton_finds_the_target_without_loading_torch(tmp_path):
    program = """
import sys
import triton
from triton.backends import backends
assert "tilewright_cpu" in backends, list(backends)
assert backends["tilewright_cpu"].driver.__module__ == "tilewright.cpu.driver"
print("torch" in sys.modules)
"""
    without = "import sys, triton; print('torch' in sys.modules)"
    alone = run_program(without, tmp_path, TRITON_BACKENDS_IN_TREE="1")
    assert run_program(program, tmp_path) == alone


@NO_ACCELERATOR
def test_the_target_is_active_of_itself():
    assert driver.active.get_current_target().backend == "tilewright_cpu"


# Inductor


def test_inductor_keeps_to_cpp_for_plain_code():
    """A back end named ``cpu`` would change this."""
    x = torch.randn(64, 32)

    def function(x):
        return (x.sin() + 1).sum(-1)

    assert torch.accelerator.is_available() or not has_triton()
    result, codes = run_and_get_code(torch.compile(function, fullgraph=True), x)
    code = "\n".join(codes)
    assert "cpp_fused" in code
    assert "triton" not in code
    torch.testing.assert_close(result, function(x))


@NO_ACCELERATOR
def test_an_operation_served_by_triton_compiles_in_one_graph():
    x = torch.randn(2, 16, 4, 64)
    cos, sin = rope_table(64, 16)
    assert tilewright.explain("rope", x, cos, sin).chosen == "triton"

    def model(x):
        return rope(x * 2, cos, sin) + 1

    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


@torch.library.triton_op("tilewright_tests::doubled", mutates_args={})
def doubled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.library.wrap_triton(double)[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out


def test_a_triton_operator_that_inductor_looks_into():
    x = integers(1000)
    assert torch.equal(doubled(x), x + x)
    compiled = torch.compile(lambda x: doubled(x + 1) - 1, fullgraph=True)
    result, codes = run_and_get_code(compiled, x)
    assert torch.equal(result, 2 * (x + 1) - 1)
    assert any("double" in code for code in codes)


# Another target


class OtherDriver:
    """A driver for which kernels can be compiled and not launched."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return (self.target.backend, self.target.arch)

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def other():
    """Another driver is the active one."""
    before = driver._active
    made = OtherDriver(GPUTarget("cuda", 90, 32))
    driver.set_active(made)
    yield made
    driver._active = before


def test_active_nests_and_restores(other):
    assert driver.active is other
    with tilewright.cpu.active():
        outer = driver.active
        assert outer.get_current_target().backend == "tilewright_cpu"
        with tilewright.cpu.active():
            assert driver.active.get_current_target().backend == "tilewright_cpu"
        assert driver.active is outer
    assert driver.active is other
    with pytest.raises(KeyError, match="within"), tilewright.cpu.active():
        raise KeyError("within")
    assert driver.active is other


def test_one_kernel_for_two_targets(other):
    """Each target keeps kernels of its own, whichever came first."""
    kernel, x = triton.JITFunction(double.fn), integers(1000)
    for_gpu = kernel.warmup(torch.int32, torch.int32, 1000, BLOCK=64, grid=(1,))
    assert for_gpu.asm["cubin"]
    for _ in range(2):
        with tilewright.cpu.active():
            assert torch.equal(launch_double(kernel, x), x + x)
            device = driver.active.get_current_device()
        again = kernel.warmup(torch.int32, torch.int32, 1000, BLOCK=64, grid=(1,))
        assert again is for_gpu
    kept = {where: list(caches[0].values()) for where, caches in kernel.device_caches.items()}
    assert kept.keys() == {("cuda", 90), device}
    assert kept["cuda", 90] == [for_gpu]
    (for_cpu,) = kept[device]
    assert "cpukernel" in for_cpu.asm
    assert "cubin" not in for_cpu.asm


# What the library says


@NO_ACCELERATOR
def test_explain_says_that_triton_is_compiled_here():
    x, (cos, sin) = torch.randn(1, 8, 2, 16), rope_table(16, 8)
    explained = tilewright.explain("rope", x, cos, sin)
    assert explained.chosen == "triton"
    assert "compiled for the CPU" in str(explained)
