"""Attention over a paged cache where one partition holds a sequence, under a given mask, the cache's update included.

For each sequence, with ``pos`` rows in the cache already:

    K, V = the sequence's block of the cache, the new rows written behind those it has
    output[i] = sum over j with mask[i, j] > 0 of softmax_j(qk_scale * query[i] . K[j]) V[j]

All tensors are contiguous:

    query, output   (NUM_BATCH, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM)    NUM_HEAD heads of keys and values
    key, value      (NUM_BATCH, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM)            the new rows
    kv_cache        (2, NUM_BLOCK, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM)    keys, then values; changed in place
    mask            (NUM_BATCH, 1, 1, QUERY_LEN, PARTITION_SIZE)             1 where a key is visible, else 0
    seq_idx         (NUM_BATCH, 1) int32                                     pos
    qk_scale        ()
    block_table     (1,) int32 for one sequence (prefill), (NUM_BATCH, 1) for several (decode)

``DIM_BLOCK_TABLE`` is the rank of ``block_table``; where ``BLOCKS_FIRST``, the first two dimensions of ``kv_cache``
change places; ``dummy`` is not read.
"""

from tilewright.npu import jit, rblib
from tilewright.npu import language as tl


@jit
def attention(
    query,
    key,
    value,
    kv_cache,
    mask,
    output,
    seq_idx,
    qk_scale,
    block_table,
    dummy,
    NUM_BATCH: tl.constexpr,
    NUM_HEAD: tl.constexpr,
    NUM_GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_BLOCK: tl.constexpr,
    PARTITION_SIZE: tl.constexpr,
    DIM_BLOCK_TABLE: tl.constexpr,
    BLOCKS_FIRST: tl.constexpr,
):
    """Masked attention of new queries."""
    ROW_AXIS: tl.constexpr = 4  # along which the rows of a cache block lie
    ROWS: tl.constexpr = QUERY_LEN * HEAD_DIM  # elements of one head's new rows
    PARTITION: tl.constexpr = PARTITION_SIZE * HEAD_DIM  # elements of one head's partition
    HEADS: tl.constexpr = NUM_HEAD * PARTITION  # elements of one block's keys, or values
    MASK: tl.constexpr = QUERY_LEN * PARTITION_SIZE  # elements of one sequence's mask

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
        mask_ptr = tl.make_block_ptr(
            base=mask,
            shape=(NUM_BATCH, 1, 1, QUERY_LEN, PARTITION_SIZE),
            strides=(MASK, MASK, MASK, PARTITION_SIZE, 1),
            offsets=(batch, 0, 0, 0, 0),
            block_shape=(1, 1, 1, QUERY_LEN, PARTITION_SIZE),
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

        count_ptr = tl.make_block_ptr(
            base=seq_idx,
            shape=(NUM_BATCH, 1),
            strides=(1, 1),
            offsets=(batch, 0),
            block_shape=(1, 1),
            order=(1, 0),
        )
        count = rblib.to_dynamic_index(count_ptr, PARTITION_SIZE).cast(tl.int32)
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
            shape=(NUM_BLOCK, 2, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM)
            if BLOCKS_FIRST
            else (2, NUM_BLOCK, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM),
            strides=(2 * HEADS, HEADS, PARTITION, PARTITION, HEAD_DIM, 1)
            if BLOCKS_FIRST
            else (NUM_BLOCK * HEADS, HEADS, PARTITION, PARTITION, HEAD_DIM, 1),
            offsets=(block_number, 0, 0, 0, 0, 0) if BLOCKS_FIRST else (0, block_number, 0, 0, 0, 0),
            block_shape=(1, 1, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM),
            order=(5, 4, 3, 2, 1, 0),
        )
        value_cache_ptr = tl.make_block_ptr(
            base=kv_cache,
            shape=(NUM_BLOCK, 2, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM)
            if BLOCKS_FIRST
            else (2, NUM_BLOCK, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM),
            strides=(2 * HEADS, HEADS, PARTITION, PARTITION, HEAD_DIM, 1)
            if BLOCKS_FIRST
            else (NUM_BLOCK * HEADS, HEADS, PARTITION, PARTITION, HEAD_DIM, 1),
            offsets=(block_number, 1, 0, 0, 0, 0) if BLOCKS_FIRST else (1, block_number, 0, 0, 0, 0),
            block_shape=(1, 1, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM),
            order=(5, 4, 3, 2, 1, 0),
        )
        keys = rblib.insert(rblib.dynamic_load(key_cache_ptr, ROW_AXIS, count), k_new, ROW_AXIS, count)
        values = rblib.insert(rblib.dynamic_load(value_cache_ptr, ROW_AXIS, count), v_new, ROW_AXIS, count)
        rblib.dynamic_store(key_cache_ptr, keys, ROW_AXIS, count + QUERY_LEN)
        rblib.dynamic_store(value_cache_ptr, values, ROW_AXIS, count + QUERY_LEN)

        # Transposed, then repeated for each group: the product fuses this order only.
        k = tl.reshape(keys, (1, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM))
        k = tl.broadcast_to(tl.permute(k, (0, 1, 2, 4, 3)), (1, NUM_HEAD, NUM_GROUP, HEAD_DIM, PARTITION_SIZE))
        v = tl.reshape(values, (1, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM))
        v = tl.broadcast_to(v, (1, NUM_HEAD, NUM_GROUP, PARTITION_SIZE, HEAD_DIM))

        scores = tl.dot(q, k) * qk_scale
        weights = rblib.masked_softmax(scores, tl.load(mask_ptr))
        tl.store(output_ptr, tl.dot(weights, v))
