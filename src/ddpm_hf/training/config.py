"""What a run needs, read from a preset or YAML file and the command line. Imports nothing slow: mistakes end here."""

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from pathlib import Path

from ddpm_hf.arguments import check_argument, shown, sides
from ddpm_hf.files.digests import DIGESTS, check_digests
from ddpm_hf.files.guarded import read_json
from ddpm_hf.files.strict_yaml import dump_yaml, parse_yaml, read_yaml

WORKERS_A_CORE = 16  # the most that can be meant


# beside the package where it is installed; in training/ of a checkout
PRESETS = next(
    path
    for path in (Path(__file__).parents[1] / "configs", Path(__file__).parents[3] / "training/configs")
    if path.is_dir()
)


# what other training scripts call our keys
ALIASES = {
    "epochs": "steps", "num_epochs": "steps", "iterations": "steps", "max_train_steps": "steps", "max_steps": "steps",
    "bs": "batch_size", "train_batch_size": "batch_size", "lr": "learning_rate", "wd": "weight_decay",
    "warmup": "lr_warmup_steps", "lr_scheduler": "lr_schedule", "ema": "ema_decay", "fp16": "mixed_precision",
    "bf16": "mixed_precision", "precision": "mixed_precision", "grad_clip": "max_grad_norm", "workers": "num_workers",
    "dataloader_num_workers": "num_workers", "dataset": "data", "dataset_name": "data", "train_data_dir": "data",
    "data_dir": "data", "path": "data", "resolution": "image_size", "size": "image_size", "output": "output_dir",
    "out": "output_dir", "save_dir": "output_dir", "resume_from_checkpoint": "resume", "report_to": "trackers",
    "logger": "trackers", "log_with": "trackers", "logging_steps": "log_every", "checkpointing_steps": "checkpoint_every",
    "save_every": "checkpoint_every", "pretrained": "init_from", "pretrained_model_name_or_path": "init_from",
    "preset": "config", "flip": "random_flip", "hub_model_id": "push_to_hub", "num_samples": "sample_count",
}  # fmt: skip


class ConfigError(ValueError):
    """A mistake in a run's configuration, told in one line."""


def _keys_of(group):
    """Makes the fields of a group of --help: a default and one line of text; `found` in the data where no preset is given."""

    def key(default, text, found=False):
        how = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
        return dataclasses.field(**how, metadata={"group": group, "help": text, "found": found})

    return key


_data, _network, _training = _keys_of("data"), _keys_of("network and process"), _keys_of("training")


_output, _evaluation, _publishing = _keys_of("what it writes"), _keys_of("evaluation"), _keys_of("publishing")


