"""`Segments` and the tile schedule of the attention kernel: exact entries, and the cache of schedules."""

import pytest
import torch

from keye_kernels.segments import PaddedSegments, Segments, cumulative_lengths, tile_schedule

CPU = torch.device("cpu")


def test_a_schedule_of_full_attention_keeps_the_tiles_of_a_segment_together():
    # Segments of equal length follow each other, each with its tiles in order
    entries = tile_schedule(torch.tensor([2, 7, 17, 27, 28], dtype=torch.int32), 4, False).tolist()
    assert entries == [
        *([7, 10, 0], [7, 10, 4], [7, 10, 8]),
        *([17, 10, 0], [17, 10, 4], [17, 10, 8]),
        *([2, 5, 0], [2, 5, 4]),
        [27, 1, 0],
    ]


def test_a_causal_schedule_starts_the_last_tiles_first():
    entries = tile_schedule(torch.tensor([0, 5, 15], dtype=torch.int32), 4, True).tolist()
    # Keys that each tile attends to: 10, 8, 5, then 4 and 4 in the order of the segments
    assert entries == [[5, 10, 8], [5, 10, 4], [0, 5, 4], [0, 5, 0], [5, 10, 0]]


@pytest.mark.parametrize("causal", [False, True])
def test_a_schedule_is_sorted_by_work_and_ties_keep_their_order(causal):
    lengths = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    offsets = cumulative_lengths(lengths)
    entries = [
        (start, length, first, min(first + 4, length) if causal else length)
        for start, length in zip(offsets.tolist(), lengths, strict=False)
        for first in range(0, length, 4)
    ]
    expected = sorted(entries, key=lambda entry: -entry[3])  # Python's sort is stable
    assert tile_schedule(offsets, 4, causal).tolist() == [list(entry[:3]) for entry in expected]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_a_segment_has_as_many_tiles_as_needed(length, causal):
    schedule = tile_schedule(torch.tensor([0, length], dtype=torch.int32), 64, causal)
    assert sorted(schedule[:, 2].tolist()) == list(range(0, length, 64))


def test_lengths_near_the_largest_int32_do_not_overflow():
    longest, block_m = 2**31 - 1, 2**30
    schedule = tile_schedule(torch.tensor([0, longest], dtype=torch.int32), block_m, True)
    assert schedule.tolist() == [[0, longest, block_m], [0, longest, 0]]
    offsets = cumulative_lengths([2**30, 2**30 - 1])
    assert offsets.tolist() == [0, 2**30, longest] and offsets.dtype == torch.int32


def test_schedules_are_cached_by_tile_height_and_mask():
    segments = Segments.from_lengths([40, 30, 100], CPU)
    keys = [(block_m, causal) for block_m in (16, 64) for causal in (False, True)]
    for block_m, causal in keys * 2:
        expected = tile_schedule(segments.cu_seqlens, block_m, causal)
        assert torch.equal(segments.schedule(block_m, causal), expected)
        assert segments.schedule(block_m, causal) is segments.schedule(block_m, causal)
    other = Segments.from_lengths([100, 70], CPU)
    assert not torch.equal(other.schedule(16, False), segments.schedule(16, False))


def test_a_schedule_is_on_the_device_of_the_offsets():
    segments = Segments.from_lengths([3, 5], torch.device("meta"))
    assert segments.cu_seqlens.device.type == "meta" and segments.schedule(16, False).device.type == "meta"


def test_lengths_and_the_number_of_tokens():
    segments = Segments.from_lengths([3, 0, 9, 5], CPU)
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 12, 17]
    assert (segments.max_seqlen, segments.num_tokens, segments.lengths) == (9, 17, (3, 0, 9, 5))
    assert Segments(segments.cu_seqlens, 9).num_tokens is None
    assert Segments.from_lengths([], CPU).num_tokens == 0
    with torch.device("meta"):  # the default device does not matter
        assert cumulative_lengths([2]).device == CPU and tile_schedule(segments.cu_seqlens, 16, True).device == CPU


@pytest.mark.parametrize("causal", [False, True])
def test_padded_segments_keep_their_tensors(causal):
    segments = PaddedSegments(4, 100, 64, CPU)
    cu_seqlens, schedule = segments.cu_seqlens, segments.schedule(16, causal)
    assert cu_seqlens.tolist() == [0] * 5 and schedule.tolist() == [[0, 0, 0]] * (100 // 16 + 4)
    for lengths in ([50, 3, 40], [64], [], [25, 25, 25, 25]):
        segments.update(lengths)
        expected = Segments.from_lengths([*lengths, *[0] * (4 - len(lengths))], CPU)
        assert torch.equal(cu_seqlens, expected.cu_seqlens) and segments.lengths == expected.lengths
        entries = expected.schedule(16, causal)
        assert torch.equal(schedule[: len(entries)], entries) and not schedule[len(entries) :].any()
        assert segments.cu_seqlens is cu_seqlens and segments.schedule(16, causal) is schedule
        assert (segments.num_tokens, segments.max_seqlen) == (100, 64)


@pytest.mark.parametrize("lengths", [[1] * 5, [64, 37], [65]], ids=str)
def test_segments_that_do_not_fit_are_refused(lengths):
    segments = PaddedSegments(4, 100, 64, CPU)
    with pytest.raises(ValueError, match=r"must be at most 4 segments of up to 64 tokens, 100 in all, got \["):
        segments.update(lengths)
