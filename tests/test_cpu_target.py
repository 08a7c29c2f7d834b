"""Launching kernels on the compiled CPU target: errors, overlapping arguments, hooks, threads, what Triton brings."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import driver

from cpu_target_helpers import EXECUTORS, assert_points_at, line_of, on_the_processor
from tilewright.errors import KernelAssertionError, SettingError, UnsupportedKernelError


@pytest.fixture(autouse=True)
def _on_the_processor():
    with on_the_processor():
        yield


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CPU_EXECUTOR", request.param)
    return request.param


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=generator, dtype=torch.int32)


@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, i < n), i < n)


def check_double(n=1000, block=64, seed=0):
    x, out = integers(n, seed=seed), torch.zeros(n + 1, dtype=torch.int32)
    double[(triton.cdiv(n, block),)](x, out, n, BLOCK=block)
    assert torch.equal(out[:n], x + x)
    assert out[n] == 0


# What is refused


@triton.jit
def assembly(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr + i, y)


@triton.jit
def reciprocal(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(out_ptr + i, libdevice.rcp64h(x.to(tl.float64)).to(tl.int32))


@triton.jit
def moved(x):
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def calls_assembly(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, moved(tl.load(x_ptr + i)))


@pytest.mark.parametrize(
    ("kernel", "place", "text"),
    [
        pytest.param(assembly, assembly, "tl.inline_asm_elementwise(", id="assembly"),
        pytest.param(reciprocal, reciprocal, "libdevice.rcp64h(", id="library"),
        pytest.param(calls_assembly, moved, "tl.inline_asm_elementwise(", id="nested"),
    ],
)
def test_what_is_not_supported_is_refused_at_its_line(executor, kernel, place, text):
    out = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(UnsupportedKernelError) as caught:
        kernel[(1,)](integers(16), out, BLOCK=16)
    assert_points_at(str(caught.value), place, text)
    assert isinstance(caught.value, NotImplementedError)
    assert not out.any()
    check_double()  # the next kernel is none the worse for it


@triton.jit
def positive(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1)
    tl.device_assert(x > 0, "x must be positive")


def test_a_failed_assertion_names_line_program_and_message(executor):
    x = torch.ones(64, dtype=torch.int32)
    positive[(4,)](x, 64, BLOCK=16, debug=True)
    x[37] = -5  # program 2
    positive[(4,)](x, 64, BLOCK=16)  # assertions count under debug=True
    with pytest.raises(KernelAssertionError) as caught:
        positive[(4,)](x, 64, BLOCK=16, debug=True)
    file, number, line, _ = line_of(positive, "tl.device_assert(")
    message = str(caught.value)
    assert message.startswith(f"{file}:{number}:")
    assert line.strip() in message
    assert "(2, 0, 0)" in message
    assert "x must be positive" in message


@triton.jit
def shout(x_ptr):
    pid = tl.program_id(0)
    tl.device_print("heard", tl.load(x_ptr + pid))


def test_prints_go_to_pythons_standard_output(executor, capsys):
    """Not to the process's: a notebook shows what sys.stdout gets."""
    shout[(3,)](torch.tensor([411, 422, 433], dtype=torch.int32))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "heard" in line]
    assert len(lines) == 3
    for pid, line in enumerate(sorted(lines)):
        assert f"({pid}, 0, 0)" in line
        assert str((411, 422, 433)[pid]) in line


