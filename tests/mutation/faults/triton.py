"""Faults in the kernels, their launchers, launch configs, devices and specs."""

from ..fault import Fault

TRITON = "keye_kernels/triton"
DEVICE, LAUNCH, TABLES, TMA, SPEC, REGISTRY = (
    f"{TRITON}/{name}.py" for name in ("device", "launch", "launch_config", "tma", "spec", "registry")
)
ROPE, ATTENTION, KERNEL, LINEAR, NORM, POSITIONS = (
    f"{TRITON}/{name}.py"
    for name in ("rope", "varlen_attention", "varlen_attention_kernel", "linear", "patch_merge_norm", "position_embedding_2d")
)
FAR, SIZES, SPECS, GPUS = (f"tests/triton/test_{name}.py" for name in ("large_offsets", "heuristics", "specs", "device"))
CACHE, LOOKUP = "tests/triton/test_launch_cache.py", "tests/triton/test_launch_config_lookup.py"
CONFIGS, TUNING = "tests/triton/test_launch_config.py", "tests/tools/autotune/test_planning.py"
ROPES, ATTENTIONS, LINEARS = (f"tests/triton/test_{name}.py" for name in ("rope", "varlen_attention", "linear"))
NORMS, DESCRIPTORS = "tests/triton/test_patch_merge.py", "tests/triton/test_tma.py"
POSITION_TESTS = "tests/triton/test_position_embedding_2d.py"

