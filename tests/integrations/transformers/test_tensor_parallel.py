"""Tensor parallelism with two CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[3]


def test_two_ranks_match_the_golden_tokens():
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has no DistributedConfig")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, "--module", "tests.helpers.tensor_parallel"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("golden tokens") == 2
