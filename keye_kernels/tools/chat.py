"""Command `chat`: a conversation in the terminal. Each turn processes only what is new."""

import argparse
import sys
from contextlib import suppress
from typing import Any

from keye_kernels.model import Keye, TextStreamer
from keye_kernels.model.checks import check_device
from keye_kernels.processing import KeyeProcessor, split_thinking
from keye_kernels.small import SMALL

from .running import EXPECTED_ERRORS

HELP = "/image FILE, /video FILE: part of the next question; /think on|off: show the thinking; /reset; /quit"


class Chat:
    """A conversation, and the images and videos of the next question."""

    def __init__(self, model: Keye, processor: KeyeProcessor, options: argparse.Namespace):
        self.model, self.processor, self.options = model, processor, options
        self.shows_thinking = True
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages: list[dict[str, Any]] = []
        self.parts: list[dict[str, Any]] = []
        self.cache = self.model.new_cache(1)

    def handle(self, line: str) -> bool:
        """Runs a command or answers a question. Returns whether the conversation continues."""
        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if command == "/quit":
            return False
        if command == "/reset":
            self.reset()
        elif command in ("/image", "/video") and argument:
            self._add(command[1:], argument)
        elif command == "/think" and argument in ("on", "off"):
            self.shows_thinking = argument == "on"
        elif command.startswith("/"):
            print(HELP)
        elif command:
            self._answer(line.strip())
        return True

    def _add(self, kind: str, file: str) -> None:
        part = {"type": kind, kind: file}
        # Read now, so that an error is reported before the question
        self.processor.process_vision_info([{"role": "user", "content": [part]}])
        self.parts.append(part)

    def _answer(self, question: str) -> None:
        turn = {"role": "user", "content": [*self.parts, {"type": "text", "text": question}]}
        inputs = self.processor.apply_chat_template(
            [*self.messages, turn],
            thinking=self.options.thinking,
            tokenize=True,
            processor_kwargs={"pixel_dtype": "uint8"},
            allow_special_tokens=False,
        )
        written: list[str] = []
        streamer = TextStreamer(self._decode, lambda text: self._write(text, written))
        with suppress(KeyboardInterrupt):  # the answer so far is part of the conversation
            self.model.generate(
                **inputs.to(self.model.device),
                max_new_tokens=self.options.max_new_tokens,
                streamer=streamer,
                cache=self.cache,
            )
        text = "".join(written)
        print("" if self.shows_thinking else split_thinking(text).answer, flush=True)
        self.messages += [turn, {"role": "assistant", "content": text}]
        self.parts = []

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def _write(self, text: str, written: list[str]) -> None:
        written.append(text)
        if self.shows_thinking:
            print(text, end="", flush=True)


def run(options: argparse.Namespace) -> None:
    """Reads lines until /quit or the end of the input, and answers them. Ctrl-C ends an answer."""
    path = SMALL if options.small else options.model
    device = None if options.device is None else check_device(options.device)
    processor = KeyeProcessor.from_pretrained(path)
    model = Keye.from_pretrained(path, dtype=options.dtype, device=device, impl=options.impl)
    chat, prompt = Chat(model, processor, options), "> " if sys.stdin.isatty() else ""
    if prompt:
        print(HELP)
    while True:
        try:
            if not chat.handle(input(prompt)):
                return
        except EOFError:
            return
        except EXPECTED_ERRORS as error:
            print(f"keye-kernels chat: {' '.join(str(error).split())}", file=sys.stderr)
