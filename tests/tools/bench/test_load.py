"""The numbers of `bench --load`, computed again from the requests or with a clock and a model that are known."""

import statistics
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.model import KeyeConfig
from keye_kernels.small import small_processor
from keye_kernels.tools.bench import load
from keye_kernels.tools.bench.flops import estimate_flops

CONFIG = KeyeConfig()


def test_a_request_has_its_text_its_vision_tokens_and_two_markers_per_image_or_clip():
    request = load.Request(((1, 4, 6), (1, 8, 8)), text_tokens=10, new_tokens=5)
    assert request.prompt_tokens == 10 + 6 + 2 + 16 + 2 and not request.is_clip
    assert request.flops(CONFIG) == estimate_flops(CONFIG, request.grids, request.prompt_tokens, 5).total
    assert load.Request(((4, 4, 6),), 10, 5).is_clip
    # As a processor counts them, apart from the text
    processor = small_processor(min_pixels=28 * 28, max_pixels=(28 * 12) ** 2)
    for drawn in load.draw_requests(load.SMALL, 8, seed=1):
        inputs = load._prepare(processor, [drawn], load.draw_pixels([drawn], 0))
        text = len(processor.tokenizer.encode("what is in the picture? " * max(1, drawn.text_tokens // 6)))
        assert inputs["input_ids"].shape[1] - text == drawn.prompt_tokens - drawn.text_tokens


def test_drawn_requests_stay_within_their_ranges():
    mix = load.RequestMix((2, 12), (1, 3), (2, 5), (2, 8), (4, 24), new_tokens=8)
    requests = load.draw_requests(mix, 300, seed=0)
    assert load.draw_requests(mix, 10, seed=0) == requests[:10]
    images = [request for request in requests if not request.is_clip]
    clips = [request for request in requests if request.is_clip]
    assert 0.2 < len(clips) / 300 < 0.3
    assert {len(request.grids) for request in images} == {1, 2, 3} and {len(request.grids) for request in clips} == {1}
    assert {side // 2 for request in images for _, *sides in request.grids for side in sides} == set(range(2, 13))
    assert {side // 2 for request in clips for _, *sides in request.grids for side in sides} == set(range(2, 6))
    assert {request.grids[0][0] for request in clips} == {2, 4, 6, 8}
    assert {request.text_tokens for request in requests} == set(range(4, 25)) and {r.new_tokens for r in requests} == {8}


def test_the_simulation_reports_the_slowest_device_of_each_round(monkeypatch):
    monkeypatch.setattr(load, "REQUESTS_PER_DEVICE", 3)
    monkeypatch.setattr(load, "ROUNDS", 4)
    found = load.simulate(CONFIG, devices=2, seed=5)
    requests = load.draw_requests(load.REAL, 24, seed=5)
    costs = [request.flops(CONFIG) for request in requests]
    assert (found["devices"], found["requests"], found["rounds"]) == (2, 24, 4)
    assert found["prompt_tokens"] == sum(request.prompt_tokens for request in requests)
    expected = {"median": statistics.median(costs) / 1e12, "largest": max(costs) / 1e12}
    assert found["tflop_per_request"] == pytest.approx(expected)
    # In the order of arrival: the first three of each round to one device, the others to the other one
    loads = [(sum(costs[start : start + 3]), sum(costs[start + 3 : start + 6])) for start in range(0, 24, 6)]
    time = sum(max(pair) for pair in loads) / (sum(costs) / 2)
    arrival = found["packing"]["order of arrival"]
    assert arrival["imbalance"] == pytest.approx(time - 1)
    assert arrival["share_of_ideal_throughput"] == pytest.approx(1 / time)
    assert arrival["worst_round"] == pytest.approx(max(max(pair) / (sum(pair) / 2) - 1 for pair in loads))
    assert found["packing"]["packed by FLOPs"]["imbalance"] < arrival["imbalance"]


@pytest.fixture
def model(monkeypatch):
    """A model that generates instantly, and a clock that shows the given seconds."""
    times = []
    monkeypatch.setattr(load.time, "perf_counter", lambda: times.pop(0))
    calls = []

    def generate(input_ids, max_new_tokens, eos_token_id, **inputs):
        calls.append((len(input_ids), max_new_tokens, eos_token_id))
        return torch.cat([input_ids, input_ids.new_zeros(len(input_ids), max_new_tokens)], dim=1)

    return SimpleNamespace(device=torch.device("cpu"), config=CONFIG, generate=generate, times=times, calls=calls)


def test_rates_latencies_and_padding_of_a_run(model, monkeypatch):
    requests = load.draw_requests(load.SMALL, 4, seed=2)
    lengths = [5, 9, 4, 4]

    def prepare(processor, chosen, pixels):
        assert pixels == [requests.index(request) for request in chosen]
        sizes = [lengths[index] for index in pixels]
        mask = torch.tensor([[0] * (max(sizes) - size) + [1] * size for size in sizes])
        return SimpleNamespace(to=lambda device: {"input_ids": mask.clone(), "attention_mask": mask})

    monkeypatch.setattr(load, "_prepare", prepare)
    # Start; begin and end of three batches of 2, 3 and 5 seconds; end
    model.times.extend([100, 100, 102, 102, 105, 105, 110, 110])
    found = load.run_batches(model, None, requests, [[0, 1], [2], [3]], [0, 1, 2, 3])
    assert model.calls == [(2, 8, ()), (1, 8, ()), (1, 8, ())]
    assert (found.batches, found.new_tokens_per_second) == (3, 4 * 8 / 10)
    assert found.tokens_per_second == (5 + 9 + 4 + 4 + 4 * 8) / 10
    finished = [2, 2, 5, 10]
    assert found.latency_p50 == pytest.approx(np.percentile(finished, 50)) == 3.5
    assert found.latency_p95 == pytest.approx(np.percentile(finished, 95)) == 9.25
    assert found.padding == 4 / (9 + 9 + 4 + 4)
    assert found.imbalance_measured == pytest.approx(5 / (10 / 3) - 1)
    costs = [requests[0].flops(CONFIG) + requests[1].flops(CONFIG), *(request.flops(CONFIG) for request in requests[2:])]
    assert found.imbalance_estimated == pytest.approx(max(costs) / (sum(costs) / 3) - 1)


@pytest.fixture
def small(monkeypatch):
    """Records the runs of `measure`; no model is loaded."""
    runs = []

    def run(model, processor, requests, batches, pixels):
        runs.append((requests, batches))
        return load.LoadResult(len(batches), 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(load, "run_batches", run)
    monkeypatch.setattr(load, "small_model", lambda dtype: SimpleNamespace(config=CONFIG, device=torch.device("cpu")))
    return runs


def test_each_packer_runs_all_requests_after_a_warm_up(small):
    found = load.measure(20, seed=3)
    (_, warm_up), (requests, packed), (same, arrival) = small
    assert warm_up == [[0]] and requests is same and requests == load.draw_requests(load.SMALL, 20, seed=3)
    assert sorted(chain(*packed)) == sorted(chain(*arrival)) == list(range(20)) and len(packed) == len(arrival) == 3
    assert arrival == [list(range(start, end)) for start, end in pairwise((0, 7, 13, 20))]
    assert (found["requests"], found["device"], list(found["packing"])) == (20, "cpu", ["packed by FLOPs", "order of arrival"])
    small.clear()
    load.measure(1, seed=3)
    assert [batches for _, batches in small] == [[[0]]] * 3


def test_the_options_of_the_command_reach_both_parts(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(load, "measure", lambda *arguments: calls.append(arguments) or {})
    monkeypatch.setattr(load, "simulate", lambda config, *arguments: calls.append(arguments) or {})
    assert main(["bench", "--load", "--json", "--requests", "5", "--devices", "3", "--seed", "7"]) == 0
    assert main(["bench", "--load", "--json"]) == 0
    assert calls == [(3, 7), (5, 7), (8, 0), (48, 0)]
