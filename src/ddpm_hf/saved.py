"""What the folder of a saved pipeline may hold. It may be a stranger's: its files are read bounded and within the folder."""

import contextlib
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import listed

# bytes of what is read into memory at once or published as text: a config with the betas of 4,000 steps has 0.1 million
TEXT_BYTES = 4 * 2**20
PICTURE_BYTES = 64 * 2**20
CONFIGS = ("config.json", "scheduler_config.json", "model_index.json")
JSON_DEPTH, DIGITS = 16, 40
NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model(?:\.\w+)?)(?:-\d+-of-\d+)?\.(?:safetensors(?:\.index(\.\w+)?\.json)?|bin)"
)
SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)", re.ASCII)
PARTS = ("unet", "scheduler", "classifier")  # of a pipeline, each in a folder of this name
STAGES = ("base", "upsampler")  # of a cascade, each a pipeline


def one_line(error: BaseException, most: int = 500) -> str:
    """The message of an error in one line of `most` characters; with its type where that says what is wrong."""
    text = " ".join(str(error).split())
    text = text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} {text}".strip()
    return text if len(text) <= most else f"{text[: most - 4]} ..."


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns any error of using what `path` holds into a ValueError of one line that names it, or its folder."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = one_line(error)
        raise ValueError(text if str(path.parent) in text else f"{path}: {text}") from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to something within `folder`, or is a link of the Hub's cache, whose snapshots link to its blobs."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    snapshots = [parent for parent in folder.parents if parent.name == "snapshots"]
    return real.is_relative_to(folder) or any(real.parent == parent.parent / "blobs" for parent in snapshots)


def check_file(path: Path, folder: Path, most: int | None = TEXT_BYTES) -> Path:
    """Returns `path`, a file of the pipeline in `folder`, if it may be read.

    Raises:
        ValueError: it is a link to outside of the folder, no regular file, or has more than `most` bytes.
        FileNotFoundError: it is not there.
    """
    if not is_inside(path, folder):
        raise ValueError(f"{path} is a link to outside of {folder}; put a copy of the file in its place")
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; save the pipeline again") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a {'folder' if path.is_dir() else 'device or pipe'}, not a file; remove it")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} has {status.st_size:,} bytes; at most {most:,} are allowed")
    return path


def read_text(path: Path, folder: Path | None = None) -> str:
    """A text file of the pipeline in `folder`, by default its own. Raises as `check_file`; ValueError if it is not UTF-8."""
    try:
        return check_file(path, folder or path.parent).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); write it again") from None


def read_json(path: Path, folder: Path | None = None) -> dict:
    """A JSON file of the pipeline in `folder`: an object, its keys unique, numbers and depth bounded. Raises as `read_text`."""
    text = read_text(path, folder)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_number(int), parse_float=_number(float))
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is in no text that can be written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}); save the pipeline again") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds {reprlib.repr(value)}, not an object of keys and values; save the pipeline again"
        )
    return value


def read_config(path: Path, folder: Path | None = None) -> dict:
    """The config of a component, by `read_json`; its keys must not take the place of a dict's methods."""
    config = read_json(path, folder)
    key = next((key for key in config if hasattr(dict, key)), None)
    if key is not None:
        raise ValueError(f"{path}: {reprlib.repr(key)} is no key of a config; remove it")
    own = config.get("_ddpm_hf", {})
    if not isinstance(own, dict):
        raise ValueError(f"{path}: _ddpm_hf={reprlib.repr(own)} must hold keys and values; save the pipeline again")
    return config


def _object(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return values


def _number(kind):
    def parse(digits):
        if len(digits) > DIGITS:
            raise ValueError(f"a number has {len(digits):,} digits")
        return kind(digits)

    return parse


def _check_depth(value, depth=0):
    if depth > JSON_DEPTH:
        raise ValueError(f"it is nested more than {JSON_DEPTH} levels deep")
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, depth + 1)


def pipeline_class(index: dict, path) -> str:
    """The class that a model_index.json names: of [module, class], as in our own folders, the class. Raises ValueError."""
    name = index.get("_class_name")
    names = name if isinstance(name, (list, tuple)) and len(name) == 2 else [name]
    if not all(isinstance(each, str) and NAME.fullmatch(each) for each in names):
        raise ValueError(
            f"{path}: its _class_name {reprlib.repr(name)} is not the name of a class; save the pipeline again"
        )
    return names[-1]


