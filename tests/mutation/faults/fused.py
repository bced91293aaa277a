"""Faults in prepared calls and in the fused elementwise work of a layer."""

from ..fault import Fault

PREPARED, ELEMENTWISE, FUSED = "keye_kernels/ops/prepared.py", "keye_kernels/ops/elementwise.py", "keye_kernels/model/fused.py"
ADD_NORM, SILU_MUL = "keye_kernels/triton/add_norm.py", "keye_kernels/triton/silu_mul.py"
CALLS, KERNELS, LAYERS = "tests/ops/test_prepared.py", "tests/triton/test_elementwise.py", "tests/model/test_fused.py"

FAULTS = [
    Fault(PREPARED, "impl, version(), options", "impl, options", CALLS),
    Fault(PREPARED, "(x.shape, x.stride(), x.dtype, x.device)", "(x.shape, x.dtype, x.device)", CALLS),
    Fault(PREPARED, "(x.shape, x.stride(), x.dtype, x.device)", "(x.stride(), x.dtype, x.device)", CALLS),
    Fault(PREPARED, "(x.shape, x.stride(), x.dtype, x.device)", "(x.shape, x.stride(), x.device)", CALLS),
    Fault(PREPARED, "(has_gradients and x.requires_grad) or ", "", CALLS),
    Fault(PREPARED, "type(x) not in PLAIN_TYPES or ", "", CALLS),
    Fault(PREPARED, "if forward_ad._current_level >= 0 or ", "if ", CALLS),
    Fault(PREPARED, 'default_impl() if impl == "auto" else impl', "impl", CALLS),
    Fault("keye_kernels/ops/rope.py", "    options = eps, tuple", "    options = 0, tuple", CALLS),
    Fault("keye_kernels/ops/varlen_attention.py", "(covers_all_tokens, longest, softmax_scale, causal, return_lse)",
          "(covers_all_tokens, longest, softmax_scale, return_lse)", CALLS),
    Fault("keye_kernels/ops/varlen_attention.py", "(covers_all_tokens, longest,", "(longest,", CALLS),
    Fault("keye_kernels/ops/varlen_attention.py", "calls = segments.prepared_calls", "pass", CALLS),
    Fault(ADD_NORM, "b_normed = tl.where(m_channel, b_normed - mean, 0.0)", "b_normed = b_normed - mean", KERNELS),
    Fault(ADD_NORM, "(b_x.to(tl.float32) + b_residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)",
          "b_x.to(tl.float32) + b_residual.to(tl.float32)", KERNELS),
    Fault(ADD_NORM, "o_row = tl.program_id(0).to(tl.int64)", "o_row = tl.program_id(0)", "tests/triton/test_large_offsets.py"),
    Fault(ADD_NORM, "mask = (o_row < num_rows) & m_channel", "mask = (o_row <= num_rows) & m_channel", KERNELS),
    Fault(ADD_NORM, "unit = 8 if (stride_x | stride_residual) % 8 == 0 else 1", "unit = 8", KERNELS),
    Fault(ADD_NORM, "weight.contiguous(), bias)", "weight, bias)", KERNELS),
    Fault(SILU_MUL, "unit = 8 if (stride_gate | stride_up) % 8 == 0 else 1", "unit = 8 if stride_gate % 8 == 0 else 1", KERNELS),
    Fault(SILU_MUL, "(stride_up * STRIDE_UNIT)", "(stride_gate * STRIDE_UNIT)", KERNELS),
    Fault(SILU_MUL, "tl.program_id(0) // BLOCKS).to(tl.int64)", "tl.program_id(0) // BLOCKS)", "tests/triton/test_large_offsets.py"),
    Fault(SILU_MUL, "b_gate / (1.0 + tl.exp(-b_gate)) * b_up", "b_gate / (1.0 + tl.exp(-b_up)) * b_gate", KERNELS),
    Fault(ELEMENTWISE, 'call_key("add_norm", impl, (eps,), *tensors)', 'call_key("add_norm", impl, (), *tensors)', CALLS),
    Fault(FUSED, "torch.is_grad_enabled() or torch.is_autocast", "torch.is_autocast", LAYERS),
    Fault(FUSED, "type(module) in FUSED_TYPES and calls_forward(module)", "type(module) in FUSED_TYPES", LAYERS),
    Fault(FUSED, "is_simple = module.bias is None and (", "is_simple = (", LAYERS),
    Fault(FUSED, "and has_plain_weights(module)", "", LAYERS),
    Fault(FUSED, "not torch.is_grad_enabled() and calls_forward(module)", "not torch.is_grad_enabled()", LAYERS),
    Fault(FUSED, "residual.ndim == 2 or residual.is_contiguous()", "True", LAYERS),
    Fault(FUSED, "bool(errors[0] < errors[1])", "bool(errors[1] < errors[0])", LAYERS),
]  # fmt: skip
