"""What a training run needs: one frozen dataclass for each kind of run. Imports nothing slow, so that mistakes show at once."""

import copy
import dataclasses
import difflib
from pathlib import Path
from typing import Any, ClassVar

from ddpm_hf.arguments import shown, sides
from ddpm_hf.errors import UserError
from ddpm_hf.files.strict_yaml import dump_yaml
from ddpm_hf.training.other_scripts import ALIASES

# beside the package where it is installed; in training/ of a checkout
PRESETS = next(
    path
    for path in (Path(__file__).parents[1] / "configs", Path(__file__).parents[3] / "training/configs")
    if path.is_dir()
)


class ConfigError(UserError, ValueError):
    """A mistake in a run's configuration; its message is one line."""


def _group(name):
    """Makes the fields of one group of --help. `from_data`: without a preset, resolve() finds the value in the data."""

    def key(default: Any, text: str, from_data: bool = False) -> Any:
        metadata = {"group": name, "help": text, "from_data": from_data}
        if isinstance(default, (list, dict)):
            return dataclasses.field(default_factory=default.copy, metadata=metadata)
        return dataclasses.field(default=default, metadata=metadata)

    return key


_data, _network, _training = _group("data"), _group("network and noise scheduler"), _group("training")
_output, _evaluation, _publishing = _group("what it writes"), _group("evaluation"), _group("publishing")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The keys of every training run, in a YAML file or on the command line. "Steps" are optimizer steps."""

    data: str = _data(
        "digits",
        "digits, mnist, a folder of images, .parquet, .arrow or .tar files, a save_to_disk folder, or a Hub id",
    )
    split: str = _data("train", "split of the data, as train or train[:1000]")
    held_out: float = _data(
        0.0, "share of the split set aside at random for eval_every; always the same images", from_data=True
    )
    streaming: bool = _data(False, "read images when they are needed, from files or the Hub; copy nothing to the disk")
    shuffle_buffer: int = _data(10000, "size of a stream's shuffle buffer, in images")
    image_column: str | None = _data(None, "column of the images; null: the only one")
    label_column: str | None = _data(None, "column of class labels; null: none", from_data=True)
    max_broken: float = _data(0.01, "largest share of unreadable images that is skipped; more end the run")
    max_image_pixels: int | None = _data(None, "larger images count as broken; null: above Pillow's limit, 178,956,970")
    memory_gb: float = _data(1.0, "a data set whose pixels need no more is decoded once and kept in memory")
    image_size: int | list[int] = _data(
        8, "side, or [height, width]; images are scaled and cropped to it", from_data=True
    )
    crop: str = _data("center", "center: crop what is too long; none: stretch")
    background: str = _data("white", "color behind transparent pixels, for less than 4 channels; a name or #rrggbb")
    channels: int = _data(1, "1 (grey), 3 (RGB) or 4 (RGBA)", from_data=True)
    random_flip: bool = _data(False, "mirror each image left to right with probability 1/2")
    scheduler: dict = _network({}, "keys of the noise scheduler: see --scheduler.KEY below", from_data=True)
    steps: int = _training(1000, "optimizer steps")
    minutes: float | None = _training(None, "train for about this long: plan the steps by the network's measured speed")
    batch_size: int = _training(128, "images per forward pass, on each device", from_data=True)
    gradient_accumulation_steps: int = _training(1, "batches per optimizer step")
    learning_rate: float = _training(2e-4, "learning rate of AdamW", from_data=True)
    lr_schedule: str = _training("constant_with_warmup", "a name of diffusers' get_scheduler")
    lr_warmup_steps: int = _training(0, "steps over which the learning rate rises from 0")
    adam_betas: list[float] = _training([0.9, 0.999], "decay rates of AdamW's two moments")
    weight_decay: float = _training(0.0, "weight decay of AdamW")
    max_grad_norm: float = _training(1.0, "gradients are clipped to this norm; .inf: never")
    max_steps_skipped: int = _training(25, "consecutive steps without a finite gradient before the run gives up")
    mixed_precision: str = _training("no", "no, bf16, fp16")
    compile: bool = _training(False, "use torch.compile: the first steps are slow, the others faster")
    channels_last: str = _training(
        "auto", "memory layout: true, false; auto: when compiled on the CPU, or in half precision on an accelerator"
    )
    gradient_checkpointing: bool = _training(
        False, "recompute activations in the backward pass instead of storing them"
    )
    num_workers: int = _training(0, "worker processes that read images")
    seed: int = _training(0, "seed of the weights, the noise and the order of images")
    output_dir: str = _output("runs/digits", "folder of the run", from_data=True)
    resume: str = _output(
        "auto", "auto: from the newest checkpoint in output_dir, if any; never; or a checkpoint's path"
    )
    checkpoint_every: int = _output(1000, "steps between checkpoints, with one at the end; 0: none")
    keep_checkpoints: int = _output(2, "how many of the newest to keep, beside the best on held-out images")
    log_every: int = _output(20, "steps between rows of metrics.jsonl")
    trackers: list[str] = _output([], "accelerate's trackers, separated by commas: tensorboard, wandb, trackio, ...")
    tracker_project: str = _output("ddpm-hf", "project name in the trackers")
    tracker_run: str | None = _output(None, "run name in the trackers; null: the name of output_dir")
    eval_every: int = _evaluation(
        0, "steps between measurements of held-out images, with one at the end; 0: none", from_data=True
    )
    eval_data: str | None = _evaluation(None, "held-out images, written as for data; null: from data itself")
    eval_split: str = _evaluation("test", "split of the held-out images, where held_out is 0")
    eval_images: int = _evaluation(64, "how many held-out images are measured")

    # No keys: where the values come from.
    preset: str | None = dataclasses.field(default=None, kw_only=True)
    """The preset that the run started from, for the model card."""
    explicit: frozenset[str] = dataclasses.field(default=frozenset(), kw_only=True)
    """Keys ("steps", "unet.dropout") from the command line or a file of the user's; those of a preset are defaults."""
    resolved: bool = dataclasses.field(default=True, kw_only=True)
    """Whether no value is left to be found in the data or in a pipeline; see `resolve`."""
    planned: bool = dataclasses.field(default=False, kw_only=True)
    """Whether the steps and what follows from them are those that fit into `minutes`; see `plan`."""
    facts: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, compare=False)
    """What was found in the data, and chosen for it, in words."""
    program: str = dataclasses.field(default="", kw_only=True)
    """The command that runs it, as messages name it; empty: `PROGRAM`."""

    PROGRAM: ClassVar[str]
    SUMMARY: ClassVar[str]
    EXAMPLES: ClassVar[tuple[tuple[str, str], ...]]
    """Arguments and a comment each, for --help; a first word without -- is the data."""
    PRESETS: ClassVar[Path]
    RESULT: ClassVar[str]
    """The folder in output_dir in which the trained network is saved."""
    NETWORK: ClassVar[str]
    """The section with the keys of the network."""
    DERIVED: ClassVar[tuple[str, ...]]
    """Keys of the network that follow from other keys of the run."""
    CLASSES: ClassVar[str]
    """The key of the network that holds the number of classes."""
    FROM_PIPELINE: ClassVar[tuple[str, ...]]
    """Keys that are taken from the pipeline that the run starts from, unless they are explicit."""

    def __post_init__(self):
        if not self.program:
            object.__setattr__(self, "program", getattr(self, "PROGRAM", ""))

    @property
    def base_pipeline(self) -> str | None:
        """The folder or Hub id of the pipeline that the run starts from."""
        raise NotImplementedError

    @property
    def network(self) -> dict:
        """The keys of the network."""
        return getattr(self, self.NETWORK)

    @property
    def classes(self) -> int | None:
        """The number of classes."""
        return self.network.get(self.CLASSES)


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The keys of a run that trains a diffusion model."""

    PROGRAM = "train.py"
    SUMMARY = "Train a diffusion model (Ho, Jain, Abbeel 2020) and save it as a pipeline that diffusers opens."
    EXAMPLES = (
        ("my_folder/", "settings follow the pictures"),
        ("my_folder/ --minutes 30", "as many steps as fit into half an hour"),
        ("--config digits", "a preset, or a YAML file"),
        ("--config cifar10 --data my_folder/ --image_size 64", "a preset with other data"),
        ("--config mnist --steps 100 --dry_run", "print all settings and stop"),
    )
    PRESETS = PRESETS
    RESULT = "pipeline"
    NETWORK = "unet"
    DERIVED = ("sample_size", "in_channels", "out_channels", "_ddpm_hf")
    CLASSES = "num_class_embeds"
    FROM_PIPELINE = (
        *("unet", "scheduler", "process", "image_size", "channels", "low_resolution", "conditioning_noise"),
        *("label_column", "label_dropout", "loss"),
    )

    unet: dict = _network({}, "keys of the network: see --unet.KEY below", from_data=True)
    init_from: str | None = _network(None, "pipeline to start from: a folder or Hub id, also one of plain diffusers")
    init: str = _network(
        "paper", "initial weights: paper (zeros where its code has them) or torch (as diffusers' class)"
    )
    process: str = _network("ddpm", "diffusion process: ddpm; in continuous time (Score-SDE) vp, subvp, ve")
    low_resolution: int | list[int] | None = _network(None, "size of the images that a super-resolution model enlarges")
    conditioning_noise: float = _network(0.0, "highest noise level added to those images in training, below 1")
    loss: str = _training("simple", "simple, vlb, hybrid; with learned betas vlb, vlb_continuous")
    vlb_weight: float = _training(0.001, "weight of the bound in the hybrid loss")
    noise_schedule_learning_rate: float = _training(1e-2, "learning rate of --scheduler.beta_schedule learned")
    weighting: str | None = _training(
        None, "weights of the loss by t: min_snr, truncated_snr, p2; in continuous time likelihood"
    )
    dequantize: bool = _training(False, "add uniform noise one grey level wide, for bits/dim by the ODE")
    label_dropout: float = _training(0.0, "share of labels replaced by 'no class', for guidance_scale")
    timesteps: str = _training(
        "uniform",
        "uniform, low_discrepancy; in discrete time loss_second_moment, in continuous time importance",
    )
    ema_decay: float = _training(0.9999, "decay of the averaged weights, which are saved and sampled")
    sample_every: int = _output(
        1000, "steps between sheets of EMA samples, without a preset also one at the end; 0: none"
    )
    sample_raw: int = _output(5, "how many of the first sheets come with one of the raw weights")
    sample_count: int = _output(64, "samples on a sheet")
    sample_steps: int | None = _output(None, "sampling steps; null: the noise scheduler's default", from_data=True)
    eval_evaluations: int = _evaluation(50, "network calls per held-out image, with --process ddpm")
    eval_metrics: list[str] = _evaluation(
        [], "fd: at every eval_every also the Fréchet distance of EMA samples to the training images"
    )
    eval_samples: int = _evaluation(2048, "how many samples eval_metrics draws")
    eval_extractor: str = _evaluation("efficientnet-lite0", "features of eval_metrics: --extractor of ddpm-hf evaluate")
    best_by: str = _evaluation("bits_per_dim", "bits_per_dim or fd: the checkpoint with the lowest is kept as the best")
    push_to_hub: str | None = _publishing(
        None, "user/name of a repository on the Hub, updated at each checkpoint; null: nowhere"
    )
    hub_private: bool = _publishing(False, "create the repository as a private one")
    license: str | None = _publishing(None, "license in the model card, by the Hub's name for it, as apache-2.0")

    @property
    def base_pipeline(self):
        return self.init_from


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(RunConfig):
    """The keys of a run that trains a classifier of noisy images."""

    PROGRAM = "train_classifier.py"
    SUMMARY = "Train a classifier of noisy images for classifier guidance (Dhariwal & Nichol 2021, section 4)."
    EXAMPLES = (
        ("--config digits --pipeline runs/digits-classes/pipeline", "to guide this pipeline"),
        ("my_folder/", "by itself"),
        ("--config mnist --steps 100 --dry_run", "print all settings and stop"),
    )
    PRESETS = PRESETS / "classifier"
    RESULT = "classifier"
    NETWORK = "classifier"
    DERIVED = ("sample_size", "in_channels", "scheduler")
    CLASSES = "num_classes"
    FROM_PIPELINE = ("scheduler", "image_size", "channels")

    label_column: str | None = _data("label", "column of class labels", from_data=True)
    classifier: dict = _network({}, "keys of the classifier: see --classifier.KEY below", from_data=True)
    pipeline: str | None = _network(None, "folder or Hub id of the pipeline to guide: its scheduler, size and channels")
    random_crop: float = _training(
        0.8, "smallest share of the sides that a random crop keeps, before it is scaled up; 1: no crop"
    )
    weight_decay: float = _training(0.05, "weight decay of AdamW")
    output_dir: str = _output("runs/digits-classifier", "folder of the run", from_data=True)

    @property
    def base_pipeline(self):
        return self.pipeline


def keys_of(config: RunConfig | type[RunConfig]) -> list[dataclasses.Field]:
    """The fields that are keys of a YAML file and of the command line."""
    return [field for field in dataclasses.fields(config) if "group" in field.metadata]


def values_of(config: RunConfig) -> dict[str, Any]:
    """The keys and their values; lists and dictionaries are copies."""
    return {field.name: copy.deepcopy(getattr(config, field.name)) for field in keys_of(config)}


def learns_betas(config: RunConfig) -> bool:
    """Whether the run learns its betas; those of a pipeline that it starts from are kept as they are."""
    is_learned = config.scheduler.get("beta_schedule") == "learned"
    return isinstance(config, TrainConfig) and is_learned and "trained_betas" not in config.scheduler


def sections_of(config: RunConfig | type[RunConfig]) -> tuple[str, str]:
    """Return the sections: keys that hold further keys."""
    return config.NETWORK, "scheduler"


def as_yaml(config: RunConfig) -> str:
    """The whole config as config.yaml holds it."""
    return dump_yaml(values_of(config))


def shown_value(value: Any) -> str:
    """A value as messages about keys show it: `shown`, and null where Python has None."""
    return "null" if value is None else shown(value)


def null_for_none(message: str) -> str:
    """A message of `check_argument` about a key, with null where it says None."""
    return message.replace("=None ", "=null ", 1).removesuffix(" or None") + " or null" * message.endswith(" or None")


def image_size(config: RunConfig) -> tuple[int, int]:
    """(height, width) in pixels."""
    return sides(config.image_size)


def nearest(key, names) -> str:
    """Return the end of an error message about an unknown name: a similar name, or all allowed names."""
    key, names = str(key)[:60], list(names)
    initials = {"".join(word[:1] for word in name.split("_")): name for name in reversed(names) if "_" in name}
    close = [name for name in (ALIASES.get(key), initials.get(key)) if name in names]
    close += difflib.get_close_matches(key, names, n=1) or [name for name in names if key in name.split("_")]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
