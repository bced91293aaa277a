"""Arguments of forward, generate and get_rope_index: other shapes, dtypes, values and combinations."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_kernels import Keye
from keye_kernels.small import small_model

from .harness import check, fuzz
from .json_values import SCALARS
from .test_operators import changed, with_changes

IMAGE, VIDEO, START, END = 373, 374, 370, 371
PROMPT = torch.tensor([[1, 2, START, *[IMAGE] * 4, END, 3], [361, 1, 2, 3, 4, 5, 6, 7, 8]])
VIDEO_PROMPT = torch.tensor([[1, START, *[VIDEO] * 4, END]])


@pytest.fixture(scope="module")
def model() -> Keye:
    return small_model(dtype="float32", impl="reference")


@st.composite
def inputs(draw: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if draw(st.booleans()):
        arguments["input_ids"] = PROMPT
        mask = torch.ones_like(PROMPT)
        mask[1, 0] = 0
        arguments |= {
            "attention_mask": mask,
            "pixel_values": torch.rand(16, 3, 14, 14),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    elif draw(st.booleans()):
        arguments["input_ids"] = VIDEO_PROMPT
        arguments |= {"pixel_values_videos": torch.rand(16, 3, 14, 14), "video_grid_thw": torch.tensor([[2, 2, 4]])}
        arguments["second_per_grid_ts"] = torch.tensor([0.5])
    else:
        arguments["input_ids"] = torch.tensor(
            draw(st.sampled_from([[[1]], [[5, 6, 7]], [[395]], [[396]], [[-1]], [[START]], [[]], [1, 2], [[[1]]]]))
        )
    if draw(st.integers(0, 5)) == 0:
        arguments.pop(draw(st.sampled_from(sorted(arguments))))
        arguments.setdefault("input_ids", None)
    return with_changes(draw, arguments)


FORWARD = st.fixed_dictionaries(
    {},
    optional={
        "logits_to_keep": st.sampled_from([0, 1, 2, 100, -1, 2**64, 1.0, None, "x", True, torch.tensor(1)]),
        "position_ids": st.sampled_from(
            [None, PROMPT.expand(3, -1, -1), PROMPT, torch.zeros(3, 2, 9), torch.full((3, 2, 9), 2**40), "x"]
        ),
        "num_frames": SCALARS,
        "cache": st.sampled_from([None, None, None, 1, "x", (1, 9), (1, 100), (2, 100), (3, 100)]),
    },
)


@fuzz(80)
@given(inputs=inputs(), options=FORWARD, chunks=st.integers(0, 5))
def test_forward(model: Keye, inputs: dict[str, Any], options: dict[str, Any], chunks: int) -> None:
    if isinstance(options.get("cache"), tuple):
        options = options | {"cache": model.new_cache(*options["cache"])}

    def call() -> Any:
        with torch.no_grad():
            output = model(**inputs, **options)
            return model(output.logits[:, -1:].argmax(-1), cache=output.cache) if chunks == 0 else output

    check(call)


SAMPLING = st.fixed_dictionaries(
    {"max_new_tokens": st.sampled_from([1, 2, 3]) | SCALARS.filter(lambda n: not (type(n) in (int, float) and 100 < n < 4096))},
    optional={
        "do_sample": st.booleans() | SCALARS,
        "temperature": SCALARS | st.floats(0, 2),
        "top_k": SCALARS | st.integers(0, 400),
        "top_p": SCALARS | st.floats(0, 1),
        "eos_token_id": SCALARS | st.lists(SCALARS | st.integers(0, 400), max_size=3) | st.just(torch.tensor([3])),
        "pad_token_id": SCALARS | st.integers(0, 400),
        "seed": SCALARS | st.integers(-1, 9),
        "streamer": st.sampled_from([None, None, 1, "x", object()]),
        "prompt_lookup": SCALARS | st.integers(0, 16),
    },
)


@fuzz(80)
@given(inputs=inputs(), options=SAMPLING)
def test_generate(model: Keye, inputs: dict[str, Any], options: dict[str, Any]) -> None:
    # NaN pixels give NaN logits, which `generate` documents as a RuntimeError
    check(lambda: model.generate(**inputs, **options), expected=(ValueError, TypeError, RuntimeError))


@fuzz(30)
@given(inputs=inputs())
def test_get_rope_index(model: Keye, inputs: dict[str, Any]) -> None:
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    check(lambda: model.get_rope_index(**{name: inputs[name] for name in names if name in inputs}))


@fuzz(30)
@given(
    pixels=st.just(torch.rand(16, 3, 14, 14)).flatmap(lambda x: st.just(x) | changed(x)),
    grid=st.just(torch.tensor([[1, 4, 4]])).flatmap(lambda x: st.just(x) | changed(x)),
)
def test_get_image_features(model: Keye, pixels: Any, grid: Any) -> None:
    check(lambda: model.get_image_features(pixels, grid))