FAULTS = [
    # Devices and launches
    Fault(DEVICE, "return self.capability >= 90", "return self.capability > 90", GPUS),
    Fault(DEVICE, "in (10, 11)", "== 10", GPUS),
    Fault(DEVICE, '"sm_89": Multiprocessor(48, 24, 100 << 10, 99 << 10)', '"sm_89": Multiprocessor(64, 24, 100 << 10, 99 << 10)', GPUS),
    Fault(DEVICE, '"sm_100": Multiprocessor(64, 32, 228 << 10, 227 << 10)', '"sm_100": Multiprocessor(64, 32, 228 << 10, 228 << 10)', GPUS),
    Fault(DEVICE, 'gcnArchName.split(":")[0]', "gcnArchName", GPUS),
    Fault(DEVICE, "torch.cuda.get_device_properties(device)", "torch.cuda.get_device_properties(torch.device('cuda', 0))", GPUS),
    Fault(LAUNCH, "key = driver.active.get_current_device(), *map", "key = 0, *map", CACHE),
    Fault(LAUNCH, "*map(_kind, arguments), *constants.values()", "*map(_kind, arguments)", CACHE),
    Fault(LAUNCH, "argument.dtype, argument.data_ptr() % ALIGNMENT_BYTES == 0", "argument.dtype", CACHE),
    Fault(LAUNCH, "-(2**31) <= argument < 2**31", "-(2**31) <= argument <= 2**31", CACHE),
    Fault(LAUNCH, "tuple(argument.block_shape)", "True", CACHE),
    Fault(LAUNCH, " and not torch.version.hip", "", CACHE),
    Fault(LAUNCH, "self.function.arg_names[len(arguments) :]", "self.function.arg_names[len(arguments) + 1 :]", CACHE),
    Fault(LAUNCH, "        knobs.compilation.listener = listener\n    return", "        pass\n    return", CACHE),
    Fault(LAUNCH, "        _compile_only.reset(token)", "        pass", CACHE),
    Fault(LAUNCH, "        with _on_device(device):\n", "        if True:\n", CACHE),
    Fault(LAUNCH, "            with _on_device(self.device):\n", "            if True:\n", CACHE),
    Fault(LAUNCH, " and _num_gpus() > 1 else _NO_CHANGE", " and _num_gpus() > 2 else _NO_CHANGE", CACHE),
    Fault(LAUNCH, "address |= x.data_ptr()", "address = x.data_ptr()", CACHE),
    Fault(LAUNCH, "if is_aligned and self.run is not None and not _compile_only.get():", "if is_aligned and self.run is not None:", CACHE),
    Fault(LAUNCH, "        if is_aligned and compiled is not None:", "        if compiled is not None:", CACHE),
    Fault(ROPE, "torch.empty(k_shape, dtype=k_dtype, device=device)", "torch.empty(k_shape, dtype=q_dtype, device=device)", ROPES),
    # Tables of launch configs
    Fault(TABLES, 'BUCKETS = ("max_seqlen", "patches", "rows", "tokens")', 'BUCKETS = ("max_seqlen", "patches", "tokens")', LOOKUP),
    Fault(TABLES, "distance(nearest) <= math.log2(MAX_BUCKET_RATIO)", "distance(nearest) < math.log2(MAX_BUCKET_RATIO)", LOOKUP),
    Fault(TABLES, "abs(math.log2(max(entry[name], 1) / max(key[name], 1)))", "abs(entry[name] - key[name]) / 256", LOOKUP),
    Fault(TABLES, '.split(".")[:2] != triton_version().split(".")[:2]', '.split(".")[:1] != triton_version().split(".")[:1]', LOOKUP),
    Fault(TABLES, "smallest <= value <= MAX_BLOCK_SIZES[name] and", "smallest <= value and", LOOKUP),
    Fault(TABLES, 'MIN_DOT_BLOCK_SIZE if "BLOCK_N" in heuristic else 1', "1", LOOKUP),
    Fault(TABLES, "return {**heuristic, **found} if found", "return found if found", CONFIGS),
    Fault(TABLES, "    for function in (_look_up, _read, *_config_caches):", "    for function in (_look_up, _read):", CONFIGS),
    Fault(TABLES, "            fcntl.flock(file, fcntl.LOCK_EX)", "            pass", CONFIGS),
    Fault(TABLES, "and all(entry[name] == key[name] for name in key if name not in BUCKETS)", "", LOOKUP),
    Fault(TABLES, 'os.environ.get("XDG_CACHE_HOME") or Path.home()', 'os.environ.get("XDG_CACHE_HOME", Path.home())', LOOKUP),
    Fault(TABLES, "return 1 << (number - 1).bit_length() if number > 0 else 1", "return 1 << number.bit_length()", SIZES),
    # Heuristics
    Fault(ATTENTION, "128 if head_dim <= 80 else 64, 64, 4, num_stages=3", "128 if head_dim < 80 else 64, 64, 4, num_stages=3", SIZES),
    Fault(ATTENTION, "head_dim <= (128 if arch.has_tcgen05 else 80)", "head_dim <= (128 if arch.has_tma else 80)", SIZES),
    Fault(ATTENTION, "if head_dim <= 160 or arch.has_wgmma:", "if head_dim <= 160:", SIZES),
    Fault(ATTENTION, "_config_of(32, 32, 8) if head_dim <= 80", "_config_of(32, 32, 8) if head_dim <= 128", SIZES),
    Fault(ATTENTION, " and not arch.has_tcgen05 and main <= 64", " and main <= 64", SIZES),
    Fault(ATTENTION, "TRITON_VERSION >= (3, 5)", "TRITON_VERSION > (3, 5)", SIZES),
    Fault(ATTENTION, "min(num_key_heads, L2_GROUP_BYTES", "min(16, L2_GROUP_BYTES", SIZES),
    Fault(ATTENTION, "if not (q_head | k_head | v_head) % 8", "if not (q_head | k_head) % 8", SIZES),
    Fault(LINEAR, "(2 if block_m == 128 else 0.75)", "(1 if block_m == 128 else 0.75)", SIZES),
    Fault(LINEAR, "arch.capability in (90, 100, 103)", "arch.capability in (90, 100)", SIZES),
    Fault(LINEAR, "divisor = width & -width", "divisor = width", LINEARS),
    Fault(ROPE, "    if head_dim >= 128:", "    if head_dim > 128:", SIZES),
    Fault(ROPE, "INT64_OFFSETS=reach >= 2**31", "INT64_OFFSETS=reach > 2**31", SIZES),
    Fault(ROPE, "heads = q_heads, k_heads, k_heads", "heads = 0, k_heads, k_heads", SIZES),
    Fault(ROPE, '"VECTOR": half & -half', '"VECTOR": pairs', SIZES),
    # Kernels
    Fault(ROPE, "tl.program_id(0).to(tl.int64) * BLOCK_T", "tl.program_id(0) * BLOCK_T", FAR),
    Fault(ROPE, "m_token[None, :, None] & (o_head < HEADS) &", "m_token[None, :, None] &", ROPES),
    Fault(ROPE, "b_position = tl.where(o_pair[None, :] < first_pair,", "b_position = tl.where(o_pair[None, :] <= first_pair,", ROPES),
    Fault(ROPE, "axis=2, keep_dims=True) / HEAD_DIM", "axis=2, keep_dims=True) / (HEAD_DIM + 1)", ROPES),
    Fault(ROPE, "scale = tl.rsqrt(mean + eps)", "scale = tl.rsqrt(mean + 1e-6)", ROPES),
    Fault(POSITIONS, "tl.program_id(0).to(tl.int64) * BLOCK_T", "tl.program_id(0) * BLOCK_T", FAR),
    Fault(POSITIONS, "mask = m_token[:, None] & (o_channel < CHANNELS)", "mask = m_token[:, None] & (o_channel <= CHANNELS)", POSITION_TESTS),
    Fault(LINEAR, "tl.minimum(o_m, num_rows - 1).to(tl.int64)", "tl.minimum(o_m, num_rows - 1)", FAR),
    Fault(LINEAR, "o_m.to(tl.int64)[:, None] * OUT", "o_m[:, None] * OUT", FAR),
    Fault(LINEAR, "mask=o_n < OUT, other=0.0", "mask=o_n < OUT - 1, other=0.0", LINEARS),
    Fault(LINEAR, "b_x, b_weight = tl.load(p_x + k, mask=m_k, other=0.0), tl.load(p_weight + k, mask=m_k, other=0.0)",
          "b_x, b_weight = tl.load(p_x + k, mask=m_k, other=1.0), tl.load(p_weight + k, mask=m_k, other=1.0)", LINEARS),
    Fault(NORM, "o_patch.to(tl.int64)[:, None] * STRIDE", "o_patch[:, None] * STRIDE", FAR),
    Fault(NORM, "o_row.to(tl.int64)[:, None] * (PATCHES * CHANNELS)", "o_row[:, None] * (PATCHES * CHANNELS)", FAR),
    Fault(NORM, "variance = tl.sum(square + delta * delta * STEPS, 1)", "variance = tl.sum(square + delta * delta, 1)", NORMS),
    Fault(KERNEL, "key_token, query_token = first_token.to(tl.int64),", "key_token, query_token = first_token,", FAR),
    Fault(KERNEL, "k_ptr += key_token * STRIDE_K + key_head.to(tl.int64)", "k_ptr += key_token * STRIDE_K + key_head", FAR),
    Fault(KERNEL, "m_score = (o_n < num_keys)[None, :]", "m_score = (o_n <= num_keys)[None, :]", ATTENTIONS),
    Fault(KERNEL, "(first_query if CAUSAL else num_keys) // BLOCK_N * BLOCK_N", "num_keys // BLOCK_N * BLOCK_N", ATTENTIONS),
    Fault(KERNEL, "first_key + o_n[None, :] <= o_query[:, None]", "first_key + o_n[None, :] < o_query[:, None]", ATTENTIONS),
    Fault(KERNEL, "b_max + tl.log2(b_sum)) * LN_2", "b_max + tl.log2(b_sum))", ATTENTIONS),
    Fault(KERNEL, "if STRIDE >= 2**24:", "if STRIDE >= 2**31:", ATTENTIONS),
    Fault(KERNEL, "tl.minimum(end, num_tokens) - first_token", "end - first_token", ATTENTIONS),
    Fault(ATTENTION, "lse.fill_(-math.inf)", "lse.fill_(0)", ATTENTIONS),
    Fault(ATTENTION, "            q = -q", "            pass", ATTENTIONS),
    Fault(TMA, "for stride in x.stride()[:-1]]", "for stride in x.stride()[:-2]]", DESCRIPTORS),
    Fault(TMA, "return x.stride(-1) == 1 and not any", "return not any", DESCRIPTORS),
    Fault(TMA, "(x.data_ptr(), *strides)", "strides", DESCRIPTORS),
    # Specs, verify cases and the registry
    Fault(SPEC, "torch.arange(max(len(head), total - count), total", "torch.arange(total - count, total", SPECS),
    Fault(f"{TRITON}/rope_spec.py", '*([1, batch] for batch in workload.get("decode", [])), *workload', "*workload", SPECS),
    Fault(f"{TRITON}/varlen_attention_spec.py", '"GROUP": heads // key_heads', '"GROUP": 1', SPECS),
    Fault(f"{TRITON}/varlen_attention_spec.py", "(heads + 2 * key_heads) * head_dim", "3 * heads * head_dim", SPECS),
    Fault(f"{TRITON}/varlen_attention_spec.py", "sorted({0, shape.count - 1})", "[0]", SPECS),
    Fault(f"{TRITON}/varlen_attention_spec.py", 'config["num_stages"] if arch.is_nvidia else config["num_stages"] - 1', 'config["num_stages"]',
          SIZES),
    Fault(f"{TRITON}/varlen_attention_spec.py", "shape.size > MIN_SEQLEN_FOR_TMA", "shape.size >= MIN_SEQLEN_FOR_TMA", TUNING),
    Fault(f"{TRITON}/linear_spec.py", 'spec.TORCH_DTYPES[dtype], shape.part == "linear_1")', "spec.TORCH_DTYPES[dtype], True)", SPECS),
    Fault(f"{TRITON}/patch_merge_norm_spec.py", "size // PATCHES) for count", "size) for count", SPECS),
    Fault(f"{TRITON}/varlen_attention_cases.py", 'text, 128, reference, causal=True, return_lse=True)', "text, 128, reference, causal=True)", SPECS),
    Fault(f"{TRITON}/patch_merge_norm_cases.py", '(("before", channels), ("after", PATCHES * channels))', '(("before", channels),)', SPECS),
    Fault(f"{TRITON}/rope_cases.py", 'verify_case("text", "text, norm", tokens, text, reference, norm=True)',
          'verify_case("text", "text, norm", tokens, text, reference, norm=False)', SPECS),
    Fault(f"{TRITON}/cases.py", "unit_roundoff(dtype) * exact.abs() + subnormal_error(dtype)",
          "10 * unit_roundoff(dtype) * exact.abs() + subnormal_error(dtype)", "tests/tools/test_verify_faults.py"),
    Fault(f"{TRITON}/rope_cases.py", "COS_SIN_ERROR = 2e-6", "COS_SIN_ERROR = 2e-5", "tests/tools/test_verify_faults.py"),
]  # fmt: skip
