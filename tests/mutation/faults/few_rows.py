"""Faults in the linear layers of few rows, and in where the decoder uses them."""

from ..fault import Fault

KERNEL, LAUNCHER, SPEC, CASES = (
    f"keye_kernels/triton/linear_few_rows{suffix}.py" for suffix in ("_kernel", "", "_spec", "_cases")
)  # fmt: skip
OPERATOR, FUSED, DECODER = "keye_kernels/ops/linear_few_rows.py", "keye_kernels/model/fused.py", "keye_kernels/model/decoder.py"
REFERENCE, DOCTOR = "keye_kernels/reference/linear.py", "keye_kernels/tools/doctor/__init__.py"
KERNELS, CALLS, PREPARED = (
    f"tests/{name}.py" for name in ("triton/test_linear_few_rows", "ops/test_linear_few_rows", "ops/test_prepared")
)
LAYERS, LAUNCHES, DOCTOR_TESTS = "tests/model/test_few_rows.py", "tests/model/test_launches.py", "tests/tools/test_doctor.py"

FAULTS = [
    Fault(KERNEL, "tl.load(p + k, mask=k + o_k < IN, other=0.0, eviction_policy=EVICTION)", "tl.load(p + k, eviction_policy=EVICTION)", KERNELS),
    Fault(KERNEL, "m_n & (o_t < num_rows)[None, :]", "m_n & (o_t < num_rows - 1)[None, :]", KERNELS),
    Fault(KERNEL, "(IN - 1) // BLOCK_K * BLOCK_K", "IN // BLOCK_K * BLOCK_K", KERNELS),
    Fault(KERNEL, "        b_weight = b_next\n", "", KERNELS),
    Fault(KERNEL, "            b_up = b_next_up\n", "", KERNELS),
    Fault(KERNEL, "p_up = p_weight + OUT * IN", "p_up = p_weight", KERNELS),
    Fault(KERNEL, "bias_ptr + OUT + o_n[:, None]", "bias_ptr + o_n[:, None]", KERNELS),
    Fault(KERNEL, "tl.arange(0, SLICES) * SLICE)", "tl.arange(0, SLICES))", KERNELS),
    Fault(KERNEL, "b_out / (1.0 + tl.exp(-b_out)) * b_up_out", "b_up_out / (1.0 + tl.exp(-b_up_out)) * b_out", KERNELS),
    Fault(KERNEL, "        tl.extra.cuda.gdc_wait()\n", "        tl.static_assert(True)\n", KERNELS),
    Fault(KERNEL, "tl.minimum(o_n, OUT - 1).to(tl.int64)", "tl.minimum(o_n, OUT - 1)", "tests/triton/test_large_offsets.py"),
    Fault(LAUNCHER, "x.contiguous(), weight.contiguous()", "x, weight.contiguous()", KERNELS),
    Fault(LAUNCHER, "x.contiguous(), weight.contiguous()", "x.contiguous(), weight", KERNELS),
    Fault(LAUNCHER, "None if extra is None else extra.contiguous()", "extra", KERNELS),
    Fault(LAUNCHER, "if residual is not None and bias is None:", "if residual is not None:", KERNELS),
    Fault(LAUNCHER, "torch.addmm(residual, x, weight.t())", "residual.addmm_(x, weight.t())", KERNELS),
    Fault(LAUNCHER, '"BLOCK_K": block_k * warps, "SLICES": warps', '"BLOCK_K": block_k, "SLICES": warps', KERNELS),
    Fault(LAUNCHER, "arch.capability >= 90 and TRITON_VERSION >= (3, 5)", "arch.capability >= 90", KERNELS),
    Fault(LAUNCHER, "arch.capability >= 90 and TRITON_VERSION >= (3, 5)", "TRITON_VERSION >= (3, 5)", KERNELS),
    Fault(LAUNCHER, '**({"launch_pdl": True} if use_pdl else {})', "", KERNELS),
    Fault(LAUNCHER, "rows <= 8 and arch.is_nvidia and", "rows <= 8 and", KERNELS),
    Fault(LAUNCHER, "rows > MAX_MULTIPLY_ADD_ROWS and dtype", "dtype", KERNELS),
    Fault(LAUNCHER, '"use_pdl": False, "backend": "torch"', '"use_pdl": False, "backend": "triton"', KERNELS),
    Fault(LAUNCHER, "COLUMNS = {1: 4, 2: 4, 4: 2, 8: 1, 16: 1}", "COLUMNS = {1: 4, 2: 4, 4: 16, 8: 1, 16: 1}", KERNELS),
    Fault(LAUNCHER, "weight[0] // 2 if silu_mul else weight[0]", "weight[0]", KERNELS),
    Fault(SPEC, "config | {\"use_pdl\": use_pdl}", "config", KERNELS),
    Fault(SPEC, "if batch <= MAX_ROWS]", "]", KERNELS),
    Fault(CASES, '"down": Layer(4096, 12_288, residual=True)', '"down": Layer(4096, 12_288)', KERNELS),
    Fault(CASES, '"gate_up": Layer(12_288, 4096', '"gate_up": Layer(24_576, 4096', KERNELS),
    Fault(REFERENCE, "F.silu(gate) * up", "F.silu(up) * gate", KERNELS),
    Fault(OPERATOR, "(silu_mul,), *tensors)", "(), *tensors)", PREPARED),
    Fault(OPERATOR, "x.shape[0] > MAX_ROWS or x.shape[1] == 0", "x.shape[0] > MAX_ROWS", CALLS),
    Fault(OPERATOR, "x.shape[0] > MAX_ROWS or x.shape[1] == 0", "x.shape[1] == 0", CALLS),
    Fault(OPERATOR, "if silu_mul and rows % 2:", "if False:", CALLS),
    Fault(OPERATOR, '    check_last_axis("x", x)\n', "", CALLS),
    Fault(OPERATOR, 'resolved == "triton" and is_auto(impl, "linear_few_rows")', 'resolved == "triton"', CALLS),
    Fault(OPERATOR, 'resolved == "triton" and is_auto(impl, "linear_few_rows")', "False", CALLS),
    Fault(OPERATOR, "rows <= MAX_ROWS and weight.is_contiguous() and", "weight.is_contiguous() and", KERNELS),
    Fault(OPERATOR, "rows <= MAX_ROWS and weight.is_contiguous() and", "rows <= MAX_ROWS and", KERNELS),
    Fault(FUSED, "return _fuses(x, impl, module) and prefers_triton", "return prefers_triton", LAYERS),
    Fault(FUSED, "_few_rows(x, module, residual=_rows(residual))", "_few_rows(x, module)", LAYERS),
    Fault(FUSED, "{nn.LayerNorm, nn.RMSNorm, nn.Linear, Linear, FusedLinear}", "{nn.LayerNorm, nn.RMSNorm, nn.Linear, Linear}", LAYERS),
    Fault(DECODER, "fused.split_linear(x, self.qkv_proj, self.impl)", "self.qkv_proj(x)", LAUNCHES),
    Fault(DECODER, "fused.linear(out.flatten(1), self.o_proj, self.impl)", "self.o_proj(out.flatten(1))", LAUNCHES),
    Fault("keye_kernels/model/keye.py", "fused.linear(hidden[:, -logits_to_keep:], self.lm_head, self.impl)", "self.lm_head(hidden[:, -logits_to_keep:])", LAYERS),
    Fault(DOCTOR, ', "linear_few_rows": "linear_few_rows"}', "}", DOCTOR_TESTS),
]  # fmt: skip
