"""Faults in the attention to a key/value cache, and in where the decoder uses it."""

from ..fault import Fault

KERNEL, OPERATOR, SPEC = (
    f"keye_kernels/{name}.py" for name in ("triton/cache_attention", "ops/cache_attention", "triton/cache_attention_spec")
)
DECODER, CACHE, REFERENCE = (
    "keye_kernels/model/decoder.py",
    "keye_kernels/model/cache.py",
    "keye_kernels/reference/cache_attention.py",
)
KERNELS, CALLS, PREPARED = (
    f"tests/{name}.py" for name in ("triton/test_cache_attention", "ops/test_cache_attention", "ops/test_prepared")
)
LAYERS, TURNS = "tests/model/test_cached_tokens.py", "tests/model/test_later_turns.py"

FAULTS = [
    Fault(KERNEL, "b_slot = tl.load(slot_ptr + o_row // GROUP", "b_slot = tl.load(slot_ptr + o_row * 0", KERNELS),
    Fault(KERNEL, "tl.minimum(tl.max(b_slot, 0) + 1, cache_slots)", "(tl.max(b_slot, 0) + 1)", KERNELS),
    Fault(KERNEL, "tl.max(b_slot, 0) + 1, cache_slots", "tl.max(b_slot, 0), cache_slots", KERNELS),
    Fault(KERNEL, "& (o_key[None, :] <= b_slot[:, None])", "", KERNELS),
    Fault(KERNEL, "mask=o_key < end, other=0) != 0", "mask=o_key < end, other=0) == 0", KERNELS),
    Fault(KERNEL, "mask = m_key[:, None] & m_d[None, :]  #", "mask = (o_key < end)[:, None] & m_d[None, :]  #", KERNELS),
    Fault(KERNEL, "b_sum = b_sum * b_rescale + tl.sum(b_p, 1)", "b_sum = b_sum + tl.sum(b_p, 1)", KERNELS),
    Fault(KERNEL, "b_value, b_acc * b_rescale[:, None]", "b_value, b_acc", KERNELS),
    Fault(KERNEL, "first, end = split * keys_per_split", "first, end = 0", KERNELS),
    Fault(KERNEL, "    valid_ptr += sequence * cache_slots\n", "", KERNELS),
    Fault(KERNEL, "+ head * HEAD_DIM\n    p_key", "\n    p_key", KERNELS),
    Fault(KERNEL, "row_block * BLOCK_R + tl.arange", "tl.arange", KERNELS),
    Fault(KERNEL, "mask = (b_sum > 0)[:, None] & (o_d < HEAD_DIM)[None, :]", "mask = (o_d < HEAD_DIM)[None, :]", KERNELS),
    Fault(KERNEL, "tl.where(total > 0, total, 1.0)", "total", KERNELS),
    Fault(KERNEL, "softmax_scale * LOG2_E", "softmax_scale", KERNELS),
    Fault(KERNEL, "min(MAX_SPLITS, 1 << max", "max(1, 1 << max", KERNELS),
    Fault(KERNEL, "PROGRAMS_PER_MULTIPROCESSOR * arch", "arch", KERNELS),
    Fault(KERNEL, "q.contiguous(), key_cache", "q, key_cache", KERNELS),
    Fault(REFERENCE, "masked_fill(~valid[..., None, None], 0)", "clone()", KERNELS),
    Fault(REFERENCE, ".softmax(-1).masked_fill(masked, 0)", ".softmax(-1)", KERNELS),
    Fault(OPERATOR, 'check_indices("slots", slots, key_cache.shape[1])', "pass", CALLS),
    Fault(OPERATOR, "impl, (softmax_scale,), *tensors", "impl, (), *tensors", PREPARED),
    Fault(OPERATOR, "if not x.is_contiguous():", "if False:", CALLS),
    Fault(OPERATOR, "            if x.requires_grad:", "            if False:", CALLS),
    Fault(OPERATOR, "q.shape[0] != batch_size * slots.shape[0]", "False", CALLS),
    Fault(DECODER, "not is_prompt and length <= MAX_NEW_TOKENS_OF_KERNEL", "not is_prompt", LAYERS),
    Fault(DECODER, "uses_kernel and cache.keys[0].dtype == embeds.dtype", "uses_kernel", LAYERS),
    Fault(DECODER, "fused.runs_kernels(embeds, self.impl) and not is_prompt", "not is_prompt", LAYERS),
    Fault(DECODER, "            cache.mark(slots, attention_mask)\n", "            pass\n", TURNS),
    Fault(DECODER, "is_prompt or uses_kernel else", "is_prompt else", LAYERS),
    Fault(CACHE, "        self.length.add_(tokens)\n", "", TURNS),
]  # fmt: skip
