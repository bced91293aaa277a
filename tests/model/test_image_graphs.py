"""Images encoded with CUDA graphs: the same features, for every batch of a bucket, and only where a replay does what a call does.

The CPU plays the GPU (`tests/helpers/fake_graphs.py`); tests/gpu has the tests on a real one.
"""

import copy
import pickle
import threading

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model import graphs, image_graphs
from keye_kernels.model.image_graphs import Bucket, ImageGraphs
from tests.helpers.image_graphs import GRIDS, ROUNDING, eager, encode, inputs, play_gpu, replaced
from tests.helpers.tiny import tiny_model

EDITIONS = ["Keye", "KeyeVL1_5"]


@pytest.fixture
def gpu(monkeypatch):
    return play_gpu(monkeypatch)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_batches_of_one_bucket_share_a_graph(gpu, edition, dtype):
    model = tiny_model(model_type=edition)
    batches = [GRIDS, [(1, 6, 8), (1, 8, 4), (1, 4, 2), (1, 2, 2)], [(1, 2, 4)] * 3 + [(1, 6, 8)]]
    for seed, grids in enumerate(batches * 2):
        found = encode(model, *grids, seed=seed, dtype=dtype)
        torch.testing.assert_close(found, eager(model, *inputs(*grids, seed=seed, dtype=dtype)), **ROUNDING)
    assert [graph.replays for graph in gpu.captured] == [5]
    assert not found.requires_grad and not found.is_inference()


def test_features_are_those_of_the_same_padded_batch_bit_for_bit(gpu):
    """The first batch runs without a graph, on the same padded tensors as later ones."""
    model = tiny_model()
    first, second, third = (encode(model, *GRIDS) for _ in range(3))
    assert gpu.captured[0].replays == 2
    assert torch.equal(first, second) and torch.equal(first, third)


def test_features_are_not_overwritten_by_the_next_batch(gpu):
    model = tiny_model()
    encode(model, *GRIDS)
    found = encode(model, *GRIDS)
    before = found.clone()
    encode(model, *GRIDS, seed=1)
    assert gpu.captured[0].replays == 2 and torch.equal(found, before)


def test_the_caller_may_change_its_pixels_and_grids(gpu):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    pixels, grid_thw = inputs(*GRIDS)
    expected = eager(model, pixels, grid_thw)
    with torch.no_grad():
        found = model.get_image_features(pixels, grid_thw)
    pixels.zero_()
    grid_thw.zero_()
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_a_smaller_batch_leaves_nothing_of_a_larger_one(gpu):
    """NaN in the rows that pad a batch reaches no feature."""
    model = tiny_model(model_type="KeyeVL1_5")
    pixels, grid_thw = inputs((1, 8, 4), (1, 8, 4))
    pixels[32:] = torch.nan
    with torch.no_grad():
        for _ in range(3):
            assert model.get_image_features(pixels, grid_thw)[8:].isnan().all()
    small = [(1, 8, 4), (1, 2, 2)]
    torch.testing.assert_close(encode(model, *small), eager(model, *inputs(*small)), **ROUNDING)
    assert len(gpu.captured) == 1 and gpu.captured[0].replays == 3


def test_buckets():
    def of(*lengths):
        return Bucket.of(lengths, torch.uint8)

    assert of(1024)[:3] == (1024, 1, 1024)
    assert of(1020, 8)[:3] == (1280, 2, 1024)
    assert of(100, 40, 30)[:3] == (256, 4, 128)
    assert of(4096)[:3] == (4096, 1, 4096) and of(4096, 4) is None and of() is None
    assert of(600)[:3] == (768, 1, 768), "not the next power of two: a segment is at most the batch"
    with kk.use_impl("torch"):
        assert of(8) != Bucket.of([8], torch.float32) and of(8).default_impl == "torch"
    assert of(8).default_impl == "auto"


def test_large_and_empty_batches_run_without_a_graph(gpu):
    model = tiny_model()
    encode(model, (1, 16, 18), times=3)
    assert gpu.captured == []
    found = encode(model, (1, 16, 16), times=3)
    torch.testing.assert_close(found, eager(model, *inputs((1, 16, 16))), **ROUNDING)
    assert len(gpu.captured) == 1
    with torch.no_grad():
        empty = model.get_image_features(torch.empty(0, 3, 14, 14), torch.empty(0, 3, dtype=torch.int64))
    assert empty.shape == (0, 64)


def test_wrong_grids_are_named(gpu):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    pixels, grid_thw = inputs(*GRIDS)
    for wrong, message in ((grid_thw[:2], "describes 80 patches, but 100 patches"), (grid_thw + 1, "must hold positive sizes")):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model.get_image_features(pixels, wrong)
    torch.testing.assert_close(encode(model, *GRIDS), eager(model, *inputs(*GRIDS)), **ROUNDING)


def test_another_default_implementation_gets_another_graph(gpu, monkeypatch):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    monkeypatch.setattr(image_graphs, "default_impl", lambda: "triton")
    encode(model, *GRIDS, times=2)
    assert len(gpu.captured) == 2


