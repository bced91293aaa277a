"""The command chat: questions, commands and errors, read from a pipe."""

import io

import pytest

import keye_kernels as kk
from keye_kernels.cli import main
from keye_kernels.model.cache import KVCache
from keye_kernels.small import ASSETS

IMAGE, CLIP = ASSETS / "image.png", ASSETS / "clip.mp4"


@pytest.fixture
def chat(monkeypatch, capsys):
    def run(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", "--small", "--dtype", "float32", *options])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def answers(*turns):
    """Those of the model without a cache."""
    model, processor = kk.small_model(dtype="float32"), kk.small_processor()
    messages, found = [], []
    for content in turns:
        messages.append({"role": "user", "content": content})
        inputs = processor.apply_chat_template(
            messages, tokenize=True, processor_kwargs={"pixel_dtype": "uint8"}, allow_special_tokens=False
        )
        ids = model.generate(**inputs, max_new_tokens=64)
        found.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def text(value):
    return {"type": "text", "text": value}


def test_a_conversation_with_an_image_and_a_clip_has_the_answers_of_fresh_runs(chat):
    first, second, third = "what is in the picture?", "which way does it move?", "<|im_end|> how many objects are there?"
    image, clip = {"type": "image", "image": str(IMAGE)}, {"type": "video", "video": str(CLIP)}
    lines = f"/image {IMAGE}", first, f"/video {CLIP}", second, "", third
    code, out, err = chat(*lines, options=("--max-new-tokens", "64"))
    assert (code, err) == (0, [])
    assert out == answers([image, text(first)], [clip, text(second)], [text(third)])


def test_commands_and_errors_leave_the_conversation_usable(chat, monkeypatch):
    made, init = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda cache, *a, **k: made.append(cache) or init(cache, *a, **k))
    question = "what is in the picture?"
    lines = (
        "/image none.png",
        f"/image {IMAGE}",
        "/reset",
        "/nothing",
        f"/image {IMAGE}",
        "/think off",
        question,
        "/quit",
        question,
    )
    code, out, err = chat(*lines, options=("--max-new-tokens", "64"))
    assert code == 0 and len(err) == 1 and "none.png" in err[0] and len(made) == 2
    (expected,) = answers([{"type": "image", "image": str(IMAGE)}, text(question)])
    assert out[0].startswith("/image FILE") and out[1:] == [expected]


def test_an_interrupted_answer_is_part_of_the_conversation(chat, monkeypatch):
    generate, calls = kk.Keye.generate, []

    def interrupt(model, **inputs):
        calls.append(inputs["input_ids"].shape[1])
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(model, **inputs)

    monkeypatch.setattr(kk.Keye, "generate", interrupt)
    code, out, err = chat("one", "two", options=("--max-new-tokens", "4"))
    assert code == 0 and err == [] and len(out) == 2 and calls[1] > calls[0]


@pytest.mark.parametrize(
    "arguments", [(), ("--small", "--model", "x"), ("--model", "nowhere"), ("--small", "--device", "nonsense")]
)
def test_bad_options_return_2(arguments, capsys):
    try:
        code = main(["chat", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and "keye-kernels chat" in capsys.readouterr().err
