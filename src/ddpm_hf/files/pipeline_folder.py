"""The files of a saved pipeline's folder, and their checks: the folder may be untrusted."""

import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

from ddpm_hf.arguments import listed
from ddpm_hf.files.diffusers_internals import ConfigReader
from ddpm_hf.files.guarded import check_file, read_json

CONFIGS = ("config.json", "scheduler_config.json", "model_index.json")


NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)


WEIGHTS = re.compile(
    r"(diffusion_pytorch_model(?:\.\w+)?)(?:-\d+-of-\d+)?\.(?:safetensors(?:\.index(\.\w+)?\.json)?|bin)"
)


SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)", re.ASCII)


PARTS = ("unet", "scheduler", "classifier")  # the sub-folders of a pipeline


STAGES = ("base", "upsampler")  # the sub-folders of a cascade, each a pipeline


def read_config(path: Path, folder: Path | None = None) -> dict:
    """Reads the config of a component. Raises as `read_json`, and ValueError for keys with the name of a dict's method."""
    config = read_json(path, folder)
    key = next((key for key in config if hasattr(dict, key)), None)
    if key is not None:
        raise ValueError(f"{path}: {reprlib.repr(key)} is no key of a config; remove it")
    settings = config.get("_ddpm_hf", {})
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: _ddpm_hf={reprlib.repr(settings)} must hold keys and values; save the pipeline again"
        )
    return config


def pipeline_class(index: dict, path) -> str:
    """Returns the class name in a model_index.json, also from [module, class]. Raises ValueError."""
    name = index.get("_class_name")
    names = name if isinstance(name, (list, tuple)) and len(name) == 2 else [name]
    last = names[-1]
    if not isinstance(last, str) or not all(isinstance(part, str) and NAME.fullmatch(part) for part in names):
        raise ValueError(
            f"{path}: its _class_name {reprlib.repr(name)} is not the name of a class; save the pipeline again"
        )
    return last


def component_classes(index: dict, path, allowed: tuple[str, ...] = PARTS) -> dict[str, str]:
    """Returns component -> class name from a model_index.json, without components that are None.

    Raises:
        ValueError: a component is not in `allowed`, or an entry is not [library, class], both plain names.
    """
    entries = {
        name: entry
        for name, entry in index.items()
        if name in allowed or (isinstance(entry, list) and name[:1] != "_" and not _is_setting(entry))
    }
    if not entries.keys() <= {*allowed}:
        raise ValueError(
            f"{path} holds a {pipeline_class(index, path)} of {listed(sorted(entries))}; "
            f"this class opens pipelines of {', '.join(allowed)} only"
        )
    for name, entry in entries.items():
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not is_pair or not (entry == [None, None] or all(isinstance(n, str) and NAME.fullmatch(n) for n in entry)):
            raise ValueError(
                f"{path}: its {name} is {reprlib.repr(entry)}, not [library, class]; save the pipeline again"
            )
    return {name: entry[1] for name, entry in entries.items() if entry[1]}


def _is_setting(entry):
    return entry == [None, None] or all(isinstance(number, (int, float)) for number in entry)


def variant_of(name: str) -> str | None:
    """Returns the variant of a weights file or its index, such as "diffusion_pytorch_model.fp16"; None for other files."""
    folder, _, file = name.rpartition("/")
    network = folder.removeprefix("base/").removeprefix("upsampler/")  # the stages of a cascade
    match = WEIGHTS.fullmatch(file) if network in ("", "unet", "classifier") else None
    return match and match[1] + (match[2] or "")


def variants_in(folder: Path) -> dict[str, list[Path]]:
    """Returns variant -> safetensors files and their index, in the folder of a network; see `variant_of`."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        variant = variant_of(path.name)
        if variant and path.suffix != ".bin":
            variants.setdefault(variant, []).append(path)
    return variants


def folder_of_part(part: Path) -> Path:
    """Returns the pipeline's folder for the folder `part` of a component; `part` itself if it is not in a pipeline."""
    return part.parent if (part.parent / "model_index.json").is_file() else part


def check_part(part: Path, folder: Path) -> None:
    """Checks the config and weights of a component, in the folder `part` of the pipeline in `folder`.

    Raises as `read_json` and `read_shards`; ValueError for weights that `check_file` refuses.
    """
    for path in sorted(part.iterdir()):
        if path.name in ("config.json", "scheduler_config.json"):
            read_config(path, folder)
        elif variant_of(path.name) and path.suffix == ".json":
            read_shards(path, folder)
        elif variant_of(path.name):
            check_file(path, folder, None)


def read_shards(path: Path, folder: Path) -> dict[str, str]:
    """Reads the index of sharded weights: tensor name -> file name.

    Raises as `check_file` and `read_json`; ValueError if the content is no index.
    """
    index = read_json(path, folder)
    shards = index.get("weight_map")
    if not (
        isinstance(shards, dict)
        and all(isinstance(name, str) and SHARD.fullmatch(name) for name in shards.values())
        and isinstance(index.get("metadata"), dict)
    ):
        raise ValueError(
            f"{path} has no metadata and weight_map from tensors to the files beside it; save the pipeline again"
        )
    for file in (path.with_name(name) for name in {*shards.values()}):
        if os.path.lexists(file):
            check_file(file, folder, None)
    return shards


def check_target(folder: Path, part_names: Iterable[str] = ()) -> None:
    """Raises ValueError if saving to `folder` and its sub-folders `parts` would write through a link."""
    for place in (folder, *(folder / part for part in part_names)):
        paths = list(place.iterdir()) if place.is_dir() else []
        links = [path for path in paths if path.name in CONFIGS or path.suffix == ".py" or variant_of(path.name)]
        link = next((path for path in (*links, place) if path.is_symlink() and path != folder), None)
        if link is not None:
            raise ValueError(
                f"{link} is a link, and what it leads to would be overwritten; remove it, or save to a new folder"
            )


class GuardedConfig(ConfigReader):
    """Base class of components whose config is checked when read and written; listed before diffusers' `ConfigMixin`."""

    @classmethod
    def read_json_file(cls, path: Path) -> dict:
        """Reads the config of a component. Raises as `read_config`."""
        return read_config(path, folder_of_part(path.parent))

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Saves the config as diffusers' method does. Raises ValueError if it would write through a link."""
        check_target(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
