"""Small kernels that the tests of the device file and of the hand-off make operators of."""

from tilewright.npu import jit, rblib
from tilewright.npu import language as lang
from tilewright.npu.language import constexpr, float32
from tilewright.npu.language import zeros as cleared

FACTOR = 1.5
TURNED = constexpr((0, 2, 1))
ORDER = (2, 1, 0)
START = float("-inf")
WIDE = float32


@jit
def scaled(x):
    return x * FACTOR


@jit
def add_scaled(x, y, out, BATCH: lang.constexpr, ROWS: lang.constexpr, COLUMNS: lang.constexpr):
    """x + FACTOR * y."""
    x_ptr = lang.make_block_ptr(
        base=x,
        shape=(BATCH, ROWS, COLUMNS),
        strides=(ROWS * COLUMNS, COLUMNS, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, ROWS, COLUMNS),
        order=ORDER,
    )
    y_ptr = lang.make_block_ptr(
        base=y,
        shape=(BATCH, ROWS, COLUMNS),
        strides=(ROWS * COLUMNS, COLUMNS, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, ROWS, COLUMNS),
        order=ORDER,
    )
    out_ptr = lang.make_block_ptr(
        base=out,
        shape=(BATCH, ROWS, COLUMNS),
        strides=(ROWS * COLUMNS, COLUMNS, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, ROWS, COLUMNS),
        order=ORDER,
    )
    lang.store(out_ptr, lang.load(x_ptr) + scaled(lang.load(y_ptr)))  # in the units of x


@jit
def product_and_peak(
    a, INNER: constexpr, b, product, ROWS: constexpr, peak, COLUMNS: constexpr, SCALE: lang.constexpr = 2.0
):
    """a @ b, and how far each number of a lies below its row's peak."""
    a_ptr = lang.make_block_ptr(a, (1, ROWS, INNER), (ROWS * INNER, INNER, 1), (0, 0, 0), (1, ROWS, INNER), ORDER)
    b_ptr = lang.make_block_ptr(
        b, (1, COLUMNS, INNER), (COLUMNS * INNER, INNER, 1), (0, 0, 0), (1, COLUMNS, INNER), ORDER
    )
    product_ptr = lang.make_block_ptr(
        product, (1, ROWS, COLUMNS), (ROWS * COLUMNS, COLUMNS, 1), (0, 0, 0), (1, ROWS, COLUMNS), ORDER
    )
    peak_ptr = lang.make_block_ptr(peak, (1, ROWS, INNER), (ROWS * INNER, INNER, 1), (0, 0, 0), (1, ROWS, INNER), ORDER)
    rows = lang.load(a_ptr)
    state = cleared([1, ROWS, INNER], dtype=WIDE)
    for step in lang.static_range(2):
        state = rows if step == 0 else lang.max(state, axis=2, keep_dims=True) - rows
    lang.store(peak_ptr, state)
    lang.store(product_ptr, lang.dot(rows, lang.permute(lang.load(b_ptr), TURNED)) * SCALE)


@jit
def attend_rows(
    rows,
    cache,
    counts,
    block_table,
    out,
    scale,
    BLOCKS: lang.constexpr,
    PARTITION: lang.constexpr,
    ROWS: lang.constexpr,
    WIDTH: lang.constexpr,
):
    """Write rows into a block of the cache, and attend to all that are there."""
    rows_ptr = lang.make_block_ptr(
        rows, (1, ROWS, WIDTH), (ROWS * WIDTH, WIDTH, 1), (0, 0, 0), (1, ROWS, WIDTH), (2, 1, 0)
    )
    out_ptr = lang.make_block_ptr(
        out, (1, ROWS, WIDTH), (ROWS * WIDTH, WIDTH, 1), (0, 0, 0), (1, ROWS, WIDTH), (2, 1, 0)
    )
    count_ptr = lang.make_block_ptr(counts, (1, 1), (1, 1), (0, 0), (1, 1), (1, 0))
    count = rblib.to_dynamic_index(count_ptr, PARTITION).cast(lang.int32)
    block = rblib.to_dynamic_index(lang.make_block_ptr(block_table, (1,), (1,), (0,), (1,), (0,))).cast(lang.int32)
    cache_ptr = lang.make_block_ptr(
        base=cache,
        shape=(BLOCKS, PARTITION, WIDTH),
        strides=(PARTITION * WIDTH, WIDTH, 1),
        offsets=(block, 0, 0),
        block_shape=(1, PARTITION, WIDTH),
        order=(2, 1, 0),
    )
    new = lang.load(rows_ptr)
    whole = rblib.insert(rblib.dynamic_load(cache_ptr, 1, count), new, 1, count)
    rblib.dynamic_store(cache_ptr, whole, 1, count + ROWS)
    scores = lang.dot(new, lang.permute(whole, (0, 2, 1))) * scale
    lang.store(out_ptr, lang.dot(rblib.dynamic_masked_softmax(scores, count), whole))


@jit
def doubtful(x, out, ROWS: lang.constexpr, COLUMNS: lang.constexpr):
    """Functions that are documented, and that a release was seen to fail on."""
    x_ptr = lang.make_block_ptr(x, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    out_ptr = lang.make_block_ptr(out, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    numbers = lang.load(x_ptr)
    powers = lang.exp2(numbers)
    chances = lang.sigmoid(powers)
    least = lang.min(chances, axis=1, keep_dims=True)
    larger = lang.where(numbers > chances, numbers, chances)
    lang.store(out_ptr, larger - least)


@jit
def refused(x, out, ROWS: lang.constexpr, COLUMNS: lang.constexpr):
    """Functions that no release has; the checker was told to leave them to the compiler."""
    x_ptr = lang.make_block_ptr(x, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    out_ptr = lang.make_block_ptr(out, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    numbers = lang.load(x_ptr)
    roots = lang.sqrt_rn(numbers)  # npu: ignore[UNSUPPORTED_OP]
    shares = lang.div_rn(numbers, roots)  # npu: ignore[UNSUPPORTED_OP]
    bits = numbers.to(lang.int32, bitcast=True)  # npu: ignore
    lang.store(out_ptr, shares + bits)


@jit
def copied(numbers, table, out, ROWS: lang.constexpr, COLUMNS: lang.constexpr):
    """A copy of data that is not float32, which the checker was told to leave to the compiler."""
    numbers_ptr = lang.make_block_ptr(numbers, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    table_ptr = lang.make_block_ptr(  # npu: ignore[DTYPE]
        table, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0)
    )
    out_ptr = lang.make_block_ptr(  # npu: ignore[DTYPE]
        out, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0)
    )
    lang.store(numbers_ptr, lang.load(numbers_ptr) * 2.0)
    lang.store(out_ptr, lang.load(table_ptr))


def with_width(width):
    """A kernel that stands in a function, and takes a number from around it."""

    @jit
    def widened(x, out, ROWS: lang.constexpr, COLUMNS: lang.constexpr):
        x_ptr = lang.make_block_ptr(x, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
        out_ptr = lang.make_block_ptr(out, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
        lang.store(out_ptr, lang.maximum(lang.load(x_ptr), START) * width)

    return widened
