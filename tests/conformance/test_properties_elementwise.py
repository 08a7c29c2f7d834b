"""Any size, stride, offset, mask and overlap: an elementwise kernel does what torch does to the same views."""

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.harness import DEVICE, DTYPES, Dtype, assert_equal, random

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
ELEMENTS = st.sampled_from([DTYPES[n] for n in ("int8", "uint8", "int16", "int32", "int64", "float16", "float32")])
BLOCKS = st.sampled_from([1, 2, 16, 64, 128])
PAD = 7  # elements before and after what a kernel may touch, which must survive


def buffer(dtype: Dtype, count: int, seed: int) -> torch.Tensor:
    return random(dtype, count, seed, "cpu")


@triton.jit
def strided_kernel(
    x_ptr, y_ptr, out_ptr, rows, columns,
    stride_x_row, stride_x_column, stride_y_row, stride_y_column, stride_out_row, stride_out_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * stride_x_row + column * stride_x_column, mask)
    y = tl.load(y_ptr + row * stride_y_row + column * stride_y_column, mask)
    tl.store(out_ptr + row * stride_out_row + column * stride_out_column, x - y, mask)


@st.composite
def layouts(draw, rows: int, columns: int, broadcast: bool = True):
    """Strides and an offset of a view whose elements are distinct, or repeated along an axis of stride zero."""
    kind = draw(st.sampled_from(["rows", "columns", *(["repeat row", "repeat column", "one"] if broadcast else [])]))
    step, gap, offset = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(0, 20))
    strides = {
        "rows": (columns * step + gap, step),
        "columns": (step, rows * step + gap),
        "repeat row": (0, step),
        "repeat column": (step, 0),
        "one": (0, 0),
    }[kind]
    return strides, offset


def view(storage_of: Dtype, rows: int, columns: int, layout, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    (row, column), offset = layout
    storage = buffer(storage_of, offset + (rows - 1) * row + (columns - 1) * column + 1 + PAD, seed).to(DEVICE)
    return storage, storage.as_strided((rows, columns), (row, column), offset)


@SETTINGS
@given(st.data())
def test_strided_views(data) -> None:
    dtype, rows, columns = data.draw(ELEMENTS), data.draw(st.integers(1, 33)), data.draw(st.integers(1, 40))
    _, x = view(dtype, rows, columns, data.draw(layouts(rows, columns)), 1)
    _, y = view(dtype, rows, columns, data.draw(layouts(rows, columns)), 2)
    storage, out = view(dtype, rows, columns, data.draw(layouts(rows, columns, broadcast=False)), 3)
    block_m, block_n = data.draw(BLOCKS), data.draw(st.sampled_from([4, 16, 64]))
    expected = storage.cpu().clone()
    expected.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(x.cpu() - y.cpu())
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))
    strided_kernel[grid](
        x, y, out, rows, columns, *x.stride(), *y.stride(), *out.stride(), BLOCK_M=block_m, BLOCK_N=block_n
    )
    assert_equal(storage, expected)


@triton.jit
def masked_kernel(x_ptr, chosen_ptr, out_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    chosen = tl.load(chosen_ptr + offsets, inside, other=0) != 0
    x = tl.load(x_ptr + offsets, inside & chosen, other=OTHER)
    tl.store(out_ptr + offsets, x + 1, inside)
    tl.store(out_ptr + n + offsets, x, inside & ~chosen)  # the rest keeps what was there


@SETTINGS
@given(ELEMENTS, st.integers(1, 300), BLOCKS, st.integers(0, 2**16), st.integers(0, 9))
def test_masks(dtype: Dtype, n: int, block: int, seed: int, offset: int) -> None:
    x = buffer(dtype, offset + n, seed).to(DEVICE)[offset:]
    chosen = random(DTYPES["bool"], n, seed + 1)
    out = buffer(dtype, 2 * n + PAD, seed + 2).to(DEVICE)
    expected = out.cpu().clone()
    masked_kernel[(triton.cdiv(n, block),)](x, chosen, out, n, OTHER=3, BLOCK=block)
    taken = torch.where(chosen, x, torch.full_like(x, 3)).cpu()
    expected[:n] = taken + 1
    expected[n : 2 * n][~chosen.cpu()] = 3
    assert_equal(out, expected)


@SETTINGS
@given(ELEMENTS, st.integers(1, 200), BLOCKS, st.integers(0, 2**16))
def test_masked_off_addresses_are_not_touched(dtype: Dtype, n: int, block: int, seed: int) -> None:
    """More programs than elements: those past the end load and store nothing."""
    x = buffer(dtype, n, seed).to(DEVICE)
    out = buffer(dtype, n + PAD, seed + 1).to(DEVICE)
    expected = torch.cat([x + 1, out[n:]])
    add_one_kernel[(triton.cdiv(n, block) + 3,)](x, out, n, BLOCK=block)
    assert_equal(out, expected)


@triton.jit
def add_one_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, offsets < n) + 1, offsets < n)


