"""Command `inspect`: shows the frames that are sampled from a video and their tokens, or what a checkpoint is."""

import argparse
from pathlib import Path

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.inspect import inspect_video, plot_inspection
from keye_kernels.triton.launch_config import replaced_file


def run(options: argparse.Namespace) -> int:
    """Prints the facts of a checkpoint, or a table of the sampled frames. Returns 1 if tensors of the checkpoint are wrong."""
    if options.context is not None and options.context < 1:
        raise ValueError(f"--context must be at least 1, got {options.context}")
    if options.plot and not options.plot.lower().endswith((".png", ".pdf", ".svg")):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, got {options.plot}")
    if options.model is not None:
        return _inspect_model(options)
    video_options = {} if options.fps is None else {"fps": options.fps}
    inspection = inspect_video(options.video, options.edition, video_options)
    context_length = options.context or EDITIONS[options.edition].context_length
    print(inspection.to_text(context_length))
    if options.plot:
        with replaced_file(Path(options.plot)) as temporary:
            plot_inspection(inspection, temporary, context_length)
        print(f"Plot written to {options.plot}")
    return 0


def _inspect_model(options: argparse.Namespace) -> int:
    from keye_kernels.model.summary import CheckpointSummary

    for name in ("fps", "plot"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} needs --video")
    summary = CheckpointSummary.read(options.model)
    print(summary.to_text(options.context))
    return int(bool(summary.problems))
