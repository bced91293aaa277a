"""The output and the errors of the commands demo, generate and inspect."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import keye_kernels as kk
from keye_kernels.cli import main
from keye_kernels.small import ASSETS
from keye_kernels.tools.demo import ask
from tests.helpers.random_checkpoint import write_random_checkpoint
from tests.helpers.video_clips import encode_clip

IMAGE = ASSETS / "image.png"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    write_random_checkpoint(path)
    return path


def run(*arguments):
    """Runs a command in a process of its own."""
    command = [sys.executable, "-m", "keye_kernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def call(capsys, *arguments):
    """Runs a command in this process. Returns the exit code, stdout and stderr."""
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_answers_every_bundled_question_and_says_which_are_right():
    result = run("demo", "--impl", "reference", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    asked = json.loads((ASSETS / "questions.json").read_text(encoding="utf-8"))
    assert {"image.png", "clip.mp4"} == asked.keys()
    model, processor = kk.small_model(dtype="float32"), kk.small_processor()
    is_right = []
    for name, questions in asked.items():
        for question, expected in questions:
            answer, *_ = ask(model, processor, ASSETS / name, question)
            is_right.append(answer == expected)
            verdict = "[right]" if is_right[-1] else f"[wrong, expected: {expected}]"
            assert f"  {question:34} {answer}   {verdict}" in result.stdout.splitlines()
    assert f"{sum(is_right)} of {len(is_right)} right" in result.stdout and sum(is_right) >= len(is_right) - 1
    assert "tokens per second" in result.stdout


def test_generate_json_stream_and_plain_agree(checkpoint, capsys):
    common = ("generate", "--model", checkpoint, "--image", IMAGE, "--max-new-tokens", 12, "what is it?")
    answer = json.loads(call(capsys, *common, "--json")[1])
    assert answer["new_tokens"] == 12 and answer["prompt_tokens"] > 80
    assert call(capsys, *common) == (0, answer["answer"] + "\n", "")
    assert call(capsys, *common, "--stream") == (0, answer["answer"] + "\n", "")
    assert call(capsys, *common, "--stream", "--prompt-lookup", 4) == (0, answer["answer"] + "\n", "")


def test_generate_accepts_no_image_and_several_images(checkpoint, capsys):
    def tokens(*arguments):
        common = ("generate", "--model", checkpoint, "--max-new-tokens", 2, "--json", "hello")
        return json.loads(call(capsys, *common, *arguments)[1])["prompt_tokens"]

    text_only, one, both = tokens(), tokens("--image", IMAGE), tokens("--image", IMAGE, "--image", IMAGE)
    assert both - one == one - text_only > 30
    assert text_only < tokens("--image", IMAGE, "--max-pixels", 56 * 56) < one


def test_bad_input_prints_one_line_and_returns_2(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "cut.png").write_bytes(IMAGE.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    other = tmp_path / "other"
    write_random_checkpoint(other)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "Llama"}
    (other / "config.json").write_text(json.dumps(config))
    model = ("generate", "--model", checkpoint)
    cases = [
        (("generate", "--model", tmp_path / "nowhere", "hi"), "nowhere"),
        (("generate", "--model", other, "hi"), "model_type"),
        ((*model, ""), "question must not be empty"),
        ((*model, "--image", tmp_path / "none.png", "hi"), "none.png"),
        ((*model, "--image", tmp_path / "cut.png", "hi"), "cut.png"),
        ((*model, "--image", tmp_path / "text.png", "hi"), "text.png"),
        ((*model, "--max-new-tokens", 100000, "hi"), "max_new_tokens"),
        ((*model, "--max-new-tokens", 0, "hi"), "max_new_tokens must be at least 1"),
        ((*model, "--impl", "fastest", "hi"), "impl must be one of"),
        ((*model, "--dtype", "int8", "hi"), "dtype must be"),
        ((*model, "--device", "nonsense", "hi"), "device"),
        ((*model, "--sample", "--temperature", "-1", "hi"), "temperature must be above 0"),
        ((*model, "--image", IMAGE, "--max-pixels", 3, "hi"), "max_pixels"),
    ]
    if not torch.cuda.is_available():
        cases.append(((*model, "--device", "cuda", "hi"), "torch finds no CUDA"))
        cases.append(((*model, "--impl", "triton", "hi"), "TRITON_INTERPRET=1"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for arguments, message in cases:
        code, out, err = call(capsys, *arguments)
        assert code == 2 and out == "", (arguments, out)
        assert message in err and len(err.strip().splitlines()) == 1, (arguments, err)
    result = run(*cases[0][0])
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_video_in_both_editions(tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode_clip())
    for model_type in ("Keye", "KeyeVL1_5"):
        write_random_checkpoint(tmp_path / model_type, model_type=model_type)
        common = ("generate", "--model", tmp_path / model_type, "--max-new-tokens", 2, "--json", "what happens?")
        text_only = json.loads(call(capsys, *common)[1])["prompt_tokens"]
        code, out, err = call(capsys, *common, "--video", clip, "--fps", 2)
        assert code == 0, err
        assert json.loads(out)["prompt_tokens"] > text_only + 100


def test_inspect_counts_and_plots(tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode_clip())
    for edition in ("preview", "1.5"):
        code, out, err = call(capsys, "inspect", "--video", clip, "--edition", edition, "--plot", tmp_path / "out.png")
        assert code == 0, err
        assert "tokens" in out and "of the context of" in out
        assert Image.open(tmp_path / "out.png").width > 300
    assert call(capsys, "inspect", "--video", tmp_path / "none.mp4")[0] == 2


def test_an_unknown_command_exits_with_2():
    assert run("fly").returncode == 2
    assert run().returncode == 2


def test_a_random_checkpoint_does_not_overwrite_a_folder(checkpoint):
    with pytest.raises(ValueError, match="is not empty"):
        write_random_checkpoint(checkpoint)
