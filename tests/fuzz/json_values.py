"""Strategies that damage JSON values and files of bytes in the ways that real ones are damaged."""

import copy
import json
from typing import Any

from hypothesis import strategies as st


def sampled_from_all(*groups: list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([value for group in groups for value in group])


NUMBERS = sampled_from_all(
    [0, 1, -1, 2, 3, 5, 7, 8, 100, 255, 1000, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**12, 10**30, -(2**63)],
    [0.0, -0.0, 0.5, 1.5, 1e-9, 1e-45, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf")],
)
TEXTS = st.sampled_from(
    ["", " ", "x", "0", "1", "None", "nan", "é", "\0", "\ud800", "../x", "/etc/passwd", "{{ 1 / 0 }}", "x" * 999]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2), max_leaves=4
)


@st.composite
def damaged(draw: Any, base: Any, most: int = 3) -> Any:
    """A JSON value that differs from `base` in one to `most` places."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, most))):
        value = _damage_one(draw, value)
    return value


def _damage_one(draw: Any, value: Any) -> Any:
    holders = list(_containers(value))
    if not holders:
        return draw(VALUES)
    holder = draw(st.sampled_from(holders))
    if not holder:
        return draw(VALUES) if holder is value else _fill(draw, value, holder)
    key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    change = draw(st.sampled_from(["replace", "replace", "near", "near", "retype", "wrap", "delete", "repeat", "move", "root"]))
    old = holder[key]
    if change == "root" and draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    if change == "delete":
        del holder[key]
    elif change == "near":
        holder[key] = draw(_near(old))
    elif change == "retype":
        holder[key] = draw(st.sampled_from([str(old), [old], {"x": old}, float(old) if type(old) is int else None, bool(old)]))
    elif change == "wrap":
        holder[key] = draw(st.sampled_from([[old], [old, old], {str(key): old}, [[old]]]))
    elif change == "repeat" and isinstance(holder, list):
        holder.insert(key, old)
    elif change == "move":
        other = draw(st.sampled_from(holders))
        holder[key] = copy.deepcopy(
            draw(st.sampled_from(list(other.values()) if isinstance(other, dict) else other)) if other else other
        )
    else:
        holder[key] = draw(VALUES)
    return value


def _fill(draw: Any, value: Any, holder: Any) -> Any:
    if isinstance(holder, dict):
        holder["x"] = draw(VALUES)
    else:
        holder.append(draw(VALUES))
    return value


def _near(old: Any) -> st.SearchStrategy[Any]:
    """Values like the old one, which pass checks of the type."""
    if isinstance(old, bool):
        return st.just(not old)
    if isinstance(old, int):
        return st.one_of(
            st.integers(-3, 3).map(lambda step: old + step), st.sampled_from([2 * old, old // 2, 4 * old, -old, 0, old**2])
        )
    if isinstance(old, float):
        return st.floats(-4, 4).map(lambda factor: old * factor) | st.floats()
    if isinstance(old, str):
        return st.sampled_from([old + "x", old[:-1], old.upper(), old * 2, old[::-1]]) | st.text(max_size=4)
    return VALUES


def _containers(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        yield value
        for item in list(value.values()) if isinstance(value, dict) else value:
            yield from _containers(item)


@st.composite
def damaged_bytes(draw: Any, content: bytes, most: int = 3) -> bytes:
    """Bytes with changed, missing, repeated or inserted parts."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(data)))
        # Headers are at the start, and decide more than the rest
        at = min(at, draw(st.integers(0, 64))) if draw(st.booleans()) else at
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 1000]))
        change = draw(st.sampled_from(["bit", "byte", "byte", "number", "cut", "end", "repeat", "insert", "zero"]))
        if change == "bit" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "byte" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif change == "number":
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(st.sampled_from([0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(["little", "big"])))
        elif change == "cut":
            del data[at : at + length]
        elif change == "end":
            del data[at:]
        elif change == "repeat":
            data[at:at] = data[at : at + length]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


def json_files(base: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file: mostly valid JSON with other values, sometimes not JSON."""
    structured = damaged(base).map(lambda value: json.dumps(value).encode())
    raw = damaged_bytes(json.dumps(base).encode())
    odd = sampled_from_all(
        [b"", b"null", b"[]", b"{}", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"[" * 100000, b'{"a":' * 100000, b"9" * 5000],
        [b'{"model_type": ' + b"9" * 5000 + b"}", b'"' + b"x" * 100000 + b'"', b"{'a': 1}", b"{} {}", b"\0" * 100],
    )
    return st.one_of(structured, structured, structured, structured, raw, odd)
