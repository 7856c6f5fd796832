"""Errors of the Hub, in one line with what to do."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from ddpm_hf.errors import UserError
from ddpm_hf.hub.hub_internals import is_about_connection, is_about_token


class HubError(UserError, RuntimeError):
    """A failure to publish, with what to do, in one line.

    Attributes:
        refused: whether the Hub or its rules refused the push, so that it would fail again.
    """

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Converts errors of the Hub to a `HubError`, without their causes, which may show the token."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        chain = [error]
        while (last := chain[-1]).__cause__ or (last.__context__ and not last.__suppress_context__):
            chain.append(last.__cause__ or last.__context__)
            if isinstance(chain[-1], HubError):  # what went wrong before
                chain.pop()
                break
        status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
        retry = "nothing is lost, push it again later"
        refused = status in (400, 401, 403, 404)
        if isinstance(error, HFValidationError):
            refused = True
            message = f"repo_id={repo_id!r} is no name of a repository; give user/name"
        elif isinstance(error, OfflineModeIsEnabled):
            message = f"{repo_id}: HF_HUB_OFFLINE is set; unset it to publish"
        elif status == 401 or any(map(is_about_token, chain)):
            refused = True
            message = f"{repo_id}: no valid token; run `hf auth login`, set HF_TOKEN, or give token="
        elif status == 403:
            message = f"{repo_id}: this token may not write there; take one with write access, or a name of your own"
        elif status == 404 and revision is not None:
            message = f"{repo_id}: not found, private to somebody else, or revision={revision!r} is no name of a branch"
        elif status == 404:
            message = f"{repo_id}: not found, or private to somebody else; choose another name"
        elif status in (409, 412):
            message = f"{repo_id}: changed or taken by somebody else at the same time ({status}); push again"
        elif status is not None and status < 500:
            message = f"{repo_id}: the Hub refused it ({status}): {' '.join(str(error).split())}"
        elif status is not None:
            message = f"{repo_id}: the Hub answered {status}; {retry}"
        elif any(map(is_about_connection, chain)):
            message = (
                f"{repo_id}: {constants.ENDPOINT} was not reached or broke off ({type(chain[-1]).__name__}); {retry}"
            )
        else:
            raise
        raise HubError(message, refused) from None
