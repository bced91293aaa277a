"""Arguments of the official scripts, and clear errors and warnings for arguments of `Keye`."""

import warnings

import pytest
import torch

import keye_kernels as kk


@pytest.fixture(scope="module")
def model():
    return kk.small_model(dtype="float32")


@pytest.fixture(scope="module")
def ids():
    return kk.small_processor()(text="how many objects?")["input_ids"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "auto", "dtype": "float32"}, torch.float32),
        ({"torch_dtype": "float32", "dtype": torch.float32}, torch.float32),
    ],
)
def test_dtype(options, expected):
    assert kk.small_model(**options).dtype == expected


@pytest.mark.parametrize("device_map", ["auto", "cpu", torch.device("cpu")])
def test_device_map(device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kk.small_model(device_map=device_map).device.type == "cpu"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device_map": {"": 0}}, "device_map must be 'auto' or one device"),
        ({"device_map": "balanced"}, "device_map must be 'auto' or one device"),
        ({"device_map": ["cpu"]}, "device_map must be 'auto' or one device"),
        ({"device_map": "nonsense"}, "device must be a torch device"),
        ({"device_map": "cpu", "device": "cpu"}, "device and device_map must not both be given"),
        ({"torch_dtype": "float16", "dtype": "float32"}, "dtype and torch_dtype must be the same"),
    ],
)
def test_arguments_that_cannot_be_followed(options, message):
    with pytest.raises(ValueError, match=message):
        kk.small_model(**options)


def test_auto_is_a_gpu_if_there_is_one(monkeypatch):
    from keye_kernels.model import checks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks, "check_device", lambda device: device)
    assert checks.choose_device(None, "auto") == "cuda"


@pytest.mark.parametrize("token", [-1, 396, 2**40])
def test_ids_outside_of_the_vocabulary(model, ids, token):
    assert model.config.vocab_size == 396
    wrong = ids.clone()
    wrong[0, -1] = token
    for call in (model, lambda ids: model.generate(ids, max_new_tokens=1)):
        with pytest.raises(ValueError, match=f"input_ids must be from 0 to 395, got {token}"):
            call(wrong)
    with pytest.raises(ValueError, match=f"input_ids must be from 0 to 395, got {token}"):
        model(torch.tensor([[token]]), cache=model(ids).cache)
    wrong[0, -1] = 395
    assert model(wrong).logits.shape[-1] == 396


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"seed": 0}, {"top_k": 5, "top_p": 0.9}])
def test_ignored_sampling_arguments_give_a_warning(model, ids, options):
    with pytest.warns(UserWarning, match=f"{', '.join(options)} ignored.*do_sample=True") as caught:
        model.generate(ids, max_new_tokens=1, **options)
    assert caught[0].filename == __file__


def test_no_warning_without_ignored_arguments(model, ids, monkeypatch):
    monkeypatch.setitem(model.generation_config, "temperature", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=1)
        model.generate(ids, max_new_tokens=1, do_sample=True, temperature=0.5, seed=1)


def test_a_streamer_can_be_used_again_also_after_an_exception(model, ids):
    texts, fails = [], [True]

    def write(text):
        if fails:
            fails.clear()
            raise OSError("the client is gone")
        texts.append(text)

    streamer = kk.TextStreamer(kk.small_processor().decode, write)
    with pytest.raises(OSError, match="gone"):
        model.generate(ids, max_new_tokens=4, streamer=streamer, eos_token_id=())
    answer = model.generate(ids, max_new_tokens=4, streamer=streamer, eos_token_id=())[0, ids.shape[1] :]
    assert "".join(texts) == kk.small_processor().decode(answer)
    texts.clear()
    model.generate(ids, max_new_tokens=4, streamer=streamer, eos_token_id=())
    assert "".join(texts) == kk.small_processor().decode(answer)
