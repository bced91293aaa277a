"""The command line: `keye-kernels COMMAND` or `python -m keye_kernels COMMAND`."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .editions import EDITIONS
from .tools import autotune, bench
from .tools.running import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `arguments` defaults to `sys.argv`. Errors print one line to stderr."""
    options = _parser().parse_args(arguments)
    name = options.command
    # Imported here, so that a command does not import the others
    return exit_code(f"keye-kernels {name}", lambda: import_module(f".tools.{name}", __package__).run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keye-kernels", description="Triton kernels and a lean model for Keye-VL.")
    parser.add_argument("--version", action="version", version=f"keye-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="ask the bundled small model about a bundled image and a bundled clip")
    _add_model_options(demo)

    generate = commands.add_parser("generate", help="answer a question about images and videos with a checkpoint")
    _add_generate_options(generate)
    _add_model_options(generate)

    chat = commands.add_parser("chat", help="a conversation about images and videos in the terminal")
    subject = chat.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="DIR", help="folder of a Keye checkpoint")
    subject.add_argument("--small", action="store_true", help="the bundled small model")
    chat.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of one answer; default: 1024")
    chat.add_argument("--thinking", choices=("think", "no_think", "auto"), help="thinking mode; default: auto")
    _add_model_options(chat)

    inspect = commands.add_parser("inspect", help="show which frames of a video are sampled, or what a checkpoint is")
    subject = inspect.add_mutually_exclusive_group(required=True)
    subject.add_argument("--video", metavar="FILE", help="path or URL: list the sampled frames and their tokens")
    subject.add_argument("--model", metavar="DIR", help="checkpoint: show edition, sizes, dtypes, memory and wrong tensors")
    inspect.add_argument("--edition", choices=tuple(EDITIONS), default="preview", help="default: preview")
    inspect.add_argument("--fps", type=float, metavar="N", help="frames per second to sample")
    inspect.add_argument("--context", type=int, metavar="N", help="context length; default: that of the edition or checkpoint")
    inspect.add_argument("--plot", metavar="FILE", help="plot the frames on a time line, as PNG, PDF or SVG")

    verify = commands.add_parser("verify", help="check all operators and the small model's answers on this machine")
    verify.add_argument("--device", help="cuda, or cpu for Triton's interpreter; default: the GPU if there is one")
    verify.add_argument("--seeds", type=int, default=2, metavar="N", help="random inputs per case; default: 2")
    verify.add_argument("--json", action="store_true", help="print one JSON object instead of the table")

    doctor = commands.add_parser("doctor", help="show what is installed, which backend runs each operator, and problems")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the text")

    tune = commands.add_parser("autotune", help="find the fastest launch configs on this GPU")
    autotune.add_arguments(tune)

    measure = commands.add_parser("bench", help="time a GPU, count memory traffic, plot results, or measure serving load")
    bench.add_arguments(measure)
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", help="text of the user's turn")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a Keye checkpoint")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="path or URL; may be repeated")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="path or URL; may be repeated")
    parser.add_argument("--fps", type=float, metavar="N", help="frames per second to sample from videos")
    parser.add_argument("--min-pixels", type=int, metavar="N", help="smallest area of a resized image")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest area of a resized image")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--thinking", choices=("think", "no_think", "auto"), help="thinking mode; default: auto")
    parser.add_argument("--no-special-tokens", action="store_true", help="special tokens in the question are plain text")
    parser.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    for name, kind in (("temperature", float), ("top-k", int), ("top-p", float), ("seed", int)):
        default = "random" if name == "seed" else "that of the checkpoint"
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"for --sample; default: {default}")
    parser.add_argument("--prompt-lookup", type=int, metavar="N", help="verify up to N copied tokens in each step, 1 to 15")
    parser.add_argument("--stream", action="store_true", help="print the answer during generation")
    parser.add_argument("--json", action="store_true", help="print the answer and its token counts as JSON")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", default="auto", help="auto, reference, triton, torch or flash_attn; default: auto")
    parser.add_argument("--device", help="for example cuda; default: torch's default device")
    parser.add_argument("--dtype", help="for example bfloat16; default, also auto: that of the checkpoint")