def test_an_unknown_executor_is_an_error(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CPU_EXECUTOR", "fast")
    with pytest.raises(SettingError, match="TILEWRIGHT_CPU_EXECUTOR='fast'"):
        check_double()


# Arguments whose memory overlaps: all of a program's loads come before its stores.


@triton.jit
def reverse_rows(x_ptr, out_ptr, x_row, out_row, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + i, i < n)
    tl.store(out_ptr + row * out_row + n - 1 - i, 3 * x, i < n)


@triton.jit
def copy_rows(x_ptr, out_ptr, x_row, out_row, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * out_row + i, 3 * tl.load(x_ptr + row * x_row + i, i < n), i < n)


ROWS, COLUMNS = 5, 200


@pytest.mark.parametrize("shift", [-64, -16, -3, -1, 0, 1, 2, 15, 64])
@pytest.mark.parametrize("kernel", [copy_rows, reverse_rows])
def test_a_storage_shifted_against_itself(executor, kernel, shift):
    """Each program has a row of its own, so that their order does not matter."""
    storage = integers(ROWS, COLUMNS + 64)
    n = COLUMNS - 3
    x = storage[:, max(0, -shift) :][:, :n]
    out = storage[:, max(0, shift) :][:, :n]
    expected = storage.clone()
    wanted = 3 * (x.flip(1) if kernel is reverse_rows else x)
    expected[:, max(0, shift) :][:, :n] = wanted
    kernel[(ROWS,)](x, out, x.stride(0), out.stride(0), n, BLOCK=256)
    assert torch.equal(storage, expected)


def test_the_same_tensor_twice(executor):
    x = integers(ROWS, COLUMNS)
    expected = 3 * x.flip(1)
    reverse_rows[(ROWS,)](x, x, COLUMNS, COLUMNS, COLUMNS, BLOCK=256)
    assert torch.equal(x, expected)


@triton.jit
def two_outputs(x_ptr, y_ptr, out_ptr, back_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, i < n), tl.load(y_ptr + i, i < n)
    tl.store(out_ptr + i, x + y, i < n)
    tl.store(back_ptr + i, x - y, i < n)


@pytest.mark.parametrize("order", ["xyxy", "xyyx", "xxxo", "yxxo", "xyox", "xyoo"])
def test_two_results_over_two_arguments(executor, order):
    memory = {"x": integers(100, seed=1), "y": integers(100, seed=2), "o": integers(100, seed=3)}
    x, y, out, back = (memory[name] for name in order)
    total, difference = x + y, x - y
    two_outputs[(1,)](x, y, out, back, 100, BLOCK=128)
    assert torch.equal(back, difference)  # the later store wins
    if back is not out:
        assert torch.equal(out, total)


@triton.jit
def narrow(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.int8))


def test_the_same_memory_as_another_dtype(executor):
    x = integers(64)
    expected = x.to(torch.int8)
    narrow[(1,)](x, x.view(torch.int8), BLOCK=64)
    assert torch.equal(x.view(torch.int8)[:64], expected)


@triton.jit
def smooth(x_ptr, out_ptr, n_blocks, BLOCK: tl.constexpr):
    for block in range(n_blocks):
        i = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i + 1))


def test_a_loop_sees_what_its_earlier_rounds_stored(executor):
    storage = integers(8 * 16 + 2)
    expected = storage.clone()
    for block in range(8):
        i = torch.arange(16) + 16 * block
        expected[i + 1] = expected[i] + expected[i + 1]
    smooth[(1,)](storage, storage[1:], 8, BLOCK=16)
    assert torch.equal(storage, expected)


# What Triton brings


@pytest.mark.parametrize("grid", [(0,), (0, 4), (4, 0), (1, 1, 0)])
def test_a_grid_of_no_programs_does_nothing(executor, grid):
    out = torch.zeros(16, dtype=torch.int32)
    double[grid](torch.ones(16, dtype=torch.int32), out, 16, BLOCK=16)
    assert not out.any()


CONFIGS = [triton.Config({"BLOCK": block}) for block in (16, 64, 256)]


@triton.autotune(CONFIGS, key=["n"])
@triton.jit
def tuned_double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, i < n), i < n)


@triton.autotune(CONFIGS, key=["n"], restore_value=["x_ptr"])
@triton.jit
def tuned_increment(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, i < n) + 1, i < n)


def by_block(n):
    return lambda meta: (triton.cdiv(n, meta["BLOCK"]),)


