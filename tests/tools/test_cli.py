"""The commands, in processes of their own: what they print and how they fail."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import keye_kernels as kk
from keye_kernels.cli import main
from keye_kernels.tools.demo import ASSETS, ask
from tests.helpers.random_checkpoint import write_random_checkpoint
from tests.helpers.video_clips import encode_clip

PICTURE = ASSETS / "image.png"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    write_random_checkpoint(path)
    return path


def run(*arguments):
    command = [sys.executable, "-m", "keye_kernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def call(capsys, *arguments):
    """The same in this process: exit code, standard output and standard error."""
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_answers_every_bundled_question_and_says_which_are_right():
    result = run("demo", "--impl", "reference", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    asked = json.loads((ASSETS / "questions.json").read_text(encoding="utf-8"))
    assert {"image.png", "clip.mp4"} == asked.keys()
    model, processor = kk.small_model(dtype="float32"), kk.small_processor()
    hits = []
    for name, questions in asked.items():
        for question, right in questions:
            answer, *_ = ask(model, processor, ASSETS / name, question)
            hits.append(answer == right)
            verdict = "[right]" if hits[-1] else f"[wrong: {right}]"
            assert f"  {question:34} {answer}   {verdict}" in result.stdout.splitlines()
    assert f"{sum(hits)} of {len(hits)} right" in result.stdout and sum(hits) >= len(hits) - 1
    assert "tokens a second" in result.stdout


def test_demo_refuses_the_interpreters_bf16(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, err = call(capsys, "demo", "--impl", "triton", "--dtype", "bfloat16")
    assert code == 2 and out == "" and "bf16 is wrong" in err


def test_generate_json_stream_and_plain_agree(checkpoint, capsys):
    common = ("generate", "--model", checkpoint, "--image", PICTURE, "--max-new-tokens", 12, "what is it?")
    answer = json.loads(call(capsys, *common, "--json")[1])
    assert answer["new_tokens"] == 12 and answer["prompt_tokens"] > 80
    assert call(capsys, *common) == (0, answer["answer"] + "\n", "")
    assert call(capsys, *common, "--stream") == (0, answer["answer"] + "\n", "")


def test_generate_takes_text_alone_and_several_pictures(checkpoint, capsys):
    def tokens(*arguments):
        common = ("generate", "--model", checkpoint, "--max-new-tokens", 2, "--json", "hello")
        return json.loads(call(capsys, *common, *arguments)[1])["prompt_tokens"]

    alone, one, both = tokens(), tokens("--image", PICTURE), tokens("--image", PICTURE, "--image", PICTURE)
    assert both - one == one - alone > 30
    assert alone < tokens("--image", PICTURE, "--max-pixels", 56 * 56) < one


def test_bad_input_is_one_sentence_and_exit_code_2(checkpoint, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
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
        ((*model, "--image", PICTURE, "--max-pixels", 3, "hi"), "max_pixels"),
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
        alone = json.loads(call(capsys, *common)[1])["prompt_tokens"]
        code, out, err = call(capsys, *common, "--video", clip, "--fps", 2)
        assert code == 0, err
        assert json.loads(out)["prompt_tokens"] > alone + 100


def test_inspect_counts_and_draws(tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode_clip())
    for edition in ("preview", "1.5"):
        code, out, err = call(capsys, "inspect", "--video", clip, "--edition", edition, "--plot", tmp_path / "out.png")
        assert code == 0, err
        assert "tokens" in out and "of the context of" in out
        assert Image.open(tmp_path / "out.png").width > 300
    assert call(capsys, "inspect", "--video", tmp_path / "none.mp4")[0] == 2


def test_unknown_command_exits_2():
    assert run("fly").returncode == 2
    assert run().returncode == 2


def test_demo_checkpoint_overwrites_nothing(checkpoint):
    with pytest.raises(ValueError, match="is not empty"):
        write_random_checkpoint(checkpoint)