def component_classes(index: dict, path, known: tuple[str, ...] = PARTS) -> dict[str, str]:
    """Component -> class, of a model_index.json; those without a class are left out.

    Raises:
        ValueError: a component that is not one of `known`, or an entry that is not [library, class], both plain names.
    """
    entries = {
        name: entry
        for name, entry in index.items()
        if name in known or (isinstance(entry, list) and name[:1] != "_" and not _is_setting(entry))
    }
    if not entries.keys() <= {*known}:
        raise ValueError(
            f"{path} holds a {pipeline_class(index, path)} of {listed(sorted(entries))}; "
            f"this class opens pipelines of {', '.join(known)} only"
        )
    for name, entry in entries.items():
        whole = isinstance(entry, list) and len(entry) == 2
        if not whole or not (entry == [None, None] or all(isinstance(n, str) and NAME.fullmatch(n) for n in entry)):
            raise ValueError(
                f"{path}: its {name} is {reprlib.repr(entry)}, not [library, class]; save the pipeline again"
            )
    return {name: entry[1] for name, entry in entries.items() if entry[1]}


def _is_setting(entry):
    return entry == [None, None] or all(isinstance(number, (int, float)) for number in entry)


def variant_of(name: str) -> str | None:
    """ "diffusion_pytorch_model" or "diffusion_pytorch_model.fp16" of a file of weights, or of their index; None of others."""
    where, _, file = name.rpartition("/")
    network = where.removeprefix("base/").removeprefix("upsampler/")  # the stages of a cascade
    match = WEIGHTS.fullmatch(file) if network in ("", "unet", "classifier") else None
    return match and match[1] + (match[2] or "")


def variants_in(folder: Path) -> dict[str, list[Path]]:
    """Safetensors files in the folder of a network, and their indices, by `variant_of`: the usual weights, "….fp16", ..."""
    variants = {}
    for path in sorted(folder.iterdir()):
        if variant_of(path.name) and path.suffix != ".bin":
            variants.setdefault(variant_of(path.name), []).append(path)
    return variants


def folder_of_part(part: Path) -> Path:
    """The folder of the pipeline whose component lies in the folder `part`; `part` itself where it stands alone."""
    return part.parent if (part.parent / "model_index.json").is_file() else part


def check_part(part: Path, folder: Path) -> None:
    """Checks the files that are read of a component in the folder `part` of the pipeline in `folder`.

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
    """Tensor -> name of its file, from the index of weights in several files, which lie beside it.

    Raises as `check_file`, `read_json`; ValueError for other contents.
    """
    index = read_json(path, folder)
    shards = index.get("weight_map")
    plain = isinstance(shards, dict) and all(
        isinstance(name, str) and SHARD.fullmatch(name) for name in shards.values()
    )
    if not plain or not isinstance(index.get("metadata"), dict):
        raise ValueError(
            f"{path} has no metadata and weight_map from tensors to the files beside it; save the pipeline again"
        )
    for file in (path.with_name(name) for name in {*shards.values()}):
        if os.path.lexists(file):
            check_file(file, folder, None)
    return shards


class Kind(NamedTuple):
    """What a value of a JSON file may be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other):
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))


def _matches(pattern):
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


