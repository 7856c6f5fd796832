"""A saved pipeline to the Hub: what belongs there, and nothing else, in one commit."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from safetensors import safe_open

from ddpm_hf.files.guarded import PICTURE_BYTES, check_file, naming, read_json, read_text
from ddpm_hf.files.pipeline_folder import (
    PARTS,
    STAGES,
    check_target,
    component_classes,
    pipeline_class,
    read_config,
    read_shards,
    variant_of,
    variants_in,
)
from ddpm_hf.hub.records import file_sha256, told_of, weights_digest
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet

# the run's record, how the weights were measured, and their pictures
RECORD = re.compile(r"(training|evaluation)\.(json|csv|png)|samples\.png")


SDE_MODULE = "sde_scheduler"  # the source of a scheduler in continuous time, beside its config


# a branch whose index names the class in pipeline.py, for from_pretrained(x, revision="remote-code", trust_remote_code=True)
REMOTE_CODE = "remote-code"


STOCK_CLASS, OUR_CLASS = "DDPMPipeline", ["pipeline", "DDPMImagePipeline"]


# saved under their own names, for no stock class stands for them: of main too, and without a branch for trusted code
UPSAMPLER, CASCADE = ["pipeline", "DDPMSuperResolutionPipeline"], ["pipeline", "CascadePipeline"]


KINDS = {STOCK_CLASS: (STOCK_CLASS, OUR_CLASS), UPSAMPLER[1]: (UPSAMPLER,), CASCADE[1]: (CASCADE,)}


CONTINUOUS = OUR_CLASS[1]  # of a scheduler that no stock class stands for


KINDS[CONTINUOUS] = (OUR_CLASS, STOCK_CLASS)


class HubError(RuntimeError):
    """What kept a folder from being published, and what to do, in one line.

    `refused`: the Hub, or its rules for names and tokens, said no; the same push fails again. False where it may not.
    """

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


def open_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Makes the repository if it is not there; returns its whole name, "user/name". Raises HubError."""
    with _explained(repo_id):
        return _api(token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def check_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
    """As `open_repository`; also whether this token may write there, and what is there may be replaced. Raises HubError."""
    repo_id = open_repository(repo_id, private=private, token=token)
    with _explained(repo_id):
        api = _api(token)
        api.auth_check(repo_id, write=True)
        _check_repository(
            api, repo_id, None, _tree(api, repo_id, None), [name for kind in KINDS.values() for name in kind]
        )


class Published:
    """What a pipeline has of publishing, before diffusers' `DiffusionPipeline` among its bases."""

    @property
    def folder(self) -> Path | None:
        """The local folder, or the snapshot of the Hub, that the pipeline's network was opened from; None if from neither."""
        place = Path(self.unet.config.get("_name_or_path") or os.devnull)
        # the oldest pipelines have the network in the folder itself
        folders = (place, place.parent) if place.is_dir() else ()
        return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As diffusers' method; push_to_hub=True publishes the folder by `push_folder` with repo_id (else the folder's name),
        license, commit_message, private, token, revision, create_pr.

        Raises:
            ValueError: a file or folder to be written is a link; a network with adapters in it.
        """
        names = ("license", "commit_message", "private", "token", "revision", "create_pr")
        where = {name: kwargs.pop(name) for name in names if name in kwargs}
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        check_target(Path(save_directory), self.components)
        self.register_modules(**self.components)  # diffusers passes over a component that was None when it was made
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            push_folder(save_directory, repo_id, **where)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As diffusers' method. Raises ValueError where it would write through a link."""
        check_target(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
        license: str | None = None,
    ):
        """Saves the pipeline to a temporary folder and publishes it by `push_folder`, whose arguments and errors these are.

        The card, pictures and numbers of the folder that the pipeline was opened from go with it, if its weights are still
        those. With a variant, say "fp16", those weights stand beside the others in the repository.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            _copy_record(self.folder, Path(folder))
            return push_folder(
                folder,
                repo_id,
                license=license,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def _copy_record(source, folder):
    """Copies card, license, pictures and numbers of the pipeline `source` and its stages, where the weights are the same."""
    for stage in ("", *STAGES) if source else ():
        of, to = source / stage, folder / stage
        if (of / "unet").is_dir() and (to / "unet").is_dir() and weights_digest(of) == weights_digest(to) is not None:
            for path in of.iterdir():
                if RECORD.fullmatch(path.name) or path.name in ("README.md", "LICENSE"):
                    shutil.copyfile(check_file(path, source, PICTURE_BYTES), to / path.name)


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

    What the repository holds of other weights goes in the same commit; a variant, say "fp16", alone stands beside the others. A
    second commit keeps the branch "remote-code", which differs from main by the class in model_index.json: no weights go twice.
    The folder is only read; a push that breaks leaves main as it was, and can be repeated.

    Args:
        folder: of `save_pretrained`, with safetensors; of other files only the card, pictures and numbers of the run are sent.
            Its card is written anew for the repository, unless it was changed by hand; without one the repository's stays if it
            was, or if the weights are the same.
        repo_id: "user/name", or "name" for the token's own; made if it is not there.
        license: for the card, the Hub's name of one; None for what the repository's card says.
        commit_message, private, token: as in diffusers' `push_to_hub`.
        revision: branch, made if it is not there, or "refs/pr/1" of a pull request; None for main.
        create_pr: as a pull request. Once it is merged, push to main again, so that "remote-code" follows.

    Returns:
        `CommitInfo` of huggingface_hub: the commit's address, that of the pull request as `pr_url`.

    Raises:
        ValueError: the folder is not a whole pipeline of this package, named with the file.
        HubError: the Hub did not take it.
    """
    folder = Path(folder)
    files = published_files(folder)
    if revision == REMOTE_CODE:
        raise ValueError(f"revision={revision!r} is kept by this package beside main; choose another")
    kind = _kind(read_json(folder / "model_index.json"), folder)
    commit_message = commit_message or f"Upload {'DDPMImagePipeline' if kind == STOCK_CLASS else kind}"
    repo_id = open_repository(repo_id, private=private, token=token)
    with _explained(repo_id, revision):
        api = _api(token)
        to_main = revision in (None, constants.DEFAULT_REVISION) and not create_pr
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = _tree(api, repo_id, revision)
        _check_repository(api, repo_id, revision, there, KINDS[kind])
        old = ""
        if "README.md" in there:
            path = api.hf_hub_download(repo_id, "README.md", revision=revision)
            old = Path(path).read_text(encoding="utf-8", errors="replace")
    gone, changed = _left_behind(files, there)
    files |= _card(folder, files, old, repo_id, license, changed, to_main)
    with _explained(repo_id, revision):
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in sorted(gone)]
        info = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    if to_main and kind in (STOCK_CLASS, CONTINUOUS):
        try:
            with _explained(repo_id):
                _keep_remote_code(api, repo_id, info.oid, files["model_index.json"], commit_message)
        except HubError as error:
            raise HubError(
                f"{repo_id}: {info.commit_url} is published, but not yet its branch {REMOTE_CODE!r}: push again to complete "
                f"it ({error})",
                error.refused,
            ) from None
    return info


