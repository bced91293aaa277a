"""Command `inspect`: shows which frames of a video are sampled and how many tokens they have."""

import argparse

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.inspect import inspect_video, plot_inspection


def run(options: argparse.Namespace) -> None:
    """Prints the table of the sampled frames and, with `--plot`, writes the plot."""
    video_options = {} if options.fps is None else {"fps": options.fps}
    inspection = inspect_video(options.video, options.edition, video_options)
    context_length = options.context or EDITIONS[options.edition].context_length
    print(inspection.to_text(context_length))
    if options.plot:
        plot_inspection(inspection, options.plot, context_length)
        print(f"Plot written to {options.plot}")
