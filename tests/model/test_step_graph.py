"""Which models have their decoding steps recorded; what a recording computes is for a GPU to show (tests/gpu)."""

import pytest
import torch
from torch import nn

from keye_kernels.model import step_graph
from keye_kernels.model.step_graph import MIN_STEPS_TO_RECORD, _RecordedStep, decoding_step
from keye_kernels.ops.implementation import use_impl


class OnGpu(nn.Module):
    """As much of a model on a GPU as the choice looks at."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.head = torch.device(device), nn.Linear(2, 2)
        self.head.impl = "triton"


@pytest.fixture(autouse=True)
def kernels_can_run(monkeypatch):
    monkeypatch.setattr("keye_kernels.ops.implementation._require_triton", lambda operator, device: None)


def is_recorded(model, steps=MIN_STEPS_TO_RECORD):
    return isinstance(decoding_step(model, None, steps), _RecordedStep)


def test_many_steps_on_a_gpu_are_recorded_and_few_are_not():
    assert is_recorded(OnGpu()) and not is_recorded(OnGpu(), MIN_STEPS_TO_RECORD - 1)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_every_step(register):
    model = OnGpu()
    hook = getattr(model.head, register)(lambda *seen: None)
    assert not is_recorded(model)
    hook.remove()
    assert is_recorded(model)


def test_the_reference_launches_its_steps():
    model = OnGpu()
    model.head.impl = "reference"
    assert not is_recorded(model)
    model.head.impl = "flash_attn"  # serves prompts; all else is the kernels'
    assert is_recorded(model)
    with use_impl("reference"):
        assert not is_recorded(model)


def test_a_model_that_failed_once_is_not_recorded_again():
    model = OnGpu()
    step_graph._failed.add(model)
    assert not is_recorded(model) and is_recorded(OnGpu())


def test_a_cpu_a_compiled_model_and_autocast_launch_their_steps():
    assert not is_recorded(OnGpu("cpu"))
    for compiled in (lambda model: model, lambda model: model.head):
        model = OnGpu()
        compiled(model).compile(backend="eager")
        assert not is_recorded(model)
    # Set by hand: without a GPU, the context itself would warn and stay off
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not is_recorded(OnGpu())
    finally:
        torch.set_autocast_enabled("cuda", False)
