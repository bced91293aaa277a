"""Each option of generate, inspect and demo has its effect, and the defaults are those of the help texts."""

import argparse
import json
import re
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from keye_kernels import cli
from keye_kernels.cli import main
from keye_kernels.editions import EDITIONS
from keye_kernels.small import SMALL, small_processor
from keye_kernels.tools import demo, generate, inspect


def options_of(parser):
    """The options of all commands."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [(name, action) for name, command in commands.choices.items() for action in command._actions]


def test_the_defaults_are_those_of_the_help_texts():
    checked = 0
    for command, action in options_of(cli._parser()):
        found = re.search(r"default: ([\w.]+)\)?$", action.help or "")
        if found and action.default is not None:
            assert str(action.default) == found[1], (command, action.dest)
            checked += 1
    assert checked >= 7


class Recorder:
    """Stands for the model: records how it was loaded and called, and generates one answer."""

    def __init__(self, answer):
        self.answer, self.device, self.dtype = answer, torch.device("cpu"), torch.float32
        self.loaded, self.generated = {}, {}

    def parameters(self):
        return []

    def load(self, *path, **options):
        self.loaded = options
        return self

    def generate(self, input_ids, streamer=None, **options):
        self.generated = options
        new = torch.tensor([self.answer])
        if streamer is not None:
            streamer.put(input_ids)
            for token in self.answer:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids, new], dim=1)


@pytest.fixture
def model(monkeypatch):
    processor = small_processor()
    made = Recorder([*processor.tokenizer.encode("yes"), processor.tokenizer.eos_token_id])
    monkeypatch.setattr(generate.Keye, "from_pretrained", made.load)
    monkeypatch.setattr(demo, "small_model", made.load)
    return made


def answer(capsys, *arguments):
    assert main(["generate", "--model", str(SMALL), "--json", *map(str, arguments), "hi"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_options_of_sampling_reach_the_model(model, capsys):
    answer(capsys)
    expected = {"max_new_tokens": 128, "do_sample": False, "temperature": None, "top_k": None, "top_p": None, "seed": None}
    assert expected.items() <= model.generated.items()
    answer(capsys, "--sample", "--temperature", 0.5, "--top-k", 3, "--top-p", 0.25, "--seed", 0, "--max-new-tokens", 7)
    expected = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 0}
    assert expected.items() <= model.generated.items()
    answer(capsys, "--sample", "--seed", 2**63 - 1)
    assert model.generated["seed"] == 2**63 - 1


@pytest.mark.parametrize("option", ["--seed", "--top-k", "--temperature", "--top-p"])
def test_an_ignored_zero_gives_a_warning_too(option, model, capsys):
    assert main(["generate", "--model", str(SMALL), option, "0", "hi"]) == 0
    assert f"warning: {option} ignored without --sample" in capsys.readouterr().err


def test_the_options_of_loading_reach_the_model(model, capsys):
    answer(capsys)
    assert {"dtype": None, "device": None, "impl": "auto"}.items() <= model.loaded.items()
    answer(capsys, "--dtype", "float16", "--device", "cpu", "--impl", "reference")
    assert {"dtype": "float16", "device": torch.device("cpu"), "impl": "reference"}.items() <= model.loaded.items()


def test_the_answer_holds_the_new_tokens_and_no_special_ones(model, capsys):
    found = answer(capsys)
    assert (found["answer"], found["new_tokens"]) == ("yes", len(model.answer))
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    prompt = small_processor().apply_chat_template(messages, tokenize=True).input_ids
    assert found["prompt_tokens"] == prompt.shape[1]
    for stream in ([], ["--stream"]):
        assert main(["generate", "--model", str(SMALL), *stream, "hi"]) == 0
        assert capsys.readouterr().out == "yes\n"


@pytest.fixture
def processed(model, monkeypatch):
    """Records the arguments of the processor."""
    seen = {}
    load = generate.KeyeProcessor.from_pretrained

    def from_pretrained(path, **options):
        processor = load(path, **options)
        seen["pixels"] = (processor.patch_config.min_pixels, processor.patch_config.max_pixels)
        apply = processor.apply_chat_template
        processor.apply_chat_template = lambda messages, **options: (
            seen.update(messages=messages, **options)
            or apply([{"role": "user", "content": [messages[0]["content"][-1]]}], **options)
        )
        return processor

    monkeypatch.setattr(generate.KeyeProcessor, "from_pretrained", from_pretrained)
    return seen


def test_images_videos_and_their_options_reach_the_processor(processed, capsys):
    default = small_processor().patch_config
    answer(capsys)
    assert processed["pixels"] == (default.min_pixels, default.max_pixels) and processed["thinking"] is None
    files = ["--image", "a.png", "--image", "b.png", "--video", "c.mp4", "--video", "d.mp4"]
    answer(capsys, *files, "--fps", 0.5, "--min-pixels", 1568, "--max-pixels", 3136, "--thinking", "no_think")
    assert processed["pixels"] == (1568, 3136) and processed["thinking"] == "no_think"
    images = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    videos = [{"type": "video", "video": name, "fps": 0.5} for name in ("c.mp4", "d.mp4")]
    expected = [*images, *videos, {"type": "text", "text": "hi"}]
    assert processed["messages"] == [{"role": "user", "content": expected}]


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_options_of_inspect_reach_the_inspection(edition, monkeypatch, capsys, tmp_path):
    seen = []

    def inspect_video(*arguments):
        seen.append(arguments)
        return SimpleNamespace(to_text=lambda context: f"of {context}")

    def plot(inspection, path, context):
        path.write_text(str(context))

    monkeypatch.setattr(inspect, "inspect_video", inspect_video)
    monkeypatch.setattr(inspect, "plot_inspection", plot)
    command = ["inspect", "--video", "clip.mp4", "--edition", edition]
    context = EDITIONS[edition].context_length
    assert main(command) == 0
    assert capsys.readouterr().out == f"of {context}\n"
    assert main([*command, "--fps", "0.25", "--context", "1", "--plot", str(tmp_path / "a.PNG")]) == 0
    assert capsys.readouterr().out == f"of 1\nPlot written to {tmp_path / 'a.PNG'}\n"
    assert (tmp_path / "a.PNG").read_text() == "1"
    assert seen == [("clip.mp4", edition, {}), ("clip.mp4", edition, {"fps": 0.25})]
    assert main(["inspect", "--video", "clip.mp4"]) == 0
    assert seen[-1] == ("clip.mp4", "preview", {})


@pytest.fixture
def asked(model, monkeypatch):
    """`ask` that gives every second answer right; returns how many are."""
    questions = json.loads((demo.ASSETS / "questions.json").read_text()).values()
    answers = [expected if index % 2 else "another answer" for index, (_, expected) in enumerate(chain(*questions))]
    given = iter(answers)
    monkeypatch.setattr(demo, "ask", lambda *_: (next(given), 0.5, [0.1, 0.2, 0.3]))
    return len(answers) // 2, len(answers)


def test_the_demo_counts_right_answers_and_reports_medians(asked, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    right, count = asked
    assert (out.count("[right]"), out.count("[wrong, expected: ")) == (right, count - right)
    assert f"\n{right} of {count} right." in out
    assert "time to first token, preprocessing included: 500 ms; then 5 tokens per second" in out


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [([], None), (["--impl", "triton"], "float32"), (["--impl", "triton", "--dtype", "float16"], "float16")],
)
def test_the_options_of_the_demo_reach_the_model(arguments, dtype, asked, model, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["demo", "--device", "cpu", *arguments]) == 0
    impl = "triton" if arguments else "auto"
    assert model.loaded == {"dtype": dtype, "device": torch.device("cpu"), "impl": impl}
    assert ("interpreter" in capsys.readouterr().out) == (impl == "triton")


def test_the_time_to_the_first_token_includes_the_prefill(model, monkeypatch):
    """The streamer gets the prompt, then one token after another; the clock advances by 1 at each look."""
    clock = iter(range(100))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(clock)))
    file = demo.ASSETS / "image.png"
    text, first, later = demo.ask(model, small_processor(), file, "what?")
    # Start, prompt, first token
    assert (text, first, later) == ("yes", 2.0, [1.0] * (len(model.answer) - 1))
    assert model.generated["max_new_tokens"] == 32
