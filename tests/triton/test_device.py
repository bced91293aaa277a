"""Architectures and devices: names, what each offers, limits of a multiprocessor, and several GPUs in one process."""

from types import SimpleNamespace

import pytest
import torch

from keye_kernels.triton import device as module
from keye_kernels.triton import launch_config as config_module
from keye_kernels.triton import linear, patch_merge_norm, position_embedding_2d, rope, varlen_attention
from keye_kernels.triton.device import INTERPRETER_ARCH, MULTIPROCESSORS, Arch, device_arch, device_name
from keye_kernels.triton.launch_config import clear_cache

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
GPUS = {
    FIRST: SimpleNamespace(name="NVIDIA A100", major=8, minor=0, multi_processor_count=108),
    SECOND: SimpleNamespace(name="NVIDIA H100 NVL", major=9, minor=0, multi_processor_count=114),
}


def clear():
    device_arch.cache_clear(), device_name.cache_clear(), clear_cache()


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two GPUs of different architectures, and no tables."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", GPUS.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPUS[device].name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(config_module, "PACKAGE_TABLES", tmp_path)
    monkeypatch.delenv("KEYE_KERNELS_TILES", raising=False)
    clear()
    yield tmp_path
    clear()


def test_each_gpu_has_its_architecture_and_name(gpus):
    for _ in range(2):
        assert device_arch(FIRST) == Arch("sm_80", 108) and device_arch(SECOND) == Arch("sm_90", 114)
        assert (device_name(FIRST), device_name(SECOND), device_name(CPU)) == ("NVIDIA A100", "NVIDIA H100 NVL", "cpu")
    assert device_arch(CPU) == INTERPRETER_ARCH == Arch("sm_90", 132)


def test_an_amd_gpu_has_the_name_of_its_architecture_without_features(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, major=9, minor=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device_arch(FIRST) == Arch("gfx942", 304)


CONFIGS = {
    "attention": lambda device: varlen_attention.attention_config(device, torch.bfloat16, 72, 1024, False),
    "linear": lambda device: linear._config(device, torch.bfloat16, 2048, 4608, True),
    "position_embedding_2d": lambda device: position_embedding_2d._config(device, torch.bfloat16, 1152, 1024),
    "rope": lambda device: rope._config(device, torch.bfloat16, 72, 1024),
    "patch_merge_norm": lambda device: patch_merge_norm._config(device, torch.bfloat16, 1152, 256),
}
KEYS = {
    "attention": {"dtype": "bfloat16", "head_dim": 72, "mask": "none", "max_seqlen": 1024},
    "linear": {"rows": 2048, "columns": 4608, "dtype": "bfloat16", "epilogue": "gelu"},
    "position_embedding_2d": {"channels": 1152, "dtype": "bfloat16", "patches": 1024},
    "rope": {"dtype": "bfloat16", "head_dim": 72, "tokens": 1024},
    "patch_merge_norm": {"rows": 256, "channels": 1152, "dtype": "bfloat16"},
}


def test_each_gpu_has_its_own_launch_configs(gpus):
    for name in ("attention", "linear"):
        assert CONFIGS[name](FIRST) != CONFIGS[name](SECOND), name
    assert CONFIGS["attention"](SECOND) == varlen_attention.heuristic(Arch("sm_90"), 72, torch.bfloat16)
    assert CONFIGS["linear"](FIRST) == linear.heuristic(Arch("sm_80", 108), 2048, 4608, torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_gpu_has_its_own_table(name, gpus):
    kernel, found = "varlen_attention" if name == "attention" else name, CONFIGS[name](FIRST)
    other = {"num_warps": 8 if found["num_warps"] != 8 else 4}
    config_module.save_entries("NVIDIA H100 NVL", kernel, [{**KEYS[name], "config": other, "median_us": 1.0}])
    assert CONFIGS[name](FIRST) == found
    assert CONFIGS[name](SECOND)["num_warps"] == other["num_warps"]


def test_what_architectures_offer():
    offers = {
        name: (arch.has_tma, arch.has_wgmma, arch.has_tcgen05, arch.warp_size, arch.capability)
        for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "gfx942", "gfx950")
        if (arch := Arch(name))
    }
    assert offers == {
        "sm_80": (False, False, False, 32, 80),
        "sm_86": (False, False, False, 32, 86),
        "sm_89": (False, False, False, 32, 89),
        "sm_90": (True, True, False, 32, 90),
        "sm_100": (True, False, True, 32, 100),
        "sm_103": (True, False, True, 32, 103),
        "sm_110": (True, False, True, 32, 110),
        "sm_120": (True, False, False, 32, 120),
        "sm_121": (True, False, False, 32, 121),
        "gfx942": (False, False, False, 64, 0),
        "gfx950": (False, False, False, 64, 0),
    }


def test_limits_of_a_multiprocessor():
    """From the CUDA programming guide, "Technical Specifications per Compute Capability": threads, blocks, and KiB."""
    threads = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
    blocks = {"sm_80": 32, "sm_86": 16, "sm_89": 24, "sm_90": 32, "sm_100": 32, "sm_120": 24}
    shared = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
    for name in threads:
        limits = MULTIPROCESSORS[name]
        assert (limits.warps, limits.blocks) == (threads[name] // 32, blocks[name]), name
        # A block gets all but the 1 KiB that the system reserves for it
        assert (limits.shared_bytes, limits.shared_bytes_per_block) == (shared[name] << 10, (shared[name] - 1) << 10), name
    # CDNA 3: four SIMDs of eight waves, 64 KiB of LDS
    amd = MULTIPROCESSORS["gfx942"]
    assert (amd.warps, amd.blocks, amd.shared_bytes, amd.shared_bytes_per_block) == (32, 16, 65536, 65536)
    assert MULTIPROCESSORS.keys() == {*threads, "gfx942"} and module.INTERPRETER_ARCH.name in threads
