"""Tests on a GPU: golden numbers with compiled kernels, torch.compile, synchronization, CUDA graphs, warm-up and autotune.

`keye-kernels verify` checks the operators. Run with: TRITON_INTERPRET=0 pytest tests/gpu -n 0
"""

import os
import warnings

import pytest
import torch

import keye_kernels as kk
from keye_kernels import reference
from keye_kernels.model.cache import KVCache
from keye_kernels.processing.batch import BatchFeature
from keye_kernels.tools.autotune.candidates import candidates
from keye_kernels.tools.autotune.checking import Checker
from keye_kernels.tools.autotune.sweep import on_this_gpu, sweep
from keye_kernels.triton import launch_config
from keye_kernels.triton.device import device_arch
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TORCH_DTYPES, TuningShape
from tests.helpers.golden import CASES, LOGITS_TOLERANCE, golden, load_case, token_mask
from tests.helpers.tiny import prompt, tiny_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU and compiled kernels (TRITON_INTERPRET=0)",
)
CUDA = torch.device("cuda")


def on_gpu(inputs):
    return {name: value if name.endswith("grid_thw") else value.to(CUDA) for name, value in inputs.items()}


@pytest.mark.parametrize(("edition", "name"), CASES)
def test_logits_and_tokens_match_the_official_code(edition, name):
    inputs, outputs = load_case(edition, name)
    model = kk.Keye.from_pretrained(golden(edition), dtype=torch.float32, device=CUDA, impl="triton")
    mask, inputs = token_mask(inputs), on_gpu(inputs)
    with torch.no_grad():
        found = model(**inputs).logits.cpu()
    torch.testing.assert_close(found[mask], outputs["logits"][mask], atol=LOGITS_TOLERANCE[edition], rtol=0)
    length, steps = inputs["input_ids"].shape[1], outputs["generated"].shape[1]
    for prompt_lookup in (None,) if len(mask) > 1 else (None, 1, 7):
        options = {"max_new_tokens": steps, "eos_token_id": (), "prompt_lookup": prompt_lookup}
        assert torch.equal(model.generate(**inputs, **options)[:, length:].cpu(), outputs["generated"])


