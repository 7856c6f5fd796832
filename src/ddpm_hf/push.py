"""A saved pipeline to the Hub: what belongs there, and nothing else, in one commit."""

import contextlib
import hashlib
import importlib
import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from safetensors import safe_open

from .unet import DDPMUNet

# beside the weights, configs and source of a pipeline
ROOT_FILES = re.compile(
    r"model_index\.json|pipeline\.py|README\.md|LICENSE|(training|evaluation)\.(json|csv|png)|samples\.png"
)
# a branch whose index names the class in pipeline.py, for from_pretrained(x, revision="remote-code", trust_remote_code=True)
REMOTE_CODE = "remote-code"
OUR_CLASS = ["pipeline", "DDPMImagePipeline"]


class HubError(RuntimeError):
    """What kept a folder from being published, and what to do, in one line."""


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    card: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publishes a saved pipeline in one commit; sends only what the repository does not have.

    A second commit keeps the branch "remote-code", which differs by the class in model_index.json alone: no weights go twice.
    The folder is only read; a push that breaks leaves the branch as it was, and can be repeated.

    Args:
        folder: of `save_pretrained`, with safetensors; of other files only cards, pictures and numbers of the run are sent.
        repo_id: "user/name", or "name" for the token's own; made if it is not there.
        card: text of README.md. None for the folder's own; without one the repository's stays as long as the weights do, and
            else a new one is made, and numbers and pictures of other weights go.
        commit_message, private, token, create_pr: as in diffusers' `push_to_hub`.
        revision: branch; made if it is not there. None for main.

    Returns:
        `CommitInfo` of huggingface_hub: the commit's address, that of the pull request as `pr_url`.

    Raises:
        ValueError: the folder is not a whole pipeline of this package, named with the file.
        HubError: the Hub did not take it.
    """
    folder = Path(folder)
    files = published_files(folder)
    commit_message = commit_message or "Upload DDPMImagePipeline"
    with _explained(folder, repo_id):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if "model_index.json" in there:
            _check_repository(api.hf_hub_download(repo_id, "model_index.json", revision=revision), repo_id)
        gone = []
        if card is None and "README.md" not in files and not _same_weights(api, repo_id, revision, files, there):
            card = _new_card(folder, repo_id)
            gone = [
                name for name in there if ROOT_FILES.fullmatch(name) and name not in {*files, "README.md", "LICENSE"}
            ]
        if card is not None:
            files["README.md"] = card.encode()

        def commit(files, **where):
            operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
            operations += [CommitOperationDelete(name) for name in gone]
            return api.create_commit(repo_id, operations, commit_message=commit_message, **where)

        info = commit(files, revision=revision, create_pr=create_pr)
        if revision in (None, constants.DEFAULT_REVISION) and not create_pr:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            index = json.dumps({**index, "_class_name": OUR_CLASS}, indent=2, sort_keys=True) + "\n"
            api.create_branch(repo_id, branch=REMOTE_CODE, exist_ok=True)
            commit({**files, "model_index.json": index.encode()}, revision=REMOTE_CODE)
    return info


def published_files(folder: Path) -> dict[str, Path]:
    """What of a saved pipeline belongs on the Hub: path in the repository -> file.

    Raises:
        ValueError: something is missing or does not belong together; the message names the file and the mend.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no pipeline: it has no model_index.json; give what save_pretrained wrote, such as a run's pipeline/"
        )
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    source = folder / "pipeline.py"
    if index["_class_name"] != "DDPMPipeline" or not source.is_file() or OUR_CLASS[1] not in source.read_text("utf-8"):
        raise ValueError(
            f"{folder} was not saved by DDPMImagePipeline (its index says {index['_class_name']}): open it with "
            "DDPMImagePipeline.from_pretrained and save it again"
        )
    files = {path.name: path for path in folder.iterdir() if path.is_file() and ROOT_FILES.fullmatch(path.name)}
    components = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    for name in components:
        found = {path for path in (folder / name).glob("*") if path.suffix in (".json", ".safetensors")}
        if not any(path.name in ("config.json", "scheduler_config.json") for path in found):
            raise ValueError(f"{folder / name} has no config, but model_index.json names it; save the pipeline again")
        files |= {f"{name}/{path.name}": path for path in found}
    _check_weights(folder / "unet")
    return files


def _check_weights(folder):
    with torch.device("meta"):
        unet = DDPMUNet.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    expected = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    variants = {}  # "" or ".fp16" -> the shapes of all its shards
    for path in sorted(folder.glob("*.safetensors")):
        variant = re.sub(r"-\d+-of-\d+", "", path.name)
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        variants.setdefault(variant, {}).update(shapes)
    if not variants:
        pickled = next(folder.glob("*.bin"), None)
        what = f"{pickled} is a pickle, which is not published" if pickled else f"{folder} holds no weights"
        raise ValueError(f"{what}; open the pipeline and save it with save_pretrained, which writes safetensors")
    for variant, found in variants.items():
        if found != expected:
            name = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
            raise ValueError(
                f"{folder / variant} holds {name} of shape {found.get(name)}, its config.json asks for {expected.get(name)}; "
                "they are of different networks, save the pipeline again"
            )


def _same_weights(api, repo_id, revision, files, there):
    """Whether a repository that has a card has these weights."""
    weights = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    if "README.md" not in there or not weights.keys() <= set(there):
        return False
    infos = api.get_paths_info(repo_id, list(weights), revision=revision)
    return all(info.lfs and info.lfs.sha256 == _sha256(weights[info.path]) for info in infos)


def _new_card(folder, repo_id):
    try:  # not as a statement: diffusers would ask users of a published pipeline.py for the package
        hub = importlib.import_module("ddpm_hf.hub")
    except ImportError:
        return "---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\n---\n"
    return hub.card_text(folder, repo_id)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_repository(index, repo_id):
    name = json.loads(Path(index).read_text(encoding="utf-8")).get("_class_name")
    if name not in ("DDPMPipeline", OUR_CLASS):
        raise HubError(f"{repo_id} holds a {name} already; choose another name for the repository")


@contextlib.contextmanager
def _explained(folder, repo_id):
    """Errors of the Hub in one line, with what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        chain = [error]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
        again = f"{folder} is whole, push it again later"
        if isinstance(error, HFValidationError):
            message = f"repo_id={repo_id!r} is no name of a repository; give user/name"
        elif status == 401 or any(isinstance(e, LocalTokenNotFoundError) for e in chain):
            message = f"{repo_id}: no valid token; run `hf auth login`, set HF_TOKEN, or give token="
        elif status == 403:
            message = f"{repo_id}: this token may not write there; take one with write access, or a name of your own"
        elif status == 404:
            message = f"{repo_id}: not found, or private to somebody else; choose another name"
        elif status in (409, 412):
            message = f"{repo_id}: changed or taken by somebody else at the same time ({status}); push again"
        elif status is not None:
            message = f"{repo_id}: the Hub answered {status}; {again}"
        else:
            message = (
                f"{repo_id}: {constants.ENDPOINT} was not reached or broke off ({type(chain[-1]).__name__}); {again}"
            )
        raise HubError(message) from error
