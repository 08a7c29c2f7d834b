"""Attention over a paged cache in several partitions under a given mask, the cache's update included.

For each sequence, with ``c[p]`` rows of partition ``p`` in the cache already:

    K, V = the sequence's rows of the cache, the new ones written behind them
    output[i] = sum over j with mask[i, j] > 0 of softmax_j(qk_scale * query[i] . K[j]) V[j]

The softmax is computed partition by partition. With the scores ``x`` of one partition, hidden where the mask is zero,
and ``m``, ``s``, ``o`` of those before it:

    m' = max(m, rowmax(x))        e = exp(x - m')        a = exp(m - m')
    s' = a s + rowsum(e)          o' = a o + e V         output = o / s in the end

Partitions behind the one that is written are skipped, whatever the mask says of them; of the first one every query has
to see a key. All tensors are contiguous:

    query, output   (NUM_BATCH, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM)        NUM_HEAD heads of keys and values
    key, value      (NUM_BATCH, NUM_HEAD, 1, QUERY_LEN, HEAD_DIM)                the new rows
    kv_cache        (2, NUM_BLOCK, NUM_HEAD, 1, PARTITION_SIZE, HEAD_DIM)        keys, then values; changed in place
    mask            (NUM_BATCH, 1, 1, QUERY_LEN, NUM_PARTITION * PARTITION_SIZE) 1 where a key is visible, else 0
    qk_scale        ()
    seq_idx         (NUM_BATCH, NUM_PARTITION) int32                             c
    block_table     (NUM_PARTITION,) int32 for one sequence (prefill), (NUM_BATCH, NUM_PARTITION) for several (decode)

``DIM_BLOCK_TABLE`` is the rank of ``block_table``; where ``BLOCKS_FIRST``, the first two dimensions of ``kv_cache``
change places; ``dummy`` is not read. The new rows lie in one partition.
"""

from tilewright.npu import jit, rblib
from tilewright.npu import language as tl


@jit
def flash_attention(
    query,
    key,
    value,
    kv_cache,
    mask,
    output,
    qk_scale,
    seq_idx,
    block_table,
    dummy,
    NUM_BATCH: tl.constexpr,
    NUM_HEAD: tl.constexpr,
    NUM_GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_BLOCK: tl.constexpr,
    PARTITION_SIZE: tl.constexpr,
    NUM_PARTITION: tl.constexpr,
    DIM_BLOCK_TABLE: tl.constexpr,
    BLOCKS_FIRST: tl.constexpr,
):
    """Masked attention of new queries, partition by partition."""
    ROW_AXIS: tl.constexpr = 4  # along which the rows of a cache block lie
    ROWS: tl.constexpr = QUERY_LEN * HEAD_DIM  # elements of one head's new rows
    PARTITION: tl.constexpr = PARTITION_SIZE * HEAD_DIM  # elements of one head's partition
    HEADS: tl.constexpr = NUM_HEAD * PARTITION  # elements of one block's keys, or values
    MASK: tl.constexpr = QUERY_LEN * NUM_PARTITION * PARTITION_SIZE  # elements of one sequence's mask

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

        # The first partition, which is never skipped, replaces these.
        row_max = tl.zeros((1, NUM_HEAD, NUM_GROUP, QUERY_LEN, 1), dtype=tl.float32)
        row_sum = tl.zeros((1, NUM_HEAD, NUM_GROUP, QUERY_LEN, 1), dtype=tl.float32)
        weighted = tl.zeros((1, NUM_HEAD, NUM_GROUP, QUERY_LEN, HEAD_DIM), dtype=tl.float32)

        for partition in tl.static_range(NUM_PARTITION):
            count_ptr = tl.make_block_ptr(
                base=seq_idx,
                shape=(NUM_BATCH, NUM_PARTITION),
                strides=(NUM_PARTITION, 1),
                offsets=(batch, partition),
                block_shape=(1, 1),
                order=(1, 0),
            )
            count = rblib.to_dynamic_index(count_ptr, PARTITION_SIZE).cast(tl.int32)
            if DIM_BLOCK_TABLE == 1:
                tl.static_assert(NUM_BATCH == 1, "a block table of one dimension is that of one sequence")
                table_ptr = tl.make_block_ptr(
                    base=block_table,
                    shape=(NUM_PARTITION,),
                    strides=(1,),
                    offsets=(partition,),
                    block_shape=(1,),
                    order=(0,),
                )
                block_number = rblib.to_dynamic_index(table_ptr).cast(tl.int32)
            else:
                table_ptr = tl.make_block_ptr(
                    base=block_table,
                    shape=(NUM_BATCH, NUM_PARTITION),
                    strides=(NUM_PARTITION, 1),
                    offsets=(batch, partition),
                    block_shape=(1, 1),
                    order=(1, 0),
                )
                block_number = rblib.to_dynamic_index(table_ptr).cast(tl.int32)

            if rblib.partition_skip(count) == False:  # noqa: E712 - the one form that the compiler knows
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
                mask_ptr = tl.make_block_ptr(
                    base=mask,
                    shape=(NUM_BATCH, 1, 1, QUERY_LEN, NUM_PARTITION * PARTITION_SIZE),
                    strides=(MASK, MASK, MASK, NUM_PARTITION * PARTITION_SIZE, 1),
                    offsets=(batch, 0, 0, 0, partition * PARTITION_SIZE),
                    block_shape=(1, 1, 1, QUERY_LEN, PARTITION_SIZE),
                    order=(4, 3, 2, 1, 0),
                )
                # A full partition takes no row: the new ones go to the one behind it.
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
                visible = tl.load(mask_ptr)
                if partition == 0:
                    row_max, weights, row_sum = rblib.flash_attn_tile(scores, visible)
                    weighted = tl.dot(weights, v)
                else:
                    new_max, weights, new_sum = rblib.flash_attn_tile(scores, visible, row_max)
                    row_sum, weighted = rblib.flash_attn_recompute(
                        row_max, new_max, row_sum, new_sum, weighted, tl.dot(weights, v)
                    )
                    row_max = new_max

        tl.store(output_ptr, weighted / row_sum)
