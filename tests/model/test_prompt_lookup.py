"""Prompt-lookup decoding: its drafts, and that its tokens are those of greedy decoding, whatever the drafts are."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model import generation, prompt_lookup
from keye_kernels.model.cache import KVCache
from keye_kernels.model.prompt_lookup import find_drafts
from keye_kernels.small import SMALL
from tests.helpers.golden import CASES, golden, load_case
from tests.helpers.tiny import prompt, tiny_model
from tests.model.test_token_state import LateCopies


@pytest.fixture
def model():
    return tiny_model()


def drafts_of(text, count=4, unused=(9, 9, 9, 9)):
    """The drafts after a text; None without a match. `unused` is in the buffer behind the text."""
    drafts, found = find_drafts(torch.tensor([*text, *unused]), torch.tensor([len(text)]), count)
    return drafts.tolist() if found else None


def test_drafts_follow_the_latest_of_the_longest_matches():
    assert drafts_of([1, 2, 3, 4, 5, 6, 7, 8, 2, 3]) == [4, 5, 6, 7]
    # Three tokens match at the first place, two at the second
    assert drafts_of([1, 2, 3, 4, 5, 6, 8, 2, 3, 7, 7, 7, 1, 2, 3]) == [4, 5, 6, 8]
    assert drafts_of([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3]) == [6, 7, 1, 2]
    assert drafts_of([0, 0, 0, 5, 6, 7, 8, 5]) == [6, 7, 8, 5]
    # The last token has to match: a match is of adjacent tokens
    assert drafts_of([1, 2, 9, 5, 5, 7, 3, 6, 8, 1, 2, 3]) == [6, 8, 1, 2]
    # More than MAX_MATCHED_TOKENS do not count
    assert drafts_of([1, 2, 3, 4, 5, 0, 2, 3, 4, 6, 1, 2, 3, 4]) == [6, 1, 2, 3]


def test_drafts_repeat_where_they_reach_the_end_of_the_text():
    assert drafts_of([0, 0, 8, 1, 2, 1, 2], count=5) == [1, 2, 1, 2, 1]
    assert drafts_of([0, 1, 2, 3, 7, 7, 7], count=3) == [7, 7, 7]


def test_texts_without_a_match_and_short_texts_have_no_drafts():
    assert drafts_of([1, 2, 3, 4, 5, 6]) is None
    # What the buffer holds behind the text does not count
    assert drafts_of([1, 2, 3, 4, 5, 6], unused=(7, 6, 8, 8)) is None
    for text in ([1], [1, 1], [1, 1, 1]):
        assert drafts_of(text) is None


@pytest.mark.parametrize("copies", [generation.HostCopies, LateCopies], ids=["on time", "late"])
@pytest.mark.parametrize("num_drafts", [1, 6])
@pytest.mark.parametrize("quality", ["right", "partly right", "wrong", "placeholders"])
def test_tokens_are_those_of_greedy_decoding_for_any_drafts(model, monkeypatch, quality, num_drafts, copies):
    inputs = prompt([(1, 4, 4), (1, 2, 2)])
    length = inputs["input_ids"].shape[1]
    text = model.generate(**inputs, max_new_tokens=40, eos_token_id=())[0]
    generator = torch.Generator().manual_seed(0)
    rows, forward = [], model.model.forward

    def drafts(tokens, used, count):
        assert torch.equal(tokens[: int(used)], text[: int(used)])
        continuation = text[int(used) :][:count]
        right = torch.nn.functional.pad(continuation, (0, count - len(continuation)))
        keep = {"right": count, "partly right": int(torch.randint(0, count + 1, (), generator=generator))}.get(quality, 0)
        wrong = torch.full((count,), 115) if quality == "placeholders" else (right + 1) % 100
        return torch.where(torch.arange(count) < keep, right, wrong), torch.tensor(True)

    monkeypatch.setattr(prompt_lookup, "find_drafts", drafts)
    monkeypatch.setattr(generation, "HostCopies", copies)
    caches = set()
    monkeypatch.setattr(
        model.model, "forward", lambda x, *rest: caches.add(rest[-1]) or rows.append(x.shape[1]) or forward(x, *rest)
    )
    end = int(text[length + 9])
    first_end = text[length:].tolist().index(end)
    for max_new_tokens, eos_token_id, new in ((16, (), 16), (1, (), 1), (2, (), 2), (20, end, first_end + 1)):
        rows.clear()
        caches.clear()
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id, "prompt_lookup": num_drafts}
        assert torch.equal(model.generate(**inputs, **options)[0], text[: length + new])
        [cache] = caches
        # The CPU knows the length after each report. That of a step after the end is not read
        assert cache.count - int(cache.length) in range(num_drafts + 1 if copies is LateCopies else 1)
        assert rows == [length] + [num_drafts + 1] * (len(rows) - 1)
        if quality == "right":
            assert len(rows) - 1 <= -(-(new - 1) // (num_drafts + 1)) + 1
        if quality == "wrong" and new < 20:
            assert len(rows) in (new, min(new + 1, max_new_tokens))


@pytest.mark.parametrize("edition", ["preview", "v1_5"])
def test_tokens_of_the_official_code(edition):
    model, compared = kk.Keye.from_pretrained(golden(edition), dtype=torch.float32), 0
    for _, name in (case for case in CASES if case[0] == edition):
        inputs, outputs = load_case(edition, name)
        length, steps = inputs["input_ids"].shape[1], outputs["generated"].shape[1]
        if len(inputs["input_ids"]) > 1:
            continue
        compared += 1
        for num_drafts in (1, 7):
            options = {"max_new_tokens": steps, "eos_token_id": (), "prompt_lookup": num_drafts}
            assert torch.equal(model.generate(**inputs, **options)[:, length:], outputs["generated"]), name
    assert compared >= 5


@pytest.fixture(scope="module")
def small():
    return kk.small_model(dtype=torch.float32)


def test_without_a_match_a_step_on_a_cpu_is_one_of_a_single_token(model, monkeypatch):
    ids, rows, forward = torch.tensor([[1, 2, 3]]), [], model.model.forward
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=())
    monkeypatch.setattr(prompt_lookup, "find_drafts", lambda *rest: (torch.zeros(5, dtype=torch.int64), torch.tensor(False)))
    monkeypatch.setattr(model.model, "forward", lambda x, *rest: rows.append(x.shape[1]) or forward(x, *rest))
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=(), prompt_lookup=5), expected)
    assert rows == [3, 1, 1, 1]


def test_a_cache_that_grows_during_steps_with_drafts_has_room_for_them_only(model, monkeypatch):
    """The CPU counts all drafts of a step, as on a GPU, until it knows how many agreed."""
    monkeypatch.setattr("keye_kernels.model.cache.CACHE_BLOCK_TOKENS", 2)
    ids = torch.randint(0, 9, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=60, eos_token_id=())
    caches, reserve = [], KVCache.reserve

    def reserve_by_count(cache, batch_size, tokens, limit=None):
        caches.append(cache)
        if cache.count + tokens > cache.max_length:
            cache._grow(min(max(2 * cache.max_length, cache.count + tokens), limit))
        reserve(cache, batch_size, tokens, limit)

    monkeypatch.setattr(KVCache, "reserve", reserve_by_count)
    monkeypatch.setattr(generation, "HostCopies", LateCopies)
    for num_drafts in (1, 5):
        found = model.generate(ids, max_new_tokens=60, eos_token_id=(), prompt_lookup=num_drafts)
        assert torch.equal(found, expected)
        assert caches[-1].max_length <= 12 + 60 + 2 * num_drafts + 1


def test_an_answer_that_is_in_the_prompt_needs_few_steps(small):
    processor, rows = kk.small_processor(), []
    content = [{"type": "image", "image": str(SMALL.parent / "image.png")}, {"type": "text", "text": "what is in the picture?"}]
    messages = [{"role": "user", "content": content}]
    hook = small.model.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    try:
        for tokens_per_step in (1, 3):
            inputs = processor.apply_chat_template(messages, tokenize=True)
            length = inputs["input_ids"].shape[1]
            expected = small.generate(**inputs, max_new_tokens=64)
            rows.clear()
            assert torch.equal(small.generate(**inputs, max_new_tokens=64, prompt_lookup=8), expected)
            new = expected.shape[1] - length
            assert new > 12 and (new - 1) / (len(rows) - 1) >= tokens_per_step
            # Without a match a step has one row
            assert set(rows[1:]) <= {1, 9}
            answer = processor.decode(expected[0, length:], skip_special_tokens=True)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": content}]
    finally:
        hook.remove()


def test_a_streamer_gets_the_tokens_one_by_one(small):
    values = []

    class Streamer:
        def put(self, value):
            values.append(value.clone())

        def end(self):
            values.append("end")

    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    tokens = small.generate(ids, max_new_tokens=16, eos_token_id=(), prompt_lookup=4, streamer=Streamer())
    (first, *new), end = values[:-1], values[-1]
    assert torch.equal(first, ids) and end == "end"
    assert [value.shape for value in new] == [(1,)] * 16 and torch.equal(torch.cat(new), tokens[0, 30:])


@pytest.mark.parametrize("column", [0, 1])
def test_logits_of_kept_tokens_are_checked(model, monkeypatch, column):
    """Those after a draft that was not kept are not logits of greedy decoding."""
    text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=())[0]
    drafts = torch.stack((text[4], (text[5] + 1) % 100, text[5]))
    monkeypatch.setattr(prompt_lookup, "find_drafts", lambda *rest: (drafts, torch.tensor(True)))
    forward = model.lm_head.forward

    def head_with_nan(hidden):
        logits = forward(hidden)
        if hidden.shape[1] == 4:
            logits[:, 2 * column] = logits[:, 2 * column + 1] = torch.nan
        return logits

    monkeypatch.setattr(model.lm_head, "forward", head_with_nan)
    options = {"max_new_tokens": 3, "eos_token_id": (), "prompt_lookup": 3}
    if column:
        # The first step keeps columns 0 and 1: token 4 as drafted, and the token after it
        assert torch.equal(model.generate(text[None, :3], **options)[0], text[:6])
    else:
        with pytest.raises(RuntimeError, match="the logits are NaN or infinite"):
            model.generate(text[None, :3], **options)


def test_a_truncated_cache_is_that_of_fewer_tokens(model):
    ids = torch.randint(0, 100, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache, expected = model(ids).cache, model(ids[:, :5]).cache
        cache.truncate(torch.tensor([5]))
        assert torch.equal(cache.valid, expected.valid) and torch.equal(cache.length, expected.length)
        token = torch.tensor([[7]])
        torch.testing.assert_close(model(token, cache=cache).logits, model(token, cache=expected).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0, 16, -1, True, 2.5, "4"])
def test_a_wrong_number_of_drafts_is_named(model, value):
    with pytest.raises(ValueError, match="prompt_lookup must be an integer from 1 to 15"):
        model.generate(torch.tensor([[1, 2, 3]]), prompt_lookup=value)


def test_only_greedy_decoding_of_one_sequence_can_use_prompt_lookup(model):
    with pytest.raises(ValueError, match=r"prompt_lookup must be None except for greedy decoding .* got do_sample=True"):
        model.generate(torch.tensor([[1, 2, 3]]), prompt_lookup=2, do_sample=True)
    with pytest.raises(ValueError, match=r"prompt_lookup must be None except for greedy decoding .* got 2 sequences"):
        model.generate(torch.tensor([[1, 2, 3]] * 2), prompt_lookup=2)
