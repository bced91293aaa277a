"""Checks whether an operator may read a layer's weights instead of calling the layer."""

from torch import nn


def is_plain(*modules: nn.Module) -> bool:
    """Whether calling each of these modules is the same as applying its weights.

    False for the layers of adapters (LoRA), and for modules with hooks (offloading, tensor parallelism).
    """
    return all(type(module) in (nn.Linear, nn.LayerNorm, nn.RMSNorm) and calls_forward(module) for module in modules)


def calls_forward(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else."""
    return "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks
