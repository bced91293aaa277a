"""Checks whether an operator may read a layer's weights instead of calling the layer."""

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

PLAIN_TENSORS: tuple[type, ...] = (Tensor, nn.Parameter)  # subclasses are DTensor, quantized weights and others


def is_plain(*modules: nn.Module) -> bool:
    """Whether calling each of these modules is the same as applying its weights.

    False for the layers of adapters (LoRA), for modules with hooks (offloading, tensor parallelism), and for weights that are
    tensor subclasses (DTensor, torchao's quantization).
    """
    types = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
    return all(type(module) in types and calls_forward(module) and has_plain_weights(module) for module in modules)


def calls_forward(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else."""
    return "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def has_global_hooks() -> bool:
    """Whether there are hooks that run with every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def has_plain_weights(module: nn.Module) -> bool:
    """Whether the module's own parameters are ordinary tensors."""
    return all(weight is None or type(weight) in PLAIN_TENSORS for weight in module._parameters.values())
