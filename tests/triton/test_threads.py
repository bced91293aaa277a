"""Launches, compilation and tables in several threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from triton import knobs

import keye_kernels as kk
from keye_kernels.triton.launch import compile_steps
from keye_kernels.triton.launch_config import write_atomically


def test_threads_launch_kernels_at_the_same_time():
    def attend(tokens):
        q = torch.randn(tokens, 2, 16, generator=torch.Generator().manual_seed(tokens))
        return kk.ops.varlen_attention(q, q, q, torch.tensor([0, 3, tokens], dtype=torch.int32), tokens, impl="triton")

    sizes = [8, 20, 40] * 8
    expected = {tokens: attend(tokens) for tokens in set(sizes)}
    with ThreadPoolExecutor(8) as pool:
        for tokens, found in zip(sizes, pool.map(attend, sizes), strict=True):
            assert torch.equal(found, expected[tokens])


def test_threads_that_compile_restore_the_listener():
    before = knobs.compilation.listener
    second_started, first_ended = threading.Event(), threading.Event()

    def compile_first():
        compile_steps([lambda: second_started.wait(0.5)], print)
        first_ended.set()

    def compile_second():
        second_started.set()
        first_ended.wait(2)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(compile_first)
        pool.submit(compile_steps, [compile_second], print).result()
    assert knobs.compilation.listener is before


def test_threads_replace_the_same_file(tmp_path):
    texts = [str(index) * 10_000 for index in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_atomically(tmp_path / "table.json", text), texts))
    assert (tmp_path / "table.json").read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
