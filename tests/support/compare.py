"""Comparison of what two devices have computed."""

import torch


def assert_close(found, expected, tolerance=1e-4):
    """Tensors, or tuples or dicts of them, equal but for rounding: within `tolerance` of the largest value, or of 1."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = found.values(), expected.values()
    if not isinstance(expected, torch.Tensor):
        for one, other in zip(found, expected, strict=True):
            if one is not None or other is not None:
                assert_close(one, other, tolerance)
        return
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    finite = expected.isfinite()
    assert found.isfinite().equal(finite)
    scale = max(1.0, torch.where(finite, expected, 0.0).abs().max().item())
    difference = torch.where(finite, found - expected, 0.0).abs().max().item()
    assert difference <= tolerance * scale, f"off by {difference:.2g}, where the largest value is {scale:.2g}"
