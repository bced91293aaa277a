"""Kernels run in Triton's interpreter here, which must be chosen before anything imports Triton; two workers share the cores."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
