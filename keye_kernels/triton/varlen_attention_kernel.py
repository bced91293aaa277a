"""The kernel of packed attention: online softmax of one tile of queries over the keys of its segment.

Scores are in base 2: exp(x) = exp2(x * log2(e)), and log2(e) is part of `scale`. Online softmax: Milakov and Gimelshein 2018,
arXiv:1805.02867. Tiling: Dao 2023, arXiv:2307.08691.
"""

import math

import triton
import triton.language as tl

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _find_tile(cu_seqlens_ptr, num_segments, num_tokens, tile, BLOCK_M: tl.constexpr):
    """First token and length of the segment of a tile, and the tile's first query, by binary search on the device.

    The tiles of segment s start at index cu_seqlens[s] // BLOCK_M + s. This leaves room for all of them without a prefix sum of
    tile counts. A tile without work starts at or past its segment's end, or before its start.
    """
    # Empty segments at the end (a padded batch) are found with one load.
    last = tile - num_tokens // BLOCK_M
    in_range = (last >= 0) & (last < num_segments)
    is_padding = tl.load(cu_seqlens_ptr + last, mask=in_range, other=-1) >= num_tokens
    low, high = tl.where(is_padding, last, 0), tl.where(is_padding, last + 1, num_segments)
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(cu_seqlens_ptr + middle) // BLOCK_M + middle <= tile
        low, high = tl.where(is_before, middle, low), tl.where(is_before, high, middle)
    start = tl.load(cu_seqlens_ptr + low)
    end = tl.load(cu_seqlens_ptr + low + 1)
    first_query = (tile - start // BLOCK_M - low) * BLOCK_M
    # Offsets outside of the tensors are clamped: a wrong cu_seqlens gives wrong results, but accesses no other memory.
    first_token = tl.minimum(tl.maximum(start, 0), num_tokens)
    return first_token, tl.minimum(end, num_tokens) - first_token, first_query


@triton.jit
def _load_rows(ptr, o_row, o_d, num_rows, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
               MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr):  # fmt: skip
    """[len(o_row), len(o_d)] of one head; zeros from row `num_rows` on and past HEAD_DIM."""
    if STRIDE >= 2**24:  # 128 rows exceed 32-bit offsets
        p_x = ptr + (o_row.to(tl.int64)[:, None] * STRIDE + o_d[None, :])
    else:
        p_x = ptr + (o_row[:, None] * STRIDE + o_d[None, :])
    if MASK_ROWS and MASK_D:
        return tl.load(p_x, mask=(o_row < num_rows)[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(p_x, mask=(o_row < num_rows)[:, None], other=0.0)
    elif MASK_D:
        return tl.load(p_x, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def _load_keys(desc, token, head, ptr, o_row, o_d, num_rows, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
               MASK_ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """WIDTH channels from FIRST on of keys or values, through a descriptor (zeros past the end) or with `_load_rows`."""
    if desc is not None:
        return desc.load([token, head, FIRST]).reshape(o_row.shape[0], WIDTH)
    else:
        return _load_rows(ptr, o_row, o_d, num_rows, STRIDE, HEAD_DIM, MASK_ROWS, HEAD_DIM < FIRST + WIDTH)


@triton.jit
def _attend(b_acc, b_acc_tail, b_max, b_sum, b_q, b_q_tail, k_ptr, v_ptr, k_desc, k_tail_desc, v_desc, v_tail_desc,
            token, head, o_query, first_key, num_keys, scale,
            STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
            QK_TAIL: tl.constexpr, PV_TAIL: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """One step of the online softmax, over BLOCK_N keys from `k_ptr` on. Unless MASKED, every query attends to all of them.

    With descriptors the keys are those of `head` from `token` on.
    """
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, MAIN)
    num_keys -= first_key
    b_k = _load_keys(k_desc, token, head, k_ptr, o_n, o_d, num_keys, STRIDE_K, HEAD_DIM, MASKED, 0, MAIN)
    b_score = tl.dot(b_q, b_k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if QK_TAIL:
        o_tail = MAIN + tl.arange(0, QK_TAIL)
        b_k = _load_keys(k_tail_desc, token, head, k_ptr, o_n, o_tail, num_keys, STRIDE_K, HEAD_DIM, MASKED, MAIN, QK_TAIL)
        b_score = tl.dot(b_q_tail, b_k.T, b_score, input_precision="ieee")
    if MASKED:
        m_score = (o_n < num_keys)[None, :]
        if CAUSAL:
            m_score = m_score & (first_key + o_n[None, :] <= o_query[:, None])
        b_score = tl.where(m_score, b_score * scale, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_p = tl.exp2(b_score - b_new_max[:, None])
    else:
        # The scale is positive and moves out of the maximum: scaling a score is then part of the FMA below.
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * scale)
        b_p = tl.exp2(b_score * scale - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_v = _load_keys(v_desc, token, head, v_ptr, o_n, o_d, num_keys, STRIDE_V, HEAD_DIM, MASKED, 0, MAIN)
    b_p = b_p.to(b_v.dtype)
    b_acc = tl.dot(b_p, b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    if PV_TAIL:
        # If one thread held all 8 channels of a row, Triton would pick a transposed layout and store 2 bytes at a time.
        o_tail = tl.max_contiguous(MAIN + tl.arange(0, PV_TAIL), 4 if PV_TAIL == 8 else PV_TAIL)
        b_v = _load_keys(v_tail_desc, token, head, v_ptr, o_n, o_tail, num_keys, STRIDE_V, HEAD_DIM, MASKED, MAIN, PV_TAIL)
        b_acc_tail = tl.dot(b_p, b_v, b_acc_tail * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_acc_tail, b_new_max, b_sum


@triton.jit(
    do_not_specialize=[
        "num_segments", "num_tokens", "num_tiles", "heads_per_l2_group", "stride_q_head", "stride_k_head", "stride_v_head",
    ]
)  # fmt: skip
def varlen_attention_fwd_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, k_desc, k_tail_desc, v_desc, v_tail_desc, schedule_ptr, cu_seqlens_ptr,
    scale, num_segments, num_tokens, num_tiles, heads_per_l2_group, stride_q_head, stride_k_head, stride_v_head,
    STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, QK_TAIL: tl.constexpr, PV_TAIL: tl.constexpr, CAUSAL: tl.constexpr, RETURN_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one segment and head, over all their keys. GROUP query heads share a key head.

    Tiles come from a schedule made on the host, or without one (None) from the offsets, searched on the device.
    """
    # heads_per_l2_group heads go through all tiles together, then the next group of heads.
    pid = tl.program_id(0)
    place = pid % (num_tiles * heads_per_l2_group)
    head = pid // (num_tiles * heads_per_l2_group) * heads_per_l2_group + place % heads_per_l2_group
    tile = place // heads_per_l2_group
    if schedule_ptr is not None:
        p_entry = schedule_ptr + tile * 3
        first_token, num_keys, first_query = tl.load(p_entry), tl.load(p_entry + 1), tl.load(p_entry + 2)
    else:
        if CAUSAL:  # a segment's last tiles have most work: start them first
            tile = num_tiles - 1 - tile
        first_token, num_keys, first_query = _find_tile(cu_seqlens_ptr, num_segments, num_tokens, tile, BLOCK_M)
        if (first_query < 0) | (first_query >= num_keys):
            return
    num_queries = num_keys - first_query
    key_token, query_token = first_token.to(tl.int64), (first_token + first_query).to(tl.int64)
    key_head = head // GROUP
    q_ptr += query_token * STRIDE_Q + head.to(tl.int64) * stride_q_head * STRIDE_UNIT
    k_ptr += key_token * STRIDE_K + key_head.to(tl.int64) * stride_k_head * STRIDE_UNIT
    v_ptr += key_token * STRIDE_V + key_head.to(tl.int64) * stride_v_head * STRIDE_UNIT

    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, MAIN)
    b_q = _load_rows(q_ptr, o_m, o_d, num_queries, STRIDE_Q, HEAD_DIM, True, HEAD_DIM < MAIN)
    b_q_tail = b_q  # unused where the head has no tail
    if QK_TAIL:
        o_tail = MAIN + tl.arange(0, QK_TAIL)
        b_q_tail = _load_rows(q_ptr, o_m, o_tail, num_queries, STRIDE_Q, HEAD_DIM, True, HEAD_DIM < MAIN + QK_TAIL)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    b_acc_tail = tl.zeros([BLOCK_M, PV_TAIL if PV_TAIL else 1], tl.float32)

    # Full blocks without a mask, then the diagonal or the segment's end with a mask, in steps of half a block. Descriptors are
    # used for full blocks only: past a segment's end they would load its neighbor, and NaN times a probability of 0 is NaN.
    MASKED_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else 16
    whole = (first_query if CAUSAL else num_keys) // BLOCK_N * BLOCK_N
    for first_key in tl.range(0, whole, BLOCK_N):
        # min() has no effect on the value. It hides the loop stride from LLVM, which would keep a 64-bit pointer per access.
        at = tl.minimum(first_key, whole - BLOCK_N).to(tl.int64)
        b_acc, b_acc_tail, b_max, b_sum = _attend(
            b_acc, b_acc_tail, b_max, b_sum, b_q, b_q_tail, k_ptr + at * STRIDE_K, v_ptr + at * STRIDE_V,
            k_desc, k_tail_desc, v_desc, v_tail_desc, first_token + first_key, key_head,
            first_query + o_m, first_key, num_keys, scale,
            STRIDE_K, STRIDE_V, HEAD_DIM, MAIN, QK_TAIL, PV_TAIL, CAUSAL, False, BLOCK_N,
        )  # fmt: skip
    end = tl.minimum(num_keys, first_query + BLOCK_M) if CAUSAL else num_keys
    for first_key in tl.range(whole, end, MASKED_N, num_stages=1):
        at = tl.minimum(first_key, end).to(tl.int64)
        b_acc, b_acc_tail, b_max, b_sum = _attend(
            b_acc, b_acc_tail, b_max, b_sum, b_q, b_q_tail, k_ptr + at * STRIDE_K, v_ptr + at * STRIDE_V,
            None, None, None, None, 0, 0, first_query + o_m, first_key, num_keys, scale,
            STRIDE_K, STRIDE_V, HEAD_DIM, MAIN, QK_TAIL, PV_TAIL, CAUSAL, True, MASKED_N,
        )  # fmt: skip

    m_query = (o_m < num_queries)[:, None]
    p_out = out_ptr + (query_token * NUM_HEADS + head) * HEAD_DIM + o_m[:, None] * (NUM_HEADS * HEAD_DIM)
    b_weight = 1.0 / b_sum[:, None]
    b_out = (b_acc * b_weight).to(out_ptr.dtype.element_ty)
    tl.store(p_out + o_d[None, :], b_out, mask=m_query & (o_d < HEAD_DIM)[None, :])
    if PV_TAIL:
        o_tail = MAIN + tl.arange(0, PV_TAIL)
        b_out = (b_acc_tail * b_weight).to(out_ptr.dtype.element_ty)
        tl.store(p_out + o_tail[None, :], b_out, mask=m_query & (o_tail < HEAD_DIM)[None, :])
    if RETURN_LSE:
        p_lse = lse_ptr + head.to(tl.int64) * num_tokens + query_token + o_m
        tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN_2, mask=o_m < num_queries)
