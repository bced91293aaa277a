"""The kernel of linear_few_rows. T rows of x, IN and OUT features, K the axis of IN, which a program reads block by block.

One program computes BLOCK_N columns of all rows, from all of K. The smallest weight of the decoder has 4096 rows: blocks of 4
make 1024 programs, so a split of K over programs, with its workspace and its second pass, would add none that a GPU has room
for. K is split over the threads or the warps of a program, whose sums are added in a fixed order at the end.
"""

import triton
import triton.language as tl


@triton.jit
def _load(p, k, o_k, IN: tl.constexpr, BLOCK_K: tl.constexpr, EVICTION: tl.constexpr):
    if IN % BLOCK_K == 0:
        return tl.load(p + k, eviction_policy=EVICTION)
    else:
        return tl.load(p + k, mask=k + o_k < IN, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _accumulate(b_out, b_weight, b_x, SLICES: tl.constexpr):
    if SLICES:
        return tl.dot(b_weight, b_x.to(b_weight.dtype).permute(0, 2, 1), b_out, input_precision="ieee")
    else:
        return b_out + b_weight.to(tl.float32) * b_x.to(tl.float32)


@triton.jit
def _add_columns(b_out, p, mask):
    return b_out + tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def linear_few_rows_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, residual_ptr, num_rows,
    IN: tl.constexpr, OUT: tl.constexpr, SILU_MUL: tl.constexpr, USE_PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """x [num_rows, IN] @ weight [OUT, IN].T + bias + residual; with SILU_MUL, silu(gate) * up of a weight of 2·OUT rows.

    SLICES: into how many matmuls a block of K is split, one per warp. 0: multiply-adds without tensor cores, which keep up with
    the memory for few rows.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = tl.arange(0, BLOCK_T)
    # Rows and columns past the edge repeat the last one, so that loads need no mask for them; they are not stored.
    o_row = tl.minimum(o_n, OUT - 1).to(tl.int64) * IN
    o_token = tl.minimum(o_t, num_rows - 1).to(tl.int64) * IN
    if SLICES:  # weight [SLICES, BLOCK_N, K], x [SLICES, BLOCK_T, K]
        SLICE: tl.constexpr = BLOCK_K // SLICES
        o_k = (tl.arange(0, SLICES) * SLICE)[:, None, None] + tl.arange(0, SLICE)[None, None, :]
        p_weight, p_x = weight_ptr + o_row[None, :, None] + o_k, x_ptr + o_token[None, :, None] + o_k
        b_out = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    else:  # weight [BLOCK_N, 1, K], x [1, BLOCK_T, K]. Each thread has its own part of K and adds nothing of others in the loop.
        o_k = tl.arange(0, BLOCK_K)[None, None, :]
        p_weight, p_x = weight_ptr + o_row[:, None, None] + o_k, x_ptr + o_token[None, :, None] + o_k
        b_out = tl.zeros([BLOCK_N, BLOCK_T, BLOCK_K], tl.float32)
    p_up, b_up, b_up_out = p_weight, None, b_out
    if SILU_MUL:
        p_up = p_weight + OUT * IN

    # The next block of a weight is on its way while this one is used. Weights are read once, x by every program.
    b_weight = _load(p_weight, 0, o_k, IN, BLOCK_K, "evict_first")
    if SILU_MUL:
        b_up = _load(p_up, 0, o_k, IN, BLOCK_K, "evict_first")
    if USE_PDL:
        # Until here, the kernels before this one may be running: nothing was read that they write, as weights are constant, and
        # nothing was written. The wait ends when they have finished, since each kernel with this attribute waits for its own
        # predecessor, and a kernel without it starts after its predecessor's end.
        tl.extra.cuda.gdc_wait()
    LAST: tl.constexpr = (IN - 1) // BLOCK_K * BLOCK_K
    for k in range(0, LAST, BLOCK_K):
        b_x = _load(p_x, k, o_k, IN, BLOCK_K, "evict_last")
        b_next = _load(p_weight, k + BLOCK_K, o_k, IN, BLOCK_K, "evict_first")
        b_out = _accumulate(b_out, b_weight, b_x, SLICES)
        b_weight = b_next
        if SILU_MUL:
            b_next_up = _load(p_up, k + BLOCK_K, o_k, IN, BLOCK_K, "evict_first")
            b_up_out = _accumulate(b_up_out, b_up, b_x, SLICES)
            b_up = b_next_up
    b_x = _load(p_x, LAST, o_k, IN, BLOCK_K, "evict_last")
    b_out = _accumulate(b_out, b_weight, b_x, SLICES)
    if SILU_MUL:
        b_up_out = _accumulate(b_up_out, b_up, b_x, SLICES)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()  # they wait for the stores below

    AXIS: tl.constexpr = 0 if SLICES else 2
    b_out = tl.sum(b_out, AXIS)  # [BLOCK_N, BLOCK_T]
    m_n = (o_n < OUT)[:, None]
    if bias_ptr is not None:
        b_out = _add_columns(b_out, bias_ptr + o_n[:, None], m_n)
    if SILU_MUL:
        b_up_out = tl.sum(b_up_out, AXIS)
        if bias_ptr is not None:
            b_up_out = _add_columns(b_up_out, bias_ptr + OUT + o_n[:, None], m_n)
        b_out = b_out / (1.0 + tl.exp(-b_out)) * b_up_out
    mask = m_n & (o_t < num_rows)[None, :]
    o_out = o_t.to(tl.int64)[None, :] * OUT + o_n[:, None]
    if residual_ptr is not None:
        b_out = _add_columns(b_out, residual_ptr + o_out, mask)
    tl.store(out_ptr + o_out, b_out.to(out_ptr.dtype.element_ty), mask=mask)
