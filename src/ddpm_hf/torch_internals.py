"""All that this package uses of torch beyond its public interface, checked on torch 2.13.0.

Where a new version of torch changes one of these, tests/test_torch_internals.py fails and names it.
"""

import contextlib
from typing import Any

import torch
from torch import nn


def is_functorch_active() -> bool:
    """Whether the caller runs within `torch.func` (grad, vmap, ...), which cannot go through our autograd functions."""
    return torch._C._are_functorch_transforms_active()


def has_hooks(module: nn.Module) -> bool:
    """Whether functions were registered that run before or after the module's `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def without_compiler(module: Any) -> Any:
    """Returns the module within one that torch has compiled; any other module as it is."""
    return getattr(module, "_orig_mod", module)


def packing_weights(enabled: bool) -> contextlib.AbstractContextManager:
    """Within this context the compiler may pack weights into its code, if `enabled`. Call it without gradients.

    The option of torch.compile by the same name is not enough: when tracing, Dynamo reads the setting of the process.
    """
    return torch._inductor.config.patch(freezing=enabled)
