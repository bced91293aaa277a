"""Launching past the JIT: the variant that is launched is the one that the JIT would choose, and it is asked once for each.

Without a GPU the compiler is real (for an H100, through a driver that only says so), and a launch only notes what it was given.
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
from keye_kernels.triton import launch, rope, varlen_attention

asked = []
for module, name in ((rope, "rope_kernel"), (varlen_attention, "varlen_attention_fwd_kernel")):
    function = getattr(module, name)
    run = function.run
    function.run = lambda *args, run=run, **kwargs: asked.append(1) or run(*args, **kwargs)

def inputs(dtype, tokens=40, first=0, head_dim=72):
    wide = torch.randn(tokens, 3, 2, head_dim + 8, dtype=dtype)[..., first : first + head_dim]
    return wide.unbind(1)

def turn(dtype=torch.bfloat16, positions=torch.int32, **options):
    q, k, v = inputs(dtype, **options)
    ids = torch.zeros(2, len(q), dtype=positions)
    return lambda: rope.rope(q, k, ids, torch.ones(18), [18, 18])

def attend(dtype=torch.bfloat16, lse=False, loads="pointers", **options):
    q, k, v = inputs(dtype, **options)
    offsets = torch.tensor([0, len(q)], dtype=torch.int32)
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "loads": loads, "path": "triton"}
    return lambda: varlen_attention.varlen_attention(q, k, v, offsets, len(q), 0.1, False, lse, tile)

def both(call):
    # The hash that was launched, that of the JIT's choice, whether the JIT was asked, and what the kernel was given
    before = len(asked)
    call()
    hash_, grid, arguments = launches[-1]
    was_asked = len(asked) > before
    remembers, count = {}, len(launches)
    for kernel in (rope._launch, varlen_attention._launch):
        remembers[kernel], kernel.remembers = kernel.remembers, False
    call()
    for kernel, value in remembers.items():
        kernel.remembers = value
    chosen, chosen_grid, chosen_arguments = launches[-1]
    same = len(arguments) == len(chosen_arguments) and grid == chosen_grid
    for one, other in zip(arguments, chosen_arguments):
        tensors = isinstance(one, torch.Tensor)
        same &= (one.shape, one.dtype) == (other.shape, other.dtype) if tensors else type(one) is type(other)
        same &= tensors or "Descriptor" in type(one).__name__ or one == other
    return hash_, chosen, was_asked, bool(same)

variants = [
    turn(), turn(tokens=41), turn(torch.float16), turn(first=1), turn(positions=torch.int64), turn(head_dim=40),
    attend(), attend(tokens=2000), attend(lse=True), attend(first=1), attend(torch.float16), attend(loads="descriptors"),
]
with torch.inference_mode():
    first, again = [both(call) for call in variants], [both(call) for call in variants]
    before = len(launches)
    with launch.compile_only():
        for call in variants:
            call()
print(json.dumps([first, again, len(launches) - before]))
"""


def test_the_variant_launched_is_the_one_that_the_jit_chooses(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", CALLS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    first, again, launched = json.loads(run.stdout)
    assert all(launched == chosen and same for launched, chosen, _, same in [*first, *again])
    # Only the number of tokens differs in the second call of each kernel
    assert [asked for _, _, asked, _ in first] == [True, False, *[True] * 5, False, *[True] * 4]
    assert not any(asked for _, _, asked, _ in again)
    hashes = [launched for launched, *_ in first]
    assert hashes == [launched for launched, *_ in again]
    assert len(set(hashes)) == 10 and hashes[0] == hashes[1] and hashes[6] == hashes[7]
    assert launched == 0
