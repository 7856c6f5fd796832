"""Names of class labels as a config holds them."""

import json
import re
import reprlib

NAMES_BYTES = 3 * 2**20  # of the JSON: a config of at most 4 MiB is read, and the rest of it needs space, too


def are_label_names(names) -> bool:
    """Whether this is a list of at most 100,000 texts of at most 500 characters, which may be empty."""
    return (
        isinstance(names, list)
        and len(names) <= 10**5
        and all(isinstance(name, str) and len(name) <= 500 for name in names)
    )


def check_label_names(names: list[str]) -> list[str]:
    """Returns the names. Raises ValueError for names that could be saved, but not be read again."""
    size = len(json.dumps(names, indent=8))
    if not are_label_names(list(names)) or size > NAMES_BYTES or re.search("[\ud800-\udfff]", "".join(names)):
        raise ValueError(
            f"class_names={reprlib.repr(names)} must be a list of at most 100,000 texts of 500 characters, in UTF-8, "
            f"{NAMES_BYTES // 2**20} MiB in all; give shorter names"
        )
    return names