def _card(folder, files, old, repo_id, license, changed, to_main):
    """README.md as it is to be sent, if not as it is in the folder or was in the repository, whose text is `old`."""
    hub, mine = _hub(), files.get("README.md")
    if hub is None:
        return {}
    text = read_text(mine) if mine else old
    if not text or (hub.is_our_card(text) and (mine or changed)):
        license = license or hub.license_of(old)
        text = hub.card_text(folder, repo_id, license=license, remote_code=to_main)
    elif license and license != hub.license_of(text):
        text = hub.licensed(text, license)
    else:
        return {}
    return {"README.md": text.encode()}


def _hub():
    """The module that writes cards; None where the package is not installed, as for a published pipeline.py."""
    try:  # not as a statement: diffusers would ask users of a published pipeline.py for the package
        return importlib.import_module("ddpm_hf.hub.card")
    except ImportError:
        return None


def _tree(api, repo_id, revision):
    infos = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {info.path: info for info in infos if isinstance(info, RepoFile)}


def _kind(index, path):
    """By a saved pipeline's index the key of `KINDS`; for others the class that the index names."""
    name = pipeline_class(index, path)
    if name in (STOCK_CLASS, OUR_CLASS[1]):
        component_classes(index, path)
        return CONTINUOUS if index.get("scheduler", [None])[0] == SDE_MODULE else STOCK_CLASS
    return next((kind for kind, names in KINDS.items() if index["_class_name"] in names), name)