@pytest.mark.parametrize(
    ("kernel", "part"),
    [("varlen_attention", "vision"), ("varlen_attention", "text"), ("linear", "linear_1"), ("linear", "linear_2")],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_backend_of_a_kernel_matches_the_reference(kernel, part, dtype):
    """With pointers and, on GPUs that have TMA, with tensor descriptors."""
    shape, arch = TuningShape(kernel, part, 3, 300), device_arch(CUDA)
    problem = kernel_spec(kernel).tuning_problem(shape, dtype, CUDA, reference)
    checker = Checker(problem, TORCH_DTYPES[dtype])
    heuristic, *others = candidates(shape, dtype, arch)
    config = heuristic | {"num_warps": 4, "num_stages": 2, "BLOCK_M": 64, "BLOCK_N": 64}
    for backend in sorted({c["backend"] for c in (heuristic, *others)}):
        for use_tma in (False, True) if arch.has_tma else (False,):
            assert checker.error(config | {"backend": backend, "use_tma": use_tma}) is None, (backend, use_tma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_of_the_whole_forward_gives_the_same_logits(dtype):
    torch._dynamo.reset()
    model = tiny_model().to(CUDA, dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        for seed, grids in enumerate([[(1, 4, 6)], [(1, 8, 2)]]):
            inputs = on_gpu(prompt(grids, seed=seed))
            expected, found = model(**inputs), compiled(**inputs)
            torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
            token = expected.logits[:, -1:].argmax(-1)
            after, after_found = model(token, cache=expected.cache), compiled(token, cache=found.cache)
            torch.testing.assert_close(after_found.logits, after.logits, atol=tolerance, rtol=tolerance)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_synchronizations_of_a_prompt_do_not_grow_with_the_layers(mode):
    """The host reads the token ids and the segment offsets of decoder and tower once per forward."""
    model, inputs = tiny_model(num_hidden_layers=6).to(CUDA), on_gpu(prompt([(1, 4, 6)]))
    with mode():
        model(**inputs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    synchronizations = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(synchronizations) <= 6, synchronizations


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_images_are_copied_and_encoded_without_synchronization(cuda_graphs):
    model = tiny_model().to(CUDA)
    model.cuda_graphs = cuda_graphs
    pixels = torch.randint(0, 256, (56, 3, 14, 14), dtype=torch.uint8)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]])}

    def encode():
        batch = BatchFeature(inputs).to(CUDA)
        return model.get_image_features(batch.pixel_values, batch.image_grid_thw)

    with torch.no_grad():
        for _ in range(3):
            expected = encode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = encode()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_a_decoding_step_does_not_synchronize():
    model, inputs = tiny_model().to(CUDA), on_gpu(prompt([(1, 4, 6)]))
    with torch.no_grad():
        output = model(**inputs)
        token = output.logits[:, -1:].argmax(-1)
        model(token, cache=output.cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(token, cache=output.cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_and_launched_steps_give_the_same_tokens(monkeypatch, dtype, sampling):
    model = tiny_model().to(CUDA, dtype)
    inputs = {"input_ids": torch.randint(0, 100, (2, 9), device=CUDA)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :3] = 0
    options = {"max_new_tokens": 40, "eos_token_id": (), **sampling}
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    recorded = [model.generate(**inputs, **options) for _ in range(2)]
    # Token 1 comes from the prompt, which is captured the second time, token 2 from a launched step
    assert len(replays) == 2 * 38 + 1
    model.cuda_graphs = False
    expected = model.generate(**inputs, **options)
    assert len(replays) == 2 * 38 + 1 and all(torch.equal(found, expected) for found in recorded)


@pytest.mark.parametrize("num_drafts", [1, 8])
def test_recorded_steps_with_drafts_give_the_tokens_of_greedy_decoding(monkeypatch, num_drafts):
    model, ids = tiny_model().to(CUDA), torch.randint(0, 9, (1, 40), generator=torch.Generator().manual_seed(0)).to(CUDA)
    options = {"max_new_tokens": 60, "eos_token_id": ()}
    model.cuda_graphs = False
    expected = model.generate(ids, **options)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    model.cuda_graphs = True
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options, prompt_lookup=num_drafts), expected)
    assert replays


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "seed": 3, "top_p": 0.9}, {"prompt_lookup": 4}], ids=["greedy", "sampled", "lookup"]
)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_synchronizations_of_a_generation_do_not_grow_with_its_tokens(cuda_graphs, sampling):
    model, ids = tiny_model().to(CUDA), torch.randint(0, 100, (1, 9), device=CUDA)
    model.cuda_graphs = cuda_graphs
    model.generate(ids, max_new_tokens=12, eos_token_id=119, **sampling)
    counts = []
    for tokens in (12, 40):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.generate(ids, max_new_tokens=tokens, eos_token_id=119, **sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in caught))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [torch.float32, torch.uint8])
def test_images_with_cuda_graphs_have_the_same_features(monkeypatch, edition, dtype, pixels):
    """Bit for bit those of the same padded batch, which the first call of a bucket runs without a graph."""
    model = tiny_model(model_type=edition).to(CUDA, dtype)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    first = {}
    for _ in range(3):
        for grids in ([(1, 8, 10)], [(1, 8, 6), (2, 2, 8)], [(3, 4, 4), (1, 2, 2)]):
            grid_thw = torch.tensor(grids)
            patches = (torch.rand(int(grid_thw.prod(1).sum()), 3, 14, 14, device=CUDA) * 255).to(pixels)
            with torch.no_grad():
                model.cuda_graphs = True
                torch.manual_seed(0)
                found = model.get_image_features(patches, grid_thw)
                model.cuda_graphs = False
                expected = model.get_image_features(patches, grid_thw)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
            same = first.setdefault(str(grids), (patches, found))
            with torch.no_grad():
                model.cuda_graphs = True
                assert torch.equal(model.get_image_features(same[0], grid_thw), same[1])
    assert len(replays) > 12 and model.visual.graphs.memory().bytes > 0


