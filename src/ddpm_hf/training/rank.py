"""Which process this is, before accelerate has started. Imports nothing slow."""

import os


def is_main_process() -> bool:
    """Whether this is the process that prints, as the launcher says."""
    return os.environ.get("RANK", "0") == "0"
