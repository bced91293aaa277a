"""The tokenizer of a checkpoint and the byte tokenizer."""

import json

import pytest
import torch

from keye_kernels.processing.tokenizer import SPECIAL_TOKENS, KeyeTokenizer, build_byte_tokenizer
from tests.helpers.small_tokenizer import write_processor_files


def test_the_byte_tokenizer_round_trips_any_text_and_has_every_special_token():
    tokenizer = KeyeTokenizer(build_byte_tokenizer(["<extra>"]), eos_token="<|im_end|>")
    text = "Größe 图片 🙂\n\t \x00 'S  end" + "".join(chr(code) for code in range(32, 300))
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == list(range(256, 256 + len(SPECIAL_TOKENS)))
    assert len(tokenizer) == 256 + len(SPECIAL_TOKENS) + 1


def test_skip_special_tokens_keeps_the_thinking_tags(processor):
    ids = processor.tokenizer.encode("<think>a</think>b<|im_end|>")
    assert processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == "<think>a</think>b"
    assert processor.decode(torch.tensor(ids), skip_special_tokens=True) == "<think>a</think>b"
    assert processor.decode(ids[-1]) == "<|im_end|>"


def test_end_and_padding_tokens_are_read_by_name(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.decode(tokenizer.pad_token_id) == "<|endoftext|>"


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
@pytest.mark.parametrize("token", [5, [], {"content": 5}, {"content": ["a"]}], ids=str)
def test_tokens_that_are_no_text_are_named(tmp_path, name, token):
    folder = write_processor_files(tmp_path, "preview")
    (folder / "tokenizer_config.json").write_text(json.dumps({name: token}))
    with pytest.raises(ValueError, match=rf"{name} in .*tokenizer_config\.json must be a token's text, got"):
        KeyeTokenizer.from_pretrained(folder)


def test_special_tokens_have_the_ids_of_the_released_tokenizer():
    # docs/models/keye_vl_preview.md
    released = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653}
    released |= {
        "<|vision_pad|>": 151654,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
        "<think>": 151667,
        "</think>": 151668,
    }
    released |= {"<|point_start|>": 151669, "<|clip_time_end|>": 151674}
    tokenizer = build_byte_tokenizer()
    for token, token_id in released.items():
        assert tokenizer.token_to_id(token) - tokenizer.token_to_id("<|endoftext|>") == token_id - 151643, token
