"""The tokenizer of a checkpoint, based on the `tokenizers` package, and a byte tokenizer for random checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A Unicode noncharacter inside a special token makes it plain text for `KeyeTokenizer.encode`, which removes the character
PLAIN_TEXT_MARK = "\ufdd0"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
# Of the `tokenizers` package
MAX_TOKEN_ID = 2**32 - 1
FRAME, FAST_START, FAST_END = "<|frame|>", "<|fast_start|>", "<|fast_end|>"
# In the order of their ids in Keye-VL-8B-Preview, which start at 151643; the last three are only in 1.5.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("<|point_start|>", "<|point_end|>", "<|ocr_text_start|>", "<|ocr_text_end|>"),
    *("<|clip_time_start|>", "<|clip_time_end|>", FRAME, FAST_START, FAST_END),
)


class SafePrompt(str):
    """A prompt of `apply_chat_template` with allow_special_tokens=False: its unmarked special tokens are the template's."""


class KeyeTokenizer:
    """Converts text to token ids and back with `backend`, a `tokenizers.Tokenizer`.

    Turns the backend's padding and truncation off. `pad_token` defaults to `eos_token`; both may be None. Raises ValueError for a
    token that is not in the vocabulary.
    """

    def __init__(self, backend: Tokenizer, *, eos_token: str | None = None, pad_token: str | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.eos_token = eos_token
        self.pad_token = pad_token or eos_token
        self.eos_token_id = None if eos_token is None else self.token_to_id(eos_token)
        self.pad_token_id = None if self.pad_token is None else self.token_to_id(self.pad_token)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> KeyeTokenizer:
        """Loads `tokenizer.json` and optionally `tokenizer_config.json` from the folder of a checkpoint.

        Raises FileNotFoundError, or ValueError for a file that cannot be read.
        """
        from tokenizers import Tokenizer

        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; the checkpoint needs a tokenizer.json")
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises a bare Exception for a broken file
            raise ValueError(f"{file} cannot be read as a tokenizer: {str(error)[:200]}") from error
        config = read_json(Path(path) / "tokenizer_config.json", default={})
        tokens = {name: _token_text(config.get(name)) for name in ("eos_token", "pad_token")}
        for name, token in tokens.items():
            if not isinstance(token, (str, type(None))):
                raise ValueError(
                    f"{name} in {Path(path) / 'tokenizer_config.json'} must be a token's text, got {config[name]!r:.100}"
                )
        return cls(backend, **tokens)

    def __len__(self) -> int:
        """Returns the size of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token; raises ValueError if it is not in the vocabulary."""
        is_unicode = not any("\ud800" <= character <= "\udfff" for character in token)
        token_id = self.backend.token_to_id(token) if is_unicode else None
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token!r}; is tokenizer.json the one of this checkpoint?")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Converts text to ids. Special tokens in the text become one id each, unless `as_plain_text` marked them."""
        if PLAIN_TEXT_MARK not in text:
            return self.backend.encode(text).ids
        ids: list[int] = []
        # The text between two added tokens is tokenized by itself, so that a piece gets the same ids alone
        for piece in re.split(f"({_any_of(self._added_tokens())})", text):
            is_marked = PLAIN_TEXT_MARK in piece
            ids += self._encode_plain(piece.replace(PLAIN_TEXT_MARK, "")) if is_marked else self.backend.encode(piece).ids
        return ids

    def as_plain_text(self, text: str) -> str:
        """Marks the special tokens in a text, and the start of one at its end, so that `encode` takes them as plain text."""
        special = [token for token, is_special in self._added_tokens().items() if is_special]
        pattern = re.compile(_any_of(special))
        while pattern.search(text):  # tokens may overlap
            text = pattern.sub(lambda match: match[0][0] + PLAIN_TEXT_MARK + match[0][1:], text)
        if any(text.endswith(token[:length]) for token in special for length in range(1, len(token))):
            text += PLAIN_TEXT_MARK
        return text

    def _added_tokens(self) -> dict[str, bool]:
        """The tokens that the backend finds in a text before it splits it into words, and whether they are special."""
        return {token.content: token.special for token in self.backend.get_added_tokens_decoder().values()}

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of a text without its added tokens: the steps of `backend.encode` after their removal."""
        backend = self.backend
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [text] if backend.pre_tokenizer is None else [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def decode(
        self,
        token_ids: int | Sequence[int] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Converts one id or `[S]` ids to text. Raises ValueError for `clean_up_tokenization_spaces`, which Keye turns off."""
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces=True is not supported; Keye's tokenizer turns it off")
        return self.backend.decode(_list_ids(token_ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self,
        sequences: Iterable[Sequence[int] | torch.Tensor],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """Converts `[B, S]` ids, or a list of B sequences of ids, to B texts; the other arguments are those of `decode`."""
        if not isinstance(sequences, Iterable):
            raise TypeError(f"sequences must be an iterable of sequences of token ids, got {type(sequences).__name__}")
        return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in sequences]


def build_byte_tokenizer(extra_special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Builds a tokenizer without training: one token per byte, with the byte as its id, then the special tokens.

    It decodes any encoded text unchanged. Its method `save` writes `tokenizer.json`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel maps the 188 printable Latin-1 bytes to themselves and the others to U+0100 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in set(printable)]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + index) for index, byte in enumerate(unprintable)})
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Tags such as <think> are part of answers, so skip_special_tokens must keep them.
    tokens = (*SPECIAL_TOKENS, *extra_special_tokens)
    tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False) for token in tokens])
    return tokenizer


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for the longest of the tokens; without tokens one that never matches."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"


def read_json(path: Path, *, default: Any = None) -> Any:
    """Reads a JSON file; returns `default` if the file does not exist and `default` is not None.

    Raises FileNotFoundError, or ValueError for invalid JSON or JSON that is not an object.
    """
    if not path.is_file():
        if default is not None:
            return default
        raise FileNotFoundError(f"{path} does not exist; is this the folder of a Keye checkpoint?")
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_text(path: Path) -> str:
    """Reads a text file; raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _token_text(token: Any) -> Any:
    # In tokenizer_config.json a token is a string or {"content": ..., "lstrip": ...}.
    return token.get("content") if isinstance(token, dict) else token


def _list_ids(token_ids: Any) -> list[int]:
    """Returns one or several token ids as a list. Raises TypeError or ValueError if they are not integers of 32 bits."""
    ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor | np.ndarray) else token_ids
    ids = [ids] if isinstance(ids, Integral) else ids
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"token_ids must be integers, got {type(token_ids).__name__}")
    found = []
    for token_id in ids:
        if isinstance(token_id, torch.Tensor) and token_id.ndim == 0:
            token_id = token_id.item()
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise TypeError(f"token_ids must be integers, got {type(token_id).__name__}")
        if not 0 <= int(token_id) <= MAX_TOKEN_ID:
            raise ValueError(f"token_ids must be from 0 to {MAX_TOKEN_ID}, got {token_id}")
        found.append(int(token_id))
    return found
