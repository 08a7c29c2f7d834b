"""The attention kernels against dense attention over the gathered cache, and what they do to the cache."""

import ast
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import (
    Case,
    assert_same,
    attend,
    cache_after,
    compiled,
    dense,
    judged,
    prepared,
    run,
    sizes,
    tensors,
)

from tilewright.errors import ArgumentError, NpuKernelError, NpuRunError
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.front import check_kernels, interface
from tilewright.npu.ir.text import parse_program
from tilewright.npu.kernel import JitFunction
from tilewright.npu.kernels import BLOCKS_FIRST_OPERATORS, OPERATORS
from tilewright.npu.kernels.attention import attention
from tilewright.npu.kernels.causal_attention import causal_attention
from tilewright.npu.kernels.flash_attention import flash_attention
from tilewright.npu.kernels.flash_causal_attention import flash_causal_attention
from tilewright.npu.kernels.sliding_window_attention import sliding_window_attention
from tilewright.npu.profiles import profile
from tilewright.npu.program import Program

PAGED = (attention, causal_attention, flash_attention, flash_causal_attention)
KERNELS = (*PAGED, sliding_window_attention)
MASKED = (attention, flash_attention)
FLASH = (flash_attention, flash_causal_attention)
DEVICES = ("doc", "hw-0.10.3", "hw-0.11.1")