NULL = Kind("null", lambda value: value is None)
TEXT = Kind("text of 1 to 500 characters", lambda value: isinstance(value, str) and 0 < len(value) <= 500)
WORD = Kind("a word of letters, digits and . _ + -", _matches(r"[\w.+-]{1,100}"))
COUNT = Kind("an integer, 0 or more", lambda value: type(value) is int and 0 <= value < 2**63)
INTEGER = Kind("an integer", lambda value: type(value) is int and abs(value) < 2**64)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e39)
SHARE = Kind("a number in [0, 1)", lambda value: NUMBER.fits(value) and 0 <= value < 1)
NAMES = Kind(
    "a list of at most 100,000 texts of 500 characters",
    lambda value: (
        isinstance(value, list) and len(value) <= 10**5 and all(name == "" or TEXT.fits(name) for name in value)
    ),
)
NAMES_BYTES = TEXT_BYTES - 2**20  # the rest of a config has its space, too
VERSIONS = Kind(
    "versions by name",
    lambda value: isinstance(value, dict) and all(WORD.fits(word) for pair in value.items() for word in pair),
)
SUBSET = Kind("the number of images {of: ...}", lambda value: isinstance(value, dict) and COUNT.fits(value.get("of")))
COMMAND = Kind("one line of at most 4,000 characters", lambda value: isinstance(value, str) and len(value) <= 4000)
# what training/train.py writes, and training/evaluate.py by the bound or by the ODE, as far as others read it; keys that may
# be null may be left out
TRAINING = {
    **dict.fromkeys(("data", "split"), TEXT),
    **dict.fromkeys(("steps", "batch_size", "gradient_accumulation_steps"), COUNT),
    **dict.fromkeys(("learning_rate", "ema_decay"), NUMBER),
    **{"held_out": SHARE | NULL, "images": COUNT | NULL},
    **{"seed": INTEGER, "loss": WORD, "weighting": WORD | NULL, "preset": TEXT | NULL, "weights": WORD | NULL},
    **{"hub_dataset": TEXT | NULL, "label_names": NAMES | NULL, "versions": VERSIONS | NULL},
}
EVALUATION = {
    **dict.fromkeys(("data", "split"), TEXT),
    **dict.fromkeys(("total", "prior", "kl", "decoder"), NUMBER),
    **dict.fromkeys(("images", "steps", "first_timestep"), COUNT),
    **dict.fromkeys(("standard_error", "sampling_error", "evaluations_per_image"), NUMBER | NULL),
    **{"seed": INTEGER, "subset": SUBSET | NULL, "command": COMMAND | NULL, "weights": WORD | NULL},
    "held_out": SHARE | NULL,
}
EVALUATION_BY_ODE = {
    **{
        key: EVALUATION[key]
        for key in (
            "data",
            "split",
            "total",
            "images",
            "seed",
            "standard_error",
            "subset",
            "held_out",
            "command",
            "weights",
        )
    },
    **{"dequantization": WORD, "tolerance": NUMBER, "evaluations_per_image": NUMBER},
}


def check_label_names(names: list[str]) -> list[str]:
    """Returns names of labels. Raises ValueError for those that could be saved, but not be read again."""
    size = len(json.dumps(names, indent=8))
    if not NAMES.fits(list(names)) or size > NAMES_BYTES or re.search("[\ud800-\udfff]", "".join(names)):
        raise ValueError(
            f"class_names={reprlib.repr(names)} must be {NAMES.words}, in UTF-8, {NAMES_BYTES // 2**20} MiB in all; "
            "give shorter names"
        )
    return names


def check_values(values: dict, schema: dict[str, Kind], path: Path, mend: str = "save the pipeline again") -> dict:
    """`values` with None for the keys of the schema that are left out. Raises ValueError for the first that does not fit."""
    values = values | {key: None for key in schema if key not in values}
    for key, kind in schema.items():
        if not kind.fits(values[key]):
            raise ValueError(f"{path}: {key}={reprlib.repr(values[key])} must be {kind.words}; {mend}")
    return values


def read_record(path: Path, folder: Path) -> dict:
    """training.json or evaluation.json of the pipeline in `folder`.

    Raises as `read_json`; ValueError for what training/train.py and evaluate.py do not write.
    """
    values = read_json(path, folder)
    by_ode = "dequantization" in values
    schema = TRAINING if path.stem == "training" else EVALUATION_BY_ODE if by_ode else EVALUATION
    return check_values(values, schema, path, mend="remove the file")


def check_target(folder: Path, parts: Iterable[str] = ()) -> None:
    """Raises ValueError where saving to `folder`, and to the folders of these parts in it, would write through a link."""
    for place in (folder, *(folder / part for part in parts)):
        paths = list(place.iterdir()) if place.is_dir() else []
        links = [path for path in paths if path.name in CONFIGS or path.suffix == ".py" or variant_of(path.name)]
        link = next((path for path in (*links, place) if path.is_symlink() and path != folder), None)
        if link is not None:
            raise ValueError(
                f"{link} is a link, and what it leads to would be overwritten; remove it, or save to a new folder"
            )


class GuardedConfig:
    """How a component reads and writes its config; before diffusers' `ConfigMixin` among its bases."""

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """diffusers' hook for reading a config. Raises as `read_config`."""
        return read_config(Path(json_file), folder_of_part(Path(json_file).parent))

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As diffusers' method, of which `save_pretrained` is made. Raises ValueError where it would write through a link."""
        check_target(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
