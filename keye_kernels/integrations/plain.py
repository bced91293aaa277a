"""Whether an operator may read a layer's weights in place of calling it."""

from torch import nn


def is_plain(*modules: nn.Module) -> bool:
    """Whether these are nothing but their weights, so that an operator may read those instead of calling the module.

    Not so for an adapter's layer, nor where somebody hooked in: offloading, tensor parallelism.
    """
    return all(
        type(module) in (nn.Linear, nn.LayerNorm, nn.RMSNorm)
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in modules
    )