def test_the_autotuner_chooses_and_the_result_is_right():
    x, out = integers(1000), torch.zeros(1000, dtype=torch.int32)
    tuned_double[by_block(1000)](x, out, 1000)
    assert torch.equal(out, x + x)
    assert tuned_double.best_config in CONFIGS
    assert len(tuned_double.cache) == 1


def test_the_autotuner_restores_what_its_trials_wrote():
    x = integers(1000)
    expected = x + 1
    tuned_increment[by_block(1000)](x, 1000)
    assert torch.equal(x, expected)


def test_warmup_compiles_and_runs_nothing():
    kernel = triton.JITFunction(double.fn)
    x, out = integers(50), torch.zeros(50, dtype=torch.int32)
    compiled = kernel.warmup(x, out, 50, BLOCK=32, grid=(2,))
    assert not out.any()
    artifact = json.loads(compiled.asm["cpukernel"])
    assert artifact["name"] == "double"
    assert "tw_launch" in artifact["c"]
    device = driver.active.get_current_device()
    before = list(kernel.device_caches[device][0].values())
    kernel[(2,)](x, out, 50, BLOCK=32)
    assert torch.equal(out, x + x)
    assert list(kernel.device_caches[device][0].values()) == before


def test_warmup_takes_dtypes_for_tensors():
    kernel = triton.JITFunction(double.fn)
    compiled = kernel.warmup(torch.int32, torch.int32, 50, BLOCK=32, grid=(2,))
    assert "cpukernel" in compiled.asm


def test_do_bench_measures():
    launches = []
    x, out = integers(64), torch.zeros(64, dtype=torch.int32)
    taken = triton.testing.do_bench(lambda: launches.append(double[(1,)](x, out, 64, BLOCK=64)), warmup=1, rep=2)
    assert taken > 0
    assert len(launches) > 1
    assert torch.equal(out, x + x)


def test_launch_hooks_are_called_around_a_launch():
    x, out = integers(64), torch.zeros(64, dtype=torch.int32)
    seen = []

    def enter(metadata):
        seen.append(("enter", metadata.get()["name"], bool(out.any())))

    def leave(metadata):
        seen.append(("exit", metadata.get()["name"], bool(out.any())))

    triton.knobs.runtime.launch_enter_hook.add(enter)
    triton.knobs.runtime.launch_exit_hook.add(leave)
    try:
        double[(1,)](x, out, 64, BLOCK=64)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(enter)
        triton.knobs.runtime.launch_exit_hook.remove(leave)
    double[(1,)](x, out, 64, BLOCK=64)
    assert seen == [("enter", "double", False), ("exit", "double", True)]


@triton.jit
def row_sums(x_ptr, out_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for k in range(ROUNDS):
        i = k * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * n + i, i < n, other=0)
    tl.store(out_ptr + row, tl.sum(total))


def test_launches_from_two_threads_at_once(executor):
    """The first launches also compile at once."""
    kernel = triton.JITFunction(row_sums.fn)
    start = threading.Barrier(2)

    def work(seed):
        x = integers(64, 500, seed=seed)
        start.wait()
        results = [torch.zeros(64, dtype=torch.int32) for _ in range(20)]
        for out in results:
            kernel[(64,)](x, out, 500, ROUNDS=4, BLOCK=128)
        return x, results

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(work, [1, 2]))
    for x, results in done:
        expected = x.sum(1, dtype=torch.int32)
        assert all(torch.equal(out, expected) for out in results)


def test_the_executors_keep_kernels_of_their_own(monkeypatch):
    kernel = triton.JITFunction(double.fn)
    x = integers(64)
    for name in EXECUTORS:
        monkeypatch.setenv("TILEWRIGHT_CPU_EXECUTOR", name)
        out = torch.zeros(64, dtype=torch.int32)
        compiled = kernel[(1,)](x, out, 64, BLOCK=64)
        assert compiled.metadata.executor == name
        assert torch.equal(out, x + x)
