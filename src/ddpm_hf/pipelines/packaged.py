"""Base classes of pipelines: checked opening and saving, publishing, and the optimized network.

A published pipeline.py has the classes of `hub/stand_ins.py` in their place.
"""

import os
import tempfile
import threading
from pathlib import Path

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import snapshot_download

from ddpm_hf.fast.inference import InferenceUNet
from ddpm_hf.files.diffusers_internals import ConfigReader, constructor_arguments
from ddpm_hf.files.guarded import is_inside, naming, read_json
from ddpm_hf.files.missing import pipeline_of_run
from ddpm_hf.files.pipeline_folder import (
    check_part,
    check_target,
    component_classes,
    pipeline_class,
    read_config,
    variants_in,
)
from ddpm_hf.files.saved_config import SavedConfig, saved_class
from ddpm_hf.hub.records import copy_record
from ddpm_hf.hub.saved import NETWORKS, PIPELINES, class_of_part, kind_of_class, own_sources, scheduler_class
from ddpm_hf.hub.source import write_source
from ddpm_hf.hub.upload import push_folder
from ddpm_hf.pipelines.single_file import SingleFilePipeline
from ddpm_hf.torch_internals import without_compiler

logger = logging.get_logger(__name__)


# files to download from a repository: no pickled weights; records and pictures beside the weights
FILES = ("*.json", "*.safetensors", "*.py")
BESIDE = ("training.*", "evaluation.*", "samples.png", "animation.*", "README.md", "LICENSE")


# arguments of from_pretrained: for the download, and for the networks
DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
NETWORK_KWARGS = (
    "device_map", "disable_mmap", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "use_safetensors",
)  # fmt: skip


# arguments of push_to_hub that save_pretrained(push_to_hub=True) takes too
PUSH_KWARGS = ("license", "commit_message", "private", "token", "revision", "create_pr")


_UPDATING = threading.Lock()  # held while the optimized network takes over new weights


