"""The command line: `keye-kernels COMMAND` or `python -m keye_kernels COMMAND`."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from .tools import autotune, bench

EXIT_BAD_INPUT = 2
CONTEXT_LENGTHS = {"preview": 40960, "1.5": 131072}  # max_position_embeddings of the released models


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; bad input prints one sentence and gives 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"keye-kernels {options.command}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keye-kernels", description="Fast, exact Keye-VL.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="answer a question about pictures and videos with a checkpoint")
    generate.add_argument("question", help="the text of the user's turn")
    generate.add_argument("--model", required=True, metavar="DIR", help="folder of a Keye checkpoint")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="path or URL; may be repeated")
    generate.add_argument("--video", action="append", default=[], metavar="FILE", help="path or URL; may be repeated")
    generate.add_argument("--fps", type=float, metavar="N", help="frames a second to sample from videos")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--stream", action="store_true", help="print the answer as it grows")
    generate.add_argument("--json", action="store_true", help="print the answer with its numbers as JSON")
    generate.add_argument("--thinking", choices=("think", "no_think", "auto"), help="the mode suffix of the prompt")
    generate.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    for name, kind in (("temperature", float), ("top-k", int), ("top-p", float), ("seed", int)):
        generate.add_argument(f"--{name}", type=kind, help="for --sample; default: the checkpoint's")
    for name in ("min-pixels", "max-pixels"):
        generate.add_argument(f"--{name}", type=int, metavar="N", help="area of a picture after resizing")
    _add_model_options(generate)
    generate.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="ask the small trained model about a bundled picture and a bundled clip")
    _add_model_options(demo)
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="show which frames of a video the model gets, and what they cost")
    inspect.add_argument("--video", required=True, metavar="FILE", help="path or URL")
    inspect.add_argument("--edition", choices=("preview", "1.5"), default="preview")
    inspect.add_argument("--fps", type=float, metavar="N", help="frames a second to sample")
    inspect.add_argument("--context", type=int, metavar="N", help="context length; default: that of the edition")
    inspect.add_argument("--plot", metavar="FILE", help="draw the frames on a time line into a PNG, PDF or SVG")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="check every operator and the small model's answers on this machine")
    verify.add_argument("--device", help="cuda or cpu (in Triton's interpreter); default: a GPU if there is one")
    verify.add_argument("--seeds", type=int, default=2, metavar="N", help="inputs drawn for each case")
    verify.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    verify.set_defaults(run=_verify)

    doctor = commands.add_parser(
        "doctor", help="show what is installed, who would serve each operator, and what is wrong"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    doctor.set_defaults(run=_doctor)

    tune = commands.add_parser("autotune", help="find the best tiles on this GPU, or rank them without one")
    autotune.add_arguments(tune)
    tune.set_defaults(run=autotune.run)

    measure = commands.add_parser("bench", help="count work without a GPU, plot timed results, serve under load")
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", default="auto", help="auto, reference, triton or (generate only) flash_attn")
    parser.add_argument("--device", help="for instance cuda; default: torch's")
    parser.add_argument("--dtype", help="for instance bfloat16; default: the checkpoint's")


def _generate(options: argparse.Namespace) -> None:
    content: list[dict[str, Any]] = [{"type": "image", "image": file} for file in options.image]
    rate = {} if options.fps is None else {"fps": options.fps}
    content += [{"type": "video", "video": file, **rate} for file in options.video]
    content.append({"type": "text", "text": options.question})
    write = _write if options.stream and not options.json else None
    answer = answer_question(options.model, content, options, write)
    if options.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print("" if options.stream else answer["answer"])


def answer_question(
    path: str, content: list[dict[str, Any]], options: argparse.Namespace, write: Callable[[str], object] | None
) -> dict[str, Any]:
    """Loads a checkpoint and answers one turn; `write` receives the text as it grows. Returns the answer and its numbers."""
    from .model import Keye, TextStreamer
    from .processing import KeyeProcessor

    if not any(part.get("text", "").strip() for part in content):
        raise ValueError("question must not be empty")
    # The prompt first: a picture that cannot be read should not cost the loading of a model
    processor = KeyeProcessor.from_pretrained(path, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, thinking=options.thinking, tokenize=True)
    show = sys.stderr.isatty() and not options.json
    model = Keye.from_pretrained(path, dtype=options.dtype, device=options.device, impl=options.impl, progress=show)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    streamer = None
    if write is not None:
        streamer = TextStreamer(lambda ids: processor.decode(ids, skip_special_tokens=True), write)
    start = time.perf_counter()
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.sample,
        **sampling,
        streamer=streamer,
    )
    seconds = time.perf_counter() - start
    prompt = inputs["input_ids"].shape[1]
    new = tokens[0, prompt:]
    return {
        "answer": processor.decode(new, skip_special_tokens=True),
        "prompt_tokens": prompt,
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
    }


def _inspect(options: argparse.Namespace) -> None:
    from .processing.inspect import inspect_video, plot_inspection

    rate = {} if options.fps is None else {"fps": options.fps}
    found = inspect_video(options.video, options.edition, rate)
    context = options.context or CONTEXT_LENGTHS[options.edition]
    print(found.to_text(context))
    if options.plot:
        plot_inspection(found, options.plot, context)
        print(f"Drawn into {options.plot}")


def _verify(options: argparse.Namespace) -> int:
    from .tools.verify import run

    return run(options)


def _doctor(options: argparse.Namespace) -> int:
    from .tools.doctor import run

    return run(options)


def _demo(options: argparse.Namespace) -> None:
    from .tools.demo import run_demo

    run_demo(options)


def _write(text: str) -> None:
    print(text, end="", flush=True)
