"""Faults in what the processor does with arguments, images, prompts and files."""

from ..fault import Fault

PROCESSING = "keye_kernels/processing/"
ARGUMENTS, BATCH, IMAGES, PATCHES = (f"{PROCESSING}{name}.py" for name in ("arguments", "batch", "images", "patches"))
PROCESSOR, PROMPTS, RESIZE, SOURCES = (f"{PROCESSING}{name}.py" for name in ("processor", "prompts", "resize", "sources"))
TEMPLATES, TOKENIZER, VISION_INFO, PIXELS = (
    f"{PROCESSING}{name}.py" for name in ("templates", "tokenizer", "vision_info", "pixels")
)
NORM, EDITIONS, REQUIREMENTS = (f"keye_kernels/{name}.py" for name in ("pixel_norm", "editions", "requirements"))

BOUNDARIES = "tests/processing/test_boundaries.py"
SETTINGS = "tests/processing/test_settings.py tests/processing/test_passed_on.py"
DOWNLOADS = "tests/processing/test_downloads.py"
PROCESSOR_TESTS = "tests/processing/test_processor.py"
PROMPT_TESTS = "tests/processing/test_prompts.py"
UNTRUSTED = "tests/processing/test_untrusted_sources.py"
KINDS, SPECIAL = "tests/processing/test_source_kinds.py", "tests/processing/test_special_tokens.py"