def test_a_replay_reads_the_current_values_and_a_moved_model_has_no_graph():
    model = tiny_model().to(CUDA)
    grid_thw = torch.tensor([(1, 8, 10)])
    pixels = torch.randn(80, 3, 14, 14, device=CUDA)
    with torch.no_grad():
        before = [model.get_image_features(pixels, grid_thw) for _ in range(3)][-1]
        for parameter in model.visual.parameters():
            parameter.mul_(1.5)
        found = model.get_image_features(pixels, grid_thw)
        model.cuda_graphs = False
        expected = model.get_image_features(pixels, grid_thw)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, before, atol=1e-2)
        model.cuda_graphs = True
        model.cpu()
        torch.cuda.empty_cache()
        torch.testing.assert_close(model.get_image_features(pixels.cpu(), grid_thw), expected.cpu(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_with_cuda_graphs_have_the_same_logits_and_tokens(dtype):
    model = tiny_model().to(CUDA, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for seed in range(4):
        inputs = on_gpu(prompt([(1, 4, 6)], seed=seed))
        model.cuda_graphs = True
        with torch.no_grad():
            found = model(**inputs)
        tokens = model.generate(**inputs, max_new_tokens=12, eos_token_id=())
        model.cuda_graphs = False
        with torch.no_grad():
            expected = model(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
        if dtype == torch.float32:
            assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=12, eos_token_id=()))
    assert model.model.graphs.memory().captured == 1 and model.visual.graphs.memory().captured == 1


def test_images_that_cannot_be_captured_are_encoded_without_a_graph(monkeypatch, caplog):
    model = tiny_model().to(CUDA)
    grid_thw, pixels = torch.tensor([(1, 8, 10)]), torch.randn(80, 3, 14, 14, device=CUDA)
    norm = type(model.visual.post_layernorm).forward
    # Not a change of the model between two calls: the forward waits for the GPU, which a capture does not allow
    monkeypatch.setattr(type(model.visual.post_layernorm), "forward", lambda m, x: norm(m, x + 0 * x.sum().item()))
    with torch.no_grad():
        features = [model.get_image_features(pixels, grid_thw) for _ in range(4)]
    assert caplog.text.count("could not be captured") == 1
    for other in features[1:]:
        torch.testing.assert_close(other, features[0], atol=1e-5, rtol=1e-5)
    check_that_torch_works_after_a_failed_capture()


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "seed": 3}, {"do_sample": True}], ids=["greedy", "seeded", "random"]
)
def test_a_step_that_cannot_be_recorded_is_launched_and_logged(monkeypatch, caplog, sampling):
    model, inputs = tiny_model().to(CUDA), on_gpu(prompt([]))
    options = {"max_new_tokens": 12, "eos_token_id": (), **sampling}
    torch.manual_seed(0)
    expected = model.generate(**inputs, **options)
    advance = KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda cache, *rest: cache.length.item() * 0 or advance(cache, *rest))
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert caplog.text.count("could not be recorded") == 1
    check_that_torch_works_after_a_failed_capture()
    # Another model still records its steps
    monkeypatch.undo()
    assert tiny_model().to(CUDA).generate(**inputs, **options).shape == expected.shape
    assert caplog.text.count("could not be recorded") == 1


def check_that_torch_works_after_a_failed_capture():
    """Allocating, freeing across streams and returning memory to the driver; random numbers; a new capture."""
    side = torch.cuda.Stream()
    x = torch.randn(1 << 20, device=CUDA)
    with torch.cuda.stream(side):
        x.record_stream(side)
    before = torch.cuda.memory_allocated()
    del x
    torch.cuda.synchronize()
    assert torch.ones(1000, device=CUDA).sum() == 1000
    assert torch.cuda.memory_allocated() <= before - (4 << 20)
    torch.cuda.empty_cache()
    graph, y = torch.cuda.CUDAGraph(), torch.zeros(4, device=CUDA)
    with torch.cuda.graph(graph):
        y.add_(1)
    graph.replay()
    assert y.sum() == 4 and torch.rand(4, device=CUDA).max() < 1


def test_warmup_leaves_nothing_to_compile():
    from triton import knobs

    model = tiny_model().to(CUDA, torch.bfloat16)
    report = kk.warmup(model, grids=[(1, 8, 10)], prompt_lengths=[40])
    assert report.compiled + report.cached > 0 and report.note == f"2 sizes on {model.device}"
    compilations = []
    before, knobs.compilation.listener = knobs.compilation.listener, lambda **event: compilations.append(event)
    try:
        with torch.no_grad():
            model(**on_gpu(prompt([(1, 8, 10)], lead=15)))
    finally:
        knobs.compilation.listener = before
    assert compilations == []


def test_autotune_times_configs_and_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(tmp_path))
    outcome = sweep(on_this_gpu(), [TuningShape("rope", "vision", 1, 1024)], "bf16", tmp_path)
    [entry] = outcome.entries["rope"]
    assert entry["median_us"] > 0 and outcome.path.is_file()
    launch_config.clear_cache()


def test_the_transformers_model_generates_the_official_tokens():
    reason = "transformers is not installed: pip install -e '.[transformers]'"
    transformers = pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("keye_kernels.auto")  # registers the Auto classes

    inputs, outputs = load_case("preview", "b_two_images")
    inputs, tokens = on_gpu(inputs), outputs["generated"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(golden("preview"), dtype=torch.float32).to(CUDA)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens.shape[1]}
    found = model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found.cpu(), tokens)