@dataclasses.dataclass
class RunConfig:
    """What every training run needs: keys of a YAML file or of the command line. "Steps" are optimizer steps."""

    data: str = _data(
        "digits",
        "digits, mnist, a folder of images, .parquet, .arrow or .tar files, a save_to_disk folder, or a Hub id",
    )
    split: str = _data("train", "split of the data, as train or train[:1000]")
    held_out: float = _data(0.0, "share of the split set aside at random, the same images always, for eval_every", True)
    streaming: bool = _data(
        False, "read images as they are needed, from files or the Hub; nothing is copied to the disk"
    )
    shuffle_buffer: int = _data(10000, "size of a stream's shuffle buffer, in images")
    image_column: str | None = _data(None, "column of the images; null: the only one")
    label_column: str | None = _data(None, "column of class labels; null: none", True)
    max_broken: float = _data(0.01, "share of images that may be left out because they cannot be read")
    max_image_pixels: int | None = _data(None, "larger images count as broken; null: above Pillow's limit, 178,956,970")
    memory_gb: float = _data(1.0, "a data set whose pixels need no more is read once and kept")
    image_size: int | list[int] = _data(8, "side, or [height, width]; images are scaled and cut to it", True)
    crop: str = _data("center", "center: what is too long is cut off; none: stretched")
    background: str = _data("white", "behind transparent pixels, for less than 4 channels; a name or #rrggbb")
    channels: int = _data(1, "1 (grey), 3 (RGB) or 4 (RGBA)", True)
    random_flip: bool = _data(False, "mirror each image left to right with probability 1/2")
    scheduler: dict = _network({}, "keys of the process: see --scheduler.KEY below", True)
    steps: int = _training(1000, "optimizer steps")
    batch_size: int = _training(128, "images a process and forward pass", True)
    gradient_accumulation_steps: int = _training(1, "batches whose gradients make one step")
    learning_rate: float = _training(2e-4, "learning rate of AdamW", True)
    lr_schedule: str = _training("constant_with_warmup", "a name of diffusers' get_scheduler")
    lr_warmup_steps: int = _training(0, "steps in which the learning rate rises from 0")
    adam_betas: list[float] = _training([0.9, 0.999], "decay of AdamW's two moments")
    weight_decay: float = _training(0.0, "weight decay of AdamW")
    max_grad_norm: float = _training(1.0, "larger gradients are scaled down to it; .inf: never")
    max_steps_skipped: int = _training(25, "steps in a row without a finite gradient before the run gives up")
    mixed_precision: str = _training("no", "no, bf16, fp16")
    compile: bool = _training(False, "use torch.compile: slow first steps, faster ones after them")
    channels_last: str = _training(
        "auto", "true, false; auto: compiled on the CPU, in half precision on an accelerator"
    )
    gradient_checkpointing: bool = _training(False, "compute activations twice instead of keeping them")
    num_workers: int = _training(0, "processes that read images")
    seed: int = _training(0, "of weights, noise and the order of images")
    output_dir: str = _output("runs/digits", "folder of the run", True)
    resume: str = _output(
        "auto", "auto: from the newest checkpoint in output_dir, if any; never; or a checkpoint's path"
    )
    checkpoint_every: int = _output(1000, "steps between checkpoints, and at the end; 0 for none")
    keep_checkpoints: int = _output(2, "the newest ones to keep, and the best of held-out images beside them")
    log_every: int = _output(20, "steps between rows of metrics.jsonl")
    trackers: list[str] = _output([], "accelerate's: tensorboard, wandb, trackio, ...; several with commas")
    tracker_project: str = _output("ddpm-hf", "project of the trackers")
    tracker_run: str | None = _output(None, "name of the run there; null: that of output_dir")
    eval_every: int = _evaluation(0, "steps between measurements of held-out images, and at the end; 0 for none", True)
    eval_data: str | None = _evaluation(None, "held-out images, as data; null: of data itself")
    eval_split: str = _evaluation("test", "split of held-out images, where held_out is 0")
    eval_images: int = _evaluation(64, "how many held-out images are measured")
    # no key: the preset that it began with, for the model card
    preset: str | None = dataclasses.field(default=None, init=False)

    # which script it is of; where its presets are; the section that holds the keys of the network, those of them that follow
    # from others, and the one that says how many classes there are
    PROGRAM: typing.ClassVar[str]
    DESCRIPTION: typing.ClassVar[str]
    PRESETS: typing.ClassVar[Path]
    NETWORK: typing.ClassVar[str]
    DERIVED: typing.ClassVar[tuple[str, ...]]
    CLASSES: typing.ClassVar[str]
    # keys that follow from the pipeline that a run begins with, where they are not given
    FROM_PIPELINE: typing.ClassVar[tuple[str, ...]]

    # images of the split, those set aside by held_out among them, once it is open; None of a stream
    split_size: typing.ClassVar[int | None] = None
    # names ("steps", "unet.dropout") given on the command line or in a file of the user's: presets are defaults
    explicit: typing.ClassVar[frozenset[str]] = frozenset()
    # whether nothing is left to be found in the data or a pipeline, see resolve.py
    resolved: typing.ClassVar[bool] = True

    @property
    def begins_with(self) -> str | None:
        """The pipeline that the run begins with."""
        raise NotImplementedError

    @property
    def network(self) -> dict:
        """The keys of the network."""
        return getattr(self, self.NETWORK)

    @property
    def classes(self) -> int | None:
        """How many labels there are."""
        return self.network.get(self.CLASSES)


