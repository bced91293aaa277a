"""Faults in the lean model: configuration, loading, positions, decoder and tower."""

from ..fault import Fault

MODEL = "keye_kernels/model/"
CONFIG, CHECKPOINT, CHECKS = f"{MODEL}config.py", f"{MODEL}checkpoint.py", f"{MODEL}checks.py"
DECODER, KEYE, POSITIONS, VISION, LINEAR = (f"{MODEL}{name}.py" for name in ("decoder", "keye", "positions", "vision", "linear"))
VALUES, CALLS = "tests/model/test_configured_values.py", "tests/model/test_calls.py"
CONFIGS, FILES, TURNS = "tests/model/test_config.py", "tests/model/test_checkpoint.py", "tests/model/test_later_turns.py"
PIECES = f"{FILES} -k pieces"
GENERATION, PREVIEW, V1_5 = (
    "tests/model/test_generation.py",
    "tests/model/test_golden_preview.py",
    "tests/model/test_golden_v1_5.py",
)

OFFICIAL = "tests/model/test_official_arguments.py"
WRONG = f"{FILES} -k wrong"
SHARDS = f"{FILES} -k sharded"

FAULTS = [
    # Configuration
    Fault(CONFIG, "intermediate_size: int = 12288", "intermediate_size: int = 14336", VALUES),
    Fault(CONFIG, "rms_norm_eps: float = 1e-6", "rms_norm_eps: float = 1e-5", VALUES),
    Fault(CONFIG, "tokens_per_second: int = 2", "tokens_per_second: int = 4", VALUES),
    Fault(CONFIG, "layer_norm_eps: float = 1e-6", "layer_norm_eps: float = 1e-5", VALUES),
    Fault(CONFIG, "= edition.context_length", "= PREVIEW.context_length", VALUES),
    Fault(
        CONFIG,
        '{**_object(values, "rope_scaling"), **_object(values, "rope_parameters")}',
        '{**_object(values, "rope_parameters"), **_object(values, "rope_scaling")}',
        VALUES,
    ),
    Fault(CONFIG, 'rope.get("rope_theta", values.get("rope_theta", cls.rope_theta))', 'values.get("rope_theta")', CONFIGS),
    Fault(CONFIG, 'rope.get("rope_type", rope.get("type", "default"))', 'rope.get("type", "default")', VALUES),
    Fault(CONFIG, 'values.get("dtype", values.get("torch_dtype"))', 'values.get("torch_dtype")', VALUES),
    Fault(CONFIG, '("attention_bias", False), ', "", VALUES),
    Fault(CONFIG, 'if activation != "gelu_pytorch_tanh":', 'if "gelu" not in activation:', VALUES),
    Fault(CONFIG, "is_number and low <= value <= high", "is_number and low < value <= high", VALUES),
    Fault(CONFIG, "is_number and low <= value <= high", "is_number and low <= value < high", VALUES),
    Fault(CONFIG, "getattr(self, name), 0, self.vocab_size - 1)", "getattr(self, name), 0, self.vocab_size)", CONFIGS),
    Fault(CONFIG, '"eos_token_id", token, 0, self.vocab_size - 1)', '"eos_token_id", token, 0, self.vocab_size)', CONFIGS),
    Fault(CONFIG, "len(sizes) == 3 and min(sizes) >= 0 and", "len(sizes) == 3 and", CONFIGS),
    # Loading
    Fault(CHECKPOINT, "count = max(1, BYTES_PER_MAPPING", "count = 1 + max(1, BYTES_PER_MAPPING", PIECES),
    Fault(CHECKPOINT, "whole[first : first + count]", "whole[first : first + count - 1]", PIECES),
    Fault(CHECKPOINT, "            first += count", "            first += count + 1", PIECES),
    Fault(CHECKPOINT, "        first, rows = 0, 1\n", "        first, rows = 1, 2\n", PIECES),
    Fault(CHECKPOINT, "[first : first + len(chunk)]", "[: len(chunk)]", PIECES),
    Fault(CHECKPOINT, '(*UNUSED, "lm_head.") if config.tie_word_embeddings else UNUSED', "UNUSED", VALUES),
    Fault(CHECKPOINT, '"gate_up_proj": ("gate_proj", "up_proj")', '"gate_up_proj": ("up_proj", "gate_proj")', PREVIEW),
    Fault(CHECKPOINT, '"F64": torch.float64', '"I8": torch.int8', FILES),
    Fault(CHECKPOINT, "tensors |= {name", "tensors = {name", SHARDS),
    Fault(CHECKPOINT, "tensor.shape != (shape :=", "len(tensor.shape) != len(shape :=", WRONG),
    Fault(CHECKPOINT, "bar.update(target.nbytes)", "bar.update(chunk.nbytes)", VALUES),
    Fault(CHECKPOINT, "disable=not progress", "disable=progress", VALUES),
    Fault(CHECKPOINT, ' or any(path.glob("*.pt"))', "", VALUES),
    Fault(CHECKPOINT, "PureWindowsPath(file).name != file", '"/" in file', FILES),
    Fault(CHECKS, "return given.pop() if given else check_dtype(default)", "return check_dtype(default or given.pop())", VALUES),
    Fault(CHECKS, "torch.get_default_device() if device is None else device", '"cpu" if device is None else device', VALUES),
    Fault(KEYE, "        model._tie_embeddings()\n", "", VALUES),
    Fault(KEYE, 'read_generation_config(path / "generation_config.json"', 'read_generation_config(path / "config.json"', SHARDS),
    Fault(KEYE, "normal_(std=self.config.initializer_range)", "normal_(std=0.02)", VALUES),
    Fault(KEYE, 'float("norm" in name and name.endswith("weight"))', 'float("norm" in name)', VALUES),
    Fault(
        KEYE,
        'self.mlp_AR = Projector(config, impl_for("patch_merge_projection", impl))',
        'self.mlp_AR = Projector(config, "auto")',
        VALUES,
    ),
    # Checks and calls
    Fault(CHECKS, "attention_mask[:, -length:]", "attention_mask[:, :length]", TURNS),
    Fault(
        CHECKS, "length + max_new_tokens > max_position_embeddings", "length + max_new_tokens >= max_position_embeddings", CALLS
    ),
    Fault(CHECKS, "not attention_mask[:, -1].all()", "not attention_mask[:, -1].any()", CALLS),
    Fault(CHECKS, "if low < 0 or high >= vocab_size", "if high >= vocab_size", OFFICIAL),
    Fault(CHECKS, "high >= vocab_size", "high > vocab_size", OFFICIAL),
    Fault(CHECKS, "if len(given) == 2:", "if len(given) == 3:", OFFICIAL),
    Fault(CHECKS, "    if device is not None:\n", "    if False:\n", OFFICIAL),
    Fault(CHECKS, "starts.sum(1) > 1", "starts.sum(1) > 2", GENERATION),
    Fault("keye_kernels/model/cache.py", "(tokens // CACHE_BLOCK_TOKENS + 2)", "(tokens // CACHE_BLOCK_TOKENS + 1)", CALLS),
    Fault(KEYE, "if length == 1 and not cache.is_empty and not has_grids:", "if length == 1 and not cache.is_empty:", TURNS),
    Fault(KEYE, "cache.rope_deltas + (deltas if has_grids", "(deltas if has_grids", TURNS),
    Fault(KEYE, "else mask.sum(1, keepdim=True) - length)", "else 0)", TURNS),
    Fault(KEYE, "computed = computed + cache.length + cache.rope_deltas", "computed = computed + cache.length", TURNS),
    Fault(
        KEYE,
        "inputs = embeds, computed if position_ids is None else position_ids, mask, cache",
        "inputs = embeds, computed, mask, cache",
        CALLS,
    ),
    Fault(KEYE, "hidden[:, -logits_to_keep:]", "hidden[:, -max(logits_to_keep, 1) :]", GENERATION),
    Fault(KEYE, "        cache.rope_deltas = deltas\n", "", TURNS),
    # Positions
    Fault(POSITIONS, "torch.maximum(h, w) - 1) + 1", "torch.maximum(h, w)) + 1", PREVIEW),
    Fault(POSITIONS, "frame.float() * step * config.vision_config.tokens_per_second", "frame.float() * step * 2", VALUES),
    Fault(POSITIONS, "(frame.float() * step * config", "(frame.float() * step.round() * config", PREVIEW),
    Fault(POSITIONS, "index, right=True)", "index, right=False)", V1_5),
    Fault(POSITIONS, "return position.masked_fill(~mask, 1), delta", "return position.masked_fill(~mask, 0), delta", PREVIEW),
    Fault(POSITIONS, "masked_fill(~mask, -1).amax(1, keepdim=True) + 1", "masked_fill(~mask, -1)[:, -1:] + 1", CALLS),
    Fault(POSITIONS, "starts[:, 1:] = placeholder[:, 1:] & (", "starts[:, 1:] = placeholder[:, 1:] | (", PREVIEW),
    Fault(POSITIONS, " and not edition_of(config.model_type).position_block_per_frame:", ":", CALLS),
    Fault(POSITIONS, "if not all(0 <= value * longest < MAX_POSITION", "if not all(-1 <= value * longest < MAX_POSITION", TURNS),
    Fault(POSITIONS, "if len(values) not in (1, len(frames)):", "if len(values) > len(frames):", TURNS),
    Fault(POSITIONS, "if largest + further_tokens > MAX_POSITION:", "if largest + further_tokens >= MAX_POSITION:", TURNS),
    Fault(
        POSITIONS, "dtype=torch.float32, device=device) / pairs)", "dtype=torch.float32, device=device) / (pairs + 1))", VALUES
    ),
    # Decoder
    Fault(
        DECODER,
        "(start + left, start + left + count, start + length)",
        "(start + left, start + count, start + length)",
        GENERATION,
    ),
    Fault(DECODER, "<= slots[:, None]  # [S, M]", "< slots[:, None] + 2  # [S, M]", GENERATION),
    Fault(
        "keye_kernels/model/cache.py",
        "self.valid.index_copy_(1, slots, attention_mask.bool())",
        "self.valid.index_fill_(1, slots, True)",
        TURNS,
    ),
    Fault(DECODER, '"eps": self.q_norm.eps}', '"eps": 1e-6}', VALUES),
    Fault(
        DECODER,
        "self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)",
        "self.q_norm = nn.RMSNorm(config.head_dim)",
        VALUES,
    ),
    Fault(
        DECODER,
        "self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)",
        "self.norm = nn.RMSNorm(config.hidden_size, 1e-5)",
        VALUES,
    ),
    Fault(DECODER, "inverse_frequencies(self.config.rope_theta,", "inverse_frequencies(1e6,", VALUES),
    Fault(DECODER, "list(config.mrope_section)", "[config.head_dim // 8, *[3 * config.head_dim // 16] * 2]", VALUES),
    Fault(DECODER, "is_prompt = cache is None or cache.is_empty", "is_prompt = cache is None or length > 1", GENERATION),
    Fault("keye_kernels/model/fused.py", "    gate, up = module(x)", "    up, gate = module(x)", PREVIEW),
    Fault(
        LINEAR,
        "return super().forward(x).split(self.sizes, dim=-1)",
        "return super().forward(x).split(self.sizes[::-1], dim=-1)",
        CALLS,
    ),
    # Vision tower and projector
    Fault(VISION, "PROJECTOR_EPS = 1e-5", "PROJECTOR_EPS = 1e-6", VALUES),
    Fault(VISION, "eps=self.pre_norm.eps,", "eps=1e-6,", VALUES),
    Fault(
        VISION,
        "self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)",
        "self.post_layernorm = nn.LayerNorm(config.hidden_size)",
        VALUES,
    ),
    Fault(VISION, "inverse_frequencies(config.rope_theta,", "inverse_frequencies(10000.0,", VALUES),
    Fault(VISION, 'impl=impl_for("position_embedding_2d", self.impl)', 'impl="auto"', VALUES),
    Fault(VISION, 'rope_impl = impl_for("rope_2d", self.impl)', 'rope_impl = "auto"', VALUES),
    Fault(VISION, "[batch.raster_index])", ")", PREVIEW),
    Fault(
        VISION,
        "(PIXEL_ORIGIN * norm.rescale_factor - mean) / std",
        "(PIXEL_ORIGIN * norm.rescale_factor + mean) / std",
        "tests/model/test_pixels.py",
    ),
    Fault(
        VISION,
        ".repeat_interleave(pixels)",
        ".repeat(pixels)",
        "tests/model/test_pixels.py",
    ),
]
