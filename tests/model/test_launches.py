"""How many kernels a layer launches on a GPU: it runs on fake CUDA tensors, which have no values, and operators are counted.

An operator of this package is one launch (tests/triton counts these), and so is one of torch that is neither a view nor an
allocation. That nothing here fails shows that no layer reads a value of a tensor, for which the CPU would wait for the GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keye_kernels import plain
from keye_kernels.model import fused
from keye_kernels.model.cache import KVCache
from keye_kernels.model.config import KeyeConfig
from keye_kernels.model.decoder import TextBatch, TextLayer
from keye_kernels.model.vision import VisionLayer
from keye_kernels.segments import Segments
from keye_kernels.tools.bench.traffic import ALLOCATIONS
from tests.helpers.tiny import CONFIG

CUDA = torch.device("cuda")
TOKENS = 24


class Launches(TorchDispatchMode):
    """The names of the operators that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and name not in ALLOCATIONS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    # The check of cuBLASLt's epilogue compares values, once per device
    monkeypatch.setattr(fused, "_epilogue_is_tanh", lambda device: True)
    for module in (plain, fused):  # on a GPU these are ordinary tensors
        monkeypatch.setattr(module, "PLAIN_TENSORS", (*plain.PLAIN_TENSORS, FakeTensor))
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: None)  # needs CUDA
    with FakeTensorMode(), torch.no_grad():
        yield


def segments(*offsets):
    return Segments(torch.empty(len(offsets), dtype=torch.int32, device=CUDA), TOKENS)


def run(layer, config, *arguments, tokens=TOKENS):
    x = torch.empty(tokens, config.hidden_size, device=CUDA)
    with Launches() as launches:
        layer(x, *arguments)
    return launches.names


def decoder_layer(batch_size, is_prompt, tokens=TOKENS):
    config = KeyeConfig.from_dict(CONFIG)
    with CUDA:
        layer = TextLayer(config, 0, "auto")
    cache = KVCache(config, batch_size, 64, torch.float32, CUDA)
    length = tokens // batch_size
    batch = TextBatch(
        batch_size=batch_size,
        position_ids=torch.empty(3, tokens, dtype=torch.int64, device=CUDA),
        inv_freq=torch.empty(config.head_dim // 2, device=CUDA),
        slots=torch.empty(length, dtype=torch.int64, device=CUDA),
        segments=segments(0, 0, tokens, tokens) if is_prompt else None,
        cache_mask=None,
    )
    return run(layer, config, batch, cache, tokens=tokens)


def test_a_decoder_layer_launches_nine_kernels_for_a_prompt():
    assert decoder_layer(1, True) == [
        "add_norm", "mm", "rope_to_cache", "varlen_attention", "mm", "add_norm", "mm", "silu_mul", "addmm_"
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_decoder_layer_launches_ten_kernels_for_later_tokens(batch_size):
    """`cache_attention` launches two."""
    assert decoder_layer(batch_size, False) == [
        "add_norm", "mm", "rope_to_cache", "cache_attention", "mm", "add_norm", "mm", "silu_mul", "addmm_"
    ]  # fmt: skip


def test_linear_layers_of_few_rows_are_one_launch_each_with_what_follows_them(monkeypatch):
    """Where a table of launch configs chooses the kernel: gate and up with their product, `down_proj` with the residual."""
    monkeypatch.setattr(fused, "prefers_triton", lambda x, weight, silu_mul: True)
    for batch_size in (1, 16):
        names = decoder_layer(batch_size, False, tokens=batch_size)
        assert names[:3] == ["add_norm", "linear_few_rows", "rope_to_cache"], names
        assert names[-4:] == ["linear_few_rows", "add_norm", "linear_few_rows", "linear_few_rows"], names
        assert not {"mm", "addmm_", "silu_mul"} & set(names)


def test_a_prompt_of_several_sequences_is_copied():
    names = decoder_layer(3, True)
    assert names[2:5] == ["rope", "index_copy_", "index_copy_"] and len(names) == 11


def test_a_tower_layer_launches_nine_kernels():
    """`rope` reads q and k in the output of the fused projection: nothing copies them."""
    config = KeyeConfig.from_dict(CONFIG).vision_config
    with CUDA:
        layer = VisionLayer(config, "auto")
    batch = SimpleNamespace(position_ids=torch.empty(2, TOKENS, dtype=torch.int32, device=CUDA), segments=segments(0, TOKENS))
    assert run(layer, config, batch, torch.empty(config.head_dim // 4, device=CUDA)) == [
        "add_norm", "addmm", "rope", "varlen_attention", "addmm", "add_norm", "_addmm_activation", "addmm", "add"
    ]  # fmt: skip
