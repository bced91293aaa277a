"""Packing of requests by cost, and the command that measures it."""

import itertools
import json
import random

import pytest

from keye_kernels.cli import main
from keye_kernels.model import KeyeConfig
from keye_kernels.small import small_model, small_processor
from keye_kernels.tools.bench import load
from keye_kernels.tools.bench.packing import imbalance, pack_in_arrival_order, pack_longest_first

SMALL_COSTS = [random.Random(seed).choices(range(1, 30), k=7) for seed in range(20)]


@pytest.mark.parametrize("pack", [pack_longest_first, pack_in_arrival_order])
def test_every_request_is_packed_once(pack):
    for bins in (1, 3, 9):
        packed = pack([5, 1, 1, 8, 2, 2, 3], bins)
        assert len(packed) == bins and sorted(itertools.chain(*packed)) == list(range(7))


@pytest.mark.parametrize("costs", SMALL_COSTS, ids=str)
def test_longest_first_satisfies_grahams_bound(costs):
    bins = 3
    best = min(
        max(sum(c for c, bin_ in zip(costs, bin_of, strict=True) if bin_ == b) for b in range(bins))
        for bin_of in itertools.product(range(bins), repeat=len(costs))
    )
    found = max(sum(costs[i] for i in indices) for indices in pack_longest_first(costs, bins))
    assert best <= found <= best * (4 / 3 - 1 / (3 * bins))


def test_one_expensive_request_gets_its_own_device():
    assert [0] in pack_longest_first([100, 3, 4, 5, 6], 2)


def test_arrival_order_gives_each_device_the_same_number_of_requests():
    assert pack_in_arrival_order([9, 9, 1, 1, 1, 1], 3) == [[0, 1], [2, 3], [4, 5]]


def test_imbalance_is_the_largest_load_over_the_mean_minus_one():
    assert imbalance([2, 2, 2]) == 0 and imbalance([3, 2, 1]) == pytest.approx(0.5) and imbalance([0, 0]) == 0


@pytest.mark.parametrize("arguments, message", [(([1], 0), "bins must be at least 1"), (([1, -1], 1), "costs must not")])
def test_invalid_packing_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_longest_first(*arguments)


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
@pytest.mark.parametrize("seed", [0, 1])
def test_packing_by_flops_balances_eight_devices_within_three_percent(edition, seed):
    found = load.simulate(KeyeConfig(model_type=edition), 8, seed)["packing"]
    assert found["packed by FLOPs"]["imbalance"] <= found["packed by FLOPs"]["worst_round"] <= 0.03
    assert found["order of arrival"]["imbalance"] > 0.1


def test_requests_are_mixed_and_reproducible():
    requests = load.draw_requests(load.REAL, 200, seed=0)
    assert requests == load.draw_requests(load.REAL, 200, seed=0) != load.draw_requests(load.REAL, 200, seed=1)
    assert 20 < sum(request.is_clip for request in requests) < 80
    assert len({request.grids for request in requests}) > 190


def test_zero_devices_are_an_error():
    with pytest.raises(ValueError, match="devices must be at least 1"):
        load.simulate(KeyeConfig(), 0, 0)


def test_prompts_have_the_drawn_images_and_clips():
    processor = small_processor(min_pixels=28 * 28, max_pixels=(28 * load.SMALL.image_side[1]) ** 2)
    requests = load.draw_requests(load.SMALL, 6, seed=0)
    inputs = load._prepare(processor, requests, load.draw_pixels(requests, 0))
    drawn = {kind: [g for r in requests for g in r.grids if r.is_clip == kind] for kind in (False, True)}
    for name, kind in (("image_grid_thw", False), ("video_grid_thw", True)):
        assert [tuple(row) for row in inputs[name].tolist()] == drawn[kind]


def test_load_result_counts_every_token():
    model = small_model(dtype="float32")
    processor = small_processor(min_pixels=28 * 28, max_pixels=(28 * load.SMALL.image_side[1]) ** 2)
    requests = load.draw_requests(load.SMALL, 3, seed=3)
    pixels = load.draw_pixels(requests, 0)
    found = load.run_batches(model, processor, requests, [[0, 2], [1]], pixels)
    assert found.batches == 2 and 0 < found.padding < 1
    assert 0 < found.latency_p50 < found.latency_p95
    # Both rates are over the same time
    lengths = load._prepare(processor, requests, pixels)["attention_mask"].sum().item()
    generated = 3 * load.SMALL.new_tokens
    assert found.tokens_per_second / found.new_tokens_per_second == pytest.approx((lengths + generated) / generated)


def test_command_reports_both_packers(capsys):
    assert main(["bench", "--load", "--requests", "2", "--devices", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"]["devices"] == 2 and found["measured"]["requests"] == 2
    for part in found.values():
        assert part["packing"].keys() == {"packed by FLOPs", "order of arrival"}
