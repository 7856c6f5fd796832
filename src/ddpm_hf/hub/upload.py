"""Publishes a saved pipeline on the Hub, in one commit."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.hf_api import RepoFile

from ddpm_hf.files.digests import file_sha256
from ddpm_hf.files.guarded import read_json, read_text
from ddpm_hf.files.pipeline_folder import PARTS, variant_of
from ddpm_hf.files.saved_config import sorted_json
from ddpm_hf.hub.card import card_text, is_our_card, license_of, licensed
from ddpm_hf.hub.contents import published_files
from ddpm_hf.hub.errors import HubError, explained
from ddpm_hf.hub.records import RECORD
from ddpm_hf.hub.saved import IMAGE, PIPELINES, SOURCES, kind_of_folder

# a branch whose index names the class in pipeline.py, for from_pretrained(x, revision="remote-code", trust_remote_code=True)
REMOTE_CODE = "remote-code"


def open_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Creates the repository if it does not exist; returns its full name, "user/name". Raises HubError."""
    with explained(repo_id):
        return _api(token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def check_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
    """Opens the repository; raises HubError also if the token may not write there, or if it holds another model."""
    repo_id = open_repository(repo_id, private=private, token=token)
    with explained(repo_id):
        api = _api(token)
        api.auth_check(repo_id, write=True)
        _check_repository(api, repo_id, None, _tree(api, repo_id, None), PIPELINES)


def _api(token):
    return HfApi(token=token.strip() if isinstance(token, str) else token)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publishes a saved pipeline in one commit; sends only what the repository does not have.

    The same commit removes files of earlier weights; only a variant, such as "fp16", is added beside the others.
    A second commit updates the branch "remote-code", which differs from main only by the class in model_index.json, so no
    weights are sent twice. The folder is not changed; a push that fails leaves main unchanged and can be repeated.

    Args:
        folder: written by `save_pretrained`, with safetensors; of its other files only the card, pictures and numbers of the
            run are sent. Its card is rewritten for the repository, unless it was changed by hand; if it has none, the
            repository's card stays if that was changed by hand or the weights are the same.
        repo_id: "user/name", or "name" for the token's own user; created if it does not exist.
        license: the Hub's name of a license, for the card; None keeps the repository's.
        commit_message, private, token: as in diffusers' `push_to_hub`.
        revision: a branch, created if it does not exist, or "refs/pr/1" of a pull request; None for main.
        create_pr: whether to open a pull request. Once it is merged, push to main again, so that "remote-code" follows.

    Returns:
        `CommitInfo` of huggingface_hub: the address of the commit, and as `pr_url` that of the pull request.

    Raises:
        ValueError: the folder is not a complete pipeline of this package; the message names the file.
        HubError: the Hub refused it or was not reached.
    """
    folder = Path(folder)
    files = published_files(folder)
    if revision == REMOTE_CODE:
        raise ValueError(f"revision={revision!r} is kept by this package beside main; choose another")
    kind = kind_of_folder(read_json(folder / "model_index.json"), folder)
    commit_message = commit_message or f"Upload {kind.name}"
    repo_id = open_repository(repo_id, private=private, token=token)
    with explained(repo_id, revision):
        api = _api(token)
        to_main = revision in (None, constants.DEFAULT_REVISION) and not create_pr
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        online_files = _tree(api, repo_id, revision)
        _check_repository(api, repo_id, revision, online_files, [kind])
        old = ""
        if "README.md" in online_files:
            path = api.hf_hub_download(repo_id, "README.md", revision=revision)
            old = Path(path).read_text(encoding="utf-8", errors="replace")
    removed, changed = _outdated_files(files, online_files)
    text = _card_text(
        folder, repo_id, license, local=files.get("README.md"), online=old, changed=changed, to_main=to_main
    )
    if text is not None:
        files["README.md"] = text.encode()
    with explained(repo_id, revision):
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in sorted(removed)]
        info = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    if to_main and kind is IMAGE:
        try:
            with explained(repo_id):
                _keep_remote_code(api, repo_id, info.oid, files["model_index.json"], commit_message)
        except HubError as error:
            raise HubError(
                f"{repo_id}: {info.commit_url} is published, but not yet its branch {REMOTE_CODE!r}: push again to complete "
                f"it ({error})",
                error.refused,
            ) from None
    return info


def _card_text(folder, repo_id, license, *, local, online, changed, to_main):
    """The card to be sent; None if it stays as it is in the folder, or `online`.

    Args:
        local: the folder's README.md, if it has one.
        online: the text of the repository's, "" if it has none.
        changed: whether the weights of the repository change.
    """
    text = read_text(local) if local else online
    if not text or (is_our_card(text) and (local or changed)):
        return card_text(folder, repo_id, license=license or license_of(online), remote_code=to_main)
    if license and license != license_of(text):
        return licensed(text, license)
    return None


def _tree(api, repo_id, revision):
    infos = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {info.path: info for info in infos if isinstance(info, RepoFile)}


def _outdated_files(files, online_files):
    """Return the files to remove from the repository, and whether the weights that its card describes change."""
    weights = {name: path for name, path in files.items() if variant_of(name)}
    same = all(
        name in online_files and online_files[name].size == path.stat().st_size for name, path in weights.items()
    ) and all(
        online_files[name].lfs.sha256 == file_sha256(path) for name, path in weights.items() if online_files[name].lfs
    )
    sent_variants = {variant_of(name) for name in weights}
    others = {name for name in online_files if variant_of(name)} - weights.keys()
    adds_variant = "diffusion_pytorch_model" not in sent_variants and any(
        variant_of(name) not in sent_variants for name in others
    )
    removed = {name for name in others if variant_of(name) in sent_variants or not (same or adds_variant)}
    if not adds_variant:  # the folder may have lost its classifier or the source of a part
        removed |= {name for name in online_files if "classifier" in name.split("/")[:-1]} - files.keys()
        sources = {f"{part}/{source}.py" for part in PARTS for source in SOURCES}
        removed |= sources & online_files.keys() - files.keys()
    if not adds_variant and (not same or "README.md" in files):
        removed |= {name for name in online_files if RECORD.fullmatch(name)} - files.keys()
    return removed, not (same or adds_variant)


def _keep_remote_code(api, repo_id, commit, index, commit_message):
    """Updates the branch for trusted code: main at this commit with another class in the index."""
    index = json.loads(index if isinstance(index, bytes) else index.read_text(encoding="utf-8"))
    index = sorted_json({**index, "_class_name": ["pipeline", IMAGE.name]}).encode()
    if REMOTE_CODE in {branch.name for branch in api.list_repo_refs(repo_id).branches}:
        blobs = {name: info.blob_id for name, info in _tree(api, repo_id, commit).items()}
        blobs["model_index.json"] = hashlib.sha1(b"blob %d\0" % len(index) + index).hexdigest()  # as git names it
        if blobs == {name: info.blob_id for name, info in _tree(api, repo_id, REMOTE_CODE).items()}:
            return
        api.delete_branch(repo_id, branch=REMOTE_CODE)
    api.create_branch(repo_id, branch=REMOTE_CODE, revision=commit)
    operations = [CommitOperationAdd("model_index.json", index)]
    api.create_commit(repo_id, operations, commit_message=commit_message, revision=REMOTE_CODE)


def _check_repository(api, repo_id, revision, online_files, kinds):
    """Raises HubError if the repository holds anything but pipelines of these kinds."""
    if "model_index.json" in online_files:
        path = api.hf_hub_download(repo_id, "model_index.json", revision=revision)
        name = read_json(Path(path)).get("_class_name")
        if all(name not in kind.index_names for kind in kinds):
            raise HubError(f"{repo_id} holds a {name} already; choose another name for the repository", True)
    elif online_files.keys() - {".gitattributes", "README.md", "LICENSE"}:
        raise HubError(f"{repo_id} holds something that is no pipeline; choose another name for the repository", True)
