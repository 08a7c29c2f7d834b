"""Attention over a rolling cache of the last rows, the cache's update included.

For each sequence, with ``start`` rows in its block of the cache already:

    K, V = the block's first start rows, and the new ones behind them: end = start + QUERY_LEN rows
    output[i] = sum over j in (start + i - WINDOW_SIZE, start + i] of softmax_j(qk_scale * query[i] . K[j]) V[j]
    block = the last WINDOW_SIZE of the end rows; all of them, and zeros behind, while there are fewer

All tensors are contiguous:

    query, output   (NUM_BATCH, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM)    NUM_HEAD heads of keys and values
    key, value      (NUM_BATCH, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM)            the new rows
    kv_cache        (2, NUM_BLOCK, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM)       keys, then values; changed in place
    cache_seq_len   (NUM_BATCH, 1) int32                                     start: the rows so far, WINDOW_SIZE at most
    cache_offset    (NUM_BATCH, 1) int32                                     end
    qk_scale        ()
    block_table     (1,) int32 for one sequence (prefill), (NUM_BATCH, 1) for several (decode)

``DIM_BLOCK_TABLE`` is the rank of ``block_table``; where ``BLOCKS_FIRST``, the first two dimensions of ``kv_cache``
change places; ``dummy`` is not read.
"""

from tilewright.npu import jit, rblib
from tilewright.npu import language as tl


