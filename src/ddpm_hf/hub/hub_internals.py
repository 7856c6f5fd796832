"""All that this package uses of huggingface_hub beyond its documented interface, checked on huggingface_hub 2.4.

tests/hub/test_hub_internals.py fails, and names it, if a new version changes one of these.
"""

import sys

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

# The HTTP client of this version of huggingface_hub, httpx or httpx2, known by the class that its errors inherit from.
HTTP_CLIENT = sys.modules[
    next(base.__module__.partition(".")[0] for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx"))
]


def is_about_token(error: BaseException) -> bool:
    """Whether there is no token, or one with characters that cannot be sent."""
    return isinstance(error, (LocalTokenNotFoundError, HTTP_CLIENT.LocalProtocolError))


def is_about_connection(error: BaseException) -> bool:
    """Whether the Hub could not be reached, or the connection broke."""
    return isinstance(error, (HTTP_CLIENT.HTTPError, HTTP_CLIENT.StreamError, ConnectionError))
