"""The cache of compiled kernels: launches run the specialization that the JIT chooses, and call the JIT once for each.

A subprocess compiles for an H100 with a driver that records launches. No GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLS = """
import json, sys
import torch
from tests.helpers.compiling_driver import install

launches = install().launches
from keye_kernels.segments import tile_schedule
from keye_kernels.triton import launch, rope, varlen_attention

kernels = [rope._kernel, varlen_attention._kernel]
jit_calls = []
for kernel in kernels:
    run = kernel.function.run
    kernel.function.run = lambda *args, run=run, **kwargs: jit_calls.append(1) or run(*args, **kwargs)

def inputs(dtype, tokens=40, first=0, head_dim=72):
    wide = torch.randn(tokens, 3, 2, head_dim + 8, dtype=dtype)[..., first : first + head_dim]
    return wide.unbind(1)

def rotate(dtype=torch.bfloat16, positions=torch.int32, **options):
    q, k, v = inputs(dtype, **options)
    tensors = q, k, torch.zeros(2, len(q), dtype=positions), torch.ones(18)
    return lambda: rope.rope(*tensors, [18, 18]), rope.prepare(*tensors, [18, 18]), tensors

def attend(dtype=torch.bfloat16, lse=False, use_tma=False, scheduled=True, **options):
    q, k, v = inputs(dtype, **options)
    offsets = torch.tensor([0, len(q)], dtype=torch.int32)
    schedule = tile_schedule(offsets, 64, False) if scheduled else None
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "use_tma": use_tma, "backend": "triton"}
    options = len(q), 0.1, False, lse, schedule
    run = varlen_attention.prepare(q, k, v, offsets, *options, config=config)
    return lambda: varlen_attention.varlen_attention(q, k, v, offsets, *options, config=config), run, (q, k, v, offsets)

def launch_both(call):
    # The hash that was launched, the hash that the JIT chooses, whether the JIT was called, whether the arguments are the same
    before = len(jit_calls)
    call()
    hash_, grid, arguments = launches[-1]
    jit_called = len(jit_calls) > before
    for kernel in kernels:
        kernel.uses_cache = False
    call()
    for kernel in kernels:
        kernel.uses_cache = True
    return hash_, launches[-1][0], jit_called, is_same(launches[-2], launches[-1])

def is_same(launch, other):
    _, grid, arguments = launch
    _, chosen_grid, chosen_arguments = other
    same = len(arguments) == len(chosen_arguments) and grid == chosen_grid
    for one, other in zip(arguments, chosen_arguments):
        tensors = isinstance(one, torch.Tensor)
        same &= (one.shape, one.dtype) == (other.shape, other.dtype) if tensors else type(one) is type(other)
        same &= tensors or "Descriptor" in type(one).__name__ or one == other
    return bool(same)

def launch_prepared(call, run, tensors):
    # Prepared for these tensors, run twice on them, then on tensors of another alignment
    call()
    expected, before = launches[-1], len(jit_calls)
    results = []
    for _ in range(2):
        run(*tensors)
        results.append((launches[-1][0] == expected[0] and is_same(launches[-1], expected)))
    skips_jit = len(jit_calls) == before
    return [*results, skips_jit]

def launch_misaligned():
    # The same metadata, but other alignments than in the call before
    _, run, (q, *others) = rotate()
    moved = torch.zeros(q.storage().size() + 1, dtype=q.dtype)[1:].as_strided(q.shape, q.stride())
    hashes = []
    for x in (q, moved, q, moved):
        run(x, *others)
        hashes.append(launches[-1][0])
    return hashes

calls = [
    rotate(), rotate(tokens=41), rotate(torch.float16), rotate(first=1), rotate(positions=torch.int64), rotate(head_dim=40),
    attend(), attend(tokens=2000), attend(lse=True), attend(first=1), attend(torch.float16), attend(use_tma=True),
    attend(scheduled=False), attend(scheduled=False, tokens=2000),
]
with torch.inference_mode():
    first, again = [launch_both(call) for call, *_ in calls], [launch_both(call) for call, *_ in calls]
    prepared = [launch_prepared(*call) for call in calls]
    misaligned = launch_misaligned()
    before = len(launches)
    with launch.compile_only():
        for call, run, tensors in calls:
            call()
            run(*tensors)
print(json.dumps([first, again, prepared, misaligned, len(launches) - before]))
"""
# Calls that differ from the call before them in the number of tokens only
SAME_SPECIALIZATION = (1, 7, 13)


def test_launches_run_the_specialization_that_the_jit_chooses(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", CALLS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    first, again, prepared, misaligned, compile_only_launches = json.loads(run.stdout)
    assert all(launched == chosen and same for launched, chosen, _, same in [*first, *again])
    assert [index for index, call in enumerate(first) if not call[2]] == list(SAME_SPECIALIZATION)
    assert not any(jit_called for _, _, jit_called, _ in again)
    hashes = [launched for launched, *_ in first]
    assert hashes == [launched for launched, *_ in again]
    assert all(hashes[index] == hashes[index - 1] for index in SAME_SPECIALIZATION)
    assert len(set(hashes)) == len(hashes) - len(SAME_SPECIALIZATION)
    assert all(all(results) for results in prepared), prepared
    aligned, moved = misaligned[:2]
    assert misaligned == [aligned, moved, aligned, moved] and aligned != moved
    assert compile_only_launches == 0
