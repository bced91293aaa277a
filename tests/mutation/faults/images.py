"""Faults in the threads that read images, and in copies from pinned memory."""

from ..fault import Fault

PROCESSING = "keye_kernels/processing/"
IMAGES, PATCHES, THREADS, VISION_INFO = (f"{PROCESSING}{name}.py" for name in ("images", "patches", "threads", "vision_info"))
BATCH, KEYE, VISION = f"{PROCESSING}batch.py", "keye_kernels/model/keye.py", "keye_kernels/model/vision.py"
HOST_COPY = "keye_kernels/host_copy.py"

READING = "tests/processing/test_threads.py"
PIXELS, SETTINGS = "tests/model/test_pixels.py", "tests/processing/test_settings.py"
COPIES = "tests/ops/test_host_copy.py"

FAULTS = [
    # Threads
    Fault(THREADS, "threads or torch.get_num_threads()) - 1", "threads or torch.get_num_threads())", READING),
    Fault(THREADS, "                if not helper.cancel():\n                    helper.result()", "                helper.cancel()", READING),
    Fault(THREADS, "                if not helper.cancel():\n                    helper.result()", "                helper.result()", READING),
    Fault(THREADS, "ThreadPoolExecutor(count) if threads and count > 0 else nullcontext(_helpers)", "nullcontext(_helpers)", READING),
    Fault(THREADS, "contextvars.copy_context().run, run.work", "run.work", READING),
    Fault(THREADS, "os.register_at_fork(after_in_child=_make_helpers)", "pass", READING),
    Fault(THREADS, "with suppress(RuntimeError):", "with suppress():", READING),
    Fault(THREADS, "ThreadPoolExecutor(MAX_HELPER_THREADS, ", "ThreadPoolExecutor(99, ", READING),
    Fault(THREADS, "or self._errors:\n", "or False:\n", READING),
    Fault(THREADS, "(isinstance(self._errors[index], Exception), index)", "index", READING),
    Fault(THREADS, "self._errors[min(self._errors, key=", "self._errors[max(self._errors, key=", READING),
    # Images
    Fault(IMAGES, "        Image.init()\n        return Image.open(io.BytesIO(encoded))", "        raise", READING),
    Fault(IMAGES, "if len(images) > 1:", "if len(images) > 2:", READING),
    Fault(IMAGES, "id(source if file is None else file)", "id(source)", READING),
    Fault(PATCHES, "target_row -= mean", "target_row -= mean[0]", READING),
    Fault(VISION_INFO, "threading.Lock() if workers is None else nullcontext()", "nullcontext()", READING),
    # uint8 patches
    Fault(VISION, "with torch.inference_mode(False):\n        scale, shift", "if True:\n        scale, shift", PIXELS),
    Fault(VISION, "return _cached_scale_and_shift(norm, pixels, device)", "return _scale_and_shift(norm, pixels, device)", PIXELS),
    Fault(VISION, "torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None", "torch.compiler.is_compiling()", PIXELS),
    Fault(VISION, "wide = weight.float()\n", "wide = weight.float().abs()\n", PIXELS),
    Fault(VISION, "PIXEL_ORIGIN * norm.rescale_factor - mean) / std", "PIXEL_ORIGIN * norm.rescale_factor - mean)", PIXELS),
    # Copies to a GPU
    Fault(KEYE, "copy_to_device(pixel_values, self.device)", "pixel_values.to(self.device)", PIXELS),
    Fault("keye_kernels/model/positions.py", "copy_to_device(grid_thw, input_ids.device)", "grid_thw.to(input_ids.device)", PIXELS),
    Fault(BATCH, 'name in CPU_INPUTS and target.type != "cpu"', "name in CPU_INPUTS", SETTINGS),
    Fault(BATCH, 'name in CPU_INPUTS and target.type != "cpu"', "False", SETTINGS),
    Fault(BATCH, "copy_to_device(value, target, target_dtype, non_blocking)", "value.to(target, target_dtype, non_blocking=non_blocking)", SETTINGS),
    Fault(BATCH, "value.to(target_dtype) if target_dtype else value", "value", SETTINGS),
    Fault(HOST_COPY, "-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES", "end", COPIES),
    Fault(HOST_COPY, "pinned.copy_(tensor).to(device, non_blocking=True)", "pinned.copy_(tensor).to(device)", COPIES),
    Fault(HOST_COPY, "layout.views(pinned.to(device, non_blocking=True))", "layout.views(pinned.to(device))", COPIES),
    Fault(HOST_COPY, "tensor.dtype if dtype is None else dtype)", "tensor.dtype)", COPIES),
    Fault(HOST_COPY, 'tensor.device.type != "cpu" or not', "not", COPIES),
    Fault(HOST_COPY, "torch.compiler.is_compiling() or ", "", COPIES),
    Fault(HOST_COPY, "or not torch.cuda.is_available()", "", COPIES),
    Fault(HOST_COPY, "return _get_current_dispatch_mode() is None", "return True", COPIES),
]  # fmt: skip
