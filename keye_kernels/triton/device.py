"""GPU architectures: which one a device has, what it offers, and the resources of one multiprocessor."""

import re
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor (NVIDIA) or compute unit (AMD), from the vendors' programming guides."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int


# The architectures that kernels are compiled for ahead of time
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10, 163 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10, 99 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10, 99 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10, 227 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10, 227 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10, 99 << 10),
    "gfx942": Multiprocessor(32, 16, 64 << 10, 64 << 10),
}


@dataclass(frozen=True)
class Arch:
    """An architecture by its name, "sm_90" or "gfx942", with the number of multiprocessors of the device."""

    name: str
    num_multiprocessors: int = 132  # of an H100 SXM; ahead-of-time compilation assumes it everywhere

    @property
    def is_nvidia(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 on AMD."""
        return int(self.name[3:]) if self.is_nvidia else 0

    @property
    def warp_size(self) -> int:
        return 32 if self.is_nvidia else 64

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors are fetched by a copy engine (Hopper and later)."""
        return self.capability >= 90

    @property
    def has_wgmma(self) -> bool:
        return self.capability == 90

    @property
    def has_tcgen05(self) -> bool:
        """Whether matmul accumulators live in tensor memory (Blackwell data center)."""
        return self.capability // 10 in (10, 11)


# Models of one chip with nearly all of its multiprocessors. Without a table of its own, one uses the launch configs of another.
# Not the H20 (78 multiprocessors of 132) and parts of a GPU (MIG)
SIBLINGS = (
    r"NVIDIA (A100|A800)\b",
    r"NVIDIA (H100|H200|H800|GH200)\b",
    r"NVIDIA (B200|GB200)\b",
    r"AMD Instinct (MI300X|MI325X)\b",
)

# The interpreter runs the variants of an H100
INTERPRETER_ARCH = Arch("sm_90")


@cache
def device_arch(device: torch.device) -> Arch:
    """The architecture of a CUDA or ROCm device; `INTERPRETER_ARCH` for a CPU."""
    if device.type != "cuda":
        return INTERPRETER_ARCH
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Arch(name, properties.multi_processor_count)


@cache
def device_name(device: torch.device) -> str:
    """The marketing name, for instance "NVIDIA H100 80GB HBM3"; the device type where there is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def chip_and_model(name: str) -> tuple[str, str] | None:
    """The chip (an element of `SIBLINGS`) and the model, such as "H100", of a device name; None for a GPU without siblings."""
    found = [(chip, match[1]) for chip in SIBLINGS if (match := re.match(chip, name)) and " MIG " not in name]
    return found[0] if found else None
