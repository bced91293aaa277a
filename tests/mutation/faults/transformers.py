"""Faults in the transformers integration and in the vLLM plugin."""

from ..fault import Fault

FOLDER, TESTS = "keye_kernels/integrations/transformers/", "tests/integrations/transformers/"
ATTENTION, CONFIG, GENERATION, MODELING, PRETRAINED, TEXT, VISION, IMAGES, PROCESSING = (
    f"{FOLDER}{name}.py"
    for name in (
        *("attention", "config", "generation", "modeling", "pretrained", "text", "vision"),
        *("image_processing", "processing"),
    )
)
ATTENTIONS, INPUTS, MODELS, TRAINING = (f"{TESTS}test_{name}.py" for name in ("attention", "inputs", "model", "training"))
PROCESSORS, ARGUMENTS = f"{TESTS}test_processor.py", f"{TESTS}test_processor_arguments.py"
REGISTER, PLUGIN = "keye_kernels/integrations/vllm/models.py", "keye_kernels/integrations/vllm/__init__.py"
MODULES, PLUGINS = "tests/integrations/vllm/test_modules.py", "tests/integrations/vllm/test_plugin.py"
LAYERS = "tests/integrations/vllm/test_layers.py"
ENCODER_GRAPH, GRAPHS = "keye_kernels/integrations/vllm/encoder_graph.py", "tests/integrations/vllm/test_encoder_graph.py"

