"""Command `inspect`: shows which frames of a video are sampled and how many tokens they have."""

import argparse
from pathlib import Path

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.inspect import inspect_video, plot_inspection
from keye_kernels.triton.launch_config import replaced_file


def run(options: argparse.Namespace) -> None:
    """Prints the table of the sampled frames and, with `--plot`, writes the plot."""
    if options.context is not None and options.context < 1:
        raise ValueError(f"--context must be at least 1, got {options.context}")
    if options.plot and not options.plot.lower().endswith((".png", ".pdf", ".svg")):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, got {options.plot}")
    video_options = {} if options.fps is None else {"fps": options.fps}
    inspection = inspect_video(options.video, options.edition, video_options)
    context_length = options.context or EDITIONS[options.edition].context_length
    print(inspection.to_text(context_length))
    if options.plot:
        with replaced_file(Path(options.plot)) as temporary:
            plot_inspection(inspection, temporary, context_length)
        print(f"Plot written to {options.plot}")