@dataclasses.dataclass
class TrainConfig(RunConfig):
    """Of training/train.py."""

    PROGRAM = "train.py"
    DESCRIPTION = """Trains a DDPM (Ho, Jain, Abbeel 2020, Algorithm 1) and saves it as a pipeline that diffusers opens.

    accelerate launch training/train.py --data path/to/pictures        # the settings follow the pictures
    accelerate launch training/train.py --config digits                # a preset, or a YAML file
    accelerate launch training/train.py --config cifar10 --data path/to/images --image_size 64 --output_dir runs/mine
    python training/train.py --config mnist --steps 100 --dry_run      # shows what it would do

--help lists the keys: each is one of a YAML file too.
"""
    PRESETS = PRESETS
    NETWORK = "unet"
    DERIVED = ("sample_size", "in_channels", "out_channels", "_ddpm_hf")
    CLASSES = "num_class_embeds"
    FROM_PIPELINE = ("unet", "scheduler", "process", "image_size", "channels", "low_resolution", "conditioning_noise")
    FROM_PIPELINE += ("label_column", "label_dropout", "loss")

    unet: dict = _network({}, "keys of the network: see --unet.KEY below", True)
    init_from: str | None = _network(None, "pipeline to begin with, a folder or Hub id, diffusers' own too")
    init: str = _network("paper", "first weights: paper (zeros where its code has them) or torch (as diffusers' class)")
    process: str = _network("ddpm", "ddpm; in continuous time (Score-SDE) vp, subvp, ve")
    low_resolution: int | list[int] | None = _network(None, "size of the images that an upsampler makes larger")
    conditioning_noise: float = _network(0.0, "highest level of noise on those images in training, below 1")
    loss: str = _training("simple", "simple, vlb, hybrid")
    vlb_weight: float = _training(0.001, "weight of the bound in the hybrid loss")
    weighting: str | None = _training(
        None, "of the loss by t: min_snr, truncated_snr, p2; in continuous time likelihood"
    )
    dequantize: bool = _training(False, "add noise of one grey level's width, for bits/dim by the ODE")
    label_dropout: float = _training(0.0, "share of labels trained as 'no class', for guidance_scale")
    timesteps: str = _training("uniform", "uniform, loss_second_moment; in continuous time uniform, importance")
    ema_decay: float = _training(0.9999, "decay of the averaged weights, which are saved and sampled")
    sample_every: int = _output(1000, "steps between sheets of EMA samples; 0 for none")
    sample_raw: int = _output(5, "the first sheets that have one of the raw weights beside them")
    sample_count: int = _output(64, "samples on a sheet")
    sample_steps: int | None = _output(None, "sampling steps; null: the process's default, see docs/samplers.md", True)
    eval_evaluations: int = _evaluation(50, "network calls a held-out image, of process ddpm")
    push_to_hub: str | None = _publishing(
        None, "user/name of a repository on the Hub, at each checkpoint; null: nowhere"
    )
    hub_private: bool = _publishing(False, "make the repository for its owner only")
    license: str | None = _publishing(None, "of the model card: the Hub's name of one, as apache-2.0")

    @property
    def begins_with(self):
        return self.init_from


@dataclasses.dataclass
class ClassifierConfig(RunConfig):
    """Of training/train_classifier.py."""

    PROGRAM = "train_classifier.py"
    DESCRIPTION = """Trains a classifier of noisy images for classifier guidance (ADM, section 4) and saves it.

    accelerate launch training/train_classifier.py --config digits --pipeline runs/digits-classes/pipeline
    python training/train_classifier.py --config mnist --steps 100 --dry_run

With --pipeline it is trained on that pipeline's process, and saved with it as <output_dir>/pipeline too. --help lists the keys:
each is one of a YAML file too.
"""
    PRESETS = PRESETS / "classifier"
    NETWORK = "classifier"
    DERIVED = ("sample_size", "in_channels", "scheduler")
    CLASSES = "num_classes"
    FROM_PIPELINE = ("scheduler", "image_size", "channels")

    label_column: str | None = _data("label", "column of class labels", True)
    classifier: dict = _network({}, "keys of the classifier: see --classifier.KEY below", True)
    pipeline: str | None = _network(None, "folder or Hub id of the pipeline to guide: its process, size and channels")
    random_crop: float = _training(0.8, "images are cut to this share of their sides or more and scaled up; 1: never")
    weight_decay: float = _training(0.05, "weight decay of AdamW")
    output_dir: str = _output("runs/digits-classifier", "folder of the run", True)

    @property
    def begins_with(self):
        return self.pipeline


# of a run that is resumed; its steps and learning rate too where the schedule of the learning rate is constant
MAY_CHANGE = {"preset", "num_workers", "output_dir", "resume", "checkpoint_every", "keep_checkpoints"}


MAY_CHANGE |= {"compile", "channels_last", "gradient_checkpointing", "memory_gb", "max_steps_skipped", "trackers"}


MAY_CHANGE |= {"tracker_project", "tracker_run", "max_broken", "max_image_pixels"}


MAY_CHANGE |= {
    "log_every",
    "sample_every",
    "sample_count",
    "sample_steps",
    "sample_raw",
    "push_to_hub",
    "hub_private",
    "license",
}


MAY_CHANGE |= {"eval_every", "eval_data", "eval_split", "eval_images", "eval_evaluations"}


