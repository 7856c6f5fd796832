"""Comparison of what two devices have computed."""

import torch


def assert_close(actual, expected, tolerance=1e-4):
    """Tensors, or tuples or dicts of them, equal but for rounding: within `tolerance` of the largest value, or of 1."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = actual.values(), expected.values()
    if not isinstance(expected, torch.Tensor):
        for one, other in zip(actual, expected, strict=True):
            if one is not None or other is not None:
                assert_close(one, other, tolerance)
        return
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = expected.isfinite()
    assert actual.isfinite().equal(finite)
    scale = max(1.0, torch.where(finite, expected, 0.0).abs().max().item())
    difference = torch.where(finite, actual - expected, 0.0).abs().max().item()
    assert difference <= tolerance * scale, f"off by {difference:.2g}, where the largest value is {scale:.2g}"
