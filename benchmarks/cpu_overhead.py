"""CPU time of one call of an operator on a GPU, without the GPU: `python -m benchmarks.cpu_overhead`.

A driver without a device takes the place of CUDA: everything runs except the launch itself. Times are CPU times of one thread, as
a ratio to `F.linear` on an 8 x 8 matrix in the same process, since a slow CPU is slow at both. Gradients are off, as in
inference.
Exits with 1 if an operator exceeds MAX_RATIO. Needs Triton, and a process in which nothing has launched a kernel before.
"""

import os
import sys
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch.nn.functional as F

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.ops import implementation, prepared
from keye_kernels.segments import Segments
from tests.helpers import compiling_driver

MAX_RATIO = 12  # 6 to 9 were measured; every call checked and dispatched: 20 to 30
CALLS, REPEATS = 1000, 9
TOKENS, HEADS, HEAD_DIM = 8, 16, 72


def cpu_time(call: Callable[[], object]) -> float:
    """Seconds of CPU time of one call, the least of several repeats."""
    for _ in range(3):  # the first call compiles, the second one prepares the third
        call()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - start) / CALLS)
    return min(times)


def replace_the_gpu() -> None:
    """Lets tensors on the CPU take the path of tensors on a GPU, with launches that do nothing."""
    driver = compiling_driver.install()
    driver.launcher_cls = lambda source, metadata: lambda *arguments, **options: None
    implementation._require_triton = lambda *_: None
    implementation.kernel_dtype = lambda x: x.dtype
    prepared.DEVICE_TYPES = ("cuda", "cpu")


def operator_calls() -> dict[str, Callable[[], object]]:
    device = torch.device("cpu")
    q, k, v = torch.randn(TOKENS, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16).unbind(1)
    segments = Segments.from_lengths([TOKENS], device)
    row_column, inv_freq = torch.zeros(2, TOKENS, dtype=torch.int32), torch.ones(HEAD_DIM // 4)
    text_q, text_k, text_v = torch.randn(TOKENS, 48, 128, dtype=torch.bfloat16).split((32, 8, 8), dim=1)
    caches, slots = torch.zeros(2, 1, 64, 8, 128, dtype=torch.bfloat16).unbind(0), torch.arange(TOKENS)
    text_queries, valid = text_q.contiguous(), torch.ones(1, 64, dtype=torch.bool)
    positions, text_freq = torch.zeros(3, TOKENS, dtype=torch.int64), torch.ones(64)
    norms = {"q_norm_weight": torch.ones(128, dtype=torch.bfloat16), "k_norm_weight": torch.ones(128, dtype=torch.bfloat16)}
    batch = VisionBatch.build(torch.tensor([(1, 2, TOKENS // 2)]), TOKENS, table_side=27)
    x, table = torch.zeros(TOKENS, 1152, dtype=torch.bfloat16), torch.zeros(27**2, 1152, dtype=torch.bfloat16)
    residual, weight = x.clone(), torch.ones(1152, dtype=torch.bfloat16)
    few_columns = torch.zeros(64, 1152, dtype=torch.bfloat16)
    return {
        "position_embedding_2d": lambda: ops.position_embedding_2d(x, table, batch, impl="triton"),
        "add_norm": lambda: ops.add_norm(x, residual, weight, weight, impl="triton"),
        "silu_mul": lambda: ops.silu_mul(x, residual, impl="triton"),
        "linear_few_rows": lambda: ops.linear_few_rows(x[:1], few_columns, impl="triton"),
        "rope_2d": lambda: ops.rope_2d(q, k, row_column, inv_freq, impl="triton"),
        "rope_3d": lambda: ops.rope_3d(text_q, text_k, positions, text_freq, [16, 24, 24], **norms, impl="triton"),
        "rope_3d_to_cache": lambda: ops.rope_3d_to_cache(
            text_q, text_k, text_v, positions, text_freq, [16, 24, 24], *caches, slots, **norms, impl="triton"
        ),
        "cache_attention": lambda: ops.cache_attention(text_queries, *caches, valid, slots, impl="triton"),
        "varlen_attention": lambda: ops.varlen_attention(q, k, v, segments, impl="triton"),
        "varlen_attention, offsets": lambda: ops.varlen_attention(q, k, v, segments.cu_seqlens, TOKENS, impl="triton"),
    }


def measure() -> dict[str, float]:
    """CPU time of one call of each operator, as a multiple of that of `F.linear`."""
    replace_the_gpu()
    torch.set_num_threads(1)
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    with torch.no_grad():
        unit = cpu_time(lambda: F.linear(x, weight))
        return {name: cpu_time(call) / unit for name, call in operator_calls().items()}


def main() -> int:
    print("CPU time of a call / F.linear")
    ratios = measure()
    for name, ratio in ratios.items():
        print(f"{name:28s}{ratio:6.1f}")
    return 1 if max(ratios.values()) > MAX_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
