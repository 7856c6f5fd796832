"""Packages that only some tasks need: the extras of pip install "ddpm-hf[extra]"."""

import importlib.metadata
import importlib.util
import sys
from types import ModuleType

from ddpm_hf.errors import UserError


class MissingExtra(UserError, ImportError):
    """A package of an extra is not installed."""


def require_extra(module: str, extra: str, purpose: str) -> None:
    """Check, before anything is computed, that the package of an extra is installed.

    Args:
        module: the package's import name.
        extra: the extra that brings it.
        purpose: what needs it, a plural such as "plots"; the subject of the message.

    Raises:
        MissingExtra: it is not installed; the message names the command that installs it.
    """
    if sys.modules.get(module) is None and (module in sys.modules or importlib.util.find_spec(module) is None):
        raise MissingExtra(
            f'{purpose} need {module}; pip install "ddpm-hf[{extra}]", or pip install -e ".[{extra}]" in a checkout'
        )


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import the package of an extra, or a module in it; arguments as `require_extra`.

    Raises:
        MissingExtra: it is not installed, or its import fails, as beside a torchvision that was built for another torch.
    """
    package = module.partition(".")[0]
    require_extra(package, extra, purpose)
    try:
        return importlib.import_module(module)
    except Exception as error:  # RuntimeError and OSError of compiled packages, too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MissingExtra(
            f"{purpose} need {package}, which cannot be imported ({reason[:300]}); install versions of its packages that fit "
            f"torch {importlib.metadata.version('torch')}"
        ) from error
