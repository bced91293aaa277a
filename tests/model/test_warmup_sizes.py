"""Which calls `warmup` makes and what it reports, with stubs in place of the compiler."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels import warm_up
from keye_kernels.model import graphs
from tests.helpers.fake_graphs import FakeGpu
from tests.helpers.recorded_calls import operator_calls  # noqa: F401  a fixture
from tests.helpers.tiny import tiny_model


@pytest.fixture
def compiled(monkeypatch):
    """The steps that are passed to the compiler, which reports 3 compiled and 2 cached kernels."""
    steps = []

    def compile_steps(given, on_kernel):
        steps.extend(given)
        for _ in range(5):
            on_kernel()
        return 3, 2

    monkeypatch.setattr("keye_kernels.triton.launch.compile_steps", compile_steps)
    monkeypatch.setattr(warm_up, "_nothing_to_compile", lambda model: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: steps.append(device))
    return steps


def test_each_size_runs_once_after_it_was_compiled(compiled, operator_calls, capsys):  # noqa: F811
    model = tiny_model()
    report = kk.warmup(model, [(1, 4, 4), [(2, 2, 2), (1, 2, 6)]], [5, 2047], progress=True)
    assert (report.compiled, report.cached, report.note) == (3, 2, "4 sizes on cpu") and 0 < report.seconds < 60
    assert (report.graphs, report.graph_bytes) == (0, 0)
    assert len(compiled) == 5 and compiled[-1] == torch.device("cpu")
    assert "5 kernels" in capsys.readouterr().err
    sizes = {name: [len(arguments[0]) for n, arguments, _ in operator_calls if n == name] for name in ("rope_2d", "rope_3d")}
    # One layer of each stack; a prompt and one more token
    assert sizes == {"rope_2d": [16, 20], "rope_3d": [5, 1, 2047, 1]}
    kk.warmup(model)
    assert "kernels" not in capsys.readouterr().err


def test_calls_have_the_sizes_of_requests(monkeypatch):
    model, calls, forward = tiny_model().bfloat16(), [], kk.Keye.forward
    features = kk.Keye.get_image_features

    def record(self, input_ids, **options):
        cache = options["cache"]
        calls.append((tuple(input_ids.shape), cache.max_length, len(cache.keys), options.get("logits_to_keep", 0)))
        return forward(self, input_ids, **options)

    def record_patches(self, pixel_values, grid_thw):
        calls.append((tuple(pixel_values.shape), pixel_values.dtype, grid_thw.tolist()))
        return features(self, pixel_values, grid_thw)

    monkeypatch.setattr(kk.Keye, "forward", record)
    monkeypatch.setattr(kk.Keye, "get_image_features", record_patches)
    for step in warm_up._steps(model, warm_up._check_grids([[(2, 2, 2), (1, 2, 6)]], 2), [5], model.dtype):
        step()
    assert calls == [
        ((20, 3, 14, 14), torch.bfloat16, [[2, 2, 2], [1, 2, 6]]),
        ((1, 5), 6, 1, 1),
        ((1, 1), 6, 1, 0),
    ]


@pytest.mark.parametrize("length", [True, 2048, -1])
def test_lengths_that_are_no_token_counts_are_refused(length):
    with pytest.raises(ValueError, match="prompt_lengths must hold token counts from 1 to 2047"):
        kk.warmup(tiny_model(), prompt_lengths=[3, length])
    assert kk.warmup(tiny_model(), prompt_lengths=[1, 2047]).compiled == 0


@pytest.mark.parametrize(("pixel_dtype", "dtype"), [("float32", torch.bfloat16), ("uint8", torch.uint8)])
def test_graphs_are_captured_for_the_whole_model(compiled, monkeypatch, pixel_dtype, dtype):
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(graphs, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(graphs, "runs_triton", lambda *_: True)
    model = tiny_model().bfloat16()
    grids = [(1, 4, 4), [(2, 2, 2), (1, 2, 6)], (1, 16, 18)]
    report = kk.warmup(model, grids, [9, 600], pixel_dtype=pixel_dtype)
    # 16, 14 and 288 patches: one segment, three segments, another number of patches. A prompt of 9 tokens, none of 600
    assert report.graphs == len(gpu.captured) == 4 and report.graph_bytes > 4000
    with torch.no_grad():
        pixels = torch.zeros(16, 3, 14, 14, dtype=torch.uint8 if pixel_dtype == "uint8" else torch.float32)
        model.get_image_features(pixels, torch.tensor([(1, 4, 4)]))
    assert len(gpu.captured) == 4 and gpu.captured[0].replays == 2
    assert {entry.pixels.dtype for entry in model.visual.graphs._entries.values()} == {dtype}
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    assert kk.warmup(tiny_model(), [*grids[:2], (1, 24, 24)]).graphs == 2
    del gpu.captured[4:]
    model = tiny_model()
    model.cuda_graphs = False
    assert kk.warmup(model, grids, [9]).graphs == 0 and len(gpu.captured) == 4