def _left_behind(files, there):
    """What of the repository's files goes, and whether the weights that its card tells of change."""
    weights = {name: path for name, path in files.items() if variant_of(name)}
    same = all(name in there and there[name].size == path.stat().st_size for name, path in weights.items()) and all(
        there[name].lfs.sha256 == file_sha256(path) for name, path in weights.items() if there[name].lfs
    )
    sent, others = {variant_of(name) for name in weights}, {name for name in there if variant_of(name)} - weights.keys()
    beside = "diffusion_pytorch_model" not in sent and any(variant_of(name) not in sent for name in others)
    gone = {name for name in others if variant_of(name) in sent or not (same or beside)}
    if not beside:  # a classifier, or a scheduler's source, that is no more
        gone |= {name for name in there if "classifier" in name.split("/")[:-1]} - files.keys()
        gone |= {f"scheduler/{SDE_MODULE}.py"} & there.keys() - files.keys()
    if not beside and (not same or "README.md" in files):
        gone |= {name for name in there if RECORD.fullmatch(name)} - files.keys()
    return gone, not (same or beside)


def _keep_remote_code(api, repo_id, commit, index, commit_message):
    """The branch for trusted code: as main at this commit, but for the class in the index."""
    index = json.loads(index if isinstance(index, bytes) else index.read_text(encoding="utf-8"))
    index = (json.dumps({**index, "_class_name": OUR_CLASS}, indent=2, sort_keys=True) + "\n").encode()
    if REMOTE_CODE in {branch.name for branch in api.list_repo_refs(repo_id).branches}:
        blobs = {name: info.blob_id for name, info in _tree(api, repo_id, commit).items()}
        blobs["model_index.json"] = hashlib.sha1(b"blob %d\0" % len(index) + index).hexdigest()  # as git names it
        if blobs == {name: info.blob_id for name, info in _tree(api, repo_id, REMOTE_CODE).items()}:
            return
        api.delete_branch(repo_id, branch=REMOTE_CODE)
    api.create_branch(repo_id, branch=REMOTE_CODE, revision=commit)
    operations = [CommitOperationAdd("model_index.json", index)]
    api.create_commit(repo_id, operations, commit_message=commit_message, revision=REMOTE_CODE)


def published_files(folder: Path, pipeline_folder: Path | None = None) -> dict[str, Path | bytes]:
    """What of a saved pipeline belongs on the Hub: path in the repository -> file, or its content.

    pipeline_folder: where `folder` is that of a stage in it.

    Raises:
        ValueError: something is missing, does not belong together, is too large, no file, or a link to outside of the folder;
            the message names the file and the mend.
    """
    root = pipeline_folder or folder
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no pipeline: it has no model_index.json; give what save_pretrained wrote, such as a run's pipeline/"
        )
    index = read_json(folder / "model_index.json", root)
    kind = _kind(index, folder)
    ours = OUR_CLASS[1] if kind == STOCK_CLASS else kind
    source = read_text(folder / "pipeline.py", root) if os.path.lexists(folder / "pipeline.py") else ""
    if kind not in KINDS or f"class {ours}(" not in source:
        raise ValueError(
            f"{folder} was not saved by DDPMImagePipeline (its index says {pipeline_class(index, folder)}): open it with "
            "DDPMImagePipeline.from_pretrained and save it again"
        )
    texts = [name for name in ("pipeline.py", "README.md", "LICENSE") if os.path.lexists(folder / name)]
    files = {name: check_file(folder / name, root) for name in texts}
    classes = component_classes(index, folder, STAGES if kind == CASCADE[1] else PARTS)
    if kind == CASCADE[1]:
        for stage in STAGES:
            files |= {f"{stage}/{name}": file for name, file in published_files(folder / stage, root).items()}
        return files | {"model_index.json": folder / "model_index.json"}
    saved_as = STOCK_CLASS if kind == STOCK_CLASS else index["_class_name"]
    files["model_index.json"] = (
        json.dumps({**index, "_class_name": saved_as}, indent=2, sort_keys=True) + "\n"
    ).encode()
    networks = {"unet": DDPMUNet}
    parts = [("unet", "config.json"), ("scheduler", "scheduler_config.json")]
    if index.get("scheduler", [None])[0] == SDE_MODULE:
        parts.append(("scheduler", f"{SDE_MODULE}.py"))
    if "classifier" in classes:
        networks["classifier"] = NoisyClassifier
        parts += [("classifier", "config.json"), ("classifier", f"{index['classifier'][0]}.py")]
    for name, config in parts:
        path = folder / name / config
        if not os.path.lexists(path):
            what = "config" if config.endswith(".json") else config
            raise ValueError(f"{folder / name} has no {what}, but model_index.json names it; save the pipeline again")
        if config.endswith(".json"):
            read_config(path, root)
        files[f"{name}/{config}"] = check_file(path, root)
    for name, cls in networks.items():
        _check_weights(folder / name, cls, root)
        files |= {f"{name}/{path.name}": path for paths in variants_in(folder / name).values() for path in paths}
    told = told_of(folder, root)
    for path in folder.iterdir():
        part = "training" if path.name == "samples.png" else path.stem
        if RECORD.fullmatch(path.name) and told.get(part, path) is not None:
            files[path.name] = check_file(path, root, PICTURE_BYTES)
    return files