@jit
def sliding_window_attention(
    query,
    key,
    value,
    kv_cache,
    output,
    cache_seq_len,
    cache_offset,
    qk_scale,
    block_table,
    dummy,
    NUM_BATCH: tl.constexpr,
    NUM_HEAD: tl.constexpr,
    NUM_GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_BLOCK: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    DIM_BLOCK_TABLE: tl.constexpr,
    BLOCKS_FIRST: tl.constexpr,
):
    """Attention of new queries to the window before each of them."""
    ROW_AXIS: tl.constexpr = 4  # along which the rows of a cache block lie
    ROWS: tl.constexpr = QUERY_LEN * HEAD_DIM  # elements of one head's new rows
    WINDOW: tl.constexpr = WINDOW_SIZE * HEAD_DIM  # elements of one head's window
    HEADS: tl.constexpr = NUM_HEAD * WINDOW  # elements of one block's keys, or values
    PAD: tl.constexpr = -(WINDOW_SIZE + QUERY_LEN) % 64  # what the scores' last dimension lacks to a multiple of 64
    NUM_KEY: tl.constexpr = WINDOW_SIZE + QUERY_LEN + PAD

    for batch in tl.static_range(NUM_BATCH):
        query_ptr = tl.make_block_ptr(
            base=query,
            shape=(NUM_BATCH, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM),
            strides=(NUM_HEAD * NUM_GROUP * ROWS, NUM_GROUP * ROWS, ROWS, HEAD_DIM, 1),
            offsets=(batch, 0, 0, 0, 0),
            block_shape=(1, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM),
            order=(4, 3, 2, 1, 0),
        )
        key_ptr = tl.make_block_ptr(
            base=key,
            shape=(NUM_BATCH, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM),
            strides=(NUM_HEAD * ROWS, ROWS, ROWS, HEAD_DIM, 1),
            offsets=(batch, 0, 0, 0, 0),
            block_shape=(1, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM),
            order=(4, 3, 2, 1, 0),
        )
        value_ptr = tl.make_block_ptr(
            base=value,
            shape=(NUM_BATCH, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM),
            strides=(NUM_HEAD * ROWS, ROWS, ROWS, HEAD_DIM, 1),
            offsets=(batch, 0, 0, 0, 0),
            block_shape=(1, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM),
            order=(4, 3, 2, 1, 0),
        )
        output_ptr = tl.make_block_ptr(
            base=output,
            shape=(NUM_BATCH, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM),
            strides=(NUM_HEAD * NUM_GROUP * ROWS, NUM_GROUP * ROWS, ROWS, HEAD_DIM, 1),
            offsets=(batch, 0, 0, 0, 0),
            block_shape=(1, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM),
            order=(4, 3, 2, 1, 0),
        )
        q = tl.load(query_ptr)
        k_new = tl.reshape(tl.load(key_ptr), (1, 1, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM))
        v_new = tl.reshape(tl.load(value_ptr), (1, 1, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM))

        start_ptr = tl.make_block_ptr(
            base=cache_seq_len,
            shape=(NUM_BATCH, 1),
            strides=(1, 1),
            offsets=(batch, 0),
            block_shape=(1, 1),
            order=(1, 0),
        )
        end_ptr = tl.make_block_ptr(
            base=cache_offset,
            shape=(NUM_BATCH, 1),
            strides=(1, 1),
            offsets=(batch, 0),
            block_shape=(1, 1),
            order=(1, 0),
        )
        start = rblib.to_dynamic_index(start_ptr)
        end = rblib.to_dynamic_index(end_ptr)
        if DIM_BLOCK_TABLE == 1:
            tl.static_assert(NUM_BATCH == 1, "a block table of one dimension is that of one sequence")
            table_ptr = tl.make_block_ptr(
                base=block_table,
                shape=(1,),
                strides=(1,),
                offsets=(batch,),
                block_shape=(1,),
                order=(0,),
            )
            block_number = rblib.to_dynamic_index(table_ptr).cast(tl.int32)
        else:
            table_ptr = tl.make_block_ptr(
                base=block_table,
                shape=(NUM_BATCH, 1),
                strides=(1, 1),
                offsets=(batch, 0),
                block_shape=(1, 1),
                order=(1, 0),
            )
            block_number = rblib.to_dynamic_index(table_ptr).cast(tl.int32)

        key_cache_ptr = tl.make_block_ptr(
            base=kv_cache,
            shape=(NUM_BLOCK, 2, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM)
            if BLOCKS_FIRST
            else (2, NUM_BLOCK, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM),
            strides=(2 * HEADS, HEADS, WINDOW, WINDOW, HEAD_DIM, 1)
            if BLOCKS_FIRST
            else (NUM_BLOCK * HEADS, HEADS, WINDOW, WINDOW, HEAD_DIM, 1),
            offsets=(block_number, 0, 0, 0, 0, 0) if BLOCKS_FIRST else (0, block_number, 0, 0, 0, 0),
            block_shape=(1, 1, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM),
            order=(5, 4, 3, 2, 1, 0),
        )
        value_cache_ptr = tl.make_block_ptr(
            base=kv_cache,
            shape=(NUM_BLOCK, 2, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM)
            if BLOCKS_FIRST
            else (2, NUM_BLOCK, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM),
            strides=(2 * HEADS, HEADS, WINDOW, WINDOW, HEAD_DIM, 1)
            if BLOCKS_FIRST
            else (NUM_BLOCK * HEADS, HEADS, WINDOW, WINDOW, HEAD_DIM, 1),
            offsets=(block_number, 1, 0, 0, 0, 0) if BLOCKS_FIRST else (1, block_number, 0, 0, 0, 0),
            block_shape=(1, 1, NUM_HEAD, 1, WINDOW_SIZE, HEAD_DIM),
            order=(5, 4, 3, 2, 1, 0),
        )
        keys = rblib.window_insert(rblib.dynamic_load(key_cache_ptr), k_new, ROW_AXIS, start)
        values = rblib.window_insert(rblib.dynamic_load(value_cache_ptr), v_new, ROW_AXIS, start)
        rblib.dynamic_store(key_cache_ptr, rblib.window_slice(keys, end, ROW_AXIS, WINDOW_SIZE))
        rblib.dynamic_store(value_cache_ptr, rblib.window_slice(values, end, ROW_AXIS, WINDOW_SIZE))
        if PAD > 0:  # with rows that lie outside every window
            keys = rblib.nn_pad(keys, 0.0, ROW_AXIS, (0, PAD), "constant")
            values = rblib.nn_pad(values, 0.0, ROW_AXIS, (0, PAD), "constant")

        # Transposed, then repeated for each group: the product fuses this order only.
        k = tl.reshape(keys, (1, NUM_HEAD, 1, NUM_KEY, HEAD_DIM))
        k = tl.broadcast_to(tl.permute(k, (0, 1, 2, 4, 3)), (1, NUM_HEAD, NUM_GROUP, HEAD_DIM, NUM_KEY))
        v = tl.reshape(values, (1, NUM_HEAD, 1, NUM_KEY, HEAD_DIM))
        v = tl.broadcast_to(v, (1, NUM_HEAD, NUM_GROUP, NUM_KEY, HEAD_DIM))

        scores = tl.dot(q, k) * qk_scale
        weights = rblib.window_softmax(scores, start, window_size=WINDOW_SIZE)
        tl.store(output_ptr, tl.dot(weights, v))