def load_config(argv: list[str], kind: type[RunConfig] = TrainConfig) -> tuple[RunConfig, bool]:
    """`--config digits --steps 10 --unet.dropout 0.1` -> the resolved config, and whether `--dry_run` was given.

    What the data and a pipeline to begin with decide is left to `resolve.resolve`, unless a run is resumed, which knows it.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type, a missing value or file.
        SystemExit: `--help` was given, and is printed.
    """
    if {"-h", "--help"} & set(argv):
        from ddpm_hf.training.usage import usage

        print(usage(kind))
        raise SystemExit(0)
    fields = {field.name: field.type for field in dataclasses.fields(kind) if field.init}
    arguments, dry_run = _read_arguments(argv, kind, fields)
    source = arguments.pop("config", None if "data" in arguments else "digits")
    values, explicit, preset = _read_config(source, kind) if source is not None else ({}, set(), None)
    for key, text in arguments.items():
        part, _, name = key.partition(".")
        if name:
            inner = values.get(part) or {}
            if not isinstance(inner, dict):
                raise ConfigError(f"{part}={shown(inner)} must hold keys and values")
            values[part] = {**inner, name: _parse(text)}
        else:
            values[key] = _parse(text, _kinds(fields[key]))
        explicit |= {key} if name else _names({key: values[key]}, kind)
    for key, value in values.items():
        if key not in fields:
            raise _unknown(key, kind, fields)
        values[key] = _typed(key, value, fields[key])
    for key in ("data", "eval_data", "init_from", "pipeline", "output_dir"):
        if values.get(key):
            values[key] = os.path.expanduser(values[key])
    if preset is None and "output_dir" not in values:
        values["output_dir"] = _folder_of(values.get("data", "digits"), kind)
    config = kind(**values)
    config.preset, config.explicit = preset, frozenset(explicit)
    config.resolved = preset is not None and not config.begins_with
    check(config)
    if path := _find_checkpoint(config):
        _adopt(config, path)
        check(config)
    _compare(config, path)
    return config, dry_run


def _folder_of(data, kind):
    path = Path(os.path.abspath(data))
    name = re.sub(r"[^\w.-]+", "-", path.stem if os.path.isfile(path) else path.name) or "data"
    return f"runs/{name}{'-classifier' if kind is ClassifierConfig else ''}"


def _read_arguments(argv, kind, fields):
    arguments, rest, dry_run = {}, list(argv), False
    while rest:
        word = rest.pop(0)
        if not re.match(r"--[A-Za-z]", word):
            raise ConfigError(f"cannot read {shown(word)}; arguments are --key value, see --help")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key == "dry_run" and not equals:
            dry_run = True
            continue
        part, dot, name = key.partition(".")
        if dot and not name:
            raise ConfigError(
                f"--{key} names no key of {shown(part)}; give one, as in --{sections_of(kind)[0]}.dropout"
            )
        if name and part not in sections_of(kind):
            raise ConfigError(
                f"--{key}: only {' and '.join(sections_of(kind))} have keys of their own{nearest(part, sections_of(kind))}"
            )
        if key != "config" and part not in fields:
            raise _unknown(key, kind, fields)
        if not equals:
            if rest and not re.match(r"--[A-Za-z]", rest[0]):
                text = rest.pop(0)
            elif fields.get(key) is bool:
                text = "true"
            else:
                raise ConfigError(f"--{key} has no value")
        if key == "config" and key in arguments:
            raise ConfigError(
                f"--config {arguments[key]} and --config {text} were given; name one as `base:` of the other"
            )
        arguments[key] = text
    return arguments, dry_run


def _unknown(key, kind, fields):
    """The error of a key that there is not; perhaps it is one of a section."""
    from ddpm_hf.training.usage import section_keys

    for section in sections_of(kind):
        if key in section_keys(kind, section):
            return ConfigError(f"unknown key {shown(key)}; did you mean '{section}.{key}'?")
    close = nearest(key, (*fields, "config", "dry_run"))
    return ConfigError(f"unknown key {shown(key)}{close if 'mean' in close else '; --help lists all keys'}")


def _names(values, kind):
    """{"steps": 1, "unet": {"dropout": 0.1}} -> {"steps", "unet.dropout"}."""
    names = set()
    for key, value in values.items():
        inner = key in sections_of(kind) and isinstance(value, dict)
        names |= {f"{key}.{name}" for name in value} if inner else {key}
    return names


