"""Damaged weights: headers of safetensors files, the index, and tensors that do not fit config.json."""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_kernels import Keye
from keye_kernels.small import SMALL

from .harness import check, fuzz
from .json_values import damaged, damaged_bytes, json_files

WEIGHTS = (SMALL / "model.safetensors").read_bytes()
HEADER_BYTES = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER, DATA = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES]), WEIGHTS[8 + HEADER_BYTES :]
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMES = sorted(set(HEADER) - {"__metadata__"})
WEIGHT_MAP = {name: PARTS[index % 2] for index, name in enumerate(NAMES)}
INDEX = {"metadata": {"total_size": len(DATA)}, "weight_map": WEIGHT_MAP}
FILES = st.sampled_from(
    [*PARTS, "config.json", "../model.safetensors", "/etc/passwd", "C:\\x", "x", ".", "..", "", "\0", "a" * 300]
)
DTYPES = st.sampled_from(["BF16", "F16", "F32", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", "x"])


def pack(header: Any) -> bytes:
    """The part of a safetensors file before the data, which the tests append: hypothesis keeps all values that it draws."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@st.composite
def tensor_headers(draw: Any) -> bytes:
    """A safetensors file whose header describes some tensors differently."""
    header, changed = json.loads(json.dumps(HEADER)), set()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(NAMES))
        entry = header.get(name)
        if entry is None or set(entry) != {"dtype", "shape", "data_offsets"} or name in changed:
            continue
        changed.add(name)
        change = draw(st.sampled_from(["dtype", "shape", "offsets", "delete", "rename", "swap", "entry"]))
        if change == "dtype":
            entry["dtype"] = draw(DTYPES)
        elif change == "shape":
            entry["shape"] = draw(st.sampled_from([entry["shape"][::-1], [], [0], [*entry["shape"], 1], [1, *entry["shape"]]]))
        elif change == "offsets":
            entry["data_offsets"] = [
                max(0, at + draw(st.sampled_from([-2, 0, 2, 2**40, -(2**40)]))) for at in entry["data_offsets"]
            ]
        elif change == "delete":
            del header[name]
        elif change == "rename":
            header[draw(st.sampled_from([name + "x", "", "\ud800", "x" * 5000, "lm_head.bias"]))] = header.pop(name)
        elif change == "swap":
            other = draw(st.sampled_from(NAMES))
            header[name], header[other] = header.get(other, entry), entry
        else:
            header[name] = draw(damaged(entry))
    return pack(header)


@st.composite
def weight_maps(draw: Any) -> bytes:
    index = json.loads(json.dumps(INDEX))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(NAMES))
        change = draw(st.sampled_from(["file", "other", "delete", "add"]))
        if change == "file":
            index["weight_map"][name] = draw(FILES)
        elif change == "other":
            index["weight_map"][name] = PARTS[draw(st.integers(0, 1))]
        elif change == "delete":
            index["weight_map"].pop(name, None)
        else:
            index["weight_map"]["x"] = draw(FILES)
    return json.dumps(index).encode()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The small checkpoint without weights."""
    with tempfile.TemporaryDirectory() as name:
        for file in SMALL.glob("*.json"):
            shutil.copy(file, name)
        yield Path(name)


def load(folder: Path) -> torch.Tensor:
    model = Keye.from_pretrained(folder)
    return model(torch.tensor([[1, 2]])).logits


def check_load(folder: Path) -> None:
    check(lambda: load(folder), expected=(ValueError, FileNotFoundError), words=str(folder))


@fuzz(90)
@given(head=st.one_of(tensor_headers(), damaged(HEADER).map(pack)))
def test_tensor_headers(folder: Path, head: bytes) -> None:
    (folder / "model.safetensors").write_bytes(head + DATA)
    check_load(folder)


@fuzz(50)
@given(
    head=damaged_bytes(WEIGHTS[: 8 + HEADER_BYTES]),
    data_bytes=st.just(len(DATA)) | st.integers(0, len(DATA)),
    rest=st.binary(max_size=4),
)
def test_bytes_of_weights(folder: Path, head: bytes, data_bytes: int, rest: bytes) -> None:
    (folder / "model.safetensors").write_bytes(head + DATA[:data_bytes] + rest)
    check_load(folder)


@pytest.fixture(scope="module")
def split_folder(folder: Path) -> Iterator[Path]:
    """The small checkpoint with its weights in two files."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(folder, name, dirs_exist_ok=True)
        (Path(name) / "model.safetensors").unlink(missing_ok=True)
        for part in PARTS:
            header, data = {}, b""
            for tensor in (tensor for tensor, file in WEIGHT_MAP.items() if file == part):
                first, end = HEADER[tensor]["data_offsets"]
                header[tensor] = HEADER[tensor] | {"data_offsets": [len(data), len(data) + end - first]}
                data += DATA[first:end]
            (Path(name) / part).write_bytes(pack(header) + data)
        (Path(name) / "model.safetensors.index.json").write_text(json.dumps(INDEX))
        assert load(Path(name)).isfinite().all()
        yield Path(name)


@fuzz(60)
@given(content=st.one_of(weight_maps(), json_files({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys("ab", PARTS[0])})))
def test_index(split_folder: Path, content: bytes) -> None:
    (split_folder / "model.safetensors.index.json").write_bytes(content)
    check_load(split_folder)
