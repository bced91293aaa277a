"""Faults in the patching of loaded models."""

from ..fault import Fault

FOLDER, TESTS = "keye_kernels/integrations/patching/", "tests/integrations/patching/"
FAMILIES, FORWARDS, PATCH, REPORT = (f"{FOLDER}{name}.py" for name in ("families", "forwards", "patch", "report"))
PLAIN = "keye_kernels/plain.py"
CONDITIONS, PATCHES, BY_FAMILY, HOOKS, KEYE = (
    f"{TESTS}test_{name}.py" for name in ("conditions", "patch", "families", "hooks", "keye")
)

ELEMENTWISE, FUSED = f"{FOLDER}elementwise.py", "keye_kernels/model/fused.py"
ELEMENTS, LAUNCHES = f"{TESTS}test_elementwise.py", f"{TESTS}test_launches.py"

FAULTS = [
    # Elementwise
    Fault(ELEMENTWISE, "co_names) == names", "co_names) >= names", ELEMENTS),
    Fault(ELEMENTWISE, " and not any(type(value) is float for value in forward.__code__.co_consts)", "", ELEMENTS),
    Fault(ELEMENTWISE, "type(activation) is kind and calls_forward(activation)", "calls_forward(activation)", ELEMENTS),
    Fault(ELEMENTWISE, "type(activation) is kind and calls_forward(activation)", "type(activation) is kind", ELEMENTS),
    Fault(ELEMENTWISE, " or not is_plain(getattr(self, gate_proj))", "", ELEMENTS),
    Fault(ELEMENTWISE, "    is_known = uses_only(norm, RMS_NORM_NAMES)", "    is_known = True", ELEMENTS),
    Fault(ELEMENTWISE, 'if args or (self.training and getattr(self, "gradient_checkpointing", False)):', "if args:", ELEMENTS),
    Fault(FORWARDS, "features = image_features[0] if len(image_features) == 1 else torch", "features = torch", LAUNCHES),
    Fault(FUSED, "alpha=1 / QUICK_GELU", "alpha=1", ELEMENTS),
    Fault(FUSED, "fc1.bias * QUICK_GELU", "fc1.bias", ELEMENTS),
    # Conditions
    Fault(FAMILIES, "module.head_dim > MAX_HEAD_DIM", "module.head_dim >= MAX_HEAD_DIM", CONDITIONS),
    Fault(FAMILIES, "MAX_HEAD_DIM = 256", "MAX_HEAD_DIM = 512", CONDITIONS),
    Fault(FAMILIES, "if module.head_dim % 8 or", "if module.head_dim % 4 or", CONDITIONS),
    Fault(FAMILIES, 'if part == "attention" and dropout:', "if dropout:", CONDITIONS),
    Fault(FAMILIES, "if module.attention_scaling != 1.0:", "if module.attention_scaling > 1.0:", CONDITIONS),
    Fault(FAMILIES, 'not in ("default", "axial"):', 'not in ("default", "axial", "yarn"):', CONDITIONS),
    Fault(FAMILIES, " or len(sections) != 3 or", " or", CONDITIONS),
    Fault(FAMILIES, " or sum(sections) != pairs:", " or sum(sections) > pairs:", CONDITIONS),
    Fault(
        FAMILIES, 'if arguments != ["x", "position_ids"]:', 'if "x" in arguments and "position_ids" not in arguments:', CONDITIONS
    ),
    Fault(FAMILIES, " or forward.__closure__:", ":", CONDITIONS),
    Fault(FAMILIES, "if type(layer) is not nn.Linear or layer.bias is None:", "if type(layer) is not nn.Linear:", CONDITIONS),
    Fault(
        FAMILIES, "zip(names[1::2], (linear_1, linear_2), strict=True)", "zip(names[1:2], (linear_1,), strict=True)", CONDITIONS
    ),
    Fault(FAMILIES, "if type(norm) is not nn.LayerNorm:", "if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):", CONDITIONS),
    Fault(FAMILIES, "if not is_plain(norm, linear_1, linear_2):", "if not is_plain(linear_1, linear_2):", CONDITIONS),
    Fault(FAMILIES, "F.gelu(x), atol=1e-6)", "F.gelu(x), atol=1e-2)", PATCHES),
    Fault(FAMILIES, '"merge_kernel_size", (2, 2)) != (2, 2):', '"merge_kernel_size", (2, 2))[0] != 2:', CONDITIONS),
    Fault(
        FAMILIES,
        "forwards.if_plain(forward, (norm, linear_1, linear_2))",
        "forwards.if_plain(forward, (linear_1, linear_2))",
        CONDITIONS,
    ),
    Fault(
        FAMILIES,
        '"ln_q", "mlp.0", "mlp.1", "mlp.2"),\n    "Qwen2VLRotary',
        '"ln_q", "mlp.2", "mlp.1", "mlp.0"),\n    "Qwen2VLRotary',
        BY_FAMILY,
    ),
    Fault(PLAIN, " and not module._forward_pre_hooks", "", CONDITIONS),
    Fault(PLAIN, " and not module._forward_hooks", "", CONDITIONS),
    Fault(PLAIN, '"forward" not in module.__dict__ and ', "", CONDITIONS),
    # Forwards
    Fault(
        FORWARDS,
        "longest = hidden_states.shape[0] if max_seqlen is None else max_seqlen",
        "longest = hidden_states.shape[0]",
        CONDITIONS,
    ),
    Fault(
        FORWARDS,
        "Segments(cu_seqlens.to(torch.int32), longest), softmax_scale=self.scaling)",
        "Segments(cu_seqlens.to(torch.int32), longest))",
        CONDITIONS,
    ),
    Fault(FORWARDS, "q.shape[0]), softmax_scale=self.scale)", "q.shape[0]))", CONDITIONS),
    Fault(
        FORWARDS,
        'getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)',
        'getattr(config, "rope_scaling", None), getattr(config, "rope_parameters", None)',
        CONDITIONS,
    ),
    Fault(FORWARDS, 'isinstance(parameters, dict) and "mrope_section" in parameters', "isinstance(parameters, dict)", CONDITIONS),
    Fault(
        FORWARDS,
        "position_ids.expand(3, batch_size, length).flatten(1)",
        "position_ids[:, :1].expand(3, batch_size, length).flatten(1)",
        KEYE,
    ),
    Fault(
        FORWARDS,
        "ops.rope_2d(q, k, position_ids.T, inv_freq[0])",
        "ops.rope_2d(q, k, position_ids.T.flip(0), inv_freq[0])",
        BY_FAMILY,
    ),
    Fault(
        FORWARDS,
        "unflatten(-1, (3, -1, module.head_dim)).unbind(-3)",
        "unflatten(-1, (-1, 3, module.head_dim)).unbind(-2)",
        BY_FAMILY,
    ),
    Fault(FORWARDS, "if cu_seqlens is None or output_attentions:", "if cu_seqlens is None:", KEYE),
    Fault(FORWARDS, 'kwargs.get("height_position_ids") is not None or', "", KEYE),
    Fault(FORWARDS, 'and kwargs.get("use_rope") and', "and", KEYE),
    Fault(
        FORWARDS,
        "grids += grid if isinstance(grid, list) else [grid]",
        "grids += grid[:1] if isinstance(grid, list) else [grid]",
        KEYE,
    ),
    Fault(FORWARDS, "return (attended, None) if returns_weights else attended", "return attended", BY_FAMILY),
    Fault(
        FORWARDS,
        'module.__dict__.get(attribute) for attribute in ("forward", "_old_forward")',
        'module.__dict__.get(attribute) for attribute in ("forward",)',
        HOOKS,
    ),
    Fault(FORWARDS, "copy.__kwdefaults__ = forward.__kwdefaults__", "copy.__kwdefaults__ = None", CONDITIONS),
    # Patching, reverting and the report
    Fault(PATCH, "after = before | {part", "after = {part", PATCHES),
    Fault(PATCH, "missing=part in requested))", "missing=True))", PATCHES),
    Fault(PATCH, "if not report.missing or report.part in requested]", "if report.part in requested]", PATCHES),
    Fault(PATCH, "        changes.clear()\n", "", PATCHES),
    Fault(PATCH, "set_parts(item, patched_parts(item.module) - added)", "set_parts(item, frozenset())", PATCHES),
    Fault(
        PATCH,
        "    for item in known:\n        set_parts(item, frozenset())",
        "    for item in known[:-1]:\n        set_parts(item, frozenset())",
        CONDITIONS,
    ),
    Fault(PATCH, "        module._old_forward = MethodType(type(module).forward, module)", "        pass", HOOKS),
    Fault(
        PATCH,
        'return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"',
        'return "forward"',
        HOOKS,
    ),
    Fault(PATCH, "if not other_side and any(", "if other_side and any(", PATCHES),
    Fault(PATCH, "if strict and missing:", "if strict and missing and not replaced:", CONDITIONS),
    Fault(PATCH, '                set_parts(item, patched_parts(item.module) - {"rope"})\n', "                pass\n", KEYE),
    Fault(
        PATCH, 'if report.missing and report.part == "attention" and', 'if report.missing and report.part == "rope" and', PATCHES
    ),
    Fault(PATCH, "if not producers or not consumers:", "if not producers and not consumers:", KEYE),
    Fault(PATCH, "if function is None or function in _parts_of:", "if function is None or function not in _parts_of:", HOOKS),
    Fault(REPORT, "item.class_name, item.part, item.note) for item", 'item.class_name, item.part, "") for item', CONDITIONS),
    Fault(REPORT, 're.sub(r"\\b\\d+\\b", "*", item.module)', 're.sub(r"\\d+", "*", item.module)', CONDITIONS),
    Fault(REPORT, "{len(self.left_alone)} left alone", "{len(self.replaced)} left alone", CONDITIONS),
]