FAULTS = [
    # Attention
    Fault(ATTENTION, "and length == key.shape[2] and length > 1:", "and length == key.shape[2]:", ATTENTIONS),
    Fault(ATTENTION, "and length == key.shape[2] and length > 1:", "and length > 1:", ATTENTIONS),
    Fault(ATTENTION, "if cu_seq_lens_q is None or dropout:", "if cu_seq_lens_q is None:", ATTENTIONS),
    Fault(ATTENTION, 'getattr(module, "is_causal", True) if is_causal is None else is_causal', "True", ATTENTIONS),
    Fault(ATTENTION, "x[:, :, :length].transpose", "x[:, :, -length:].transpose", ATTENTIONS),
    Fault(ATTENTION, "softmax_scale=scaling, causal=causal", "causal=causal", ATTENTIONS),
    Fault(ATTENTION, "cu_seq_lens_q.int()", "cu_seq_lens_q", ATTENTIONS),
    Fault(ATTENTION, "attention_mask[..., : key.shape[2]]", "attention_mask[..., -key.shape[2] :]", ATTENTIONS),
    Fault(ATTENTION, "query @ key.transpose(2, 3) * scaling", "query @ key.transpose(2, 3) * key.shape[-1] ** -0.5", ATTENTIONS),
    Fault(ATTENTION, "x.repeat_interleave(group, dim=1)", "x.repeat(1, group, 1, 1)", ATTENTIONS),
    Fault(ATTENTION, '"flash_attention_2": "flash_attn"', '"flash_attention_2": "auto"', ATTENTIONS),
    Fault(VISION, "batch, inv_freq, impl=impl))", "batch, inv_freq))", ATTENTIONS),
    # Configuration
    Fault(CONFIG, '{**TEXT_DEFAULTS, "max_position_embeddings": lean.max_position_embeddings}', "TEXT_DEFAULTS", INPUTS),
    Fault(CONFIG, '"rope_theta": lean.rope_theta,', '"rope_theta": kwargs.get("rope_theta", LeanConfig.rope_theta),', INPUTS),
    Fault(CONFIG, '"mrope_section": list(lean.mrope_section),', '"mrope_section": list(LeanConfig.mrope_section),', MODELS),
    Fault(CONFIG, '"layers.*.mlp.down_proj": "rowwise"', '"layers.*.mlp.down_proj": "colwise"', INPUTS),
    Fault(CONFIG, '        "layers.*.self_attn.v_proj": "colwise",\n', "", INPUTS),
    Fault(CONFIG, 'super().__init__(**{"tie_word_embeddings": False, **kwargs})', "super().__init__(**kwargs)", INPUTS),
    Fault(CONFIG, "super().from_dict({**flat, **nested}, **kwargs)", "super().from_dict({**nested, **flat}, **kwargs)", INPUTS),
    Fault(CONFIG, '"hidden_act": "silu", "use_cache": True}', '"hidden_act": "silu", "use_cache": False}', INPUTS),
    # Positions, seconds and images of generation
    Fault(GENERATION, "attention_mask[:, -tokens.shape[1] :]", "attention_mask[:, : tokens.shape[1]]", INPUTS),
    Fault(
        GENERATION,
        "position, delta = position + past + before, delta + before",
        "position, delta = position + past, delta",
        INPUTS,
    ),
    Fault(GENERATION, "position + past + before, delta + before", "position + past + before, delta", INPUTS),
    Fault(GENERATION, "torch.arange(past, past + tokens.shape[1]", "torch.arange(past - 1, past - 1 + tokens.shape[1]", MODELS),
    Fault(GENERATION, "position_ids.amax((0, 2))[:, None] + 1 - end", "position_ids.amax((0, 2))[:, None] - end", MODELS),
    Fault(GENERATION, "seconds.expand(len(patches))[order]", "seconds[: len(order)]", INPUTS),
    Fault(GENERATION, "            check_seconds(self.config.lean(), kwargs[grids], seconds)\n", "", INPUTS),
    Fault(
        GENERATION,
        "times * torch.where(sequence == b)[0].tolist()",
        "torch.where(sequence == b)[0].repeat_interleave(times).tolist()",
        MODELS,
    ),
    Fault(GENERATION, "ends = placeholders.cumsum(0) * merged", "ends = placeholders.cumsum(0)", MODELS),
    Fault(
        GENERATION,
        "torch.searchsorted(ends, patches.cumsum(0))",
        "torch.searchsorted(ends, patches.cumsum(0), right=True)",
        INPUTS,
    ),
    Fault(GENERATION, 'if grids == "video_grid_thw" and seconds is not None:', "if seconds is not None:", INPUTS),
    Fault(GENERATION, "and not self._is_new_prompt(tokens, kwargs):", ":", MODELS),
    # Forward
    Fault(MODELING, "        check_seconds(config, video_grid_thw, second_per_grid_ts)\n", "", INPUTS),
    Fault(MODELING, "check_placeholders(config, input_ids, image_grid_thw, video_grid_thw, attention_mask)", "pass", MODELS),
    Fault(MODELING, "position_ids[-3:]", "position_ids[:3]", INPUTS),
    Fault(MODELING, "else slice(-logits_to_keep, None)", "else slice(-max(logits_to_keep, 1), None)", INPUTS),
    Fault(MODELING, "keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice", "keep = slice", INPUTS),
    Fault(
        MODELING, "self.config.use_cache if use_cache is None else use_cache", "True if use_cache is None else use_cache", INPUTS
    ),
    Fault(MODELING, "vocab_size=self.config.vocab_size, **kwargs)", "vocab_size=self.config.vocab_size)", INPUTS),
    Fault(MODELING, "input_ids == getattr(self.config, token)", "input_ids == self.config.image_token_id", INPUTS),
    Fault(MODELING, '"mlp_AR.linear_2": "rowwise"', '"mlp_AR.linear_2": "colwise"', INPUTS),
    Fault(MODELING, '_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}', "_tied_weights_keys = {}", MODELS),
    Fault(MODELING, "            config.vision_config._attn_implementation = NAME\n", "            pass\n", MODELS),
    Fault(MODELING, 'Projector(config.lean(), impl="auto")', 'Projector(config.lean(), impl="reference")', ATTENTIONS),
    Fault(PRETRAINED, '"*.pt", "*.pth")', '"*.pt")', MODELS),
    Fault(PRETRAINED, ', kwargs.get("subfolder") or "")', ")", INPUTS),
    Fault(
        PRETRAINED,
        ' or kwargs.pop("use_safetensors", None) is False:',
        ' or kwargs.pop("use_safetensors", None) == "no":',
        INPUTS,
    ),
    Fault(PRETRAINED, "_keys_to_ignore_on_load_unexpected = [name", "_keys_to_ignore_on_load_missing = [name", INPUTS),
    # Text model and tower
    Fault(
        TEXT,
        "self.scaling = config.head_dim**-0.5",
        "self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5",
        MODELS,
    ),
    Fault(
        TEXT,
        "self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)",
        "self.k_norm = nn.RMSNorm(config.head_dim)",
        INPUTS,
    ),
    Fault(TEXT, '"eps": self.q_norm.eps}', '"eps": 1e-6}', INPUTS),
    Fault(TEXT, "rope_theta = self.config.rope_parameters", 'rope_theta = {"rope_theta": 1e6}', INPUTS),
    Fault(TEXT, "== NAME and past == 0 and _is_contiguous", "== NAME and _is_contiguous", ATTENTIONS),
    Fault(TEXT, "hidden_states=(*states, x) if", "hidden_states=(*states,) if", MODELS),
    Fault(
        TEXT,
        "                states.append(x)\n            x, weights = layer(x, **batch, **kwargs)\n",
        "                pass\n            x, weights = layer(x, **batch, **kwargs)\n            states.append(x)\n",
        INPUTS,
    ),
    Fault(
        TEXT,
        "self.config.output_hidden_states if output_hidden_states is None else output_hidden_states",
        "output_hidden_states",
        INPUTS,
    ),
    Fault(TEXT, "not has_inner_padding(attention_mask).any()", "True", MODELS),
    Fault(VISION, "(-1, self.head_dim)) for proj in", "(self.head_dim, -1)).transpose(-1, -2) for proj in", MODELS),
    Fault(
        VISION,
        "self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)",
        "self.layer_norm2 = nn.LayerNorm(config.hidden_size)",
        INPUTS,
    ),
    Fault(VISION, "        if is_plain(self.pre_norm, self.linear_1, self.linear_2):", "        if True:", TRAINING),
    # Processors
    Fault(IMAGES, 'self.size = {**self.size, "max_pixels": value}', "self.max_area = value", PROCESSORS),
    Fault(
        IMAGES,
        "processor = cls(**{**image_processor_dict, **given})",
        "processor = cls(**{**given, **image_processor_dict})",
        PROCESSORS,
    ),
    Fault(PROCESSING, "for group in (*groups, kwargs)", "for group in (kwargs, *groups)", ARGUMENTS),
    Fault(PROCESSING, '            tokenizer.padding_side = "left"\n', "", PROCESSORS),
    Fault(PROCESSING, '{"padding_side": self.tokenizer.padding_side}', '{"padding_side": "left"}', PROCESSORS),
    Fault(PROCESSING, "**{**found, **options})", "**{**options, **found})", ARGUMENTS),
    Fault(PROCESSING, "continue_final_message=continue_final_message,\n            thinking", "thinking", PROCESSORS),
    # vLLM
    Fault(REGISTER, "if self._replaces_projector:", "if not self._replaces_projector:", MODULES),
    Fault(REGISTER, "prod(1) // merge_size**2", "prod(1) // merge_size", MODULES),
    Fault(REGISTER, "features.view(-1, *self.pre_norm.normalized_shape)", "features", MODULES),
    Fault(
        REGISTER, "view(x.shape[0], 3, -1, self.head_dim).unbind(1)", "view(x.shape[0], -1, 3, self.head_dim).unbind(2)", MODULES
    ),
    Fault(REGISTER, "edition_of(self.config.model_type).segment_by_frame\n", "False\n", MODULES),
    Fault(REGISTER, "vllm_config.quant_config is None and not", "not", MODULES),
    Fault(REGISTER, "bool(lora and lora.enable_tower_connector_lora)", "bool(lora)", MODULES),
    Fault(REGISTER, "load_weights(weights) | {UNUSED_TABLE}", "load_weights(weights)", MODULES),
    Fault(REGISTER, "fused.norm(x, self.layer_norm1)", "fused.norm(x, self.layer_norm2)", LAYERS),
    Fault(REGISTER, "and not envs.VLLM_BATCH_INVARIANT", "", LAYERS),
    Fault(REGISTER, "if isinstance(self.visual, keye.KeyeSiglipVisionModel):", "if self.visual is not None:", MODULES),
    Fault(ENCODER_GRAPH, "buffer[len(offsets) :] = offsets[-1]", "pass", GRAPHS),
    Fault(ENCODER_GRAPH, "covers_all_tokens=False", "covers_all_tokens=True", GRAPHS),
    Fault(ENCODER_GRAPH, "pixels.shape[0], covers", "pixels.shape[0] // 4, covers", GRAPHS),
    Fault(PLUGIN, "for edition in EDITIONS.values():", "for edition in list(EDITIONS.values())[:1]:", MODULES),
    Fault(PLUGIN, 'os.environ.get(ENVIRONMENT_VARIABLE) == "0"', "os.environ.get(ENVIRONMENT_VARIABLE)", MODULES),
    Fault(
        PLUGIN,
        'needed_by="the plugin of keye_kernels", distributions=DISTRIBUTIONS',
        'needed_by="the plugin of keye_kernels"',
        PLUGINS,
    ),
]
