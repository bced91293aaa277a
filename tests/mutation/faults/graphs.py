"""Faults in CUDA graphs of images, and in the tensors that they share with the host."""

from ..fault import Fault

GRAPHS, IMAGES, SEGMENTS = "keye_kernels/model/graphs.py", "keye_kernels/model/image_graphs.py", "keye_kernels/segments.py"
COPIES, KEYE, VISION = "keye_kernels/host_copy.py", "keye_kernels/model/keye.py", "keye_kernels/model/vision.py"
WARM_UP, WARM_UP_TESTS = "keye_kernels/warm_up.py", "tests/model/test_warmup_sizes.py"
TESTS, SCHEDULES, COPY_TESTS = "tests/model/test_image_graphs.py", "tests/ops/test_segments.py", "tests/ops/test_host_copy.py"

FAULTS = [
    Fault(IMAGES, "merge_size**2].clone(),", "merge_size**2],", TESTS),
    Fault(IMAGES, "        self.geometry.overwrite(tensors)\n", "", TESTS),
    Fault(IMAGES, "        self.segments.update(lengths)\n", "", TESTS),
    Fault(IMAGES, "        self.pixels[: len(pixel_values)].copy_(pixel_values)\n", "", TESTS),
    Fault(IMAGES, "sum(lengths) <= size", "sum(lengths) < size", TESTS),
    Fault(IMAGES, "longest, pixel_dtype, default_impl())", 'longest, pixel_dtype, "auto")', TESTS),
    Fault(IMAGES, "min(patches, _power_of_2(max(lengths)))", "_power_of_2(max(lengths))", TESTS),
    Fault(IMAGES, "return 1 << (number - 1).bit_length()", "return 1 << number.bit_length()", TESTS),
    Fault(
        GRAPHS,
        "take(entry, output) if is_valid else None",
        "take(entry, output)",
        TESTS,
    ),
    Fault(GRAPHS, "entry.graph is None and not entry.is_valid(modules)", "False", TESTS),
    Fault(GRAPHS, "if not state.is_plain or not all(", "if not all(", TESTS),
    Fault(GRAPHS, " or not all(runs_triton(module, device) for module in modules)", "", TESTS),
    Fault(GRAPHS, "self._entries.move_to_end(bucket)\n", "pass\n", TESTS),
    Fault(GRAPHS, "                self._has_failed = True\n", "", TESTS),
    Fault(GRAPHS, "torch.inference_mode(False), ", "", TESTS),
    Fault(GRAPHS, " or torch.is_grad_enabled():", ":", TESTS),
    Fault(GRAPHS, "if torch.is_autocast_enabled(device.type) or ", "if ", TESTS),
    Fault(GRAPHS, "return _get_current_dispatch_mode() is None and", "return", TESTS),
    Fault(GRAPHS, " and not torch.cuda.is_current_stream_capturing()", "", TESTS),
    Fault(GRAPHS, "                stream.wait_event(self._last_use)\n", "                pass\n", TESTS),
    Fault(GRAPHS, "return type(self), ()  #", "raise TypeError  #", TESTS),
    Fault(GRAPHS, "entry.capture(self._pool)", "entry.capture(None)", TESTS),
    Fault(GRAPHS, "self.objects += module, type(module).forward", "self.objects += module, None", TESTS),
    Fault(GRAPHS, 'attributes.get("forward")', "None", TESTS),
    Fault(GRAPHS, 'attributes["_forward_hooks"] or ', "", TESTS),
    Fault(GRAPHS, 'or attributes["_forward_pre_hooks"] ', "", TESTS),
    Fault(GRAPHS, "(x.data_ptr(), x.shape, x.dtype)", "(x.shape, x.dtype)", TESTS),
    Fault(GRAPHS, "                    add_object(x)\n", "", TESTS),
    Fault(GRAPHS, "                    add_value(value)\n", "                    pass\n", TESTS),
    Fault(GRAPHS, "str, bool, PixelNorm", "str, bool", TESTS),
    Fault(GRAPHS, "self.is_plain = not (torch_module._global_forward_hooks or", "self.is_plain = not (", TESTS),
    Fault(VISION, "        self.graphs.clear()", "        pass", TESTS),
    Fault(KEYE, "if self.cuda_graphs and not torch.compiler", "if not torch.compiler", TESTS),
    Fault(WARM_UP, "        if model.cuda_graphs:\n", "        if True:\n", WARM_UP_TESTS),
    Fault(WARM_UP, "    reduced.cuda_graphs = False", "    reduced.cuda_graphs = model.cuda_graphs", WARM_UP_TESTS),
    Fault(WARM_UP, 'torch.uint8 if pixel_dtype == "uint8" else', "torch.uint8 if False else", WARM_UP_TESTS),
    Fault(COPIES, "            place[tuple(slice", "            place.flatten()[tuple(slice", COPY_TESTS),
    Fault(COPIES, "staged = torch.zeros(", "staged = torch.ones(", COPY_TESTS),
    Fault(SEGMENTS, "F.pad(entries, (0, 0, 0, max_tiles - len(entries)))", "entries", SCHEDULES),
    Fault(SEGMENTS, "            overwrite(schedule, self._host_schedule(lengths, *key))\n", "            pass\n", SCHEDULES),
    Fault(SEGMENTS, "        overwrite(self.cu_seqlens, cumulative_lengths(lengths))\n", "", SCHEDULES),
    Fault(SEGMENTS, "len(lengths) > num_segments or ", "", SCHEDULES),
    Fault(SEGMENTS, "sum(lengths) > self.capacity or ", "", SCHEDULES),
    Fault(SEGMENTS, "self.capacity // block_m + len(lengths)", "self.capacity // block_m", SCHEDULES),
]