def test_other_precisions_of_matmuls_get_other_graphs(gpu):
    model, before = tiny_model(), torch.get_float32_matmul_precision()
    encode(model, *GRIDS, times=2)
    try:
        torch.set_float32_matmul_precision("high")
        encode(model, *GRIDS, times=2)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(True)
    try:
        encode(model, *GRIDS, times=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(gpu.captured) == 3
    encode(model, *GRIDS)
    assert len(gpu.captured) == 3 and gpu.captured[0].replays == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("other", [torch.no_grad, torch.inference_mode])
def test_graphs_serve_no_grad_and_inference_mode(gpu, mode, other):
    model = tiny_model()
    pixels, grid_thw = inputs(*GRIDS)
    for context in (mode, mode, other, mode):
        with context():
            found = model.get_image_features(pixels, grid_thw)
    torch.testing.assert_close(found, eager(model, pixels, grid_thw), **ROUNDING)
    assert len(gpu.captured) == 1


def test_cuda_graphs_can_be_turned_off_at_any_time(gpu):
    with pytest.raises(TypeError, match="cuda_graphs must be True or False, got 1"):
        kk.Keye(tiny_model().config, cuda_graphs=1)
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    model.cuda_graphs = False
    encode(model, *GRIDS)
    assert gpu.captured[0].replays == 1
    assert not kk.Keye(model.config, cuda_graphs=False).cuda_graphs


def test_a_failed_capture_is_logged_once_and_not_tried_again(gpu, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model()
    with monkeypatch.context() as context:
        context.setattr(graphs, "capture", fail)
        found = [encode(model, *GRIDS) for _ in range(4)]
    for features in found:
        torch.testing.assert_close(features, eager(model, *inputs(*GRIDS)), **ROUNDING)
    assert caplog.text.count("images are encoded without CUDA graphs") == 1 and "operation not permitted" in caplog.text
    assert model.visual.graphs.memory() == (0, 0)
    encode(model, *GRIDS, times=3)
    assert gpu.captured == []
    model.visual.graphs.clear()
    encode(model, *GRIDS, times=3)
    assert len(gpu.captured) == 1


def test_errors_of_the_model_are_not_failures_of_a_capture(gpu, monkeypatch):
    model = tiny_model()

    def fail(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as context:
        context.setattr(type(model.mlp_AR), "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            encode(model, *GRIDS)
    encode(model, *GRIDS, times=3)
    assert len(gpu.captured) == 1


def test_a_bucket_whose_first_call_failed_is_not_captured_next(gpu, monkeypatch):
    """A capture needs compiled kernels, which a call that ran out of memory may not have compiled."""
    model, forward, is_full = tiny_model(), image_graphs._ImageEntry.forward, [True]

    def run_out_of_memory_once(entry):
        if is_full.pop() if is_full else False:
            raise torch.cuda.OutOfMemoryError
        return forward(entry)

    monkeypatch.setattr(image_graphs._ImageEntry, "forward", run_out_of_memory_once)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        encode(model, *GRIDS)
    encode(model, *GRIDS)
    assert gpu.captured == []
    encode(model, *GRIDS)
    assert len(gpu.captured) == 1


def test_memory_is_freed_after_the_last_graph_has_run(gpu, monkeypatch):
    """Another stream may still run it, and the allocator gives freed memory to the stream of its allocation at once."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    model = tiny_model()
    encode(model, (1, 2, 2))
    model.visual.graphs.clear()
    assert gpu.stream.events == ["record", "synchronize"]
    encode(model, (1, 2, 2))
    encode(model, (1, 8, 10))
    assert gpu.stream.events[2:] == ["wait", "record", "synchronize", "wait", "record"]
    replaced(model)
    encode(model, (1, 8, 10))
    assert gpu.stream.events[7] == "synchronize"


def test_the_least_recently_used_graph_is_freed(gpu, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model = tiny_model()
    first, second, third = [(1, 2, 2)], [(1, 8, 10)], [(1, 16, 16)]
    for grids in (first, second):
        encode(model, *grids, times=2)
    encode(model, *first)
    encode(model, *third, times=2)
    assert model.visual.graphs.memory().captured == 2 and len(gpu.captured) == 3
    replays = gpu.captured[0].replays
    encode(model, *first)
    assert len(gpu.captured) == 3 and gpu.captured[0].replays == replays + 1
    encode(model, *second, times=2)
    assert len(gpu.captured) == 4


def test_all_graphs_share_one_pool_and_report_their_memory(gpu):
    model = tiny_model()
    for grids in ([(1, 2, 2)], [(1, 8, 10)]):
        encode(model, *grids, times=2)
    assert len(gpu.pools) == 2 and gpu.pools[0] is gpu.pools[1] is not None
    input_bytes = (64 + 128) * (588 * 4 + 48)
    assert model.visual.graphs.memory() == (2, 2000 + input_bytes)


def test_a_batch_on_another_stream_waits_for_the_last_one(gpu):
    model = tiny_model()
    encode(model, *GRIDS, times=3)
    assert gpu.stream.events == ["record", "wait", "record", "wait", "record"]


def test_copies_of_a_model_have_graphs_of_their_own(gpu):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.visual.graphs, ImageGraphs) and other.visual.graphs.memory().captured == 0
        torch.testing.assert_close(encode(other, *GRIDS, times=2), encode(model, *GRIDS), **ROUNDING)


def test_threads_take_turns(gpu):
    model, wrong = tiny_model(), []
    batches = [[(1, 8, 6)], [(1, 6, 8)], [(1, 4, 12)]]
    expected = [eager(model, *inputs(*grids, seed=seed)) for seed, grids in enumerate(batches)]

    def work(seed):
        for _ in range(20):
            found = encode(model, *batches[seed], seed=seed)
            wrong.extend([] if torch.allclose(found, expected[seed], atol=2e-5) else [seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(gpu.captured) == 1


def test_a_prompt_with_an_image_uses_the_graphs(gpu):
    from tests.helpers.tiny import prompt

    model = tiny_model()
    batch = prompt([(1, 4, 6)])
    with torch.no_grad():
        logits = [model(**batch).logits for _ in range(3)]
        model.cuda_graphs = False
        expected = model(**batch).logits
    assert gpu.captured[0].replays == 2
    torch.testing.assert_close(logits[2], expected, atol=1e-4, rtol=1e-4)
