"""Faults in the public operators, their registration and gradients, in the reference, and in the layers."""

from ..fault import Fault

OPS, REFERENCE = "keye_kernels/ops", "keye_kernels/reference"
CHECKS, IMPLEMENTATION, REGISTRY = f"{OPS}/checks.py", f"{OPS}/implementation.py", f"{OPS}/registry.py"
ROPE, ATTENTION, PROJECTOR, LIBRARIES = (
    f"{OPS}/{name}.py" for name in ("rope", "varlen_attention", "patch_merge", "attention_libraries")
)
BATCH, POSITIONS, LAYERS = f"{OPS}/vision_batch.py", f"{OPS}/position_embedding_2d.py", "keye_kernels/layers.py"
OPTIONS, CHOICE, GRADIENTS = "tests/ops/test_options.py", "tests/ops/test_implementation.py", "tests/ops/test_gradients.py"
OPERATORS, ARGUMENTS = "tests/ops/test_ops.py", "tests/ops/test_arguments.py"
VALUES, STUBS = "tests/ops/test_geometry_values.py", "tests/ops/test_attention_libraries.py"
BACKENDS, DTYPES = "tests/triton/test_attention_choice.py", "tests/triton/test_dtypes.py"

FAULTS = [
    Fault(CHECKS, "if x.numel() > MAX_INT32:", "if x.numel() > MAX_INT32 + 1:", OPTIONS),
    Fault(CHECKS, "not minimum <= value <= MAX_FLOAT32", "not minimum < value < MAX_FLOAT32", OPTIONS),
    Fault(CHECKS, "not minimum <= value <= MAX_FLOAT32", "value < minimum or value > MAX_FLOAT32", OPTIONS),
    Fault(CHECKS, "if x.stride(-1) != 1 and x.shape[-1] > 1:", "if x.stride(-1) != 1:", OPTIONS),
    Fault(CHECKS, '("T", "H", "D") if like is None else (like.shape[0], "H", like.shape[2])', '("T", "H", "D")', OPTIONS),
    Fault(IMPLEMENTATION, "if (impl := _default.get()) is not None:", 'if (impl := _default.get()) not in (None, "auto"):', CHOICE),
    Fault(IMPLEMENTATION, "        _default.reset(token)", "        _default.set(None)", CHOICE),
    Fault(IMPLEMENTATION, " and has_triton() and dtype != torch.float64", " and has_triton()", CHOICE),
    Fault(IMPLEMENTATION, ' or (impl == "torch" and operator in TORCH_MATMULS)', "", CHOICE),
    Fault(IMPLEMENTATION, 'x.dtype == torch.bfloat16 and x.device.type == "cpu"', "x.dtype == torch.bfloat16", CHOICE),
    Fault(IMPLEMENTATION, 'return tensors if tensors[0].device.type != "cpu" else', "return", CHOICE),
    Fault(IMPLEMENTATION, 'os.environ.get("TRITON_INTERPRET") != "1"', 'os.environ.get("TRITON_INTERPRET") == "0"', CHOICE),
    Fault(IMPLEMENTATION, "@cache\ndef log_choice", "def log_choice", CHOICE),
    Fault(REGISTRY, 'DEVICE_KEYS = ("CPU", "CUDA")', 'DEVICE_KEYS = ("CPU",)', CHOICE),
    Fault(REGISTRY, "forward_ad._current_level >= 0 and any", "forward_ad._current_level > 0 and any", GRADIENTS),
    Fault(REGISTRY, "sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()", "nullcontext()", GRADIENTS),
    Fault(REGISTRY, "values[i].view_as(values[i]) if create_graph else", "values[i] if create_graph else", GRADIENTS),
    Fault(REGISTRY, "found = gradients(reference, inputs, wanted, list(grads), create_graph=True)",
          "found = gradients(reference, inputs, wanted, list(grads))", GRADIENTS),
    Fault(REGISTRY, "for place, value in zip(ctx.places, ctx.saved_tensors", "for place, value in zip(range(99), ctx.saved_tensors",
          GRADIENTS),
    Fault(ROPE, "list(sections), q_norm_weight, k_norm_weight, eps, False, impl)", "list(sections), q_norm_weight, k_norm_weight, 1e-6, False, impl)", OPTIONS),
    Fault(ROPE, "eps: float = 1e-6,", "eps: float = 1e-5,", OPTIONS),
    Fault(ROPE, "[k, k_norm_weight, eps], [0, 1], [grad_k], create_graph)", "[k, k_norm_weight, 1e-6], [0, 1], [grad_k], create_graph)",
          OPTIONS),
    Fault(ROPE, "None, None, ctx.eps, not ctx.conjugate, ctx.impl)", "None, None, ctx.eps, True, ctx.impl)", GRADIENTS),
    Fault(ROPE, "None, None, ctx.eps, not ctx.conjugate, ctx.impl)", 'None, None, ctx.eps, not ctx.conjugate, "reference")', OPTIONS),
    Fault(ROPE, "*normed, ctx.eps, create_graph=True)", "*normed, 1e-6, create_graph=True)", OPTIONS),
    Fault(ROPE, "    if inv_freq.requires_grad:", "    if False:", GRADIENTS),
    Fault(ROPE, " or min(mrope_section) < 0", "", OPTIONS),
    Fault(ROPE, 'check_tensor("k_norm_weight", k_norm_weight,', 'check_tensor("k_norm_weight", q_norm_weight,', OPTIONS),
    Fault(ATTENTION, "not 0 < q.shape[2] <= MAX_HEAD_DIM", "not 0 < q.shape[2] < MAX_HEAD_DIM", OPTIONS),
    Fault(ATTENTION, "* max_seqlen > MAX_GRID_RATIO * q.shape[0]", "* max_seqlen >= MAX_GRID_RATIO * q.shape[0]", BACKENDS),
    Fault(ATTENTION, "is_padded = (cu_seqlens.shape[0] - 1) * max_seqlen", "is_padded = cu_seqlens.shape[0] * max_seqlen", BACKENDS),
    Fault(ATTENTION, "    automatic = is_auto(impl, \"varlen_attention\")", "    automatic = True", BACKENDS),
    Fault(ATTENTION, "offsets[0] == 0 and offsets[-1] == q.shape[0]", "offsets[-1] == q.shape[0]", BACKENDS),
    Fault(ATTENTION, "offsets[0] < 0 or", "offsets[0] < -1 or", BACKENDS),
    Fault(ATTENTION, "    config = attention_config(q.device, kernel_dtype(q), q.shape[2], max_seqlen, causal)\n    if automatic",
          "    config = attention_config(q.device, q.dtype, q.shape[2], max_seqlen, causal)\n    if automatic", BACKENDS),
    Fault(ATTENTION, "dtype = torch.promote_types(q.dtype, torch.float32)", "dtype = torch.float32", BACKENDS),
    Fault(ATTENTION, '        schedule = None\n    if schedule', "        pass\n    if schedule", "tests/triton/test_attention_operator.py"),
    Fault(PROJECTOR, "return call(_projection_op, features, merge_index, *weights, merge_size, eps, impl)",
          "return call(_projection_op, features, merge_index, *weights, merge_size, 1e-5, impl)", OPTIONS),
    Fault(PROJECTOR, 'patch_tensors(grids, 1, merge_size, "raster")', 'patch_tensors(grids, 1, 2, "raster")', VALUES),
    Fault(PROJECTOR, "features.shape[0] // merge_size**2, w2", "features.shape[0] // 4, w2", OPTIONS),
    Fault(PROJECTOR, "if (patches := grid_thw.raster_index.shape[0]) != features", "if (patches := grid_thw.raster_index.shape[0]) > features",
          OPTIONS),
    Fault(PROJECTOR, "backend = \"auto\" if automatic else", "backend =", "tests/ops/test_implementation.py"),
    Fault(POSITIONS, "if index.shape[0] != features.shape[0]:", "if index.shape[0] > features.shape[0]:", OPTIONS),
    Fault(LIBRARIES, "for x in (q, k, v)):", "for x in (k, v)):", STUBS),
    Fault(LIBRARIES, "if max_seqlen <= 1:", "if max_seqlen < 1:", STUBS),
    Fault(LIBRARIES, '"softmax_scale": softmax_scale, "causal": causal', '"softmax_scale": softmax_scale, "causal": False', STUBS),
    Fault(LIBRARIES, "token >= cu_seqlens[-1]", "token > cu_seqlens[-1]", STUBS),
    Fault(LIBRARIES, "            lse.masked_fill_(outside, -torch.inf)", "            pass", STUBS),
    Fault(BATCH, "lengths += [0] *", "lengths += [1] *", VALUES),
    Fault(BATCH, '"block" if block_order else "raster"', '"block"', VALUES),
    Fault(BATCH, "if segment_by_frame else grid_thw.shape[0]", "if segment_by_frame else grid_thw.shape[0] + 1", VALUES),
    Fault(LAYERS, "*weights, eps=self.pre_norm.eps)", "*weights)", OPTIONS),
    Fault(LAYERS, "*weights, merge_size, norm.eps,", "*weights, 2, norm.eps,", OPTIONS),
    Fault(LAYERS, "*weights, merge_size, norm.eps,", "*weights, merge_size, 1e-6,", OPTIONS),
    Fault(LAYERS, "    can_torch_compile = False", "    can_torch_compile = True", OPTIONS),
    Fault(f"{REFERENCE}/varlen_attention.py", "columns > at[:, None]", "columns >= at[:, None]", OPERATORS),
    Fault(f"{REFERENCE}/varlen_attention.py", "torch.arange(first, first + block.shape[1]", "torch.arange(0, block.shape[1]", OPERATORS),
    Fault(f"{REFERENCE}/varlen_attention.py", 'is_finite = q.device.type != "cpu" or _is_finite(q, k)', "is_finite = True", ARGUMENTS),
    Fault(f"{REFERENCE}/varlen_attention.py", "_is_finite(q, k) else _attend", "_is_finite(q, q) else _attend", ARGUMENTS),
    Fault(f"{REFERENCE}/rope.py", "torch.repeat_interleave(axes, counts", "torch.repeat_interleave(axes.flip(0), counts", OPERATORS +
          " tests/ops/test_golden_operators.py"),
    Fault(f"{REFERENCE}/rope.py", "frequency = inv_freq.float().repeat(", "frequency = inv_freq.double().repeat(", "tests/triton/test_rope.py"),
    Fault(f"{REFERENCE}/patch_merge.py", "merged = _layer_norm(merged, norm_weight, norm_bias, eps)",
          "merged = _layer_norm(merged, norm_weight, norm_bias, 1e-5)", OPTIONS),
    Fault(f"{REFERENCE}/linear.py", " or torch.is_autocast_enabled(\"cpu\")", "", "tests/ops/test_linear.py"),
    Fault(f"{REFERENCE}/linear.py", "x.numel() == weight.shape[1] <= weight.shape[0]", "x.shape[0] == 1", "tests/ops/test_linear.py"),
]  # fmt: skip