def check(kernel: JitFunction, case: Case, given: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The output is that of dense attention; the cache, which is returned, has the new rows and is else unchanged."""
    given = tensors(case) if given is None else given
    after = run(kernel, given)
    agreement = judged(after["output"], lambda dtype: dense(case, given, dtype, kernel in MASKED), case.keys)
    assert agreement.ok, f"{case}: {agreement}"
    assert_same(after["kv_cache"], cache_after(case, given))
    return after["kv_cache"]


def for_kernel(kernel: JitFunction, **given: Any) -> Case:
    """A case; where a sequence lies in one partition, it has to."""
    case = Case(**given)
    if kernel in FLASH:
        return case
    positions = tuple(position % case.partition for position in case.positions)
    return Case(**{**given, "positions": positions, "partitions": 1})


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_every_position_of_one_sequence(kernel: JitFunction, query_len: int, prefill: bool) -> None:
    rows = 64
    first = (0, 1, 29, rows - query_len)
    behind = (rows, rows + 1, 2 * rows - query_len, 2 * rows, 3 * rows - query_len)
    for position in first + behind if kernel in FLASH else first:
        check(kernel, for_kernel(kernel, positions=(position,), query_len=query_len, prefill=prefill))


@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_chunks_of_a_long_prompt(kernel: JitFunction) -> None:
    for position in (0, 128, 256) if kernel in FLASH else (0,):
        case = {"positions": (position,), "query_len": 128, "prefill": True, "partition": 128}
        check(kernel, for_kernel(kernel, **case))


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_sequences_at_different_positions(kernel: JitFunction, groups: int, query_len: int) -> None:
    check(kernel, for_kernel(kernel, positions=(128, 0, 61, 70, 189), query_len=query_len, groups=groups))


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_a_head_that_is_no_multiple_of_64(kernel: JitFunction, prefill: bool) -> None:
    positions = (65,) if prefill else (65, 128, 0)
    case = for_kernel(kernel, positions=positions, query_len=3, prefill=prefill, head_dim=80)
    assert prepared(tensors(case))["query"].shape[-1] == 128
    assert tensors(case)["output"].shape[-1] == 80
    check(kernel, case)


@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_a_sequence_from_its_prompt_on(kernel: JitFunction) -> None:
    kept = tensors(for_kernel(kernel, positions=(0,), partition=32))
    cache, position = kept["kv_cache"], 0
    for step, rows in enumerate([16, 8, 1, 1, 3, 1, 2] + [1, 31] * (kernel in FLASH)):
        case = for_kernel(kernel, positions=(position,), query_len=rows, partition=32)
        given = {**tensors(case, seed=step), "kv_cache": cache, "block_table": kept["block_table"]}
        cache = check(kernel, case, given)
        position += rows


@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_rows_of_a_batch_that_hold_no_sequence_write_to_a_block_of_nobody(kernel: JitFunction) -> None:
    case = for_kernel(kernel, positions=(0, 62, 130, 0))
    given = tensors(case)
    given["block_table"][[0, 3]] = 0
    check(kernel, case, given)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "dlfloat16"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_devices_numbers_are_coarser(kernel: JitFunction, compute_dtype: str) -> None:
    given = arguments(kernel, positions=(100, 30, 62), query_len=2)
    program = compiled(kernel, given)
    exact, coarse = prepared(given), prepared(given)
    for values, dtype in ((exact, "float32"), (coarse, compute_dtype)):
        program.run(*(values[each.name] for each in program.manifest.arguments), compute_dtype=dtype)
    error = (coarse["output"] - exact["output"]).norm() / exact["output"].norm()
    assert 0 < error < 1


def test_the_mask_decides_and_not_the_position() -> None:
    case = for_kernel(attention, positions=(20,), query_len=3)
    given = tensors(case)
    assert not torch.equal(run(attention, given)["output"], run(causal_attention, given)["output"])
    given["mask"] = torch.ones_like(given["mask"])  # later keys and rows that are not written too: these are zeros
    assert bool(run(attention, given)["output"].isfinite().all())


# Sliding window


def windows(history: torch.Tensor, window: int) -> torch.Tensor:
    """The cache after these rows: the last ones, and zeros behind."""
    rows = history[..., -window:, :]
    return torch.nn.functional.pad(rows, (0, 0, 0, window - rows.shape[-2]))


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(
    ("window", "steps"),
    [
        (64, [1] * 3 + [3, 1, 5, 1]),
        (64, [128, 1, 1, 3]),
        (8, [1, 4, 7, 1, 8, 12, 1]),
        (32, [20, 11, 1, 1, 1, 40]),
    ],
)
def test_a_window_over_several_steps(window: int, steps: list[int], head_dim: int) -> None:
    case = Case((0, 0), head_dim=head_dim, partition=window, partitions=1)
    cache, table = (tensors(case)[name] for name in ("kv_cache", "block_table"))
    history = [torch.empty(2, case.heads, 0, head_dim) for _ in range(case.batch)]
    # The second sequence has a history of its own before the first step.
    start = window // 2 + 1
    g = torch.Generator().manual_seed(1)
    cache[:, table[1, 0], :, :, :start] = torch.randn(2, case.heads, 1, start, head_dim, generator=g)
    history[1] = cache[:, table[1, 0], :, 0, :start].clone()
    for step, rows in enumerate(steps):
        given = tensors(Case((0, 0), rows, head_dim=head_dim, partition=window, partitions=1), seed=step)
        before = torch.tensor([[min(each.shape[2], window)] for each in history], dtype=torch.int32)
        given |= {"kv_cache": cache, "block_table": table, "cache_seq_len": before, "cache_offset": before + rows}
        after = run(sliding_window_attention, given)
        expected = cache.clone()
        for b, each in enumerate(history):
            new = torch.stack((given["key"][b, :, 0], given["value"][b, :, 0]))
            history[b] = torch.cat((each, new), dim=2)
            expected[:, table[b, 0], :, 0] = windows(history[b], window)
        attended = partial(windowed, given, history, window)
        agreement = judged(after["output"], attended, window)
        assert agreement.ok, f"step {step}: {agreement}"
        assert_same(after["kv_cache"], expected)
        cache = after["kv_cache"]


def windowed(
    given: dict[str, torch.Tensor], history: list[torch.Tensor], window: int, dtype: torch.dtype
) -> torch.Tensor:
    """Attention of the last rows of each history to the window before each of them."""
    results = []
    for query, (keys, values) in zip(given["query"], history, strict=True):
        new, end = query.shape[-2], keys.shape[-2]
        row, column = torch.arange(end - new, end)[:, None], torch.arange(end)[None, :]
        seen = (column <= row) & (column > row - window)
        operands = (query, keys[:, None], values[:, None], given["qk_scale"])
        results.append(attend(*(each.to(dtype) for each in operands), seen))
    return torch.stack(results)


@pytest.mark.parametrize("rows", [1, 64])
def test_a_window_in_a_prompt_of_one_sequence(rows: int) -> None:
    case = Case((0,), rows, prefill=True, partitions=1)
    given = tensors(case)
    given |= {"cache_seq_len": torch.zeros(1, 1, dtype=torch.int32)}
    given |= {"cache_offset": given["cache_seq_len"] + rows}
    after = run(sliding_window_attention, given)
    agreement = judged(after["output"], lambda dtype: dense(case, given, dtype), case.keys)
    assert agreement.ok, str(agreement)
    expected = given["kv_cache"].clone()
    for part, name in enumerate(("key", "value")):
        expected[part, given["block_table"][0]] = torch.nn.functional.pad(given[name][0], (0, 0, 0, 64 - rows))
    assert_same(after["kv_cache"], expected)


# What the checker says


def arguments(kernel: JitFunction, **given: Any) -> dict[str, torch.Tensor]:
    """Tensors that a kernel takes, aligned."""
    case = for_kernel(kernel, **given)
    found = prepared(tensors(case))
    start = found["seq_idx"][:, :1].contiguous()
    return {**found, "cache_seq_len": start, "cache_offset": start + case.query_len}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_break_no_rule(kernel: JitFunction, name: str) -> None:
    diagnostics = Diagnostics(profile(name))
    check_kernels(kernel.module, diagnostics)
    assert diagnostics.all == ()
    assert diagnostics.ignored == 0
    steps = ({"positions": (3, 64, 150)}, {"positions": (64,), "query_len": 64, "prefill": True})
    for step in (*steps, {"positions": (3, 70), "query_len": 3}):
        program = compiled(kernel, arguments(kernel, **step), profile=name)
        assert program.diagnostics == ()
        assert program.manifest.host_layout == (1, 2, 3)


ORDER = {
    "attention": "query key value kv_cache mask output seq_idx qk_scale block_table dummy",
    "causal_attention": "query key value kv_cache output seq_idx qk_scale block_table dummy",
    "flash_attention": "query key value kv_cache mask output qk_scale seq_idx block_table dummy",
    "flash_causal_attention": "query key value kv_cache output qk_scale seq_idx block_table dummy",
    "sliding_window_attention": (
        "query key value kv_cache output cache_seq_len cache_offset qk_scale block_table dummy"
    ),
}
"""The tensors in the order in which the device's compiler matches them with those of the operator."""

ROLES = {"output": "out", "kv_cache": "inout", "qk_scale": "scalar", "dummy": "unused"} | dict.fromkeys(
    ("seq_idx", "block_table", "cache_seq_len", "cache_offset"), "index"
)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_order_and_roles_of_the_tensors(kernel: JitFunction) -> None:
    program = compiled(kernel, arguments(kernel, positions=(3,)))
    names = ORDER[kernel.name].split()
    assert [each.name for each in program.manifest.arguments] == names == kernel.arg_names[: len(names)]
    roles = [ROLES.get(name, "in") for name in names]
    assert [each.role for each in program.manifest.arguments] == roles
    told = interface(kernel.node, kernel.scope, Diagnostics(profile()))  # without sizes
    assert [(each.name, each.role) for each in told] == list(zip(names, roles, strict=True))
    assert set(program.manifest.constexprs) <= set(sizes(arguments(kernel, positions=(3,))))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_program_that_is_read_again_computes_the_same(kernel: JitFunction) -> None:
    results = []
    for reread in (False, True):
        given = arguments(kernel, positions=(3, 5), query_len=2)
        program = compiled(kernel, given)
        if reread:
            program = Program(parse_program(program.text, program.name), program.manifest)
        program.run(*(given[each.name] for each in program.manifest.arguments))
        results.append((given["output"], given["kv_cache"]))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_function_that_a_kernel_calls_is_of_the_language(kernel: JitFunction) -> None:
    for node in ast.walk(kernel.node):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called.startswith(("tl.", "rblib.")) or called.endswith(".cast"), called


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_table_of_one_dimension_is_that_of_one_sequence(kernel: JitFunction) -> None:
    given = arguments(kernel, positions=(3, 5))
    given["block_table"] = given["block_table"][0].clone()
    with pytest.raises(NpuKernelError, match="that of one sequence"):
        compiled(kernel, given)


@pytest.mark.parametrize("name", ["seq_idx", "block_table"])
@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_tables_of_64_bits_are_refused(kernel: JitFunction, name: str) -> None:
    given = arguments(kernel, positions=(3,))
    given[name] = given[name].to(torch.int64)
    assert codes(kernel, given) == {"INDEX_DTYPE"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_cache_of_16_bits_is_refused(kernel: JitFunction) -> None:
    given = arguments(kernel, positions=(3,))
    given["kv_cache"] = given["kv_cache"].half()
    assert codes(kernel, given) == {"DTYPE"}


@pytest.mark.parametrize("kernel", FLASH, ids=lambda kernel: kernel.name)
def test_flash_attention_has_partitions(kernel: JitFunction) -> None:
    assert codes(kernel, prepared(tensors(Case((3,), partitions=1)))) == {"PARTITION_DIV"}


def codes(kernel: JitFunction, given: dict[str, torch.Tensor]) -> set[str]:
    """The codes of the errors that a kernel is not compiled for."""
    with pytest.raises(NpuKernelError) as raised:
        compiled(kernel, given)
    return {each.code for each in raised.value.diagnostics if each.severity == "error"}


# What stops a run


@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_rows_that_do_not_fit_into_their_partition(kernel: JitFunction) -> None:
    case = for_kernel(kernel, positions=(62,), query_len=3)
    with pytest.raises(NpuRunError, match=r"3 rows from 62 on .* 1 would be lost") as raised:
        run(kernel, tensors(case))
    assert raised.value.code == "STRADDLE"


@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_what_stops_a_run_says_where(kernel: JitFunction) -> None:
    with pytest.raises(NpuRunError) as raised:
        run(kernel, tensors(for_kernel(kernel, positions=(62,), query_len=3)))
    path, line, *_ = str(raised.value).split(":")
    assert kernel.module.source.path.endswith(path)
    assert "rblib.insert" in kernel.module.source.line(int(line))


@pytest.mark.parametrize("kernel", PAGED, ids=lambda kernel: kernel.name)
def test_rows_behind_the_last_partition(kernel: JitFunction) -> None:
    case = for_kernel(kernel, positions=(0,))
    given = tensors(case)
    given["seq_idx"].fill_(case.partition)
    with pytest.raises(NpuRunError, match="every partition is full") as raised:
        run(kernel, given)
    assert raised.value.code == "STRADDLE"


@pytest.mark.parametrize("number", [-1, 10**6])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_block_that_does_not_exist(kernel: JitFunction, number: int) -> None:
    given = arguments(kernel, positions=(3, 4))
    given["block_table"][1, 0] = number
    with pytest.raises(NpuRunError, match=f"block {number} of dimension 1 of 'kv_cache'") as raised:
        run(kernel, given)
    assert raised.value.code == "BLOCK_NUMBER"


def test_tensors_of_another_shape() -> None:
    given = arguments(causal_attention, positions=(3,))
    program = compiled(causal_attention, given)
    given["kv_cache"] = given["kv_cache"][:, :-1].contiguous()
    with pytest.raises(ArgumentError, match="kv_cache"):
        program.run(*(given[name] for name in ORDER["causal_attention"].split()))


# A cache that a kernel describes wrongly, as released kernels do: as if it had a block for each sequence


@jit
def append(
    key,
    kv_cache,
    seq_idx,
    block_table,
    NUM_BATCH: tl.constexpr,
    NUM_HEAD: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTITION_SIZE: tl.constexpr,
):
    PARTITION: tl.constexpr = PARTITION_SIZE * HEAD_DIM
    SEQUENCES: tl.constexpr = NUM_BATCH * NUM_HEAD * PARTITION
    for batch in tl.static_range(NUM_BATCH):
        key_ptr = tl.make_block_ptr(
            base=key,
            shape=(NUM_BATCH, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM),
            strides=(NUM_HEAD * QUERY_LEN * HEAD_DIM, QUERY_LEN * HEAD_DIM, QUERY_LEN * HEAD_DIM, HEAD_DIM, 1),
            offsets=(batch, 0, 0, 0, 0),
            block_shape=(1, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM),
            order=(4, 3, 2, 1, 0),
        )
        count_ptr = tl.make_block_ptr(seq_idx, (NUM_BATCH, 1), (1, 1), (batch, 0), (1, 1), (1, 0))
        table_ptr = tl.make_block_ptr(block_table, (NUM_BATCH, 1), (1, 1), (batch, 0), (1, 1), (1, 0))
        count, block_number = rblib.to_dynamic_index(count_ptr), rblib.to_dynamic_index(table_ptr)
        cache_ptr = tl.make_block_ptr(
            base=kv_cache,
            shape=(2, NUM_BATCH, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM),
            strides=(2 * SEQUENCES, SEQUENCES, PARTITION, PARTITION, HEAD_DIM, 1),
            offsets=(1, block_number, 0, 0, 0, 0),
            block_shape=(1, 1, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM),
            order=(5, 4, 3, 2, 1, 0),
        )
        new = tl.reshape(tl.load(key_ptr), (1, 1, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM))
        rows = rblib.insert(rblib.dynamic_load(cache_ptr, 4, count), new, 4, count)
        rblib.dynamic_store(cache_ptr, rows, 4, count + QUERY_LEN)


@pytest.mark.parametrize("name", ["hw-0.10.3", "hw-0.11.1"])
def test_wrong_strides_are_reported_and_ignored(name: str) -> None:
    given = arguments(causal_attention, positions=(3, 40))
    before = given["kv_cache"].clone()
    program = compiled(append, given, profile=name)
    assert {(each.code, each.severity) for each in program.diagnostics} == {("STRIDE_MISMATCH", "warning")}
    assert all("make_block_ptr" in append.module.source.line(each.span.line) for each in program.diagnostics)
    program.run(*(given[each] for each in append.arg_names if each in given))
    for b, count in enumerate((3, 40)):
        before[1, given["block_table"][b, 0], :, :, count] = given["key"][b, :, :, 0]
    assert_same(given["kv_cache"], before)


def test_wrong_strides_are_an_error_by_the_documentation() -> None:
    with pytest.raises(NpuKernelError, match="STRIDE_MISMATCH"):
        compiled(append, arguments(causal_attention, positions=(3, 40)), profile="doc")


def test_the_cases_hold_what_they_say() -> None:
    case = Case((70,), partitions=2)
    given = tensors(case)
    assert given["seq_idx"].tolist() == [[64, 6]]
    block = given["kv_cache"][:, given["block_table"][0, 1]]
    assert bool(block[..., 6:, :].isnan().all())
    assert not bool(block[..., :6, :].isnan().any())


def test_a_cache_with_its_blocks_first() -> None:
    for name, operator in OPERATORS.items():
        kernel = operator.kernel
        assert isinstance(kernel, JitFunction)
        prefill = name.endswith("prefill")
        given = arguments(kernel, positions=(37,) if prefill else (37, 5), prefill=prefill)
        swapped = {key: each.clone() for key, each in given.items()}
        swapped["kv_cache"] = swapped["kv_cache"].transpose(0, 1).contiguous()
        result = operator(*(given[each] for each in operator.inputs))
        other = BLOCKS_FIRST_OPERATORS[name]
        assert_same(other(*(swapped[each] for each in other.inputs)), result)
        assert_same(swapped["kv_cache"].transpose(0, 1), given["kv_cache"])
