"""What the package can do with a package that it does not require: an extra of pip install "ddpm-hf[extra]"."""

import importlib.util


class MissingExtra(ImportError):
    """A package of an extra is not installed."""


def require_extra(module: str, extra: str, purpose: str) -> None:
    """Raises MissingExtra, in one line, where a module is not installed, before anything is computed that needs it.

    Args:
        purpose: what needs it, the subject of the message, such as "plots".
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(
            f'{purpose} need {module}; pip install "ddpm-hf[{extra}]", or pip install -e ".[{extra}]" in a checkout'
        )
