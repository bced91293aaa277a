"""The cache of compiled kernels and the device of a launch, with a stub JIT function. No GPU is needed.

`test_launch` compares the cache with the JIT itself.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.triton import launch as module
from keye_kernels.triton import linear, patch_merge_norm, position_embedding_2d, rope, varlen_attention
from keye_kernels.triton.launch import Kernel, compile_only, compile_steps


class Compiled:
    def __init__(self, number, launched):
        self.number, self.launched = number, launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((self.number, grid, arguments))


class Function:
    """A JIT function with two arguments and two constexprs. It returns a kernel that records its launches."""

    arg_names = ("x", "n", "BLOCK", "FLAG")

    def __init__(self):
        self.compiled, self.launched, self.warmed_up = [], [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.compiled.append(constants)
            return Compiled(len(self.compiled), self.launched)

        return launch

    def run(self, *arguments, grid, warmup, **constants):
        assert warmup
        self.warmed_up.append((grid, arguments, constants))


@pytest.fixture
def gpu(monkeypatch):
    """The driver, whose `device` is the current one."""
    made = SimpleNamespace(device=0)
    active = SimpleNamespace(get_current_device=lambda: made.device)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    return made


@pytest.fixture
def kernel(gpu):
    made = Kernel(Function())
    made.uses_cache = True
    return made


CPU = torch.device("cpu")
X = torch.zeros(64, dtype=torch.float16)
CONSTANTS = {"BLOCK": 16, "FLAG": False, "num_warps": 4, "num_stages": 2}


def compilations(kernel, gpu, *launches):
    """How many specializations the launches (device, arguments, changed constants) compile."""
    for device, arguments, changes in launches:
        gpu.device = device
        kernel(CPU, 3, *arguments, **CONSTANTS | changes)
    return len(kernel.function.compiled)


def test_launches_of_one_signature_compile_once(kernel, gpu):
    same = [(0, (X, 5), {}), (0, (X[8:], 7), {}), (0, (X.clone(), -(2**31)), {}), (0, (X, 2**31 - 1), {}), (0, (X[:9], 1), {})]
    assert compilations(kernel, gpu, *same) == 1
    # The launch that compiles runs in the JIT. The others get the constexprs that follow the arguments, without the options
    launches = kernel.function.launched
    assert [(number, grid) for number, grid, _ in launches] == [(1, (3, 1, 1))] * 4
    assert [args[1:] for *_, args in launches] == [(n, 16, False) for n in (7, -(2**31), 2**31 - 1, 1)]
    assert launches[0][2][0].data_ptr() == X[8:].data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        (1, (X, 5), {}),
        (0, (X.float(), 5), {}),
        (0, (X[1:], 5), {}),
        (0, (X[4:], 5), {}),
        (0, (None, 5), {}),
        (0, (X, 2**31), {}),
        (0, (X, -(2**31) - 1), {}),
        (0, (X, 5.0), {}),
        (0, (X, None), {}),
        (0, (X, SimpleNamespace(block_shape=[16, 16])), {}),
        *((0, (X, 5), {name: value}) for name, value in {"BLOCK": 32, "FLAG": True, "num_warps": 8, "num_stages": 3}.items()),
    ],
    ids=["device", "dtype", "address", "8 bytes", "none", "int64", "negative", "float", "no int", "descriptor", *CONSTANTS],
)
def test_launches_of_another_signature_compile_again(other, kernel, gpu):
    first = (0, (X, 5), {})
    assert compilations(kernel, gpu, first, other) == 2
    assert compilations(kernel, gpu, first, other, first) == 2


def test_block_shapes_of_descriptors_are_part_of_the_signature(kernel, gpu):
    descriptors = [SimpleNamespace(block_shape=shape) for shape in ([64, 16], [64, 32], [64, 16])]
    assert compilations(kernel, gpu, *((0, (X, descriptor), {}) for descriptor in descriptors)) == 2


def test_a_kernel_that_compiles_in_another_thread_is_awaited(kernel, gpu, monkeypatch):
    compiled = {(3, 1, 1): lambda *_: kernel.function.launched.append(1)}
    monkeypatch.setattr(Function, "__getitem__", lambda *_: lambda *_, **__: SimpleNamespace(result=lambda: compiled))
    kernel(CPU, 3, X, 5, **CONSTANTS)
    kernel(CPU, 3, X, 5, **CONSTANTS)
    assert kernel.function.launched == [1]


def test_without_the_cache_the_jit_launches(kernel, gpu):
    kernel.uses_cache = False
    assert compilations(kernel, gpu, (0, (X, 5), {}), (0, (X, 5), {})) == 2 and not kernel.compiled_kernels


def test_the_cache_is_used_where_triton_compiles_for_nvidia(monkeypatch):
    class Jit(Function):
        pass

    assert not Kernel(Function()).uses_cache
    monkeypatch.setattr(module, "JITFunction", Jit)
    assert Kernel(Jit()).uses_cache
    monkeypatch.setattr(torch.version, "hip", "6.4")  # there the JIT also specializes on a tensor's size
    assert not Kernel(Jit()).uses_cache


def test_compile_only_runs_nothing(kernel, gpu):
    with pytest.raises(RuntimeError, match="inside"), compile_only():
        kernel(CPU, 3, X, 5, **CONSTANTS)
        raise RuntimeError("inside")
    assert kernel.function.warmed_up == [((3,), (X, 5), CONSTANTS)]
    assert not kernel.function.compiled and not kernel.compiled_kernels
    kernel(CPU, 3, X, 5, **CONSTANTS)
    assert len(kernel.function.compiled) == len(kernel.function.warmed_up) == 1


def test_compile_steps_counts_kernels_and_restores_the_listener(monkeypatch):
    before = lambda **_: None  # noqa: E731
    monkeypatch.setattr(module.knobs.compilation, "listener", before)
    monkeypatch.setattr(module, "_parallel_compilation", lambda pool: module.nullcontext())
    called, inside = [], []

    def step():
        inside.append(module._compile_only.get())
        for cache_hit in (True, False, False):
            module.knobs.compilation.listener(cache_hit=cache_hit, src=None)

    assert compile_steps([step, step], lambda: called.append(1)) == (4, 2)
    assert len(called) == 6 and inside == [True, True] and module.knobs.compilation.listener is before
    with pytest.raises(ZeroDivisionError):
        compile_steps([lambda: 1 // 0], lambda: None)
    assert module.knobs.compilation.listener is before and not module._compile_only.get()


def test_compilation_uses_at_most_the_cores_of_the_machine(monkeypatch):
    sizes, pool = [], module.ThreadPoolExecutor
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda size: sizes.append(size) or pool(size))
    for cores in (2, 64, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        compile_steps([], lambda: None)
    assert sizes == [2, module.MAX_COMPILE_THREADS, 1]


def launches():
    """A launch of every kernel."""
    q, k, v = torch.randn(3, 8, 2, 16).unbind(0)
    cu_seqlens, ids = torch.tensor([0, 8], dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
    x, weight, bias = torch.randn(8, 16), torch.randn(32, 16), torch.randn(32)
    index, corner_weight = torch.zeros(8, 4, dtype=torch.int32), torch.zeros(8, 4)
    linear_config = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "use_tma": False}
    return {
        "rope": lambda: rope.rope(q, k, ids, torch.ones(4), [4, 4]),
        "varlen_attention": lambda: varlen_attention.varlen_attention(q, k, v, cu_seqlens, 8, 0.1, False, False),
        "linear": lambda: linear.linear(x, weight, bias, backend="triton", config=linear_config),
        "patch_merge_norm": lambda: patch_merge_norm.patch_merge_norm(x, None, bias[:16], bias[:16]),
        "position_embedding_2d": lambda: position_embedding_2d.position_embedding_2d(x, weight, index, corner_weight),
    }


@pytest.mark.parametrize("name", launches())
def test_a_launch_names_the_device_of_its_tensors(name, monkeypatch):
    found = []
    monkeypatch.setattr(Kernel, "__call__", lambda self, device, *_, **__: found.append(device))
    launches()[name]()
    assert found == [CPU]


class Guard:
    """Stands in for torch.cuda.device, which makes a device the current one in a block."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        current.append(self.device)

    def __exit__(self, *_):
        current.pop()


