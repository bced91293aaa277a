"""Faults in sampling, classification, decoding and packing of videos."""

from ..fault import Fault

PROCESSING = "keye_kernels/processing/"
FRAME_BUFFER, INSPECT, PACKING = (f"{PROCESSING}{name}.py" for name in ("frame_buffer", "inspect", "packing"))
SAMPLING, SLOW_FAST, TRUNCATION = (f"{PROCESSING}{name}.py" for name in ("sampling", "slow_fast", "truncation"))
READER, VIDEOS = f"{PROCESSING}video_reader.py", f"{PROCESSING}videos.py"

BOUNDARIES = "tests/processing/test_video_boundaries.py"
SCAN = "tests/processing/test_video_scan.py"
SETTINGS = "tests/processing/test_settings.py tests/processing/test_passed_on.py"
SAMPLING_TESTS = "tests/processing/test_sampling.py"
SLOW_FAST_TESTS = "tests/processing/test_slow_fast.py"
READER_TESTS = "tests/processing/test_video_reader.py"
INSPECT_TESTS = "tests/processing/test_inspect.py"
VIDEO_TESTS = "tests/processing/test_processor_video.py"

FAULTS = [
    # The range of frames
    Fault(SAMPLING, "last = min(math.floor(max(0.0, min(end, duration)) * video_fps), last)", "last = min(round(max(0.0, min(end, duration)) * video_fps), last)", BOUNDARIES),
    Fault(SAMPLING, "last = min(math.floor(max(0.0, min(end, duration)) * video_fps), last)", "last = math.floor(max(0.0, min(end, duration)) * video_fps)", BOUNDARIES),
    Fault(SAMPLING, "last = min(math.floor(max(0.0, min(end, duration)) * video_fps), last)", "last = min(math.ceil(max(0.0, min(end, duration)) * video_fps) - 1, last)", BOUNDARIES),
    Fault(SAMPLING, "math.ceil(max(0.0, min(start, duration)) * video_fps)", "round(max(0.0, min(start, duration)) * video_fps)", BOUNDARIES),
    Fault(SAMPLING, "math.ceil(max(0.0, min(start, duration))", "math.ceil(min(start, duration)", BOUNDARIES),
    Fault(SAMPLING, "    if first > last:", "    if first >= last:", BOUNDARIES),
    Fault(SAMPLING, "torch.linspace(first, last, count).round()", "torch.linspace(first, last, count).floor()", SLOW_FAST_TESTS),
    Fault(VIDEOS, "int(np.searchsorted(reader.times, start))", 'int(np.searchsorted(reader.times, start, side="right"))', BOUNDARIES),
    Fault(VIDEOS, ', end, side="right"))', ', end, side="left"))', BOUNDARIES),
    # Numbers of frames
    Fault(SAMPLING, "low <= value <= high", "low < value < high", BOUNDARIES),
    Fault(SAMPLING, "<= count <= total_frames:", "<= count < total_frames:", BOUNDARIES),
    Fault(SAMPLING, "if not FRAME_FACTOR <= count", "if not FRAME_FACTOR < count", SAMPLING_TESTS),
    Fault(SAMPLING, "_round_even(max_frames, math.floor)", "_round_even(max_frames, math.ceil)", SAMPLING_TESTS),
    Fault(SAMPLING, "_round_even(min_frames, math.ceil))", "_round_even(min_frames, math.floor))", SAMPLING_TESTS),
    Fault(SAMPLING, "PREVIEW_MIN_FRAMES, PREVIEW_MAX_FRAMES = 4, 768", "PREVIEW_MIN_FRAMES, PREVIEW_MAX_FRAMES = 4, 770", SAMPLING_TESTS),
    Fault(SAMPLING, 'fps = min(_get(options, "fps", DEFAULT_FPS), video_fps)', 'fps = _get(options, "fps", DEFAULT_FPS)', SLOW_FAST_TESTS),
    Fault(SAMPLING, 'return int(min(_get(options, "max_frames", limit), limit))', "return limit", BOUNDARIES),
    Fault(SAMPLING, 'limit = int(total / _get(options, "min_pixels", FRAME_PIXEL_LIMITS[0]))', "limit = int(total / FRAME_PIXEL_LIMITS[0])", BOUNDARIES),
    # Sizes of frames
    Fault(SAMPLING, "PREVIEW_MIN_PIXELS = 128 * PIXELS_PER_TOKEN", "PREVIEW_MIN_PIXELS = 4 * PIXELS_PER_TOKEN", BOUNDARIES),
    Fault(SAMPLING, "int(min_pixels * 1.05))", "int(min_pixels))", SAMPLING_TESTS),
    Fault(SAMPLING, "int(128000 * PIXELS_PER_TOKEN * 0.9)", "int(128000 * PIXELS_PER_TOKEN)", SAMPLING_TESTS),
    Fault(SAMPLING, "if video_pixels(middle) > total:", "if video_pixels(middle) >= total:", BOUNDARIES),
    Fault(SAMPLING, 'max(int(_get(options, "min_pixels", 0)), FRAME_PIXEL_LIMITS[0])', "FRAME_PIXEL_LIMITS[0]", BOUNDARIES),
    Fault(SAMPLING, "FAST_TOKEN_RATIO = 0.3", "FAST_TOKEN_RATIO = 0.25", SLOW_FAST_TESTS),
    Fault(SAMPLING, "max(int(FAST_TOKEN_RATIO * slow_tokens), min_tokens)", "int(FAST_TOKEN_RATIO * slow_tokens)", SLOW_FAST_TESTS),
    Fault(SAMPLING, 'os.environ.get("VIDEO_MAX_PIXELS", PREVIEW_TOTAL_PIXELS)', "PREVIEW_TOTAL_PIXELS", SAMPLING_TESTS),
    # Slow and fast frames
    Fault(SLOW_FAST, "not block_similarity(self._last_slow, blocks) < self.threshold", "not block_similarity(self._last_slow, blocks) <= self.threshold", BOUNDARIES),
    Fault(SLOW_FAST, "not block_similarity(self._last_slow, blocks) < self.threshold", "block_similarity(self._last_slow, blocks) >= self.threshold", BOUNDARIES),
    Fault(SLOW_FAST, "> MIN_COSINE)", ">= MIN_COSINE)", BOUNDARIES),
    Fault(SLOW_FAST, "MIN_FRAME_SIMILARITY if threshold is None else threshold", "threshold or MIN_FRAME_SIMILARITY", BOUNDARIES),
    Fault(SLOW_FAST, "            return FAST\n", "            self._last_slow = blocks\n            return FAST\n", BOUNDARIES),
    Fault(SLOW_FAST, "(norm_a >= MAX_BLACK_NORM) | (norm_b", "(norm_a >= MAX_BLACK_NORM) & (norm_b", BOUNDARIES),
    Fault(SLOW_FAST, "hue += (hue >> 31) & 180", "hue += (hue >> 31) & 360", SLOW_FAST_TESTS),
    Fault(SLOW_FAST, "is_green * (blue - red + 2 * spread)", "is_green * (red - blue + 2 * spread)", SLOW_FAST_TESTS),
    Fault(SLOW_FAST, "max_pixels=MAX_SIMILARITY_PIXELS)", "max_pixels=2 * MAX_SIMILARITY_PIXELS)", SLOW_FAST_TESTS),
    Fault(FRAME_BUFFER, "sum(types) + self._count - len(types)", "sum(types)", SAMPLING_TESTS),
    Fault(FRAME_BUFFER, "sizes[types[-1]]", "sizes[types[0]]", SAMPLING_TESTS),
    Fault(FRAME_BUFFER, "                self._pending = []\n                return\n", "                return\n", SAMPLING_TESTS),
    # Loading
    Fault(VIDEOS, "if total == 1 and options.get(\"nframes\") is None:", "if False:", READER_TESTS),
    Fault(VIDEOS, "frames[index:] = _resize_bicubic", "frames[index] = _resize_bicubic", READER_TESTS),
    Fault(VIDEOS, "fps=count / total * reader.fps", "fps=reader.fps", SAMPLING_TESTS),
    Fault(VIDEOS, ".clamp(0, 255).round()", ".clamp(0, 255)", SAMPLING_TESTS),
    Fault(VIDEOS, ".clamp(0, 255).round()", ".clamp(0, 256).round()", BOUNDARIES),
    Fault(VIDEOS, "count = max(1, sampling.slow_fast_frame_count", "count = max(2, sampling.slow_fast_frame_count", READER_TESTS),
    Fault(VIDEOS, 'reader.width, options.get("min_frame_similarity"))\n    buffer', "reader.width)\n    buffer", SETTINGS),
    Fault(VIDEOS, 'SlowFastClassifier(height, width, options.get("min_frame_similarity"))', "SlowFastClassifier(height, width)", SETTINGS),
    Fault(VIDEOS, "max(1, min(len(images), sampling.slow_fast_frame_limit(options)))", "len(images)", SETTINGS),
    Fault(VIDEOS, "fps=float(fps or DEFAULT_FPS)", "fps=float(fps or 1.0)", SETTINGS),
    Fault(VIDEOS, "(1 / fps) * index for index in indices], dtype=torch.float32) if fps", "(1 / fps) * index for index in range(len(indices))], dtype=torch.float32) if fps", SETTINGS),
    Fault(VIDEOS, "pixel_limits=pixel_limits, **limits)", "pixel_limits=pixel_limits)", SETTINGS),
    Fault(VIDEOS, "edition=edition.name, pixel_limits=pixel_limits", "pixel_limits=pixel_limits", SETTINGS),
    Fault(VIDEOS, "edition=edition.name, pixel_limits=pixel_limits", "edition=edition.name", SLOW_FAST_TESTS),
    Fault(VIDEOS, "resized.append(resized[-1])", "resized.append(resized[0])", VIDEO_TESTS),
    Fault(VIDEOS, "with open_video(source, **limits) as reader:", "with open_video(source) as reader:", SETTINGS),
    Fault(VIDEOS, "open_source(source, timeout=timeout, max_bytes=max_bytes)", "open_source(source, timeout=timeout)", "tests/processing/test_video_errors.py"),
    # Reading
    Fault(READER, "measured = (count - 1) / self.times[-1]", "measured = count / self.times[-1]", SCAN),
    Fault(READER, "if count > 1 else rate", "if count > 2 else rate", SCAN),
    Fault(READER, "self.fps = rate if is_plausible else measured", "self.fps = rate", SCAN),
    Fault(READER, "self.fps = rate if is_plausible else measured", "self.fps = measured", SCAN),
    Fault(READER, "(self._frame_pts - self._frame_pts[0]) * tick", "self._frame_pts * tick", READER_TESTS),
    Fault(READER, "rate if 0 < rate <= MAX_FILE_FPS else FALLBACK_FPS", "FALLBACK_FPS", SCAN),
    Fault(READER, "FALLBACK_FPS = 25.0", "FALLBACK_FPS = 30.0", SCAN),
    Fault(READER, "MAX_ROUNDING_TICKS = 1.5", "MAX_ROUNDING_TICKS = 0.1", SCAN),
    Fault(READER, "MAX_ROUNDING_TICKS = 1.5", "MAX_ROUNDING_TICKS = 30.0", SCAN),
    Fault(READER, "if limit and height * width > limit:", "if limit and height * width >= limit:", SCAN),
    Fault(READER, "return 2 * Image.MAX_IMAGE_PIXELS", "return Image.MAX_IMAGE_PIXELS", SCAN),
    Fault(READER, "if not stream.disposition & cover_image]", "]", SCAN),
    Fault(READER, "missing > max(MAX_MISSING_SECONDS, 0.01 * duration)", "missing > max(10 * MAX_MISSING_SECONDS, 0.01 * duration)", SCAN),
    Fault(READER, "(packet.is_keyframe, not packet.is_discard)", "(packet.is_keyframe, True)", SCAN),
    Fault(READER, "frame.rotation / 90) % 4", "-frame.rotation / 90) % 4", READER_TESTS),
    Fault(READER, "keyframe_pts[gop[packets.is_key]] = pts[packets.is_key]", "pass", SCAN),
    Fault(TRUNCATION, "return 8 + int.from_bytes", "return int.from_bytes", "tests/processing/test_video_errors.py"),
    # Packing
    Fault(PACKING, '".1f")', '".2f")', VIDEO_TESTS),
    Fault(PACKING, "FAST: fast_size or default_size", "FAST: fast_size or slow_size or default_size", SETTINGS),
    Fault(PACKING, "config.resized_size(*frames[0].shape[-2:])", "config.resized_size(*frames[-1].shape[-2:])", SETTINGS),
    Fault(PACKING, "tokens = [length // config.merge_size**2", "tokens = [length // 4", SETTINGS),
    Fault(PACKING, "if frame_type == FAST else VIDEO_PAD)", "if frame_type == SLOW else VIDEO_PAD)", VIDEO_TESTS),
    Fault(PACKING, "for grid, run in groupby(grids)]", "for grid, run in groupby(sorted(grids))]", "tests/processing/test_patches.py"),
    # Inspection
    Fault(INSPECT, "edition, config = processor.edition, processor.patch_config", "edition, config = processor.edition, PatchConfig.from_dict({}, processor.edition)", INSPECT_TESTS),
    Fault(INSPECT, "slow = self.frame_types.count(SLOW)", "slow = self.frame_types.count(FAST)", INSPECT_TESTS),
    Fault(INSPECT, "min(len(frames), MAX_THUMBNAILS)", "len(frames)", INSPECT_TESTS),
    Fault(INSPECT, "frame.shape[2] * THUMBNAIL_HEIGHT_PIXELS / frame.shape[1]", "frame.shape[1] * THUMBNAIL_HEIGHT_PIXELS / frame.shape[2]", INSPECT_TESTS),
    Fault(INSPECT, '(SLOW, "slow", "tab:blue"), (FAST, "fast", "tab:orange")', '(FAST, "slow", "tab:blue"), (SLOW, "fast", "tab:orange")', INSPECT_TESTS),
    Fault(INSPECT, "text.replace(marker, \"#\")", 'text.replace(marker, "")', INSPECT_TESTS),
]  # fmt: skip
