"""Memory of the eager implementations on a CPU: temporary tensors that fit in its cache, and large pages for outputs.

The results are bitwise those of `keye_kernels.reference` for the whole tensor, because each token is computed by itself.
"""

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from keye_kernels import reference

# Of one temporary tensor and thread: small enough for the caches, and large enough that threads seldom wait for each other
BYTES_PER_CHUNK_AND_THREAD = 4 << 20
HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14  # the value on Linux for every architecture that torch supports


def rope(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: list[int],
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, eps: float, conjugate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.rope`, in chunks of tokens."""
    tables = reference.rotation_tables(position_ids, inv_freq, sections, reference.compute_dtype(q), conjugate)
    q_out, k_out = _output(q), _output(k)
    for x, weight, out in ((q, q_norm_weight, q_out), (k, k_norm_weight, k_out)):
        for part, cos, sin, target in _chunks(x, *tables, out):
            x_norm = reference.rms_norm(part, weight, eps)
            if x_norm.dtype == cos.dtype == out.dtype:
                reference.rotate(x_norm, cos, sin, out=target)
            else:
                target.copy_(reference.rotate(x_norm, cos, sin))
    return q_out, k_out


def position_embedding_2d(features: Tensor, table: Tensor, corner_index: Tensor, corner_weight: Tensor) -> Tensor:
    """`reference.position_embedding_2d`, in chunks of patches."""
    out = _output(features)
    for part, index, weight, target in _chunks(features, corner_index, corner_weight, out):
        target.copy_(reference.position_embedding_2d(part, table, index, weight))
    return out


def prefer_huge_pages(x: Tensor) -> None:
    """Asks Linux for 2 MB pages for an uninitialized CPU tensor: the first write is three times as fast. This is only a hint."""
    start = -(-x.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (x.data_ptr() + x.nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if sys.platform == "linux" and x.device.type == "cpu" and length > 0:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _output(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    prefer_huge_pages(out)
    return out


def _chunks(x: Tensor, *others: Tensor) -> zip:
    """Chunks along the first axis, for which the compute dtype of `x` takes BYTES_PER_CHUNK_AND_THREAD in each thread."""
    bytes_per_token = max(1, x.shape[1:].numel()) * reference.compute_dtype(x).itemsize
    size = max(1, BYTES_PER_CHUNK_AND_THREAD * torch.get_num_threads() // bytes_per_token)
    return zip(*(tensor.split(size) for tensor in (x, *others)), strict=True)