FAULTS = [
    # Arguments of the processor
    Fault(ARGUMENTS, "images.ndim == 4 else", "images.ndim == 5 else", SETTINGS),
    Fault(ARGUMENTS, "videos.ndim == 5 else", "videos.ndim == 6 else", SETTINGS),
    Fault(ARGUMENTS, 'getattr(item, "ndim", 3) in (2, 3)', 'getattr(item, "ndim", 4) in (2, 3)', SETTINGS),
    Fault(ARGUMENTS, "DEFAULT_FPS if rate is None else rate", "1.0 if rate is None else rate", SETTINGS),
    Fault(ARGUMENTS, "if len(timestamps) >= len(num_frames)", "if len(timestamps) > len(num_frames)", SETTINGS),
    Fault(ARGUMENTS, "leftmost != rightmost", "False", "tests/processing/test_processor_video.py"),
    Fault(ARGUMENTS, "axes = 2 if nested else 1", "axes = 1", SETTINGS),
    Fault(ARGUMENTS, 'first + "".join(next(remaining) + piece', 'first + "".join(piece + next(remaining)', "tests/processing/test_processor_video.py"),
    # The batch
    Fault(BATCH, 'if padding_side == "left" else', 'if padding_side == "right" else', PROCESSOR_TESTS),
    Fault(BATCH, "max(lengths)), pad_token_id or 0", "max(lengths)), 0", PROCESSOR_TESTS),
    Fault(BATCH, "dtype if value.is_floating_point() else None", "dtype", PROCESSOR_TESTS),
    Fault(BATCH, "target, target_dtype, non_blocking)", "target, target_dtype)", SETTINGS),
    Fault(BATCH, "if pad_token_id is None:", "if False:", SETTINGS),
    # Images
    Fault(IMAGES, "image = load_image(source, edition=edition, ", "image = load_image(source, ", SETTINGS),
    Fault(IMAGES, "edition=edition, timeout=timeout, max_bytes=max_bytes)\n    height", "edition=edition)\n    height", SETTINGS),
    Fault(IMAGES, "image.mode == \"RGBA\" and blend_alpha", 'image.mode == "RGBA"', "tests/processing/test_images.py"),
    Fault(IMAGES, "return image.resize((width, height))", "return image.resize((width, height), resample=2)", SETTINGS),
    Fault(IMAGES, "min_pixels=edition_limits[0], max_pixels=edition_limits[1]", "min_pixels=1, max_pixels=edition_limits[1]", BOUNDARIES),
    Fault(IMAGES, "min_pixels=edition_limits[0], max_pixels=edition_limits[1]", "min_pixels=edition_limits[0], max_pixels=1e9", BOUNDARIES),
    Fault(IMAGES, "low > high:", "low >= high:", BOUNDARIES),
    Fault(IMAGES, "np.asarray(image) / 257", "np.asarray(image) / 256", "tests/processing/test_invalid_inputs.py"),
    Fault(IMAGES, "np.rint(np.asarray(image) / 257)", "np.floor(np.asarray(image) / 257)", BOUNDARIES),
    # Patches
    Fault(PATCHES, "min_pixels: int = 3136", "min_pixels: int = 784", SETTINGS),
    Fault(PATCHES, "max_pixels: int = 1003520", "max_pixels: int = 12845056", SETTINGS),
    Fault(PATCHES, '("patch_size", "merge_size", "resample")}', '("patch_size", "merge_size")}', "tests/processing/test_patches.py"),
    Fault(PATCHES, '("patch_size", "merge_size", "resample")}', '("merge_size", "resample")}', SETTINGS),
    Fault(PATCHES, '(("min_pixels", "shortest_edge"), ', '(("min_pixels", "smallest_edge"), ', SETTINGS),
    Fault(PATCHES, "limits = (config.get(name), size.get(name), size.get(edge))", "limits = (config.get(name), size.get(edge))", SETTINGS),
    Fault(PATCHES, "return self.patch_size * self.merge_size", "return 28", SETTINGS),
    Fault(PATCHES, "transpose(0, 2, 4, 1, 3)", "transpose(0, 2, 4, 3, 1)", "tests/processing/test_patches.py"),
    Fault(PATCHES, ".resize((width, height), resample=self.resample)", ".resize((width, height), resample=3)", SETTINGS),
    Fault(PATCHES, "self.resized_size(*tensors[0].shape[-2:])", "self.resized_size(*tensors[-1].shape[-2:])", "tests/processing/test_patches.py"),
    Fault(PIXELS, "pixels = pixels.round()", "pixels = pixels.floor()", BOUNDARIES),
    Fault(PIXELS, "(pixels <= 255)", "(pixels < 255)", BOUNDARIES),
    Fault(PATCHES, '("resample", MAX_RESAMPLE)', '("resample", MAX_RESAMPLE - 1)', BOUNDARIES),
    Fault(PATCHES, "if self.min_pixels > self.max_pixels", "if self.min_pixels >= self.max_pixels", BOUNDARIES),
    Fault(PATCHES, "np.float32(self.norm.rescale_factor)", "np.float32(1 / 255)", SETTINGS),
    Fault(NORM, 'values["rescale_factor"] = factor', 'values["rescale_factor"] = 1 / 255', SETTINGS),
    Fault(NORM, "image_std: tuple[float, ...] = (0.5, 0.5, 0.5)", "image_std: tuple[float, ...] = (1.0, 1.0, 1.0)", SETTINGS),
    # The processor
    Fault(PROCESSOR, '{"min_pixels": min_pixels, "max_pixels"', '{"min_pixels": None, "max_pixels"', SETTINGS),
    Fault(PROCESSOR, "add_generation_prompt=add_generation_prompt,", "add_generation_prompt=True,", SETTINGS),
    Fault(PROCESSOR, "chat_template or self.chat_template", "self.chat_template", "tests/processing/test_invalid_inputs.py"),
    Fault(PROCESSOR, "return_video_kwargs, edition=self.edition, **options", "return_video_kwargs, **options", "tests/processing/test_processor_video.py"),
    Fault(PROCESSOR, "merged_patches = self.patch_config.merge_size**2", "merged_patches = 4", SETTINGS),
    Fault(PROCESSOR, "self.tokenizer.batch_decode(sequences, skip_special_tokens,", "self.tokenizer.batch_decode(sequences, False,", SETTINGS),
    Fault(PROCESSOR, "            self.tokenizer.token_to_id(token)\n", "            pass\n", SETTINGS),
    Fault(PATCHES, 'str(pixel_dtype).removeprefix("torch.")', "str(pixel_dtype)", SETTINGS),
    Fault(PROCESSOR, "seconds_per_grid(video_kwargs.get(\"fps\"), len(videos))", "seconds_per_grid(None, len(videos))", "tests/processing/test_processor_video.py"),
    # Forms of sources, special tokens as plain text
    Fault(PIXELS, "((0, -1) if is_tensor else (-1, 0))", "(-1, 0)", KINDS),
    Fault(SOURCES, "return source.getvalue() if isinstance(source, io.BytesIO)", "return source.read() if isinstance(source, io.BytesIO)", KINDS),
    Fault(SOURCES, "len(source) >= MIN_BASE64_CHARACTERS", "True", KINDS),
    Fault(SOURCES, "\"%:/?#[]@!$&'()*+,;=~\"", "\":/?#[]@!$&'()*+,;=~\"", KINDS),
    Fault(TOKENIZER, "while pattern.search(text):", "if pattern.search(text):", SPECIAL),
    Fault(TOKENIZER, "            text += PLAIN_TEXT_MARK\n", "            pass\n", SPECIAL),
    Fault(TOKENIZER, "text if backend.normalizer is None else backend.normalizer.normalize_str(text)", "text", SPECIAL),
    Fault(PROCESSOR, "p if isinstance(p, SafePrompt) else ", "", SPECIAL),
    # Prompts
    Fault(PROMPTS, '"think": "/think", "no_think": "/no_think"', '"think": "/no_think", "no_think": "/think"', PROMPT_TESTS),
    Fault(PROMPTS, "for turn in reversed(turns):", "for turn in turns:", PROMPT_TESTS),
    Fault(PROMPTS, "texts[-1][\"text\"] += suffix", "texts[0][\"text\"] += suffix", SETTINGS),
    Fault(PROMPTS, "loop.first and message.role != 'system'", "message.role != 'system'", PROMPT_TESTS),
    Fault(PROMPTS, '.get("default")', '.get("tool_use")', PROMPT_TESTS),
    Fault(PROMPTS, 'analysis, rest = _split_part(rest, "analysis")', 'analysis, _ = _split_part(rest, "analysis")', PROMPT_TESTS),
    # Sizes
    Fault(RESIZE, "> MAX_ASPECT_RATIO:", ">= MAX_ASPECT_RATIO:", BOUNDARIES),
    Fault(RESIZE, "rounded_height * rounded_width > max_pixels", "rounded_height * rounded_width >= max_pixels", BOUNDARIES),
    Fault(RESIZE, "rounded_height * rounded_width < min_pixels", "rounded_height * rounded_width <= min_pixels", BOUNDARIES),
    Fault(RESIZE, "max(factor, round(height / factor) * factor)", "max(factor, int(height / factor + 0.5) * factor)", "tests/processing/test_smart_resize.py"),
    Fault(RESIZE, "factor, round(enlarged_width * factor / enlarged_height)", "factor, int(enlarged_width * factor / enlarged_height)", BOUNDARIES),
    Fault(RESIZE, "math.ceil(height * enlarge / factor)", "math.floor(height * enlarge / factor)", "tests/processing/test_smart_resize.py"),
    # Files and downloads
    Fault(SOURCES, "len(content) > max_bytes", "len(content) >= max_bytes", BOUNDARIES),
    Fault(SOURCES, "    if size > max_bytes:", "    if size >= max_bytes:", BOUNDARIES),
    Fault(SOURCES, "while size <= max_bytes and", "while size < max_bytes and", BOUNDARIES),
    Fault(SOURCES, '"".join(payload.split())', "payload", SETTINGS),
    Fault(SOURCES, "if path.exists() else Path(urllib.parse.unquote(str(path)))", "if path.exists() else path", "tests/processing/test_images.py"),
    Fault(SOURCES, "path if path.exists() else Path(urllib.parse.unquote(str(path)))", "Path(urllib.parse.unquote(str(path)))", SETTINGS),
    Fault(SOURCES, "if not _is_http(newurl):", "if False:", DOWNLOADS),
    Fault(SOURCES, '{"User-Agent": USER_AGENT}', "{}", SETTINGS),
    Fault(SOURCES, "if missing:", "if False:", DOWNLOADS),
    # Chat templates
    Fault(TEMPLATES, "if bits > MAX_INTEGER_BITS", "if bits >= MAX_INTEGER_BITS", BOUNDARIES),
    Fault(TEMPLATES, "    if length > MAX_LENGTH:", "    if length >= MAX_LENGTH:", BOUNDARIES),
    Fault(TEMPLATES, "    if left[0] < 0:", "    if left[0] <= 0:", BOUNDARIES),
    Fault(TEMPLATES, "_check_length(len(left) + len(right))", "_check_length(len(left))", BOUNDARIES),
    Fault(TEMPLATES, "length += len(texts[-1])", "length = len(texts[-1])", BOUNDARIES),
    Fault(TEMPLATES, "left.bit_length() + right.bit_length()", "left.bit_length()", BOUNDARIES),
    Fault(TEMPLATES, "trim_blocks=True", "trim_blocks=False", PROMPT_TESTS),
    # The tokenizer
    Fault(TOKENIZER, "self.pad_token = pad_token or eos_token", "self.pad_token = pad_token", SETTINGS),
    Fault(TOKENIZER, "        backend.no_truncation()\n", "", SETTINGS),
    Fault(TOKENIZER, "        backend.no_padding()\n", "", SETTINGS),
    Fault(TOKENIZER, "if clean_up_tokenization_spaces:", "if False:", SETTINGS),
    Fault(TOKENIZER, 'return token.get("content") if isinstance(token, dict) else token', 'return token.get("text") if isinstance(token, dict) else token', "tests/processing/test_tokenizer.py"),
    Fault(TOKENIZER, '"<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD', '"<|vision_start|>", "<|vision_pad|>", "<|vision_end|>", IMAGE_PAD', "tests/processing/test_tokenizer.py"),
    Fault(f"{PROCESSING}videos.py", "VIDEO_TIMEOUT_SECONDS = 300.0", "VIDEO_TIMEOUT_SECONDS = 30.0", SETTINGS),
    # Conversations
    Fault(VISION_INFO, "return fetch_image(part, edition=edition, **limits)", "return fetch_image(part, **limits)", SETTINGS),
    Fault(VISION_INFO, "return fetch_image(part, edition=edition, **limits)", "return fetch_image(part, edition=edition)", SETTINGS),
    Fault(VISION_INFO, "original_size=original_size, **limits)", "original_size=original_size)", "tests/processing/test_passed_on.py"),
    Fault(VISION_INFO, 'part.get("type") in ("image", "image_url")', 'part.get("type") == "image"', SETTINGS),
    # Editions and versions
    Fault(EDITIONS, "context_length=40960", "context_length=131072", SETTINGS),
    Fault(EDITIONS, "20480 * PIXELS_PER_TOKEN", "16384 * PIXELS_PER_TOKEN", BOUNDARIES),
    Fault(EDITIONS, 'architecture="KeyeVL1_5ForConditionalGeneration"', 'architecture="KeyeForConditionalGeneration"', SETTINGS),
    Fault(EDITIONS, "resample=2,", "resample=3,", "tests/processing/test_patches.py"),
    Fault(REQUIREMENTS, "_major_minor(installed) < _major_minor(oldest)", "_major_minor(installed) <= _major_minor(oldest)", "tests/package/test_requirements.py"),
    Fault(REQUIREMENTS, 'findall(r"\\d+", version)[:2]', 'findall(r"\\d+", version)[:1]', "tests/package/test_requirements.py"),
    Fault(REQUIREMENTS, "if oldest and _major_minor(installed)", "if oldest and installed < oldest and _major_minor(installed)", "tests/package/test_requirements.py"),
]  # fmt: skip