def _read_config(source, kind, seen=()):
    """The values of a preset or file over those of its `base`; the names that the user's files give; the preset, if any."""
    is_preset = not source.endswith((".yaml", ".yml"))
    path = kind.PRESETS / f"{source}.yaml" if is_preset else Path(os.path.expanduser(source))
    where = f"config {shown(source)}" if not seen else f"base of {seen[-1]}: {shown(source)}"
    if not os.path.isfile(path):
        known = sorted(preset.stem for preset in kind.PRESETS.glob("*.yaml"))
        if os.path.isdir(source):
            hint = f"is a folder; its pictures are given by --data {source}"
            if (Path(source) / "config.yaml").is_file():
                hint = f"is a folder; give {Path(source) / 'config.yaml'}"
        elif not is_preset:
            hint = "does not exist"
        else:
            close = difflib.get_close_matches(source, known, n=1)
            hint = "is neither a .yaml file nor a preset; "
            hint += f"did you mean {close[0]!r}? " if close else ""
            hint += f"presets: {', '.join(known)}"
        raise ConfigError(f"{where} {hint}")
    if path.resolve() in (each.resolve() for each in seen):
        raise ConfigError(f"{where} leads back to itself: {' -> '.join(map(str, (*seen, path)))}")
    values = _read_yaml(path)
    base = values.pop("base", None)
    names = set() if is_preset else _names(values, kind)
    if base is None:
        return values, names, source if is_preset else None
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={shown(base)} must be a preset or a .yaml file")
    if base.endswith((".yaml", ".yml")):
        base = str(path.parent / os.path.expanduser(base))
    inherited, explicit, preset = _read_config(base, kind, (*seen, path))
    for section in sections_of(kind):
        if isinstance(values.get(section), dict) and isinstance(inherited.get(section), dict):
            values[section] = inherited[section] | values[section]
    return inherited | values, explicit | names, preset


def _read_yaml(path):
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a YAML file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, one a line")
    return values


def _parse(text, kinds=()):
    """The value of an argument; texts stay as they are: YAML would take "no", "2024", "run #2" for something else."""
    if str in kinds:
        return None if text in ("", "~", "null") and types.NoneType in kinds else text
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    a_list = kinds and all(typing.get_origin(each) is list for each in kinds)
    if a_list and not isinstance(value, list) or isinstance(value, str) and "," in text:
        entries = [entry.strip() for entry in text.split(",", 1000) if entry.strip()]
        return entries if list[str] in kinds else [_parse(entry) for entry in entries]
    return value


def sections_of(kind: RunConfig | type[RunConfig]) -> tuple[str, str]:
    """The keys that hold keys of their own."""
    return kind.NETWORK, "scheduler"


def nearest(key, known):
    """The end of an error message about an unknown key."""
    key, known = str(key)[:60], list(known)
    initials = {"".join(word[:1] for word in name.split("_")): name for name in reversed(known) if "_" in name}
    close = [name for name in (ALIASES.get(key), initials.get(key)) if name in known]
    close += difflib.get_close_matches(key, known, n=1) or [name for name in known if key in name.split("_")]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _kinds(expected):
    """The types of a field."""
    return typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)


def _typed(key, value, expected):
    """The value in the type of its field."""
    if expected is dict and value is None:
        return {}
    try:
        return check_argument(key, value, expected, RANGES.get(key))
    except ValueError as error:
        raise ConfigError(f"{error}{', in quotes' if str in _kinds(expected) else ''}") from None


def check(config: RunConfig) -> None:
    """Raises ConfigError for values that are none or do not go together."""
    _check_run(config)
    (_check_training if isinstance(config, TrainConfig) else _check_classifier)(config)


NO_TEXT = re.compile("[\x00\ud800-\udc7f\udd00-\udfff]")  # characters that no file or model card can hold


HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")  # "name" or "user/name"


PATHS = ("data", "eval_data", "init_from", "pipeline", "output_dir", "resume")


COUNT, MORE_OR_NONE = "[1, 1000000000000]", "[0, 1000000000000]"


RANGES = {
    **dict.fromkeys(
        ("steps", "batch_size", "gradient_accumulation_steps", "shuffle_buffer", "max_steps_skipped"), COUNT
    ),
    **dict.fromkeys(("log_every", "keep_checkpoints", "eval_images"), COUNT),
    **dict.fromkeys(("lr_warmup_steps", "num_workers", "checkpoint_every", "eval_every"), MORE_OR_NONE),
    **dict.fromkeys(("sample_every", "sample_raw"), MORE_OR_NONE),
    **dict.fromkeys(("held_out", "max_broken", "adam_betas", "ema_decay"), "[0, 1)"),
    **dict.fromkeys(("conditioning_noise", "label_dropout"), "[0, 1)"),
    **dict.fromkeys(("image_size", "low_resolution"), "[1, 65536]"),
    **dict.fromkeys(("sample_count", "sample_steps"), "[1, 100000]"),
    "memory_gb": "[0, 1000000]",
    "crop": ("center", "none"),
    "channels": "[1, 4]",
    "learning_rate": "(0, 1e38]",
    "weight_decay": "[0, 1000]",
    "max_grad_norm": "(0, inf]",
    "mixed_precision": ("no", "bf16", "fp16"),
    "channels_last": ("auto", "true", "false"),
    "seed": "[0, 4294967295]",
    "init": ("paper", "torch"),
    "vlb_weight": "[0, 1000000]",
    "eval_evaluations": "[8, 1000000000000]",
    "random_crop": "(0, 1]",
}


