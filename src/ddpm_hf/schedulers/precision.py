"""The floating-point types that coefficients and images are computed in."""

import torch


def in_working_precision(x: torch.Tensor) -> torch.Tensor:
    """Return x, in float32 if it is of half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def finest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """Return x in float64, on the CPU if it was on one of Apple's GPUs, which have no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()
