"""Which implementation an operator gets: the order of the choices, what "auto" means on each device, and what is refused."""

import pytest
import torch

import keye_kernels as kk
import keye_kernels.ops.linear  # registers its operator
from keye_kernels.ops import implementation
from keye_kernels.ops.implementation import (
    IMPLEMENTATIONS,
    check_impl,
    default_impl,
    impl_for,
    is_auto,
    kernel_dtype,
    kernel_inputs,
    resolve,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
VARIABLE = "KEYE_KERNELS_IMPL"
TORCH = (("torch", "patch_merge_projection"), ("torch", "linear_few_rows"))


class OnGpu(torch.Tensor):
    device = GPU


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    implementation.log_choice.cache_clear()


def test_the_argument_precedes_use_impl_which_precedes_the_environment(monkeypatch):
    assert default_impl() == "auto"
    monkeypatch.setenv(VARIABLE, "triton")
    assert default_impl() == "triton" and resolve("auto", "rope_2d", CPU) == "triton"
    with kk.use_impl("reference"):
        assert default_impl() == "reference" and resolve("auto", "rope_2d", CPU) == "reference"
        assert resolve("triton", "rope_2d", CPU) == "triton"
        with kk.use_impl("auto"):  # a default that was set, not the absence of one
            assert resolve("auto", "rope_2d", CPU) == "reference" and is_auto("auto", "rope_2d")
        assert default_impl() == "reference"
    assert default_impl() == "triton"
    monkeypatch.setenv(VARIABLE, "")
    assert default_impl() == "auto"


def test_use_impl_ends_with_its_block_also_after_an_exception():
    with pytest.raises(RuntimeError, match="inside"), kk.use_impl("triton"):
        raise RuntimeError("inside")
    assert default_impl() == "auto"


def test_auto_is_triton_on_a_gpu_and_the_reference_elsewhere(monkeypatch):
    for operator in IMPLEMENTATIONS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert resolve("auto", operator, GPU, dtype) == "triton"
        assert resolve("auto", operator, GPU, torch.float64) == resolve("auto", operator, CPU) == "reference"
    monkeypatch.setattr(implementation, "has_triton", lambda: False)
    assert all(resolve("auto", operator, GPU) == "reference" for operator in IMPLEMENTATIONS)


def test_a_default_that_an_operator_does_not_have_means_auto():
    for operator, names in IMPLEMENTATIONS.items():
        for impl in ("reference", "triton", "torch", "flash_attn"):
            assert impl_for(operator, impl) == (impl if impl in names else "auto")
            with kk.use_impl(impl):
                assert is_auto("auto", operator) == (impl not in names)
                assert not is_auto("reference", operator)
    with kk.use_impl("flash_attn"):
        assert resolve("auto", "rope_3d", CPU) == "reference" and resolve("auto", "varlen_attention", CPU) == "flash_attn"


def test_names_of_other_operators_are_refused():
    for operator, names in IMPLEMENTATIONS.items():
        for impl in ("auto", *names):
            check_impl(impl, operator)
        for impl in {"torch", "flash_attn", "cudnn"} - set(names):
            with pytest.raises(ValueError, match=f"impl must be one of 'auto', 'reference', .*, got {impl!r}"):
                check_impl(impl, operator)
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*, got 'cudnn'"):
        check_impl("cudnn", name="backend")


@pytest.mark.parametrize("interpret", ["0", None])
def test_kernels_on_a_cpu_need_the_interpreter(interpret, monkeypatch):
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    for impl, operator in (("triton", "rope_2d"), ("triton", "varlen_attention"), *TORCH):
        with pytest.raises(ValueError, match=f"impl='{impl}' of {operator} needs tensors on a CUDA or ROCm device, got cpu"):
            resolve(impl, operator, CPU)
        assert resolve(impl, operator, GPU) == impl
    # torch's FlashAttention runs without Triton; it refuses a CPU itself
    assert resolve("torch", "varlen_attention", CPU) == "torch" and resolve("flash_attn", "varlen_attention", CPU) == "flash_attn"


def test_kernels_need_triton_and_no_float64(monkeypatch):
    for impl, operator in (("triton", "rope_3d"), *TORCH):
        with pytest.raises(TypeError, match=r"takes float32, float16 or bfloat16 tensors, got torch\.float64"):
            resolve(impl, operator, GPU, torch.float64)
    assert resolve("reference", "rope_3d", GPU, torch.float64) == "reference"
    monkeypatch.setattr(implementation, "has_triton", lambda: False)
    for impl, operator in (("triton", "rope_3d"), *TORCH):
        with pytest.raises(ValueError, match="needs Triton, which is not installed"):
            resolve(impl, operator, GPU)


def test_only_the_interpreter_computes_bf16_in_float32():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.zeros(2, dtype=dtype)
        gpu = x.as_subclass(OnGpu)
        assert kernel_dtype(x) == (torch.float32 if dtype == torch.bfloat16 else dtype) and kernel_dtype(gpu) == dtype
        assert [y.dtype for y in kernel_inputs(x, x.bfloat16())] == [kernel_dtype(x), torch.float32]
        assert all(y is z for y, z in zip(kernel_inputs(gpu, x), (gpu, x), strict=True))


@pytest.mark.parametrize(("impl", "backend"), [("auto", "auto"), ("triton", "triton"), ("torch", "torch")])
def test_only_auto_takes_the_matmuls_of_the_projector_from_the_launch_config(impl, backend, monkeypatch):
    from keye_kernels.ops.patch_merge import _run
    from keye_kernels.triton import patch_merge as launcher

    monkeypatch.setitem(_run.__globals__, "resolve", lambda impl, *_: "triton" if impl == "auto" else impl)
    found = []
    monkeypatch.setattr(launcher, "patch_merge_projection", lambda *given: found.append(given[-1]) or torch.zeros(1, 4))
    _run(torch.zeros(4, 2), None, *[torch.zeros(2)] * 6, 2, 1e-5, impl)
    assert found == [backend]


def test_each_choice_is_logged_once(caplog):
    with caplog.at_level("INFO", logger="keye_kernels"):
        for _ in range(2):
            for device in (CPU, GPU):
                resolve("auto", "rope_2d", device)
                resolve("auto", "varlen_attention", device)
            resolve("reference", "rope_3d", CPU)  # not a choice
    # On a GPU attention chooses its library later
    assert [record.getMessage() for record in caplog.records] == [
        "rope_2d on cpu runs impl='reference'",
        "varlen_attention on cpu runs impl='reference'",
        "rope_2d on cuda runs impl='triton'",
    ]


@pytest.mark.parametrize("name", ["rope", "rope_norm_backward", "linear", "vision_geometry", "varlen_attention",
                                  "varlen_attention_backward", "patch_merge_projection", "position_embedding_2d"])  # fmt: skip
def test_operators_are_registered_for_cpu_and_gpu(name):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"keye_kernels::{name}", key)
