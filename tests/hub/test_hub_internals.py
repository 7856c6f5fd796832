"""Fails, and says what to mend, if a new version of huggingface_hub changes what hub/ uses beyond its documentation."""

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, hf_api


@pytest.mark.parametrize(
    "owner, name",
    [
        (constants, "DEFAULT_REVISION"),
        (constants, "ENDPOINT"),
        (errors, "HFValidationError"),
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


def test_files_have_a_size_a_blob_and_a_digest():
    file = hf_api.RepoFile(path="x", size=3, oid="1", lfs={"size": 3, "oid": "2", "pointerSize": 1})
    found = (file.path, file.size, file.blob_id, file.lfs.sha256)
    assert found == ("x", 3, "1", "2"), f"huggingface_hub {huggingface_hub.__version__} has changed RepoFile"
