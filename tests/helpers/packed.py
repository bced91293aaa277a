"""Inputs of packed attention for tests."""

import torch


def offsets(lengths):
    """cu_seqlens of segments of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths, head_dim=72, heads=2, key_heads=None, dtype=torch.float16, extra=0, seed=0):
    """q, k, v and cu_seqlens of segments of these lengths, followed by `extra` tokens of no segment."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths) + extra, count, head_dim) for count in (heads, key_heads or heads, key_heads or heads)]
    return *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), offsets(lengths)


def assert_same_bits(one, other):
    """Compares two sequences of floating-point tensors bit by bit; NaN equals NaN."""
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
        assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