def _check_weights(folder, cls, root):
    with naming(folder / "config.json"), torch.device("meta"):
        network = cls.from_config(read_config(folder / "config.json", root))
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    variants = variants_in(folder)  # "diffusion_pytorch_model.fp16" -> its files
    if not variants:
        pickled = next(folder.glob("*.bin"), None)
        what = f"{pickled} is a pickle, which is not published" if pickled else f"{folder} holds no weights"
        raise ValueError(f"{what}; open the pipeline and save it with save_pretrained, which writes safetensors")
    for variant, paths in variants.items():
        indices = [path for path in paths if path.suffix == ".json"]
        shards = {path.name for path in paths} - {path.name for path in indices}
        named = set(read_shards(indices[0], root).values()) if indices else {f"{variant}.safetensors"}
        if shards != named:
            raise ValueError(
                f"{folder / variant}*: {', '.join(sorted(shards ^ named)[:3])} do not belong together; save the pipeline to an "
                "empty folder"
            )
        found = {}
        for name in shards:
            path = check_file(folder / name, root, None)
            with naming(path), safe_open(path, framework="pt") as file:
                found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if found != expected:
            name = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
            raise ValueError(
                f"{folder / variant} holds {name[:80]!r} of shape {found.get(name)}, its config.json asks for "
                f"{expected.get(name)}; they are of different networks, save the pipeline again"
            )


def _check_repository(api, repo_id, revision, there, kinds):
    if "model_index.json" in there:
        path = api.hf_hub_download(repo_id, "model_index.json", revision=revision)
        name = read_json(Path(path)).get("_class_name")
        if name not in kinds:
            raise HubError(f"{repo_id} holds a {name} already; choose another name for the repository", True)
    elif there.keys() - {".gitattributes", "README.md", "LICENSE"}:
        raise HubError(f"{repo_id} holds something that is no pipeline; choose another name for the repository", True)


@contextlib.contextmanager
def _explained(repo_id, revision=None):
    """Errors of the Hub in one line, with what to do; without those they come from, which may show the token."""
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
        again = "nothing is lost, push it again later"
        refused = status in (400, 401, 403, 404)
        if isinstance(error, HFValidationError):
            refused = True
            message = f"repo_id={repo_id!r} is no name of a repository; give user/name"
        elif isinstance(error, OfflineModeIsEnabled):
            message = f"{repo_id}: HF_HUB_OFFLINE is set; unset it to publish"
        elif status == 401 or any(type(e).__name__ in ("LocalTokenNotFoundError", "LocalProtocolError") for e in chain):
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
            message = f"{repo_id}: the Hub answered {status}; {again}"
        elif any(type(e).__module__.startswith("httpx") or isinstance(e, ConnectionError) for e in chain):
            message = (
                f"{repo_id}: {constants.ENDPOINT} was not reached or broke off ({type(chain[-1]).__name__}); {again}"
            )
        else:
            raise
        raise HubError(message, refused) from None
