"""Damaged configuration files of a checkpoint: its processor and model are loaded and answer a question, or an error says why."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_kernels import Keye, KeyeProcessor
from keye_kernels.cli import main
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE
from keye_kernels.small import SMALL

from .harness import MAX_MESSAGE_CHARACTERS, check, fuzz
from .json_values import damaged_bytes, json_files

IMAGE = Image.new("RGB", (112, 112), "red")
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "x"}]}]
# With the optional fields that released checkpoints have and the small one does not
EXTRA: dict[str, dict[str, Any]] = {
    "config.json": {"text_config": None, "rope_parameters": None, "use_sliding_window": False, "dtype": None},
    "generation_config.json": {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.05},
    "preprocessor_config.json": {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "size": {},
    },
    "tokenizer_config.json": {"chat_template": DEFAULT_CHAT_TEMPLATE, "added_tokens_decoder": {}},
    "chat_template.json": {},
}


def read(name: str) -> Any:
    return json.loads((SMALL / name).read_text()) | EXTRA.get(name, {})


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(SMALL, name, dirs_exist_ok=True)
        yield Path(name)


def answer(folder: Path) -> str:
    """The steps of `keye-kernels generate`."""
    processor = KeyeProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(MESSAGES, tokenize=True)
    model = Keye.from_pretrained(folder, dtype="float32")
    tokens = model.generate(**inputs, max_new_tokens=2)
    return processor.decode(tokens[0])


@contextmanager
def replaced(file: Path, content: bytes | None) -> Iterator[None]:
    """Replaces or (None) deletes a file of the copy, then puts it back."""
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        if (SMALL / file.name).exists():
            shutil.copy(SMALL / file.name, file)


def check_with(folder: Path, name: str, content: bytes) -> None:
    with replaced(folder / name, content):
        check(lambda: answer(folder), expected=(ValueError, TypeError, FileNotFoundError))


@fuzz(130)
@given(content=json_files(read("config.json")))
def test_config(folder: Path, content: bytes) -> None:
    check_with(folder, "config.json", content)


@fuzz(40)
@given(content=json_files(read("generation_config.json")))
def test_generation_config(folder: Path, content: bytes) -> None:
    check_with(folder, "generation_config.json", content)


@fuzz(80)
@given(content=json_files(read("preprocessor_config.json")))
def test_preprocessor_config(folder: Path, content: bytes) -> None:
    check_with(folder, "preprocessor_config.json", content)


@fuzz(40)
@given(content=json_files(read("tokenizer_config.json")))
def test_tokenizer_config(folder: Path, content: bytes) -> None:
    with replaced(folder / "chat_template.json", None):  # so that the template of this file is used
        check_with(folder, "tokenizer_config.json", content)


@fuzz(30)
@given(content=json_files(read("tokenizer.json")))
def test_tokenizer(folder: Path, content: bytes) -> None:
    check_with(folder, "tokenizer.json", content)


@fuzz(40)
@given(
    content=st.one_of(json_files(read("chat_template.json")), damaged_bytes(DEFAULT_CHAT_TEMPLATE.encode())),
    is_json=st.booleans(),
)
def test_chat_template(folder: Path, content: bytes, is_json: bool) -> None:
    check_with(folder, "chat_template.json" if is_json else "chat_template.jinja", content)


FILES = sorted({*EXTRA, "tokenizer.json", "model.safetensors.index.json"})


@fuzz(40)
@given(name=st.sampled_from(FILES), data=st.data())
def test_command(folder: Path, capsys: pytest.CaptureFixture[str], name: str, data: Any) -> None:
    """`keye-kernels generate` ends with 0, or with 2 and one line."""
    content = data.draw(json_files(read(name) if (SMALL / name).exists() else {"weight_map": {"x": "model.safetensors"}}))
    with replaced(folder / name, content):
        code = check(lambda: main(["generate", "--model", str(folder), "--max-new-tokens", "1", "--dtype", "float32", "x"]))
    errors = capsys.readouterr().err.splitlines()
    assert (code, errors) == (0, []) or (code == 2 and len(errors) == 1 and len(errors[0]) < MAX_MESSAGE_CHARACTERS)