class PackagedPipeline(ConfigReader):
    """Base class of pipelines: checked opening and saving, and publishing; listed before diffusers' `DiffusionPipeline`."""

    @property
    def folder(self) -> Path | None:
        """The local folder or Hub snapshot from which the network was opened; None for any other network."""
        place = Path(self.unet.config.get("_name_or_path") or os.devnull)
        # the oldest pipelines have the network in the folder itself
        folders = (place, place.parent) if place.is_dir() else ()
        return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)

    @classmethod
    def read_json_file(cls, path: Path) -> dict:
        """Reads the index of a pipeline. Raises as `read_json`."""
        return read_json(path)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Reads the index of a folder or repository as diffusers' method does. Raises OSError for the folder of a run, too."""
        if close := pipeline_of_run(pretrained_model_name_or_path):
            folder = pretrained_model_name_or_path
            raise FileNotFoundError(f"no file named model_index.json in {folder}; did you mean {close}?")
        return super().load_config(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Saves the pipeline as diffusers' method does; push_to_hub=True also publishes the folder by `push_folder`.

        Args:
            repo_id: repository to publish to; by default the folder's name.
            license, commit_message, private, token, revision, create_pr: as in `push_folder`.

        Raises:
            ValueError: a file or folder to be written is a link, or a network has adapters.
        """
        push_kwargs = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs}
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        check_target(Path(save_directory), self.components)
        self.register_modules(**self.components)  # diffusers passes over a component that was None when it was made
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            push_folder(save_directory, repo_id, **push_kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and `pipeline.py` with the source of this class and its parts.

        If diffusers cannot open a part, the source of its class is also written beside its config. Raises ValueError if a
        file to be written is a link.
        """
        check_target(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_source(save_directory, self.source_name, saved_classes(self))
        for name, part in self.components.items():
            part = without_compiler(part)
            source = getattr(part, "own_source", None)
            if source and not isinstance(part, DiffusionPipeline):
                write_source(os.path.join(save_directory, name), source, [type(part)])

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
        """Saves the pipeline to a temporary folder and publishes it by `push_folder`, with its arguments and errors.

        The card, pictures and numbers of the folder from which the pipeline was opened are published too if its weights are
        unchanged. Weights of a variant, such as "fp16", are added beside the others in the repository.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            copy_record(self.folder, Path(folder))
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


class PackagedCascade(PackagedPipeline):
    """Base class of a pipeline of pipelines; each stage is saved to a sub-folder.

    Attributes:
        stage_classes: the class of each stage.
    """

    stage_classes: dict[str, type]

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and the same `pipeline.py` here and in the folder of each stage.

        diffusers imports all these files under one module name, so their contents must agree.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        for stage in self.components:
            write_source(os.path.join(save_directory, stage), self.source_name, saved_classes(self))

    @property
    def folder(self) -> Path | None:
        """The local folder or Hub snapshot from which all stages were opened; None if there is none."""
        folders = {stage.folder and stage.folder.parent for stage in self.components.values()}
        folder = folders.pop() if len(folders) == 1 else None
        return folder if folder and (folder / "model_index.json").is_file() else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Opens all stages of a folder or Hub repository, with the arguments of their `from_pretrained`.

        An argument with the name of a stage replaces the saved stage.
        """
        path, names = pretrained_model_name_or_path, tuple(cls.stage_classes)
        index = cls.load_config(path, **{name: kwargs[name] for name in DOWNLOAD_KWARGS if name in kwargs})
        missing = [name for name in names if name not in component_classes(index, path, names)]
        folder = local_folder(cls, path, all_files=True, **kwargs)
        stages = {name: kwargs.pop(name) for name in names if name in kwargs}
        opened = [name for name in names if name not in stages]
        missing += [name for name in opened if not (folder / name).is_dir() or not is_inside(folder / name, folder)]
        if missing:
            raise ValueError(f"{path} is no cascade: it has no folder {missing[0]} of its own")
        kwargs = {name: value for name, value in kwargs.items() if name not in DOWNLOAD_KWARGS}
        stages |= {name: cls.stage_classes[name].from_pretrained(folder / name, **kwargs) for name in opened}
        pipeline = cls(**stages)
        pipeline.register_to_config(_name_or_path=str(path))
        return pipeline


def saved_classes(pipeline) -> list[type]:
    """Returns the classes of this package in a pipeline: its own and, recursively, those of its parts."""
    classes = [type(pipeline)]
    for part in pipeline.components.values():
        part = without_compiler(part)
        if isinstance(part, DiffusionPipeline):
            classes += saved_classes(part)
        elif isinstance(part, SavedConfig):
            classes.append(type(part))
    return classes


class PackagedImagePipeline(SingleFilePipeline, PackagedPipeline):
    """Base class of pipelines of a network, a scheduler and an optional classifier, with `optimize`."""

    _inference = None  # the optimized network

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Reads the index of a folder or repository as diffusers' method does; [module, class] becomes the class."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        index["_class_name"] = pipeline_class(index, pretrained_model_name_or_path)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Opens a folder or Hub repository, as diffusers' method does, with the classes of this package.

        Only classes of this package and of diffusers are used: no code from the folder runs. Only safetensors are read,
        unless use_safetensors=False. An argument with the name of a part replaces the saved part.

        Raises:
            ValueError: another kind of pipeline, an invalid file, a link to outside of the folder, pickled weights, or weights
                that do not fit the config. One line that names the file.
            OSError: a file is missing or cannot be read.
        """
        path = pretrained_model_name_or_path
        index = cls.load_config(path, **{name: kwargs[name] for name in DOWNLOAD_KWARGS if name in kwargs})
        classes = cls._check_index(index, path)
        kwargs["use_safetensors"] = kwargs.get("use_safetensors") is not False
        folder = local_folder(cls, path, all_files=_is_ours(index), **kwargs)
        part_names, setting_names = constructor_arguments(cls)
        components = {name: kwargs.pop(name) for name in part_names if name in kwargs}
        settings = {name: kwargs.pop(name, index.get(name)) for name in setting_names if name in kwargs.keys() | index}
        # the files of the oldest pipelines lie in the folder itself
        places = {
            name: folder / name if (folder / name).is_dir() else folder for name in classes.keys() - components.keys()
        }
        for place in places.values():
            check_part(place, folder)
        if "scheduler" in places:
            components["scheduler"] = open_scheduler(places.pop("scheduler"), classes["scheduler"], folder)
        components |= _open_networks(places, kwargs)
        with naming(folder / "model_index.json"):
            pipeline = cls(**components, **settings)
        pipeline.register_to_config(_name_or_path=str(path))
        if "device_map" in kwargs:
            pipeline.hf_device_map = kwargs["device_map"]
        if ignored := kwargs.keys() - {*DOWNLOAD_KWARGS, *NETWORK_KWARGS, "torch_dtype", "dtype", "variant"}:
            logger.warning(f"{cls.__name__}.from_pretrained does not use {', '.join(sorted(ignored))}")
        return pipeline

    @classmethod
    def _check_index(cls, index, path):
        """Returns part -> class name; raises ValueError if this class cannot open the index."""
        classes, saved = component_classes(index, path), pipeline_class(index, path)
        if not {"unet", "scheduler"} <= classes.keys() or class_of_part("unet", classes["unet"]) is None:
            listing = ", ".join(f"{name} {class_name}" for name, class_name in sorted(classes.items()))
            raise ValueError(
                f"{path} holds a {saved} of {listing}; this class opens pipelines of a UNet2DModel and a scheduler"
            )
        if "classifier" in classes and class_of_part("classifier", classes["classifier"]) is None:
            raise ValueError(
                f"{path} has a classifier of the class {classes['classifier']}; only NoisyClassifier is known"
            )
        if kind_of_class(saved).name != saved_class(cls).__name__:
            raise ValueError(f"{path} holds a {saved}; open it with that class, not with {cls.__name__}")
        return classes

    @property
    def is_optimized(self) -> bool:
        """Whether `optimize` was called."""
        return self._inference is not None

    def optimize(self, dtype: torch.dtype | None = None, compile: bool = True) -> str:
        """Makes later calls of the pipeline faster; images stay the same within rounding, and `unet` is not changed.

        Later calls use an `InferenceUNet` made from `unet`, and follow changes of its weights.

        Args:
            dtype: dtype of the network's activations; None for that of its weights; torch.bfloat16 is faster and rounds as
                autocast does. Samples keep the dtype of `unet`.
            compile: whether to use torch.compile; the first call with each batch and image size then takes up to minutes.

        Returns:
            One line about the optimizations.

        Raises:
            ValueError: the network is not a `DDPMUNet`, or has adapters, hooks or offloading.
        """
        self._inference = InferenceUNet(self.unet, dtype, compile)
        return self._inference.report

    def _network(self, timesteps):
        """Returns the network for these timesteps: the optimized one if there is one, with the present weights of `unet`."""
        if self._inference is None:
            return self.unet
        with _UPDATING:
            self._inference = network = self._inference.updated(self.unet)
        return network.at_timesteps(timesteps)


def _is_ours(index):
    """Whether the index names classes that diffusers lacks; it would run the repository's code for them."""
    return index["_class_name"] in {kind.name for kind in PIPELINES} or bool(own_sources(index))


def _open_networks(places, kwargs):
    """Opens the networks in these folders, by name; kwargs are those of `from_pretrained`."""
    variant, dtype = kwargs.get("variant"), kwargs.get("dtype")
    dtype = kwargs.get("torch_dtype") if dtype is None else dtype
    having = {name for name, place in places.items() if f"diffusion_pytorch_model.{variant}" in variants_in(place)}
    networks = {}
    for name, place in places.items():
        network_kwargs = {key: kwargs[key] for key in NETWORK_KWARGS if key in kwargs}
        network_kwargs["variant"] = variant if name in having or not having else None  # at least one must have it
        network_kwargs["torch_dtype"] = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
        with naming(place / "config.json"):
            networks[name] = NETWORKS[name].from_pretrained(place, **network_kwargs)
        # an absolute path, so that `folder` does not depend on the working directory
        networks[name].register_to_config(_name_or_path=os.path.abspath(place))
    return networks


def local_folder(cls: type, path: str | os.PathLike, all_files: bool, **kwargs) -> Path:
    """Returns a local folder as it is; downloads a Hub repository and returns its folder.

    Args:
        cls: the class of the pipeline.
        all_files: whether to download all weights; otherwise diffusers chooses by the index.
        kwargs: those of `from_pretrained`.
    """
    if os.path.isdir(path):
        return Path(path)
    download_kwargs = {name: kwargs[name] for name in DOWNLOAD_KWARGS if name in kwargs}
    if not all_files:
        kinds = {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
        download_kwargs["revision"] = Path(cls.download(str(path), **kinds, **download_kwargs)).name  # its commit
    download_kwargs.pop("proxies", None)
    return Path(
        snapshot_download(str(path), allow_patterns=[*(FILES if all_files else ()), *BESIDE], **download_kwargs)
    )


def open_scheduler(folder: Path, class_name: str, pipeline_folder: Path):
    """Opens the scheduler in `folder`, a class of this package or of diffusers. Raises ValueError."""
    path = folder / "scheduler_config.json"
    cls = scheduler_class(class_name)
    if cls is None:
        raise ValueError(
            f"{path} is for the class {class_name}, which is no scheduler of diffusers {diffusers.__version__}"
        )
    sizes = {name: value for name, value in read_config(path, pipeline_folder).items() if isinstance(value, int)}
    absurd = next((name for name, value in sizes.items() if abs(value) > 10**6), None)
    if absurd:
        raise ValueError(f"{path}: {absurd}={sizes[absurd]} is beyond 1,000,000; no scheduler is that large")
    with naming(path):
        return cls.from_pretrained(folder)
