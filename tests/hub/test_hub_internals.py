"""Fails, and says what to mend, if a new version of huggingface_hub changes what hub/ uses beyond its documentation."""

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, hf_api

from ddpm_hf.hub.hub_internals import HTTP_CLIENT, is_about_connection, is_about_token


@pytest.mark.parametrize(
    "owner, name",
    [
        (constants, "DEFAULT_REVISION"),
        (constants, "ENDPOINT"),
        (errors, "HFValidationError"),
        (errors, "HfHubHTTPError"),
        (errors, "LocalTokenNotFoundError"),
        (errors, "OfflineModeIsEnabled"),
        (hf_api, "RepoFile"),
    ],
    ids=str,
)
def test_names_exist(owner, name):
    message = (
        f"huggingface_hub {huggingface_hub.__version__} has no {owner.__name__}.{name} any more; mend ddpm_hf/hub/"
    )
    assert hasattr(owner, name), message


def test_errors_of_the_http_client():
    """Its name and its errors: see HTTP_CLIENT in hub/hub_internals.py."""
    message = (
        f"huggingface_hub {huggingface_hub.__version__} has another HTTP client; mend ddpm_hf/hub/hub_internals.py"
    )
    assert HTTP_CLIENT.__name__ in ("httpx", "httpx2"), message
    assert all(hasattr(HTTP_CLIENT, name) for name in ("HTTPError", "LocalProtocolError", "StreamError")), message
    assert is_about_connection(HTTP_CLIENT.ConnectError("x")) and not is_about_connection(ValueError()), message
    assert is_about_token(HTTP_CLIENT.LocalProtocolError("x")), message


def test_files_have_a_size_a_blob_and_a_digest():
    file = hf_api.RepoFile(path="x", size=3, oid="1", lfs={"size": 3, "oid": "2", "pointerSize": 1})
    fields = (file.path, file.size, file.blob_id, file.lfs.sha256)
    assert fields == ("x", 3, "1", "2"), f"huggingface_hub {huggingface_hub.__version__} has changed RepoFile"
