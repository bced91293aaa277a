"""The launch configs to try for a shape. Those that cannot fit the shared memory of a GPU are dropped without compiling them."""

from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.launch_config import Config
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TuningShape

MAX_REFINED = 3  # configs of the first round whose neighbors are tried in the second


def candidates(shape: TuningShape, dtype: str, arch: Arch) -> list[Config]:
    """The configs of the first round, the heuristic's first."""
    spec = kernel_spec(shape.kernel)
    heuristic = spec.heuristic(shape, dtype, arch)
    configs = [heuristic, *({**heuristic, **changes} for changes in spec.candidates(shape, arch, heuristic))]
    unique = {tuple(sorted(config.items())): config for config in configs}
    return [config for config in unique.values() if config == heuristic or _may_fit(shape, arch, config)]


def refinements(shape: TuningShape, arch: Arch, fastest: list[Config]) -> list[Config]:
    """The configs of the second round, around the fastest of the first; `fastest` is sorted by time."""
    spec = kernel_spec(shape.kernel)
    own = [config for config in fastest if config.get("backend", "triton") == "triton"][:MAX_REFINED]
    configs = [{**config, **changes} for config in own for changes in spec.refinements(config)]
    return [config for config in configs if _may_fit(shape, arch, config)]


def _may_fit(shape: TuningShape, arch: Arch, config: Config) -> bool:
    if config.get("backend", "triton") != "triton" or arch.name not in MULTIPROCESSORS:
        return True
    limit = MULTIPROCESSORS[arch.name].shared_bytes_per_block
    return kernel_spec(shape.kernel).shared_bytes(shape, config, arch) <= limit