def _check_run(config):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            check_argument(field.name, value, field.type, RANGES.get(field.name))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        most = 500 if field.name == "split" else 2000  # as in the record of a training that is read again
        if isinstance(value, str) and (len(value) > most or NO_TEXT.search(value)):
            raise ConfigError(
                f"{field.name}={shown(value)} must be text of at most {most:,} characters that can be written"
            )
    for key in PATHS:
        if any(len(part.encode(errors="surrogateescape")) > 255 for part in Path(getattr(config, key, "") or "").parts):
            raise ConfigError(
                f"{key}={shown(getattr(config, key))}: file names have at most 255 bytes; take a shorter one"
            )
    if config.held_out and config.streaming:
        raise ConfigError(
            f"held_out={config.held_out} is not for streams; name held-out images by eval_split or eval_data"
        )
    if config.held_out and config.eval_data:
        raise ConfigError(
            f"held_out={config.held_out} and eval_data={shown(config.eval_data)} name held-out images twice; give one"
        )
    if config.num_workers > WORKERS_A_CORE * os.cpu_count():
        raise ConfigError(
            f"num_workers={config.num_workers} is more than {WORKERS_A_CORE} for each of {os.cpu_count()} cores, which would "
            "make the machine unresponsive; take as many as there are cores, or fewer"
        )
    lists = {
        f"{part}.{key}": value
        for part in sections_of(config)
        for key, value in getattr(config, part).items()
        if isinstance(value, (list, tuple)) and len(value) > 1000
    }
    if lists:  # of a pipeline perhaps, whose file may be larger
        try:
            parse_yaml(as_yaml(config))
        except ValueError as error:
            key = max(lists, key=lambda key: len(lists[key]))
            raise ConfigError(
                f"{key} has {len(lists[key]):,} values, with which config.yaml could not be read again: {error}; give fewer"
            ) from None
    if not config.data:
        raise ConfigError("data is empty; name a data set")
    if not config.output_dir:
        raise ConfigError("output_dir is empty; name a folder")
    if len(config.adam_betas) != 2:
        raise ConfigError(f"adam_betas={shown(config.adam_betas)} must be two numbers, as [0.9, 0.999]")
    if config.channels not in (1, 3, 4):
        raise ConfigError(f"channels={config.channels} must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    for name in config.DERIVED:
        if name in getattr(config, config.NETWORK):
            raise ConfigError(f"{config.NETWORK}.{name} follows from the other keys of the run; leave it out")
    size = image_size(config)
    if len(size) != 2:
        raise ConfigError(f"image_size={shown(config.image_size)} must be one number or [height, width]")
    # everything that is no Hub id and is not there is a path that is not there
    is_path = not HUB_ID.fullmatch(config.data) or config.data.endswith(".parquet")
    if (is_path or config.data.startswith(".")) and not os.path.exists(config.data):
        raise ConfigError(f"data={shown(config.data)} does not exist")
    output = Path(config.output_dir).absolute()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir={shown(config.output_dir)} is a file")
    there = next(path for path in (output, *output.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(f"output_dir={shown(config.output_dir)}: {there} may not be written to; name another")


def _check_training(config):
    low = sides(config.low_resolution or 0)
    if (
        config.resolved
        and config.low_resolution is not None
        and not (len(low) == 2 and all(small < side for small, side in zip(low, image_size(config))))
    ):
        raise ConfigError(
            f"low_resolution={shown(config.low_resolution)} must be smaller than image_size={config.image_size}"
        )
    if config.conditioning_noise and not config.low_resolution:
        raise ConfigError(
            f"conditioning_noise={config.conditioning_noise} is for networks with low_resolution; leave it out"
        )
    if config.low_resolution and config.eval_every:
        raise ConfigError("eval_every measures networks that begin with noise alone; leave it out with low_resolution")
    if config.resolved and config.process != "ddpm":
        _check_continuous(config)
    if config.push_to_hub is not None and not HUB_ID.fullmatch(config.push_to_hub):
        raise ConfigError(f"push_to_hub={shown(config.push_to_hub)} must be user/name, as on the Hub")
    if config.resolved and config.label_dropout and config.label_column is None:
        raise ConfigError(f"label_dropout={config.label_dropout} needs labels; name their label_column")
    if config.resolved:
        _check_network(config, image_size(config))


def _check_continuous(config):
    processes = ("ddpm", "vp", "subvp", "ve")
    if config.process not in processes:
        raise ConfigError(f"process={shown(config.process)} is not known{nearest(config.process, processes)}")
    for key, known in (
        ("loss", ("simple",)),
        ("weighting", (None, "likelihood")),
        ("timesteps", ("uniform", "importance")),
    ):
        if getattr(config, key) not in known:
            listed = ", ".join("null" if each is None else each for each in known)
            raise ConfigError(
                f"{key}={shown(getattr(config, key))} is of discrete timesteps; with process={config.process} take {listed}"
            )
    if config.low_resolution:
        raise ConfigError(f"low_resolution is of process=ddpm, not of {config.process}")
    prediction = config.scheduler.get("prediction_type", "score")
    if config.process == "ve" and prediction != "score":
        raise ConfigError(
            f"scheduler.prediction_type={shown(prediction)}: networks that are told sigma divide by it, as scores want; leave "
            "it out"
        )
    if not config.scheduler.get("centered", True):
        raise ConfigError(
            "scheduler.centered=false: images are trained in [-1, 1]; leave it out, and double sigma_min and sigma_max"
        )


def _check_classifier(config):
    if config.label_column is None or (config.resolved and not isinstance(config.classes, int)):
        raise ConfigError("a classifier needs label_column, and classifier.num_classes: how many labels there are")
    _check_channels("classifier", config.classifier)


def _check_channels(part, network):
    channels = network.get("block_out_channels", (224, 448, 672, 896))
    if not isinstance(channels, (list, tuple)) or not 1 <= len(channels) <= 16:
        raise ConfigError(f"{part}.block_out_channels={shown(channels)} must be a list of integers, one for each level")
    return channels


def _check_network(config, size):
    channels = _check_channels("unet", config.unet)
    if not isinstance(config.classes, (int, types.NoneType)):
        raise ConfigError(
            f"unet.num_class_embeds={shown(config.classes)} must be an integer, how many labels there are"
        )
    stride = 2 ** (len(channels) - 1)
    if any(side < 1 or side % stride for side in size):
        raise ConfigError(
            f"image_size={config.image_size} must be a multiple of {stride}: unet.block_out_channels has {len(channels)} "
            f"levels, each halving the image"
        )
    if (config.label_column is None) != (config.unet.get("num_class_embeds") is None):
        raise ConfigError(
            f"label_column={shown(config.label_column)} and unet.num_class_embeds={shown(config.classes)} go "
            "together: give both for a class-conditional network, or neither"
        )


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, `<output_dir>/checkpoints/<step>`, the newest last."""
    return _steps(Path(output_dir, "checkpoints"))


def checkpoints_before(path: Path) -> list[Path]:
    """The checkpoints beside `path` with fewer steps, the newest last; none where its name is no step."""
    if not path.name.isdecimal():
        return []
    return [each for each in _steps(path.parent) if int(each.name) < int(path.name)]


def _steps(folder):
    """The folders in `folder` whose names are steps, in their order."""
    steps = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.name))


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The checkpoint from which the run `config` is resumed; None for a new run.

    Raises:
        ConfigError: output_dir holds something else than this run, or a run of another config; `resume` names no checkpoint.
    """
    path = _find_checkpoint(config)
    _compare(config, path)
    return path


def _find_checkpoint(config):
    output, found = Path(config.output_dir), checkpoints_in(config.output_dir)
    path = None if config.resume in ("auto", "never") else Path(os.path.expanduser(config.resume))
    if path and (inside := checkpoints_in(path)):
        raise ConfigError(
            f"resume={shown(config.resume)} is the folder of a run; give one of its checkpoints, as {inside[-1]}"
        )
    if path and not any((path / name).is_file() for name in ("run.pt", "config.yaml", "digests.json")):
        raise ConfigError(f"resume={shown(config.resume)} is neither auto, never nor a folder .../checkpoints/<step>")
    if path and path.parent.resolve() == (output / "checkpoints").resolve():
        if not found or path.name != found[-1].name:
            raise ConfigError(
                f"output_dir={shown(config.output_dir)} holds something already: "
                f"newer checkpoints than resume={shown(config.resume)}; "
                "to resume from an older one give another output_dir"
            )
        path = None  # what auto does
    ours = config.resume != "never" and bool(found or _has_begun(config))
    if ours and path:
        ours = _run_of(found[-1] if found else output).get("resume") == config.resume
    names = {name for name in os.listdir(output) if name[0] != "."} if output.is_dir() else set()
    # the first file that a run writes
    filled = bool(names - {"environment.json"} if _is_environment(output / "environment.json") else names)
    ended = (output / ("pipeline" if isinstance(config, TrainConfig) else "classifier")).exists()
    if filled and (not ours or (not found and ended)):
        raise ConfigError(f"output_dir={shown(config.output_dir)} holds something already; choose another")
    return found[-1] if found else path


def _has_begun(config):
    """Whether a run lies in output_dir, perhaps stopped before its first checkpoint, or its folder was removed meanwhile."""
    try:
        values = _read_run(Path(config.output_dir))
    except ConfigError:
        return False
    return values.keys() <= {field.name for field in dataclasses.fields(config)}


def _is_environment(path):
    """Whether a file is what a run writes of where it is computed."""
    try:
        return {"versions", "platform", "processes"} <= read_json(path).keys()
    except (OSError, ValueError):
        return False


def _adopt(config, path):
    """Gives a run that is resumed what was found for it in its data and its pipeline when it began."""
    run = _run_of(path)
    for field in dataclasses.fields(config):
        key, of_pipeline = field.name, config.begins_with and field.name in config.FROM_PIPELINE
        found = config.preset is None and field.metadata.get("found") and key != "output_dir"
        if key in run and key not in config.explicit and (found or of_pipeline):
            value = _typed(key, run[key], field.type)
            if key in sections_of(config):
                now = getattr(config, key)
                value |= {name: now[name] for name in now if f"{key}.{name}" in config.explicit}
            setattr(config, key, value)
    config.resolved = not getattr(config, "pipeline", None)  # which is opened again: it is saved with the classifier


def _compare(config, path):
    """Raises ConfigError where a run would resume from the checkpoint `path`, or begin anew, with other settings."""
    if path:
        _compare_with(config, path)
        if path.name.isdigit() and int(path.name) > config.steps:
            raise ConfigError(
                f"steps={config.steps}, but {path} is further already; give more steps or another output_dir"
            )
    rows = Path(config.output_dir, "metrics.jsonl")
    if config.resolved and not checkpoints_in(config.output_dir) and rows.is_file() and rows.stat().st_size:
        _compare_with(config, Path(config.output_dir))  # whose rows would be lost


def _compare_with(config, path):
    """Of `_compare`: with the config of a checkpoint, or of the run in the folder `path`."""
    defaults = dataclasses.asdict(type(config)())
    before, now = (_flat(values, config) for values in ({**defaults, **_run_of(path)}, dataclasses.asdict(config)))
    may_change = MAY_CHANGE
    if config.lr_schedule.startswith("constant"):
        may_change = may_change | {"steps", "learning_rate"}
    if not config.resolved:  # they are the pipeline's, which has not been opened yet
        may_change = may_change | {*config.FROM_PIPELINE}
    may_change -= {"num_workers"} if config.streaming else set()  # they divide the stream
    changed = [
        f"{key}={_shown(now, key)}, but {path} was trained with {_shown(before, key)}"
        for key in {**now, **{key: None for key in before if "." in key}}
        if key.partition(".")[0] not in may_change and before.get(key) != now.get(key)
    ]
    if changed:
        more = f" ({len(changed) - 1} more: {'; '.join(changed[1:4])})".replace(f"{path} was trained with", "it had")
        anew, run = "another output_dir", path.parents[1] if path.parent.name == "checkpoints" else path
        if isinstance(config, TrainConfig) and path != Path(config.output_dir):
            anew = f"start a new run from its weights: --init_from {run / 'pipeline'} --output_dir <another>"
        raise ConfigError(f"{changed[0]}{more if len(changed) > 1 else ''}; give that, or {anew}")


def _flat(values, config):
    """The keys of the sections as "unet.dropout"."""
    flat = {}
    for key, value in values.items():
        inner = key in sections_of(config) and isinstance(value, dict)
        flat |= {f"{key}.{name}": each for name, each in value.items()} if inner else {key: value}
    return flat


def _shown(values, key):
    if key not in values:
        return "its default"
    text = repr(values[key])
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _run_of(checkpoint):
    """The config of a checkpoint; where it cannot be read, of one before, or of the run: the same where it matters."""
    path = checkpoint.absolute()
    others = [*reversed(checkpoints_before(path)), *([path.parents[1]] if path.parent.name == "checkpoints" else [])]
    for folder in (checkpoint, *others):
        with contextlib.suppress(ConfigError):
            return _read_run(folder)
    return _read_run(checkpoint)


def _read_run(folder):
    try:
        if (folder / DIGESTS).exists():
            check_digests(folder, "config.yaml")
        values = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / 'config.yaml'} cannot be read; put it back, or take another output_dir")
    return values


def as_yaml(config: RunConfig) -> str:
    """The whole config as config.yaml holds it."""
    values = dataclasses.asdict(config)
    del values["preset"]
    return dump_yaml(values)


def image_size(config: RunConfig) -> tuple[int, ...]:
    """(height, width) in pixels."""
    return sides(config.image_size)
