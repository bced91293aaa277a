"""Faults in the geometry of a batch of images, in its segments, and in the normalization of pixels."""

from ..fault import Fault

GEOMETRY, SEGMENTS, PIXEL_NORM = "keye_kernels/geometry.py", "keye_kernels/segments.py", "keye_kernels/pixel_norm.py"
VALUES, OTHERS = "tests/ops/test_geometry_values.py", "tests/ops/test_geometry.py"
SCHEDULES, PIXELS = "tests/ops/test_segments.py", "tests/processing/test_pixel_norm.py"

FAULTS = [
    Fault(GEOMETRY, 'frame = by_block if order == "block" else at.flatten()', "frame = by_block", VALUES),
    Fault(GEOMETRY, "low = centre.long().clamp(max=side - 1)", "low = centre.long().clamp(max=side - 2)", VALUES),
    Fault(GEOMETRY, "(low + 1).clamp(max=side - 1), centre", "low + 1, centre", VALUES),
    Fault(GEOMETRY, "- 0.5).clamp(min=0)", "- 0.5).clamp(min=-0.5)", VALUES),
    Fault(GEOMETRY, "        first += t * h * w", "        first += h * w", VALUES),
    Fault(GEOMETRY, "starts = first + h * w * torch", "starts = h * w * torch", VALUES),
    Fault(GEOMETRY, "(rows * side + columns)", "(columns * side + rows)", VALUES),
    Fault(GEOMETRY, "rows = torch.stack((top, top, bottom, bottom)", "rows = torch.stack((top, bottom, top, bottom)", VALUES),
    Fault(GEOMETRY, "return position, index[frame].int(), weight[frame]", "return position, index[frame].int(), weight", VALUES),
    Fault(GEOMETRY, "None if order == \"block\" else merge_index,", "None,", VALUES),
    Fault(GEOMETRY, "min(t, h, w) < 1", "min(t, h, w) < 0", VALUES),
    Fault(GEOMETRY, "h % merge_size or w % merge_size", "h % merge_size", VALUES),
    Fault(GEOMETRY, "total != num_patches:", "total > num_patches:", VALUES),
    Fault(GEOMETRY, "if _get_current_dispatch_mode() is None else _make_frame.__wrapped__", "", OTHERS),
    Fault(GEOMETRY, "([h * w] * t if by_frame else", "([h * w] if by_frame else", OTHERS),
    Fault(GEOMETRY, "copy_all_to_device(tensors, device)", 'copy_all_to_device(tensors, torch.device("cpu"))', VALUES),
    Fault(SEGMENTS, "key = (block_m, causal)", "key = causal", SCHEDULES),
    Fault(SEGMENTS, "key = (block_m, causal)", "key = block_m", SCHEDULES),
    Fault(SEGMENTS, "copy_to_device(schedule, self.cu_seqlens.device)", "schedule", SCHEDULES),
    Fault(SEGMENTS, "descending=True, stable=True", "descending=True", SCHEDULES),
    Fault(SEGMENTS, "(tile + 1) * block_m) if causal", "tile * block_m) if causal", SCHEDULES),
    Fault(SEGMENTS, "offsets = offsets.to(torch.int64)", "pass", SCHEDULES),
    Fault(SEGMENTS, "(lengths + block_m - 1) // block_m", "lengths // block_m + 1", SCHEDULES),
    Fault(SEGMENTS, "max(lengths, default=0), tuple", "max(lengths[:1], default=0), tuple", SCHEDULES),
    Fault(PIXEL_NORM, 'SMALLEST if name == "image_std" else 0', "SMALLEST", PIXELS),
    Fault(PIXEL_NORM, "image_std: tuple[float, ...] = (0.5, 0.5, 0.5)", "image_std: tuple[float, ...] = (1.0, 1.0, 1.0)", PIXELS),
    Fault(PIXEL_NORM, '            values["rescale_factor"] = factor', '            values["rescale_factor"] = 1 / 255', PIXELS),
    Fault(PIXEL_NORM, "not all(_is_within(number, smallest) for number in numbers)", "not _is_within(numbers[0], smallest)", PIXELS),
]  # fmt: skip