@SETTINGS
@given(ELEMENTS, st.integers(1, 300), BLOCKS, st.integers(0, 2**16), st.integers(0, 9))
def test_in_place(dtype: Dtype, n: int, block: int, seed: int, offset: int) -> None:
    storage = buffer(dtype, offset + n + PAD, seed).to(DEVICE)
    expected = storage.clone()
    expected[offset : offset + n] += 1
    x = storage[offset : offset + n]
    add_one_kernel[(triton.cdiv(n, block),)](x, x, n, BLOCK=block)
    assert_equal(storage, expected)


@SETTINGS
@given(ELEMENTS, st.integers(1, 4), BLOCKS, st.integers(0, 2**16), st.booleans())
def test_output_is_the_input_shifted_by_its_length(
    dtype: Dtype, blocks: int, block: int, seed: int, forward: bool
) -> None:
    """Two arguments in one storage that touch and do not overlap."""
    n = blocks * block
    storage = buffer(dtype, 2 * n, seed).to(DEVICE)
    x, out = (storage[:n], storage[n:]) if forward else (storage[n:], storage[:n])
    kept = x.clone()
    add_one_kernel[(blocks,)](x, out, n, BLOCK=block)
    assert_equal(x, kept)
    assert_equal(out, kept + 1)


@triton.jit
def shift_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + offsets, start + offsets < n)
        tl.store(out_ptr + start + offsets, x + 1, start + offsets < n)


@SETTINGS
@given(ELEMENTS, st.integers(1, 6), st.sampled_from([16, 64]), st.integers(1, 2), st.integers(0, 2**16))
def test_one_program_over_its_own_output(dtype: Dtype, blocks: int, block: int, shift: int, seed: int) -> None:
    """The output is the input shifted by whole blocks: a later block reads what an earlier one wrote."""
    n, ahead = blocks * block, shift * block
    storage = buffer(dtype, n + ahead, seed).to(DEVICE)
    expected = storage.clone()
    for start in range(0, n, block):
        expected[start + ahead : start + ahead + block] = expected[start : start + block] + 1
    shift_kernel[(1,)](storage, storage[ahead:], n, BLOCK=block)
    assert_equal(storage, expected)


@triton.jit
def broadcast_kernel(x_ptr, y_ptr, z_ptr, out_ptr, scalar, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    a, b, c = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    x = tl.load(x_ptr + a)
    y = tl.load(y_ptr + b * C + c)
    z = tl.load(z_ptr + tl.arange(0, C))
    tl.store(out_ptr + (a * B + b) * C + c, (x + y) * z[None, None, :] + scalar)


@SETTINGS
@given(*[st.sampled_from([1, 2, 4, 8, 16])] * 3, st.integers(-3, 3), st.integers(0, 2**16))
def test_broadcasting(a: int, b: int, c: int, scalar: int, seed: int) -> None:
    dtype = DTYPES["int32"]
    x, y, z = buffer(dtype, a, seed), buffer(dtype, b * c, seed + 1).reshape(b, c), buffer(dtype, c, seed + 2)
    out = torch.empty(a, b, c, dtype=torch.int32, device=DEVICE)
    broadcast_kernel[(1,)](x.to(DEVICE), y.to(DEVICE), z.to(DEVICE), out, scalar, A=a, B=b, C=c)
    assert_equal(out, (x[:, None, None] + y) * z + scalar)
