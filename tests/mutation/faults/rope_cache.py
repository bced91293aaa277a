"""Faults in the rope that writes k and v into the cache, and in where the decoder uses it."""

from ..fault import Fault

KERNEL, OPERATOR, SPEC = (f"keye_kernels/{name}.py" for name in ("triton/rope", "ops/rope_cache", "triton/rope_spec"))
DECODER, REFERENCE = "keye_kernels/model/decoder.py", "keye_kernels/reference/rope.py"
KERNELS, CALLS, PREPARED = (f"tests/{name}.py" for name in ("triton/test_rope_cache", "ops/test_rope_cache", "ops/test_prepared"))
LAYERS, LAUNCHES = "tests/model/test_cache_writes.py", "tests/model/test_launches.py"
SPECS, HEURISTICS = "tests/triton/test_specs.py", "tests/triton/test_heuristics.py"

FAULTS = [
    Fault(KERNEL, "slot_ptr + o_token % num_slots", "slot_ptr + o_token // num_slots", KERNELS),
    Fault(KERNEL, "(o_token // num_slots).to(tl.int64) * cache_slots + b_slot",
          "(o_token // num_slots) * cache_slots + b_slot.to(tl.int32)", KERNELS),
    Fault(KERNEL, "(b_slot >= 0) & (b_slot < cache_slots)", "b_slot < cache_slots", KERNELS),
    Fault(KERNEL, "(b_slot >= 0) & (b_slot < cache_slots)", "b_slot >= 0", KERNELS),
    Fault(KERNEL, "_rotate_heads(v_out_ptr, v_ptr, None,", "_rotate_heads(v_out_ptr, k_ptr, None,", KERNELS),
    Fault(KERNEL, "o_pair, None, None, eps,", "o_pair, cos[None], sin[None], eps,", KERNELS),
    Fault(KERNEL, "for x in (q, k, v) for stride in", "for x in (q, k, None) for stride in", KERNELS),
    Fault(KERNEL, "heads = q_heads, k_heads, k_heads", "heads = q_heads, k_heads, 0", HEURISTICS),
    Fault(KERNEL, "sizes = slots.shape[0], key_cache.shape[1]", "sizes = q.shape[0], key_cache.shape[1]", KERNELS),
    Fault(KERNEL, "position_ids, slots.contiguous())", "position_ids, slots)", KERNELS),
    Fault(REFERENCE, "write_slots(v, value_cache, slots)", "write_slots(k_out, value_cache, slots)", KERNELS),
    Fault(OPERATOR, "torch.promote_types(q.dtype, k.dtype)) == \"reference\"", "q.dtype) == \"reference\"", CALLS),
    Fault(OPERATOR, 'check_indices("slots", slots, key_cache.shape[1])', "pass", CALLS),
    Fault(OPERATOR, '    check_last_axis("v", v)\n', "", CALLS),
    Fault(OPERATOR, "if not cache.is_contiguous():", "if False:", CALLS),
    Fault(OPERATOR, "x is not None and x.requires_grad", "False", CALLS),
    Fault(OPERATOR, '"k_norm_weight": k_norm_weight}.items()', "}.items()", CALLS),
    Fault(OPERATOR, "if converted is not cache:", "if False:", CALLS),
    Fault(OPERATOR, "Tensor(a!) key_cache", "Tensor key_cache", CALLS),
    Fault(OPERATOR, "    options = eps, tuple", "    options = 0, tuple", PREPARED),
    Fault(OPERATOR, "key_cache, value_cache, slots, q_norm_weight, k_norm_weight\n    options",
          "key_cache, value_cache, slots[:0], q_norm_weight, k_norm_weight\n    options", PREPARED),
    Fault(SPEC, 'for weight in (dtype, "fp32") for to_cache in (True, False)', 'for weight in (dtype, "fp32") for to_cache in (False,)',
          SPECS),
    Fault(DECODER, "batch.segments is None or batch.batch_size == 1", "True", LAYERS),
    Fault(DECODER, "batch.segments is None or batch.batch_size == 1", "batch.segments is None", LAUNCHES),
    Fault(DECODER, "batch.segments is None or batch.batch_size == 1", "batch.batch_size == 1", LAUNCHES),
    Fault(DECODER, "cache.keys[self.layer].dtype == k.dtype and ", "", LAYERS),
    Fault(DECODER, " and fused.runs_kernels(k, self.impl)", "", LAYERS),
    Fault(DECODER, "if cache is not None and self._writes_with_rope", "if self._writes_with_rope", LAYERS),
]  # fmt: skip
