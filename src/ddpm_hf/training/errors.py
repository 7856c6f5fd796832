"""Converts errors of pipelines and data to errors of the config."""

import contextlib
import tarfile
from collections.abc import Iterator

from safetensors import SafetensorError

from ddpm_hf.training.config import ConfigError

PIPELINE_ERRORS = (ValueError, OSError, RuntimeError, SafetensorError)
DATA_ERRORS = (ValueError, OSError, ImportError, tarfile.TarError)


@contextlib.contextmanager
def as_config_error(subject: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn errors into a ConfigError of one line that begins with `subject`, the key and its value."""
    try:
        yield
    except errors as error:
        raise ConfigError(f"{subject}: {' '.join(str(error).split())}") from error