current = []


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_with_several_gpus_a_launch_changes_the_current_one(num_gpus, kernel, monkeypatch):
    """With one there is nothing to change."""
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(module, "_num_gpus", lambda: num_gpus)
    found, run = [], kernel.function.__class__.__getitem__
    monkeypatch.setattr(Compiled, "__getitem__", lambda self, grid: lambda *_: found.append(list(current)))
    monkeypatch.setattr(Function, "__getitem__", lambda self, grid: found.append(list(current)) or run(self, grid))
    device = torch.device("cuda", 1)
    for _ in range(2):
        kernel(device, 3, X, 5, **CONSTANTS)
    bound = kernel.bind(device, 3, 5, **CONSTANTS)
    for _ in range(2):
        bound(X)
    assert found == [[device] if num_gpus > 1 else []] * 4 and not current


def test_a_bound_launch_checks_the_alignment_of_its_tensors_only(kernel, gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(Kernel, "_launch", lambda self, *a, launch=Kernel._launch, **k: calls.append(1) or launch(self, *a, **k))
    bound, launched = kernel.bind(CPU, 3, 5, **CONSTANTS), kernel.function.launched
    for x in (X, X[8:], X):
        bound(x)
    assert len(calls) == 1 and [(n, grid, args[1:]) for n, grid, args in launched] == [(1, (3, 1, 1), (5, 16, False))] * 2
    for x in (X[1:], X[1:], X):
        bound(x)
    assert len(calls) == 3 and [number for number, *_ in launched] == [1, 1, 2, 1]
    with compile_only():
        bound(X)
    assert len(launched) == 4 and len(kernel.function.warmed_up) == 1


def test_a_bound_launch_checks_the_alignment_of_every_tensor(gpu):
    """Function has one tensor; this one has two."""
    function = Function()
    function.arg_names = ("x", "y", "n", "BLOCK", "FLAG")
    kernel = Kernel(function)
    kernel.uses_cache = True
    bound = kernel.bind(CPU, 3, 5, **CONSTANTS)
    for tensors in ((X, X), (X, X), (X[1:], X), (X, X[1:])):
        bound(*tensors)
    # The first launch of a specialization runs in the JIT
    assert len(function.compiled) == 3 and [number for number, *_ in function.launched] == [1]
