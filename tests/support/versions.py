"""Tests that need a newer library than the oldest one that pyproject.toml allows."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, oldest: str, reason: str) -> pytest.MarkDecorator:
    """A mark that skips a test with versions of a package before `oldest`."""
    return pytest.mark.skipif(
        Version(version(package)) < Version(oldest), reason=f"{package} before {oldest}: {reason}"
    )
